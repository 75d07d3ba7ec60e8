"""What the natural-gradient methods share: their arguments, the direction F⁻¹g, the critic, and the log."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from sb3_trpo_ext.core.arguments import check_integer, check_number, check_radius, check_samples, check_share
from sb3_trpo_ext.core.natural_step import Direction, Step, natural_direction
from sb3_trpo_ext.core.parameters import flatten, gradient, leave_gradients, trainable
from sb3_trpo_ext.critic import check_order, make_critic
from sb3_trpo_ext.critic.base import ONE_ROLLOUT, Critic, Regression, check_decay, check_saveable, has_state
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonCritic
from sb3_trpo_ext.policy.evaluation import consistent_evaluation, explained_double_backward
from sb3_trpo_ext.policy.exploration import SpreadBlock
from sb3_trpo_ext.policy.memory_budget import affordable_samples
from sb3_trpo_ext.policy.problem import PolicyEvaluation, PolicyOutput, PolicyProblem
from sb3_trpo_ext.policy.signal import NO_GRADIENT, NO_PARAMETER, NO_SIGNAL, normalized_signal, without_noise
from sb3_trpo_ext.rollout.action_spaces import kind_of
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import RECURRENT_BUFFERS, VIEWED_BUFFERS, minibatches, whole_rollout
from sb3_trpo_ext.rollout.past_rollouts import PastRollout, joined
from sb3_trpo_ext.rollout.returns import decay_returns
from sb3_trpo_ext.training.action_values import replaced
from sb3_trpo_ext.training.arguments import check_minibatches, check_rollout_size
from sb3_trpo_ext.training.base import Outcome, TrustRegionAlgorithm, plain, timed
from sb3_trpo_ext.training.transaction import Attributes, Restorable, StateCheckpoint

ADAM_DEFAULTS = {"learning_rate": 1e-3, "batch_size": 128, "n_critic_updates": 10}
"""Defaults of the Adam critic's arguments, here and in sb3-contrib."""

ACTION_VALUE_FIT = {"damping": 1e-3, "cg_steps": 20, "n_iterations": 2, "curvature_samples": None}
"""Where the Gauss-Newton critic fits Q: actions differ by little beside the value that they share."""

OF_PPO = {"n_epochs": 10, "clip_range": 0.2, "clip_range_vf": None}
"""What RecurrentPPO and MaskablePPO, of whom subclasses may have their rollouts, need of a model to set it up."""

PolicyStep = Step[PolicyEvaluation]


