"""How widely a Gaussian policy explores: log σ learnt, held or on a schedule, its lowest value, a radius of its own.

For actions from N(μ(s), diag σ²) with a σ that no state changes (SB3's ``DiagGaussianDistribution``). The metric of
z = (μ, log σ) is diag(1/σ², 2), so that the Fisher matrix has a block of the mean's parameters, one of log σ, and
zeros between them: E[Jᵀ M J] = diag(F_μμ, 2I). The natural direction of log σ is therefore exactly half its gradient,
whatever the states, and so is its part of the KL divergence, the same at each of them:

    KL_σ = Σ_a ½ (e^-2s - 1 + 2s)   for a step s of log σ,   with the quadratic model ½ sᵀ(2I)s = ‖s‖²
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution, SquashedDiagGaussianDistribution
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from sb3_trpo_ext.core.arguments import check_finite, values_of
from sb3_trpo_ext.core.natural_step import Acceptance, Direction, Problem
from sb3_trpo_ext.core.reduction import ALONE, Reduction
from sb3_trpo_ext.policy.distributions import GaussianFamily, family_of
from sb3_trpo_ext.policy.problem import PolicyEvaluation
from sb3_trpo_ext.rollout.known_classes import KNOWN_POLICIES, owner_of

LogStd: TypeAlias = Literal["learned", "fixed"] | Schedule
"""Learnt by the policy gradient; as ``log_std_init`` made it; or log σ as a function of the remaining progress."""

SMALLEST, LARGEST = (math.log(bound) for bound in (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max))
"""Between which log σ must lie for a σ that float32 has."""

FARTHEST = 300.0
"""A step of log σ whose KL divergence float64 still has."""

ROUNDING = 1e-12
"""Relative error of a step's KL divergence."""

NEAR = 1e-5
"""How far above its lowest value log σ counts as being there: rounding does not leave a step exactly on it."""

ARGUMENTS = {"log_std": "learned", "log_std_min": None, "target_kl_std": None}
"""What a model may be given, and what leaves all as it is in SB3."""


def asked_of(model: Any) -> dict[str, Any]:
    """The arguments of a model that ask for something else than SB3's σ, by name."""
    given = {name: getattr(model, name, usual) for name, usual in ARGUMENTS.items()}
    return {name: value for name, value in given.items() if not _is(value, ARGUMENTS[name])}


def _is(value: Any, usual: str | None) -> bool:
    return value is None if usual is None else isinstance(value, str) and value == usual


def check_exploration(asked: dict[str, Any], action_space: spaces.Space, *, use_sde: bool) -> None:
    """Raise `ValueError` for arguments that cannot work, alone or together.

    Args:
        asked: See `asked_of`.
        action_space: That of the environment.
        use_sde: Whether gSDE explores.
    """
    for name, value in asked.items():
        if not isinstance(action_space, spaces.Box):
            raise ValueError(
                f"`{name}` is about the σ of Gaussian actions, got {value!r} with the action space {action_space}, "
                "which has none. Leave it out."
            )
        if use_sde:
            raise ValueError(
                f"`{name}` is about a σ that no state changes, got {value!r} with use_sde=True, whose σ depends on the "
                "state. Leave out one of the two."
            )
    _check_log_std(log_std := asked.get("log_std", "learned"))
    if "log_std_min" in asked:
        check_finite("log_std_min", asked["log_std_min"])
    for name in asked.keys() - {"log_std"} if "log_std" in asked else ():
        raise ValueError(
            f"`{name}` is about a σ that is learnt, got {asked[name]!r} with log_std={log_std!r}. Leave out one of the "
            "two."
        )


def _check_log_std(log_std: Any) -> None:
    if callable(log_std):
        check_finite("log_std", log_std)
        for progress, there in values_of(log_std):
            if not SMALLEST < there < LARGEST:
                raise ValueError(
                    f"`log_std` must lie between {SMALLEST:.3g} and {LARGEST:.3g} for a σ that float32 has, got "
                    f"{there} from its schedule where the remaining progress is {progress:.2g}."
                )
    elif log_std not in ("learned", "fixed"):
        raise ValueError(
            f"`log_std` must be 'learned', 'fixed' or a schedule of the remaining progress, got {log_std!r}. For a σ "
            "of your own that stays, pass 'fixed' and policy_kwargs={'log_std_init': ...}."
        )


