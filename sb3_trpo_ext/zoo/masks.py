"""Action masks where the RL Zoo does not know of any: in its evaluations, and where it plays a trained agent."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import rl_zoo3.utils
from rl_zoo3.callbacks import TrialEvalCallback
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext import MaskableTRPO


class MaskAwareEvalCallback(MaskableEvalCallback):
    """SB3's evaluation, and sb3-contrib's where the model takes masks.

    Args:
        *args: As in SB3.
        **kwargs: As in SB3.
    """

    def _on_step(self) -> bool:
        if isinstance(self.model, MaskablePPO):
            return super()._on_step()
        return EvalCallback._on_step(self)


class MaskAwareTrialEvalCallback(TrialEvalCallback, MaskAwareEvalCallback):
    """The zoo's evaluation of a trial, with masks where the model takes them."""


class PlayableMaskableTRPO(MaskableTRPO):
    """`MaskableTRPO` for programs that ask for actions without masks: they come from the environment being played."""

    playing: ClassVar[VecEnv | None] = None

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """As in sb3-contrib; without masks, those of the environment that `create_test_env` made last."""
        if action_masks is None and self.playing is not None and is_masking_supported(self.playing):
            action_masks = get_action_masks(self.playing)
        return super().predict(observation, state, episode_start, deterministic, action_masks)


_create_test_env = rl_zoo3.utils.create_test_env


def create_test_env(*args: Any, **kwargs: Any) -> VecEnv:
    """The zoo's ``create_test_env``; remembers the environment for `PlayableMaskableTRPO`."""
    PlayableMaskableTRPO.playing = _create_test_env(*args, **kwargs)
    return PlayableMaskableTRPO.playing
