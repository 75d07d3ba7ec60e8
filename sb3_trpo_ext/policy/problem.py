"""The optimisation problem of one policy update, as plain functions of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from sb3_trpo_ext.core.curvature import GaussNewtonProduct, Jacobian, Linearization, Metric
from sb3_trpo_ext.core.objectives import expected_surrogate, importance_sampled_surrogate
from sb3_trpo_ext.core.parameters import flatten, gradient, trainable
from sb3_trpo_ext.policy.distributions import Family, SampledFamily, check_family, family_of
from sb3_trpo_ext.policy.plain_policy import PlainPolicy
from sb3_trpo_ext.rollout.action_values import ActionValues, has_method_of, probabilities_of
from sb3_trpo_ext.rollout.batch import Batch, fits
from sb3_trpo_ext.rollout.known_classes import KNOWN_POLICIES, owner_of

EXPECTED_PRODUCTS = 10
"""Products with the curvature that a direction takes, each of which would move all parameters between workers."""

Policy: TypeAlias = ActorCriticPolicy | PlainPolicy
"""A policy, or what stands for one of plain layers."""


@dataclass(frozen=True)
class PolicyEvaluation:
    """The policy on the whole batch, compared with π_old.

    Attributes:
        objective: L(θ) = E[r·Â] + ent_coef · H, or E_s[Σ_a π_θ(a|s) A(s,a)] + ent_coef · H.
        divergence: Mean joint KL(π_old‖π_θ), the D of the trust region.
        kl_max: Largest joint KL(π_old‖π_θ) of a state in the batch.
        entropy: H, mean entropy of the policy (estimated from samples where it has no closed form).
        kl_is_sampled: Whether the KL divergences are estimates, for want of a registered family.
    """

    objective: float
    divergence: float
    kl_max: float
    entropy: float
    kl_is_sampled: bool = False

    @property
    def remarks(self) -> dict[str, float]:
        """What is to be known of the numbers, to be logged beside them."""
        return {"train/kl_is_sampled": 1.0} if self.kl_is_sampled else {}


@dataclass(frozen=True)
class PolicyOutput:
    """π(·|s) at the states of a batch, to be used before the policy's next forward pass.

    Attributes:
        distribution: SB3's object, padding included, which the policy overwrites at the next forward pass.
        family: Its geometry.
        z: Its coordinates, ``(N, K)``.
        jacobian: ∂z/∂θ for given parameters θ, up to what does not change the distribution.
    """

    distribution: Distribution
    family: Family
    z: Tensor
    jacobian: Callable[[Sequence[nn.Parameter]], Jacobian]

    @classmethod
    def of(cls, policy: Policy, batch: Batch) -> PolicyOutput:
        """Run the policy on a batch."""
        output = cls._read(batch.distribution(policy), batch)
        if isinstance(policy, PlainPolicy):
            return replace(output, jacobian=partial(policy.actor_jacobian, batch.inputs))
        return output

    @classmethod
    def after_evaluation(cls, policy: ActorCriticPolicy, batch: Batch) -> PolicyOutput:
        """The same, if ``evaluate_actions`` was the last that the policy was asked on that batch.

        The policies of SB3 and sb3-contrib then still hold the distribution; others are run once more.
        """
        if len(batch.split(None)) > 1:  # several passes, of which the policy holds the last one's
            return cls.of(policy, batch)
        evaluated = owner_of(policy, "evaluate_actions", (*KNOWN_POLICIES, ActionValues))
        usual = any(has_method_of(type(evaluated), "evaluate_actions", kind) for kind in KNOWN_POLICIES)
        if evaluated is None or not usual:
            return cls.of(policy, batch)
        if owner_of(evaluated, "_get_action_dist_from_latent", KNOWN_POLICIES) != evaluated:
            return cls.of(policy, batch)
        return cls._read(evaluated.action_dist, batch)

    @classmethod
    def _read(cls, distribution: Distribution, batch: Batch) -> PolicyOutput:
        family = family_of(distribution) or SampledFamily(batch.padded(batch.actions), batch.old_log_prob)
        z = batch.unpadded(family.coordinates(distribution))
        return cls(distribution, family, z, partial(Linearization, z))


class Comparison:
    """The policy as it changes, compared on a batch with π_old, what it was when the comparison was made.

    L(θ) = E[π_θ(a|s)/π_old(a|s) · Â] + ent_coef · E[H(π_θ(·|s))] and D(θ) = E[KL(π_old(·|s)‖π_θ(·|s))], over a batch
    that is visited in chunks. Where it has the advantages of all actions, L(θ) = E_s[Σ_a π_θ(a|s) A(s,a)] + ...

    Args:
        policy: The policy at θ_old.
        batch: The samples.
        ent_coef: Weight of the entropy bonus.
        chunk_size: Most samples in one forward pass; None for all at once.

    Attributes:
        batch: The samples.
        start: The evaluation at θ_old; its divergence is exactly zero.
        max_advantage: The ε of the penalty C = 4εγ/(1-γ)²: max |Â| over the batch.
    """

    max_advantage: float

    def __init__(self, policy: Policy, batch: Batch, *, ent_coef: float = 0.0, chunk_size: int | None = None) -> None:
        self.batch = batch
        self._policy = policy
        self._ent_coef = ent_coef
        self._chunk_size = chunk_size
        self._chunks = batch.split(chunk_size)
        self._old: list[Tensor] = []
        self._kl_is_sampled = False
        self.start = self._first_look()
        if self._kl_is_sampled:
            _require_differentiable(policy, self._chunks[0][:1])

    @property
    def old_z(self) -> Tensor:
        """The coordinates of π_old at the samples, ``(N, K)``."""
        return self.batch.in_order(self._old, self._chunk_size)

    @torch.no_grad()
    def evaluate(self) -> PolicyEvaluation:
        """Evaluate the policy with the parameters it has now, without a graph.

        Where these are beyond what torch takes for a distribution (an infinite σ), the evaluation is all NaN.
        """
        shares: list[Tensor] = []
        try:
            for chunk, old in zip(self._chunks, self._old, strict=True):
                output = PolicyOutput.of(self._policy, chunk)
                shares.append(self._shares(chunk, output, output.family.kl(old, output.z))[1])
        except ValueError as error:
            if "to satisfy the constraint" not in str(error):
                raise
            shares = [torch.full((4,), math.nan)]
        return self._summary(shares)

    @torch.no_grad()
    def _first_look(self) -> PolicyEvaluation:
        """Evaluate at θ_old, and note what else is to be known there."""
        return self._told_at_start([shares for _, shares in self._visit()], [])[1]

    def _told_at_start(
        self, shares: list[Tensor], gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], PolicyEvaluation]:
        """Totals of gradients and the evaluation at θ_old, and `max_advantage`, in one exchange."""
        reduction = self.batch.reduction
        every = self.batch.action_advantages
        advantage = reduction.largest_share((self.batch.advantages if every is None else every.flatten()).abs())
        columns = torch.stack(shares)
        largest = torch.stack([reduction.largest_share(columns[:, 3]), advantage.to(columns)])
        totals, sums, largest = reduction.totals(gradients, columns[:, :3].sum(dim=0), largest)
        self.max_advantage = float(largest[1])
        return totals, self._evaluation(sums, largest[0])

    def _visit(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the chunks at θ_old: each one's π_old, which is noted, share of L with its graph, and shares of all."""
        for chunk in self._chunks:
            output = PolicyOutput.of(self._policy, chunk)
            if not self._old:
                check_family(output.family, output.z.detach()[:2])
            self._old.append(output.z.detach())
            self._kl_is_sampled = isinstance(output.family, SampledFamily)
            yield self._shares(chunk, output, output.z.new_zeros(len(output.z)))

    def _shares(self, chunk: Batch, output: PolicyOutput, kl: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk's share of L with its graph, and of (L, E[H], D) with its largest KL, detached."""
        objective, entropy = self._terms(chunk, output.distribution)
        return objective, torch.stack(
            [objective.detach(), entropy.detach(), chunk.mean(kl), chunk.reduction.largest_share(kl)]
        )

    def _summary(self, shares: list[Tensor]) -> PolicyEvaluation:
        columns = torch.stack(shares)
        reduction = self.batch.reduction
        _, sums, largest = reduction.totals([], columns[:, :3].sum(dim=0), reduction.largest_share(columns[:, 3])[None])
        return self._evaluation(sums, largest[0])

    def _evaluation(self, sums: Tensor, kl_max: Tensor) -> PolicyEvaluation:
        objective, entropy, divergence = sums.tolist()
        return PolicyEvaluation(objective, divergence, float(kl_max), entropy, self._kl_is_sampled)

    def _terms(self, chunk: Batch, distribution: Distribution) -> tuple[Tensor, Tensor]:
        """A chunk's shares of L and of the entropy."""
        if chunk.action_advantages is not None:
            values = expected_surrogate(probabilities_of(distribution), chunk.action_advantages)
            return self._with_bonus(chunk, values, distribution.entropy())
        log_prob = chunk.unpadded(distribution.log_prob(chunk.padded(chunk.actions)))
        ratio = torch.exp(log_prob - chunk.old_log_prob)
        closed_form = distribution.entropy()
        # Without one (squashed actions), E_old[-r log π] has the entropy's gradient; SB3's E_old[-log π] has gradient
        # zero in expectation. 0 log 0 = 0.
        entropy = -ratio * torch.where(ratio > 0, log_prob, 0.0) if closed_form is None else chunk.unpadded(closed_form)
        return self._with_bonus(chunk, importance_sampled_surrogate(ratio, chunk.advantages), entropy)

    def _with_bonus(self, chunk: Batch, values: Tensor, entropy: Any) -> tuple[Tensor, Tensor]:
        """Shares of L and of the entropy, from one number a sample each."""
        surrogate, bonus = chunk.mean(values), chunk.mean(entropy)
        return (surrogate + self._ent_coef * bonus if self._ent_coef else surrogate), bonus


class PolicyProblem(Comparison):
    """Maximise L(θ) subject to D(θ) <= δ around θ_old (Schulman et al. 2015, equation 14).

    Made at θ_old, with one forward and one backward pass a chunk.

    Args:
        policy: The policy at θ_old, or what stands for one of plain layers.
        batch: The samples.
        ent_coef: Weight of the entropy bonus.
        chunk_size: Most samples in one forward pass; None for all at once.
        curvature_samples: Most samples that the Fisher matrix is estimated from; None for all.

    Attributes:
        gradients: ∇L at θ_old of each actor parameter: every trainable one that the policy's output reaches.
        params: Those parameters.
        theta_old: Their values, ``(P,)``.
        gradient: g, the gradients as one vector, ``(P,)``.
    """

    gradients: dict[nn.Parameter, Tensor]

    def __init__(
        self,
        policy: Policy,
        batch: Batch,
        *,
        ent_coef: float = 0.0,
        chunk_size: int | None = None,
        curvature_samples: int | None = None,
    ) -> None:
        size = sum(param.numel() * param.element_size() for param in trainable(policy))
        self._curvature_batch = batch.subset(curvature_samples, worth=EXPECTED_PRODUCTS * size)
        super().__init__(policy, batch, ent_coef=ent_coef, chunk_size=chunk_size)
        self.params = list(self.gradients)
        self.theta_old, self.gradient = flatten(self.params).detach(), flatten(list(self.gradients.values()))

    def fisher(self, damping: float) -> GaussNewtonProduct:
        """Products v ↦ (F + λI) v, made while the parameters are θ_old, with graphs that last until they move."""
        chunks = self._curvature_batch.split(self._chunk_size)
        segments = [partial(self._segment, chunk) for chunk in chunks]
        reduction = self._curvature_batch.reduction
        return GaussNewtonProduct(segments, damping, keep=fits(chunks, self._chunk_size), reduction=reduction)

    def _segment(self, chunk: Batch) -> tuple[Jacobian, Metric]:
        output = PolicyOutput.of(self._policy, chunk)
        frozen, weights = output.z.detach(), chunk.weights.unsqueeze(1)
        return output.jacobian(self.params), lambda v: weights * output.family.metric(frozen, v)

    def _first_look(self) -> PolicyEvaluation:
        visited: list[Tensor] = []

        def objectives() -> Iterator[Tensor]:
            for objective, shares in self._visit():
                visited.append(shares)
                yield objective

        by_hand = self._policy.gradient if isinstance(self._policy, PlainPolicy) else None
        shares = by_hand(objectives()) if by_hand else gradient(objectives(), trainable(self._policy))
        totals, evaluation = self._told_at_start(visited, list(shares.values()))
        self.gradients = dict(zip(shares, totals, strict=True))
        return evaluation


def _require_differentiable(policy: Any, sample: Batch) -> None:
    """Refuse a distribution that is not registered and whose log-probability has no gradient.

    Raises:
        NotImplementedError: If parameters that V does not reach could be trained, and log π(a|s) does not reach them.
    """
    with torch.enable_grad():
        output = PolicyOutput.of(policy, sample)
        params = trainable(policy)
        if output.z.requires_grad or len(gradient([sample.values(policy).sum()], params)) == len(params):
            return
    name = type(output.distribution).__name__
    raise NotImplementedError(
        f"`log_prob` of the action distribution {name} has no gradient, so no parameter of the actor can be trained. "
        "Compute it from the outputs of the network by torch operations, without `detach` or NumPy."
    )
