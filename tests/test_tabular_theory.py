import runpy
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

theory = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "examples" / "tabular_theory.py")))

CASES = {
    "seed": st.integers(0, 10_000),
    "states": st.integers(1, 6),
    "actions": st.integers(2, 4),
    "gamma": st.floats(0.3, 0.99),
}


def draw(seed: int, states: int, actions: int, gamma: float) -> tuple[Any, Tensor, Tensor]:
    """A random MDP, random logits and a random direction."""
    mdp = theory.random_mdp(seed, states, actions, gamma)
    generator = torch.Generator().manual_seed(seed + 1)
    return mdp, *(theory.normal(generator, states, actions) for _ in range(2))


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def bound_exceeds(old: Any, new: Any, penalty: float) -> float:
    """By how much L - penalty · D_KL^max exceeds J."""
    divergence = theory.kl(old, new.log_policy).max()
    return float(theory.surrogate(old, new.log_policy) - penalty * divergence - new.performance)


def temptation(gamma: float) -> Any:
    """Two states. In the first, a reward for leaving it; the second is worth nothing and never left."""
    double = torch.float64
    stay, leave = [1.0, 0.0], [0.0, 1.0]
    return theory.MDP(
        torch.tensor([[stay, leave], [leave, leave]], dtype=double),
        torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=double),
        torch.tensor([1.0, 0.0], dtype=double),
        gamma,
    )


@given(**CASES)
@settings(max_examples=20)
def test_the_evaluation_agrees_with_a_simulation_of_the_distribution(**case: Any) -> None:
    mdp, logits, _ = draw(**case)
    solved, policy = theory.solve(mdp, logits), logits.softmax(1)
    state, visits, performance = mdp.start, torch.zeros_like(mdp.start), 0.0
    for time in range(int(30 / (1 - mdp.gamma))):
        weighted = mdp.gamma**time * state
        visits, performance = visits + weighted, performance + weighted @ (policy * mdp.rewards).sum(1)
        state = torch.einsum("s,sa,sat->t", state, policy, mdp.transitions)
    close(solved.visits, visits)
    close(solved.performance, performance)
    close((policy * solved.advantages).sum(1), torch.zeros_like(mdp.start))


@given(**CASES, length=st.floats(0.001, 10))
def test_performance_difference_identity(length: float, **case: Any) -> None:
    mdp, logits, direction = draw(**case)
    old, new = theory.solve(mdp, logits), theory.solve(mdp, logits + length * direction)
    close(new.performance, old.performance + theory.performance_difference(old, new))


@given(**CASES)
def test_the_surrogate_matches_the_return_to_first_order(**case: Any) -> None:
    mdp, logits, _ = draw(**case)
    old = theory.solve(mdp, logits)
    close(theory.surrogate(old, logits), old.performance)
    exact = theory.gradient_of(lambda theta: theory.solve(mdp, theta).performance, logits)
    close(theory.gradient_of(lambda theta: theory.surrogate(old, theta), logits), exact)
    close(theory.policy_gradient(old), exact)


def test_but_not_to_second_order() -> None:
    mdp, logits, direction = draw(0, 4, 3, 0.9)
    old = theory.solve(mdp, logits)
    gaps = []
    for length in (1e-2, 1e-3):
        point = logits + length * direction
        gaps.append(float((theory.surrogate(old, point) - theory.solve(mdp, point).performance).abs()))
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.1)


@given(**CASES, length=st.floats(0.001, 10))
def test_lower_bound(length: float, **case: Any) -> None:
    mdp, logits, direction = draw(**case)
    old, new = theory.solve(mdp, logits), theory.solve(mdp, logits + length * direction)
    assert bound_exceeds(old, new, old.penalty) <= 1e-9


def test_the_lower_bound_fails_with_a_tenth_of_the_penalty() -> None:
    mdp = temptation(0.5)
    old = theory.solve(mdp, torch.zeros(2, 2, dtype=torch.float64))
    new = theory.solve(mdp, torch.tensor([[-0.1, 0.1], [0.0, 0.0]], dtype=torch.float64))
    assert bound_exceeds(old, new, old.penalty / 10) > 0
    assert bound_exceeds(old, new, old.penalty) <= 0


@given(**CASES)
def test_algorithm_1_improves_and_keeps_to_its_ceiling(**case: Any) -> None:
    mdp, logits, _ = draw(**case)
    old = theory.solve(mdp, logits)
    new = theory.solve(mdp, theory.algorithm_1_step(old))
    divergence = theory.kl(old, new.log_policy)
    assert theory.lower_bound(old, new.log_policy) > old.performance
    assert new.performance >= theory.lower_bound(old, new.log_policy) - 1e-9
    assert divergence.max() <= theory.largest_divergence(mdp.gamma)
    close(divergence, divergence.max().expand(len(divergence)))


