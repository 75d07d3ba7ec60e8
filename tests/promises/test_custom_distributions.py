"""Action distributions of users: registered with a KL divergence, or seen at the actions taken alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, SMALL, BetaDistribution, BetaFamily, RandomEnv, with_distribution
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from sb3_trpo_ext import NPG, TRPO, PPOClip, PPOPenalty, RecurrentPPOClip, RecurrentTRPO, register_distribution
from sb3_trpo_ext.core.parameters import flatten
from sb3_trpo_ext.policy.distributions import family_of
from sb3_trpo_ext.policy.evaluation import consistent_evaluation
from sb3_trpo_ext.policy.problem import PolicyProblem
from sb3_trpo_ext.rollout.buffers import whole_rollout


class RegisteredBeta(BetaDistribution):
    pass


register_distribution(RegisteredBeta, lambda distribution: BetaFamily())

DISTRIBUTIONS = [RegisteredBeta, BetaDistribution]
ALGORITHMS: dict[Any, dict[str, Any]] = {
    TRPO: {},
    NPG: {},
    PPOPenalty: {"batch_size": 64, "learning_rate": 3e-3, "n_epochs": 4},
    PPOClip: {"batch_size": 64, "learning_rate": 3e-3, "n_epochs": 4},
}


def model_of(algorithm: Any, distribution: Any, policy_class: Any = ActorCriticPolicy, **kwargs: Any) -> Any:
    policy = with_distribution(policy_class, distribution)
    env = RandomEnv(action_space=ACTION_SPACES["box"])
    model = algorithm(policy, env, **{**SMALL, "n_steps": 256, **ALGORITHMS.get(algorithm, {}), **kwargs})
    model.set_logger(Logger(None, []))
    return model


def logged(model: Any) -> list[dict[str, float]]:
    """What each update that follows logs."""
    train, records = model.train, []

    def recorded() -> None:
        train()
        records.append(dict(model.logger.name_to_value))

    model.train = recorded
    return records


def mean_reward(model: Any) -> float:
    """The reward is the sum of the actions."""
    with torch.no_grad():
        observations = torch.rand(500, 5) * 2 - 1
        return float(model.policy.get_distribution(observations).mode().sum(dim=1).mean())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_method_learns(algorithm: Any, distribution: Any) -> None:
    model = model_of(algorithm, distribution)
    before, records = mean_reward(model), logged(model)
    model.learn(8 * 256)
    assert mean_reward(model) > before + 0.2
    assert all(0 < record["train/kl_divergence_loss"] <= record["train/kl_max"] for record in records)
    assert all(("train/kl_is_sampled" in record) == (distribution is BetaDistribution) for record in records)
    assert model._rejections_in_a_row == 0


@pytest.mark.parametrize(
    "options",
    [{"trust_region": "max"}, {"kl_penalty": 10.0}, {"sample_reuse": 2}, {"ent_coef": 0.01}, {"momentum": 0.5}],
)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_form_of_trust_region_takes_steps(options: dict[str, Any], distribution: Any) -> None:
    model = model_of(TRPO, distribution, **options)
    records = logged(model)
    model.learn(4 * 256)
    assert sum(record["train/is_line_search_success"] for record in records) >= 3
    if "trust_region" in options:
        assert all(record["train/kl_max"] <= record["train/target_kl"] for record in records)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("algorithm", [RecurrentTRPO, RecurrentPPOClip])
def test_policies_with_memory_learn(algorithm: Any, distribution: Any) -> None:
    options = {"batch_size": 64, "learning_rate": 3e-3} if algorithm is RecurrentPPOClip else {}
    model = model_of(
        algorithm, distribution, RecurrentActorCriticPolicy, policy_kwargs={"lstm_hidden_size": 8}, **options
    )
    before = flatten(list(model.policy.parameters())).detach().clone()
    records = logged(model)
    model.learn(4 * 256)
    assert all(0 < record["train/kl_divergence_loss"] < 0.2 for record in records)
    assert not torch.equal(before, flatten(list(model.policy.parameters())))


@pytest.mark.parametrize("chunk_size", [None, 70])
def test_the_sampled_fisher_matrix_is_that_of_the_scores(chunk_size: int | None) -> None:
    model = model_of(TRPO, BetaDistribution, policy_kwargs={"net_arch": [3]}, normalize_advantage=False)
    train, model.train = model.train, lambda: None
    model.learn(256)
    model.train = train
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    with consistent_evaluation(model.policy):
        problem = PolicyProblem(model.policy, batch, chunk_size=chunk_size)
        params = problem.params
        assert problem.start.divergence == problem.start.kl_max == 0
        product = problem.fisher(damping=0.0)
        log_prob = model.policy.get_distribution(batch.observations).log_prob(batch.actions)
        rows = [flatten(torch.autograd.grad(each, params, retain_graph=True)) for each in log_prob]
    scores = torch.stack(rows)
    v = torch.randn(scores.shape[1])
    torch.testing.assert_close(product(v), scores.T @ (scores @ v) / len(batch), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_log_probability_without_a_gradient_is_refused(algorithm: Any) -> None:
    class Detached(BetaDistribution):
        def log_prob(self, actions: Tensor) -> Tensor:
            return super().log_prob(actions).detach()

    model = model_of(algorithm, Detached)
    before = flatten(list(model.policy.parameters())).detach().clone()
    with pytest.raises(NotImplementedError, match=r"`log_prob` of the action distribution Detached has no gradient"):
        model.learn(256)
    assert torch.equal(before, flatten(list(model.policy.parameters())))


@pytest.mark.parametrize("algorithm", [TRPO, PPOClip])
def test_a_frozen_actor_is_not_mistaken_for_one(algorithm: Any) -> None:
    model = model_of(algorithm, BetaDistribution)
    actor = [*model.policy.action_net.parameters(), *model.policy.mlp_extractor.policy_net.parameters()]
    for param in actor:
        param.requires_grad_(False)
    before, value = flatten(actor).clone(), flatten(list(model.policy.value_net.parameters())).detach().clone()
    model.learn(256)
    assert torch.equal(before, flatten(actor))
    assert not torch.equal(value, flatten(list(model.policy.value_net.parameters())))


def test_the_log_says_that_the_divergence_is_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    model_of(TRPO, BetaDistribution, verbose=1).learn(96)
    printed = capsys.readouterr().out
    assert printed.count("KL divergence is estimated from the actions that were taken") == 1
    assert "none is registered for BetaDistribution" in printed
    model_of(TRPO, RegisteredBeta, verbose=1).learn(96)
    assert "KL divergence is estimated" not in capsys.readouterr().out


def test_a_subclass_that_is_no_gaussian_is_not_taken_for_one() -> None:
    class Disguised(DiagGaussianDistribution):
        """SB3's policy builds it as it builds a Gaussian."""

        def proba_distribution(self, mean_actions: Tensor, log_std: Tensor) -> Any:
            self.distribution = torch.distributions.Laplace(mean_actions, log_std.exp())
            return self

    class Policy(ActorCriticPolicy):
        def _build(self, lr_schedule: Any) -> None:
            self.action_dist = Disguised(3)
            super()._build(lr_schedule)

    model = TRPO(Policy, RandomEnv(action_space=ACTION_SPACES["box"]), **SMALL)
    model.set_logger(Logger(None, []))
    records = logged(model)
    model.learn(96)
    assert family_of(model.policy.action_dist) is None
    assert all(record["train/kl_is_sampled"] and record["train/is_line_search_success"] for record in records)


def test_what_the_policy_returns_counts_and_not_what_it_keeps() -> None:
    class Elsewhere(with_distribution(ActorCriticPolicy, BetaDistribution)):  # type: ignore[misc]
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.beta, self.action_dist = self.action_dist, DiagGaussianDistribution(3)

        def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Any:
            return self.beta.proba_distribution(self.action_net(latent_pi))

    for algorithm in (TRPO, PPOPenalty):
        env = RandomEnv(action_space=ACTION_SPACES["box"])
        model = algorithm(Elsewhere, env, **{**SMALL, **ALGORITHMS[algorithm]})
        model.set_logger(Logger(None, []))
        records = logged(model)
        model.learn(64)
        assert all(record["train/kl_is_sampled"] and record["train/kl_divergence_loss"] > 0 for record in records)


def test_a_saved_model_goes_on(tmp_path: Path) -> None:
    model = model_of(TRPO, BetaDistribution)
    model.learn(256)
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=model.get_env())
    observation = np.zeros((1, 5), np.float32)
    assert np.array_equal(*(each.predict(observation, deterministic=True)[0] for each in (model, loaded)))
    loaded.learn(256)
