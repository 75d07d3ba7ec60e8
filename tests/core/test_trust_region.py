import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sb3_trpo_ext.core.conjugate_gradient import conjugate_gradient
from sb3_trpo_ext.core.natural_step import Acceptance, backtracking_line_search, boundary_scale
from sb3_trpo_ext.core.objectives import clipped_surrogate, importance_sampled_surrogate
from sb3_trpo_ext.training.transaction import Atomic, Checkpoint

ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)


@dataclass(frozen=True)
class Point:
    objective: float
    divergence: float


@given(seed=st.integers(0, 1000), radius=st.floats(1e-6, 10))
def test_the_step_meets_the_boundary_of_the_quadratic_model(seed: int, radius: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    matrix = root @ root.T + 0.1 * torch.eye(5, dtype=torch.float64)
    result = conjugate_gradient(matrix.mv, torch.randn(5, generator=generator, dtype=torch.float64), max_steps=3)
    step = boundary_scale(result.curvature, radius) * result.solution
    assert float(0.5 * step @ matrix @ step) == pytest.approx(radius, rel=1e-6)


@given(objective=ANY_FLOAT, divergence=ANY_FLOAT, start=st.floats(-10, 10), ratio=st.floats(0, 0.9))
def test_accepted_means_better_and_inside_the_region(
    objective: float, divergence: float, start: float, ratio: float
) -> None:
    acceptance = Acceptance(start, radius=0.01, expected=0.5, ratio=ratio)
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
    reason = Acceptance(1.0, radius=0.01, expected=1.0, ratio=0.5).rejection(point, 1.0)
    assert words in reason
    assert bool(words) == bool(reason)


def test_backtracking_takes_the_first_accepted_fraction() -> None:
    tried = []

    def trial_at(fraction: float) -> Point:
        tried.append(fraction)
        return Point(fraction, fraction**2)

    result = backtracking_line_search(trial_at, Acceptance(0.0, 0.3, 1.0), shrink=0.5)
    assert tried == [1.0, 0.5]
    assert (result.fraction, result.trial, result.reason) == (0.5, Point(0.5, 0.25), "")


def test_backtracking_gives_up_with_the_last_reason() -> None:
    result = backtracking_line_search(lambda f: Point(-f, 0.0), Acceptance(0.0, 1.0, 1.0), max_steps=3)
    assert result.trial is None
    assert result.fraction == 0
    assert "does not improve" in result.reason


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_block_leaves_the_same_bits(error: type[BaseException]) -> None:
    tensor = torch.tensor([float("nan"), -0.0, 5e-324, float("inf")], dtype=torch.float64)
    bits = tensor.view(torch.int64).clone()
    with pytest.raises(error), Atomic(Checkpoint([tensor])):
        tensor.fill_(1.0)
        raise error
    assert torch.equal(tensor.view(torch.int64), bits)


def test_a_finished_block_keeps_its_changes() -> None:
    tensor = torch.zeros(2)
    with Atomic(Checkpoint([tensor])):
        tensor.fill_(1.0)
    assert torch.equal(tensor, torch.ones(2))


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
