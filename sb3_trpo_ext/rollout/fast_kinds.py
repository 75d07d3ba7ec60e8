"""Fast rollouts with masks and with memory, and which kind a model needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from sb3_trpo_ext.rollout.buffers import MASKABLE_BUFFERS, RECURRENT_BUFFERS
from sb3_trpo_ext.rollout.fast import FastRollout, Pending
from sb3_trpo_ext.rollout.fast_policy import FastPolicy, FastRecurrentPolicy
from sb3_trpo_ext.rollout.forward import Array


class FastMaskableRollout(FastRollout):
    """The same for sb3-contrib's maskable policies and buffers.

    Args:
        use_masking: Whether the environments are asked which actions are allowed.
    """

    buffers = MASKABLE_BUFFERS
    shows_clipped_actions = unscales = False
    asks_before_acting = True

    def __init__(self, model: Any, env: VecEnv, buffer: RolloutBuffer, n_steps: int, use_masking: bool = True) -> None:
        super().__init__(model, env, buffer, n_steps)
        self._use_masking, self._options = use_masking, int(buffer.mask_dims)  # type: ignore[attr-defined]

    def _begin(self, names: dict[str, Any]) -> None:
        names["use_masking"], names["action_masks"] = self._use_masking, None
        if self._use_masking and not is_masking_supported(self._env):
            raise ValueError(
                "The environment does not support action masking: it has no method `action_masks`. Wrap it in "
                "sb3_contrib.common.wrappers.ActionMasker, or pass use_masking=False to `learn`."
            )

    def _masks(self, names: dict[str, Any]) -> Array | None:
        if self._use_masking:
            names["action_masks"] = get_action_masks(self._env)
            masks = np.asarray(names["action_masks"]).reshape(self._env.num_envs, -1)
            if masks.shape[1] != self._options:
                raise ValueError(
                    f"`action_masks` must have one entry for each of the {self._options} options of "
                    f"{self._model.action_space}, got {masks.shape[1]}."
                )
            return masks
        return None

    def _called(self, names: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        self._masks(names)
        actions, values, log_probs = self._model.policy(names["obs_tensor"], action_masks=names["action_masks"])
        return actions, values, log_probs

    def _store(self, step: int, names: dict[str, Any]) -> None:
        if names["action_masks"] is not None:
            masks: Any = self._buffer
            masks.action_masks[step] = names["action_masks"].reshape(self._env.num_envs, -1)
        super()._store(step, names)

    def _end(self, callback: BaseCallback, names: dict[str, Any]) -> None:
        """Show nothing, as sb3-contrib."""


class FastRecurrentRollout(FastRollout):
    """The same for sb3-contrib's LSTM policies and buffers."""

    buffers = RECURRENT_BUFFERS
    name_of_done = "done_"
    unscales = False
    asks_before_acting = True

    def _fast_policy(self) -> FastPolicy:
        return FastRecurrentPolicy(self._model.policy, self._env.num_envs, exact=self._exact)

    def _masks(self, names: dict[str, Any]) -> Array | None:
        policy, model = self._policy, self._model
        assert isinstance(policy, FastRecurrentPolicy)
        names["episode_starts"] = torch.tensor(model._last_episode_starts, dtype=torch.float32)
        with torch.no_grad():
            states = names.get("lstm_states", model._last_lstm_states)
            names["lstm_states"] = policy.remember(states, model._last_episode_starts)
        return None

    def _called(self, names: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        model = self._model
        names["episode_starts"] = torch.tensor(model._last_episode_starts, dtype=torch.float32, device=model.device)
        actions, values, log_probs, names["lstm_states"] = model.policy(
            names["obs_tensor"], names.get("lstm_states", model._last_lstm_states), names["episode_starts"]
        )
        return actions, values, log_probs

    def _note_timeouts(self, pending: Pending, step: int, names: dict[str, Any]) -> None:
        self._bootstrap(names)

    def _terminal_value(self, names: dict[str, Any]) -> Tensor:
        model, env = self._model, names["idx"]
        names["terminal_lstm_state"] = tuple(state[:, env : env + 1].contiguous() for state in names["lstm_states"].vf)
        names["episode_starts"] = torch.zeros(1, device=model.device)
        value: Tensor = model.policy.predict_values(
            names["terminal_obs"], names["terminal_lstm_state"], names["episode_starts"]
        )[0]
        return value

    def _store(self, step: int, names: dict[str, Any]) -> None:
        buffer: Any = self._buffer
        before = self._model._last_lstm_states
        arrays = (buffer.hidden_states_pi, buffer.cell_states_pi, buffer.hidden_states_vf, buffer.cell_states_vf)
        for array, state in zip(arrays, (*before.pi, *before.vf), strict=True):
            array[step] = state.cpu().numpy()
        super()._store(step, names)
        self._model._last_lstm_states = names["lstm_states"]

    def _last_values(self, observation: Any, names: dict[str, Any]) -> Tensor:
        model = self._model
        starts = torch.tensor(names["dones"], dtype=torch.float32, device=model.device)
        values: Tensor = model.policy.predict_values(observation, names["lstm_states"].vf, starts)
        return values

    def _end(self, callback: BaseCallback, names: dict[str, Any]) -> None:
        """Show nothing, as sb3-contrib."""


def fast_rollout(model: Any, env: VecEnv, buffer: RolloutBuffer, n_steps: int, *args: Any) -> FastRollout:
    """The fast path for a model.

    Args:
        model: The algorithm that collects.
        env: The environments.
        buffer: The buffer to fill.
        n_steps: Steps of each environment.
        *args: What sb3-contrib's ``collect_rollouts`` takes beyond these.

    Raises:
        NotCoveredError: If it does not cover the model; the message says why.
    """
    kinds: list[type[FastRollout]] = [FastMaskableRollout, FastRecurrentRollout, FastRollout]
    kind = next((kind for kind in kinds if isinstance(buffer, kind.buffers)), FastRollout)
    return kind(model, env, buffer, n_steps, *args)
