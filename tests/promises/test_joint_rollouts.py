"""Workers that take all minibatches from a rollout that each has whole take the steps of workers that share them."""

import math
import re
import zlib
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, RandomEnv, policy_name
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from worker_processes import RANKS, Ranks

from sb3_trpo_ext import PPOClip, PPOPenalty, WorkerError, every_rank
from sb3_trpo_ext.core.flat_optimizer import FlatDescent
from sb3_trpo_ext.policy.problem import Comparison
from sb3_trpo_ext.rollout.joint_rollout import JointRollout
from sb3_trpo_ext.training import first_order
from sb3_trpo_ext.training.minibatch_kernel import MinibatchSteps

STEPS, ENVS = 32, 2
SAMPLES = STEPS * ENVS * RANKS
NUMBERS = spaces.Dict({"vector": spaces.Box(-1, 1, (4,)), "choice": spaces.Discrete(3)})

REMAINDER = {"batch_size": 30, "n_epochs": 3}
"""Of which the last minibatch of an epoch is smaller."""

QUICK = {"batch_size": 24, "n_epochs": 8, "learning_rate": 3e-3}
FORMS: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "clip": (PPOClip, "box", "vector", REMAINDER),
    "clip-discrete": (PPOClip, "discrete", "vector", REMAINDER),
    "clip-dict": (PPOClip, "multidiscrete", "dict", REMAINDER),
    "clip-options": (PPOClip, "multibinary", "discrete", {**REMAINDER, "clip_range_vf": 0.1, "ent_coef": 0.1}),
    "clip-target": (PPOClip, "box", "vector", {**QUICK, "target_kl": 1e-3}),
    "clip-bound": (PPOClip, "box", "vector", {**QUICK, "max_kl": 1e-2}),
    "clip-nothing-kept": (PPOClip, "box", "vector", {**QUICK, "max_kl": 1e-9}),
    "clip-whole": (PPOClip, "box", "vector", {"batch_size": 10 * SAMPLES + 3, "n_epochs": 2}),
    "penalty": (PPOPenalty, "box", "vector", REMAINDER),
    "penalty-discrete": (PPOPenalty, "discrete", "vector", {**REMAINDER, "ent_coef": 0.1}),
    "penalty-bound": (PPOPenalty, "discrete", "vector", {**QUICK, "kl_coef": 0.1, "max_kl": 3e-3}),
}
SOME = range(2, 16)
KEPT = {"clip-target": SOME, "clip-bound": SOME, "penalty-bound": SOME, "clip-nothing-kept": [0]}
"""Epochs that are kept of two updates, where it is not all of them."""


def model_of(form: str, **changes: Any) -> Any:
    algorithm, action, observation, options = FORMS[form]
    space = NUMBERS if observation == "dict" else OBSERVATION_SPACES[observation]
    env = make_vec_env(lambda: RandomEnv(space, ACTION_SPACES[action]), ENVS)
    name = policy_name(algorithm, observation)
    return algorithm(name, env, **{"n_steps": STEPS, "seed": 0, "device": "cpu", **options, **changes})


def state_of(model: Any) -> np.ndarray:
    """Parameters, and the optimiser's state, in one vector."""
    moments = [each for state in model.policy.optimizer.state.values() for each in state.values()]
    return torch.cat([each.detach().double().flatten() for each in (*model.policy.parameters(), *moments)]).numpy()


def learnt(model: Any, steps: int = SAMPLES) -> dict[str, Any]:
    model.learn(steps, log_interval=100, reset_num_timesteps=False)
    record = {key: value for key, value in model.logger.name_to_value.items() if key.startswith("train/")}
    return {
        "state": state_of(model),
        "record": record,
        "messages": record.pop("train/messages", 0),
        "bytes": record.pop("train/message_bytes", 0),
        "numbers": (model._n_updates, getattr(model, "kl_coef", 0.0)),
        "drawn": zlib.crc32(np.random.get_state()[1].tobytes()) + np.random.get_state()[2],
        "reasons": list(model._reported_rejections),
        "path": model.update_path,
    }


