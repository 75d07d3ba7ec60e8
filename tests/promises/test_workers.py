"""Processes that torchrun started train one model together: one update, the same decisions, one set of files."""

import copy
import io
import math
import os
import pickle
import random
import re
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, NoisyExtractor, RandomEnv, in_float64, policy_name, with_rollout
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize
from worker_processes import RANKS, Ranks, free_port, launch

from sb3_trpo_ext import (
    NPG,
    TRPO,
    MaskableTRPO,
    PPOClip,
    PPOPenalty,
    RecurrentNPG,
    RecurrentPPOClip,
    RecurrentTRPO,
    WorkerError,
    every_rank,
    main_only,
)
from sb3_trpo_ext.policy import problem
from sb3_trpo_ext.rollout.worker_envs import merged
from sb3_trpo_ext.training import checkpoint_files
from sb3_trpo_ext.training.communicator import ProcessGroup
from sb3_trpo_ext.zoo import cli

# The update of three workers is that of one process with their samples.

STEPS = 32
ALL = {"curvature_samples": None}
SHORT = {"cg_max_steps": 2, "cg_residual_tol": 0.0, "critic_kwargs": {"cg_steps": 2}}
"""Conjugate gradients that leave rounding little time to grow, where it is that of float32."""
FULL = {"batch_size": STEPS * RANKS, "n_epochs": 4}
EXPECTED = {"critic": "action_value", "surrogate": "expected"}
DISCRETE = ("masked", "action-values", "action-values-masked", "action-values-steps", "ppo-action-values")
FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "trpo": (TRPO, ALL),
    "trpo-products": (TRPO, {**ALL, "min_radius_used": 0.9}),
    "trpo-max": (TRPO, {**ALL, "trust_region": "max"}),
    "trpo-theory": (TRPO, {**ALL, "kl_penalty": "theory", "gamma": 0.5}),
    "trpo-chunks": (TRPO, {**ALL, "fisher_chunk_size": 7, "ent_coef": 0.1}),
    "trpo-adam": (TRPO, {**ALL, "critic": "adam", "batch_size": STEPS * RANKS, "n_critic_updates": 3}),
    "trpo-no-signal": (TRPO, {**ALL, "gamma": 0.0}),
    "npg": (NPG, ALL),
    "trpo-spread": (TRPO, {**ALL, "target_kl_std": 0.02, "log_std_min": -0.01, "ent_coef": -0.1}),
    "npg-floor": (NPG, {**ALL, "log_std_min": -0.01, "ent_coef": -0.1}),
    "trpo-fixed": (TRPO, {**ALL, "log_std": "fixed"}),
    "masked": (MaskableTRPO, ALL),
    "action-values": (TRPO, {**ALL, **EXPECTED, **SHORT}),
    "action-values-masked": (MaskableTRPO, {**ALL, **EXPECTED, **SHORT}),
    "recurrent": (RecurrentTRPO, ALL),
    "ppo": (PPOClip, FULL),
    "ppo-bounded": (PPOClip, {**FULL, "max_kl": 1e-5, "target_kl": 1e-3}),
    "ppo-penalty": (PPOPenalty, FULL),
    "ppo-action-values": (PPOClip, {**FULL, **EXPECTED, "fast_updates": False}),
    "ppo-floor": (PPOClip, {**FULL, "log_std_min": -1e-4, "ent_coef": -0.1}),
    "ppo-schedule": (PPOClip, {**FULL, "log_std": LinearSchedule(-0.5, -1.5, 1.0)}),
    "ppo-recurrent": (RecurrentPPOClip, FULL),
}


def model_on(n_envs: int, form: str, by_hand: bool, distributed: bool) -> Any:
    algorithm, options = FORMS[form]
    action = "discrete" if form in DISCRETE else "box"
    envs = DummyVecEnv([lambda: RandomEnv(OBSERVATION_SPACES["vector"], ACTION_SPACES[action])] * n_envs)
    name = policy_name(algorithm, "vector")
    recurrent = "Lstm" in name
    if recurrent:
        options = {**options, "policy_kwargs": {"lstm_hidden_size": 8}}
    if "curvature_samples" in options and options.get("critic") != "adam" and (by_hand or recurrent):
        options = {**options, **SHORT}
    model = algorithm(name, envs, n_steps=STEPS, seed=0, device="cpu", distributed=distributed, **options)
    if recurrent and not by_hand:
        model.fast_updates = False
    return model if by_hand or recurrent else in_float64(model)


def state_of(model: Any) -> dict[str, Any]:
    buffer = model.rollout_buffer
    arrays = {name: array for name, array in vars(buffer).items() if isinstance(array, np.ndarray)}
    return {"policy": model.policy.state_dict(), "arrays": arrays}


