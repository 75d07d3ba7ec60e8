"""Vectorised environments that step without deep copies of what cannot change."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs

IMMUTABLE = frozenset(
    (bool, int, float, complex, str, bytes, type(None), np.bool_, np.int32, np.int64, np.float32, np.float64)
)
"""Types whose values a deep copy may share."""


class LeanDummyVecEnv(DummyVecEnv):
    """SB3's `DummyVecEnv` for the time of a rollout: equal results, half of a step's overhead.

    SB3's copies observations and infos deeply at every step, half as dear as a step of CartPole. A copy of this one, or
    what is read from its pickle, is a plain `DummyVecEnv`.
    """

    def step(self, actions: np.ndarray) -> VecEnvStepReturn:
        """Step each environment, without the detour through the asynchronous interface."""
        self.actions = actions
        return self.step_wait()

    def step_wait(self) -> VecEnvStepReturn:
        """Step each environment, and begin a new episode where one has ended."""
        rewards, dones, infos, actions = self.buf_rews, self.buf_dones, self.buf_infos, self.actions
        rows = self.buf_obs.get(None)  # type: ignore[call-overload]
        for index, env in enumerate(self.envs):
            observation, rewards[index], terminated, truncated, info = env.step(actions[index])
            infos[index] = info
            info["TimeLimit.truncated"] = truncated and not terminated
            dones[index] = done = terminated or truncated
            if done:
                info["terminal_observation"] = observation
                observation, self.reset_infos[index] = env.reset()
            if rows is None:
                self._save_obs(index, observation)
            else:
                rows[index] = observation
        return self._obs_from_buf(), rewards.copy(), dones.copy(), _copied(infos)

    def _obs_from_buf(self) -> VecEnvObs:
        """Copies of the arrays of numbers."""
        if None in self.buf_obs:
            return self.buf_obs[None].copy()  # type: ignore[index]
        arrays: OrderedDict[Any, Any] = OrderedDict((key, array.copy()) for key, array in self.buf_obs.items())
        return dict_to_obs(self.observation_space, arrays)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Leave nothing of this class in a copy."""
        recipe: Any = super().__reduce_ex__(protocol)
        make, (_, *others), *rest = recipe
        return make, (DummyVecEnv, *others), *rest


def _copied(infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy, deep but for immutable values."""
    if len(infos) > 1 and len(infos) != len(set(map(id, infos))):
        return copy.deepcopy(infos)
    memo: dict[int, Any] = {}
    return [
        info.copy()
        if type(info) is dict and IMMUTABLE.issuperset(map(type, info.values()))
        else copy.deepcopy(info, memo)
        for info in infos
    ]


OVERRIDABLE = ("step", "step_async", "step_wait", "_save_obs", "_obs_from_buf")
"""Methods that an environment could have of its own."""


def _is_plain(env: DummyVecEnv) -> bool:
    """Whether it is SB3's own, as it is made, with arrays of numbers."""
    own = any(name in vars(env) for name in OVERRIDABLE)
    flat = not isinstance(env.observation_space, spaces.Tuple)
    return not own and flat and not any(array.dtype.hasobject for array in env.buf_obs.values())


def vec_layers(env: VecEnv | None) -> Iterator[VecEnv]:
    """The wrappers of vectorised environments, the outermost first, and what they wrap."""
    while env is not None:
        yield env
        env = env.venv if isinstance(env, VecEnvWrapper) else None


@contextmanager
def cheap_copies(env: VecEnv) -> Iterator[None]:
    """Let a `DummyVecEnv`, wrapped or not, be a `LeanDummyVecEnv` within the block."""
    *_, env = vec_layers(env)
    if type(env) is not DummyVecEnv or not _is_plain(env):
        yield
        return
    env.__class__ = LeanDummyVecEnv
    try:
        yield
    finally:
        env.__class__ = DummyVecEnv
