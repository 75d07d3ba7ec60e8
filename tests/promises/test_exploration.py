"""σ of Gaussian actions: learnt, held or on a schedule; never below its floor; with a radius of its own."""

import copy
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from envs import (
    ACTION_SPACES,
    BetaDistribution,
    RandomEnv,
    dense_fisher,
    in_float64,
    make,
    with_distribution,
    with_rollout,
)
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from sb3_trpo_ext import (
    NPG,
    TRPO,
    MaskableTRPO,
    PPOClip,
    PPOPenalty,
    RecurrentNPG,
    RecurrentPPOClip,
    RecurrentTRPO,
    register_distribution,
)
from sb3_trpo_ext.core.natural_step import Direction
from sb3_trpo_ext.core.parameters import assign, flatten
from sb3_trpo_ext.policy import distributions
from sb3_trpo_ext.policy.distributions import GaussianFamily
from sb3_trpo_ext.policy.evaluation import consistent_evaluation
from sb3_trpo_ext.policy.exploration import SpreadBlock, longest_step, representable, spread_divergence
from sb3_trpo_ext.rollout.buffers import whole_rollout

NATURAL = [TRPO, NPG, RecurrentTRPO, RecurrentNPG]
FIRST_ORDER = [PPOClip, PPOPenalty, RecurrentPPOClip]
ALGORITHMS = [*NATURAL, *FIRST_ORDER]
DROP_IN = [TRPO, NPG, PPOClip, PPOPenalty]
"""Those whose updates have two speeds."""

AT_TWO_SPEEDS = [
    (algorithm, fast) for algorithm in ALGORITHMS for fast in (True, False) if fast or algorithm in DROP_IN
]
FALLING = LinearSchedule(-0.5, -1.5, 1.0)
STEEP = {"ent_coef": -1.0}
"""An entropy that pays to be lost: σ falls from update to update."""


def small(algorithm: Any, **kwargs: Any) -> Any:
    """A model of Gaussian actions; minibatches fit into its rollouts."""
    return make(algorithm, "box", **{"batch_size": 16, **kwargs})


def steep(algorithm: Any, **kwargs: Any) -> Any:
    """The same, whose σ falls as fast as it may; of the first-order methods, in large steps."""
    options = {} if algorithm in NATURAL else {"learning_rate": 0.03}
    return small(algorithm, **STEEP, **options, **kwargs)


def log_std_of(model: Any) -> np.ndarray:
    return model.policy.log_std.detach().numpy().copy()


