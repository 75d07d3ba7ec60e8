"""PPOPenalty: the loss, the adaptive coefficient, and what it keeps."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from envs import ACTION_SPACES, RandomEnv, make, with_rollout
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import make_proba_distribution
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_trpo_ext import PPOPenalty
from sb3_trpo_ext.core.objectives import adapted_penalty
from sb3_trpo_ext.sb3.buffers import whole_rollout
from sb3_trpo_ext.sb3.policy_problem import PolicyProblem


@given(st.floats(1e-3, 1e3), st.floats(0, 10), st.floats(1e-4, 1))
def test_beta_is_halved_below_and_doubled_above(beta: float, divergence: float, target: float) -> None:
    expected = beta / 2 if divergence < target / 1.5 else beta * 2 if divergence > target * 1.5 else beta
    assert adapted_penalty(beta, divergence, target) == expected


def test_beta_stays_where_the_divergence_is_not_a_number() -> None:
    assert adapted_penalty(3.0, float("nan"), 0.01) == 3.0


def exact_kl(old: Any, new: Any, batch: Any) -> torch.Tensor:
    """The joint KL divergence by torch's own formulas, ``(N,)``."""
    pairs = [policy.get_distribution(batch.inputs).distribution for policy in (old, new)]
    parts = zip(*(each if isinstance(each, list) else [each] for each in pairs), strict=True)
    return sum(torch.distributions.kl_divergence(a, b).reshape(len(batch), -1).sum(1) for a, b in parts)


@pytest.mark.parametrize("action", ACTION_SPACES)
def test_the_loss_is_the_papers(action: str) -> None:
    model = with_rollout(make(PPOPenalty, action, batch_size=32, kl_coef=2.5))
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    old, problem = copy.deepcopy(model.policy), PolicyProblem(model.policy, batch)
    problem.evaluate()
    part = model._prepared(batch, problem)[torch.randperm(len(batch))]
    with torch.no_grad():
        for param in model.policy.parameters():
            param.add_(0.1 * torch.randn_like(param))
        _, log_prob, _ = part.evaluate_actions(model.policy)
        ratio = torch.exp(log_prob - part.old_log_prob)
        loss, penalty = model._policy_loss(part, ratio, part.advantages)
        expected = 2.5 * exact_kl(old, model.policy, part).mean()
    assert expected > 0.01
    torch.testing.assert_close(penalty, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, expected - (ratio * part.advantages).mean(), rtol=1e-4, atol=1e-6)


def test_a_policy_with_its_own_distribution_object_is_asked_again() -> None:
    class Fresh(ActorCriticPolicy):
        def _get_action_dist_from_latent(self, latent_pi: Any) -> Any:
            return make_proba_distribution(self.action_space).proba_distribution(self.action_net(latent_pi))

    options: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "seed": 0, "device": "cpu", "fast_rollouts": False}
    options |= {"learning_rate": 0.1, "policy_kwargs": {"optimizer_class": torch.optim.SGD}}
    ours, theirs = (PPOPenalty(policy, RandomEnv(), **options) for policy in (Fresh, "MlpPolicy"))
    for model in (ours, theirs):
        model.set_random_seed(0)
        with_rollout(model)
        model.train()
    for mine, peer in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, peer, rtol=1e-4, atol=1e-5)


def betas(n_updates: int = 4, **options: Any) -> tuple[list[float], list[float]]:
    """β and the divergence of each update."""
    model = make(PPOPenalty, "box", **{"batch_size": 16, **options})
    seen: list[dict[str, float]] = []
    model.train, train = lambda: (train(), seen.append(dict(model.logger.name_to_value))), model.train
    model.learn(32 * n_updates)
    return [log["train/kl_coef"] for log in seen], [log["train/kl_divergence_loss"] for log in seen]


def test_beta_answers_to_the_divergence_of_the_whole_rollout() -> None:
    coefficients, divergences = betas(6, target_kl=0.02)
    for before, after, divergence in zip(coefficients, coefficients[1:], divergences, strict=False):
        assert after == adapted_penalty(before, divergence, 0.02)
    assert len(set(coefficients)) > 1


def test_beta_stays_within_its_bounds_or_where_it_was_put() -> None:
    assert betas(target_kl=1e-9, kl_coef_bounds=(0.5, 3.0))[0] == [1.0, 2.0, 3.0, 3.0]
    assert betas(target_kl=1e9, kl_coef_bounds=(0.4, 3.0))[0] == [1.0, 0.5, 0.4, 0.4]
    assert betas(target_kl=1e-9, adaptive=False)[0] == [1.0] * 4


def test_an_epoch_that_was_rolled_back_counts_as_too_far() -> None:
    assert betas(target_kl=1e-6, max_kl=1e-5)[0] == [1.0, 2.0, 4.0, 8.0]


def test_more_penalty_less_divergence() -> None:
    small, large = (betas(1, kl_coef=value, adaptive=False, learning_rate=3e-3)[1][0] for value in (0.01, 100.0))
    assert large < 0.5 * small


def test_beta_is_saved_with_the_model(tmp_path: Path) -> None:
    model = make(PPOPenalty, "box", batch_size=16, target_kl=1e-9).learn(96)
    model.save(tmp_path / "model")
    assert PPOPenalty.load(tmp_path / "model", device="cpu").kl_coef == model.kl_coef == 8.0


def test_beta_is_put_back_with_an_update_that_is_undone() -> None:
    model = with_rollout(make(PPOPenalty, "box", batch_size=16, target_kl=1e-9))
    model.rollout_buffer.returns[:] = 1e30
    model.train()
    assert model.kl_coef == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_kl", 0.0),
        ("target_kl", None),
        ("kl_coef", -1.0),
        ("kl_coef", 2000.0),
        ("kl_coef_bounds", (-1.0, 5.0)),
        ("kl_coef_bounds", (2.0, 5.0)),
        ("batch_size", 0),
    ],
)
def test_impossible_arguments_are_named(name: str, value: Any) -> None:
    with pytest.raises((ValueError, AssertionError), match=name):
        make(PPOPenalty, **{name: value})


def test_a_buffer_of_another_class_is_refused_at_construction() -> None:
    class Own(RolloutBuffer):
        pass

    with pytest.raises(ValueError, match=r"rollout_buffer_class.*Own.*PPOClip"):
        make(PPOPenalty, rollout_buffer_class=Own)
