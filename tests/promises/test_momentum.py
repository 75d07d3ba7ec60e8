"""Momentum: what is ascended, when it is forgotten, and that it travels with the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from envs import make, with_rollout
from torch import Tensor

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, RecurrentTRPO
from sb3_trpo_ext.core.natural_step import Acceptance, Evaluation, Step
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonCritic
from sb3_trpo_ext.policy.problem import PolicyProblem
from sb3_trpo_ext.training import natural_gradient
from sb3_trpo_ext.training.natural_gradient import PolicyStep

MU = 0.6


class Watched(TRPO):
    """Remembers gradients and what was ascended; can be told to reject."""

    gradients: list[Tensor]
    vectors: list[Tensor]
    reject: set[int]

    def _policy_step(self, problem: PolicyProblem) -> PolicyStep:
        self.gradients.append(problem.gradient.clone())
        return super()._policy_step(problem)

    def _step_along(self, problem: PolicyProblem, vector: Tensor, most_trials: int) -> PolicyStep:
        self.vectors.append(vector.clone())
        if len(self.vectors) in self.reject:
            return Step(problem.start, reason="told to")
        return super()._step_along(problem, vector, most_trials)


def watched(updates: int, reject: set[int] | None = None, **options: Any) -> Watched:
    model = make(Watched, n_steps=64, momentum=MU, **options)
    model.gradients, model.vectors, model.reject = [], [], reject or set()
    for _ in range(updates):
        with_rollout(model)
        model.train()
    return model


def equal(a: Tensor | np.ndarray | None, b: Tensor) -> None:
    np.testing.assert_allclose(np.asarray(a), b.numpy(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("action", ["box", "discrete", "multibinary"])
def test_what_is_ascended_is_the_heavy_ball(action: str) -> None:
    model = watched(3, action=action)
    g1, g2, g3 = model.gradients
    assert len(model.vectors) == 3
    for vector, expected in zip(model.vectors, (g1, g2 + MU * g1, g3 + MU * (g2 + MU * g1)), strict=True):
        equal(vector, expected)
    equal(model.gradient_memory, model.vectors[-1])
    assert model.logger.name_to_value["train/momentum"] == MU


def test_the_direction_is_the_fisher_solution_of_the_heavy_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[tuple[Any, Tensor, Tensor]] = []
    solve = natural_gradient.natural_direction

    def recorded(fisher: Any, problem: Any, vector: Tensor, **options: Any) -> Any:
        direction = solve(fisher, problem, vector, **options)
        dense = torch.stack([fisher(unit) for unit in torch.eye(len(vector))])
        solved.append((dense, vector, direction.x))
        return direction

    monkeypatch.setattr(natural_gradient, "natural_direction", recorded)
    model = watched(2, action="box", policy_kwargs={"net_arch": [4]}, cg_max_steps=200, cg_residual_tol=1e-6)
    dense, vector, solution = solved[1]
    equal(vector, model.gradients[1] + MU * model.gradients[0])
    np.testing.assert_allclose(solution, torch.linalg.solve(dense, vector), rtol=2e-3, atol=1e-4)


def test_a_rejected_step_falls_back_on_the_plain_direction_and_forgets() -> None:
    model = watched(2, reject={2})
    g1, g2 = model.gradients
    assert len(model.vectors) == 3
    equal(model.vectors[1], g2 + MU * g1)
    equal(model.vectors[2], g2)
    equal(model.gradient_memory, g2)
    log = model.logger.name_to_value
    assert log["train/momentum"] == 0.0 and log["train/is_line_search_success"] == 1.0


def test_a_fraction_of_the_heavy_ball_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rejection = Acceptance.rejection

    def not_whole(self: Acceptance, evaluation: Evaluation, fraction: float) -> str:
        return "too far" if fraction == 1.0 else rejection(self, evaluation, fraction)

    monkeypatch.setattr(Acceptance, "rejection", not_whole)
    model = watched(2)
    log = model.logger.name_to_value
    assert log["train/momentum"] == 0.0 and 0.0 < log["train/step_fraction"] < 1.0
    equal(model.vectors[-1], model.gradients[-1])


def test_nothing_is_remembered_of_a_step_that_was_not_taken() -> None:
    model = watched(1)
    model.line_search_accept_ratio = 1 - 1e-12
    model.line_search_max_iter = 1
    before = [parameter.clone() for parameter in model.policy.parameters()]
    actor = [name for name, _ in model.policy.named_parameters() if "value" not in name]
    with_rollout(model)
    model.train()
    assert not model.logger.name_to_value["train/is_line_search_success"]
    assert model.gradient_memory is None
    for (name, now), then in zip(model.policy.named_parameters(), before, strict=True):
        assert name not in actor or bool((now == then).all())


def test_an_update_that_is_undone_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = watched(1)
    memory = model.gradient_memory
    assert memory is not None
    with_rollout(model)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GaussNewtonCritic, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.train()
    assert model.gradient_memory is memory


@pytest.mark.parametrize("algorithm", [TRPO, RecurrentTRPO, MaskableTRPO])
def test_a_saved_model_begins_with_its_plain_gradient(algorithm: Any, tmp_path: Path) -> None:
    action = "discrete" if algorithm is MaskableTRPO else "box"
    model = make(algorithm, action=action, momentum=MU)
    model.learn(3 * model.n_steps)
    assert model.gradient_memory is not None
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=model.env)
    assert loaded.momentum == MU and loaded.gradient_memory is None
    loaded.learn(loaded.n_steps)
    assert loaded.logger.name_to_value["train/momentum"] == 0
    loaded.learn(loaded.n_steps)
    assert loaded.logger.name_to_value["train/momentum"] == MU


def test_a_memory_of_other_parameters_is_left_behind() -> None:
    model = watched(1)
    for parameter in model.policy.mlp_extractor.policy_net.parameters():
        parameter.requires_grad_(False)
    with_rollout(model)
    model.train()
    assert model.gradients[1].shape != model.gradients[0].shape
    equal(model.vectors[1], model.gradients[1])
    equal(model.gradient_memory, model.gradients[1])


def test_without_momentum_nothing_is_remembered() -> None:
    model = with_rollout(make(TRPO))
    model.train()
    assert model.gradient_memory is None


@pytest.mark.parametrize("value", [1.0, -0.1, 2, float("nan"), "much"])
def test_an_impossible_momentum_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="`momentum`"):
        make(TRPO, momentum=value)


def test_npg_says_why_it_has_none() -> None:
    with pytest.raises(TypeError, match=r"momentum.*use the class TRPO"):
        make(NPG, momentum=0.5)