class Watch(BaseCallback):
    """Keeps log σ as it is at every step, and what each rollout acted on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[np.ndarray] = []
        self.at_rollouts: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.seen.append(log_std_of(self.model))
        return True

    def _on_rollout_end(self) -> None:
        self.at_rollouts.append(log_std_of(self.model))


# A σ that is held


@pytest.mark.parametrize(("algorithm", "fast"), AT_TWO_SPEEDS)
def test_a_fixed_spread_stays_bit_for_bit(algorithm: Any, fast: bool) -> None:
    model = steep(algorithm, log_std="fixed", policy_kwargs={"log_std_init": -0.7}, fast_updates=fast)
    before, means = log_std_of(model), model.policy.action_net.weight.detach().clone()
    model.learn(5 * model.n_steps)
    assert log_std_of(model).tobytes() == before.tobytes() == np.full(3, -0.7, np.float32).tobytes()
    assert not torch.equal(model.policy.action_net.weight, means)
    assert model.logger.name_to_value["train/std"] == pytest.approx(math.exp(-0.7))
    assert model.policy.log_std not in model.policy.optimizer.state
    expected = "fast" if fast and algorithm in DROP_IN else "autograd"
    assert model.update_path.startswith(expected)


@pytest.mark.parametrize("algorithm", DROP_IN)
def test_and_falls_where_it_is_learnt(algorithm: Any) -> None:
    model = steep(algorithm)
    model.learn(5 * model.n_steps)
    assert (log_std_of(model) < 0).all()


@pytest.mark.parametrize("log_std", ["fixed", FALLING], ids=["fixed", "schedule"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_are_left_for_the_mean_alone(algorithm: Any, log_std: Any) -> None:
    model = small(algorithm, log_std=log_std)
    model.learn(2 * model.n_steps)
    assert model.policy.log_std.grad is None
    assert model.policy.action_net.weight.grad.norm() > 0


@pytest.mark.parametrize("option", [{"log_std": "fixed"}, {"log_std": FALLING}, {"log_std_min": -0.02}], ids=str)
@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [*((each, {"ent_coef": -0.1}) for each in DROP_IN), (TRPO, {"critic": "adam"}), (TRPO, {"momentum": 0.5})],
)
def test_both_speeds_are_one_program(algorithm: Any, arguments: dict[str, Any], option: dict[str, Any]) -> None:
    """One update from the same rollout, after one that both of them have."""
    first = small(algorithm, fast_updates=False, **arguments, **option)
    with_rollout(first).train()
    with_rollout(first)
    second = copy.deepcopy(first)
    second.fast_updates = True
    for model in (first, second):
        np.random.seed(0)
        torch.manual_seed(0)
        model.train()
    assert (first.update_path, second.update_path) == ("autograd: fast_updates=False", "fast")
    for (name, slow), fast in zip(first.policy.named_parameters(), second.policy.parameters(), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-3, atol=2e-4, msg=name)
        assert (slow.grad is None) == (fast.grad is None), name
        if slow.grad is not None:
            torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-3, atol=1e-4, msg=name)
    names = [name for name in first.logger.name_to_value if name.startswith("train/")]
    for name in ("train/kl_divergence_loss", "train/entropy", "train/std"):
        assert name in names
        assert second.logger.name_to_value[name] == pytest.approx(first.logger.name_to_value[name], rel=2e-3, abs=1e-7)


@pytest.mark.parametrize("log_std", ["fixed", FALLING], ids=["fixed", "schedule"])
@pytest.mark.parametrize("algorithm", [TRPO, RecurrentTRPO, PPOClip])
def test_fast_rollouts_act_with_it(algorithm: Any, log_std: Any) -> None:
    """The same actions and log-probabilities as SB3's loop, rollout for rollout."""
    kept = []
    for fast in ("exact", False):
        model = small(algorithm, log_std=log_std, fast_rollouts=fast, fast_updates=False)
        model.learn(3 * model.n_steps)
        assert model.rollout_path.startswith("fast" if fast else "stable_baselines3")
        kept.append((model.rollout_buffer.actions.copy(), model.rollout_buffer.log_probs.copy()))
    np.testing.assert_array_equal(kept[0][0], kept[1][0])
    np.testing.assert_allclose(kept[0][1], kept[1][1], rtol=1e-6)


def test_a_policy_that_is_frozen_by_hand_is_no_other() -> None:
    """``log_std="fixed"`` is what freezing the parameter is, and that has fast updates too."""
    ends = []
    for options in ({"log_std": "fixed"}, {}):
        model = small(TRPO, **options)
        model.policy.log_std.requires_grad_(False)
        model.learn(3 * model.n_steps)
        assert model.update_path == "fast"
        ends.append(flatten(list(model.policy.parameters())))
    assert torch.equal(*ends)


# A σ on a schedule


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_schedule_is_followed_from_the_start_to_the_end(algorithm: Any) -> None:
    model, watch = small(algorithm, log_std=FALLING), Watch()
    assert (log_std_of(model) == np.float32(-0.5)).all()
    model.learn(4 * model.n_steps, callback=watch)
    expected = [FALLING(1 - done) for done in (0.0, 0.25, 0.5, 0.75)]
    np.testing.assert_allclose(watch.at_rollouts, np.repeat(expected, 3).reshape(4, 3), rtol=1e-6)
    for rollout, value in enumerate(expected):  # at each step, and in the update that follows
        steps = watch.seen[rollout * model.n_steps : (rollout + 1) * model.n_steps]
        np.testing.assert_allclose(steps, np.full((model.n_steps, 3), value), rtol=1e-6)
    assert (log_std_of(model) == watch.at_rollouts[-1]).all()