def whole_sequences() -> Any:
    """Let minibatches of a recurrent policy begin with the rollout: elsewhere they would cut a sequence in two."""
    return patch.object(np.random, "randint", lambda *bounds: 0)


def update_of_one(rank: int, form: str, by_hand: bool, state: dict[str, Any]) -> Any:
    model = model_on(1, form, by_hand, distributed=True)
    model.policy.load_state_dict(state["policy"])
    buffer = model.rollout_buffer
    for name, array in state["arrays"].items():
        axis = array.shape.index(RANKS)
        setattr(buffer, name, array.take([rank], axis=axis))
    buffer.full, buffer.pos = True, STEPS
    model.set_logger(Logger(None, []))
    problem.EXPECTED_PRODUCTS = 0 if form == "trpo-products" else 10
    model._last_episode_starts = np.zeros(1, dtype=bool)
    with whole_sequences():
        model.train()
    record = {key: value for key, value in model.logger.name_to_value.items() if key.startswith("train/")}
    return model.policy.state_dict(), record, model.update_path


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "autograd"])
@pytest.mark.parametrize("form", FORMS)
def test_three_workers_take_the_update_of_their_samples_together(ranks: Ranks, form: str, by_hand: bool) -> None:
    joint = with_rollout(model_on(RANKS, form, by_hand, distributed=False))
    if form in ("trpo", "ppo"):
        joint.rollout_buffer.advantages[:, 1] = 0.5  # no signal, if the second one were alone
    found = ranks(update_of_one, form, by_hand, state_of(joint))
    with whole_sequences():
        joint.train()
    for state, record, path in found:
        assert path == joint.update_path
        for name, expected in joint.policy.state_dict().items():
            torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-5 if "recurrent" in form else 1e-6)
            assert torch.equal(state[name], found[0][0][name]), name
        for name, expected in joint.logger.name_to_value.items():
            if name.startswith("train/"):
                assert record[name] == pytest.approx(expected, rel=1e-3, abs=1e-5), name


# From ``learn`` on they are one.

LEARN: dict[str, tuple[Any, dict[str, Any]]] = {
    "trpo": (TRPO, {}),
    "trpo-adam": (TRPO, {"critic": "adam", "batch_size": 24}),
    "trpo-max": (TRPO, {"trust_region": "max"}),
    "trpo-theory": (TRPO, {"kl_penalty": "theory"}),
    "trpo-momentum": (TRPO, {"momentum": 0.5, "sample_reuse": 2, "final_n_steps": 16}),
    "trpo-critic-of-three": (TRPO, {"critic_kwargs": {"n_rollouts": 3}}),
    "npg-adam-of-two": (NPG, {"critic": "adam", "batch_size": 24, "critic_kwargs": {"n_rollouts": 2}}),
    "trpo-sde": (TRPO, {"use_sde": True}),
    "trpo-spread": (TRPO, {"target_kl_std": 0.02, "log_std_min": -0.05, "ent_coef": -0.1}),
    "trpo-schedule": (TRPO, {"log_std": LinearSchedule(-0.5, -1.5, 1.0)}),
    "npg": (NPG, {"ent_coef": 0.01}),
    "masked": (MaskableTRPO, {}),
    "action-values": (TRPO, {"critic": "action_value", "bootstrap": "max"}),
    "action-values-masked": (MaskableTRPO, {"critic": "action_value", "surrogate": "expected"}),
    "action-values-steps": (TRPO, {"critic": "action_value", "critic_kwargs": {"fit": "semi_gradient"}}),
    "ppo-action-values": (PPOClip, {"critic": "action_value", "surrogate": "expected", "batch_size": 24}),
    "recurrent-trpo": (RecurrentTRPO, {}),
    "recurrent-npg": (RecurrentNPG, {}),
    "ppo": (PPOClip, {"batch_size": 24, "n_epochs": 2}),
    "ppo-target": (PPOClip, {"batch_size": 24, "n_epochs": 3, "target_kl": 1e-3, "fast_updates": False}),
    "ppo-penalty": (PPOPenalty, {"batch_size": 24, "n_epochs": 2}),
    "ppo-recurrent": (RecurrentPPOClip, {"batch_size": 24, "n_epochs": 2}),
    "ppo-schedule": (PPOClip, {"batch_size": 24, "n_epochs": 2, "log_std": LinearSchedule(-0.5, -1.5, 1.0)}),
    "dropout": (
        PPOClip,
        {"batch_size": 24, "n_epochs": 2, "policy_kwargs": {"features_extractor_class": NoisyExtractor}},
    ),
}


def learner(form: str = "trpo", n_envs: int = 2, **changes: Any) -> Any:
    algorithm, options = LEARN[form]
    action = "discrete" if form in DISCRETE else "box"
    env = VecNormalize(make_vec_env(lambda: RandomEnv(action_space=ACTION_SPACES[action]), n_envs))
    options = {"seed": 0, "n_steps": STEPS, "device": "cpu", **options, **changes}
    if "recurrent" in form:
        options["policy_kwargs"] = {"lstm_hidden_size": 8}
    return algorithm(policy_name(algorithm, "vector"), env, **options)


