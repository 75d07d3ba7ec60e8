"""Environment wrappers for hyperparameter files (``env_wrapper:``)."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class ActionMaskFromInfo(gym.Wrapper[Any, Any, Any, Any]):
    """Give sb3-contrib's maskable policies the masks that Gymnasium's environments keep in their ``info``.

    Gymnasium (Taxi, for one) returns ``info["action_mask"]`` from ``reset`` and ``step``; sb3-contrib asks for a method
    ``action_masks``.

    Args:
        env: The environment.
        key: Where its ``info`` has the mask.
    """

    def __init__(self, env: gym.Env[Any, Any], key: str = "action_mask") -> None:
        super().__init__(env)
        self._key = key
        self._mask = np.ones(0, dtype=bool)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """As in Gymnasium."""
        observation, info = self.env.reset(**kwargs)
        self._keep(info)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As in Gymnasium."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._keep(info)
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """Which actions are allowed now."""
        return self._mask

    def _keep(self, info: dict[str, Any]) -> None:
        if self._key not in info:
            raise ValueError(
                f"`env_wrapper` ActionMaskFromInfo needs info[{self._key!r}], but {self.env} has only {sorted(info)}. "
                "Use `--algo trpo`, or an environment with action masks."
            )
        self._mask = np.asarray(info[self._key], dtype=bool)