@pytest.mark.parametrize("algorithm", DROP_IN)
def test_the_update_measures_from_the_policy_that_acted(algorithm: Any) -> None:
    """log π_old of the rollout is that of the policy with the σ of the rollout, so that all ratios begin at one."""
    model = with_rollout(small(algorithm, log_std=FALLING))
    model.num_timesteps = model._total_timesteps // 2
    with_rollout(model)
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    with torch.no_grad():
        _, log_prob, _ = batch.evaluate_actions(model.policy)
    torch.testing.assert_close(log_prob, batch.old_log_prob, rtol=1e-5, atol=1e-5)
    before = log_std_of(model)
    model.train()
    assert (log_std_of(model) == before).all()
    assert model.logger.name_to_value["train/std"] == pytest.approx(float(np.exp(before).mean()))


def test_a_second_call_of_learn_begins_again_or_goes_on() -> None:
    model, watch = small(TRPO, log_std=FALLING), Watch()
    model.learn(2 * model.n_steps, callback=watch)
    model.learn(2 * model.n_steps, callback=watch)
    model.learn(2 * model.n_steps, callback=watch, reset_num_timesteps=False)
    values = [float(each[0]) for each in watch.at_rollouts]
    assert values == pytest.approx([FALLING(1 - done) for done in (0, 0.5, 0, 0.5, 0.5, 0.75)])


def test_parameters_of_another_do_not_outlive_the_next_rollout() -> None:
    other, model, watch = small(TRPO, policy_kwargs={"log_std_init": 0.3}), small(TRPO, log_std=FALLING), Watch()
    model.set_parameters(other.get_parameters())
    assert (log_std_of(model) == np.float32(0.3)).all()
    assert not model.policy.log_std.requires_grad
    model.learn(model.n_steps, callback=watch)
    assert all((each == np.float32(-0.5)).all() for each in watch.seen)


@pytest.mark.parametrize("option", [{"momentum": 0.9}, {"sample_reuse": 3}], ids=str)
def test_what_is_remembered_outlives_a_schedule(option: dict[str, Any]) -> None:
    model = small(TRPO, log_std=FALLING, target_kl=1e-3, **option)
    for _ in range(3):
        model.learn(4 * model.n_steps, reset_num_timesteps=False)
        assert model._theta_left is not None
    if "sample_reuse" in option:
        assert len(model._past_rollouts) == 2
        seen = model._policy_samples(whole_rollout(model.rollout_buffer, model.action_space), None)
        assert len(seen) == 3 * model.n_steps
    else:
        assert model.logger.name_to_value["train/momentum"] == 0.9


def test_a_user_who_moves_a_fixed_spread_is_noticed() -> None:
    """Momentum is of another policy then."""
    model = small(TRPO, log_std="fixed", momentum=0.9, target_kl=1e-3)
    model.learn(2 * model.n_steps)
    assert model.logger.name_to_value["train/momentum"] == 0.9
    with torch.no_grad():
        model.policy.log_std -= 0.5
    with_rollout(model).train()
    assert model.logger.name_to_value["train/momentum"] == 0.0


def test_past_rollouts_have_the_ratios_of_the_policies_that_acted() -> None:
    acted: list[Any] = []

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            acted.append(copy.deepcopy(self.model.policy))

    model = small(TRPO, log_std=FALLING, sample_reuse=2)
    model.learn(4 * model.n_steps, callback=Keep())
    samples = [model._past_rollouts[-1].batch, whole_rollout(model.rollout_buffer, model.action_space)]
    assert len(acted) == 4 and len(model._past_rollouts) == 1
    assert float(acted[-1].log_std.sum()) == pytest.approx(3 * FALLING(0.25))
    with_rollout(model)  # so that the last one is a past one
    seen = model._policy_samples(whole_rollout(model.rollout_buffer, model.action_space), None)
    with torch.no_grad():
        _, log_prob, _ = samples[1].evaluate_actions(acted[-1])
    torch.testing.assert_close(seen.old_log_prob[model.n_steps :], log_prob, rtol=1e-5, atol=1e-5)


# The floor


@pytest.mark.parametrize(("algorithm", "fast"), AT_TWO_SPEEDS)
@pytest.mark.parametrize("floor", [-0.01, -0.1, -0.3000001])
def test_the_floor_is_never_crossed(algorithm: Any, fast: bool, floor: float) -> None:
    model, watch = steep(algorithm, log_std_min=floor, fast_updates=fast, target_kl=0.1), Watch()
    model.learn(8 * model.n_steps, callback=watch)
    reached = np.stack([*watch.seen, log_std_of(model)]).astype(np.float64)
    assert (reached >= floor).all()  # as a number of float64, not as its neighbour in float32
    assert model.logger.name_to_value["train/std"] >= math.exp(floor)
    assert np.isclose(reached[-1], floor, atol=0.02).any() or floor < -0.2


