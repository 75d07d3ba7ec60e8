"""A run that was killed goes on from its last checkpoint as if nothing had happened, or says why it does not."""

import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, RandomEnv
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentNPG, RecurrentPPOClip, RecurrentTRPO
from sb3_trpo_ext.rollout.env_state import layers, put_into, taken_from, why_not_exact
from sb3_trpo_ext.training import checkpoint, checkpoint_files
from sb3_trpo_ext.training.checkpoint_files import DamagedError

TOTAL, STEPS = 320, 32
CLASSES = [TRPO, NPG, PPOClip, PPOPenalty, RecurrentTRPO, RecurrentNPG, RecurrentPPOClip, MaskableTRPO]


class KilledError(Exception):
    """Stands for the end of the process."""


class Kill(BaseCallback):
    """Ends a run in the middle of a rollout; of SB3's kind in that it lets the fast path run."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        if self.at and self.num_timesteps >= self.at:
            raise KilledError
        return True


class Listing(KVWriter):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        times = ("time/fps", "time/time_elapsed", "time/rollout_s", "time/policy_s", "time/critic_s")
        self.rows.append({"step": step} | {key: value for key, value in key_values.items() if key not in times})


class MaskedEnv(RandomEnv):
    """A task of the user's, with masks, that hands over its state."""

    def get_checkpoint_state(self) -> Any:
        return self._time, self._rng, self.observation_space.np_random, self._allowed

    def set_checkpoint_state(self, state: Any) -> None:
        self._time, self._rng, generator, self._allowed = state
        self.observation_space._np_random = generator


def masked() -> gym.Env:
    return MaskedEnv(gym.spaces.Box(-1, 1, (5,)), gym.spaces.Discrete(4))


def build(algorithm: Any, env: str = "CartPole-v1", normalize: bool = False, **kwargs: Any) -> Any:
    """A small model in a process of its own, as far as it can tell."""
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(int(time.time_ns()) % 2**31)
    made = make_vec_env(masked if algorithm is MaskableTRPO else env, n_envs=2)
    made = VecNormalize(made) if normalize else made
    kind = "MlpLstmPolicy" if algorithm.__name__.startswith("Recurrent") else "MlpPolicy"
    if kind == "MlpLstmPolicy":
        kwargs.setdefault("policy_kwargs", {"lstm_hidden_size": 8})
    model = algorithm(kind, made, **{"n_steps": STEPS, "device": "cpu", "seed": 3, **kwargs})
    model.set_logger(Logger(None, [Listing()]))
    return model


def rows_of(model: Any) -> list[dict[str, Any]]:
    """What a model logged."""
    return model.logger.output_formats[0].rows


def all_of(model: Any) -> dict[str, str]:
    """Everything that must be the same, as texts."""
    statistics = model.get_vec_normalize_env()
    found = {
        **{f"policy.{name}": value.numpy() for name, value in model.policy.state_dict().items()},
        "gradients": [None if param.grad is None else param.grad.numpy() for param in model.policy.parameters()],
        "optimiser": [
            {name: np.asarray(value) for name, value in state.items()}
            for state in model.policy.optimizer.state_dict()["state"].values()
        ],
        "generators": (random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()),
        "space": repr(model.action_space.np_random.bit_generator.state),
        "observation": np.asarray(model._last_obs),
        "starts": model._last_episode_starts,
        "counters": (model.num_timesteps, model._n_updates, model._episode_num, model._num_timesteps_at_start),
        "episodes": [(each["r"], each["l"]) for each in model.ep_info_buffer],
        "memory": getattr(model, "gradient_memory", None),
        "beta": getattr(model, "kl_coef", None),
        "hidden": [np.asarray(each) for pair in getattr(model, "_last_lstm_states", None) or () for each in pair],
        "statistics": statistics and (vars(statistics.obs_rms), vars(statistics.ret_rms), statistics.returns),
    }
    return {name: repr(bits(value)) for name, value in found.items()}


def bits(value: Any) -> Any:
    """A value with its arrays and floats as they are in memory."""
    if isinstance(value, (np.ndarray, np.generic, float)):
        return np.asarray(value).tobytes()
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    return [bits(each) for each in value] if isinstance(value, (list, tuple)) else value


def require_same(model: Any, other: Any) -> None:
    mine, theirs = all_of(model), all_of(other)
    assert [name for name in theirs if mine[name] != theirs[name]] == []


