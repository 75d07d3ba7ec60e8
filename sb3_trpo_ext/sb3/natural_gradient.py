"""What the natural-gradient methods share: their arguments, the direction F⁻¹g, the critic, and the log."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal, NoReturn

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor, nn

from sb3_trpo_ext.core.conjugate_gradient import CGResult, conjugate_gradient
from sb3_trpo_ext.core.curvature import GaussNewtonProduct
from sb3_trpo_ext.core.trust_region import Checkpoint, boundary_curvature
from sb3_trpo_ext.core.vectors import flatten
from sb3_trpo_ext.sb3.algorithm import TrustRegionAlgorithm, timed
from sb3_trpo_ext.sb3.batch import Batch, consistent_evaluation, explained_double_backward
from sb3_trpo_ext.sb3.buffers import whole_rollout
from sb3_trpo_ext.sb3.checks import (
    check_integer,
    check_minibatches,
    check_number,
    check_radius,
    check_rollout_size,
    check_samples,
    check_share,
)
from sb3_trpo_ext.sb3.critic import AdamCritic, Critic, GaussNewtonCritic
from sb3_trpo_ext.sb3.device import affordable_samples, check_interval
from sb3_trpo_ext.sb3.parameters import leave_gradients
from sb3_trpo_ext.sb3.policy_problem import PolicyOutput, PolicyProblem
from sb3_trpo_ext.sb3.signal import NO_GRADIENT, NO_PARAMETER, NO_SIGNAL, has_signal, without_noise
from sb3_trpo_ext.sb3.steps import Direction, Move, PolicyStep, StepAlong

ADAM_DEFAULTS = {"learning_rate": 1e-3, "batch_size": 128, "n_critic_updates": 10}
"""Defaults of the Adam critic's arguments, here and in sb3-contrib."""

MIN_RADIUS_USED = 0.6
"""The share of the trust region that damping leaves a step over discrete actions: half of δ, and room for the error of
the quadratic model."""