@pytest.mark.parametrize("policy_kwargs", [{"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}}, {}], ids=str)
def test_an_optimiser_that_steps_by_itself_keeps_to_the_floor(policy_kwargs: dict[str, Any]) -> None:
    model = steep(PPOClip, log_std_min=-0.05, policy_kwargs=policy_kwargs, max_grad_norm=10.0)
    model.learn(8 * model.n_steps)
    assert log_std_of(model).min() == np.float32(representable(-0.05, model.policy.log_std))


@pytest.mark.parametrize("algorithm", NATURAL)
@pytest.mark.parametrize("radius", [None, 0.05])
def test_what_is_logged_is_the_truth_at_the_floor(algorithm: Any, radius: float | None) -> None:
    """Exact KL divergence and linear prediction of the step that was taken, not of the one that was cut."""
    model = steep(algorithm, log_std_min=-0.02, target_kl_std=radius, target_kl=0.02, normalize_advantage=False)
    for _ in range(3):
        with_rollout(model)
        before = copy.deepcopy(model.policy)
        theta = {name: param.detach().clone() for name, param in model.policy.named_parameters()}
        model.train()
        logged = model.logger.name_to_value
        with torch.no_grad(), consistent_evaluation(model.policy), consistent_evaluation(before):
            batch = whole_rollout(model.rollout_buffer, model.action_space)
            family = GaussianFamily()
            old, new = (family.coordinates(batch.distribution(each)).clone() for each in (before, model.policy))
            old, new = batch.unpadded(old), batch.unpadded(new)
            assert logged["train/kl_divergence_loss"] == pytest.approx(
                float(batch.mean(family.kl(old, new))), rel=1e-4, abs=1e-8
            )
        slope = sum(
            float((-param.grad * (param.detach() - theta[name])).sum())
            for name, param in model.policy.named_parameters()
            if param.grad is not None and not name.startswith(("value_net", "mlp_extractor.value", "lstm_critic"))
        )
        assert slope > 0
        assert logged["train/expected_improvement"] == pytest.approx(slope, rel=1e-3)
        if algorithm in (TRPO, RecurrentTRPO):
            of_spread = logged.get("train/kl_std", 0.0)
            assert logged["train/kl_divergence_loss"] <= logged["train/target_kl"] + of_spread + 1e-7


def test_a_floor_that_is_reached_leaves_the_radius_to_the_others() -> None:
    """With σ at its floor and pulled below, the step is that of a policy whose σ is fixed."""
    floored, fixed = (with_rollout(steep(TRPO, **each)) for each in ({"log_std_min": 0.0}, {"log_std": "fixed"}))
    for model in (floored, fixed):
        np.random.seed(0)
        torch.manual_seed(0)
        model.train()
    assert torch.equal(floored.policy.log_std, torch.zeros(3))
    for one, other in zip(floored.policy.parameters(), fixed.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert floored.policy.log_std.grad is not None  # ∇L is left as it is


def test_a_loaded_spread_is_raised_to_the_floor() -> None:
    model = small(TRPO, log_std_min=-0.1)
    model.set_parameters(small(TRPO, policy_kwargs={"log_std_init": -2.0}).get_parameters())
    assert (log_std_of(model) >= -0.1).all()
    with torch.no_grad():
        model.policy.log_std.fill_(-3.0)
    watch = Watch()
    model.learn(model.n_steps, callback=watch)
    assert all((each >= -0.1).all() for each in watch.seen)


class OneSpread:
    """A problem with no other parameter than log σ."""

    def __init__(self, theta: Tensor, gradient: Tensor) -> None:
        self.params, self.theta_old, self.gradient = [nn.Parameter(theta.clone())], theta, gradient
        self.start = None

    def evaluate(self) -> Any:
        return self.params[0].detach().clone()


def test_rounding_does_not_leave_a_trial_below_the_floor() -> None:
    """Steps that are cut at the floor end below it by a last bit here and there, unless somebody looks."""
    torch.manual_seed(0)
    below = 0
    for _ in range(200):
        floor = float(-0.1 * torch.rand(()))  # a finer grid of numbers than that of the step
        theta = floor + torch.rand(8)
        problem = OneSpread(theta, -torch.rand(8))
        lowest = representable(floor, theta)
        theta.clamp_(min=lowest)
        size = 1 + 9 * float(torch.rand(()))
        direction = Direction(problem.gradient, problem.gradient, 1.0, 1.0, 1.0, None)
        step = SpreadBlock(problem, problem.params[0], lowest=floor).step(direction, size)
        for fraction in (1.0, 0.8, 0.64):
            assign(problem.params, theta + fraction * size * step.direction.x)
            below += int((problem.params[0] < lowest).sum())
            assert bool((step.problem.evaluate() >= lowest).all())
    assert below


@given(st.floats(-80, 80))
def test_a_floor_is_rounded_upwards(floor: float) -> None:
    found = representable(floor, torch.empty(0))
    assert found >= floor
    assert found == float(np.float32(found))
    assert found - floor <= np.spacing(np.float32(abs(floor)))


# A radius of its own


@given(
    st.lists(st.floats(-5, 5).filter(lambda each: abs(each) > 1e-3), min_size=1, max_size=6),
    st.floats(-8, 0.5).map(lambda each: 10**each),
)
def test_a_step_of_the_spread_goes_to_its_boundary(direction: list[float], radius: float) -> None:
    gradient = torch.tensor(direction, dtype=torch.float64)
    shift = longest_step(gradient, radius)
    quadratic, exact = float(shift.square().sum()), spread_divergence(shift)
    torch.testing.assert_close(shift / shift.norm(), gradient / gradient.norm())
    assert quadratic <= radius * (1 + 1e-9)
    assert exact <= radius * (1 + 1e-9)
    assert max(quadratic, exact) == pytest.approx(radius, rel=1e-6)


@pytest.mark.parametrize("radius", [1e-300, 1e4])
def test_a_radius_of_any_size_has_a_step(radius: float) -> None:
    for sign in (-1.0, 1.0):
        assert spread_divergence(longest_step(torch.full((3,), sign, dtype=torch.float64), radius)) <= radius * 1.000001
    assert not bool(longest_step(torch.zeros(3, dtype=torch.float64), radius).any())


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=5))
def test_the_part_of_the_spread_is_torchs(shift: list[float]) -> None:
    step = torch.tensor(shift, dtype=torch.float64)
    old, new = torch.distributions.Normal(0.0, torch.ones_like(step)), torch.distributions.Normal(0.0, step.exp())
    expected = float(torch.distributions.kl_divergence(old, new).sum())
    assert spread_divergence(step) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("algorithm", "momentum"), [(TRPO, 0.0), (TRPO, 0.5), (NPG, 0.0)])
def test_both_blocks_are_natural_steps(algorithm: Any, fast: bool, momentum: float) -> None:
    """In float64, against the dense Fisher matrix of all parameters."""
    radii = {"target_kl": 1e-6, "target_kl_std": 1e-8}  # so small that both quadratic models are exact
    options = {"momentum": momentum} if momentum else {}
    kwargs = {"cg_residual_tol": 0.0, "cg_max_steps": 300, "cg_damping": 1e-3, "curvature_samples": None}
    model = small(algorithm, fast_updates=fast, policy_kwargs={"net_arch": [4]}, **kwargs, **radii, **options)
    if momentum:
        with_rollout(model).train()
    model = in_float64(with_rollout(model))
    with consistent_evaluation(model.policy):
        batch = whole_rollout(model.rollout_buffer, model.action_space)
        problem = model._problem(batch)
        place = next(index for index, param in enumerate(problem.params) if param is model.policy.log_std)
        start = sum(param.numel() for param in problem.params[:place])
        spread = torch.zeros_like(problem.theta_old, dtype=torch.bool)
        spread[start : start + 3] = True
        fisher = dense_fisher(model.policy, batch, problem.params).detach()
        step = model._policy_step(problem)
        moved = flatten(problem.params).detach() - problem.theta_old
    assert not step.reason
    v = step.direction.vector.double()
    assert bool(momentum) == (step.direction.vector is not problem.gradient)

    torch.testing.assert_close(fisher[spread][:, spread], 2 * torch.eye(3, dtype=torch.float64))
    assert float(fisher[spread][:, ~spread].abs().max()) < 1e-12

    s = moved[spread]
    natural = torch.linalg.solve(fisher[spread][:, spread], v[spread])
    torch.testing.assert_close(s / s.norm(), natural / natural.norm(), rtol=1e-5, atol=1e-7)
    quadratic = 0.5 * float(s @ fisher[spread][:, spread] @ s)
    assert quadratic == pytest.approx(model.spread_radius() * step.fraction**2, rel=1e-3)
    assert spread_divergence(s) <= model.spread_radius() * (1 + 1e-9)

    damped = fisher[~spread][:, ~spread] + 3 * model.cg_damping * torch.eye(int((~spread).sum()), dtype=torch.float64)
    x = torch.linalg.solve(damped, v[~spread])
    mean = moved[~spread]
    torch.testing.assert_close(mean / mean.norm(), x / x.norm(), rtol=1e-2, atol=1e-3)
    used = 0.5 * float(mean @ damped @ mean)
    assert used == pytest.approx(model.trust_region_radius() * step.fraction**2, rel=2e-3)


@pytest.mark.parametrize("trust_region", ["mean", "max"])
@pytest.mark.parametrize("algorithm", [TRPO, RecurrentTRPO])
def test_each_part_of_the_divergence_keeps_to_its_radius(algorithm: Any, trust_region: Any) -> None:
    model = small(algorithm, target_kl=0.02, target_kl_std=0.003, trust_region=trust_region)
    successes = 0
    for _ in range(6):
        with_rollout(model)
        before = model.policy.log_std.detach().clone()
        model.train()
        logged = model.logger.name_to_value
        exact = spread_divergence(model.policy.log_std.detach().double() - before.double())
        assert logged["train/kl_std"] == pytest.approx(exact, rel=1e-6)
        assert logged["train/target_kl_std"] == pytest.approx(3 * 0.003)
        assert exact <= logged["train/target_kl_std"] * (1 + 1e-5)
        joint = logged["train/kl_divergence_loss" if trust_region == "mean" else "train/kl_max"]
        assert joint - exact <= logged["train/target_kl"] * (1 + 1e-5)
        successes += int(logged["train/is_line_search_success"])
    assert successes >= 4


def test_the_spread_has_its_radius_beside_the_means() -> None:
    """With a mean that may hardly move, the full step is taken, whose KL divergence is nearly all that of σ."""
    model = small(TRPO, target_kl=1e-4, target_kl_std=0.01)
    with_rollout(model).train()
    logged = model.logger.name_to_value
    assert logged["train/is_line_search_success"]
    assert logged["train/kl_std"] > 10 * logged["train/target_kl"]
    assert logged["train/kl_divergence_loss"] > logged["train/kl_std"]


def test_a_schedule_of_the_radius_and_the_share_of_reused_samples() -> None:
    model = small(
        TRPO, target_kl_std=lambda progress: 0.002 + 0.008 * progress, sample_reuse=3, kl_per_action_dim=False
    )
    model._current_progress_remaining = 0.5
    assert model.spread_radius() == pytest.approx(0.006 / 4)
    model.kl_per_action_dim = True
    assert model.spread_radius() == pytest.approx(3 * 0.006 / 4)
    assert small(TRPO).spread_radius() is None


def test_a_spread_of_which_alone_there_is_a_gradient_is_moved() -> None:
    model = small(TRPO, target_kl_std=0.01)
    for name, param in model.policy.named_parameters():
        param.requires_grad_(name == "log_std" or "value" in name)
    before = log_std_of(model)
    with_rollout(model).train()
    assert model.logger.name_to_value["train/kl_std"] > 0
    assert (log_std_of(model) != before).all()


def test_a_penalty_has_no_radius_but_that_of_the_spread() -> None:
    model = small(TRPO, kl_penalty=1.0, target_kl_std=1e-4)
    with_rollout(model).train()
    logged = model.logger.name_to_value
    assert 0 < logged["train/kl_std"] <= 3e-4 * (1 + 1e-5) < logged["train/kl_divergence_loss"]


# Saved and brought back


@pytest.mark.parametrize(
    ("algorithm", "option"),
    [
        *((each, {"log_std": "fixed"}) for each in (TRPO, RecurrentTRPO, PPOClip)),
        *((each, {"log_std": FALLING}) for each in (TRPO, RecurrentTRPO, PPOClip)),
        *((each, {"log_std_min": -0.05}) for each in (TRPO, RecurrentTRPO, PPOClip)),
        *((each, {"target_kl_std": LinearSchedule(0.01, 1e-3, 1)}) for each in (TRPO, RecurrentTRPO)),
    ],
)
def test_settings_are_saved_with_the_model(algorithm: Any, option: dict[str, Any]) -> None:
    model = steep(algorithm, **option)
    model.learn(3 * model.n_steps)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = algorithm.load(file, env=model.env)
    assert (log_std_of(loaded) == log_std_of(model)).all()
    assert loaded.policy.log_std.requires_grad == ("log_std" not in option)
    for each in (model, loaded):
        each.set_random_seed(1)
        each._last_obs = None
        each.env.reset()
        if hasattr(each, "_last_lstm_states"):
            each._forget()
        each.learn(3 * each.n_steps)
    assert torch.equal(*(flatten(list(each.policy.parameters())) for each in (model, loaded)))


def test_a_model_is_loaded_with_another_setting() -> None:
    model = small(TRPO, log_std="fixed", policy_kwargs={"log_std_init": -0.4})
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = TRPO.load(file, env=model.env, log_std="learned")
    loaded.learn(2 * loaded.n_steps)
    assert (log_std_of(loaded) != np.float32(-0.4)).all()


class KilledError(Exception):
    """Stands for the end of the process."""


class Kill(BaseCallback):
    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        if self.at and self.num_timesteps >= self.at:
            raise KilledError
        return True


class Resumable(RandomEnv):
    """Hands over its state."""

    def get_checkpoint_state(self) -> Any:
        return self._time, self._rng, self.observation_space.np_random

    def set_checkpoint_state(self, state: Any) -> None:
        self._time, self._rng, self.observation_space._np_random = state


@pytest.mark.parametrize(
    ("algorithm", "option"),
    [
        *((each, {"log_std": FALLING}) for each in (TRPO, PPOClip)),
        *((each, {"log_std_min": -0.03}) for each in (TRPO, PPOClip)),
        (TRPO, {"log_std": "fixed"}),
        (TRPO, {"log_std": FALLING, "sample_reuse": 2}),
        (TRPO, {"target_kl_std": 1e-3, "log_std_min": -0.03}),
    ],
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(algorithm: Any, option: dict[str, Any], tmp_path: Path) -> None:
    def build() -> Any:
        env = DummyVecEnv([lambda: Resumable(action_space=ACTION_SPACES["box"])])
        return algorithm("MlpPolicy", env, n_steps=32, batch_size=16, device="cpu", seed=0, **option)

    ends = []
    for folder, kills in (("whole", [0]), ("killed", [100, 170, 0])):
        for at in kills:
            model = build()
            try:
                model.learn(256, callback=Kill(at), checkpoint_dir=tmp_path / folder, checkpoint_freq=1)
            except KilledError:
                continue
        ends.append(flatten(list(model.policy.parameters())))
    assert torch.equal(*ends)


# Refusals

OPTIONS: dict[str, Any] = {"log_std": "fixed", "log_std_min": -1.0, "target_kl_std": 0.01}


def options_of(algorithm: Any) -> list[str]:
    return [name for name in OPTIONS if name != "target_kl_std" or algorithm in (*NATURAL, MaskableTRPO)]


@pytest.mark.parametrize("action", ["discrete", "multidiscrete", "multibinary"])
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, MaskableTRPO])
def test_actions_without_a_spread_are_refused(algorithm: Any, action: str) -> None:
    for name in options_of(algorithm):
        with pytest.raises(ValueError, match=rf"`{name}`.*got {OPTIONS[name]!r} with the action space"):
            make(algorithm, action, **{name: OPTIONS[name]})
    with pytest.raises(ValueError, match=r"`log_std`.*action space"):
        make(algorithm, action, log_std=FALLING)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gsde_is_refused(algorithm: Any) -> None:
    for name in options_of(algorithm):
        with pytest.raises(ValueError, match=rf"`{name}`.*got {OPTIONS[name]!r} with use_sde=True"):
            make(algorithm, "box", use_sde=True, **{name: OPTIONS[name]})