def killed(make: Callable[[], Any], at: int, folder: Path, callback: Any = None, **kwargs: Any) -> Any:
    """A run whose process ends in the middle of a rollout."""
    callbacks = [*([callback] if callback else []), Kill(at)]
    model = make()
    with pytest.raises(KilledError):
        model.learn(**{"total_timesteps": TOTAL, "checkpoint_dir": folder, "checkpoint_freq": 1, **kwargs}, callback=callbacks)
    return model


def resumed(make: Callable[[], Any], folder: Path, callback: Any = None, **kwargs: Any) -> Any:
    arguments = {"total_timesteps": TOTAL, "checkpoint_dir": folder, "checkpoint_freq": 1, **kwargs}
    return make().learn(**arguments, callback=[*([callback] if callback else []), Kill()])


def uninterrupted(make: Callable[[], Any], callback: Any = None, **kwargs: Any) -> Any:
    return make().learn(TOTAL, callback=[*([callback] if callback else []), Kill()], **kwargs)


# Bit for bit

ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{f"{kind.__name__}": (kind, {}) for kind in CLASSES},
    "normalized": (TRPO, {"normalize": True, "env": "Pendulum-v1"}),
    "normalized ppo": (PPOClip, {"normalize": True, "env": "Pendulum-v1", "learning_rate": lambda p: 1e-3 * p}),
    "penalty": (PPOPenalty, {"env": "Pendulum-v1", "target_kl": 1e-4}),
    "recurrent": (RecurrentTRPO, {"normalize": True, "env": "Pendulum-v1"}),
    "mujoco": (TRPO, {"normalize": True, "env": "Hopper-v5"}),
    "momentum": (TRPO, {"momentum": 0.5, "env": "Pendulum-v1", "critic": "adam", "batch_size": 16}),
    "reuse": (TRPO, {"sample_reuse": 3, "env": "Pendulum-v1"}),
    "growing": (TRPO, {"final_n_steps": 64, "target_kl": lambda p: 0.01 * p + 0.001}),
    "gsde": (TRPO, {"use_sde": True, "sde_sample_freq": 4, "env": "Pendulum-v1"}),
    "exact": (TRPO, {"fast_rollouts": "exact"}),
    "sb3's way": (PPOClip, {"fast_rollouts": False, "fast_updates": False}),
}


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_that_is_killed_twice_ends_as_one_that_is_not(arm: str, tmp_path: Path) -> None:
    algorithm, options = ARMS[arm]

    def make() -> Any:
        return build(algorithm, **options)

    whole = uninterrupted(make)
    expected = all_of(whole)
    first, second = killed(make, 120, tmp_path), killed(make, 250, tmp_path)
    model = resumed(make, tmp_path)
    assert [name for name, value in all_of(model).items() if value != expected[name]] == []
    # What was logged too, iterations included: each process goes on with the row after its checkpoint.
    rows = {row["step"]: row for each in (first, second, model) for row in rows_of(each)}
    assert repr([rows[step] for step in sorted(rows)]) == repr(rows_of(whole))


CLASSIC = ["CartPole-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Acrobot-v1"]
TOYS = ["FrozenLake-v1", "CliffWalking-v1", "Blackjack-v1"]
MUJOCO = [name for name, spec in gym.registry.items() if name.endswith("-v5") and "mujoco" in str(spec.entry_point)]


@pytest.mark.parametrize("name", [*CLASSIC, *TOYS, *MUJOCO])
def test_environments_go_on_exactly(name: str) -> None:
    def make() -> gym.Env:
        return Monitor(gym.make(name, max_episode_steps=30))

    env, other = make(), make()
    assert why_not_exact(env) == ""
    env.reset(seed=5)
    env.action_space.seed(6)
    other.reset(seed=7)
    for _ in range(20):  # some of the way into an episode
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    put_into(other, taken_from(env))
    for _ in range(60):
        action = env.action_space.sample()
        steps = [each.step(action) for each in (env, other)]
        for mine, theirs in zip(*steps, strict=True):
            assert repr(bits(without_time(mine))) == repr(bits(without_time(theirs)))
        if steps[0][2] or steps[0][3]:
            mine, theirs = (each.reset() for each in (env, other))
            assert repr(bits(mine)) == repr(bits(theirs))


def without_time(value: Any) -> Any:
    """An info without the seconds that a Monitor counts."""
    return {**value, "episode": {**value["episode"], "t": 0}} if isinstance(value, dict) and "episode" in value else value


def test_there_are_mujoco_tasks() -> None:
    assert len(MUJOCO) >= 10
