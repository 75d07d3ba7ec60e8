"""The distributions of SB3 policies as exponential-family coordinates z, their joint KL and Fisher metric.

A distribution over actions at N states is described by one tensor z of shape ``(N, K)``. That makes a frozen copy a
detached tensor (SB3 reuses one distribution object for every forward pass), the KL a function of two tensors, and the
Fisher matrix E[Jᵀ M J] with J = ∂z/∂θ and M = `Family.metric`, closed-form.

KL(old‖new) is *joint*: summed over action dimensions, because those are independent given the state. Nothing here
averages over samples.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from sb3_contrib.common.maskable.distributions import (
    MaskableCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
)
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from torch import Tensor
from torch.nn import functional as F


class Family(ABC):
    """How to read z from an SB3 distribution, and the geometry of z."""

    @abstractmethod
    def coordinates(self, distribution: Distribution) -> Tensor:
        """z, shape ``(N, K)``, with its graph."""

    @abstractmethod
    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """KL(old‖new) a state, shape ``(N,)``, in nats; exactly 0 where ``old`` and ``new`` are the same bits."""

    @abstractmethod
    def metric(self, z: Tensor, v: Tensor) -> Tensor:
        """M(z) v, shape ``(N, K)``: the Fisher information of z at each state applied to a tangent v."""


class GaussianFamily(Family):
    """Independent Gaussians (Box actions, gSDE included), z = (μ, log σ), K = 2A.

    KL(old‖new) = Σ_a log(σ'/σ) + (σ² + (μ - μ')²) / 2σ'² - 1/2 and M = diag(1/σ², 2). Squashing by tanh is a
    bijection, which changes neither.
    """

    def coordinates(self, distribution: Distribution) -> Tensor:
        """Read z = (μ, log σ) of the Gaussian before any squashing."""
        normal = distribution.distribution
        assert isinstance(normal, torch.distributions.Normal)
        return torch.cat([normal.loc, normal.scale.log()], dim=1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Sum of the A one-dimensional KL divergences."""
        (mean_old, log_std_old), (mean_new, log_std_new) = old.chunk(2, dim=1), new.chunk(2, dim=1)
        log_ratio = log_std_old - log_std_new
        distance2 = ((mean_old - mean_new) * torch.exp(-log_std_new)).square()
        return (0.5 * (torch.expm1(2 * log_ratio) + distance2) - log_ratio).sum(dim=1)

    def metric(self, z: Tensor, v: Tensor) -> Tensor:
        """Multiply by diag(1/σ², 2)."""
        log_std = z.chunk(2, dim=1)[1]
        v_mean, v_log_std = v.chunk(2, dim=1)
        return torch.cat([v_mean * torch.exp(-2 * log_std), 2 * v_log_std], dim=1)


@dataclass(frozen=True)
class CategoricalFamily(Family):
    """Independent categorical choices (Discrete, MultiDiscrete), z = log-probabilities, K = Σ sizes.

    KL(old‖new) = Σ_choices Σ_i p_i (log p_i - log p'_i) and M = diag(p) - p pᵀ for each choice. An option that is
    masked out has p = 0 and a finite log p: it adds exactly nothing to either.

    Attributes:
        sizes: Number of options of each choice.
    """

    sizes: tuple[int, ...]

    def coordinates(self, distribution: Distribution) -> Tensor:
        """Read z = log p, normalised for each choice."""
        maskable = isinstance(distribution, MaskableMultiCategoricalDistribution)
        choices: Any = distribution.distributions if maskable else distribution.distribution  # type: ignore[attr-defined]
        return torch.cat([choice.logits for choice in (choices if isinstance(choices, list) else [choices])], dim=1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Sum of the KL divergences of the choices."""
        return (old.exp() * (old - new)).sum(dim=1)

    def metric(self, z: Tensor, v: Tensor) -> Tensor:
        """(diag(p) - p pᵀ) v for each choice."""
        pairs = zip(z.exp().split(self.sizes, dim=1), v.split(self.sizes, dim=1), strict=True)
        return torch.cat([p * (u - (p * u).sum(dim=1, keepdim=True)) for p, u in pairs], dim=1)


class BernoulliFamily(Family):
    """Independent coins (MultiBinary), z = logits, K = A.

    KL(old‖new) = Σ_a p log(p/p') + (1 - p) log((1 - p)/(1 - p')) and M = diag(p (1 - p)).
    """

    def coordinates(self, distribution: Distribution) -> Tensor:
        """Read z = logits."""
        coins = distribution.distribution
        assert isinstance(coins, torch.distributions.Bernoulli)
        return coins.logits

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Sum of the KL divergences of the coins."""
        heads = old.sigmoid() * (F.logsigmoid(old) - F.logsigmoid(new))
        tails = (-old).sigmoid() * (F.logsigmoid(-old) - F.logsigmoid(-new))
        return (heads + tails).sum(dim=1)

    def metric(self, z: Tensor, v: Tensor) -> Tensor:
        """Multiply by p (1 - p)."""
        return z.sigmoid() * (-z).sigmoid() * v


def family_of(distribution: Distribution) -> Family:
    """The family of an SB3 distribution, or of a subclass of one.

    Raises:
        NotImplementedError: For any other distribution.
    """
    if isinstance(distribution, (DiagGaussianDistribution, StateDependentNoiseDistribution)):
        return GaussianFamily()
    if isinstance(distribution, (CategoricalDistribution, MaskableCategoricalDistribution)):
        return CategoricalFamily((distribution.action_dim,))
    if isinstance(distribution, (MultiCategoricalDistribution, MaskableMultiCategoricalDistribution)):
        return CategoricalFamily(tuple(int(size) for size in distribution.action_dims))
    if isinstance(distribution, BernoulliDistribution):
        return BernoulliFamily()
    raise NotImplementedError(
        f"No KL divergence and Fisher metric are known for the action distribution {type(distribution).__name__}. "
        "Let the policy return one of SB3's or sb3-contrib's distributions (or a subclass): diagonal Gaussian, gSDE, "
        "categorical, multi-categorical, Bernoulli, or a maskable one."
    )
