"""The optimisation problem of one policy update, as plain functions of the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from sb3_trpo_ext.core.curvature import GaussNewtonProduct, Metric, Segment
from sb3_trpo_ext.core.objectives import importance_sampled_surrogate
from sb3_trpo_ext.sb3.batch import Batch
from sb3_trpo_ext.sb3.distributions import Family, family_of
from sb3_trpo_ext.sb3.parameters import gradient, trainable


@dataclass(frozen=True)
class PolicyEvaluation:
    """The policy on the whole batch, compared with π_old.

    Attributes:
        objective: L(θ) = E[r·Â] + ent_coef · H.
        divergence: Mean joint KL(π_old‖π_θ), the D of the trust region.
        kl_max: Largest joint KL(π_old‖π_θ) of a state in the batch.
        entropy: H, mean entropy of the policy (estimated from samples where it has no closed form).
    """

    objective: float
    divergence: float
    kl_max: float
    entropy: float


@dataclass(frozen=True)
class PolicyOutput:
    """π(·|s) at the states of a batch, to be used before the policy's next forward pass.

    Attributes:
        distribution: SB3's object, which the policy overwrites at the next forward pass.
        family: Its geometry.
        z: Its coordinates, ``(N, K)``.
    """

    distribution: Distribution
    family: Family
    z: Tensor

    @classmethod
    def of(cls, policy: ActorCriticPolicy, batch: Batch) -> PolicyOutput:
        """Run the policy on a batch."""
        distribution = policy.get_distribution(batch.observations)
        family = family_of(distribution)
        return cls(distribution, family, family.coordinates(distribution))


class PolicyProblem:
    """Maximise L(θ) subject to D(θ) <= δ around the policy as it stands when this is made.

    L(θ) = E[π_θ(a|s)/π_old(a|s) · Â] + ent_coef · E[H(π_θ(·|s))] and D(θ) = E[KL(π_old(·|s)‖π_θ(·|s))]
    (Schulman et al. 2015, equation 14), over a batch that is visited in chunks.

    Args:
        policy: The policy at θ_old.
        batch: The samples.
        ent_coef: Weight of the entropy bonus.
        chunk_size: Most samples in one forward pass; None for all at once.

    Attributes:
        start: The evaluation at θ_old; its divergence is exactly zero.
    """

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
        self.start = self.evaluate()

    @torch.no_grad()
    def evaluate(self) -> PolicyEvaluation:
        """Evaluate the policy with the parameters it has now, without a graph."""
        surrogate = entropy = divergence = torch.zeros((), device=self._batch.weights.device)
        kl_max = torch.full_like(divergence, -math.inf)
        for index, chunk in enumerate(self._chunks):
            output = PolicyOutput.of(self._policy, chunk)
            if index == len(self._old):
                self._old.append(output.z)
            kl = output.family.kl(self._old[index], output.z)
            chunk_surrogate, chunk_entropy = self._terms(chunk, output.distribution)
            surrogate, entropy = surrogate + chunk_surrogate, entropy + chunk_entropy
            divergence, kl_max = divergence + chunk.mean(kl), torch.maximum(kl_max, kl.max())
        values = torch.stack([surrogate, entropy, divergence, kl_max]).tolist()
        return PolicyEvaluation(values[0] + self._ent_coef * values[1], values[2], values[3], values[1])

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """∇L at θ_old for the actor: every trainable parameter that the policy's output reaches."""
        return gradient((self._remembered_objective(chunk) for chunk in self._chunks), trainable(self._policy))

    def fisher(
        self, params: Sequence[nn.Parameter], damping: float, sub_sampling_factor: int = 1
    ) -> GaussNewtonProduct:
        """Products v ↦ (F + λI) v at θ_old, F from every ``sub_sampling_factor``-th sample, always the same.

        The graph that gave the gradient also serves the products where both see the whole batch in one chunk.
        """
        if sub_sampling_factor == 1 and self._graph is not None:
            graph = self._graph
            return GaussNewtonProduct([lambda: _fisher_segment(self._batch, graph)], params, damping)

        def segment(chunk: Batch) -> Segment:
            return lambda: _fisher_segment(chunk, PolicyOutput.of(self._policy, chunk))

        chunks = self._batch.thinned(sub_sampling_factor).split(self._chunk_size)
        return GaussNewtonProduct([segment(chunk) for chunk in chunks], params, damping)

    def _remembered_objective(self, chunk: Batch) -> Tensor:
        output = PolicyOutput.of(self._policy, chunk)
        self._graph = output if len(self._chunks) == 1 else None
        surrogate, entropy = self._terms(chunk, output.distribution)
        return surrogate + self._ent_coef * entropy if self._ent_coef else surrogate

    def _terms(self, chunk: Batch, distribution: Distribution) -> tuple[Tensor, Tensor]:
        """A chunk's shares of E[r·Â] and of the entropy."""
        log_prob = distribution.log_prob(chunk.actions)
        ratio = torch.exp(log_prob - chunk.old_log_prob)
        entropy = distribution.entropy()
        if entropy is None:
            # No closed form (squashed actions). E_old[-r log π] has the entropy's gradient; SB3's E_old[-log π] has
            # gradient zero in expectation.
            entropy = -ratio * log_prob
        return chunk.mean(importance_sampled_surrogate(ratio, chunk.advantages)), chunk.mean(entropy)


def _fisher_segment(batch: Batch, output: PolicyOutput) -> tuple[Tensor, Metric]:
    frozen, weights = output.z.detach(), batch.weights.unsqueeze(1)
    return output.z, lambda v: weights * output.family.metric(frozen, v)
