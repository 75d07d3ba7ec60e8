"""A promise to users: a critic with a value for each action, and what is made of it, is what the formulas say."""

import copy
from itertools import product
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, SMALL, RandomEnv, dense_fisher, in_float64, make, with_rollout
from gymnasium.wrappers import TimeLimit
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from sb3_trpo_ext import (
    NPG,
    TRPO,
    ActionValues,
    MaskableTRPO,
    PPOClip,
    PPOPenalty,
    RecurrentNPG,
    RecurrentPPOClip,
    RecurrentTRPO,
)
from sb3_trpo_ext.core.advantages import trace_advantages
from sb3_trpo_ext.core.parameters import assign, flatten
from sb3_trpo_ext.policy.evaluation import consistent_evaluation
from sb3_trpo_ext.policy.problem import PolicyProblem
from sb3_trpo_ext.rollout.buffers import whole_rollout
from sb3_trpo_ext.rollout.past_rollouts import PastRollout

Q = {"critic": "action_value"}
PLAIN = (TRPO, NPG, PPOClip, PPOPenalty)
COMBINATIONS = list(product(("expected", "max"), ("sampled", "expected")))
K = ACTION_SPACES["discrete"].n


def masks_of(model: Any) -> Any:
    return {"action_masks": model.rollout_buffer.action_masks} if isinstance(model, MaskableTRPO) else {}


def disturbed(model: Any, seed: int = 0) -> Any:
    """Its parameters somewhere, so that policy and values say something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.policy.parameters():
            param.add_(0.3 * torch.randn(param.shape, generator=generator).to(param))
    return model


# The policy


@pytest.mark.parametrize("observation", ["vector", "discrete", "image", "dict"])
@pytest.mark.parametrize("algorithm", [TRPO, PPOClip, MaskableTRPO])
def test_a_value_is_the_expectation_over_actions(algorithm: Any, observation: str) -> None:
    model = disturbed(make(algorithm, observation=observation, n_steps=6, batch_size=3, **Q))
    policy, space = model.policy, OBSERVATION_SPACES[observation]
    assert policy.value_net.out_features == K
    seen, _ = policy.obs_to_tensor(space.sample())
    masks = {"action_masks": torch.tensor([[1, 0, 1, 1]])} if algorithm is MaskableTRPO else {}
    action_values = policy.action_values(seen)
    assert action_values.shape == (1, K)
    probabilities = policy.get_distribution(seen, **masks).distribution.probs.detach()
    if masks:
        assert probabilities[0, 1] == 0
    expected = (probabilities * action_values).sum(dim=1, keepdim=True)
    held = policy.action_dist.distribution
    predicted = policy.predict_values(seen, *masks.values())
    assert policy.action_dist.distribution is held  # which others may still look at
    torch.testing.assert_close(predicted, expected)
    actions, values, log_prob = policy(seen, **masks)
    torch.testing.assert_close(values, expected)
    values, evaluated, _ = policy.evaluate_actions(seen, actions, **masks)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(evaluated, log_prob)
    greedy = policy.greedy_values(seen, *masks.values())
    kept = action_values[:, [0, 2, 3]] if masks else action_values
    torch.testing.assert_close(greedy, kept.max(dim=1, keepdim=True).values)
    for value in (predicted, values):
        slopes = torch.autograd.grad(value.sum(), policy.action_net.weight, allow_unused=True, retain_graph=True)
        assert slopes == (None,)  # π is a constant in V


@pytest.mark.parametrize(("bootstrap", "surrogate"), COMBINATIONS)
@pytest.mark.parametrize("algorithm", [*PLAIN, MaskableTRPO])
def test_it_trains_saves_loads_and_is_evaluated_as_any_model(
    algorithm: Any, bootstrap: str, surrogate: str, tmp_path: Path
) -> None:
    options = {**Q, "bootstrap": bootstrap, "surrogate": surrogate, "batch_size": 16}
    model = make(algorithm, **options).learn(64)
    before = flatten(list(model.policy.parameters())).detach().clone()
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=model.env, device="cpu")
    assert isinstance(loaded.policy, ActionValues)
    assert (loaded.critic, loaded.bootstrap, loaded.surrogate) == ("action_value", bootstrap, surrogate)
    assert torch.equal(flatten(list(loaded.policy.parameters())), before)
    loaded.learn(32, reset_num_timesteps=False)
    assert not torch.equal(flatten(list(loaded.policy.parameters())), before)
    evaluate_policy(loaded, loaded.env, n_eval_episodes=1, warn=False)


class WiderPolicy(ActorCriticPolicy):
    pass


class Mine(ActionValues, WiderPolicy):
    pass


def test_a_policy_of_ones_own_may_have_action_values() -> None:
    env = RandomEnv()
    for critic in ("auto", "action_value"):
        model = TRPO(Mine, env, n_steps=16, device="cpu", critic=critic).learn(16)
        assert model.policy.value_net.out_features == K


@pytest.mark.parametrize(
    ("algorithm", "action", "options", "message"),
    [
        (TRPO, "box", Q, "Discrete"),
        (NPG, "multidiscrete", Q, "Discrete"),
        (PPOClip, "multibinary", Q, "Discrete"),
        (PPOPenalty, "box2d", Q, "Discrete"),
        (MaskableTRPO, "multidiscrete", Q, "Discrete"),
        (RecurrentTRPO, "discrete", Q, "without memory"),
        (RecurrentNPG, "discrete", Q, "without memory"),
        (RecurrentPPOClip, "discrete", Q, "without memory"),
        (TRPO, "discrete", {"bootstrap": "max"}, "critic='action_value'"),
        (TRPO, "discrete", {"surrogate": "expected"}, "critic='action_value'"),
        (PPOClip, "discrete", {"surrogate": "expected"}, "critic='action_value'"),
        (TRPO, "discrete", {**Q, "bootstrap": "maximum"}, "`bootstrap` must be 'expected' or 'max'"),
        (TRPO, "discrete", {**Q, "surrogate": "exact"}, "`surrogate` must be 'sampled' or 'expected'"),
        (PPOClip, "discrete", {"critic": "adam"}, "`critic` must be 'value' or 'action_value'"),
        (
            TRPO,
            "discrete",
            {**Q, "critic_kwargs": {"fit": "newton"}},
            r"`critic_kwargs\['fit'\]` must .*'semi_gradient'",
        ),
        (TRPO, "discrete", {**Q, "critic_kwargs": {"fit": "adam", "a": 1}}, r"critic_kwargs\['fit'\]='adam'"),
        (TRPO, "discrete", {**Q, "critic_kwargs": {"fit": "semi_gradient", "discounted": 2}}, "'discounted'"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(
    algorithm: Any, action: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(algorithm, action, batch_size=16, **options)


class Behind(WiderPolicy, ActionValues):
    pass


class DeepHead(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.value_net = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 1))


class Deep(ActionValues, DeepHead):
    pass


@pytest.mark.parametrize(
    ("policy", "action", "message"),
    [
        (Behind, "discrete", "List it first"),
        (Deep, "discrete", "`value_net` of class Sequential"),
        (Mine, "box", "derives from ActionValues.* needs Discrete"),
    ],
)
@pytest.mark.parametrize("algorithm", [TRPO, PPOClip])
def test_a_policy_that_cannot_have_action_values_is_refused(
    algorithm: Any, policy: Any, action: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        algorithm(policy, RandomEnv(action_space=ACTION_SPACES[action]), device="cpu")


class TwoRates(ActorCriticPolicy):
    """An optimiser with settings of their own for some parameters."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        critic = [*self.mlp_extractor.value_net.parameters(), *self.value_net.parameters()]
        others = [param for param in self.parameters() if all(param is not each for each in critic)]
        groups = [{"params": critic, "weight_decay": 0.1}, {"params": others}]
        self.optimizer = self.optimizer_class(groups, lr=lr_schedule(1), **self.optimizer_kwargs)