@pytest.mark.parametrize("seed", range(3))
def test_algorithm_1_improves_at_every_step(seed: int) -> None:
    mdp = theory.random_mdp(seed, 5, 3, 0.7)
    performances = theory.learn(mdp, theory.algorithm_1_step, 20)
    assert all(after > before for before, after in pairwise(performances))
    assert performances[-1] < theory.best_performance(mdp)


@pytest.mark.parametrize("seed", range(3))
def test_its_steps_shrink_as_gamma_grows(seed: int) -> None:
    gammas = (0.5, 0.8, 0.9, 0.95, 0.99)
    steps = [theory.first_steps(theory.random_mdp(seed, 5, 3, gamma)) for gamma in gammas]
    assert all(long["Algorithm 1"] > short["Algorithm 1"] for long, short in pairwise(steps))


def best_by_a_generic_optimiser(old: Any, generator: np.random.Generator) -> Tensor:
    """Algorithm 1's problem for SLSQP: maximise L - Cα over logits and α subject to KL(π‖π') <= α in every state."""
    shape = old.log_policy.shape

    def logits(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x[1:]).reshape(shape)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        gradient = -theory.gradient_of(lambda theta: theory.surrogate(old, theta), logits(x))
        value = old.penalty * x[0] - float(theory.surrogate(old, logits(x)))
        return value, np.concatenate([[old.penalty], gradient.flatten().numpy()])

    start = old.log_policy.flatten().numpy() + 0.1 * generator.standard_normal(old.log_policy.numel())
    constraint = {"type": "ineq", "fun": lambda x: x[0] - theory.kl(old, logits(x)).numpy()}
    found = minimize(
        loss, [0.01, *start], jac=True, method="SLSQP", constraints=constraint, options={"ftol": 1e-14, "maxiter": 500}
    )
    return logits(found.x)


@pytest.mark.parametrize("gamma", [0.4, 0.7, 0.9])
def test_a_generic_optimiser_finds_nothing_better_than_algorithm_1(gamma: float) -> None:
    mdp, policy, _ = draw(3, 3, 3, gamma)
    old = theory.solve(mdp, policy)
    gain = float(theory.lower_bound(old, theory.algorithm_1_step(old)) - old.performance)
    generator = np.random.default_rng(0)
    found = [best_by_a_generic_optimiser(old, generator) for _ in range(4)]
    gains = [float(theory.lower_bound(old, each) - old.performance) for each in found]
    assert max(gains) <= gain * (1 + 1e-7)
    assert max(gains) == pytest.approx(gain, rel=1e-3)


@given(**CASES, radius=st.floats(1e-4, 0.05))
def test_trpo_stays_in_its_region_and_improves_the_surrogate(radius: float, **case: Any) -> None:
    mdp, logits, _ = draw(**case)
    old = theory.solve(mdp, logits)
    new = theory.trpo_step(old, radius)
    weights = old.visits / old.visits.sum()
    assert 0.3 * radius <= weights @ theory.kl(old, new) <= radius
    assert theory.surrogate(old, new) > old.performance


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_trpo_improves_the_return_until_it_is_nearly_the_best(gamma: float) -> None:
    mdp = theory.random_mdp(0, 5, 3, gamma)
    performances = theory.learn(mdp, theory.trpo_step, 100)
    assert all(after > before for before, after in pairwise(performances[:20]))
    best = theory.best_performance(mdp)
    assert performances[0] + 0.9 * (best - performances[0]) < performances[-1] <= best + 1e-9


@given(**CASES)
@settings(max_examples=20)
def test_trpo_moves_the_logits_along_the_advantages(**case: Any) -> None:
    mdp, logits, _ = draw(**case)
    old = theory.solve(mdp, logits)
    step = theory.trpo_step(old, 1e-4) - old.log_policy
    weighted = step - (old.log_policy.exp() * step).sum(1, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity(weighted.flatten(), old.advantages.flatten(), dim=0)
    assert cosine == pytest.approx(1, abs=1e-4)


def test_policy_iteration_finds_the_best_of_all_deterministic_policies() -> None:
    mdp = theory.random_mdp(1, 3, 2, 0.9)
    choices = torch.cartesian_prod(*[torch.arange(2)] * 3)
    policies = 1000 * torch.nn.functional.one_hot(choices, 2).double()
    assert theory.best_performance(mdp) == pytest.approx(max(float(theory.solve(mdp, p).performance) for p in policies))


def test_the_script_draws_and_ends_with_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--figure", str(tmp_path / "theory.png"), "--iterations", "2", "--mdps", "1", "--states", "4"]
    monkeypatch.setattr(sys, "argv", ["tabular_theory.py", *arguments])
    theory.main()
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert [line.split("|")[1].strip() for line in table] == ["γ", "---", *map(str, theory.GAMMAS)]