def summary(model: Any) -> Any:
    """All that must be the same for all workers."""
    normalizer = model.get_vec_normalize_env()
    return (
        [param.detach().clone() for param in model.policy.state_dict().values()],
        [model.num_timesteps, model._n_updates, getattr(model, "kl_coef", 0.0)],
        [normalizer.obs_rms.mean, normalizer.obs_rms.var, normalizer.obs_rms.count, normalizer.ret_rms.var],
        [info["r"] for info in model.ep_info_buffer],
    )


def flat(summary: Any) -> np.ndarray:
    return np.concatenate([np.ravel(each) for part in summary for each in part])


def five_updates(rank: int, form: str) -> Any:
    model = learner(form, seed=10 * rank)  # with policies that differ until they learn
    model.learn(5 * STEPS * 2 * RANKS)
    actions = model.rollout_buffer.actions
    return flat(summary(model)), actions, model.num_timesteps, model.logger.name_to_value.get("train/std")


@pytest.mark.parametrize("form", LEARN)
def test_all_workers_have_the_same_model_after_five_updates(ranks: Ranks, form: str) -> None:
    found = ranks(five_updates, form)
    for mine, _, steps, spread in found:
        np.testing.assert_array_equal(mine, found[0][0])
        if form.endswith("-schedule"):  # of the steps of all of them
            assert spread == pytest.approx(math.exp(-0.5 - 0.8), rel=1e-5)
        assert steps >= 5 * STEPS * 2 * RANKS
    assert not np.array_equal(found[0][1], found[1][1]) and not np.array_equal(found[1][1], found[2][1])
    if form in ("trpo", "ppo", "trpo-sde"):
        np.testing.assert_array_equal(ranks(five_updates, form)[0][0], found[0][0])


def told_in_turn(rank: int) -> list[list[float]]:
    group, found = ProcessGroup.of_this_process(), []
    assert group is not None
    with group.together():
        for turn in range(12):
            parts = group.all_gather(torch.full((5,), 100.0 * turn + rank))
            time.sleep(0.02 * (turn % RANKS == rank))  # while the others go on to the next one
            found.append([float(part[0]) for part in parts])
    return found


def test_what_was_told_holds_until_the_next_message(ranks: Ranks) -> None:
    expected = [[100.0 * turn + rank for rank in range(RANKS)] for turn in range(12)]
    assert ranks(told_in_turn) == [expected] * RANKS


def messages_of(rank: int, form: str, options: dict[str, Any]) -> tuple[int, int]:
    model = learner(form, **options)
    sent: list[int] = []

    class Count(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            sent.append(model.logger.name_to_value.get("train/messages", 0))

    model.learn(3 * STEPS * 2 * RANKS, every_rank(Count()), log_interval=100)
    return sent[-1], model._n_updates


WIDE = {"policy_kwargs": {"net_arch": [320, 320]}}


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("ppo", {"batch_size": 96, **WIDE}),
        ("ppo", {"batch_size": 24, "fast_updates": False}),
        ("ppo-recurrent", {"batch_size": 24}),
        ("ppo-recurrent", {"batch_size": 24, "fast_updates": False}),
    ],
    ids=["large", "autograd", "recurrent", "recurrent by autograd"],
)
def test_a_minibatch_takes_one_message(ranks: Ranks, form: str, options: dict[str, Any]) -> None:
    two, four = (ranks(messages_of, form, {**options, "n_epochs": n_epochs})[0][0] for n_epochs in (2, 4))
    minibatches = STEPS * 2 * RANKS // options["batch_size"]
    assert four - two == 2 * (minibatches + 1)  # and that of the advantages


@pytest.mark.parametrize("form", ["ppo", "ppo-penalty"])
@pytest.mark.parametrize("options", [{"batch_size": 24}, {"batch_size": 6, **WIDE}], ids=["small", "small batch"])
def test_minibatches_of_little_arithmetic_take_none(ranks: Ranks, form: str, options: dict[str, Any]) -> None:
    for n_epochs in (2, 4):
        assert ranks(messages_of, form, {**options, "n_epochs": n_epochs, "max_kl": 1.0}) == [(6, 3 * n_epochs)] * RANKS


def test_an_update_of_trpo_takes_few_messages(ranks: Ranks) -> None:
    (messages, _), *others = ranks(messages_of, "trpo", {})
    assert messages <= 11 and all(other == messages for other, _ in others)


# One of them fails.


