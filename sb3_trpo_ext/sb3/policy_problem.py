"""The optimisation problem of one policy update, as plain functions of the parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from sb3_trpo_ext.core.curvature import GaussNewtonProduct, Metric, Segment
from sb3_trpo_ext.core.objectives import importance_sampled_surrogate
from sb3_trpo_ext.sb3.batch import Batch
from sb3_trpo_ext.sb3.distributions import Family, SampledFamily, family_of
from sb3_trpo_ext.sb3.methods import owner_of
from sb3_trpo_ext.sb3.parameters import gradient, trainable

KNOWN_POLICIES = (ActorCriticPolicy, MaskableActorCriticPolicy, RecurrentActorCriticPolicy)
"""Policies that keep one distribution, which ``evaluate_actions`` sets."""


@dataclass(frozen=True)
class PolicyEvaluation:
    """The policy on the whole batch, compared with π_old.

    Attributes:
        objective: L(θ) = E[r·Â] + ent_coef · H.
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
    """

    distribution: Distribution
    family: Family
    z: Tensor

    @classmethod
    def of(cls, policy: ActorCriticPolicy, batch: Batch) -> PolicyOutput:
        """Run the policy on a batch."""
        return cls._read(batch.distribution(policy), batch)

    @classmethod
    def after_evaluation(cls, policy: ActorCriticPolicy, batch: Batch) -> PolicyOutput:
        """The same, if ``evaluate_actions`` was the last that the policy was asked on that batch.

        The policies of SB3 and sb3-contrib then still hold the distribution; others are run once more.
        """
        if len(batch.split(None)) > 1:  # several passes, of which the policy holds the last one's
            return cls.of(policy, batch)
        evaluated = owner_of(policy, "evaluate_actions", KNOWN_POLICIES)
        if evaluated is None or owner_of(evaluated, "_get_action_dist_from_latent", KNOWN_POLICIES) != evaluated:
            return cls.of(policy, batch)
        return cls._read(evaluated.action_dist, batch)

    @classmethod
    def _read(cls, distribution: Distribution, batch: Batch) -> PolicyOutput:
        family = family_of(distribution) or SampledFamily(batch.padded(batch.actions), batch.old_log_prob)
        return cls(distribution, family, batch.unpadded(family.coordinates(distribution)))


class PolicyProblem:
    """Maximise L(θ) subject to D(θ) <= δ around the policy as it stands at the first visit.

    L(θ) = E[π_θ(a|s)/π_old(a|s) · Â] + ent_coef · E[H(π_θ(·|s))] and D(θ) = E[KL(π_old(·|s)‖π_θ(·|s))]
    (Schulman et al. 2015, equation 14), over a batch that is visited in chunks. The first call, `gradients` or
    `evaluate`, finds θ_old.

    Args:
        policy: The policy at θ_old.
        batch: The samples.
        ent_coef: Weight of the entropy bonus.
        chunk_size: Most samples in one forward pass; None for all at once.

    Attributes:
        start: The evaluation at θ_old, after the first call; its divergence is exactly zero.
    """

    start: PolicyEvaluation

    def __init__(
        self, policy: ActorCriticPolicy, batch: Batch, *, ent_coef: float = 0.0, chunk_size: int | None = None
    ) -> None:
        self._policy = policy
        self._batch = batch
        self._ent_coef = ent_coef
        self._chunk_size = chunk_size
        self._chunks = batch.split(chunk_size)
        self._old: list[Tensor] = []
        self._graph: PolicyOutput | None = None
        self._kl_is_sampled = False

    @property
    def old_z(self) -> Tensor:
        """The coordinates of π_old at the samples, ``(N, K)``, after the first call."""
        return self._batch.in_order(self._old, self._chunk_size)

    @property
    def size(self) -> int:
        """N, the samples of the batch."""
        return len(self._batch)

    @property
    def max_advantage(self) -> float:
        """The ε of the penalty C = 4εγ/(1-γ)²: max |Â| over the batch."""
        return float(self._batch.advantages.abs().max())

    @torch.no_grad()
    def evaluate(self) -> PolicyEvaluation:
        """Evaluate the policy with the parameters it has now, without a graph.

        Where these are beyond what torch takes for a distribution (an infinite σ), the evaluation is all NaN.
        """
        try:
            return self._summary([shares for _, shares in self._visit()])
        except ValueError as error:
            if not hasattr(self, "start") or "to satisfy the constraint" not in str(error):
                raise
            return PolicyEvaluation(math.nan, math.nan, math.nan, math.nan)

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """∇L at θ_old for the actor: every trainable parameter that the policy's output reaches.

        One forward pass a chunk gives the gradient, `start`, and where all samples fit in one, the graph of `fisher`.
        """
        visited: list[Tensor] = []

        def objectives() -> Iterator[Tensor]:
            for objective, shares in self._visit():
                visited.append(shares)
                yield objective

        found = gradient(objectives(), trainable(self._policy), retain_graph=len(self._chunks) == 1)
        self.start = self._summary(visited)
        return found

    def fisher(self, params: Sequence[nn.Parameter], damping: float, samples: int | None = None) -> GaussNewtonProduct:
        """Products v ↦ (F + λI) v at θ_old, F from at most ``samples`` samples, always the same.

        The graph that gave the gradient also serves the products where both see the whole batch in one chunk. It is
        given away: it dies with the first step that is tried, even one that is undone.
        """
        batch = self._batch if samples is None else self._batch.subset(samples)
        graph, self._graph = self._graph, None
        if batch is self._batch and graph is not None:
            return GaussNewtonProduct([lambda: _fisher_segment(batch, graph)], params, damping)

        def segment(chunk: Batch) -> Segment:
            return lambda: _fisher_segment(chunk, PolicyOutput.of(self._policy, chunk))

        return GaussNewtonProduct([segment(chunk) for chunk in batch.split(self._chunk_size)], params, damping)

    def _visit(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the chunks in turn: each one's share of L, and of (L, E[H], D) with its largest KL, detached."""
        at_start = not self._old
        without_gradient = False
        for index, chunk in enumerate(self._chunks):
            output = PolicyOutput.of(self._policy, chunk)
            if at_start:
                self._old.append(output.z.detach())
                self._graph = output if len(self._chunks) == 1 and output.z.requires_grad else None
                self._kl_is_sampled = isinstance(output.family, SampledFamily)
                without_gradient = self._kl_is_sampled and not output.z.requires_grad
            new = output.z.detach()
            kl = new.new_zeros(len(new)) if at_start else output.family.kl(self._old[index], new)
            objective, entropy = self._terms(chunk, output.distribution)
            yield objective, torch.stack([objective.detach(), entropy.detach(), chunk.mean(kl), kl.max()])
        if without_gradient:
            _require_differentiable(self._policy, self._chunks[0][:1])

    def _summary(self, shares: list[Tensor]) -> PolicyEvaluation:
        total = torch.stack(shares)
        objective, entropy, divergence = total[:, :3].sum(dim=0).tolist()
        evaluation = PolicyEvaluation(objective, divergence, float(total[:, 3].max()), entropy, self._kl_is_sampled)
        if not hasattr(self, "start"):
            self.start = evaluation
        return evaluation

    def _terms(self, chunk: Batch, distribution: Distribution) -> tuple[Tensor, Tensor]:
        """A chunk's shares of L and of the entropy."""
        log_prob = chunk.unpadded(distribution.log_prob(chunk.padded(chunk.actions)))
        ratio = torch.exp(log_prob - chunk.old_log_prob)
        closed_form = distribution.entropy()
        # Without one (squashed actions), E_old[-r log π] has the entropy's gradient; SB3's E_old[-log π] has gradient
        # zero in expectation. 0 log 0 = 0.
        entropy = -ratio * torch.where(ratio > 0, log_prob, 0.0) if closed_form is None else chunk.unpadded(closed_form)
        surrogate, bonus = chunk.mean(importance_sampled_surrogate(ratio, chunk.advantages)), chunk.mean(entropy)
        return (surrogate + self._ent_coef * bonus if self._ent_coef else surrogate), bonus


def _fisher_segment(batch: Batch, output: PolicyOutput) -> tuple[Tensor, Metric]:
    frozen, weights = output.z.detach(), batch.weights.unsqueeze(1)
    return output.z, lambda v: weights * output.family.metric(frozen, v)


def _require_differentiable(policy: ActorCriticPolicy, sample: Batch) -> None:
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