class StateDependent(ActorCriticPolicy):
    """σ from the state, beside a `log_std` that nobody reads."""

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Any:
        return self.action_dist.proba_distribution(self.action_net(latent_pi), latent_pi[:, :3])


class Softplus(ActorCriticPolicy):
    """σ = log(1 + e^p), of a p that is called log σ."""

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Any:
        return self.action_dist.proba_distribution(
            self.action_net(latent_pi), nn.functional.softplus(self.log_std).log()
        )


class BoundedMean(ActorCriticPolicy):
    """Another mean, and the σ of SB3."""

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Any:
        return self.action_dist.proba_distribution(self.action_net(latent_pi).tanh(), self.log_std)


class OwnFamily(GaussianFamily):
    """With a geometry that is not known."""


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (StateDependent, "makes another σ"),
        (Softplus, "makes another σ"),
        (with_distribution(ActorCriticPolicy, BetaDistribution), "its action distribution is BetaDistribution"),
    ],
)
def test_policies_without_such_a_spread_are_refused(policy: Any, reason: str) -> None:
    env = RandomEnv(action_space=ACTION_SPACES["box"])
    for algorithm in DROP_IN:
        for name in options_of(algorithm):
            with pytest.raises(ValueError, match=rf"`{name}`.*{policy.__name__}: .*{reason}"):
                algorithm(policy, env, n_steps=32, batch_size=16, device="cpu", **{name: OPTIONS[name]})


