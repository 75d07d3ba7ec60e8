"""Vectorised environments that step without deep copies of what cannot change."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs
from stable_baselines3.common.vec_env.util import dict_to_obs

IMMUTABLE = frozenset(
    (bool, int, float, complex, str, bytes, type(None), np.bool_, np.int32, np.int64, np.float32, np.float64)
)
"""Types whose values a deep copy may share."""


class Infos(list[dict[str, Any]]):
    """The infos of a step; a deep copy of it is a plain list, deep but for immutable values."""

    def __deepcopy__(self, memo: dict[int, Any]) -> list[dict[str, Any]]:
        """Copy what could change."""
        return [
            {key: value if type(value) in IMMUTABLE else copy.deepcopy(value, memo) for key, value in info.items()}
            if type(info) is dict
            else copy.deepcopy(info, memo)
            for info in self
        ]


def _copied_observations(env: DummyVecEnv) -> Callable[[], VecEnvObs]:
    """What `DummyVecEnv` returns of its observations: copies of the arrays, by key if there are several."""
    arrays = env.buf_obs
    if not isinstance(env.observation_space, (spaces.Dict, spaces.Tuple)):
        (array,) = arrays.values()
        return array.copy
    return lambda: dict_to_obs(env.observation_space, OrderedDict((key, a.copy()) for key, a in arrays.items()))


def _is_plain(env: DummyVecEnv) -> bool:
    """Whether it is SB3's own, as it is made, with arrays of numbers."""
    own = type(env) is DummyVecEnv and "_obs_from_buf" not in vars(env)
    return own and not any(array.dtype.hasobject for array in env.buf_obs.values())


@contextmanager
def cheap_copies(env: VecEnv) -> Iterator[None]:
    """Let a `DummyVecEnv`, wrapped or not, copy only what could change from step to step, within the block.

    It returns deep copies of its observations and infos at every step, half as dear as a step of CartPole. What it
    returns within the block is equal to what it returns otherwise.
    """
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    if not isinstance(env, DummyVecEnv) or not _is_plain(env):
        yield
        return
    env.buf_infos = Infos(env.buf_infos)
    vars(env)["_obs_from_buf"] = _copied_observations(env)
    try:
        yield
    finally:
        env.buf_infos = list(env.buf_infos)
        del vars(env)["_obs_from_buf"]