class TwoRatesOfActions(ActionValues, TwoRates):
    pass


def test_an_optimisers_groups_stay() -> None:
    model = PPOClip(TwoRatesOfActions, RandomEnv(), n_steps=16, batch_size=8, device="cpu", **Q)
    first, second = model.policy.optimizer.param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0)
    assert any(param is model.policy.value_net.weight for param in first["params"])
    held = {id(param) for group in (first, second) for param in group["params"]}
    assert held == {id(param) for param in model.policy.parameters()}
    before = model.policy.value_net.weight.detach().clone()
    assert not torch.equal(before, model.learn(16).policy.value_net.weight)


class Sharper(ActorCriticPolicy):
    """Makes another distribution than the one that it holds."""

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Any:
        return CategoricalDistribution(K).proba_distribution(self.action_net(latent_pi) / 0.1)


class SharperOfActions(ActionValues, Sharper):
    pass


@pytest.mark.parametrize("surrogate", ["sampled", "expected"])
@pytest.mark.parametrize("algorithm", [TRPO, PPOClip])
def test_a_policy_may_make_its_distribution_otherwise(algorithm: Any, surrogate: str) -> None:
    env = RandomEnv()
    model = algorithm(SharperOfActions, env, n_steps=16, batch_size=8, device="cpu", surrogate=surrogate, **Q)
    policy, (seen, _) = disturbed(model).policy, model.policy.obs_to_tensor(env.observation_space.sample())
    expected = policy.get_distribution(seen).distribution.probs @ policy.action_values(seen)[0]
    actions, values, _ = policy(seen)
    torch.testing.assert_close(values[0], expected)
    torch.testing.assert_close(policy.evaluate_actions(seen, actions)[0][0], expected)
    torch.testing.assert_close(policy.predict_values(seen)[0], expected)
    model.learn(16)


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        (Q, {"bootstrap": "maximum"}, "`bootstrap` must be 'expected' or 'max'"),
        (Q, {"surrogate": "exact"}, "`surrogate` must be 'sampled' or 'expected'"),
        ({}, {"bootstrap": "max"}, "critic='action_value'"),
        ({}, {"surrogate": "expected"}, "critic='action_value'"),
        ({}, {"critic": "action_value"}, "Make a new model"),
    ],
)
@pytest.mark.parametrize("algorithm", [TRPO, PPOClip])
def test_what_cannot_be_is_refused_later_too(
    algorithm: Any, options: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    model = make(algorithm, batch_size=16, **options).learn(32)
    before = flatten(list(model.policy.parameters())).detach().clone()
    vars(model).update(changed)
    with pytest.raises(ValueError, match=message):
        model.learn(32)
    assert torch.equal(before, flatten(list(model.policy.parameters())))


def test_a_policy_without_and_a_buffer_of_ones_own_are_refused() -> None:
    with pytest.raises(ValueError, match="ActionValues, WiderPolicy"):
        TRPO(WiderPolicy, RandomEnv(), **Q)

    with pytest.raises(ValueError, match="rollout_buffer_class"):
        make(PPOClip, batch_size=16, rollout_buffer_class=OwnBuffer, **Q)


# Advantages and returns of a rollout


class Told(gym.Wrapper):
    """Says which actions are allowed, in the way of Gymnasium's Taxi."""

    def step(self, action: Any) -> Any:
        *rest, info = super().step(action)
        mask = np.ones(K, np.int8)
        mask[self.unwrapped._time % K] = 0
        return *rest, info | {"action_mask": mask}


def with_limit(masked: bool = False) -> gym.Env:
    env: Any = TimeLimit(Told(RandomEnv(episode_length=5)), 3)
    if masked:

        def masks(env: Any) -> np.ndarray:
            allowed = np.ones(K, bool)
            allowed[env.unwrapped._time % 3] = False
            return allowed

        env = ActionMasker(env, masks)
    return env


class Infos(BaseCallback):
    """Keeps the rewards and infos of every step as the environments gave them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []
        self.at_end: Any = None

    def _on_step(self) -> bool:
        keys = ("rewards", "dones", "infos")
        self.steps.append(copy.deepcopy({key: self.locals[key] for key in keys}))
        return True

    def _on_rollout_end(self) -> None:
        self.at_end = self.model.rollout_buffer.advantages.copy()


def greedy(row: Tensor, mask: Any) -> float:
    return max(float(q) for q, allowed in zip(row, mask, strict=True) if allowed)


def mean(row: Tensor, p: Tensor, mask: Any) -> float:
    weights = [float(w) if allowed else 0.0 for w, allowed in zip(p, mask, strict=True)]
    return sum(w * float(q) for w, q in zip(weights, row, strict=True)) / sum(weights)


@settings(max_examples=25)
@given(
    bootstrap=st.sampled_from(["expected", "max"]),
    decay=st.sampled_from([0.0, 0.7, 1.0]),
    fast=st.sampled_from([True, False]),
    masked=st.booleans(),
    n_envs=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_returns_are_those_of_the_definition(
    bootstrap: str, decay: float, fast: bool, masked: bool, n_envs: int, seed: int
) -> None:
    """G = r + γ [(1-λ) B(s') + λ G'] step by step, with masks and through time limits; A = G - V(s)."""
    algorithm = MaskableTRPO if masked else TRPO
    venv = make_vec_env(with_limit, n_envs=n_envs, seed=seed, env_kwargs={"masked": masked})
    model = algorithm(
        *("MlpPolicy", venv), n_steps=7, gamma=0.9, gae_lambda=decay, seed=seed, device="cpu",
        bootstrap=bootstrap, fast_rollouts=fast, **Q,
    )  # fmt: skip
    model = disturbed(model, seed)
    seen = Infos()
    model.train = lambda: None
    model.learn(7 * n_envs, callback=seen)
    buffer, policy = model.rollout_buffer, model.policy
    assert (model.rollout_path == "fast") == fast

    def b(observation: Any, mask: Any) -> float:
        row, _ = policy.obs_to_tensor(np.asarray(observation))
        with torch.no_grad():
            q, p = policy.action_values(row)[0], policy.probabilities(row)[0]
        return greedy(q, mask) if bootstrap == "max" else mean(q, p, mask)

    masks = buffer.action_masks if masked else np.ones((7, n_envs, K))
    after = np.stack(venv.env_method("action_masks")) if masked else np.ones((n_envs, K))
    for env in range(n_envs):
        following = 0.0
        for step in reversed(range(7)):
            found = seen.steps[step]
            info = found["infos"][env]
            if found["dones"][env]:
                cut_off = info["TimeLimit.truncated"]
                told = info["action_mask"] if masked else np.ones(K)
                target = found["rewards"][env] + (0.9 * b(info["terminal_observation"], told) if cut_off else 0)
            elif step == 6:
                target = found["rewards"][env] + 0.9 * b(model._last_obs[env], after[env])
            else:
                ahead = b(buffer.observations[step + 1, env], masks[step + 1, env])
                target = found["rewards"][env] + 0.9 * ((1 - decay) * ahead + decay * following)
            following = float(target)
            np.testing.assert_allclose(buffer.returns[step, env], target, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(buffer.advantages, buffer.returns - buffer.values, atol=2e-6)
    np.testing.assert_array_equal(seen.at_end, buffer.advantages)  # a callback at the end has seen them already


class AsksAgain(BaseCallback):
    """Estimates advantages once more when the rollout is there, as those do that shape its rewards."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        before = buffer.rewards.copy(), buffer.advantages.copy(), buffer.returns.copy()
        with torch.no_grad():
            values = self.model.policy.predict_values(self.model.policy.obs_to_tensor(self.model._last_obs)[0])
        buffer.compute_returns_and_advantage(last_values=values, dones=self.model._last_episode_starts)
        for array, again in zip(before, (buffer.rewards, buffer.advantages, buffer.returns), strict=True):
            np.testing.assert_array_equal(array, again)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("algorithm", "bootstrap"), [(TRPO, "max"), (MaskableTRPO, "expected")])
def test_advantages_may_be_estimated_again(algorithm: Any, bootstrap: str, fast: bool) -> None:
    venv = make_vec_env(with_limit, n_envs=2, seed=0, env_kwargs={"masked": algorithm is MaskableTRPO})
    model = algorithm("MlpPolicy", venv, n_steps=16, device="cpu", bootstrap=bootstrap, fast_rollouts=fast, **Q)
    disturbed(model).learn(32, callback=AsksAgain())


def test_what_a_model_had_of_its_own_it_has_again() -> None:
    model, calls = make(TRPO, bootstrap="max", **Q), []
    note = model._update_info_buffer
    model._update_info_buffer = lambda *args: (calls.append(args), note(*args))
    model.learn(32)
    model.learn(32)
    assert len(calls) == 64


class NothingAllowed(RandomEnv):
    """Allows no action when it is asked for the nth time."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self._n = n

    def action_masks(self) -> np.ndarray:
        self._n -= 1
        return np.full(K, self._n != 0)


@pytest.mark.parametrize("bootstrap", ["expected", "max"])
@pytest.mark.parametrize(("n", "when"), [(5, "at step 4 of the rollout"), (33, "after the rollout")])
def test_a_state_that_allows_nothing_is_named(bootstrap: str, n: int, when: str) -> None:
    model = MaskableTRPO("MlpPolicy", NothingAllowed(n), bootstrap=bootstrap, **SMALL, **Q)
    before = flatten(list(model.policy.parameters())).detach().clone()
    with pytest.raises(ValueError, match=f"`action_masks` of environment 0 allow no option of choice 0 {when}"):
        model.learn(32)
    assert torch.equal(before, flatten(list(model.policy.parameters())))


@pytest.mark.parametrize("bootstrap", ["expected", "max"])
def test_a_buffer_keeps_the_type_of_its_numbers(bootstrap: str) -> None:
    model = with_rollout(in_float64(make(MaskableTRPO, bootstrap=bootstrap, **Q)))
    assert model.rollout_buffer.advantages.dtype == model.rollout_buffer.returns.dtype == np.float32


class SaysSomethingElse(RandomEnv):
    """Cuts its episodes off, with an ``action_mask`` in its infos that is none of its actions'."""

    said: Any = None

    def step(self, action: Any) -> Any:
        observation, reward, ended, _, _ = super().step(action)
        return observation, reward, False, ended, {"action_mask": self.said}


@pytest.mark.parametrize("said", [None, [1, 1], [[1], [1, 2]], ["a", "b", "c", "d"], [0] * K, {"all": 1}, "none"])
def test_another_thing_named_action_mask_is_not_taken_for_one(said: Any) -> None:
    rollouts = []
    for each in (said, [1] * K):
        env = SaysSomethingElse()
        env.said = each
        model = with_rollout(MaskableTRPO("MlpPolicy", env, bootstrap="max", **SMALL, **Q))
        rollouts.append(model.rollout_buffer.returns)
    np.testing.assert_array_equal(*rollouts)


def test_nothing_of_a_rollout_stays_behind() -> None:
    model = make(TRPO, bootstrap="max", **Q).learn(32)
    assert "_update_info_buffer" not in vars(model)
    assert "compute_returns_and_advantage" not in vars(model.rollout_buffer)

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.learn(32, callback=Stop())
    assert "_update_info_buffer" not in vars(model)


@given(seed=st.integers(0, 999), steps=st.integers(1, 6), decay=st.floats(0, 1))
def test_bootstraps_of_v_change_nothing(seed: int, steps: int, decay: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, ratios = (torch.rand(steps, 2, generator=generator) for _ in range(2))
    values, continues = torch.randn(steps + 1, 2, generator=generator), (torch.rand(steps, 2) < 0.8).float()
    given_ = (rewards, values, continues, ratios)
    options = {"discount": 0.9, "trace_decay": decay}
    plain = trace_advantages(*given_, **options)
    assert torch.equal(plain, trace_advantages(*given_, **options, bootstraps=values.clone()))


# The surrogate


def expected_problem(model: Any) -> tuple[PolicyProblem, Any]:
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    seen = model._with_action_advantages(batch, None, standardize=False)
    return PolicyProblem(model.policy, seen), seen


def by_hand(policy: Any, batch: Any, action_values: Tensor) -> tuple[Tensor, Tensor]:
    """L and its gradient by the formula alone, from logits and a table of Q."""
    features = policy.extract_features(batch.observations, policy.pi_features_extractor)
    logits = policy.action_net(policy.mlp_extractor.forward_actor(features))
    if batch.action_masks is not None:
        logits = logits.masked_fill(batch.action_masks.view_as(logits) == 0, -torch.inf)
    new = logits.softmax(1)
    old = new.detach()
    advantages = action_values - (old * action_values).sum(1, keepdim=True)
    objective = sum((new[row] * advantages[row]).sum() for row in range(len(new))) / len(new)
    params = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    return objective.detach(), flatten(torch.autograd.grad(objective, params))


@pytest.mark.parametrize("algorithm", [TRPO, MaskableTRPO])
def test_surrogate_gradient_and_step_are_those_of_a_dense_computation(algorithm: Any) -> None:
    model = in_float64(
        with_rollout(disturbed(make(algorithm, n_steps=24, surrogate="expected", policy_kwargs={"net_arch": [8]}, **Q)))
    )
    table = torch.randn(24, K, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model.policy.action_values = lambda observations: table  # Q set by hand
    with consistent_evaluation(model.policy):
        problem, batch = expected_problem(model)
        objective, gradient = by_hand(model.policy, batch, table)
        assert problem.start.objective == pytest.approx(float(objective), abs=1e-12)
        assert problem.start.divergence == 0
        torch.testing.assert_close(problem.gradient, gradient)
        fisher = dense_fisher(model.policy, batch, problem.params) + 0.1 * torch.eye(len(gradient), dtype=torch.float64)
        exact = torch.linalg.solve(fisher, gradient)
        model.cg_max_steps, model.cg_residual_tol = len(gradient), 1e-12
        direction = model._direction(problem)
        torch.testing.assert_close(direction.x, exact, rtol=1e-6, atol=1e-8)
        step = model._policy_step(problem)
    assert not step.reason
    new = flatten(problem.params).detach() - problem.theta_old
    torch.testing.assert_close(new, exact * (new @ exact) / (exact @ exact), rtol=1e-5, atol=1e-7)
    assert step.evaluation.objective > problem.start.objective
    assert step.evaluation.divergence <= model.trust_region_radius()


def test_the_expected_surrogate_is_the_limit_of_the_sampled_one() -> None:
    """Gradient and value at another θ, with the actions of each state drawn many times over: within 4 errors."""
    model = in_float64(with_rollout(disturbed(make(TRPO, n_steps=16, surrogate="expected", **Q))))
    policy, draws = model.policy, 4000
    with consistent_evaluation(policy):
        problem, batch = expected_problem(model)
        with torch.no_grad():
            old = policy.probabilities(batch.inputs).double()
        theta = problem.theta_old
        shift = 0.05 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(1), dtype=theta.dtype)
        assign(problem.params, theta + shift)
        probabilities = policy.get_distribution(batch.inputs).distribution.probs
        exact = (probabilities * batch.action_advantages).sum(1).mean()
        exact_gradient = flatten(torch.autograd.grad(exact, problem.params, retain_graph=True))
        assert problem.evaluate().objective == pytest.approx(float(exact.detach()), abs=1e-10)
        ratio = probabilities / old
        actions = torch.multinomial(old, draws, replacement=True, generator=torch.Generator().manual_seed(2)).T
        terms = (ratio * batch.action_advantages).gather(1, actions.T)  # (N, draws)
        objectives = terms.mean(0)
        rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(4), dtype=theta.dtype)
        # Projections of the gradient of each draw, by the gradients of the terms of single actions.
        singles = (
            torch.stack(
                [
                    torch.stack(
                        [
                            rows @ flatten(torch.autograd.grad(ratio[n, a], problem.params, retain_graph=True))
                            for a in range(K)
                        ]
                    )
                    for n in range(len(batch))
                ]
            )
            * batch.action_advantages[..., None]
        )  # (N, K, 3)
    projected = singles.gather(1, actions.T[..., None].expand(-1, -1, 3)).mean(0)  # (draws, 3)
    for found, limit in ((objectives[:, None], exact.detach()[None]), (projected, rows @ exact_gradient)):
        error = found.std(0) / draws**0.5
        assert (error > 0).all()
        assert ((found.mean(0) - limit).abs() < 4 * error).all()


@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty])
def test_losses_over_all_actions_are_those_of_the_formula(algorithm: Any) -> None:
    options = {"normalize_advantage": False, "batch_size": 24, "n_steps": 24, "surrogate": "expected", **Q}
    model = in_float64(with_rollout(disturbed(make(algorithm, **options))))
    policy = model.policy
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    part = model._prepared(batch, model._comparison(batch))
    old = policy.probabilities(batch.inputs)
    disturbed(model, seed=5)
    with torch.no_grad():
        actor, critic, record = model.loss_on(part)
        new, q = policy.probabilities(batch.inputs), policy.action_values(batch.inputs)
    loss = regression = 0.0
    for n in range(24):
        baseline = float(old[n] @ q[n])
        regression += (float(q[n, batch.actions[n]]) - float(batch.returns[n])) ** 2 / 24
        for a in range(K):
            r, advantage = float(new[n, a] / old[n, a]), float(q[n, a]) - baseline
            clipped = min(max(r, 0.8), 1.2) if algorithm is PPOClip else r
            loss -= float(old[n, a]) * min(r * advantage, clipped * advantage) / 24
            if algorithm is PPOPenalty:
                loss += model.kl_coef * float(old[n, a]) * float(torch.log(old[n, a] / new[n, a])) / 24
    assert float(actor) == pytest.approx(loss, rel=1e-5)
    assert float(critic) == pytest.approx(0.5 * regression, rel=1e-5)
    assert float(record["policy_gradient_loss"]) == pytest.approx(loss, rel=1e-5)


