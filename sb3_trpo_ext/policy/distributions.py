"""Action distributions as coordinates z with a KL divergence and a Fisher metric, and the registry of them.

A distribution over actions at N states is described by one tensor z of shape ``(N, K)``. That makes a frozen copy a
detached tensor (SB3 reuses one distribution object for every forward pass), the KL a function of two tensors, and the
Fisher matrix E[Jᵀ M J] with J = ∂z/∂θ and M = `Family.metric`.

KL(old‖new) is *joint*: summed over action dimensions, because those are independent given the state. It is a sum of
terms that are not negative, so that it keeps its relative precision where old and new are nearly the same. Nothing
here averages over samples.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

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
    """How to read z from a distribution, and the geometry of z.

    A family of one's own has `coordinates` and `kl`, and is made known by `register_distribution`.
    """

    @abstractmethod
    def coordinates(self, distribution: Any) -> Tensor:
        """z, shape ``(N, K)``, with its graph."""

    @abstractmethod
    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """KL(old‖new) a state, shape ``(N,)``, in nats; exactly 0 where ``old`` and ``new`` are the same bits.

        Differentiable in ``new``, twice if `metric` is not overridden. A formula whose large terms cancel, as those
        from logarithms of the gamma function do, is best evaluated in float64.
        """

    def metric(self, z: Tensor, v: Tensor) -> Tensor:
        """M(z) v, shape ``(N, K)``: the Fisher information of z at each state applied to a tangent v.

        Unless a family has a closed form, it is the Hessian of KL(z‖z') in z' at z' = z, by differentiating `kl` twice.
        """
        with torch.enable_grad():
            new = z.detach().clone().requires_grad_()
            kl = self.kl(z.detach(), new)
            slope = torch.autograd.grad(kl.sum(), new, create_graph=True)[0] if kl.requires_grad else kl
            if not slope.requires_grad:
                raise NotImplementedError(
                    f"{type(self).__name__}.kl is not differentiable twice in `new`, which its metric needs. Write it "
                    "in differentiable torch operations, or give the family a `metric` of its own."
                )
            (product,) = torch.autograd.grad(slope, new, v)
        return product


class GaussianFamily(Family):
    """Independent Gaussians (Box actions, gSDE included), z = (μ, log σ), K = 2A.

    KL(old‖new) = Σ_a ½ (e^2x - 1 - 2x) + (μ - μ')² / 2σ'² with x = log σ - log σ', and M = diag(1/σ², 2). Squashing by
    tanh is a bijection, which changes neither.
    """

    def coordinates(self, distribution: Any) -> Tensor:
        """Read z = (μ, log σ) of the Gaussian before any squashing."""
        normal = distribution.distribution
        return torch.cat([normal.loc, normal.scale.log()], dim=1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Sum of the A one-dimensional KL divergences."""
        (mean_old, log_std_old), (mean_new, log_std_new) = old.chunk(2, dim=-1), new.chunk(2, dim=-1)
        distance = (mean_old - mean_new) * _finite_exp(-log_std_new)
        return 0.5 * (exp_remainder(2 * (log_std_old - log_std_new)) + distance.square()).sum(dim=-1)

    def metric(self, z: Tensor, v: Tensor) -> Tensor:
        """Multiply by diag(1/σ², 2)."""
        log_std = z.chunk(2, dim=-1)[1]
        v_mean, v_log_std = v.chunk(2, dim=-1)
        return torch.cat([v_mean * _finite_exp(-2 * log_std), 2 * v_log_std], dim=-1)


@dataclass(frozen=True)
class CategoricalFamily(Family):
    """Independent categorical choices (Discrete, MultiDiscrete), z = log-probabilities, K = Σ sizes.

    KL(old‖new) = Σ_choices Σ_i p_i (e^d_i - 1 - d_i) with d_i = log p'_i - log p_i, which is -Σ_i p_i d_i because p and
    p' sum to one; and M = diag(p) - p pᵀ for each choice. An option that is masked out, by a log p of -∞ or a finite
    one so low that p = 0, adds exactly nothing to either.

    Attributes:
        sizes: Number of options of each choice.
    """

    sizes: tuple[int, ...]

    def coordinates(self, distribution: Any) -> Tensor:
        """Read z = log p, normalised for each choice."""
        return torch.cat([choice.logits for choice in _choices(distribution)], dim=1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Sum of the KL divergences of the choices; infinite where an option of p > 0 is ruled out."""
        rows, width = max(1, _CACHED // old.shape[-1]), old.shape[-1]
        pairs = zip(old.reshape(-1, width).split(rows), new.reshape(-1, width).split(rows), strict=True)
        return torch.cat([_mass_divergence(*pair, _log_ratio(*pair)) for pair in pairs]).view(old.shape[:-1])

    def metric(self, z: Tensor, v: Tensor) -> Tensor:
        """(diag(p) - p pᵀ) v for each choice."""
        pairs = zip(z.exp().split(self.sizes, dim=-1), v.split(self.sizes, dim=-1), strict=True)
        return torch.cat([p * (u - (p * u).sum(dim=-1, keepdim=True)) for p, u in pairs], dim=-1)


class BernoulliFamily(Family):
    """Independent coins (MultiBinary), z = logits, K = A.

    KL(old‖new) = Σ_a p (e^d - 1 - d) + the same of the tails, with d = log p' - log p, and M = diag(p (1 - p)).
    """

    def coordinates(self, distribution: Any) -> Tensor:
        """Read z = logits."""
        logits: Tensor = distribution.distribution.logits
        return logits

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Sum of the KL divergences of the coins."""
        return self._heads(old, new) + self._heads(-old, -new)

    @staticmethod
    def _heads(old: Tensor, new: Tensor) -> Tensor:
        """The term of heads; the tails are the heads of the opposite logits."""
        log_old, log_new = F.logsigmoid(old), F.logsigmoid(new)
        # log(p'/p) = -log(1 + (1 - p)(e^-s - 1)) for a step s of the logit keeps its precision where s is small; it
        # loses it where s is large, and the difference of the logarithms does not.
        step = new - old
        small = step.abs() <= 1
        through_step = -torch.log1p((-old).sigmoid() * torch.expm1(-torch.where(small, step, 0.0)))
        return _mass_divergence(log_old, log_new, torch.where(small, through_step, _log_ratio(log_old, log_new)))

    def metric(self, z: Tensor, v: Tensor) -> Tensor:
        """Multiply by p (1 - p)."""
        return z.sigmoid() * (-z).sigmoid() * v


@dataclass(frozen=True)
class SampledFamily(Family):
    """Any distribution with a differentiable log π, seen only at the actions that were taken: z = log π(a|s), K = 1.

    With r = π'(a|s)/π(a|s) and w = π(a|s)/π_b(a|s), 1 where π itself took the actions, the KL divergence of a state is
    estimated as w (r - 1 - log r) >= 0, whose expectation it is, and the Fisher information by w ∇log π ∇log πᵀ: M = w.
    What is the largest KL divergence of a state elsewhere is here the largest estimate.

    Attributes:
        actions: Those taken, a row for each of the policy's (padding included).
        taken_log_prob: log π_b(a|s) of the policy that took them, ``(N,)``.
    """

    actions: Tensor
    taken_log_prob: Tensor

    def coordinates(self, distribution: Any) -> Tensor:
        """Evaluate z = log π(a|s)."""
        log_prob: Tensor = distribution.log_prob(self.actions)
        return log_prob.unsqueeze(1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """The estimate at each sample."""
        taken = self.taken_log_prob.unsqueeze(1)
        return _mass_divergence(old - taken, new - taken, _log_ratio(old, new))

    def metric(self, z: Tensor, v: Tensor) -> Tensor:
        """Multiply by w."""
        return _finite_exp(z - self.taken_log_prob.unsqueeze(1)) * v


OWN_FAMILIES = (GaussianFamily, CategoricalFamily, BernoulliFamily)
"""Those with closed forms here."""

_CACHED = 2**16
"""Numbers in a part of a KL divergence that is computed by itself: intermediate results are few, and stay in cache."""

DistributionT = TypeVar("DistributionT", bound=Distribution)
Factory = Callable[[Any], Family | None]

_FACTORIES: dict[type[Distribution], Factory] = {}


def register_distribution(
    distribution_class: type[DistributionT], factory: Callable[[DistributionT], Family | None]
) -> None:
    """Make the KL divergence and the Fisher metric of an action distribution known to all algorithms.

    Without it they are estimated from the actions that were taken (`SampledFamily`): TRPO, NPG and PPOPenalty train,
    on a noisier KL divergence, and ``train/kl_is_sampled`` says so in the log. See ``examples/beta_policy.py``.

    Args:
        distribution_class: A subclass of SB3's ``Distribution``. Its own subclasses are served too, unless they, or a
            class nearer to them, are registered. Registering a class again replaces what was registered.
        factory: Makes the family of a distribution object; it may return None for one that it cannot serve. The object
            need not have been given parameters yet.

    Raises:
        TypeError: If the class is no ``Distribution``, or the factory cannot be called.

    Example:
        >>> class BetaFamily(Family):
        ...     def coordinates(self, distribution):
        ...         beta = distribution.distribution
        ...         return torch.cat([beta.concentration1, beta.concentration0], dim=1)
        ...
        ...     def kl(self, old, new):
        ...         p, q = (torch.distributions.Beta(*z.chunk(2, dim=1)) for z in (old, new))
        ...         return torch.distributions.kl_divergence(p, q).sum(dim=1)
        >>> register_distribution(BetaDistribution, lambda distribution: BetaFamily())
    """
    if not (isinstance(distribution_class, type) and issubclass(distribution_class, Distribution)):
        raise TypeError(
            f"`distribution_class` must be a subclass of stable_baselines3's Distribution, got {distribution_class!r}."
        )
    if not callable(factory):
        raise TypeError(
            f"`factory` must make a Family of a distribution, got {factory!r}. Pass a function, such as "
            "`lambda distribution: MyFamily()`."
        )
    _FACTORIES[distribution_class] = factory


def family_of(distribution: Distribution) -> Family | None:
    """The family registered for a distribution: of its class, or of the nearest base class that serves it.

    None if there is none; a `SampledFamily` serves then.
    """
    for kind in type(distribution).__mro__:
        family = _FACTORIES[kind](distribution) if kind in _FACTORIES else None
        if family is not None and not isinstance(family, Family):
            raise TypeError(f"The factory registered for {kind.__name__} must return a Family or None, got {family!r}.")
        if family is not None:
            return family
    return None


def check_family(family: Family, z: Tensor) -> None:
    """Raise `ValueError` unless coordinates and KL divergence have a row for each state.

    Args:
        family: One of a user's own, perhaps.
        z: Its coordinates at N states.
    """
    if type(family).__module__ == __name__:
        return  # those of this file are as they should be
    name = type(family).__name__
    if z.dim() != 2:
        raise ValueError(f"{name}.coordinates must have the shape (N, K), got {tuple(z.shape)}.")
    kl = family.kl(z, z)
    if kl.shape != z.shape[:1]:
        raise ValueError(
            f"{name}.kl must return one number for each of {len(z)} states, got the shape {tuple(kl.shape)}. "
            "Sum over the dimensions of an action alone."
        )


def _choices(distribution: Any) -> list[Any]:
    """The torch distributions of an SB3 one; none before it was given parameters."""
    masked = isinstance(distribution, MaskableMultiCategoricalDistribution)
    found = getattr(distribution, "distributions" if masked else "distribution", None)
    return found if isinstance(found, list) else [] if found is None else [found]


def _register_sb3() -> None:
    """SB3's and sb3-contrib's own, by the way that is open to all.

    A subclass that puts another torch distribution in the place of theirs is not served by their family.
    """

    def register(
        kind: type[DistributionT], torch_kind: type[torch.distributions.Distribution], make: Callable[[Any], Family]
    ) -> None:
        def factory(distribution: DistributionT) -> Family | None:
            expected = all(isinstance(each, torch_kind) for each in _choices(distribution))
            return make(distribution) if expected else None

        register_distribution(kind, factory)

    for gaussian in (DiagGaussianDistribution, StateDependentNoiseDistribution):
        register(gaussian, torch.distributions.Normal, lambda _: GaussianFamily())
    for one in (CategoricalDistribution, MaskableCategoricalDistribution):
        register(one, torch.distributions.Categorical, lambda each: CategoricalFamily((each.action_dim,)))
    for many in (MultiCategoricalDistribution, MaskableMultiCategoricalDistribution):
        register(
            many, torch.distributions.Categorical, lambda each: CategoricalFamily(tuple(map(int, each.action_dims)))
        )
    register(BernoulliDistribution, torch.distributions.Bernoulli, lambda _: BernoulliFamily())


_register_sb3()


def _mass_divergence(log_old: Tensor, log_new: Tensor, log_ratio: Tensor) -> Tensor:
    """Sum over outcomes of p' - p - p log(p'/p) >= 0 of masses p and p', which is KL(p‖p'): ``(N, K)`` -> ``(N,)``.

    p = 0 gives p', and p' = 0 where p is not gives ∞.

    Args:
        log_old: log p, -∞ included.
        log_new: log p', likewise.
        log_ratio: d = log p' - log p, as exactly as it is known; see `_log_ratio`.
    """
    p, d = log_old.exp(), log_ratio
    # e^d would overflow where p is next to nothing, and says nothing where p is nothing.
    far = log_new.exp() - p - p * d.clamp(min=torch.finfo(d.dtype).min)
    near = p * exp_remainder(d.clamp(max=1))
    # The smallest positive numbers have few digits, and a sum of them may round to less than zero.
    return torch.where((d > 1) | (p == 0), far, near).sum(dim=-1).clamp(min=0)


def _log_ratio(log_old: Tensor, log_new: Tensor) -> Tensor:
    """log(p'/p), never -∞ less -∞: finite where p = 0 alone, -∞ where p' = 0."""
    return log_new - log_old.clamp(min=torch.finfo(log_old.dtype).min)


def exp_remainder(y: Tensor) -> Tensor:
    """e^y - 1 - y >= 0, to the precision of y where y is small too; 0 for 0. For families of one's own as well."""
    result: Tensor = _ExpRemainder.apply(y)
    return result


class _ExpRemainder(torch.autograd.Function):
    """Its derivative is e^y - 1, which the branches of the forward pass need not be asked for."""

    SMALL = 2.0**-5

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        # y²/2! + y³/3! + ... until the next term is below the rounding for all |y| < SMALL.
        last = 4 if y.dtype == torch.float32 else 9
        series = y / math.factorial(last)
        for order in range(last - 1, 1, -1):
            series.add_(1 / math.factorial(order)).mul_(y)
        series.mul_(y)
        difference = torch.expm1(y).sub_(y.clamp(max=torch.finfo(y.dtype).max))  # ∞ - ∞ is ∞ here
        return torch.where(y.abs() < _ExpRemainder.SMALL, series, difference)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (y,) = ctx.saved_tensors
        return gradients[0] * torch.expm1(y)


def _finite_exp(x: Tensor) -> Tensor:
    """e^x, no larger than is finite: zero times it is zero."""
    return x.clamp(max=math.log(torch.finfo(x.dtype).max) - 1).exp()
