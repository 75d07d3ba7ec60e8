"""PPOPenalty: the loss, the adaptive coefficient, and what it keeps."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, RandomEnv, make, with_rollout
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import make_proba_distribution
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_trpo_ext import PPOClip, PPOPenalty
from sb3_trpo_ext.core.objectives import adapted_penalty, bounded_penalty, searched_penalty
from sb3_trpo_ext.policy.distributions import GaussianFamily
from sb3_trpo_ext.policy.problem import Comparison, PolicyEvaluation
from sb3_trpo_ext.ppo_penalty import LARGEST_KL_COEF, SMALLEST_KL_COEF
from sb3_trpo_ext.rollout.buffers import whole_rollout
from sb3_trpo_ext.training.base import UpdateRejectedError
from sb3_trpo_ext.training.first_order import Ascent, PolicyDivergedError


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
    old, problem = copy.deepcopy(model.policy), Comparison(model.policy, batch)
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
        ("kl_coef_bounds", (0.0, 5.0)),
        ("kl_coef_bounds", (1e-50, 5.0)),
        ("kl_coef_bounds", (5.0, 1.0)),
        ("kl_coef_bounds", (math.nan, 5.0)),
        ("kl_coef_bounds", (0.1, math.nan)),
        ("kl_coef_bounds", (math.inf, math.inf)),
        ("kl_coef_bounds", (1e20, 1e30)),
        ("kl_coef_bounds", (0.1, 1.0, 10.0)),
        ("kl_coef_bounds", (0.1,)),
        ("kl_coef_bounds", 5.0),
        ("kl_coef_bounds", None),
        ("kl_coef_bounds", "ab"),
        ("kl_coef", 0.0),
        ("kl_coef", math.nan),
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


BOUNDS = [(1e-3, 1e3), (1e-3, math.inf), (SMALLEST_KL_COEF, math.inf), (0.5, 3.0), (1.0, 1.0)]


def after(model: Any, divergence: float | None) -> float:
    """β after an update that reached a divergence, or that was undone (None)."""
    try:
        if divergence is None:
            raise PolicyDivergedError
        model._adapt(Ascent({}, PolicyEvaluation(0.0, divergence, divergence, 0.0), divergence, epochs=1))
    except UpdateRejectedError as rejection:
        model._after_rejection(rejection)
    return float(model.kl_coef)


DIVERGENCES = st.none() | st.floats(0, 1) | st.sampled_from([0.0, 1e-45, 0.01, 1e30, math.inf, math.nan])


@given(
    st.sampled_from(BOUNDS), st.lists(st.tuples(DIVERGENCES, st.integers(1, 200)), max_size=5), st.floats(1e-30, 1e30)
)
def test_beta_stays_within_bounds_and_can_always_come_back(
    bounds: tuple[float, float], history: list[tuple[float | None, int]], target: float
) -> None:
    model = make(PPOPenalty, kl_coef_bounds=bounds, target_kl=target)
    low, high = bounds[0], min(bounds[1], LARGEST_KL_COEF)
    for divergence, times in history:
        for _ in range(times):
            assert low <= after(model, divergence) <= high
    doublings = math.ceil(math.log2(high / low)) + 1
    start = copy.copy(vars(model))
    for divergence, end in ((0.0, low), (math.inf, high)):
        vars(model).update(start)
        assert [after(model, divergence) for _ in range(doublings)][-1] == end
    vars(model).update(start)
    visited = sorted({after(model, None) for _ in range(3 * doublings)})
    assert (visited[0], visited[-1]) == (low, high)
    assert all(b <= 2 * a * (1 + 1e-12) for a, b in itertools.pairwise(visited))


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(1e-30, 1e30), st.floats(1, 1e5))
def test_a_beta_put_beyond_its_bounds_comes_back_at_once(beta: float, low: float, ratio: float) -> None:
    for found in (bounded_penalty(beta, low, low * ratio), searched_penalty(beta, 2.0, low, low * ratio)[0]):
        assert low <= found <= low * ratio


def test_a_beta_that_overflows_comes_down_though_its_update_is_undone() -> None:
    model = with_rollout(make(PPOPenalty, "box", batch_size=16, target_kl=1e-9, kl_coef_bounds=(1e-3, math.inf)))
    model.kl_coef = 1e27
    before = [param.detach().clone() for param in model.policy.parameters()]
    model.train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    assert model.kl_coef == LARGEST_KL_COEF
    model.target_kl = lambda progress: 1e9
    model.train()
    assert model.kl_coef == LARGEST_KL_COEF / 2
    assert not all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


def test_no_target_is_too_small_for_the_largest_beta() -> None:
    model = make(PPOPenalty, "box", batch_size=16, target_kl=1e-30, kl_coef_bounds=(1e-3, math.inf), n_epochs=1)
    model.learn(32 * 60)
    assert model.kl_coef == LARGEST_KL_COEF
    assert not model._reported_rejections
    assert model._n_updates == 60


@pytest.mark.parametrize("max_grad_norm", [0.5, math.inf])
@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty])
def test_a_policy_that_explodes_is_put_back_and_beta_rises(algorithm: Any, max_grad_norm: float) -> None:
    model = with_rollout(make(algorithm, "box", batch_size=16, learning_rate=1e4, max_grad_norm=max_grad_norm))
    before = [param.detach().clone() for param in model.policy.parameters()]
    for beta in (1.0, 2.0, 4.0):
        if algorithm is PPOPenalty:
            assert model.kl_coef == beta
        model.train()
        assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    assert model._n_updates == 0
    assert "not finite" in " ".join(model._reported_rejections)


def test_a_large_step_of_the_critic_alone_leaves_beta() -> None:
    model = with_rollout(make(PPOPenalty, "box", batch_size=16, target_kl=1e-9))
    model.rollout_buffer.returns[:] = 1e19  # the loss is finite, the norm of its gradient not
    model.train()
    assert model._reported_rejections
    assert model.kl_coef == 1.0


def test_a_target_outside_of_the_ball_does_not_lock_up() -> None:
    model = make(PPOPenalty, "box", batch_size=16, target_kl=10.0, max_kl=1e-4, learning_rate=1e-3)
    model.learn(32 * 12)
    assert model._n_updates > 0
    assert betas(3, target_kl=1e3, max_kl=1e-9)[0] == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("beta", [0.0, 2000.0])
def test_a_fixed_beta_needs_no_bounds(beta: float) -> None:
    assert betas(2, kl_coef=beta, adaptive=False)[0] == [beta] * 2
    assert betas(2, kl_coef=beta, adaptive=False, kl_coef_bounds=(0.0, 1.0))[0] == [beta] * 2


def test_a_fixed_beta_that_would_overflow_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kl_coef.*at most"):
        make(PPOPenalty, kl_coef=1e27, adaptive=False)


def test_a_beta_of_zero_multiplies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"batch_size": 16, "kl_coef": 0.0, "adaptive": False}
    plain = with_rollout(make(PPOPenalty, "box", **options))
    plain.train()
    monkeypatch.setattr(GaussianFamily, "kl", lambda self, old, new: (old - new).sum(dim=1) * math.nan)
    poisoned = with_rollout(make(PPOPenalty, "box", **options))
    poisoned.train()
    assert poisoned._n_updates == plain._n_updates == 10
    for mine, peer in zip(poisoned.policy.parameters(), plain.policy.parameters(), strict=True):
        assert torch.equal(mine, peer)


@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty])
def test_a_value_loss_of_weight_zero_multiplies_nothing(algorithm: Any) -> None:
    models = [with_rollout(make(algorithm, "box", batch_size=16, vf_coef=0.0)) for _ in range(2)]
    models[1].rollout_buffer.returns[:] = 1e30
    for model in models:
        torch.manual_seed(0)
        np.random.seed(0)
        model.train()
    assert models[0]._n_updates == models[1]._n_updates == 10
    for mine, peer in zip(*(model.policy.parameters() for model in models), strict=True):
        assert torch.equal(mine, peer)
        assert torch.equal(mine.grad, peer.grad)


@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty])
def test_an_entropy_of_weight_zero_multiplies_nothing(algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_rollout(make(algorithm, "box", batch_size=16, ent_coef=0.0))
    monkeypatch.setattr(torch.distributions.Normal, "entropy", lambda self: self.scale * math.inf)
    model.train()
    assert model._n_updates == 10


def test_beta_and_the_direction_of_its_search_are_saved(tmp_path: Path) -> None:
    model = make(PPOPenalty, "box", kl_coef=3.0, kl_coef_bounds=(0.5, 3.0))
    assert after(model, None) == 1.5
    model.save(tmp_path / "model")
    loaded = PPOPenalty.load(tmp_path / "model", device="cpu")
    assert [after(each, None) for each in (loaded, model)] == [0.75, 0.75]
