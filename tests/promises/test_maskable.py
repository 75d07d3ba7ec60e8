"""MaskableTRPO: forbidden actions do not exist, for the rollout as for the update."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, MASKABLE, OBSERVATION_SPACES, SMALL, RandomEnv, dense_fisher, make, with_rollout
from sb3_contrib import MaskablePPO
from sb3_contrib.common.envs import (
    InvalidActionEnvDiscrete,
    InvalidActionEnvMultiBinary,
    InvalidActionEnvMultiDiscrete,
)
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import TRPO, MaskableTRPO
from sb3_trpo_ext.policy.distributions import family_of
from sb3_trpo_ext.policy.evaluation import consistent_evaluation
from sb3_trpo_ext.policy.problem import PolicyOutput, PolicyProblem
from sb3_trpo_ext.rollout.buffers import whole_rollout

INVALID = {
    "discrete": lambda: InvalidActionEnvDiscrete(dim=20, n_invalid_actions=15),
    "multidiscrete": lambda: InvalidActionEnvMultiDiscrete(dims=[5, 5], n_invalid_actions=5),
    "multibinary": lambda: InvalidActionEnvMultiBinary(dims=6, n_invalid_actions=3),
}


class OneAllowed(RandomEnv):
    """A single allowed option of each choice."""

    def action_masks(self) -> np.ndarray:
        masks = super().action_masks()
        for allowed in self._allowed:
            allowed[np.flatnonzero(allowed)[1:]] = False
        masks[:] = np.concatenate(self._allowed)
        return masks


@pytest.mark.parametrize("action", ["discrete", "multidiscrete"])
@pytest.mark.parametrize("critic", ["gauss_newton", "adam"])
def test_with_all_actions_allowed_it_is_trpo(action: str, critic: str) -> None:
    models = [make(algorithm, action, critic=critic, fast_rollouts=False) for algorithm in (MaskableTRPO, TRPO)]
    for model in models:
        options = {"use_masking": False} if model is models[0] else {}
        model.set_random_seed(0)
        model.learn(64, **options)
    for ours, theirs in zip(*(model.policy.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("action", MASKABLE)
def test_kl_and_metric_live_on_the_allowed_actions(action: str) -> None:
    model = with_rollout(make(MaskableTRPO, action))
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    assert 0 < batch.action_masks.mean() < 1
    old = PolicyOutput.of(model.policy, batch).z.detach()
    with torch.no_grad():
        for param in model.policy.parameters():
            param.add_(0.3 * torch.randn_like(param))
    output = PolicyOutput.of(model.policy, batch)
    sizes, allowed = output.family.sizes, batch.action_masks.bool()
    expected = torch.zeros(len(batch))
    columns = zip(old.split(sizes, 1), output.z.detach().split(sizes, 1), allowed.split(sizes, 1), strict=True)
    for before, after, mask in columns:
        for row in range(len(batch)):
            p, q = (torch.softmax(z[row, mask[row]], 0) for z in (before, after))
            expected[row] += (p * (p / q).log()).sum()
    torch.testing.assert_close(output.family.kl(old, output.z.detach()), expected, rtol=1e-4, atol=1e-6)
    forbidden = torch.where(allowed, 0.0, torch.randn(allowed.shape))
    assert torch.all(output.family.metric(output.z.detach(), forbidden) == 0)


@pytest.mark.parametrize("action", MASKABLE)
def test_every_way_to_ask_the_policy_knows_the_masks(action: str) -> None:
    model = with_rollout(make(MaskableTRPO, action))
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    with torch.no_grad():
        _, log_prob, entropy = batch.evaluate_actions(model.policy)
        distribution = batch.distribution(model.policy)
    for ours in (log_prob, distribution.log_prob(batch.actions)):
        torch.testing.assert_close(ours, batch.old_log_prob, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, distribution.entropy())


@pytest.mark.parametrize("action", MASKABLE)
def test_a_single_allowed_action_contributes_exactly_zero(action: str) -> None:
    env = OneAllowed(OBSERVATION_SPACES["vector"], ACTION_SPACES[action])
    model = with_rollout(MaskableTRPO("MlpPolicy", env, **SMALL))
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    with consistent_evaluation(model.policy):
        problem = PolicyProblem(model.policy, batch)
        assert torch.all(problem.gradient == 0)
        product = problem.fisher(0.0)(torch.randn_like(problem.gradient))
        assert torch.all(product == 0)
        with torch.no_grad():
            for param in problem.params:
                param.add_(torch.randn_like(param))
        assert problem.evaluate().kl_max == 0
    model.train()
    assert model.logger.name_to_value["train/is_line_search_success"] == 0
    assert all(param.isfinite().all() for param in model.policy.parameters())


@pytest.mark.parametrize("action", MASKABLE)
def test_fisher_products_against_the_hessian_of_the_kl(action: str) -> None:
    model = with_rollout(make(MaskableTRPO, action, policy_kwargs={"net_arch": [3]}))
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    params = PolicyProblem(model.policy, batch).params
    fisher = PolicyProblem(model.policy, batch).fisher(0.0)
    size = sum(p.numel() for p in params)
    ours = torch.stack([fisher(row) for row in torch.eye(size)])
    torch.testing.assert_close(ours, dense_fisher(model.policy, batch, params), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("action", INVALID)
def test_no_forbidden_action_is_ever_taken(action: str) -> None:
    class Checked(gym.Wrapper):
        def action_masks(self) -> Any:
            self.masks = self.env.action_masks()
            return self.masks

        def step(self, chosen: Any) -> Any:
            space = self.env.action_space
            sizes = space.nvec if action == "multidiscrete" else [2] * 6 if action == "multibinary" else [space.n]
            ends = np.cumsum(sizes)[:-1]
            for masks, option in zip(np.split(np.array(self.masks), ends), np.atleast_1d(chosen), strict=True):
                assert masks[int(option)], "a forbidden action"
            return self.env.step(chosen)

    model = MaskableTRPO("MlpPolicy", Checked(INVALID[action]()), n_steps=64, seed=0, device="cpu").learn(512)
    for deterministic in (True, False):
        observation = model.env.reset()
        masks = get_action_masks(model.env)
        chosen, _ = model.predict(observation, action_masks=masks, deterministic=deterministic)
        model.env.step(chosen)


@pytest.mark.parametrize("critic", ["gauss_newton", "adam"])
def test_a_buffer_of_another_class_brings_its_masks(critic: str) -> None:
    class Own(MaskableRolloutBuffer):
        pass

    options: dict[str, Any] = {"critic": critic, "batch_size": 16}
    if critic == "gauss_newton":
        options["critic_kwargs"] = {"cg_steps": 3}  # more multiply the rounding errors
    models = [make(MaskableTRPO, rollout_buffer_class=kind, **options) for kind in (Own, None)]
    for model in models:
        model.set_random_seed(0)
        with_rollout(model)
        np.random.seed(0)
        model.train()
    batch = whole_rollout(models[0].rollout_buffer, models[0].action_space)
    assert 0 < batch.action_masks.mean() < 1
    for ours, theirs in zip(*(model.policy.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_an_env_without_masks_is_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match="ActionMasker"):
        MaskableTRPO("MlpPolicy", "CartPole-v1", **SMALL).learn(64)
    MaskableTRPO("MlpPolicy", "CartPole-v1", **SMALL).learn(64, use_masking=False)


def test_the_action_masker_wrapper() -> None:
    env = ActionMasker(gym.make("CartPole-v1"), lambda env: np.array([True, False]))
    model = MaskableTRPO("MlpPolicy", env, **SMALL).learn(64)
    assert np.all(model.rollout_buffer.actions == 0)


@pytest.mark.parametrize("action", MASKABLE)
def test_a_state_that_allows_nothing_is_refused(action: str) -> None:
    class Stuck(RandomEnv):
        def action_masks(self) -> np.ndarray:
            masks = super().action_masks()
            self._allowed = None
            if self._time == 7:
                masks[:2] = False
                masks[2 if action != "multibinary" else 0 :] = action == "multidiscrete"
                masks[2:3] = False
            return masks

    model = MaskableTRPO("MlpPolicy", Stuck(OBSERVATION_SPACES["vector"], ACTION_SPACES[action]), **SMALL)
    before = [p.detach().clone() for p in model.policy.parameters()]
    with pytest.raises(ValueError, match=r"action_masks.*environment 0.*choice \d at step 7"):
        model.learn(64)
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


def test_the_maskable_evaluation_callback(tmp_path: Any) -> None:
    evaluate = MaskableEvalCallback(make_vec_env(INVALID["discrete"]), eval_freq=32, log_path=str(tmp_path), verbose=0)
    model = MaskableTRPO("MlpPolicy", INVALID["discrete"](), **SMALL).learn(64, callback=evaluate)
    assert len(evaluate.evaluations_results) == 2
    assert isinstance(model, MaskablePPO)
    evaluate_policy(model, make_vec_env(INVALID["discrete"]), n_eval_episodes=2, warn=False)


@pytest.mark.parametrize(("name", "value"), [("use_sde", True), ("target_kl", 0.0)])
def test_impossible_arguments_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        make(MaskableTRPO, **{name: value})


def test_continuous_actions_are_refused() -> None:
    with pytest.raises(AssertionError, match="Box"):
        make(MaskableTRPO, "box")


def test_families_of_maskable_distributions() -> None:
    for action, sizes in (("discrete", (4,)), ("multidiscrete", (3, 2, 4)), ("multibinary", (2, 2, 2))):
        assert family_of(make(MaskableTRPO, action).policy.action_dist).sizes == sizes
