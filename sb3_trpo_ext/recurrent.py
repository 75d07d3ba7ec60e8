"""Trust-region methods with memory: the LSTM policies and the rollouts of sb3-contrib."""

from __future__ import annotations

from typing import Any

import torch
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv

from sb3_trpo_ext.npg import NPG
from sb3_trpo_ext.ppo_clip import PPOClip
from sb3_trpo_ext.trpo import TRPO


class RecurrentRollouts(RecurrentPPO):
    """Networks, buffers, hidden states and collection of sb3-contrib's RecurrentPPO, to be given another update.

    A class that lists it after one of ours gets ``__init__`` and ``train`` from there, and the rest from here.

    Args:
        policy: ``"MlpLstmPolicy"``, ``"CnnLstmPolicy"``, ``"MultiInputLstmPolicy"`` or a class.
        env: The environment, or its Gymnasium id.
        rollout_buffer_class: None; sb3-contrib chooses the recurrent one for the observation space.
        rollout_buffer_kwargs: None.
        supported_action_spaces: Chosen by sb3-contrib.
        **kwargs: Those of RecurrentPPO.
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        rollout_buffer_class: Any = None,
        rollout_buffer_kwargs: Any = None,
        supported_action_spaces: Any = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (
            ("rollout_buffer_class", rollout_buffer_class),
            ("rollout_buffer_kwargs", rollout_buffer_kwargs),
        ):
            if value:
                raise ValueError(f"`{name}` cannot be chosen for a recurrent policy, got {value!r}. Leave it out.")
        super().__init__(policy, env, **kwargs)  # type: ignore[arg-type]
        self.rollout_buffer_class = None
        self.rollout_buffer_kwargs = {}

    def _setup_model(self) -> None:
        try:
            super()._setup_model()
        except TypeError as error:
            if "input_size" not in str(error):
                raise
            raise ValueError(
                f"The LSTM policies of sb3-contrib cannot be built for the observation space {self.observation_space}: "
                f"{error}. Wrap the environment in gymnasium.wrappers.FlattenObservation, which encodes it one-hot."
            ) from error

    def _forget(self) -> None:
        """Begin from hidden states of zero: those of another policy, or environment, mean nothing."""
        states = self._last_lstm_states
        if states is not None:
            self._last_lstm_states = RNNStates(*(tuple(map(torch.zeros_like, pair)) for pair in states))

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """Collect as RecurrentPPO does, from hidden states that are finite where an episode begins.

        sb3-contrib multiplies them by zero there, which a NaN would outlive.
        """
        begins = torch.as_tensor(self._last_episode_starts, device=self.device).bool()[None, :, None]
        states = self._last_lstm_states
        assert states is not None
        self._last_lstm_states = RNNStates(
            *(tuple(torch.where(begins & ~each.isfinite(), 0.0, each) for each in pair) for pair in states)
        )
        return super().collect_rollouts(*args, **kwargs)


class RecurrentTRPO(TRPO, RecurrentRollouts):  # type: ignore[misc]  # narrower attributes there
    """`TRPO` with the LSTM policies, buffers and rollouts of sb3-contrib's RecurrentPPO.

    The policy is π(·|s_1, …, s_t): its LSTM runs through each episode of the rollout from the hidden state that it had
    there, and surrogate, KL divergence and Fisher products are means over the steps, as without memory. Gradients go
    back to the beginning of the episode or of the rollout, so ``n_steps`` bounds the length of a sequence; 128 with
    several environments is RecurrentPPO's choice. Samples of the curvature are drawn by whole sequences, and a fused
    kernel without a second derivative (cuDNN's) is replaced by the plain one.

    Where nothing has to be remembered it learns more slowly than `TRPO`: 60 000 steps of CartPole-v1 are enough for
    some seeds only; Pendulum-v1 it swings up in 150 000. On CartPole-v1 with hidden velocities ``critic="adam"`` did
    better than the Gauss-Newton critic, and a ``target_kl`` that falls from 0.03 to 0.003 steadied the end.

    Args:
        policy: ``"MlpLstmPolicy"``, ``"CnnLstmPolicy"``, ``"MultiInputLstmPolicy"``, or a subclass of sb3-contrib's
            ``RecurrentActorCriticPolicy``. ``policy_kwargs``: ``lstm_hidden_size``, ``n_lstm_layers``,
            ``shared_lstm``, ``enable_critic_lstm``, ``lstm_kwargs``.
        env: The environment, or its Gymnasium id.
        others: Those of `TRPO`, but for ``rollout_buffer_class``, ``rollout_buffer_kwargs``, ``sample_reuse`` and the
            ``n_rollouts`` of the critic.

    Raises:
        ValueError: If an argument is out of range, or a rollout buffer is chosen.
    """

    policy_aliases = RecurrentPPO.policy_aliases

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.sample_reuse > 1:
            raise ValueError(
                f"`sample_reuse` must be 1 for a recurrent policy, got {self.sample_reuse}: the hidden states of a "
                "past rollout are those of the policy that made it. Leave it out."
            )


class RecurrentNPG(NPG, RecurrentRollouts):  # type: ignore[misc]
    """`NPG` with the LSTM policies, buffers and rollouts of sb3-contrib's RecurrentPPO; see `RecurrentTRPO`."""

    policy_aliases = RecurrentPPO.policy_aliases


class RecurrentPPOClip(PPOClip, RecurrentRollouts):  # type: ignore[misc]
    """`PPOClip` with the LSTM policies, buffers and rollouts of sb3-contrib's RecurrentPPO; see `RecurrentTRPO`.

    Minibatches are cut from the rollout as RecurrentPPO cuts them.
    """

    policy_aliases = RecurrentPPO.policy_aliases
