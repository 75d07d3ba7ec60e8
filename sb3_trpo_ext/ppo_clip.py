"""Proximal Policy Optimization, clipped objective."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor

from sb3_trpo_ext.core.arguments import check_schedule
from sb3_trpo_ext.core.objectives import clipped_surrogate
from sb3_trpo_ext.policy.problem import PolicyEvaluation
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.training.base import plain
from sb3_trpo_ext.training.first_order import FirstOrderAlgorithm
from sb3_trpo_ext.training.minibatch_kernel import Loss, clipped


class PPOClip(FirstOrderAlgorithm):
    """Proximal Policy Optimization with the clipped objective (Schulman et al. 2017, https://arxiv.org/abs/1707.06347).

    Minibatch ascent on E[min(r·Â, clip(r, 1-ε, 1+ε)·Â)] (equation 7) less ``vf_coef`` times the value loss plus
    ``ent_coef`` times the entropy (equation 9). It takes the same steps as ``stable_baselines3.PPO``: up to rounding,
    or number for number with ``fast_updates=False`` and ``fast_rollouts`` ``"exact"`` or False. There is one exception:
    where all advantages of a rollout are equal up to rounding, SB3 standardises the rounding errors and steps along
    them; here the policy loss of that rollout is left out, and the value loss and the entropy bonus remain. Beyond SB3,
    the exact joint KL divergence is logged beside the sampled estimate (``train/kl_divergence_loss``,
    ``train/kl_max``) and can be bounded (``max_kl``), and an update is atomic.

    It learns what SB3's PPO learns: CartPole-v1 in 60 000 steps; of Pendulum-v1, at a learning rate of 1e-3, some seeds
    are still far from the others after 150 000.

    Args:
        policy: The policy class, or ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``.
        env: The environment, or its Gymnasium id.
        learning_rate: Step size, a float or a schedule of the remaining progress.
        n_steps: Steps of each environment in a rollout.
        batch_size: Minibatch size.
        n_epochs: Passes over the rollout in an update.
        gamma: Discount factor.
        gae_lambda: λ of generalised advantage estimation (Schulman et al. 2016).
        clip_range: ε, a float or a schedule of the remaining progress.
        clip_range_vf: Clipping of the value function, likewise; None for none.
        normalize_advantage: Standardise Â over each minibatch.
        ent_coef: Weight of the entropy bonus, a float or a schedule of the remaining progress.
        vf_coef: Weight of the value loss.
        max_grad_norm: Largest norm of a gradient; longer ones are scaled down.
        use_sde: Use generalised state-dependent exploration (gSDE).
        sde_sample_freq: Steps between new gSDE noise matrices; -1 for one a rollout.
        rollout_buffer_class: Rollout buffer class; None chooses by the observation space.
        rollout_buffer_kwargs: Its further arguments.
        target_kl: End the update before a minibatch whose sampled KL estimate exceeds 1.5 times this, a float or a
            schedule; None for never.
        stats_window_size: Episodes in the logged means.
        tensorboard_log: Directory for TensorBoard; None for none.
        policy_kwargs: Further arguments of the policy.
        verbose: 0 silent, 1 info, 2 debug.
        seed: Seed of all random generators.
        device: ``"cpu"``, ``"cuda"``, ``"auto"``, ...
        max_kl: Bound on the exact mean joint KL(π_old‖π_θ) over the rollout: an epoch that leaves this ball is rolled
            back, optimiser included, and ends the update. None for no bound.
        critic: ``"value"``, V(s) as in SB3, or ``"action_value"``, a value Q(s,a) for each of the Discrete actions
            (`ActionValues`), whose loss is that of the actions taken.
        bootstrap: What is expected to follow a state, where the critic has action values: ``"expected"``, or ``"max"``;
            see `TRPO`.
        surrogate: Where the critic has action values, ``"expected"`` makes of the policy's loss the sum over actions
            Σ_a π_old(a|s) min(r A, clip(r) A), with A(s,·) of the critic as it is at the minibatch; ``"sampled"`` goes
            by the actions taken.
        log_std: Who sets log σ of Gaussian actions (Box, without gSDE). ``"learned"``: the policy gradient, from
            policy_kwargs' ``log_std_init`` on, as in SB3; it falls because less noise pays at once, too early for some
            tasks and too late for others. ``"fixed"``: it stays what ``log_std_init`` made it. A schedule of the
            remaining progress, ``LinearSchedule(-0.5, -1.5, 1.0)`` say, is log σ itself: it is set before each rollout,
            for the rollout and its update, whatever ``load`` or ``set_parameters`` brought, and ``learn`` leaves that
            of the last rollout. A σ that is fixed or scheduled is no part of the update: its ``param.grad`` is None,
            and Adam does not move it. To change who sets it, pass another ``log_std`` to ``load``.
        log_std_min: Lowest log σ where it is learnt; None for none. Every step is projected onto it.
        fast_rollouts: Collect without calling the policy's modules where these are plain layers on the CPU
            (``rollout_path`` tells): the same random numbers, actions, buffers and callbacks as SB3's own loop, up to
            the last bits of float32, in a third of its time. ``"exact"`` has the last bits too and takes somewhat
            longer; False is SB3's own loop.
        fast_updates: Compute updates without autograd where the policy is of plain layers on the CPU (``update_path``
            tells): the same numbers up to the rounding of float32, in a fraction of the time. False is autograd.
        distributed: Where ``torchrun`` started this process beside others, train one model together with them. The
            script stays as it is: each process has environments of its own, ``n_envs`` and ``n_steps`` are those of
            one process, and ``batch_size``, ``total_timesteps`` and ``num_timesteps`` are of all. W processes with E
            environments each take the update of one process with W·E. Environment i of process r has the seed of
            environment r·E + i. Process 0 writes logs and files and runs SB3's callbacks; see `main_only` and
            `every_rank`. False trains each process by itself.
        _init_setup_model: Build the networks at construction.

    Raises:
        AssertionError: If advantages are normalised over a single sample, as in SB3's PPO.
        ValueError: If an argument is out of range.
    """

    loss_statistic = "clip_fraction"

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | Schedule | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            **kwargs,
        )
        self.clip_range = clip_range
        self.target_kl = target_kl

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        self.clip_range = FloatSchedule(plain(self.clip_range))

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_schedule("clip_range", self.clip_range, positive=True)
        if self.target_kl is not None:
            check_schedule("target_kl", self.target_kl, positive=True, hint="Pass None for no bound.")

    def _policy_loss(self, part: Batch, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        assert callable(self.clip_range)  # since it was set up
        clip_range = self.clip_range(self._current_progress_remaining)  # beyond the end too, as in SB3's PPO
        mean, clipped = part.reduction.mean, ((ratio.detach() - 1).abs() > clip_range).float()
        surrogate = part.over_actions(clipped_surrogate(ratio, advantages, clip_range))
        return -mean(surrogate), mean(part.over_actions(clipped))

    def _loss_by_hand(self) -> Loss:
        assert callable(self.clip_range)
        return Loss(clipped(self.clip_range(self._current_progress_remaining)))

    def _exceeds_target(self, approx_kl: float, epoch: int) -> bool:
        if self.target_kl is None:
            return False
        exceeded = approx_kl > 1.5 * self._current_value(self.target_kl)
        if exceeded and self.verbose >= 1:
            print(f"{type(self).__name__}: epoch {epoch} ended by target_kl, sampled KL {approx_kl:.3g}.")
        return exceeded

    def _log_entries(self, evaluation: PolicyEvaluation) -> dict[str, float]:
        return {"train/clip_range": self._current_value(self.clip_range), **super()._log_entries(evaluation)}