def test_a_policy_with_a_mean_of_its_own_is_served() -> None:
    env = RandomEnv(action_space=ACTION_SPACES["box"])
    model = TRPO(BoundedMean, env, n_steps=32, device="cpu", log_std=FALLING)
    model.learn(64)
    assert (log_std_of(model) == np.float32(-1.0)).all()


def test_another_geometry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "_FACTORIES", dict(distributions._FACTORIES))
    register_distribution(distributions.DiagGaussianDistribution, lambda _: OwnFamily())
    with pytest.raises(ValueError, match="registered as OwnFamily"):
        small(TRPO, target_kl_std=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"log_std": "free"}, "`log_std` must be 'learned', 'fixed' or a schedule.*'free'"),
        ({"log_std": -0.5}, r"`log_std` must be.*got -0\.5.*log_std_init"),
        ({"log_std": None}, "`log_std` must be.*None"),
        (
            {"log_std": lambda progress: math.log(progress) if progress else -math.inf},
            "`log_std` must be a finite.*-inf",
        ),
        ({"log_std": lambda progress: -200.0 * progress}, "`log_std` must lie between.*-200"),
        ({"log_std_min": math.nan}, "`log_std_min`.*nan"),
        ({"log_std_min": "low"}, "`log_std_min`.*low"),
        ({"log_std_min": 0.5}, r"`log_std_min` must not be above.*got 0\.5"),
        ({"log_std": "fixed", "log_std_min": -1.0}, r"`log_std_min`.*got -1\.0 with log_std='fixed'"),
        ({"log_std": "fixed", "target_kl_std": 0.1}, r"`target_kl_std`.*got 0\.1 with log_std='fixed'"),
        ({"target_kl_std": 0.0}, r"`target_kl_std`.*0\.0"),
        ({"target_kl_std": -1}, "`target_kl_std`.*-1"),
        ({"target_kl_std": lambda progress: progress}, r"`target_kl_std`.*0\.0.*schedule"),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(TRPO, **arguments)


def test_a_floor_at_the_beginning_is_none_above_it() -> None:
    """-0.1 is not a number of float32, and the policy begins a little below it."""
    model = small(TRPO, log_std_min=-0.1, policy_kwargs={"log_std_init": -0.1})
    assert (log_std_of(model).astype(np.float64) >= -0.1).all()


@pytest.mark.parametrize("algorithm", FIRST_ORDER)
def test_first_order_methods_have_no_radius_for_it(algorithm: Any) -> None:
    with pytest.raises(TypeError, match=r"target_kl_std.*0\.01.*log_std_min"):
        small(algorithm, target_kl_std=0.01)
