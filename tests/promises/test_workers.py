"""Processes that torchrun started train one model together: one update, the same decisions, one set of files."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, NoisyExtractor, RandomEnv, in_float64, policy_name, with_rollout
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentNPG, RecurrentPPOClip, RecurrentTRPO
from sb3_trpo_ext.policy import problem

RANKS = 3
"""With two, every sum is the same in either order."""


# Three processes that do what they are told, all of them the same.


def serve(rank: int, port: int, connection: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    while (task := connection.recv()) is not None:
        function, arguments = task
        torch.manual_seed(rank)
        np.random.seed(rank)
        try:
            connection.send((function(rank, *arguments), None))
        except BaseException:
            connection.send((None, traceback.format_exc()))


class Ranks:
    """Runs a function in all of the processes at once."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(RANKS):
            here, there = spawn.Pipe()
            self._processes.append(spawn.Process(target=serve, args=(rank, port, there), daemon=True))
            self._processes[-1].start()
            self._ends.append(here)

    def __call__(self, function: Any, *arguments: Any, timeout: float = 60.0) -> list[Any]:
        for end in self._ends:
            end.send((function, arguments))
        found = []
        for rank, end in enumerate(self._ends):
            assert end.poll(timeout), f"rank {rank} does not answer"
            found.append(end.recv())
        failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error]
        assert not failed, "\n".join(failed)
        return [result for result, _ in found]

    def close(self) -> None:
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = Ranks()
    yield found
    found.close()


# The update of three workers is that of one process with their samples.

STEPS = 32
ALL = {"curvature_samples": None}
SHORT = {"cg_max_steps": 2, "cg_residual_tol": 0.0, "critic_kwargs": {"cg_steps": 2}}
"""Conjugate gradients that leave rounding little time to grow, where it is that of float32."""
FULL = {"batch_size": STEPS * RANKS, "n_epochs": 4}
FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "trpo": (TRPO, ALL),
    "trpo-products": (TRPO, {**ALL, "min_radius_used": 0.9}),
    "trpo-max": (TRPO, {**ALL, "trust_region": "max"}),
    "trpo-theory": (TRPO, {**ALL, "kl_penalty": "theory", "gamma": 0.5}),
    "trpo-chunks": (TRPO, {**ALL, "fisher_chunk_size": 7, "ent_coef": 0.1}),
    "trpo-adam": (TRPO, {**ALL, "critic": "adam", "batch_size": STEPS * RANKS, "n_critic_updates": 3}),
    "trpo-no-signal": (TRPO, {**ALL, "gamma": 0.0}),
    "npg": (NPG, ALL),
    "masked": (MaskableTRPO, ALL),
    "recurrent": (RecurrentTRPO, ALL),
    "ppo": (PPOClip, FULL),
    "ppo-bounded": (PPOClip, {**FULL, "max_kl": 1e-5, "target_kl": 1e-3}),
    "ppo-penalty": (PPOPenalty, FULL),
    "ppo-recurrent": (RecurrentPPOClip, FULL),
}


def model_on(n_envs: int, form: str, by_hand: bool, distributed: bool) -> Any:
    algorithm, options = FORMS[form]
    action = "discrete" if form == "masked" else "box"
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
    "trpo-sde": (TRPO, {"use_sde": True}),
    "npg": (NPG, {"ent_coef": 0.01}),
    "masked": (MaskableTRPO, {}),
    "recurrent-trpo": (RecurrentTRPO, {}),
    "recurrent-npg": (RecurrentNPG, {}),
    "ppo": (PPOClip, {"batch_size": 24, "n_epochs": 2}),
    "ppo-target": (PPOClip, {"batch_size": 24, "n_epochs": 3, "target_kl": 1e-3, "fast_updates": False}),
    "ppo-penalty": (PPOPenalty, {"batch_size": 24, "n_epochs": 2}),
    "ppo-recurrent": (RecurrentPPOClip, {"batch_size": 24, "n_epochs": 2}),
    "dropout": (PPOClip, {"batch_size": 24, "policy_kwargs": {"features_extractor_class": NoisyExtractor}}),
}


def learner(form: str = "trpo", n_envs: int = 2, **changes: Any) -> Any:
    algorithm, options = LEARN[form]
    action = "discrete" if form == "masked" else "box"
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
    model = learner(form)
    model.learn(5 * STEPS * 2 * RANKS)
    actions = model.rollout_buffer.actions
    return flat(summary(model)), actions, model.num_timesteps


@pytest.mark.parametrize("form", LEARN)
def test_all_workers_have_the_same_model_after_five_updates(ranks: Ranks, form: str) -> None:
    found = ranks(five_updates, form)
    for mine, _, steps in found:
        np.testing.assert_array_equal(mine, found[0][0])
        assert steps >= 5 * STEPS * 2 * RANKS
    assert not np.array_equal(found[0][1], found[1][1]) and not np.array_equal(found[1][1], found[2][1])
    if form in ("trpo", "ppo", "trpo-sde"):
        np.testing.assert_array_equal(ranks(five_updates, form)[0][0], found[0][0])