class NaturalGradientAlgorithm(TrustRegionAlgorithm):
    """Template: x ≈ F⁻¹∇L by conjugate gradients, a move along x that the method decides on, then the critic.

    A subclass implements `_move`. Its constructor ends with ``_setup_model``.

    Args:
        policy: As in SB3.
        env: As in SB3.
        learning_rate: Those arguments that follow are documented where the user meets them, in `TRPO`.
    """

    refused_arguments: ClassVar[Mapping[str, str]] = {
        "clip_range": "it bounds the KL divergence itself: use `target_kl`, or the class PPOClip",
        "clip_range_vf": "it does not clip the value function: use the class PPOClip",
        "n_epochs": "it takes one policy step a rollout; the epochs of the Adam critic are `n_critic_updates`",
        "vf_coef": "it fits the value function in a step of its own: see `critic`",
        "max_grad_norm": "its step length is set by `target_kl`",
        "max_kl": "its radius is `target_kl`",
    }
    """What a user of a neighbouring algorithm may pass, and what to use instead."""

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int = 128,
        gamma: float = 0.99,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
        n_critic_updates: int = 10,
        normalize_advantage: bool = True,
        target_kl: float | Schedule = 0.01,
        sub_sampling_factor: int = 1,
        critic: str = "auto",
        critic_kwargs: dict[str, Any] | None = None,
        kl_per_action_dim: bool = True,
        curvature_samples: int | None = 512,
        fisher_chunk_size: int | Literal["auto"] | None = "auto",
        cg_residual_tol: float = 0.03,
        min_radius_used: float | Literal["auto"] = "auto",
        gae_lambda: float = 0.95,
        ent_coef: float | Schedule = 0.0,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: Any = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        fast_rollouts: bool | Literal["exact"] = True,
        **unexpected: NoReturn,
    ) -> None:
        self._refuse(unexpected)
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=0.0,
            max_grad_norm=0.0,
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
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.kl_per_action_dim = kl_per_action_dim
        self.cg_max_steps = cg_max_steps
        self.cg_damping = cg_damping
        self.cg_residual_tol = cg_residual_tol
        self.min_radius_used = min_radius_used
        self.sub_sampling_factor = sub_sampling_factor
        self.curvature_samples = curvature_samples
        self.fisher_chunk_size = fisher_chunk_size
        self.critic = critic
        self.critic_kwargs = critic_kwargs or {}
        self.n_critic_updates = n_critic_updates

    def _refuse(self, arguments: Mapping[str, Any]) -> None:
        for name, value in arguments.items():
            hint = f": {self.refused_arguments[name]}" if name in self.refused_arguments else ""
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r} (= {value!r}){hint}.")

    def _setup_model(self) -> None:
        super()._setup_model()
        self.target_kl = FloatSchedule(self.target_kl)
        self._make_critic()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_radius("target_kl", self.target_kl, hint="A trust region has a positive radius; 0.01 is the usual one.")
        for name in ("cg_max_steps", "sub_sampling_factor", "n_critic_updates", "batch_size"):
            check_integer(name, getattr(self, name))
        for name in ("cg_damping", "cg_residual_tol"):
            check_number(name, getattr(self, name))
        if self.min_radius_used != "auto":
            check_share("min_radius_used", self.min_radius_used, hint="Pass 'auto' to choose by the action space.")
        check_samples("curvature_samples", self.curvature_samples)
        if self.fisher_chunk_size not in ("auto", None):
            check_integer(
                "fisher_chunk_size",
                self.fisher_chunk_size,
                hint="Pass 'auto' to keep within the memory budget, or None for no chunks.",
            )
        if self.env is not None:
            check_rollout_size(self.n_steps, self.n_envs, normalize_advantage=self.normalize_advantage)
            if self.sub_sampling_factor > self.n_steps * self.n_envs:
                raise ValueError(
                    f"`sub_sampling_factor` must not exceed the {self.n_steps * self.n_envs} samples of a rollout, got "
                    f"{self.sub_sampling_factor}."
                )
            if self._critic_kind() == "adam":
                check_minibatches(self.n_steps, self.n_envs, self.batch_size)

    def _make_critic(self, chunk_size: int | None = None) -> Critic:
        kind = self._critic_kind()
        if kind == "gauss_newton":
            return GaussNewtonCritic(
                **{"curvature_samples": self.curvature_samples, **self.critic_kwargs}, chunk_size=chunk_size
            )
        if kind == "adam":
            if self.critic_kwargs:
                raise ValueError(
                    f"`critic_kwargs` belongs to critic='gauss_newton', got {self.critic_kwargs} with "
                    f"critic={self.critic!r}. Use `learning_rate`, `batch_size` and `n_critic_updates`, or pass "
                    "critic='gauss_newton'."
                )
            return AdamCritic(
                self.rollout_buffer,
                self.action_space,
                batch_size=self.batch_size,
                n_updates=self.n_critic_updates,
                chunk_size=chunk_size,
            )
        raise ValueError(f"`critic` must be 'auto', 'gauss_newton' or 'adam', got {self.critic!r}.")

    def _critic_kind(self) -> str:
        """What ``critic="auto"`` stands for here, or ``critic`` itself."""
        if self.critic != "auto":
            return self.critic
        tuned = any(getattr(self, name) != default for name, default in ADAM_DEFAULTS.items())
        return "adam" if tuned else "gauss_newton"

    def trust_region_radius(self) -> float:
        """δ in force: the bound on the joint KL divergence, in nats."""
        value = self._in_force(self.target_kl)
        return self._action_dimensions() * check_number("target_kl", value, positive=True)

    def _action_dimensions(self) -> int:
        """A where ``kl_per_action_dim`` counts dimensions, otherwise 1."""
        counts = self.kl_per_action_dim and isinstance(self.action_space, (spaces.Box, spaces.MultiBinary))
        return get_action_dim(self.action_space) if counts else 1

    def _update(self) -> dict[str, float]:
        record: dict[str, float] = {"train/target_kl": self.trust_region_radius()}
        with consistent_evaluation(self.policy):
            with timed(record, "time/policy_s"):
                batch = whole_rollout(self.rollout_buffer, self.action_space)
                chunk_size = self._chunk_size(batch)
                seen = without_noise(self._seen_by_policy(batch, chunk_size), self.rollout_buffer)
                step = self._policy_step(
                    seen.with_normalized_advantages() if self.normalize_advantage else seen, chunk_size
                )
            leave_gradients(self.policy, step.gradients)
            with timed(record, "time/critic_s"):  # Adam leaves the critic's gradients beside them
                record["train/value_loss"] = self._make_critic(chunk_size).fit(self.policy, batch, step.actor)

        if step.reason:
            self._report_rejection(step.reason)
        else:
            self._report_success()
        self._n_updates += 1
        return record | self._described(step)

    def _cures(self) -> str:
        return f"a smaller `target_kl`, more `cg_damping`, {super()._cures()}"

    def _described(self, step: PolicyStep) -> dict[str, float]:
        """What to log of a step."""
        return {
            "train/policy_objective": step.evaluation.objective,
            "train/kl_divergence_loss": step.evaluation.divergence,
            "train/kl_max": step.evaluation.kl_max,
            "train/entropy": step.evaluation.entropy,
            **step.evaluation.remarks,
            "train/step_size": step.step_size,
            "train/improvement": step.improvement,
            "train/expected_improvement": step.expected_improvement,
            "train/cg_steps": step.cg_steps,
            "train/cg_residual": step.cg_residual,
        }

    def _chunk_size(self, batch: Batch) -> int | None:
        """Most samples in one forward pass."""
        if self.fisher_chunk_size == "auto":
            return affordable_samples(self.policy, lambda part: PolicyOutput.of(self.policy, part).z, batch)
        return self.fisher_chunk_size

    def _fisher_samples(self, samples: int) -> int | None:
        """Most of the samples of a rollout that the Fisher matrix is estimated from."""
        kept = math.ceil(samples / self.sub_sampling_factor)
        return kept if self.curvature_samples is None else min(kept, self.curvature_samples)

    def _seen_by_policy(self, batch: Batch, chunk_size: int | None) -> Batch:
        """What the policy step sees, of a rollout that the critic sees as it is."""
        return batch

    def _policy_step(self, batch: Batch, chunk_size: int | None = None) -> PolicyStep:
        """One step of the policy; the parameters are restored, bit for bit, if it is rejected."""
        problem = PolicyProblem(self.policy, batch, ent_coef=self.entropy_weight(), chunk_size=chunk_size)
        gradients = problem.gradients()
        if not gradients:
            return PolicyStep({}, problem.start, reason=NO_PARAMETER)
        if not has_signal(batch) and not self.entropy_weight():
            return PolicyStep(gradients, problem.start, reason=NO_SIGNAL)
        gradient = flatten(list(gradients.values()))
        if not bool(gradient.isfinite().all()):
            return PolicyStep(gradients, problem.start, reason="the gradient of the surrogate is not finite")

        with explained_double_backward():
            return self._ascend(gradient, partial(self._step_along, problem, gradients, gradient))

    def _ascend(self, gradient: Tensor, step_along: StepAlong) -> PolicyStep:
        """Take the step that `_step_along` makes of a vector: here of the gradient."""
        return step_along(gradient)

    def _step_along(
        self,
        problem: PolicyProblem,
        gradients: Mapping[nn.Parameter, Tensor],
        gradient: Tensor,
        vector: Tensor,
        *,
        whole: bool = False,
    ) -> PolicyStep:
        """A step along F⁻¹v, the full one only if ``whole``; the parameters are restored if it is rejected."""
        params = list(gradients)
        fisher = problem.fisher(params, self.cg_damping * self._action_dimensions(), self._fisher_samples(problem.size))
        solution = conjugate_gradient(
            fisher,
            vector,
            max_steps=self.cg_max_steps,
            residual_tol=self.cg_residual_tol,
            check_every=check_interval(vector),
        )
        if not 0 < solution.curvature < math.inf:
            zero = solution.stop == "zero right-hand side"
            reason = NO_GRADIENT if zero else f"conjugate gradients found no direction ({solution.stop})"
            return PolicyStep(gradients, problem.start, cg_steps=solution.steps, reason=reason)

        slope = float(gradient.dot(solution.solution))
        theta_old, checkpoint = flatten(params).detach(), Checkpoint(params)
        boundary = self._boundary_curvature(fisher, solution)
        move = self._move(
            problem, Direction(params, theta_old, solution.solution, slope, solution.curvature, boundary, whole)
        )
        if move.evaluation is None:
            checkpoint.restore()
        evaluation = move.evaluation or problem.start
        return PolicyStep(
            gradients,
            evaluation,
            step_size=move.fraction * move.step_size,
            fraction=move.fraction,
            improvement=evaluation.objective - problem.start.objective,
            expected_improvement=slope * move.step_size * (move.fraction or 1.0),
            cg_steps=solution.steps,
            cg_residual=solution.residual,
            reason=move.reason,
        )

    def _boundary_curvature(self, fisher: GaussNewtonProduct, solution: CGResult) -> float:
        """What the boundary of the trust region is measured with: xᵀ(F + λI)x, or less; see ``min_radius_used``."""
        least = self._min_radius_used()
        if not least:
            return solution.curvature
        undamped = fisher.undamped_curvature(solution.solution, solution.curvature)
        return boundary_curvature(solution.curvature, undamped, least)

    def _min_radius_used(self) -> float:
        """What ``min_radius_used="auto"`` stands for here, or ``min_radius_used`` itself."""
        if self.min_radius_used != "auto":
            return float(self.min_radius_used)
        return 0.0 if isinstance(self.action_space, spaces.Box) else MIN_RADIUS_USED

    @abstractmethod
    def _move(self, problem: PolicyProblem, direction: Direction) -> Move:
        """Go along the direction; where the parameters stand after a rejection does not matter."""
