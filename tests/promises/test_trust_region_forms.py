"""The forms of the constraint: mean KL, largest KL, penalty; and their schedules."""

from typing import Any

import numpy as np
import pytest
import torch
from envs import OBSERVATION_SPACES, RandomEnv, make, with_rollout
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.utils import LinearSchedule

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentNPG, RecurrentTRPO
from sb3_trpo_ext.core.conjugate_gradient import CGResult
from sb3_trpo_ext.core.natural_step import Direction, boundary_curvature
from sb3_trpo_ext.core.objectives import theoretical_penalty
from sb3_trpo_ext.policy.problem import PolicyEvaluation


def log_of_one_update(**options: Any) -> dict[str, float]:
    model = with_rollout(make(TRPO, **{"n_steps": 256, **options}))
    np.random.seed(0)
    model.train()
    return dict(model.logger.name_to_value)


@pytest.mark.parametrize("action", ["box", "discrete", "multibinary"])
@pytest.mark.parametrize("target_kl", [0.001, 0.01, 0.1])
def test_the_largest_kl_stays_inside(action: str, target_kl: float) -> None:
    mean = log_of_one_update(action=action, target_kl=target_kl)
    largest = log_of_one_update(action=action, target_kl=target_kl, trust_region="max")
    assert mean["train/kl_max"] > mean["train/target_kl"] >= mean["train/kl_divergence_loss"]
    assert largest["train/is_line_search_success"]
    assert 0.4 * largest["train/target_kl"] < largest["train/kl_max"] <= largest["train/target_kl"]
    assert largest["train/step_size"] < mean["train/step_size"]


def test_a_penalty_maximises_what_it_says() -> None:
    logs = {c: log_of_one_update(action="box", kl_penalty=c) for c in (1.0, 10.0, 100.0)}
    for penalty, log in logs.items():
        assert log["train/is_line_search_success"]
        assert log["train/improvement"] > penalty * log["train/kl_max"]
    steps = [log["train/step_size"] for log in logs.values()]
    assert steps[0] > steps[1] > steps[2]
    np.testing.assert_allclose(steps[2], 0.01, rtol=0.2)  # 1/C, where the quadratic model holds and CG has converged


class Line:
    """A problem in one number: L rises as far as it goes, and the largest KL with its square."""

    max_advantage = 1.0
    start = PolicyEvaluation(0.0, 0.0, 0.0, 0.0)

    def __init__(self) -> None:
        self.params, self.theta_old, self.gradient = [torch.zeros(1)], torch.zeros(1), torch.ones(1)

    def evaluate(self) -> PolicyEvaluation:
        distance = float(self.params[0])
        return PolicyEvaluation(distance, 0.01 * distance**2, distance**2, 0.0)


def test_the_line_search_keeps_the_penalised_objective_rising() -> None:
    line: Any = Line()
    cg = CGResult(torch.ones(1), 1, 0.0, 0.5, "converged")
    model = make(TRPO, kl_penalty=2.0)
    model._direction = lambda problem, vector: Direction(vector, torch.ones(1), 1.0, 0.5, 0.5, cg)
    step = model._step_along(line, line.gradient, most_trials=10)  # d - 2 d² > 0 only below 0.5
    assert step.size == 1.0
    np.testing.assert_allclose(step.fraction, 0.8**4)
    np.testing.assert_allclose(float(line.params[0]), 0.8**4, rtol=1e-6)


def test_the_theoretical_penalty_is_thousands_of_times_shorter() -> None:
    model = with_rollout(make(TRPO, "box", n_steps=256, kl_penalty="theory", gamma=0.9))
    before = [p.detach().clone() for p in model.policy.action_net.parameters()]
    model.train()
    log = model.logger.name_to_value
    advantages = model.rollout_buffer.advantages
    epsilon = np.abs((advantages - advantages.mean()) / advantages.std(ddof=1)).max()
    assert log["train/expected_improvement"] > 0
    step = log["train/expected_improvement"] / log_of_one_update(action="box")["train/expected_improvement"]
    assert step < 0.05
    if log["train/is_line_search_success"]:
        assert log["train/step_size"] <= 1.2 / theoretical_penalty(0.9, epsilon)
    else:
        assert all(torch.equal(a, b) for a, b in zip(before, model.policy.action_net.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "value"), [("trust_region", "both"), ("kl_penalty", 0.0), ("kl_penalty", "big"), ("kl_penalty", -1.0)]
)
def test_impossible_forms_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        make(TRPO, **{name: value})