def both_ways(rank: int, form: str) -> list[dict[str, Any]]:
    found = []
    for flop in (math.inf, -1):
        with patch.object(first_order, "FLOP_OF_A_MESSAGE", flop):
            found.append(learnt(model_of(form), 2 * SAMPLES))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_update_of_workers_that_send_messages(ranks: Ranks, form: str) -> None:
    found = ranks(both_ways, form)
    for joint, shared in found:
        assert joint["path"] == shared["path"] == "fast"
        assert joint["messages"] in (5, 6) and shared["messages"] > 6  # one fewer where nothing is kept
        np.testing.assert_allclose(joint["state"], shared["state"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(joint["state"], found[0][0]["state"])
        assert joint["record"] == found[0][0]["record"]
        assert joint["record"].keys() == shared["record"].keys()
        for name, expected in shared["record"].items():
            assert joint["record"][name] == pytest.approx(expected, rel=1e-3, abs=1e-5), name
        assert [joint[name] for name in ("numbers", "drawn", "reasons")] == [
            shared[name] for name in ("numbers", "drawn", "reasons")
        ]
        assert joint["numbers"][0] in KEPT.get(form, [2 * FORMS[form][-1]["n_epochs"]])


def in_little_memory(rank: int) -> list[int]:
    found = []
    for size in (first_order.JOINT_BYTES, SAMPLES * 20):
        with patch.object(first_order, "JOINT_BYTES", size):
            found.append(learnt(model_of("clip"), 2 * SAMPLES)["messages"])
    return found


def test_a_rollout_that_is_too_large_stays_where_it_is(ranks: Ranks) -> None:
    for joint, shared in ranks(in_little_memory):
        assert joint == 6 and shared > 3 * 7


def alone(rank: int, flop: float) -> np.ndarray:
    with patch.object(first_order, "FLOP_OF_A_MESSAGE", flop), patch.object(JointRollout, "of", None):
        return learnt(model_of("clip", distributed=False))["state"]


def test_one_process_has_its_rollout_whole_anyway(ranks: Ranks) -> None:
    expected = alone(0, math.inf)
    for found in (*ranks(alone, math.inf), *ranks(alone, -1)):
        np.testing.assert_array_equal(found, expected)


# Processors that round otherwise, which no decision may part.


def rounds_otherwise(stack: ExitStack) -> None:
    step = FlatDescent.step

    def another(self: Any) -> None:
        step(self)
        for param in self.parameters.values():
            param *= 1 + 1e-5

    stack.enter_context(patch.object(FlatDescent, "step", another))


def stops_at_once(stack: ExitStack) -> None:
    stack.enter_context(patch.object(PPOClip, "_exceeds_target", lambda self, approx_kl, epoch: True))


def rolls_back(stack: ExitStack) -> None:
    evaluate = Comparison.evaluate

    def far(self: Any) -> Any:
        return first_order.replace(evaluate(self), divergence=math.inf)

    stack.enter_context(patch.object(Comparison, "evaluate", far))


def rejects(stack: ExitStack) -> None:
    stack.enter_context(patch.object(MinibatchSteps, "descend", lambda self, max_norm: False))


def parted(rank: int, other: Any, odd: int) -> dict[str, Any]:
    model = model_of("clip", max_kl=10.0)
    with ExitStack() as stack:
        if rank == odd and other is not None:
            other(stack)
        found = learnt(model)
    return found | {"later": learnt(model)["state"]}


@pytest.mark.parametrize("other", [rounds_otherwise, stops_at_once, rolls_back, rejects], ids=lambda act: act.__name__)
def test_the_first_worker_decides_where_others_round_otherwise(ranks: Ranks, other: Any) -> None:
    usual = ranks(parted, None, 0)[0]
    by_another, by_first = ranks(parted, other, 2), ranks(parted, other, 0)
    for found in by_another:
        for name in ("state", "numbers", "record", "reasons"):
            np.testing.assert_equal(found[name], usual[name])
        np.testing.assert_array_equal(found["later"], by_another[0]["later"])  # one has drawn fewer orders
    for found in by_first:
        for name in ("state", "numbers", "record", "reasons", "later"):
            np.testing.assert_equal(found[name], by_first[0][name])
        if other in (rolls_back, rejects):
            np.testing.assert_array_equal(found["state"], state_of(model_of("clip", distributed=False)))
            assert found["reasons"] and found["numbers"][0] == 0
        else:
            assert not np.array_equal(found["state"], usual["state"])


# One of them fails in the midst of its steps.


def fails_amid_steps(rank: int, kind: type[BaseException]) -> Any:
    model = model_of("clip")
    learnt(model)
    before, calls, descend, caught = state_of(model), [], MinibatchSteps.descend, None

    def fail(self: Any, max_norm: float) -> bool:
        calls.append(1)
        if len(calls) == 10:
            raise kind("in the midst of the steps")
        return descend(self, max_norm)

    with ExitStack() as stack:
        if rank == 1:
            stack.enter_context(patch.object(MinibatchSteps, "descend", fail))
        try:
            learnt(model)
        except BaseException as error:
            caught = error
    return type(caught), str(caught), before, state_of(model), learnt(model)["state"]


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_failure_amid_the_steps_of_one_undoes_those_of_all(ranks: Ranks, kind: type[BaseException]) -> None:
    found = ranks(fails_amid_steps, kind)
    for rank, (caught, text, before, after, later) in enumerate(found):
        assert caught is (kind if rank == 1 else WorkerError)
        assert re.search("in the midst of the steps" if rank == 1 else f"rank 1 ended it: {kind.__name__}", text)
        np.testing.assert_array_equal(after, before)
        np.testing.assert_array_equal(later, found[0][4])
        assert not np.array_equal(later, before)


def spoilt_on_one(rank: int, form: str) -> Any:
    model = model_of(form)
    before = state_of(model)

    class Spoil(BaseCallback):
        def _on_rollout_end(self) -> None:
            model._check_rollout = lambda buffer: None
            if rank == 1:
                model.rollout_buffer.observations[3, 1] = np.nan

        def _on_step(self) -> bool:
            return True

    model.learn(SAMPLES, every_rank(Spoil()))
    return list(model._reported_rejections), before, state_of(model), getattr(model, "kl_coef", 0.0)


@pytest.mark.parametrize(("form", "coefficient"), [("clip", 0.0), ("penalty", 2.0)])
def test_all_reject_an_observation_of_one_that_is_not_finite(ranks: Ranks, form: str, coefficient: float) -> None:
    for reasons, before, after, kl_coef in ranks(spoilt_on_one, form):
        assert reasons == ["the policy's distribution is not finite"] and kl_coef == coefficient
        np.testing.assert_array_equal(after, before)
