"""Trust Region Policy Optimization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor, nn

from sb3_trpo_ext.core.conjugate_gradient import conjugate_gradient
from sb3_trpo_ext.core.trust_region import (
    Acceptance,
    Checkpoint,
    LineSearchResult,
    backtracking_line_search,
    boundary_scale,
)
from sb3_trpo_ext.core.vectors import assign, flatten
from sb3_trpo_ext.sb3.algorithm import TrustRegionAlgorithm, timed
from sb3_trpo_ext.sb3.batch import Batch, consistent_evaluation, explained_double_backward, whole_rollout
from sb3_trpo_ext.sb3.checks import (
    check_finite,
    check_fraction,
    check_integer,
    check_minibatches,
    check_number,
    check_rollout_size,
)
from sb3_trpo_ext.sb3.critic import AdamCritic, Critic, GaussNewtonCritic
from sb3_trpo_ext.sb3.device import affordable_samples, check_interval
from sb3_trpo_ext.sb3.policy_problem import PolicyEvaluation, PolicyOutput, PolicyProblem

SelfTRPO = TypeVar("SelfTRPO", bound="TRPO")

ADAM_DEFAULTS = {"learning_rate": 1e-3, "batch_size": 128, "n_critic_updates": 10}
"""Defaults of the Adam critic's arguments, here and in sb3-contrib."""

PPO_ARGUMENTS = {
    "clip_range": "TRPO bounds the KL divergence itself: use `target_kl`, or the class PPOClip",
    "clip_range_vf": "TRPO does not clip the value function: use the class PPOClip",
    "n_epochs": "TRPO takes one policy step a rollout; the epochs of the Adam critic are `n_critic_updates`",
    "vf_coef": "TRPO fits the value function in a step of its own: see `critic`",
    "max_grad_norm": "TRPO's step length is set by `target_kl`",
    "max_kl": "TRPO's radius is `target_kl`",
}


@dataclass(frozen=True)
class PolicyStep:
    """What one policy step did.

    Attributes:
        actor: The parameters that the policy's output reaches.
        evaluation: The policy that the step leaves, on its batch.
        fraction: Accepted fraction of the step to the boundary; 0 if rejected.
        improvement: L(θ) - L(θ_old).
        expected_improvement: gᵀs at that fraction of the step (at the full step if rejected).
        cg_steps: Conjugate-gradient iterations.
        cg_residual: Their relative residual.
        reason: Why the step was rejected; empty if it was accepted.
    """

    actor: frozenset[nn.Parameter]
    evaluation: PolicyEvaluation
    fraction: float = 0.0
    improvement: float = 0.0
    expected_improvement: float = 0.0
    cg_steps: int = 0
    cg_residual: float = 0.0
    reason: str = ""