def test_the_theorys_penalty_sees_the_advantages_of_all_actions() -> None:
    model = with_rollout(disturbed(make(TRPO, surrogate="expected", **Q)))
    problem, batch = expected_problem(model)
    assert problem.max_advantage == float(batch.action_advantages.abs().max())


@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty])
def test_values_that_are_alike_for_all_actions_are_no_signal_of_a_minibatch(algorithm: Any) -> None:
    """What rounding leaves of them is not standardised into one."""
    model = with_rollout(disturbed(make(algorithm, surrogate="expected", vf_coef=0.0, batch_size=16, **Q)))
    policy = model.policy
    with torch.no_grad():
        policy.value_net.weight.copy_(policy.value_net.weight[:1].expand(K, -1))
        policy.value_net.bias.copy_(policy.value_net.bias[:1].expand(K) + 100.0)
    before = flatten(list(policy.parameters())).detach().clone()
    model.train()
    assert torch.equal(before, flatten(list(policy.parameters())))


def test_values_that_are_alike_for_all_actions_are_no_signal() -> None:
    model = with_rollout(make(TRPO, surrogate="expected", critic_kwargs={"fit": "semi_gradient"}, **Q))
    with torch.no_grad():
        model.policy.value_net.weight.copy_(model.policy.value_net.weight[:1].expand(K, -1))
    model.learning_rate = lambda _: 0.0
    model._setup_lr_schedule()
    before = flatten(list(model.policy.parameters())).detach().clone()
    model.train()
    assert torch.equal(before, flatten(list(model.policy.parameters())))