class Fault(BaseCallback):
    """Does something at a step of the second rollout."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act, self.rollouts = act, 0

    def _on_rollout_start(self) -> None:
        self.rollouts += 1

    def _on_step(self) -> bool:
        self.steps = self.steps + 1 if self.rollouts == 2 and hasattr(self, "steps") else 0
        return self.act(self) is not False if self.rollouts == 2 and self.steps == 5 else True


def raises(callback: Fault) -> None:
    raise KeyError("the callback's own")


def interrupts(callback: Fault) -> None:
    raise KeyboardInterrupt


def stops(callback: Fault) -> bool:
    return False


def environment_raises(callback: Fault) -> None:
    def step(action: Any) -> Any:
        raise OSError("the simulator has crashed")

    callback.training_env.get_attr("unwrapped")[0].step = step


def environment_is_nan(callback: Fault) -> None:
    callback.locals["rewards"][0] = np.nan


def update_raises(callback: Fault) -> None:
    def fit(regression: Any) -> float:
        raise ZeroDivisionError("in the midst of the update")

    callback.model.value_critic.fit = fit


def update_is_interrupted(callback: Fault) -> None:
    def fit(regression: Any) -> float:
        raise KeyboardInterrupt

    callback.model.value_critic.fit = fit


def is_silent(callback: Fault) -> None:
    callback.model._processes._pulse._ended.set()
    time.sleep(4)


FAULTS: dict[Any, tuple[type[BaseException], str]] = {
    raises: (KeyError, "rank 1 ended it: KeyError: .the callback's own"),
    interrupts: (KeyboardInterrupt, "rank 1 ended it: KeyboardInterrupt"),
    environment_raises: (OSError, "rank 1 ended it: OSError: the simulator has crashed"),
    environment_is_nan: (ValueError, "rank 1 ended it: ValueError: The rollout holds a reward .* in environment 0"),
    update_raises: (ZeroDivisionError, "rank 1 ended it: ZeroDivisionError: in the midst of the update"),
    update_is_interrupted: (KeyboardInterrupt, "rank 1 ended it: KeyboardInterrupt"),
    is_silent: (WorkerError, "rank 1 has given no sign of life for 2 s"),
}


class Noted(BaseCallback):
    """Notes the model at each start of a rollout."""

    def _on_rollout_start(self) -> None:
        self.model.noted = flat(summary(self.model)[:1])

    def _on_step(self) -> bool:
        return True


def fail_on_one(rank: int, fault: Any) -> Any:
    ProcessGroup.silence = 2.0 if fault is is_silent else 25.0
    model = learner("trpo")
    error: BaseException | None = None
    try:
        model.learn(5 * STEPS * 2 * RANKS, [Noted(), Fault(fault)] if rank == 1 else Noted())
    except BaseException as caught:
        error = caught
    left = flat(summary(model)[:1])
    noted = model.noted
    for holder in (model.value_critic, model.env.unwrapped.envs[0].unwrapped):
        vars(holder).pop("fit", None)
        vars(holder).pop("step", None)
    model.learn(STEPS * 2 * RANKS, reset_num_timesteps=False)
    return type(error), str(error), noted, left, flat(summary(model))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_all_end_together_where_one_fails_and_may_go_on(ranks: Ranks, fault: Any) -> None:
    kind, message = FAULTS[fault]
    for rank, (found, text, noted, left, later) in enumerate(ranks(fail_on_one, fault)):
        assert found is (kind if rank == 1 else WorkerError), text
        assert rank == 1 or re.search(message, text), text
        np.testing.assert_array_equal(noted, left)
        if rank == 0:
            first, first_later = left, later
        np.testing.assert_array_equal(left, first)
        np.testing.assert_array_equal(later, first_later)


def stop_on_one(rank: int) -> Any:
    model = learner("trpo")
    model.learn(5 * STEPS * 2 * RANKS, Fault(stops) if rank == 1 else None)
    stopped = model.num_timesteps, model._n_updates
    model.learn(STEPS * 2 * RANKS, reset_num_timesteps=False)
    return stopped, flat(summary(model))


def test_all_stop_where_one_does(ranks: Ranks) -> None:
    found = ranks(stop_on_one)
    for stopped, later in found:
        assert stopped == (STEPS * 2 * RANKS + 2 * (STEPS * (RANKS - 1) + 5), 1)
        np.testing.assert_array_equal(later, found[0][1])


def one_has_bad_samples(rank: int, what: str, form: str) -> Any:
    model = learner(form)
    model.learn(STEPS * 2 * RANKS)
    shares = problem.Comparison._shares
    before = flat(summary(model)[:1])

    def infinite(self: Any, chunk: Any, output: Any, kl: Any) -> Any:
        return shares(self, chunk, output, kl + np.inf if kl.any() else kl)

    patched = patch.object(problem.Comparison, "_shares", infinite) if what == "KL" and rank == 1 else nullcontext()

    class Spoil(BaseCallback):
        def _on_rollout_end(self) -> None:
            if rank == 1 and what == "NaN":
                model._check_rollout = lambda buffer: None
                model.rollout_buffer.advantages[3] = np.nan

        def _on_step(self) -> bool:
            return True

    with patched:
        model.learn(STEPS * 2 * RANKS, Spoil(), reset_num_timesteps=False)
    vars(model).pop("_check_rollout", None)
    return list(model._reported_rejections), before, flat(summary(model))


@pytest.mark.parametrize(
    ("what", "form", "reason"),
    [
        ("KL", "trpo", "the KL divergence at the trial point is not finite"),
        ("KL", "npg", "the objective or the KL divergence there is not finite"),
        ("NaN", "trpo", "the gradient of the surrogate is not finite"),
        ("NaN", "ppo", "the gradient of the loss is not finite"),
        ("NaN", "ppo-target", "the gradient of the loss is not finite"),
        ("NaN", "ppo-penalty", "the gradient of the loss is not finite"),
    ],
)
def test_all_reject_what_is_not_finite_for_one(ranks: Ranks, what: str, form: str, reason: str) -> None:
    found = ranks(one_has_bad_samples, what, form)
    for reasons, before, after in found:
        assert reasons == [reason]
        np.testing.assert_array_equal(after, found[0][2])
        if "ppo" in form:
            np.testing.assert_array_equal(after[: len(before)], before)


def evaluate_slowly(rank: int) -> Any:
    ProcessGroup.silence = 2.0
    model = learner("trpo")
    start = time.monotonic()
    model.learn(3 * STEPS * 2 * RANKS, main_only(Fault(lambda callback: time.sleep(6))))
    return time.monotonic() - start, flat(summary(model))


def test_a_slow_evaluation_is_waited_for(ranks: Ranks) -> None:
    for seconds, after in (found := ranks(evaluate_slowly)):
        assert seconds > 6
        np.testing.assert_array_equal(after, found[0][1])


def act_alone_between(rank: int, folder: str) -> Any:
    """Where the first worker evaluates and saves, and the others are far ahead of it."""
    ProcessGroup.silence = 2.0
    model = learner("trpo")
    model.learn(STEPS * 2 * RANKS)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model.policy)), pickle.loads(pickle.dumps(model.reduction))
    assert copies[-1].workers == RANKS
    if rank == 0:
        time.sleep(5)
    model.learn(STEPS * 2 * RANKS, reset_num_timesteps=False)
    if rank == 0:
        time.sleep(1)
    model.save(f"{folder}/model")
    models = TRPO.load(f"{folder}/model", env=model.env), model
    ProcessGroup.silence = 25.0
    learnt = [flat(summary(each.learn(STEPS * 2 * RANKS, reset_num_timesteps=False))) for each in models]
    return [flat([[p.detach() for p in copies[0].policy.parameters()]]), *learnt]


def test_workers_wait_for_what_one_does_between_two_calls_of_learn(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks(act_alone_between, str(tmp_path))
    for each in found:
        for mine, first in zip(each, found[0], strict=True):
            np.testing.assert_array_equal(mine, first)


LEAVES = """
import os, sys
import torch
torch.set_num_threads(1)
from sb3_trpo_ext import TRPO, WorkerError