class NaturalGradientAlgorithm(TrustRegionAlgorithm):
    """Template: a step of the policy along x ≈ F⁻¹∇L, which the method decides on, then the critic.

    A subclass implements `_policy_step`. Its constructor ends with ``_setup_model``.

    Args:
        policy: As in SB3.
        env: As in SB3.
        learning_rate: Those arguments that follow are documented where the user meets them, in `TRPO`.
    """

    value_critic: Critic
    """The critic that ``critic`` and ``critic_kwargs`` ask for."""

    refused_arguments: ClassVar[Mapping[str, str]] = {
        "clip_range": "it bounds the KL divergence itself: use `target_kl`, or the class PPOClip",
        "clip_range_vf": "it does not clip the value function: use the class PPOClip",
        "n_epochs": "it takes one policy step a rollout; the epochs of the Adam critic are `n_critic_updates`",
        "vf_coef": "it fits the value function in a step of its own: see `critic`",
        "max_grad_norm": "its step length is set by `target_kl`",
        "max_kl": "its radius is `target_kl`",
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        batch_size: int,
        cg_max_steps: int,
        cg_damping: float,
        n_critic_updates: int,
        normalize_advantage: bool,
        target_kl: float | Schedule,
        sub_sampling_factor: int,
        critic: str | type[Critic] = "auto",
        critic_kwargs: dict[str, Any] | None = None,
        kl_per_action_dim: bool = True,
        curvature_samples: int | None = 512,
        fisher_chunk_size: int | Literal["auto"] | None = "auto",
        cg_residual_tol: float = 0.03,
        min_radius_used: float | Literal["auto"] = "auto",
        ent_coef: float | Schedule = 0.0,
        target_kl_std: float | Schedule | None = None,
        **kwargs: Any,
    ) -> None:
        self._refuse(kwargs)
        super().__init__(policy, env, ent_coef=ent_coef, vf_coef=0.0, max_grad_norm=0.0, **kwargs)
        self.batch_size = batch_size
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.target_kl_std = target_kl_std
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
        self._past_rollouts: tuple[PastRollout, ...] = ()
        self._theta_left: Tensor | None = None

    def _setup_model(self) -> None:
        self._critic_arguments = self._fit_of_critic()
        self.value_critic = self._make_critic()
        vars(self).update(OF_PPO | vars(self))
        super()._setup_model()
        self.target_kl = FloatSchedule(plain(self.target_kl))
        if self.target_kl_std is not None:
            self.target_kl_std = FloatSchedule(plain(self.target_kl_std))
        for name in OF_PPO:
            vars(self).pop(name, None)

    def _prepare_update(self) -> None:
        self._renew_critic()
        check_saveable(self.value_critic)

    def _renew_critic(self) -> None:
        """Make another critic, with the state of the one before, where the arguments of it were changed."""
        arguments = self._fit_of_critic()
        if arguments != self._critic_arguments:
            critic, state = self._make_critic(), self.value_critic.state_dict()
            self._check_rollouts_of(critic)
            if state and type(critic) is type(self.value_critic):
                critic.load_state_dict(state)
            self.value_critic, self._critic_arguments = critic, arguments

    @contextmanager
    def _own_estimates(self, env: VecEnv, buffer: RolloutBuffer, *args: Any) -> Iterator[None]:
        """Let a rollout end with the returns that the critic asks for, before a callback hears of it."""
        self._renew_critic()
        self._check_decay_of(self.value_critic, type(buffer))
        with super()._own_estimates(env, buffer, *args):
            decay = self.value_critic.gae_lambda
            if decay is None:
                yield
                return
            estimate = buffer.compute_returns_and_advantage

            def with_returns(last_values: Tensor, dones: np.ndarray) -> None:
                estimate(last_values, dones)
                decay_returns(buffer, decay)

            with replaced(buffer, "compute_returns_and_advantage", with_returns):
                yield

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_radius("target_kl", self.target_kl, hint="A trust region has a positive radius; 0.01 is the usual one.")
        if self.target_kl_std is not None:
            check_radius(
                "target_kl_std", self.target_kl_std, hint="Pass None for a radius that σ shares with the mean."
            )
        for name in ("cg_max_steps", "sub_sampling_factor", "n_critic_updates", "batch_size"):
            check_integer(name, getattr(self, name))
        for name in ("cg_damping", "cg_residual_tol"):
            check_number(name, getattr(self, name))
        if self.min_radius_used != "auto":
            check_share("min_radius_used", self.min_radius_used, hint="Pass 'auto' to choose by the action space.")
        check_samples("curvature_samples", self.curvature_samples)
        self._check_rollouts_of(self.value_critic)
        if self.fisher_chunk_size not in ("auto", None):
            check_integer(
                "fisher_chunk_size",
                self.fisher_chunk_size,
                hint="Pass 'auto' to keep within the memory budget, or None for no chunks.",
            )
        if self._critic_kind() == "adam":
            self._check_minibatch_share()
        if self.env is not None:
            check_rollout_size(self.n_steps, self.n_envs, normalize_advantage=self.normalize_advantage)
            if self.sub_sampling_factor > self.n_steps * self.n_envs:
                raise ValueError(
                    f"`sub_sampling_factor` must not exceed the {self.n_steps * self.n_envs} samples of a rollout, got "
                    f"{self.sub_sampling_factor}."
                )
            if self._critic_kind() == "adam":
                check_minibatches(self.n_steps, self.n_envs, self._minibatch_share())

    def _check_rollouts_of(self, critic: Critic) -> None:
        """Raise `ValueError` if a critic asks for an order of the rollout, past ones or a λ that cannot be had."""
        has_memory = issubclass(self.policy_class, RecurrentActorCriticPolicy)
        check_order(critic, has_memory=has_memory, buffer=self.rollout_buffer_class)
        name, rollouts = "critic_kwargs['n_rollouts']", critic.n_rollouts
        check_integer(name, rollouts, hint=ONE_ROLLOUT)
        self._check_decay_of(critic, self.rollout_buffer_class)
        if rollouts == 1:
            return
        if has_memory:
            raise ValueError(
                f"`{name}` must be 1 for a recurrent policy, got {rollouts}: the hidden states of a past rollout are "
                "those of the policy that made it. Leave it out."
            )
        if self.rollout_buffer_class not in (None, *VIEWED_BUFFERS):
            raise ValueError(
                f"`{name}` needs the arrays of SB3's own rollout buffers, got {rollouts} with "
                f"rollout_buffer_class={self.rollout_buffer_class!r}. Leave out one of the two."
            )

    def _check_decay_of(self, critic: Critic, buffer: type[RolloutBuffer] | None) -> None:
        """Raise `ValueError` if a critic asks for returns that a buffer's advantages cannot be turned into."""
        name, decay = "critic_kwargs['gae_lambda']", critic.gae_lambda
        check_decay(decay)
        if decay is None:
            return
        if buffer not in (None, *VIEWED_BUFFERS, *RECURRENT_BUFFERS):
            raise ValueError(
                f"`{name}` needs the arrays of SB3's own rollout buffers, got {decay} with the rollout buffer "
                f"{buffer!r}. Leave out one of the two."
            )
        if self.bootstrap == "max":
            raise ValueError(
                f"`{name}` must be left out with bootstrap='max', got {decay}: its returns do not go through V. Set "
                "`gae_lambda`, or pass bootstrap='expected'."
            )

    def _make_critic(self) -> Critic:
        """The critic that is asked for; errors name the argument that asks for its kind."""
        asked = "critic_kwargs['fit']" if self.critic == "action_value" else "critic"
        return make_critic(*self._fit_of_critic(), argument=asked)

    def _critic_kind(self) -> str | type[Critic]:
        """How the critic is fitted: what ``"auto"`` stands for here, or what is asked for."""
        return self._fit_of_critic()[0]

    def _fit_of_critic(self) -> tuple[str | type[Critic], dict[str, Any]]:
        """How the critic is fitted, and the arguments of that; action values are fitted by what ``fit`` names."""
        kind, kwargs = self.critic, dict(self.critic_kwargs)
        if kind == "action_value":
            kind = kwargs.pop("fit", "auto")
        if kind == "auto":
            tuned = any(getattr(self, name) != default for name, default in ADAM_DEFAULTS.items())
            kind = "adam" if tuned else "gauss_newton"
        if self.has_action_values and kind == "gauss_newton":
            kwargs = ACTION_VALUE_FIT | kwargs
        return kind, kwargs

    def trust_region_radius(self) -> float:
        """δ in force: the bound on the joint KL divergence, in nats."""
        value = self._current_value(self.target_kl)
        return self._action_dimensions() * check_number("target_kl", value, positive=True)

    def spread_radius(self) -> float | None:
        """δ_σ in force: the bound on the part of σ in the KL divergence, in nats; None where it shares δ."""
        if self.target_kl_std is None:
            return None
        value = self._current_value(self.target_kl_std)
        return self._action_dimensions() * check_number("target_kl_std", value, positive=True)

    def _spread(self, problem: PolicyProblem) -> SpreadBlock:
        """Log σ in a problem, where it has a lowest value or a radius of its own."""
        log_std = getattr(self.policy, "log_std", None)
        radius = self.spread_radius()
        return SpreadBlock(problem, log_std, lowest=self.log_std_min, radius=radius, reduction=self.reduction)

    def _action_dimensions(self) -> int:
        """A where ``kl_per_action_dim`` counts dimensions, otherwise 1."""
        counts = self.kl_per_action_dim and kind_of(self.action_space).averages_kl
        return get_action_dim(self.action_space) if counts else 1

    def _update(self) -> Outcome:
        record = {"train/target_kl": self.trust_region_radius()}
        with consistent_evaluation(self.policy):
            with timed(record, "time/policy_s"):
                batch = whole_rollout(self.rollout_buffer, self.action_space, self.reduction)
                chunk_size = self._chunk_size(batch)
            if self.surrogate == "expected":  # which is made of what the critic has learnt of the rollout
                self._fit_critic(record, batch, self._actor(batch), chunk_size)
            with timed(record, "time/policy_s"):
                problem = self._problem(batch, chunk_size)
                step = self._policy_step_or_none(problem)
                leave_gradients(self.policy, problem.gradients)
                record |= self._log_entries(problem, step)
                actor = frozenset(problem.gradients)
                del problem  # with what it keeps of π_old
            if self.surrogate == "sampled":  # Adam leaves the critic's gradients beside the actor's
                self._fit_critic(record, batch, actor, chunk_size)
        self._keep(batch)
        self._n_updates += 1
        return Outcome(record, step.reason)

    def _fit_critic(
        self, record: dict[str, float], batch: Batch, actor: frozenset[Any], chunk_size: int | None
    ) -> None:
        with timed(record, "time/critic_s"):
            record["train/value_loss"] = self.value_critic.fit(self._regression(batch, actor, chunk_size))

    def _actor(self, batch: Batch) -> frozenset[Any]:
        """The parameters that the policy's output reaches."""
        with torch.enable_grad():
            return frozenset(gradient([PolicyOutput.of(self.policy, batch[:1]).z.sum()], trainable(self.policy)))

    def _problem(self, batch: Batch, chunk_size: int | None = None) -> PolicyProblem:
        """What the policy step is to solve on a rollout."""
        seen = self._policy_samples(batch, chunk_size)
        if self.surrogate == "expected":
            seen = self._with_action_advantages(seen, chunk_size, standardize=self.normalize_advantage)
        else:
            prepare = normalized_signal if self.normalize_advantage else without_noise
            seen = prepare(seen, self.rollout_buffer)
        return PolicyProblem(
            self._plain_policy or self.policy,
            seen,
            ent_coef=self.entropy_weight(),
            chunk_size=chunk_size,
            curvature_samples=self._curvature_samples(seen),
        )

    def _curvature_samples(self, batch: Batch) -> int:
        """Most samples that the Fisher matrix is estimated from."""
        samples = math.ceil(batch.reduction.count(len(batch)) / self.sub_sampling_factor)
        return samples if self.curvature_samples is None else min(samples, self.curvature_samples)

    def _policy_samples(self, batch: Batch, chunk_size: int | None) -> Batch:
        """The samples of the policy step, of a rollout that the critic sees as it is."""
        return batch

    # What is remembered of past rollouts.

    def _rollouts_seen(self) -> int:
        """M: an update sees the last M rollouts, the present one among them."""
        return self.value_critic.n_rollouts

    def _remembers(self) -> bool:
        """Whether what is remembered belongs to the policy that an update leaves."""
        return self._rollouts_seen() > 1

    def _with_past(self, batch: Batch, rollouts: int, chunk_size: int | None, trace_decay: float) -> Batch:
        """The samples of the last ``rollouts``, the present one's first, those before as the policy sees them now."""
        past = [
            rollout.seen_by(
                self.policy,
                discount=self.gamma,
                trace_decay=trace_decay,
                chunk_size=chunk_size,
                bootstrap=self.bootstrap,
            )
            for rollout in _before_the_present(self._past_rollouts, rollouts)
        ]
        return joined([batch, *past])

    def _keep(self, batch: Batch) -> None:
        """Keep the rollout for the updates to come, and the ones before it that will still be used."""
        seen = self._rollouts_seen()
        self._theta_left = self._theta() if self._remembers() else None
        newest = self._trajectories(batch) if seen > 1 else None
        if newest is not None:
            self._past_rollouts = (*self._past_rollouts, newest)
        self._past_rollouts = _before_the_present(self._past_rollouts, seen)

    def _theta(self) -> Tensor:
        """All parameters as they are, without a σ that a schedule moves: a few updates ago it was nearly the same."""
        moved = self.policy.log_std if callable(self.log_std) else None
        return flatten([param for param in self.policy.parameters() if param is not moved]).detach()

    def _begin_update(self) -> None:
        """Forget past updates of another policy, or of parameters that were not left by an update."""
        super()._begin_update()
        if self._theta_left is not None and not torch.equal(self._theta_left, self._theta()):
            self._forget_past_updates()

    def _forget(self) -> None:
        """Drop past rollouts too.

        The ratios to an earlier policy stay defined when the parameters are replaced, but `shared_radius` counts on
        policies that are a few steps apart, as traces do that are not to be cut at once.
        """
        super()._forget()
        self._forget_past_updates()

    def _forget_past_updates(self) -> None:
        self._past_rollouts, self._theta_left = (), None

    def _forget_rollouts(self) -> None:
        super()._forget_rollouts()
        self._past_rollouts = ()

    def _policy_step_or_none(self, problem: PolicyProblem) -> PolicyStep:
        """The step of the policy, or why there is nothing for one to follow."""
        if not problem.params:
            return Step(problem.start, reason=NO_PARAMETER)
        if not problem.max_advantage and not self.entropy_weight():
            return Step(problem.start, reason=NO_SIGNAL)
        if not bool(problem.gradient.isfinite().all()):
            return Step(problem.start, reason="the gradient of the surrogate is not finite")
        with explained_double_backward():
            return self._policy_step(problem)

    @abstractmethod
    def _policy_step(self, problem: PolicyProblem) -> PolicyStep:
        """One step of the policy from θ_old, to which it is put back, bit for bit, if the step is rejected."""

    def _direction(self, problem: PolicyProblem, vector: Tensor | None = None) -> Direction:
        """Solve (F + λI) x = v, v being the gradient if None, as far as log σ has no part of its own."""
        vector = problem.gradient if vector is None else vector
        found = natural_direction(
            problem.fisher(self.cg_damping * self._action_dimensions()),
            problem,
            self._spread(problem).solved(vector),
            max_steps=self.cg_max_steps,
            residual_tol=self.cg_residual_tol,
            min_radius_used=self._min_radius_used(),
            reduction=self.reduction,
        )
        return replace(found, vector=vector)

    @staticmethod
    def _no_direction(problem: PolicyProblem, direction: Direction) -> PolicyStep:
        """What came of a direction that is not usable."""
        zero = direction.cg.stop == "zero right-hand side"
        reason = NO_GRADIENT if zero else f"conjugate gradients found no direction ({direction.cg.stop})"
        return Step(problem.start, direction, reason=reason)

    def _min_radius_used(self) -> float:
        """What ``min_radius_used="auto"`` stands for here, or ``min_radius_used`` itself."""
        least = self.min_radius_used
        return kind_of(self.action_space).min_radius_used if least == "auto" else float(least)

    def _chunk_size(self, batch: Batch) -> int | None:
        """Most samples in one forward pass."""
        if self.fisher_chunk_size == "auto":
            return affordable_samples(self.policy, lambda part: PolicyOutput.of(self.policy, part).z, batch)
        return self.fisher_chunk_size

    def _regression(self, batch: Batch, actor: frozenset[Any], chunk_size: int | None = None) -> Regression:
        """What the critic is to fit."""
        critic = self.value_critic
        trace_decay = self.gae_lambda if critic.gae_lambda is None else critic.gae_lambda

        def epoch(samples: Batch) -> Iterator[Batch]:
            return minibatches(self.rollout_buffer, samples, self._minibatch_share(), self.action_space)

        return Regression(
            policy=self.policy,
            batch=self._with_past(batch, critic.n_rollouts, chunk_size, trace_decay),
            frozen=actor,
            minibatches=epoch,
            epochs=self.n_critic_updates,
            curvature_samples=self.curvature_samples,
            chunk_size=chunk_size,
            minibatches_are_parts=type(self.rollout_buffer) in VIEWED_BUFFERS,
            plain=self._plain_policy,
            trajectories=self._trajectories(batch),
            discount=self.gamma,
            bootstrap=self.bootstrap,
        )

    def _trajectories(self, batch: Batch) -> PastRollout | None:
        """The rollout in the order of time, where the buffer has kept that."""
        if type(self.rollout_buffer) not in VIEWED_BUFFERS or self._last_episode_starts is None:
            return None
        following = self._last_obs, self._last_episode_starts, self._masks_after
        return PastRollout.of(self.rollout_buffer, batch, *following)

    def _must_compute_alike(self) -> bool:
        return type(self.value_critic) is not GaussNewtonCritic  # as for the policy: one gradient, one direction

    def _checkpoints(self) -> tuple[Restorable, ...]:
        remembered = Attributes(self, "_past_rollouts", "_theta_left")
        return *super()._checkpoints(), StateCheckpoint(self.value_critic), remembered

    def _excluded_save_params(self) -> list[str]:
        own = ("value_critic", "_critic_arguments", "_past_rollouts", "_theta_left")
        return [*super()._excluded_save_params(), *own]

    def _shared_attributes(self) -> tuple[str, ...]:
        return (*super()._shared_attributes(), "_theta_left")

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        states, tensors = super()._get_torch_save_params()
        return ([*states, "value_critic"] if has_state(self.value_critic) else states), tensors

    def _cures(self) -> str:
        return f"a smaller `target_kl`, more `cg_damping`, {super()._cures()}"

    def _log_entries(self, problem: PolicyProblem, step: PolicyStep) -> dict[str, float]:
        """What to log of a step."""
        found, cg = step.evaluation, step.direction and step.direction.cg
        of_spread = self._spread(problem).log_entries()
        return {
            "train/policy_objective": found.objective,
            "train/kl_divergence_loss": found.divergence,
            "train/kl_max": found.kl_max,
            "train/entropy": found.entropy,
            **found.remarks,
            "train/step_size": step.fraction * step.size,
            "train/improvement": found.objective - problem.start.objective,
            "train/expected_improvement": step.expected_improvement,
            "train/cg_steps": cg.steps if cg else 0,
            "train/cg_residual": cg.residual if cg else 0.0,
            **of_spread,
        }


def _before_the_present(rollouts: tuple[PastRollout, ...], seen: int) -> tuple[PastRollout, ...]:
    """Of past rollouts those that an update sees beside the present one, ``seen - 1`` at the most."""
    return rollouts[max(len(rollouts) - seen + 1, 0) :]