def test_the_critic_has_learnt_of_a_rollout_before_the_expected_surrogate_is_made_of_it() -> None:
    models = [with_rollout(disturbed(make(TRPO, surrogate=kind, **Q))) for kind in ("sampled", "expected")]
    seen: list[Tensor] = []
    for model in models:
        critic = [*model.policy.mlp_extractor.value_net.parameters(), *model.policy.value_net.parameters()]
        before, solve = flatten(critic).detach().clone(), model._policy_step

        def step(problem: Any, critic: Any = critic, solve: Any = solve) -> Any:
            seen.append(flatten(critic).detach().clone())
            return solve(problem)

        model._policy_step = step
        model.train()
        assert not torch.equal(before, flatten(critic))
    start = seen[0]
    assert not torch.equal(start, seen[1])


# The critic


@pytest.mark.parametrize("fit", ["gauss_newton", "adam"])
@pytest.mark.parametrize("share", [False, True])
def test_a_fit_moves_what_is_said_of_the_actions_taken(fit: str, share: bool) -> None:
    kwargs = {"critic_kwargs": {"fit": fit}, "learning_rate": 1e-2, "n_critic_updates": 30, "batch_size": 16}
    model = with_rollout(make(TRPO, n_steps=32, policy_kwargs={"share_features_extractor": share}, **kwargs, **Q))
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    actor = model.policy.get_distribution(batch.inputs).distribution.logits.detach()

    def error() -> float:
        with torch.no_grad():
            q = model.policy.action_values(batch.inputs)
        picked = torch.stack([q[row, int(action)] for row, action in enumerate(batch.actions)])
        return float((picked - batch.returns).square().mean())

    before = error()
    regression = model._regression(batch, model._actor(batch))
    loss = model.value_critic.fit(regression)
    assert error() < 0.9 * before
    if fit == "gauss_newton":
        assert loss == pytest.approx(error(), rel=1e-4)
    assert torch.equal(actor, model.policy.get_distribution(batch.inputs).distribution.logits)


