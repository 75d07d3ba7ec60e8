import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sb3_trpo_ext.core.conjugate_gradient import conjugate_gradient
from sb3_trpo_ext.core.curvature import GaussNewtonProduct, Linearization
from sb3_trpo_ext.core.natural_step import (
    Acceptance,
    Direction,
    Problem,
    Step,
    TrustRegion,
    backtrack,
    boundary_curvature,
    boundary_scale,
    natural_direction,
)
from sb3_trpo_ext.core.objectives import clipped_surrogate, importance_sampled_surrogate

ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)


@dataclass(frozen=True)
class Point:
    objective: float
    divergence: float


class Quadratic:
    """L(θ) = bᵀd - ½c‖d‖² and D(θ) = ½ dᵀFd with d = θ - θ_old and F = JᵀJ, in two tensors."""

    def __init__(self, seed: int, bend: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.params = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 2), (1,))]
        for param in self.params:
            param.requires_grad_()
        self.theta_old = self._theta()
        self.jacobian = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        self.gradient = torch.randn(5, generator=generator, dtype=torch.float64)
        self.bend = bend
        self.start = self.evaluate()

    def _theta(self) -> Tensor:
        return torch.cat([param.detach().flatten() for param in self.params])

    @property
    def moved(self) -> Tensor:
        return self._theta() - self.theta_old

    def evaluate(self) -> Point:
        d = self.moved
        return Point(
            float(self.gradient @ d - 0.5 * self.bend * d @ d), float(0.5 * (self.jacobian @ d).square().sum())
        )

    def fisher(self, damping: float) -> GaussNewtonProduct:
        def outputs() -> tuple[Linearization, Any]:
            z = self.jacobian @ torch.cat([param.flatten() for param in self.params])
            return Linearization(z, self.params), lambda v: v

        return GaussNewtonProduct([outputs], damping)

    def direction(self, damping: float = 0.1, **options: Any) -> Direction:
        return natural_direction(self.fisher(damping), self, **{"max_steps": 50, "residual_tol": 1e-12, **options})


class Line:
    """A problem in one number, evaluated by a function of it."""

    def __init__(self, evaluated: Callable[[float], Point]) -> None:
        self.params, self.theta_old, self.gradient = [torch.zeros(1)], torch.zeros(1), torch.ones(1)
        self._evaluated = evaluated
        self.tried: list[float] = []
        self.start = evaluated(0.0)

    def evaluate(self) -> Point:
        self.tried.append(float(self.params[0]))
        return self._evaluated(self.tried[-1])

    def step(self, acceptance: Acceptance, **options: Any) -> Step[Point]:
        direction = natural_direction(GaussNewtonProduct([], 1.0), self, max_steps=1)
        return backtrack(self, direction, 1.0, acceptance.rejection, **options)


def unchanged(problem: Problem[Any]) -> bool:
    """Whether the parameters are θ_old, bit for bit."""
    now = torch.cat([param.detach().flatten() for param in problem.params])
    return now.numpy().tobytes() == problem.theta_old.numpy().tobytes()


