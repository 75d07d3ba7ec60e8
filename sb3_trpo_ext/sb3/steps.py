"""A step of the policy in three parts: where to go, how far a method went, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from sb3_trpo_ext.core.vectors import assign
from sb3_trpo_ext.sb3.policy_problem import PolicyEvaluation


@dataclass(frozen=True)
class Direction:
    """x ≈ F⁻¹g at θ_old, and a way to go along it.

    Attributes:
        params: The actor's parameters.
        theta_old: Their values at the start, ``(P,)``.
        x: The direction, ``(P,)``.
        slope: gᵀx, which the objective gains a unit of step size to first order.
        curvature: xᵀFx > 0, damping included.
        boundary_curvature: What the boundary of the trust region is measured with; see `core.trust_region`.
        whole: Whether a line search may take the full step only, not a fraction of it.
    """

    params: list[nn.Parameter]
    theta_old: Tensor
    x: Tensor
    slope: float
    curvature: float
    boundary_curvature: float
    whole: bool = False

    def go_to(self, step_size: float) -> None:
        """Set the parameters to θ_old + step_size · x."""
        assign(self.params, self.theta_old + step_size * self.x)


@dataclass(frozen=True)
class Move:
    """How far a method went along a `Direction`.

    Attributes:
        evaluation: The policy there; None if nothing was accepted.
        step_size: The full step, in multiples of x.
        fraction: Accepted fraction of it; 0 if rejected.
        reason: Why it was rejected, in words; empty if it was accepted.
    """

    evaluation: PolicyEvaluation | None
    step_size: float
    fraction: float = 1.0
    reason: str = ""


@dataclass(frozen=True)
class PolicyStep:
    """What one policy step did.

    Attributes:
        gradients: ∇L at θ_old for each parameter that the policy's output reaches.
        evaluation: The policy that the step leaves, on its batch.
        step_size: The step in multiples of x ≈ F⁻¹g, as accepted; 0 if rejected.
        fraction: Accepted fraction of the full step; 0 if rejected.
        improvement: L(θ) - L(θ_old).
        expected_improvement: gᵀs at that fraction of the step (at the full step if rejected).
        cg_steps: Conjugate-gradient iterations.
        cg_residual: Their relative residual.
        momentum: Weight of the previous directions in the one taken.
        reason: Why the step was rejected; empty if it was accepted.
    """

    gradients: Mapping[nn.Parameter, Tensor]
    evaluation: PolicyEvaluation
    step_size: float = 0.0
    fraction: float = 0.0
    improvement: float = 0.0
    expected_improvement: float = 0.0
    cg_steps: int = 0
    cg_residual: float = 0.0
    momentum: float = 0.0
    reason: str = ""

    @property
    def actor(self) -> frozenset[nn.Parameter]:
        """The parameters that the policy's output reaches."""
        return frozenset(self.gradients)


class StepAlong(Protocol):
    """The step that a method takes along F⁻¹v."""

    def __call__(self, vector: Tensor, *, whole: bool = False) -> PolicyStep:
        """Take it for a vector v, the full one only if ``whole``."""
