from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sb3_trpo_ext.core.curvature import GaussNewtonProduct, Linearization, Segment
from sb3_trpo_ext.core.parameters import assign, flatten, unflatten


class Problem:
    """A small tanh network with one parameter that its output does not reach, and a metric for each sample."""

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.params = [*self.net.parameters(), nn.Parameter(torch.ones(2, dtype=torch.float64))]
        self.x = torch.randn(7, 3, dtype=torch.float64)
        self.scale = torch.rand(7, 2, dtype=torch.float64) + 0.1
        self.size = sum(param.numel() for param in self.params)

    def segments(self, size: int) -> list[Segment]:
        def segment(start: int) -> Segment:
            part = slice(start, start + size)
            return lambda: (Linearization(self.net(self.x[part]), self.params), lambda v: self.scale[part] * v)

        return [segment(start) for start in range(0, 7, size)]

    def jacobian(self) -> Tensor:
        theta = flatten(self.params).detach()

        def outputs(vector: Tensor) -> Tensor:
            pieces = dict(zip(dict(self.net.named_parameters()), unflatten(vector, self.params), strict=False))
            return torch.func.functional_call(self.net, pieces, (self.x,)).reshape(-1)

        return torch.func.jacfwd(outputs)(theta)


@pytest.fixture
def problem() -> Problem:
    return Problem()


def test_products_with_the_jacobian_match_the_dense_one(problem: Problem) -> None:
    linear, dense = Linearization(problem.net(problem.x), problem.params), problem.jacobian()
    v, w = torch.randn(problem.size, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    torch.testing.assert_close(linear.jvp(v).reshape(-1), dense @ v)
    torch.testing.assert_close(linear.vjp(w), dense.T @ w.reshape(-1))


@pytest.mark.parametrize("chunk", [7, 3, 1])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_product_is_the_dense_gauss_newton_matrix(problem: Problem, chunk: int, damping: float) -> None:
    product = GaussNewtonProduct(problem.segments(chunk), damping)
    eye = torch.eye(problem.size, dtype=torch.float64)
    matrix = torch.stack([product(row) for row in eye])
    dense = problem.jacobian()
    torch.testing.assert_close(matrix, dense.T @ torch.diag(problem.scale.reshape(-1)) @ dense + damping * eye)
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() >= damping - 1e-10


@pytest.mark.parametrize(("chunk", "runs"), [(7, 1), (4, 6)])
def test_one_segment_is_run_once_and_several_at_each_product(problem: Problem, chunk: int, runs: int) -> None:
    count = 0

    def counted(segment: Segment) -> Callable[[], object]:
        def run() -> object:
            nonlocal count
            count += 1
            return segment()

        return run

    product = GaussNewtonProduct([counted(s) for s in problem.segments(chunk)], 0.1)  # type: ignore
    for _ in range(3):
        product(torch.ones(problem.size, dtype=torch.float64))
    assert count == runs


def test_vectors_and_parameters_convert_both_ways_in_place() -> None:
    params = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(4))]
    pointers, versions = [p.data_ptr() for p in params], [p._version for p in params]
    vector = torch.arange(11.0)
    assign(params, vector)
    assert torch.equal(flatten(params), vector)
    assert [p.data_ptr() for p in params] == pointers
    assert all(p._version > version for p, version in zip(params, versions, strict=True))
