"""Trust-region policy optimisation where some actions are not allowed."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import numpy as np
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.policy.distributions import CategoricalFamily, family_of
from sb3_trpo_ext.rollout.buffers import MASKABLE_BUFFERS, by_time
from sb3_trpo_ext.trpo import TRPO

SelfMaskableTRPO = TypeVar("SelfMaskableTRPO", bound="MaskableTRPO")


class MaskableRollouts(MaskablePPO):
    """Networks, buffers, masks and collection of sb3-contrib's MaskablePPO, to be given another update.

    A class that lists it after one of ours gets ``__init__`` and ``train`` from there, and the rest from here.

    Args:
        policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a class.
        env: The environment, or its Gymnasium id.
        use_sde: False: there are no continuous actions.
        sde_sample_freq: -1.
        supported_action_spaces: Chosen by sb3-contrib.
        **kwargs: Those of MaskablePPO.
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        supported_action_spaces: Any = None,
        **kwargs: Any,
    ) -> None:
        if use_sde:
            raise ValueError("`use_sde` explores with continuous actions, got True with masked ones. Leave it out.")
        super().__init__(policy, env, **kwargs)  # type: ignore[arg-type]


class MaskableTRPO(TRPO, MaskableRollouts):  # type: ignore[misc]  # narrower attributes there
    """`TRPO` with the policies, buffers and rollouts of sb3-contrib's MaskablePPO (Huang and Ontañón 2020).

    The environment says at each step which actions are allowed (a method ``action_masks``, or sb3-contrib's
    ``ActionMasker``), and the policy is π(a|s) renormalised over those. KL divergence and Fisher metric live on the
    allowed actions alone: a state with a single one contributes exactly zero.

    Args:
        policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, or a subclass of sb3-contrib's
            ``MaskableActorCriticPolicy``.
        env: The environment, or its Gymnasium id; with Discrete, MultiDiscrete or MultiBinary actions.
        others: Those of `TRPO`, but for ``use_sde`` and ``sde_sample_freq``.

    Raises:
        ValueError: If an argument is out of range, or a state allows no action at all.
    """

    policy_aliases = MaskablePPO.policy_aliases

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
        use_masking: bool = True,
    ) -> bool:
        """Collect a rollout as MaskablePPO does, and refuse one that is not finite or allows no action somewhere."""
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps, use_masking)

    def _following_masks(self, env: VecEnv, use_masking: bool = True, *args: Any) -> Any:
        if not use_masking:
            return None
        masks = get_action_masks(env)
        self._require_options(np.asarray(masks).reshape(1, env.num_envs, -1), "after the rollout")
        return masks

    def _check_rollout(self, buffer: RolloutBuffer) -> None:
        self._check_masks(buffer)  # first: where nothing is allowed, a maximum over it is not finite
        super()._check_rollout(buffer)

    def _check_masks(self, buffer: RolloutBuffer) -> None:
        if not isinstance(buffer, MASKABLE_BUFFERS):
            return
        allowed = by_time(buffer, buffer.action_masks).reshape(buffer.buffer_size, buffer.n_envs, -1)
        self._require_options(allowed)

    def _require_options(self, allowed: Any, when: str = "") -> None:
        """Raise `ValueError` if masks, ``(T, E, K)``, allow no option of some choice.

        Args:
            allowed: The masks.
            when: To which time they belong, in words; empty if they are those of the steps of the rollout.
        """
        family = family_of(self.policy.action_dist)
        if not isinstance(family, CategoricalFamily):
            return  # a distribution of the user's own, whose options are not known
        ends = np.cumsum(family.sizes)[:-1]
        for choice, masks in enumerate(np.split(allowed, ends, axis=2)):
            forbidden = np.argwhere(~masks.any(axis=2))
            if len(forbidden):
                self._last_obs = None
                step, index = forbidden[0]
                when = when or f"at step {step} of the rollout"
                raise ValueError(
                    f"`action_masks` of environment {index} allow no option of choice {choice} {when}. The policy is "
                    "unchanged. Let every state allow at least one."
                )

    def learn(  # type: ignore[override]
        self: SelfMaskableTRPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        use_masking: bool = True,
        progress_bar: bool = False,
        *,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_freq: int | None = None,
    ) -> SelfMaskableTRPO:
        """Train for ``total_timesteps`` steps of all environments together; arguments as in MaskablePPO and `TRPO`."""
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
            checkpoint_dir=checkpoint_dir,
            checkpoint_freq=checkpoint_freq,
            use_masking=use_masking,
        )
