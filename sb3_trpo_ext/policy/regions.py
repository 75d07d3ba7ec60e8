"""The trust regions of the paper: by the mean KL divergence, by the largest one, and a penalty in their place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sb3_trpo_ext.core.natural_step import Direction, TrustRegion, boundary_scale, evaluate_at
from sb3_trpo_ext.policy.problem import PolicyEvaluation, PolicyProblem

AIM = 0.95
"""The share of its bound that a step shortened to the largest KL aims at: exactly at it, half of them would miss."""

LOOKS = 2
"""After one, a tenth to a fifth of the steps still miss, as the largest KL is not quite quadratic."""


class MeanRegion(TrustRegion):
    """E_s[KL(π_old‖π_θ)] <= δ (Schulman et al. 2015, equation 12)."""

    def full_step(self, problem: PolicyProblem, direction: Direction) -> float:
        """The step size at which the line search begins, in multiples of x: the boundary of the quadratic model."""
        return boundary_scale(direction.boundary_curvature, self.radius)


class LargestRegion(MeanRegion):
    """max_s KL(π_old‖π_θ) <= δ (Schulman et al. 2015, equation 11)."""

    def divergence(self, evaluation: PolicyEvaluation) -> float:  # type: ignore[override]
        """The largest KL divergence of a state."""
        return evaluation.kl_max

    def full_step(self, problem: PolicyProblem, direction: Direction) -> float:
        """The boundary for the mean, shortened where a look at the largest KL there asks for it, twice at most."""
        size = super().full_step(problem, direction)
        for _ in range(LOOKS):
            kl_max = evaluate_at(problem, direction, size).kl_max
            if not self.radius < kl_max < math.inf:
                break
            size *= math.sqrt(AIM * self.radius / kl_max)
        return size


@dataclass(frozen=True)
class Penalty(MeanRegion):
    """L(θ) - C · max_s KL(π_old‖π_θ) must increase, and nothing is bounded (Schulman et al. 2015, equations 9 and 10).

    Attributes:
        penalty: C > 0.
    """

    penalty: float = 0.0

    def objective(self, evaluation: PolicyEvaluation) -> float:  # type: ignore[override]
        """L(θ) - C · KL_max."""
        return evaluation.objective - self.penalty * evaluation.kl_max

    def full_step(self, problem: PolicyProblem, direction: Direction) -> float:
        """The maximum of gᵀs - C ½ sᵀFs along x."""
        return direction.slope / (self.penalty * direction.curvature)
