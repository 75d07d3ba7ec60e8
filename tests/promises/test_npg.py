"""NPG is TRPO's direction without its line search."""

from typing import Any

import numpy as np
import pytest
import torch
from envs import make, with_rollout

from sb3_trpo_ext import NPG, TRPO


def actor(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.policy.named_parameters() if "value" not in name}


def moved(model: Any) -> dict[str, torch.Tensor]:
    before = actor(model)
    np.random.seed(0)
    model.train()
    return {name: after - before[name] for name, after in actor(model).items()}


@pytest.mark.parametrize("action", ["box", "discrete"])
def test_where_trpo_accepts_the_full_step_both_are_the_same(action: str) -> None:
    models = [with_rollout(make(algorithm, action, target_kl=1e-4)) for algorithm in (TRPO, NPG)]
    for model in models:
        np.random.seed(0)
        model.train()
    assert models[0].logger.name_to_value["train/step_fraction"] == 1
    for ours, theirs in zip(*(model.policy.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)


def test_no_line_search_shortens_the_step() -> None:
    trpo = with_rollout(make(TRPO, "discrete", target_kl=0.5, line_search_accept_ratio=0.97))
    npg = with_rollout(make(NPG, "discrete", target_kl=0.5))
    for model in (trpo, npg):
        np.random.seed(0)
        model.train()
    ours, theirs = npg.logger.name_to_value, trpo.logger.name_to_value
    assert theirs["train/step_fraction"] < 1
    np.testing.assert_allclose(ours["train/step_size"] * theirs["train/step_fraction"], theirs["train/step_size"])
    assert ours["train/kl_divergence_loss"] > theirs["train/kl_divergence_loss"]


@pytest.mark.parametrize("schedule", [False, True])
def test_a_fixed_step_is_that_multiple_of_the_natural_gradient(schedule: bool) -> None:
    def model(step_size: float) -> Any:
        given: Any = (lambda progress: step_size * progress) if schedule else step_size
        return with_rollout(make(NPG, "box", step_size=given, cg_residual_tol=0.0))

    one, three = moved(model(0.01)), moved(model(0.03))
    for name, step in one.items():
        torch.testing.assert_close(3 * step, three[name], rtol=1e-3, atol=1e-6)


def test_a_step_that_is_not_finite_leaves_the_policy(capsys: pytest.CaptureFixture[str]) -> None:
    model = with_rollout(make(NPG, "box", step_size=1e30, verbose=1))
    before = actor(model)
    model.train()
    assert all(torch.equal(before[name], now) for name, now in actor(model).items())
    assert "not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("line_search_max_iter", 5, "TRPO"),
        ("trust_region", "max", "TRPO"),
        ("kl_penalty", 2.0, "step_size"),
        ("clip_range", 0.2, "PPOClip"),
        ("stepsize", 0.1, "0.1"),
    ],
)
def test_what_it_does_not_have_is_answered(name: str, value: Any, words: str) -> None:
    with pytest.raises(TypeError, match=rf"NPG\(\).*{name}.*{words}"):
        make(NPG, **{name: value})


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "big"])
def test_an_impossible_step_size_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"step_size.*{value}"):
        make(NPG, step_size=value)