@pytest.mark.parametrize("fit", ["gauss_newton", "adam"])
def test_a_fit_by_hand_is_that_of_autograd(fit: str) -> None:
    """With few conjugate gradients, which amplify the last bits."""
    results = []
    for fast in (True, False):
        torch.manual_seed(0)
        options = {"critic_kwargs": {"fit": fit}, "batch_size": 16, "n_critic_updates": 3, "cg_max_steps": 3}
        model = disturbed(make(TRPO, n_steps=64, fast_updates=fast, fast_rollouts=False, **options, **Q))
        if fit == "gauss_newton":
            model.critic_kwargs = {"fit": fit, "cg_steps": 3, "n_iterations": 1}
        model.learn(64)
        assert (model.update_path == "fast") == fast
        results.append(flatten(list(model.policy.parameters())).detach())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("discounted", [False, True])
@pytest.mark.parametrize("bootstrap", ["expected", "max"])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_semi_gradient_steps_are_those_of_the_box(bootstrap: str, discounted: bool, n_envs: int) -> None:
    """w <- w + α γⁿ δ ∇Q_w(s,a), computed again from the definition; every parameter, each step."""
    critic_kwargs = {"fit": "semi_gradient", "discounted": discounted}
    venv = make_vec_env(with_limit, n_envs=n_envs, seed=1)
    model = TRPO(
        *("MlpPolicy", venv), n_steps=11, gamma=0.9, learning_rate=0.05, seed=0, device="cpu",
        bootstrap=bootstrap, critic_kwargs=critic_kwargs, **Q,
    )  # fmt: skip
    model = in_float64(disturbed(model))
    model.train = lambda: None
    model.learn(11 * n_envs)
    batch, buffer = whole_rollout(model.rollout_buffer, model.action_space), model.rollout_buffer
    other = copy.deepcopy(model.policy)
    regression = model._regression(batch, model._actor(batch))
    critic = [*other.mlp_extractor.value_net.parameters(), *other.value_net.parameters()]
    starts = np.concatenate([buffer.episode_starts, model._last_episode_starts[None]])
    age = np.zeros(n_envs)
    for step in range(11):
        following = buffer.observations[step + 1] if step < 10 else model._last_obs
        total = [torch.zeros_like(param) for param in critic]
        for env in range(n_envs):
            age[env] = 0 if starts[step, env] else age[env]
            rows = buffer.observations[step, env], following[env]
            now, then = (other.obs_to_tensor(np.asarray(row))[0] for row in rows)
            q = other.action_values(now)[0, int(buffer.actions[step, env, 0])]
            with torch.no_grad():
                ahead = other.action_values(then)[0]
                b = ahead.max() if bootstrap == "max" else other.probabilities(then)[0] @ ahead
            delta = float(buffer.rewards[step, env]) + 0.9 * (1 - starts[step + 1, env]) * b - q.detach()
            slopes = torch.autograd.grad(q, critic)
            scale = 0.9 ** age[env] if discounted else 1.0
            total = [t + scale * delta * slope / n_envs for t, slope in zip(total, slopes, strict=True)]
            age[env] += 1
        with torch.no_grad():
            for param, each in zip(critic, total, strict=True):
                param += 0.05 * each
    model._update_learning_rate(model.policy.optimizer)
    model.value_critic.fit(regression)
    for ours, theirs in zip(model.policy.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_semi_gradient_steps_serve_state_values_too() -> None:
    model = with_rollout(make(TRPO, critic="semi_gradient"))
    before = model.policy.value_net.weight.detach().clone()
    model.train()
    assert not torch.equal(before, model.policy.value_net.weight)


class OwnBuffer(RolloutBuffer):
    pass


@pytest.mark.parametrize(
    ("algorithm", "options", "found"),
    [
        (RecurrentTRPO, {}, "memory"),
        (RecurrentNPG, {}, "memory"),
        (TRPO, {"rollout_buffer_class": OwnBuffer}, "OwnBuffer"),
    ],
)
def test_semi_gradient_steps_without_an_order_are_refused(algorithm: Any, options: Any, found: str) -> None:
    with pytest.raises(ValueError, match=rf"'semi_gradient' needs .* in their order.*{found}"):
        make(algorithm, critic="semi_gradient", **options)
    model = make(algorithm, **options)  # a critic that is chosen later
    model.critic = "semi_gradient"
    with pytest.raises(ValueError, match="in their order"):
        model.learn(32)


# Past rollouts


@pytest.mark.parametrize("bootstrap", ["expected", "max"])
def test_past_rollouts_bootstrap_as_they_are_asked_to(bootstrap: str) -> None:
    """Seen by the policy that made it, a rollout has the advantages that it had."""
    model = with_rollout(disturbed(make(TRPO, bootstrap=bootstrap, sample_reuse=2, **Q)))
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    rollout = PastRollout.of(model.rollout_buffer, batch, model._last_obs, model._last_episode_starts)
    seen = rollout.seen_by(
        model.policy, discount=model.gamma, trace_decay=model.gae_lambda, chunk_size=None, bootstrap=bootstrap
    )
    torch.testing.assert_close(seen.advantages, batch.advantages, rtol=1e-4, atol=1e-4)
    model.learn(96)


@pytest.mark.parametrize("surrogate", ["sampled", "expected"])
@pytest.mark.parametrize("algorithm", [TRPO, PPOClip, MaskableTRPO])
def test_a_wrapped_policy_learns_as_the_policy_that_it_wraps(algorithm: Any, surrogate: str) -> None:
    results = []
    for wraps in (False, True):
        options = {"batch_size": 16, "bootstrap": "max", "surrogate": surrogate}
        model = disturbed(make(algorithm, fast_rollouts=False, fast_updates=False, **options, **Q))
        if wraps:
            model.policy = torch.compile(model.policy, backend="eager")
        model.set_random_seed(0)
        model.learn(64)
        results.append(flatten(list(model.policy.parameters())).detach())
    assert torch.equal(*results)


def test_another_kind_of_critic_is_named_where_parameters_are_loaded(tmp_path: Path) -> None:
    make(TRPO).save(tmp_path / "values")
    with pytest.raises(ValueError, match="a value for each action, as critic='action_value' asks for"):
        TRPO.load(tmp_path / "values", critic="action_value")
    with pytest.raises(ValueError, match="a value of the state"):
        make(TRPO).set_parameters(make(TRPO, **Q).get_parameters())


class Saving(BaseCallback):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def _on_step(self) -> bool:
        self.model.save(self.path)
        return True


def test_a_model_is_saved_in_the_middle_of_a_rollout(tmp_path: Path) -> None:
    """Without what the rollout has put into it, and with what is the user's own."""
    model = make(TRPO, bootstrap="max", **Q)
    model.learn(32, callback=Saving(tmp_path / "model"))
    assert "_update_info_buffer" not in vars(TRPO.load(tmp_path / "model"))
    model._update_info_buffer = print
    model.save(tmp_path / "own")
    assert vars(TRPO.load(tmp_path / "own"))["_update_info_buffer"] is print


def test_a_loss_over_all_actions_runs_the_policy_once() -> None:
    options = {"batch_size": 24, "n_steps": 24, "surrogate": "expected", **Q}
    model = with_rollout(make(PPOClip, **options))
    part = model._prepared(batch := whole_rollout(model.rollout_buffer, model.action_space), model._comparison(batch))
    calls: list[Any] = []
    model.policy.action_net.register_forward_hook(lambda *_: calls.append(None))
    model.loss_on(part)
    assert len(calls) == 1