def require_spread(policy: Any, asked: dict[str, Any]) -> nn.Parameter:
    """The log σ of a policy, if no state changes it; at construction.

    Raises:
        ValueError: If the policy has none, or begins below ``log_std_min``.
    """
    name, value = next(iter(asked.items()))
    kind = type(policy.action_dist)
    log_std: Any = getattr(policy, "log_std", None)
    reason = ""
    if kind not in (DiagGaussianDistribution, SquashedDiagGaussianDistribution):
        reason = f"its action distribution is {kind.__name__}"
    elif type(family_of(policy.action_dist)) is not GaussianFamily:
        reason = f"its action distribution is registered as {type(family_of(policy.action_dist)).__name__}"
    elif not isinstance(log_std, nn.Parameter) or log_std.shape != (policy.action_dist.action_dim,):
        reason = "it has no parameter `log_std` with a number for each action dimension"
    elif owner_of(policy, "_get_action_dist_from_latent", KNOWN_POLICIES) is None and _is_overruled(policy, log_std):
        reason = "its `_get_action_dist_from_latent` makes another σ than that of `log_std`"
    if reason:
        raise ValueError(
            f"`{name}` is about a σ that no state changes, as SB3's DiagGaussianDistribution has it, got {value!r} "
            f"with the policy {type(policy).__name__}: {reason}. Leave it out, or use such a policy."
        )
    lowest, first = asked.get("log_std_min"), float(log_std.detach().min())
    if lowest is not None and first < float(torch.tensor(float(lowest), dtype=log_std.dtype)):
        raise ValueError(
            f"`log_std_min` must not be above the log σ that the policy begins with, {first:.6g}, got {lowest}. Lower "
            "it, or raise policy_kwargs={'log_std_init': ...}."
        )
    return log_std


@torch.no_grad()
def _is_overruled(policy: Any, log_std: nn.Parameter) -> bool:
    """Whether a method of the user's own makes another σ of it for some latent state."""
    width = policy.mlp_extractor.latent_dim_pi
    latent = torch.stack([log_std.new_zeros(width), log_std.new_ones(width)])
    scale = policy._get_action_dist_from_latent(latent).distribution.scale
    return not torch.allclose(scale, log_std.exp().expand_as(scale))


@torch.no_grad()
def set_spread(policy: Any, log_std: LogStd, lowest: float | None, remaining: float | None) -> None:
    """Let log σ be what it is to be from here on, and, unless it is learnt, not be trained.

    Args:
        policy: The policy.
        log_std: See `LogStd`.
        lowest: Its lowest value; None for none.
        remaining: The remaining progress in [0, 1], at which a schedule is asked; None for not at all.
    """
    param: nn.Parameter = policy.log_std
    if lowest is not None:
        param.clamp_(min=representable(lowest, param))
    if log_std == "learned":
        return
    param.requires_grad_(False)
    param.grad = None
    if callable(log_std) and remaining is not None:
        value = float(log_std(remaining))
        check_finite("log_std", value)
        param.fill_(value)


def representable(lowest: float, like: Tensor) -> float:
    """The smallest number of a tensor's precision that is not below a bound."""
    found = torch.tensor(float(lowest), dtype=like.dtype)
    if float(found) < lowest:
        found = torch.nextafter(found, torch.tensor(math.inf, dtype=like.dtype))
    return float(found)


def spread_divergence(shift: Tensor) -> float:
    """KL_σ = Σ_a ½ (e^-2s - 1 + 2s) >= 0 of a step s of log σ, ``(A,)``."""
    y = -2.0 * shift.detach().cpu().double()
    return max(0.5 * float((torch.expm1(y) - y).sum()), 0.0)


def longest_step(direction: Tensor, radius: float) -> Tensor:
    """A step of log σ along a direction ``(A,)``, float64: to the boundary ‖s‖² = δ_σ, and KL_σ(s) <= δ_σ.

    Where σ falls, the KL divergence is larger than its quadratic model, and the step is the shorter one.
    """
    norm = float(direction.norm())
    if not 0 < norm < math.inf:
        return torch.zeros_like(direction)
    shift = direction * (math.sqrt(radius) / norm)
    scale = min(1.0, FARTHEST / float(shift.abs().max()))
    # KL_σ is convex along the step: from beyond the boundary Newton comes down to it, and never to the inside.
    while (excess := spread_divergence(scale * shift) - radius) > ROUNDING * radius:
        scale += excess / float((shift * torch.expm1(-2.0 * scale * shift)).sum())
    return scale * shift