@given(seed=st.integers(0, 1000), radius=st.floats(1e-6, 10))
def test_the_step_meets_the_boundary_of_the_quadratic_model(seed: int, radius: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    matrix = root @ root.T + 0.1 * torch.eye(5, dtype=torch.float64)
    result = conjugate_gradient(matrix.mv, torch.randn(5, generator=generator, dtype=torch.float64), max_steps=3)
    step = boundary_scale(result.curvature, radius) * result.solution
    assert float(0.5 * step @ matrix @ step) == pytest.approx(radius, rel=1e-6)


@given(seed=st.integers(0, 1000), damping=st.floats(1e-2, 10), weight=st.floats(-2, 2))
def test_a_direction_solves_the_damped_system_and_knows_its_slope_and_curvature(
    seed: int, damping: float, weight: float
) -> None:
    problem = Quadratic(seed)
    other = torch.flip(problem.gradient, (0,)) + weight
    matrix = problem.jacobian.T @ problem.jacobian + damping * torch.eye(5, dtype=torch.float64)
    for vector in (None, other):
        direction = problem.direction(damping, vector=vector)
        expected = problem.gradient if vector is None else vector
        assert direction.vector is expected
        torch.testing.assert_close(matrix @ direction.x, expected, rtol=1e-6, atol=1e-6)
        assert direction.slope == pytest.approx(float(problem.gradient @ direction.x))
        assert direction.curvature == pytest.approx(float(direction.x @ matrix @ direction.x), rel=1e-6)
        assert direction.boundary_curvature == direction.curvature
        assert direction.is_usable


@given(seed=st.integers(0, 1000), damping=st.floats(1e-2, 100), used=st.floats(0.01, 1))
def test_the_boundary_may_be_measured_with_less_damping(seed: int, damping: float, used: float) -> None:
    problem = Quadratic(seed)
    direction = problem.direction(damping, min_radius_used=used)
    undamped = float((problem.jacobian @ direction.x).square().sum())
    expected = boundary_curvature(direction.curvature, undamped, used)
    assert direction.boundary_curvature == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(direction.x, problem.direction(damping).x)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_there_is_nowhere_to_go_without_a_usable_gradient(value: float) -> None:
    problem = Quadratic(0)
    problem.gradient[0 if math.isfinite(value) else 1 :] = value
    assert not problem.direction(max_steps=3, min_radius_used=0.6).is_usable


@given(
    seed=st.integers(0, 1000),
    radius=st.floats(1e-6, 10),
    bend=st.floats(0, 1e3),
    ratio=st.floats(0, 0.99),
    trials=st.integers(1, 12),
)
def test_a_step_is_inside_the_region_and_better_or_leaves_every_bit(
    seed: int, radius: float, bend: float, ratio: float, trials: int
) -> None:
    problem = Quadratic(seed, bend)
    direction = problem.direction()
    size = boundary_scale(direction.curvature, radius)
    test = Acceptance(TrustRegion(radius), problem.start, size * direction.slope, ratio)
    step = backtrack(problem, direction, size, test.rejection, max_steps=trials)
    assert step.size == size and step.direction is direction
    assert bool(step.reason) == (step.fraction == 0)
    if step.reason:
        assert unchanged(problem) and step.evaluation is problem.start
        assert step.expected_improvement == pytest.approx(size * direction.slope)
        return
    torch.testing.assert_close(problem.moved, step.fraction * size * direction.x)
    assert step.evaluation == problem.evaluate()
    assert step.fraction in [pytest.approx(0.8**k) for k in range(trials)]
    assert step.expected_improvement == pytest.approx(step.fraction * size * direction.slope)
    assert step.evaluation.divergence <= radius
    assert step.evaluation.objective > 0
    assert step.evaluation.objective >= ratio * step.expected_improvement


@given(objective=ANY_FLOAT, divergence=ANY_FLOAT, start=st.floats(-10, 10), ratio=st.floats(0, 0.9))
def test_accepted_means_better_and_inside_the_region(
    objective: float, divergence: float, start: float, ratio: float
) -> None:
    acceptance = Acceptance(TrustRegion(0.01), Point(start, 0.0), expected=0.5, ratio=ratio)
    if not acceptance.rejection(Point(objective, divergence), 0.5):
        assert math.isfinite(objective)
        assert objective > start
        assert objective - start >= ratio * 0.25
        assert divergence <= 0.01


@pytest.mark.parametrize(
    ("point", "words"),
    [
        (Point(math.nan, 0.0), "objective at the trial point is not finite"),
        (Point(math.inf, 0.0), "objective at the trial point is not finite"),
        (Point(2.0, math.nan), "KL divergence at the trial point is not finite"),
        (Point(2.0, 0.02), "exceeds the radius"),
        (Point(1.0, 0.001), "does not improve"),
        (Point(1.1, 0.001), "less than the required fraction"),
        (Point(1.9, 0.01), ""),
    ],
)
def test_each_rejection_has_its_reason(point: Point, words: str) -> None:
    reason = Acceptance(TrustRegion(0.01), Point(1.0, 0.0), expected=1.0, ratio=0.5).rejection(point, 1.0)
    assert words in reason
    assert bool(words) == bool(reason)


def test_backtracking_takes_the_first_accepted_fraction() -> None:
    line = Line(lambda at: Point(at, at**2))
    step = line.step(Acceptance(TrustRegion(0.3), line.start, 1.0), shrink=0.5)
    assert line.tried == [1.0, 0.5]
    assert (step.fraction, step.evaluation, step.reason) == (0.5, Point(0.5, 0.25), "")
    assert float(line.params[0]) == 0.5


def test_backtracking_gives_up_with_the_last_reason() -> None:
    line = Line(lambda at: Point(-at, 0.0))
    step = line.step(Acceptance(TrustRegion(1.0), line.start, 1.0), max_steps=3)
    assert len(line.tried) == 3
    assert step.evaluation is line.start
    assert step.fraction == 0
    assert "does not improve" in step.reason
    assert unchanged(line)


def test_another_region_has_another_objective_and_divergence() -> None:
    class Swapped(TrustRegion):
        def objective(self, evaluation: Any) -> float:
            return -evaluation.divergence

        def divergence(self, evaluation: Any) -> float:
            return evaluation.objective

    test = Acceptance(Swapped(0.5), Point(0.0, 3.0), expected=1.0)
    assert test.rejection(Point(0.4, 2.0), 1.0) == ""
    assert "exceeds the radius" in test.rejection(Point(0.6, 2.0), 1.0)
    assert "does not improve" in test.rejection(Point(0.4, 3.5), 1.0)


@given(log_ratio=st.floats(-2, 2), advantage=st.floats(-5, 5), clip=st.floats(0.05, 0.5))
def test_clipping_is_a_lower_bound_that_binds_only_away_from_one(
    log_ratio: float, advantage: float, clip: float
) -> None:
    ratio, adv = torch.tensor([log_ratio], dtype=torch.float64).exp(), torch.tensor([advantage], dtype=torch.float64)
    clipped, plain = clipped_surrogate(ratio, adv, clip), importance_sampled_surrogate(ratio, adv)
    assert clipped <= plain
    if 1 - clip <= ratio <= 1 + clip:
        assert clipped == plain


def test_surrogates_have_the_policy_gradient_at_ratio_one() -> None:
    advantages = torch.randn(6, dtype=torch.float64)
    for surrogate in (importance_sampled_surrogate, lambda r, a: clipped_surrogate(r, a, 0.2)):
        log_ratio = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        surrogate(log_ratio.exp(), advantages).sum().backward()
        assert torch.equal(log_ratio.grad, advantages)
