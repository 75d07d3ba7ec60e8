"""The forms of the constraint: mean KL, largest KL, penalty; and their schedules."""

from typing import Any

import numpy as np
import pytest
import torch
from envs import make, with_rollout
from stable_baselines3.common.utils import LinearSchedule

from sb3_trpo_ext import NPG, TRPO, PPOClip, PPOPenalty
from sb3_trpo_ext.core.conjugate_gradient import CGResult
from sb3_trpo_ext.core.natural_step import Direction
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