class TRPO(TrustRegionAlgorithm):
    """Trust Region Policy Optimization (Schulman et al. 2015, https://arxiv.org/abs/1502.05477).

    Each update maximises the surrogate L(θ) = E[π_θ(a|s)/π_old(a|s) · Â] under E_s[KL(π_old(·|s)‖π_θ(·|s))] <= δ
    (equation 14): x ≈ F⁻¹∇L by conjugate gradients with Fisher-vector products, a step of x to the boundary
    ½ sᵀFs = δ, and backtracking until L improves inside the region (appendix C). An update that cannot be accepted
    leaves the policy as it was, bit for bit.

    A drop-in for ``sb3_contrib.TRPO``: its arguments come first, with its names, order and defaults. The KL divergence
    that is computed, constrained and logged is the *joint* one, summed over action dimensions.

    Args:
        policy: The policy class, or ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``.
        env: The environment, or its Gymnasium id.
        learning_rate: Step size of the Adam critic, a float or a schedule of the remaining progress.
        n_steps: Steps of each environment in a rollout; n_steps * n_envs must exceed 1.
        batch_size: Minibatch size of the Adam critic.
        gamma: Discount factor.
        cg_max_steps: Most conjugate-gradient iterations.
        cg_damping: λ, added to the diagonal of the Fisher matrix; see ``kl_per_action_dim``.
        line_search_shrinking_factor: Factor in (0, 1) between trial steps.
        line_search_max_iter: Most trial steps.
        n_critic_updates: Epochs of the Adam critic.
        gae_lambda: λ of generalised advantage estimation (Schulman et al. 2016).
        use_sde: Use generalised state-dependent exploration (gSDE).
        sde_sample_freq: Steps between new gSDE noise matrices; -1 for one a rollout.
        rollout_buffer_class: Rollout buffer class; None chooses by the observation space.
        rollout_buffer_kwargs: Its further arguments.
        normalize_advantage: Standardise Â over the rollout.
        target_kl: δ > 0, a float or a schedule of the remaining progress; see ``kl_per_action_dim``.
        sub_sampling_factor: k: the Fisher matrix is estimated from a k-th of the samples; gradient and line search see
            all. See ``curvature_samples``.
        stats_window_size: Episodes in the logged means.
        tensorboard_log: Directory for TensorBoard; None for none.
        policy_kwargs: Further arguments of the policy.
        verbose: 0 silent, 1 info, 2 debug.
        seed: Seed of all random generators.
        device: ``"cpu"``, ``"cuda"``, ``"auto"``, ...
        critic: ``"gauss_newton"``, Hessian-free, without a learning rate (`GaussNewtonCritic`), or ``"adam"``,
            minibatch regression as in sb3-contrib (``learning_rate``, ``batch_size``, ``n_critic_updates``).
            ``"auto"`` is the first, unless one of the arguments of the second is not at its default: what was tuned
            for sb3-contrib keeps its meaning.
        critic_kwargs: Further arguments of the Gauss-Newton critic: ``damping``, ``cg_steps``, ``n_steps``,
            ``max_backtracks``.
        kl_per_action_dim: Read ``target_kl`` and ``cg_damping`` per action dimension for Box and MultiBinary actions
            of A dimensions: δ = target_kl · A and λ = cg_damping · A. That is what averaging the KL over dimensions
            amounts to in sb3-contrib, so steps keep their length there and here. False is the paper's
            δ = target_kl. ``train/target_kl`` logs δ.
        ent_coef: Weight of an entropy bonus, in the gradient and in the line search.
        curvature_samples: Most samples, drawn at random from the rollout, that the Fisher matrix and the matrix of the
            Gauss-Newton critic are estimated from. None for all.
        fisher_chunk_size: Most samples in one forward pass of the update; bounds its memory. ``"auto"`` measures what
            a sample costs and keeps the graphs within 512 MiB; None for all at once.
        cg_residual_tol: Conjugate gradients stop at this relative residual.
        line_search_accept_ratio: Fraction in [0, 1) of the predicted improvement that a step must bring; 0 accepts
            any improvement.
        fast_rollouts: Collect by NumPy matrix products where the policy is a plain MLP on the CPU (``rollout_path``
            tells): the same distribution from another random stream. False always collects as SB3 does.
        _init_setup_model: Build the networks at construction.

    Raises:
        AssertionError: If n_steps * n_envs = 1 with normalised advantages, as in SB3's PPO.
        TypeError: For an unknown argument; one of PPO's is answered with what to use instead.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int = 128,
        gamma: float = 0.99,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 10,
        n_critic_updates: int = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        target_kl: float | Schedule = 0.01,
        sub_sampling_factor: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        critic: str = "auto",
        critic_kwargs: dict[str, Any] | None = None,
        kl_per_action_dim: bool = True,
        ent_coef: float = 0.0,
        curvature_samples: int | None = 512,
        fisher_chunk_size: int | Literal["auto"] | None = "auto",
        cg_residual_tol: float = 0.03,
        line_search_accept_ratio: float = 0.0,
        fast_rollouts: bool = True,
        **unexpected: NoReturn,
    ) -> None:
        _refuse_unexpected(unexpected)
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
        self.sub_sampling_factor = sub_sampling_factor
        self.curvature_samples = curvature_samples
        self.fisher_chunk_size = fisher_chunk_size
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        self.line_search_accept_ratio = line_search_accept_ratio
        self.critic = critic
        self.critic_kwargs = critic_kwargs or {}
        self.n_critic_updates = n_critic_updates

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        self.target_kl = FloatSchedule(self.target_kl)
        self._make_critic()

    def _check_arguments(self) -> None:
        if not callable(self.target_kl):
            check_number(
                "target_kl", self.target_kl, positive=True, hint="TRPO needs a trust region; 0.01 is the usual radius."
            )
        for name in ("cg_max_steps", "line_search_max_iter", "sub_sampling_factor", "n_critic_updates", "batch_size"):
            check_integer(name, getattr(self, name))
        for name in ("cg_damping", "cg_residual_tol"):
            check_number(name, getattr(self, name))
        if self.curvature_samples is not None:
            check_integer("curvature_samples", self.curvature_samples, hint="Pass None for all samples.")
        if self.fisher_chunk_size not in ("auto", None):
            check_integer(
                "fisher_chunk_size",
                self.fisher_chunk_size,
                hint="Pass 'auto' to keep within the memory budget, or None for no chunks.",
            )
        check_fraction("line_search_shrinking_factor", self.line_search_shrinking_factor)
        check_fraction("line_search_accept_ratio", self.line_search_accept_ratio, include_zero=True)
        check_finite("ent_coef", self.ent_coef)
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
        """δ in force: the bound on the mean joint KL divergence, in nats."""
        value = self.target_kl(self._current_progress_remaining)  # type: ignore[operator]
        return self._action_dimensions() * check_number(
            "target_kl", value, positive=True, hint="Its schedule must stay positive until the end of training."
        )

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
                step = self._policy_step(
                    batch.with_normalized_advantages() if self.normalize_advantage else batch, chunk_size
                )
            with timed(record, "time/critic_s"):
                record["train/value_loss"] = self._make_critic(chunk_size).fit(self.policy, batch, step.actor)

        if step.reason:
            self._report_rejection(step.reason)
        else:
            self._report_success()
        record["train/policy_objective"] = step.evaluation.objective
        record["train/kl_divergence_loss"] = step.evaluation.divergence
        record["train/kl_max"] = step.evaluation.kl_max
        record["train/entropy"] = step.evaluation.entropy
        record["train/is_line_search_success"] = float(not step.reason)
        record["train/step_fraction"] = step.fraction
        record["train/improvement"] = step.improvement
        record["train/expected_improvement"] = step.expected_improvement
        record["train/cg_steps"] = step.cg_steps
        record["train/cg_residual"] = step.cg_residual
        self._n_updates += 1
        return record

    def _chunk_size(self, batch: Batch) -> int | None:
        """Most samples in one forward pass."""
        if self.fisher_chunk_size == "auto":
            return affordable_samples(self.policy, lambda part: PolicyOutput.of(self.policy, part).z, batch)
        return self.fisher_chunk_size

    def _fisher_samples(self, batch: Batch) -> int | None:
        """Most samples that the Fisher matrix is estimated from."""
        kept = math.ceil(len(batch) / self.sub_sampling_factor)
        return kept if self.curvature_samples is None else min(kept, self.curvature_samples)

    def _policy_step(self, batch: Batch, chunk_size: int | None = None) -> PolicyStep:
        """One step of the policy; the parameters are restored if it is rejected."""
        radius = self.trust_region_radius()
        problem = PolicyProblem(self.policy, batch, ent_coef=self.ent_coef, chunk_size=chunk_size)
        gradients = problem.gradients()
        if not gradients:
            return PolicyStep(frozenset(), problem.start, reason="the policy has no trainable parameter")
        params, gradient = list(gradients), flatten(list(gradients.values()))
        actor = frozenset(params)
        if not bool(gradient.isfinite().all()):
            return PolicyStep(actor, problem.start, reason="the gradient of the surrogate is not finite")

        with explained_double_backward():
            fisher = problem.fisher(params, self.cg_damping * self._action_dimensions(), self._fisher_samples(batch))
            solution = conjugate_gradient(
                fisher,
                gradient,
                max_steps=self.cg_max_steps,
                residual_tol=self.cg_residual_tol,
                check_every=check_interval(gradient),
            )
        if not 0 < solution.curvature < math.inf:
            reason = f"conjugate gradients found no direction ({solution.stop})"
            return PolicyStep(actor, problem.start, cg_steps=solution.steps, reason=reason)
        step = boundary_scale(solution.curvature, radius) * solution.solution

        expected = float(gradient.dot(step))
        result = self._line_search(problem, params, step, expected, radius)
        evaluation = result.trial or problem.start
        return PolicyStep(
            actor,
            evaluation,
            fraction=result.fraction,
            improvement=evaluation.objective - problem.start.objective,
            expected_improvement=expected * (result.fraction or 1.0),
            cg_steps=solution.steps,
            cg_residual=solution.residual,
            reason=result.reason,
        )

    def _line_search(
        self, problem: PolicyProblem, params: Sequence[nn.Parameter], step: Tensor, expected: float, radius: float
    ) -> LineSearchResult[PolicyEvaluation]:
        """Backtrack from θ_old + step; leaves the accepted parameters in place, or θ_old, bit for bit."""
        theta_old, checkpoint = flatten(params).detach(), Checkpoint(params)

        def trial_at(fraction: float) -> PolicyEvaluation:
            assign(params, theta_old + fraction * step)
            return problem.evaluate()

        result = backtracking_line_search(
            trial_at,
            Acceptance(problem.start.objective, radius, expected, self.line_search_accept_ratio),
            shrink=self.line_search_shrinking_factor,
            max_steps=self.line_search_max_iter,
        )
        if result.trial is None:
            checkpoint.restore()
        return result

    def learn(
        self: SelfTRPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "TRPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfTRPO:
        """Train for ``total_timesteps`` steps of all environments together; arguments as in SB3."""
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )


def _refuse_unexpected(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        hint = f": {PPO_ARGUMENTS[name]}" if name in PPO_ARGUMENTS else ""
        raise TypeError(f"TRPO() got an unexpected keyword argument {name!r} (= {value!r}){hint}.")
