from typing import Any

import pytest
import torch
from envs import in_float64, make
from hypothesis import given
from hypothesis import strategies as st

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.sb3.batch import Batch
from sb3_trpo_ext.sb3.critic import GaussNewtonCritic, ValueFunction, ValueProblem


def regression(size: int = 40, scale: float = 1.0) -> Batch:
    """Random observations with random returns, in float64."""
    observations = torch.randn(size, 5, dtype=torch.float64)
    returns = scale * torch.randn(size, dtype=torch.float64)
    empty = torch.zeros(size, dtype=torch.float64)
    return Batch(observations, empty, empty, empty, returns, empty, torch.full_like(empty, 1 / size))


def mean_squared_error(model: Any, batch: Batch) -> float:
    return -2 * ValueProblem(ValueFunction(model.policy, batch, frozenset(), None)).evaluate().objective


def test_a_linear_critic_reaches_the_least_squares_solution_in_one_step() -> None:
    model = in_float64(make(TRPO, policy_kwargs={"net_arch": []}))
    batch = regression()
    critic = GaussNewtonCritic(damping=1e-12, cg_steps=50, n_steps=1)
    error = critic.fit(model.policy, batch, frozenset())
    design = torch.cat([batch.observations, torch.ones(len(batch), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(design, batch.returns.unsqueeze(1)).solution
    ours = torch.cat([model.policy.value_net.weight.T, model.policy.value_net.bias.unsqueeze(1)])
    torch.testing.assert_close(ours.detach(), solution, rtol=1e-5, atol=1e-6)
    assert error == pytest.approx(float((design @ solution - batch.returns.unsqueeze(1)).square().mean()))


@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e5), damping=st.floats(1e-4, 10))
def test_the_loss_never_rises_whatever_the_scale_of_the_returns(seed: int, scale: float, damping: float) -> None:
    torch.manual_seed(seed)
    model = in_float64(make(TRPO, policy_kwargs={"net_arch": [4]}, n_steps=2))
    batch = regression(scale=scale)
    before = mean_squared_error(model, batch)
    after = GaussNewtonCritic(damping=damping).fit(model.policy, batch, frozenset())
    assert after == pytest.approx(mean_squared_error(model, batch))
    assert after < before


def test_chunks_change_nothing() -> None:
    results = []
    for chunk_size in (None, 7):
        torch.manual_seed(0)
        model, batch = in_float64(make(TRPO)), regression()
        GaussNewtonCritic(chunk_size=chunk_size).fit(model.policy, batch, frozenset())
        results.append(model.policy.predict_values(batch.observations).detach())
    torch.testing.assert_close(*results)


def test_returns_that_are_not_finite_move_nothing() -> None:
    model, batch = in_float64(make(TRPO)), regression(scale=float("nan"))
    before = [param.detach().clone() for param in model.policy.parameters()]
    GaussNewtonCritic().fit(model.policy, batch, frozenset())
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


@pytest.mark.parametrize(
    "arguments", [{"damping": 0}, {"damping": float("nan")}, {"cg_steps": 0}, {"n_steps": 0}, {"max_backtracks": 0}]
)
def test_impossible_arguments_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make(TRPO, critic="gauss_newton", critic_kwargs=arguments)
