"""The natural-gradient step: solve F x = g, go to the boundary, backtrack, and keep the step or undo it.

    direction = natural_direction(fisher, problem, max_steps=10)                  # x ≈ F⁻¹g
    size = boundary_scale(direction.curvature, radius)                            # ½ sᵀFs = δ
    test = Acceptance(TrustRegion(radius), problem.start, size * direction.slope)
    step = backtrack(problem, direction, size, test.rejection)                    # θ_old + β^k s, or θ_old

Policy, critic, the tabular laboratory and the tests take it from here (Schulman et al. 2015, appendix C).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sb3_trpo_ext.core.conjugate_gradient import CGResult, conjugate_gradient
from sb3_trpo_ext.core.curvature import GaussNewtonProduct
from sb3_trpo_ext.core.parameters import assign
from sb3_trpo_ext.core.reduction import ALONE, Reduction

STOPS = (
    "converged",
    "max steps",
    "zero right-hand side",
    "non-positive curvature",
    "non-finite curvature",
)
"""Why conjugate gradients stop; see `CGResult`."""


class Evaluation(Protocol):
    """What is known of the model at some parameters."""

    @property
    def objective(self) -> float:
        """L(θ), or minus a loss: what is to increase."""

    @property
    def divergence(self) -> float:
        """D(θ), the distance from θ_old; 0 where nothing bounds it."""


EvaluationT = TypeVar("EvaluationT", bound=Evaluation)
EvaluationT_co = TypeVar("EvaluationT_co", bound=Evaluation, covariant=True)


class Problem(Protocol[EvaluationT_co]):
    """Increase an objective around θ_old, the parameters with which the problem was made."""

    @property
    def params(self) -> Sequence[Tensor]:
        """θ, P numbers in all, to be written to in place."""

    @property
    def theta_old(self) -> Tensor:
        """θ_old, ``(P,)``."""

    @property
    def gradient(self) -> Tensor:
        """g, the gradient of the objective at θ_old, ``(P,)``."""

    @property
    def start(self) -> EvaluationT_co:
        """The evaluation at θ_old."""

    def evaluate(self) -> EvaluationT_co:
        """Evaluate with the parameters as they are now."""


@dataclass(frozen=True)
class Direction:
    """x ≈ (F + λI)⁻¹ v at θ_old.

    Attributes:
        vector: v, ``(P,)``.
        x: The direction, ``(P,)``.
        slope: gᵀx, what the objective gains a unit of step size to first order.
        curvature: xᵀ(F + λI)x.
        boundary_curvature: What the boundary of a trust region is measured with; see `boundary_curvature`.
        cg: The record of the conjugate gradients.
    """

    vector: Tensor
    x: Tensor
    slope: float
    curvature: float
    boundary_curvature: float
    cg: CGResult

    @property
    def is_usable(self) -> bool:
        """Whether there is anywhere to go: positive and finite curvature."""
        return 0 < self.curvature < math.inf


def natural_direction(
    fisher: GaussNewtonProduct,
    problem: Problem[Any],
    vector: Tensor | None = None,
    *,
    max_steps: int,
    residual_tol: float = 1e-5,
    min_radius_used: float = 0.0,
    reduction: Reduction = ALONE,
) -> Direction:
    """Solve (F + λI) x = v by conjugate gradients.

    Workers solve it each for itself, and all take what the first one found: another processor rounds otherwise.

    Args:
        fisher: Products with F + λI.
        problem: Whose gradient tells the slope.
        vector: v; None for the gradient itself.
        max_steps: Most products.
        residual_tol: Relative residual to stop at.
        min_radius_used: u of `boundary_curvature`.
        reduction: Between the workers whose samples the problem has.
    """
    vector = problem.gradient if vector is None else vector
    cg = conjugate_gradient(fisher, vector, max_steps=max_steps, residual_tol=residual_tol)
    boundary = cg.curvature
    if min_radius_used and 0 < cg.curvature < math.inf:
        undamped = fisher.undamped_curvature(cg.solution, cg.curvature)
        boundary = boundary_curvature(cg.curvature, undamped, min_radius_used)
    slope = float(problem.gradient.dot(cg.solution))
    found = Direction(vector, cg.solution, slope, cg.curvature, boundary, cg)
    return found if reduction.workers == 1 else _of_first(found, reduction)


def _of_first(found: Direction, reduction: Reduction) -> Direction:
    """The direction that the first worker found."""
    cg = found.cg
    numbers = [found.slope, found.boundary_curvature, cg.curvature, cg.steps, cg.residual, STOPS.index(cg.stop)]
    x, told = reduction.of_first([found.x, torch.tensor(numbers, dtype=torch.float64)])
    slope, boundary, curvature, steps, residual, stop = told.tolist()
    cg = CGResult(x, curvature, int(steps), residual, STOPS[int(stop)])
    return Direction(found.vector, x, slope, curvature, boundary, cg)


def boundary_scale(curvature: float, radius: float) -> float:
    """Factor sqrt(2δ / xᵀFx) that brings x to the boundary ½ sᵀFs = δ of the quadratic trust region.

    Args:
        curvature: xᵀFx > 0, finite.
        radius: δ > 0.

    Source: Schulman et al. (2015), appendix C.
    """
    return math.sqrt(2.0 * radius / curvature)


def boundary_curvature(damped: float, undamped: float, min_used: float) -> float:
    """The curvature that the boundary is measured with, so that damping leaves a step a share of the radius.

    Scaled by xᵀ(F + λI)x a step uses the share xᵀFx / xᵀ(F + λI)x of δ in the undamped model, which goes to zero with
    the entries of F. Scaled by the smaller of xᵀ(F + λI)x and xᵀFx / u it uses that share, but u at least; its
    direction stays, and where the share is u anyway its length too.

    Args:
        damped: xᵀ(F + λI)x > 0.
        undamped: xᵀFx.
        min_used: u in [0, 1]: 0 measures with damping alone, 1 without.
    """
    return min(damped, undamped / min_used) if min_used and undamped > 0 else damped


class Region(Protocol):
    """What a step must increase, and what must stay small."""

    @property
    def radius(self) -> float:
        """δ, the bound on the divergence; ``math.inf`` for none."""

    def objective(self, evaluation: Any) -> float:
        """What must increase."""

    def divergence(self, evaluation: Any) -> float:
        """What must stay below the radius."""


@dataclass(frozen=True)
class TrustRegion:
    """L(θ) must increase and D(θ) <= δ (Schulman et al. 2015, equation 14).

    Attributes:
        radius: δ; ``math.inf``, the default, for no constraint.
    """

    radius: float = math.inf

    def objective(self, evaluation: Evaluation) -> float:
        """L(θ)."""
        return evaluation.objective

    def divergence(self, evaluation: Evaluation) -> float:
        """D(θ)."""
        return evaluation.divergence


@dataclass(frozen=True)
class Acceptance:
    """The test of a trial point: enough improvement, inside the region.

    Written in accepting form, so that a NaN anywhere fails it.

    Attributes:
        region: What is to increase, and what is bounded.
        start: The evaluation at θ_old.
        expected: Improvement that the linear model predicts for the full step, gᵀs.
        ratio: Fraction of the predicted improvement that is required; 0 accepts any improvement.
    """

    region: Region
    start: Evaluation
    expected: float
    ratio: float = 0.0

    def rejection(self, evaluation: Evaluation, fraction: float) -> str:
        """Empty if a trial at ``fraction`` of the full step is accepted, otherwise the reason in words."""
        objective, divergence = self.region.objective(evaluation), self.region.divergence(evaluation)
        improvement = objective - self.region.objective(self.start)
        required = self.ratio * fraction * self.expected
        if 0 < improvement < math.inf and improvement >= required and divergence <= self.region.radius:
            return ""
        if not math.isfinite(objective):
            return "the objective at the trial point is not finite"
        if not math.isfinite(divergence):
            return "the KL divergence at the trial point is not finite"
        if divergence > self.region.radius:
            return "the KL divergence exceeds the radius"
        if improvement <= 0:
            return "the objective does not improve"
        return "the objective improves by less than the required fraction of the predicted improvement"


@dataclass(frozen=True)
class Step(Generic[EvaluationT]):
    """What came of a step.

    Attributes:
        evaluation: The model as the step leaves it: the accepted trial, or `Problem.start`.
        direction: Where it went; None if that was not even asked.
        size: The full step in multiples of x.
        fraction: Accepted fraction of it; 0 if it was rejected.
        reason: Why it was rejected, in words; empty if it was accepted.
    """

    evaluation: EvaluationT
    direction: Direction | None = None
    size: float = 0.0
    fraction: float = 0.0
    reason: str = ""

    @property
    def expected_improvement(self) -> float:
        """gᵀs at the accepted fraction of the step, at the full step if it was rejected."""
        if self.direction is None or not self.size:
            return 0.0
        return self.direction.slope * self.size * (self.fraction or 1.0)


def backtrack(
    problem: Problem[EvaluationT],
    direction: Direction,
    size: float,
    rejection: Callable[[EvaluationT, float], str],
    *,
    shrink: float = 0.8,
    max_steps: int = 10,
) -> Step[EvaluationT]:
    """Try the fractions 1, β, β², … of a step and keep the first that is accepted; θ_old, bit for bit, if none is.

    Args:
        problem: At θ_old.
        direction: x.
        size: The full step, in multiples of x.
        rejection: Why the evaluation at a fraction of the full step is rejected; empty if it is accepted.
        shrink: β in (0, 1).
        max_steps: Most trials.

    Source: Schulman et al. (2015), appendix C.
    """
    fraction, reason = 1.0, "no step was tried"
    for _ in range(max_steps):
        evaluation = evaluate_at(problem, direction, fraction * size)
        reason = rejection(evaluation, fraction)
        if not reason:
            return Step(evaluation, direction, size, fraction)
        fraction *= shrink
    assign(problem.params, problem.theta_old)
    return Step(problem.start, direction, size, 0.0, reason)


def evaluate_at(problem: Problem[EvaluationT], direction: Direction, size: float) -> EvaluationT:
    """Go to θ_old + size · x and evaluate there."""
    assign(problem.params, problem.theta_old + size * direction.x)
    return problem.evaluate()