def test_the_theory_wants_a_discount() -> None:
    with pytest.raises(ValueError, match="gamma=1"):
        make(TRPO, kl_penalty="theory", gamma=1.0)


@pytest.mark.parametrize("algorithm", [TRPO, NPG, PPOPenalty])
def test_the_radius_follows_its_schedule(algorithm: Any) -> None:
    model = make(algorithm, "discrete", target_kl=LinearSchedule(0.04, 0.07, 1.0))
    seen = []
    model.train, train = lambda: (train(), seen.append(model.logger.name_to_value["train/target_kl"])), model.train
    model.learn(96)
    np.testing.assert_allclose(seen, [0.05, 0.06, 0.07])


def test_the_sampled_target_of_ppo_follows_its_schedule() -> None:
    model = make(PPOClip, target_kl=lambda progress: 1e9 if progress > 0.5 else 1e-12, batch_size=16, n_epochs=3)
    counts = []
    model.train, train = lambda: (train(), counts.append(model._n_updates)), model.train
    model.learn(64)
    assert counts == [1, 2] if model._n_updates == 2 else counts[0] in (1, 3)
    assert counts[-1] - counts[0] == 1  # the second update ended in its first epoch


@pytest.mark.parametrize("algorithm", [TRPO, NPG, PPOClip, PPOPenalty])
def test_the_entropy_bonus_follows_its_schedule(algorithm: Any) -> None:
    scheduled, constant = (
        make(algorithm, ent_coef=value, target_kl=0.01) for value in (lambda progress: 0.3 * (progress < 0.9), 0.3)
    )
    for model in (scheduled, constant):
        model._current_progress_remaining = 1.0
        assert model.entropy_weight() == (0.0 if model is scheduled else 0.3)
        model.set_random_seed(0)
        with_rollout(model)
        assert model.entropy_weight() == 0.3
        model.train()
    for ours, theirs in zip(scheduled.policy.parameters(), constant.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_schedule_of_the_bonus_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ent_coef.*nan"):
        make(TRPO, ent_coef=lambda progress: float("nan")).learn(32)


# NPG is TRPO's direction without its line search


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


# How much of the trust region a step uses: beside damping, and where the largest KL is bounded


HALF = 0.5

action_spaces = st.one_of(
    st.integers(2, 5000).map(spaces.Discrete),
    st.lists(st.integers(2, 300), min_size=1, max_size=6).map(spaces.MultiDiscrete),
    st.integers(1, 60).map(spaces.MultiBinary),
    st.integers(1, 50).map(lambda size: spaces.Box(-1, 1, (size,))),
)


def updated(space: spaces.Space, algorithm: Any = TRPO, spread: float = 0.0, seed: int = 0, **options: Any) -> Any:
    """A model after one update from a policy whose weights were moved at random."""
    policy = "MlpLstmPolicy" if algorithm in (RecurrentTRPO, RecurrentNPG) else "MlpPolicy"
    env = RandomEnv(OBSERVATION_SPACES["vector"], space)
    model = algorithm(policy, env, n_steps=256, seed=seed, device="cpu", **options)
    with torch.no_grad():
        for param in model.policy.action_net.parameters():
            param.add_(spread * torch.randn_like(param))
    with_rollout(model)
    np.random.seed(0)
    model.train()
    return model


def radius_used(model: Any) -> float:
    log = model.logger.name_to_value
    return float(log["train/kl_divergence_loss"] / log["train/target_kl"])


@settings(max_examples=60, deadline=None)
@given(space=action_spaces, spread=st.sampled_from([0.0, 0.1, 0.5]), seed=st.integers(0, 99))
def test_at_least_half_of_the_radius_is_used_for_every_number_of_actions(
    space: spaces.Space, spread: float, seed: int
) -> None:
    options = {"min_radius_used": 0.6} if isinstance(space, spaces.Box) else {}
    model = updated(space, spread=spread, seed=seed, **options)
    assert model.logger.name_to_value["train/is_line_search_success"]
    if model.logger.name_to_value["train/step_fraction"] == 1:  # otherwise it was the line search that shortened it
        assert HALF <= radius_used(model) <= 1


@pytest.mark.parametrize("algorithm", [TRPO, NPG, MaskableTRPO, RecurrentTRPO, RecurrentNPG])
def test_every_method_has_it(algorithm: Any) -> None:
    model = updated(spaces.Discrete(500), algorithm)
    assert radius_used(model) > HALF
    assert radius_used(updated(spaces.Discrete(500), algorithm, min_radius_used=0.0)) < 0.1


def test_no_damping_is_too_strong() -> None:
    assert HALF < radius_used(updated(spaces.Discrete(1000), cg_damping=1e4)) < 0.8


def test_the_direction_stays_and_where_damping_leaves_enough_the_step_too() -> None:
    for share, same in ((0.3, True), (0.9, False)):
        ours, plain = (
            torch.nn.utils.parameters_to_vector(updated(spaces.Discrete(3), min_radius_used=u).policy.parameters())
            for u in (share, 0.0)
        )
        assert torch.equal(ours, plain) == same
    start, short, long = (
        torch.nn.utils.parameters_to_vector(
            updated(spaces.Discrete(100), min_radius_used=u, target_kl=kl).policy.action_net.parameters()
        )
        for u, kl in ((0.0, 1e-12), (0.0, 1e-3), (0.6, 1e-3))
    )
    cosine = torch.nn.functional.cosine_similarity(short - start, long - start, dim=0).detach()
    assert float(cosine) == pytest.approx(1.0, abs=1e-4)
    assert (long - start).norm() > 2 * (short - start).norm()


def test_box_keeps_the_steps_of_sb3_contrib_unless_asked() -> None:
    ours, plain = (
        torch.nn.utils.parameters_to_vector(updated(spaces.Box(-1, 1, (17,)), **options).policy.parameters())
        for options in ({}, {"min_radius_used": 0.0})
    )
    assert torch.equal(ours, plain)


def test_the_curvature_of_the_boundary() -> None:
    assert boundary_curvature(2.0, 0.5, 0.0) == 2.0
    assert boundary_curvature(2.0, 0.5, 0.25) == 2.0
    assert boundary_curvature(2.0, 0.5, 0.5) == 1.0
    assert boundary_curvature(2.0, 0.5, 1.0) == 0.5
    assert boundary_curvature(2.0, 0.0, 0.5) == 2.0  # no direction of F at all: damping bounds the step


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "all", None, True])
@pytest.mark.parametrize("algorithm", [TRPO, NPG, MaskableTRPO, RecurrentTRPO])
def test_an_impossible_share_is_named(algorithm: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"min_radius_used.*{value}"):
        make(algorithm, min_radius_used=value)


@settings(max_examples=20, deadline=None)
@given(space=st.sampled_from([spaces.Discrete(4), spaces.Box(-1, 1, (3,)), spaces.MultiBinary(3)]), data=st.data())
def test_a_bound_on_the_largest_kl_is_met_at_the_first_trial(space: spaces.Space, data: st.DataObject) -> None:
    seed, kl = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([1e-4, 1e-3, 1e-2]))
    log = updated(space, seed=seed, target_kl=kl, trust_region="max").logger.name_to_value
    assert log["train/step_fraction"] == 1
    assert 0.85 < log["train/kl_max"] / log["train/target_kl"] <= 1