def fail(*_):
    raise RuntimeError("as it is told to") if os.environ["RANK"] == "1" else WorkerError("in the same step")

model = TRPO("MlpPolicy", "CartPole-v1", n_steps=100, device="cpu")
try:
    model.learn(10_000, fail)
except RuntimeError:
    pass
if os.environ["RANK"] == "0":
    model.learn(10_000)
"""


def test_nobody_waits_for_a_worker_whose_program_has_ended(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(LEAVES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = subprocess.run([*launcher, str(tmp_path / "train.py")], capture_output=True, text=True, timeout=60)
    assert found.returncode
    assert "WorkerError: rank 1 has ended its program and trains no more" in found.stderr


SCRIPT = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
from stable_baselines3.common.callbacks import BaseCallback
from sb3_trpo_ext import TRPO

class Kill(BaseCallback):
    def _on_step(self):
        if os.environ["RANK"] == "1" and self.num_timesteps > 700:
            print("killed", time.time(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return True

TRPO("MlpPolicy", "CartPole-v1", n_steps=100, seed=0, device="cpu").learn(10_000, Kill())
"""


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_the_loss_of_one_ends_all(by_torchrun: bool, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    if by_torchrun:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", str(script)]
        commands = [(run, os.environ)]
    else:
        commands = [
            ([sys.executable, str(script)], {**os.environ, **launch(rank, port)})
            for port in [free_port()]
            for rank in range(RANKS)
        ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=env, **pipes) for command, env in commands]
    told = [process.communicate(timeout=90) for process in running]
    killed = next(float(line.split()[1]) for out, _ in told for line in out.splitlines() if "killed" in line)
    assert time.time() - killed < 35
    for rank, (process, (_, err)) in enumerate(zip(running, told, strict=True)):
        assert process.returncode
        if by_torchrun:
            assert "rank      : 1" in err and "Signal 9" in err
        elif rank != 1:
            assert "WorkerError: rank 1 was lost" in err