class SpreadBlock:
    """log σ in a policy problem, where it has a lowest value or a radius of its own; otherwise nothing is changed.

    Args:
        problem: At θ_old.
        log_std: log σ; None, or a parameter that is not one of the problem's, where nothing is to be done about it.
        lowest: Its lowest value, which no trial of a line search is below; None for none.
        radius: δ_σ; None to let it share the radius of the mean.
        reduction: Between the workers whose samples the problem has.
    """

    def __init__(
        self,
        problem: Problem[PolicyEvaluation],
        log_std: nn.Parameter | None,
        *,
        lowest: float | None = None,
        radius: float | None = None,
        reduction: Reduction = ALONE,
    ) -> None:
        self._problem, self._radius, self._reduction = problem, radius, reduction
        self._param = log_std
        self._block = None if lowest is None and radius is None else _place_of(log_std, problem.params)
        self._lowest = None if lowest is None or log_std is None else representable(lowest, log_std)

    def solved(self, vector: Tensor) -> Tensor:
        """What F⁻¹ is to be applied to, ``(P,)``: v without the part that log σ does not take from the solution.

        That is all of log σ where its radius is its own, and those dimensions that are at their lowest and pulled
        below: F has zeros between them and the others, whose solution and share of the radius are as if they were not.
        """
        if self._block is None:
            return vector
        part = self._pulled(vector)
        rest = vector.clone()
        rest[self._block] = 0.0
        if self._radius is None or not bool(rest.any()):  # where σ alone has a gradient, it is the direction
            rest[self._block] = part
        return rest

    def log_entries(self) -> dict[str, float]:
        """What to log once the policy is as a step left it, where the radius is its own."""
        if self._block is None or self._radius is None or self._param is None:
            return {}
        shift = self._param.detach().double().flatten() - self._problem.theta_old[self._block].double()
        return {"train/target_kl_std": self._radius, "train/kl_std": spread_divergence(shift)}

    def _pulled(self, vector: Tensor) -> Tensor:
        """The part of log σ, zero where it is at its lowest and pulled below."""
        assert self._block is not None
        part = vector[self._block].clone()
        if self._lowest is not None:
            part[(self._problem.theta_old[self._block] <= self._lowest + NEAR) & (part < 0)] = 0.0
        return part

    def step(self, direction: Direction, size: float) -> SpreadStep:
        """The step of ``size`` times a direction with the part of log σ that its own radius and lowest value make."""
        if self._block is None or not 0 < size < math.inf:
            return SpreadStep(self._problem, direction)
        shift = size * direction.x[self._block].double()
        if self._radius is not None:
            shift = longest_step(self._pulled(direction.vector).cpu().double(), self._radius).to(shift)
        if self._lowest is not None:
            shift = torch.maximum(shift, self._lowest - self._problem.theta_old[self._block].double())
        if self._reduction.workers > 1:
            (shift,) = self._reduction.of_first([shift])
        x = direction.x.clone()
        x[self._block] = (shift / size).to(x)
        problem = self._problem
        if self._lowest is not None:
            assert self._param is not None
            problem = _Raised(problem, self._param, self._lowest)
        found = replace(direction, x=x, slope=float(problem.gradient.dot(x)))
        return SpreadStep(problem, found, shift if self._radius is not None else None)


@dataclass(frozen=True)
class SpreadStep:
    """A step of the mean and of log σ, to be tried by a line search.

    Attributes:
        problem: What is evaluated.
        direction: The step in multiples of the mean's.
        shift: The step of log σ, ``(A,)``, where its radius is its own; otherwise None.
    """

    problem: Problem[PolicyEvaluation]
    direction: Direction
    shift: Tensor | None = None

    def rejection(self, test: Acceptance) -> Callable[[PolicyEvaluation, float], str]:
        """A test whose bound on the KL divergence has room for KL_σ <= δ_σ beside the mean's δ."""
        if self.shift is None:
            return test.rejection
        shift, region = self.shift, test.region

        def rejection(evaluation: PolicyEvaluation, fraction: float) -> str:
            both = replace(region, radius=region.radius + spread_divergence(fraction * shift))  # type: ignore[type-var]
            return replace(test, region=both).rejection(evaluation, fraction)

        return rejection


@dataclass(frozen=True)
class _Raised:
    """A problem in which log σ is raised to its lowest value before it is looked at: rounding may leave it below."""

    problem: Problem[PolicyEvaluation]
    log_std: nn.Parameter
    lowest: float

    @property
    def params(self) -> Sequence[Tensor]:
        return self.problem.params

    @property
    def theta_old(self) -> Tensor:
        return self.problem.theta_old

    @property
    def gradient(self) -> Tensor:
        return self.problem.gradient

    @property
    def start(self) -> PolicyEvaluation:
        return self.problem.start

    @torch.no_grad()
    def evaluate(self) -> PolicyEvaluation:
        self.log_std.clamp_(min=self.lowest)
        return self.problem.evaluate()


def _place_of(param: nn.Parameter | None, params: Sequence[Tensor]) -> slice | None:
    """Where a parameter is in the vector of all of them; None if it is not among them."""
    start = 0
    for each in params:
        if each is param:
            return slice(start, start + each.numel())
        start += each.numel()
    return None
