"""Policies that forbid actions by logits of minus infinity."""

import math
from typing import Any

import pytest
import torch
from envs import ACTION_SPACES, SMALL, RandomEnv
from stable_baselines3.common.distributions import BernoulliDistribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from sb3_trpo_ext import NPG, TRPO, PPOClip, PPOPenalty

ALGORITHMS: dict[Any, dict[str, Any]] = {
    TRPO: {},
    NPG: {},
    PPOPenalty: {"batch_size": 64, "learning_rate": 3e-3, "n_epochs": 4},
    PPOClip: {"batch_size": 64, "learning_rate": 3e-3, "n_epochs": 4},
}


def forbidden(observations: Tensor, width: int) -> Tensor:
    """The first option, and in half of the states the third, which is the last of a choice of three."""
    mask = torch.zeros(len(observations), width, dtype=torch.bool)
    mask[:, 0] = True
    mask[:, 2] = observations[:, 0] > 0
    return mask


class SeeingPolicy(ActorCriticPolicy):
    """Keeps the observations at hand."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.features_extractor.register_forward_hook(lambda module, inputs, output: setattr(self, "seen", inputs[0]))


class MaskedPolicy(SeeingPolicy):
    """Masks as many custom policies do."""

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Any:
        logits = self.action_net(latent_pi)
        return self.action_dist.proba_distribution(logits.masked_fill(forbidden(self.seen, logits.shape[1]), -math.inf))


@pytest.mark.parametrize("ent_coef", [0.0, 10.0])
@pytest.mark.parametrize("action", ["discrete", "multidiscrete"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_masks_by_minus_infinity_are_learnt_with(algorithm: Any, action: str, ent_coef: float) -> None:
    env = RandomEnv(action_space=ACTION_SPACES[action])
    model = algorithm(MaskedPolicy, env, ent_coef=ent_coef, **{**SMALL, "n_steps": 256, **ALGORITHMS[algorithm]})
    model.set_logger(Logger(None, []))
    train, records = model.train, []

    def recorded() -> None:
        train()
        records.append(dict(model.logger.name_to_value))

    model.train = recorded
    reached = expected_reward(model)
    model.learn(6 * 256)
    assert model._rejections_in_a_row == 0
    assert all(0 < record["train/kl_divergence_loss"] <= record["train/kl_max"] < 1 for record in records)
    assert all(math.isfinite(record["train/entropy"]) for record in records)
    if ent_coef < 1:
        assert expected_reward(model) > reached + 0.05


def expected_reward(model: Any) -> float:
    """The reward is the sum of the options' numbers."""
    observations = torch.linspace(-1, 1, 200).unsqueeze(1).repeat(1, 5)
    with torch.no_grad():
        distribution = model.policy.get_distribution(observations).distribution
    choices = distribution if isinstance(distribution, list) else [distribution]
    return sum(float((each.probs @ torch.arange(each.probs.shape[1]).float()).mean()) for each in choices)


class CertainCoins(BernoulliDistribution):
    """Coins whose logits may be infinite, which torch's log-probability and entropy do not take."""

    def log_prob(self, actions: Tensor) -> Tensor:
        logits = torch.where(actions > 0, self.distribution.logits, -self.distribution.logits)
        return torch.nn.functional.logsigmoid(logits).sum(dim=1)

    def entropy(self) -> Tensor:
        finite = torch.distributions.Bernoulli(logits=self.distribution.logits.clamp(-1e4, 1e4))
        return finite.entropy().sum(dim=1)


class CertainPolicy(SeeingPolicy):
    """The first coin never shows heads, the second always in half of the states."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_dist = CertainCoins(3)

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Any:
        logits = self.action_net(latent_pi)
        mask = forbidden(self.seen, 3)
        logits = torch.where(mask & torch.tensor([True, False, False]), -math.inf, logits)
        return self.action_dist.proba_distribution(
            torch.where(mask & torch.tensor([False, False, True]), math.inf, logits)
        )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_coins_may_be_certain_on_both_sides(algorithm: Any) -> None:
    env = RandomEnv(action_space=ACTION_SPACES["multibinary"])
    model = algorithm(CertainPolicy, env, **{**SMALL, "n_steps": 256, **ALGORITHMS[algorithm]})
    model.set_logger(Logger(None, []))
    model.learn(3 * 256 + 1)
    assert model._rejections_in_a_row == 0
    assert 0 < model.logger.name_to_value["train/kl_divergence_loss"] < 1


@pytest.mark.parametrize("kl_penalty", [300.0, 30_000.0, "theory"])
@pytest.mark.parametrize("action", ["discrete", "multidiscrete", "multibinary"])
def test_a_penalty_of_any_size_takes_steps_on_discrete_spaces(action: str, kl_penalty: Any) -> None:
    env = RandomEnv(action_space=ACTION_SPACES[action])
    model = TRPO("MlpPolicy", env, kl_penalty=kl_penalty, **{**SMALL, "n_steps": 512})
    model.set_logger(Logger(None, []))
    train, records = model.train, []

    def recorded() -> None:
        train()
        records.append(dict(model.logger.name_to_value))

    model.train = recorded
    model.learn(4 * 512)
    assert sum(record["train/is_line_search_success"] for record in records) >= 3
    assert all(record["train/kl_divergence_loss"] >= 0 for record in records)


class ShiftingPolicy(ActorCriticPolicy):
    """Masks by what the network makes of a state, so that an update can rule out what was possible."""

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Any:
        logits = self.action_net(latent_pi)
        return self.action_dist.proba_distribution(
            logits.masked_fill(logits < logits.mean(dim=1, keepdim=True) - 0.5, -math.inf)
        )


def shifting(algorithm: Any, **kwargs: Any) -> Any:
    model = algorithm(ShiftingPolicy, RandomEnv(), **{**SMALL, "n_steps": 256, **kwargs})
    with torch.no_grad():
        model.policy.action_net.weight.mul_(100)
    return model


def test_a_penalty_of_zero_does_not_multiply_an_infinite_divergence() -> None:
    options = {"batch_size": 64, "learning_rate": 3e-3, "kl_coef": 0.0, "adaptive": False}
    model = shifting(PPOPenalty, **options)
    model.set_logger(Logger(None, []))
    model.learn(256 + 1)
    assert model.logger.name_to_value["train/kl_divergence_loss"] == math.inf
    assert model.logger.name_to_value["train/kl_penalty"] == 0.0
    assert model._rejections_in_a_row == 0


def test_the_reason_is_the_divergence_where_that_is_infinite() -> None:
    model = shifting(TRPO, target_kl=0.5, line_search_max_iter=1)
    model.learn(256)
    assert model._reported_rejections == ["the KL divergence at the trial point is not finite"]