# Files, callbacks, seeds, arguments.


class Counts(BaseCallback):
    def _on_step(self) -> bool:
        return True


def callbacks_of(rank: int, folder: str) -> Any:
    kinds = {
        "own": Counts(),
        "own, main only": main_only(Counts()),
        "checkpoint": CheckpointCallback(30, folder),
        "checkpoint everywhere": every_rank(CheckpointCallback(30, folder)),
        "within every": EveryNTimesteps(10, Counts()),
        "within a list": CallbackList([Counts(), StopTrainingOnMaxEpisodes(10**6)]),
        "evaluation of one's own": type("Own", (EvalCallback,), {})(make_vec_env("CartPole-v1"), eval_freq=10**6),
    }
    model = TRPO("MlpPolicy", "CartPole-v1", n_steps=50, seed=0, tensorboard_log=folder, verbose=1)
    model.learn(50 * RANKS, list(kinds.values()), progress_bar=True)
    called: list[int] = []
    model.learn(50 * RANKS, lambda *names: called.append(1) or True)
    model.save(f"{folder}/model")
    model.save(stream := io.BytesIO())
    inner = [each.n_calls for each in kinds["within a list"].callbacks]
    steps = model.num_timesteps
    calls = {name: callback.n_calls for name, callback in kinds.items()} | {"function": len(called)}
    return calls, inner, len(stream.getvalue()) > 1000, steps


class Bar(ProgressBarCallback):
    def _on_training_end(self) -> None:
        self.shown = self.pbar.n, self.pbar.total
        super()._on_training_end()


def progress_of(rank: int) -> Any:
    bar = Bar()
    TRPO("MlpPolicy", "CartPole-v1", n_steps=50, seed=0).learn(100 * RANKS, [bar])
    return getattr(bar, "shown", None)


def test_a_progress_bar_counts_the_steps_of_all(ranks: Ranks) -> None:
    assert ranks(progress_of) == [(100 * RANKS, 100 * RANKS), None, None]


def test_callbacks_run_where_they_should_and_files_are_written_once(ranks: Ranks, tmp_path: Path) -> None:
    for rank, (calls, inner, has_stream, steps) in enumerate(ranks(callbacks_of, str(tmp_path))):
        mine = 50 if rank == 0 else 0
        assert calls == {
            "own": 50,
            "own, main only": mine,
            "checkpoint": mine,
            "checkpoint everywhere": 50,
            "within every": 50,
            "within a list": 0,
            "evaluation of one's own": mine,
            "function": 50,
        }
        assert inner == [50, mine] and has_stream and steps == 50 * RANKS
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.zip", "rl_model_90_steps.zip", "TRPO_1", "TRPO_2"}
    assert len(list(tmp_path.glob("TRPO_1/*"))) == 1


