from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import cg as scipy_cg
from torch import Tensor

from sb3_trpo_ext.core.conjugate_gradient import conjugate_gradient

SYSTEMS = {"seed": st.integers(0, 10_000), "size": st.integers(1, 20)}


def system(seed: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.T + 0.5 * torch.eye(size, dtype=torch.float64), torch.randn(
        size, generator=generator, dtype=torch.float64
    )


@given(**SYSTEMS)
def test_solves_the_linear_system(seed: int, size: int) -> None:
    matrix, b = system(seed, size)
    result = conjugate_gradient(matrix.mv, b, max_steps=10 * size, residual_tol=1e-12)
    torch.testing.assert_close(result.solution, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-8)
    second_opinion, info = scipy_cg(matrix.numpy(), b.numpy(), rtol=1e-12)
    assert info == 0
    torch.testing.assert_close(result.solution, torch.from_numpy(second_opinion), rtol=1e-7, atol=1e-8)


@given(**SYSTEMS, steps=st.integers(1, 5))
def test_its_record_is_true(seed: int, size: int, steps: int) -> None:
    matrix, b = system(seed, size)
    result = conjugate_gradient(matrix.mv, b, max_steps=steps, residual_tol=0.1)
    x = result.solution
    assert result.steps <= steps
    assert result.residual == pytest.approx(float((b - matrix @ x).norm() / b.norm()), abs=1e-8)
    assert result.curvature == pytest.approx(float(x @ matrix @ x), rel=1e-6)
    assert (result.stop == "converged") == (result.residual <= 0.1)


@given(**SYSTEMS)
def test_each_step_lowers_the_error_in_the_energy_norm(seed: int, size: int) -> None:
    matrix, b = system(seed, size)
    exact = torch.linalg.solve(matrix, b)
    errors = []
    for steps in range(1, size + 1):
        error = conjugate_gradient(matrix.mv, b, max_steps=steps, residual_tol=0).solution - exact
        errors.append(float(error @ matrix @ error))
    assert all(later <= earlier * (1 + 1e-9) + 1e-12 for earlier, later in pairwise(errors))


@given(**SYSTEMS, shift=st.sampled_from([0.0, -2.0]), tol=st.sampled_from([0.0, 1e-3, 0.1, 0.9]))
def test_to_look_seldom_whether_it_has_stopped_changes_nothing(seed: int, size: int, shift: float, tol: float) -> None:
    matrix, b = system(seed, size)
    matrix = matrix + shift * torch.eye(size, dtype=torch.float64)
    often, seldom, never = (
        conjugate_gradient(matrix.mv, b, max_steps=2 * size, residual_tol=tol, check_every=interval)
        for interval in (1, 3, 1000)
    )
    for other in (seldom, never):
        assert torch.equal(often.solution, other.solution)
        assert (often.steps, often.stop) == (other.steps, other.stop)
        assert (often.residual, often.curvature) == (other.residual, other.curvature)


def test_a_zero_right_hand_side_has_the_solution_zero() -> None:
    result = conjugate_gradient(lambda v: v, torch.zeros(3))
    assert result.stop == "zero right-hand side"
    assert result.steps == 0
    assert not result.solution.any()


def test_negative_curvature_returns_the_iterate_before_it() -> None:
    diagonal = torch.tensor([1.0, 10.0, -5.0], dtype=torch.float64)
    b = torch.tensor([1.0, 1.0, 0.1], dtype=torch.float64)
    result = conjugate_gradient(lambda v: diagonal * v, b, max_steps=3, residual_tol=0)
    assert result.stop == "non-positive curvature"
    expected = conjugate_gradient(lambda v: diagonal * v, b, max_steps=result.steps, residual_tol=0)
    assert torch.equal(result.solution, expected.solution)


@pytest.mark.parametrize(
    ("curvature", "stop"),
    [
        (-1.0, "non-positive curvature"),
        (0.0, "non-positive curvature"),
        (float("nan"), "non-finite curvature"),
        (float("inf"), "non-finite curvature"),
    ],
)
def test_useless_curvature_at_once_leaves_zero(curvature: float, stop: str) -> None:
    result = conjugate_gradient(lambda v: curvature * v, torch.ones(3))
    assert (result.stop, result.steps) == (stop, 0)
    assert not result.solution.any()


def test_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    conjugate_gradient(lambda v: 2 * v, torch.ones(3))
    assert torch.equal(before, torch.get_rng_state())
