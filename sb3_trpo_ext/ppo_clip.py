"""Proximal Policy Optimization, clipped objective."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, TypeVar

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor
from torch.nn import functional as F

from sb3_trpo_ext.core.objectives import clipped_surrogate
from sb3_trpo_ext.sb3.algorithm import TrustRegionAlgorithm, UpdateRejectedError, timed
from sb3_trpo_ext.sb3.batch import Batch, consistent_evaluation, minibatches, whole_rollout
from sb3_trpo_ext.sb3.checks import check_integer, check_minibatches, check_number, check_rollout_size
from sb3_trpo_ext.sb3.optimizer import FlatOptimizer
from sb3_trpo_ext.sb3.parameters import gradient, trainable
from sb3_trpo_ext.sb3.policy_problem import PolicyEvaluation, PolicyProblem

SelfPPOClip = TypeVar("SelfPPOClip", bound="PPOClip")

KL_CHUNK_SIZE = 2048
"""Most samples in one forward pass when the exact KL is evaluated."""

STATISTICS = ("approx_kl", "clip_fraction", "policy_gradient_loss", "value_loss", "entropy_loss", "loss")
"""What is logged of a minibatch; the first is the sampled KL estimate, the mean of (r - 1) - log r."""

Statistics = dict[str, list[float]]


class PPOClip(TrustRegionAlgorithm):
    """Proximal Policy Optimization with the clipped objective (Schulman et al. 2017, https://arxiv.org/abs/1707.06347).

    Minibatch ascent on E[min(r·Â, clip(r, 1-ε, 1+ε)·Â)] (equation 7) less ``vf_coef`` times the value loss plus
    ``ent_coef`` times the entropy (equation 9). With ``fast_rollouts=False`` it takes the same steps as
    ``stable_baselines3.PPO``, number for number. Beyond it, the exact joint KL divergence is logged beside the sampled
    estimate (``train/kl_divergence_loss``, ``train/kl_max``) and can be bounded (``max_kl``), and an update is atomic.

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
        ent_coef: Weight of the entropy bonus.
        vf_coef: Weight of the value loss.
        max_grad_norm: Largest norm of a gradient; longer ones are scaled down.
        use_sde: Use generalised state-dependent exploration (gSDE).
        sde_sample_freq: Steps between new gSDE noise matrices; -1 for one a rollout.
        rollout_buffer_class: Rollout buffer class; None chooses by the observation space.
        rollout_buffer_kwargs: Its further arguments.
        target_kl: End the update before a minibatch whose sampled KL estimate exceeds 1.5 times this; None for never.
        stats_window_size: Episodes in the logged means.
        tensorboard_log: Directory for TensorBoard; None for none.
        policy_kwargs: Further arguments of the policy.
        verbose: 0 silent, 1 info, 2 debug.
        seed: Seed of all random generators.
        device: ``"cpu"``, ``"cuda"``, ``"auto"``, ...
        max_kl: Bound on the exact mean joint KL(π_old‖π_θ) over the rollout: an epoch that leaves this ball is rolled
            back, optimiser included, and ends the update. None for no bound.
        fast_rollouts: Collect by NumPy matrix products where the policy is a plain MLP on the CPU (``rollout_path``
            tells): the same distribution from another random stream. False always collects as SB3 does.
        _init_setup_model: Build the networks at construction.

    Raises:
        AssertionError: If advantages are normalised over a single sample, as in SB3's PPO.
        ValueError: If an argument is out of range.
    """

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
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        max_kl: float | None = None,
        fast_rollouts: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
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
            fast_rollouts=fast_rollouts,
        )
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.max_kl = max_kl

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)

    def _check_arguments(self) -> None:
        if self.normalize_advantage and self.batch_size <= 1:
            raise AssertionError(
                f"`batch_size` must be greater than 1 to normalise advantages, got {self.batch_size}. Raise it or pass "
                "normalize_advantage=False."
            )
        for name in ("batch_size", "n_epochs"):
            check_integer(name, getattr(self, name))
        if not callable(self.clip_range):
            check_number("clip_range", self.clip_range, positive=True)
        if isinstance(self.clip_range_vf, (int, float)) and not self.clip_range_vf > 0:
            raise AssertionError(
                f"`clip_range_vf` must be positive, got {self.clip_range_vf}. Pass None to switch value clipping off."
            )
        for name in ("target_kl", "max_kl"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), positive=True, hint="Pass None for no bound.")
        if self.env is not None:
            check_rollout_size(self.n_steps, self.n_envs, normalize_advantage=self.normalize_advantage)
            check_minibatches(self.n_steps, self.n_envs, self.batch_size)

    def _update(self) -> dict[str, float]:
        record: dict[str, float] = {}
        with timed(record, "time/policy_s"):
            batch = whole_rollout(self.rollout_buffer, self.action_space)
            problem = PolicyProblem(self.policy, batch, chunk_size=KL_CHUNK_SIZE)
            self._exact(problem)
            statistics, evaluation, reason = self._epochs(problem, batch)
        self._report_rejection(reason) if reason else self._report_success()

        means = {key: float(np.mean(values)) for key, values in statistics.items()}
        record |= {f"train/{key}": value for key, value in means.items() if key != "loss"}
        record["train/loss"] = statistics["loss"][-1]
        record["train/clip_range"] = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        if self.clip_range_vf is not None:
            record["train/clip_range_vf"] = self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]
        record["train/kl_divergence_loss"] = evaluation.divergence
        record["train/kl_max"] = evaluation.kl_max
        record["train/entropy"] = evaluation.entropy
        return record

    def _epochs(self, problem: PolicyProblem, batch: Batch) -> tuple[Statistics, PolicyEvaluation, str]:
        """Run the epochs; returns their statistics, the policy they leave, and why the last was rolled back, if so."""
        statistics: Statistics = defaultdict(list)
        reason = ""
        for epoch in range(self.n_epochs):
            before = self._checkpoints() if self.max_kl is not None else ()
            within_target = self._epoch(epoch, batch, statistics)
            if self.max_kl is not None and not self._exact(problem).divergence <= self.max_kl:
                for state in before:
                    state.restore()
                if epoch == 0:
                    reason = "the first epoch left the ball of radius `max_kl`"
                break
            self._n_updates += 1
            if not within_target:
                break
        return statistics, self._exact(problem), reason

    def _exact(self, problem: PolicyProblem) -> PolicyEvaluation:
        with consistent_evaluation(self.policy):
            return problem.evaluate()

    def _epoch(self, epoch: int, batch: Batch, statistics: Statistics) -> bool:
        """One pass over the rollout; False if the sampled KL estimate exceeded its target."""
        self.policy.set_training_mode(True)
        statistics["approx_kl"] = []  # SB3 logs the mean over the last epoch alone
        params = trainable(self.policy)
        records: list[Tensor] = []
        within_target = True
        with FlatOptimizer(self.policy.optimizer) as optimizer:
            for part in minibatches(self.rollout_buffer, batch, self.batch_size, self.action_space):
                loss, record = self._loss(part)
                records.append(record)
                if self.target_kl is not None and float(record[0]) > 1.5 * self.target_kl:
                    if self.verbose >= 1:
                        print(f"PPOClip: epoch {epoch} ended by target_kl, sampled KL {float(record[0]):.3g}.")
                    within_target = False
                    break
                if not optimizer.step(gradient([loss], params), self.max_grad_norm):
                    raise UpdateRejectedError("the gradient of the loss is not finite")
        for key, column in zip(STATISTICS, torch.stack(records).T.tolist(), strict=True):
            statistics[key].extend(column)
        return within_target

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss on a minibatch, with its graph, and its `STATISTICS`."""
        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        values, log_prob, entropy = self.policy.evaluate_actions(batch.inputs, batch.actions)

        advantages = batch.advantages
        if self.normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        log_ratio = log_prob - batch.old_log_prob
        ratio = torch.exp(log_ratio)
        policy_loss = -clipped_surrogate(ratio, advantages, clip_range).mean()
        value_loss = F.mse_loss(batch.returns, self._clipped_values(values.flatten(), batch.old_values))
        entropy_loss = -torch.mean(-log_prob if entropy is None else entropy)
        # A bonus of weight zero changes no bit of the loss and its gradient, but costs a backward pass.
        objective_loss = policy_loss + self.ent_coef * entropy_loss if self.ent_coef else policy_loss
        loss = objective_loss + self.vf_coef * value_loss

        excess = ratio.detach() - 1
        approx_kl = (excess - log_ratio.detach()).mean()
        clip_fraction = (excess.abs() > clip_range).float().mean()
        losses = (part.detach() for part in (policy_loss, value_loss, entropy_loss, loss))
        return loss, torch.stack([approx_kl, clip_fraction, *losses])

    def _clipped_values(self, values: Tensor, old_values: Tensor) -> Tensor:
        if self.clip_range_vf is None:
            return values
        bound = self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]
        return old_values + torch.clamp(values - old_values, -bound, bound)

    def learn(
        self: SelfPPOClip,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPOClip",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPPOClip:
        """Train for ``total_timesteps`` steps of all environments together; arguments as in SB3."""
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