def monitored(rank: int, folder: str, vec_env: str) -> Any:
    kinds = {"dummy": DummyVecEnv, "subproc": SubprocVecEnv}
    time.sleep(0.3 * rank)
    with patch.object(time, "time", lambda: 1.5) if rank else nullcontext():  # a shorter head over the first one's
        if vec_env == "monitor":
            env: Any = VecMonitor(make_vec_env(RandomEnv, 2), folder)
        else:
            env = make_vec_env("CartPole-v1", 2, seed=3, monitor_dir=folder, vec_env_cls=kinds[vec_env])
    model = TRPO("MlpPolicy", env, n_steps=50, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(2 * 50 * 2 * RANKS)
    env.close()
    return [info["r"] for info in model.ep_info_buffer], model.rollout_buffer.observations


@pytest.mark.parametrize("vec_env", ["dummy", "subproc", "monitor"])
def test_monitors_write_the_episodes_of_the_first_rank_into_files_that_can_be_read(
    ranks: Ranks, vec_env: str, tmp_path: Path
) -> None:
    found = ranks(monitored, str(tmp_path), vec_env)
    table = load_results(str(tmp_path))
    assert 0 < len(table) < len(found[0][0]) and set(np.round(table["r"], 4)) <= set(np.round(found[0][0], 4))
    assert found[0][0] == found[1][0] == found[2][0]
    assert not np.array_equal(found[0][1], found[1][1])


class Alike(RandomEnv):
    """Begins alike, whatever its seed."""

    def reset(self, **kwargs: Any) -> Any:
        return super().reset(seed=0)


def seeded_like(rank: int, seed: int | None) -> Any:
    kind = Alike if seed is None else RandomEnv
    env = DummyVecEnv([lambda: kind(action_space=ACTION_SPACES["box"])] * 2)
    model = TRPO("MlpPolicy", env, n_steps=STEPS, seed=seed, device="cpu")
    first = None

    class First(BaseCallback):
        def _on_rollout_start(self) -> None:
            nonlocal first
            first = self.model._last_obs

        def _on_step(self) -> bool:
            return False

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(1, First())
    return first, [str(each.message) for each in caught], model.rollout_buffer.actions[0]


def draws(rank: int, distributed: bool, use_sde: bool) -> Any:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    env = DummyVecEnv([lambda: RandomEnv(action_space=ACTION_SPACES["box"])] * 2)
    seed = None if use_sde else 7
    model = TRPO("MlpPolicy", env, seed=seed, device="cpu", distributed=distributed, use_sde=use_sde)
    found = [*torch.rand(2).tolist(), *np.random.rand(2), random.random()]
    if use_sde:
        found += model.policy.action_dist.exploration_mat.flatten()[:2].tolist()
    return found, [param.detach() for param in model.policy.parameters()]


@pytest.mark.parametrize("use_sde", [False, True])
def test_no_two_ranks_draw_alike_and_the_first_one_draws_as_one_process_does(ranks: Ranks, use_sde: bool) -> None:
    alone = ranks(draws, False, use_sde)
    found = ranks(draws, True, use_sde)
    assert found[0][0] == alone[0][0] == alone[1][0]
    numbers = [number for drawn, _ in found for number in drawn]
    assert len(set(numbers)) == len(numbers)
    assert [drawn for drawn, _ in ranks(draws, True, use_sde)] == [drawn for drawn, _ in found]
    for _, params in found:  # made before the streams part
        assert all(torch.equal(mine, first) for mine, first in zip(params, found[0][1], strict=True))


def hooked_on_one(rank: int, form: str) -> Any:
    model = learner(form)
    if rank == 1:
        model.policy.value_net.weight.register_hook(lambda gradient: None)
    model.learn(2 * STEPS * 2 * RANKS)
    return model.update_path, flat(summary(model))


@pytest.mark.parametrize("form", ["trpo", "trpo-adam", "ppo"])
def test_one_that_has_to_update_by_autograd_is_waited_for(ranks: Ranks, form: str) -> None:
    found = ranks(hooked_on_one, form)
    for _, after in found:
        np.testing.assert_array_equal(after, found[0][1])
    assert found[1][0].startswith("autograd: a hook")
    others = "fast" if form == "trpo" else "autograd: another worker does without fast updates"
    assert found[0][0] == found[2][0] == others


def changed_on_one(rank: int, form: str, change: str) -> Any:
    model = learner(form)

    class Change(BaseCallback):
        def _on_rollout_end(self) -> None:
            if change == "parameters":
                with torch.no_grad():
                    self.model.policy.value_net.bias += 1.0
            else:
                setattr(self.model, change, getattr(self.model, change) + 1)

        def _on_step(self) -> bool:
            return True

    model.learn(STEPS * 2 * RANKS, every_rank(Change()))
    with pytest.raises(RuntimeError, match="Rank 1 has another model than rank 0 has") as caught:
        model.learn(STEPS * 2 * RANKS, main_only(Change()), reset_num_timesteps=False)
    return str(caught.value)


@pytest.mark.parametrize(("form", "change"), [("trpo", "parameters"), ("ppo", "n_epochs"), ("trpo", "cg_max_steps")])
def test_a_model_that_is_changed_on_one_rank_alone_is_found(ranks: Ranks, form: str, change: str) -> None:
    assert all("every_rank(callback)" in text for text in ranks(changed_on_one, form, change))


def test_environments_are_seeded_as_those_of_one_process_would_be(ranks: Ranks) -> None:
    found = ranks(seeded_like, 5)
    env = make_vec_env(lambda: RandomEnv(action_space=ACTION_SPACES["box"]), 2 * RANKS)
    env.seed(5)
    np.testing.assert_array_equal(np.concatenate([first for first, _, _ in found]), env.reset())
    assert not any("first observations" in text for _, texts, _ in found for text in texts)


def test_ranks_that_begin_alike_are_warned_of(ranks: Ranks) -> None:
    (_, texts, _), *others = ranks(seeded_like, None)
    assert any("first observations of ranks 0 and 1 are the same" in text for text in texts)
    assert not any("first observations" in text for _, texts, _ in others for text in texts)


def differing(rank: int) -> Any:
    messages = []
    for options in ({"gamma": 0.9 + 0.01 * (rank == 2)}, {"policy_kwargs": {"net_arch": [8 + rank]}}):
        model = TRPO("MlpPolicy", "CartPole-v1", n_steps=50, device="cpu", **options)
        with pytest.raises(ValueError, match="All workers must be set up alike") as caught:
            model.learn(50)
        messages.append(str(caught.value))
    for options in ({"batch_size": 64}, {"batch_size": 66, "distributed": 1}):
        with pytest.raises(ValueError, match=r"batch_size|distributed") as caught:
            PPOClip("MlpPolicy", "CartPole-v1", device="cpu", **options)
        messages.append(str(caught.value))
    return messages


def test_workers_that_are_not_alike_are_refused(ranks: Ranks) -> None:
    for gamma, shape, size, flag in ranks(differing):
        assert "`gamma` is 0.9 on rank 0 and 0.91 on rank 2" in gamma
        assert "`parameters` is" in shape and "on rank 1" in shape
        assert "`batch_size` is the size of a minibatch of all workers together" in size and "got 64. Pass 63" in size
        assert "`distributed` must be True or False, got 1" in flag


def into_other_directories(rank: int, folder: str) -> Any:
    checkpoint_files.SECONDS_TO_APPEAR = 0.5
    messages = []
    for place in (f"{folder}/{rank}", folder if rank == 0 else None):
        try:
            learner("trpo").learn(STEPS * 2 * RANKS, checkpoint_dir=place)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_workers_write_into_one_directory(ranks: Ranks, tmp_path: Path) -> None:
    for another, none in ranks(into_other_directories, str(tmp_path)):
        assert "must be one directory for all processes, but rank 1 does not find" in another
        assert "`checkpoint_dir` and `checkpoint_freq` must be the same for all" in none
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def apart(rank: int, folder: str) -> Any:
    model = TRPO("MlpPolicy", "CartPole-v1", n_steps=100, seed=0, device="cpu", distributed=False).learn(300)
    model.save(f"{folder}/{rank}")
    again = TRPO.load(f"{folder}/{rank}", env=model.env)
    joint = TRPO.load(f"{folder}/{rank}", env=model.env, distributed=True)
    joint.learn(100 * RANKS)
    assert model.reduction.workers == again.reduction.workers == 1 and joint.reduction.workers == RANKS
    return flat([[p.detach() for p in model.policy.parameters()]]), joint.num_timesteps


def test_distributed_false_is_a_single_process(ranks: Ranks, tmp_path: Path) -> None:
    alone = TRPO("MlpPolicy", "CartPole-v1", n_steps=100, seed=0, device="cpu").learn(300)
    for found, steps in ranks(apart, str(tmp_path)):
        np.testing.assert_array_equal(found, flat([[p.detach() for p in alone.policy.parameters()]]))
        assert steps == 100 * RANKS


def test_the_zoo_makes_one_run_of_it(tmp_path: Path) -> None:
    program = ["-m", "sb3_trpo_ext.zoo", "train", "--algo", "trpo", "--env", "CartPole-v1", "-n", "1500"]
    options = ["--eval-freq", "600", "--save-freq", "600", "-f", str(tmp_path / "logs"), "-tb", str(tmp_path / "tb")]
    options += ["-params", "n_steps:100", "n_envs:1", "normalize:True"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    subprocess.run([*launcher, *program, *options], check=True, capture_output=True, timeout=120)
    (run,) = (tmp_path / "logs" / "trpo").iterdir()
    names = {path.name for path in run.iterdir()}
    assert {"CartPole-v1.zip", "best_model.zip", "evaluations.npz", "0.monitor.csv"} <= names
    assert (run / "CartPole-v1" / "vecnormalize.pkl").exists()
    assert {name for name in names if name.startswith("rl_")} == {"rl_model_600_steps.zip", "rl_model_1200_steps.zip"}
    assert len(list((tmp_path / "tb").rglob("events*"))) == 1
    assert TRPO.load(run / "CartPole-v1.zip").num_timesteps == 1500


@pytest.mark.parametrize("rank", [0, 1])
def test_one_run_is_recorded_by_the_first_rank_alone(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(cli.runpy, "run_module", lambda *_, **__: modes.append(os.environ.get("WANDB_MODE")))
    for name, value in (("RANK", rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    cli.run("train")
    assert modes == ["disabled" if rank else None] and "WANDB_MODE" not in os.environ


@pytest.mark.parametrize("already", [0, 1000])
def test_merged_statistics_are_those_of_all_samples(already: int) -> None:
    generator = np.random.default_rng(0)
    start = RunningMeanStd(shape=(3,))
    if already:
        start.update(generator.normal(2.0, 3.0, (already, 3)))
    whole, told = start.copy(), []
    for rank in range(RANKS):
        mine = start.copy()
        for _ in range(rank):  # the first one has seen nothing
            seen = generator.normal(rank, 1.0 + rank, (50, 3))
            mine.update(seen)
            whole.update(seen)
        told.append({"": (mine.mean, mine.var, mine.count)})
    mean, var, count = merged({"": (start.mean, start.var, start.count)}, told)[""]
    assert count == pytest.approx(whole.count)
    np.testing.assert_allclose(mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(var, whole.var, rtol=1e-10)
