"""A rollout that is not finite is refused with its place, and nothing is lost."""

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, SMALL, RandomEnv, make, policy_name, with_rollout
from stable_baselines3.common.distributions import BernoulliDistribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentTRPO

STEP, ENV = 11, 1
ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gauss-newton": (TRPO, {"critic": "gauss_newton"}),
    "adam": (TRPO, {"critic": "adam", "batch_size": 16, "fast_rollouts": False}),
    "npg": (NPG, {}),
    "ppo": (PPOClip, {"batch_size": 16}),
    "ppo-penalty": (PPOPenalty, {"batch_size": 16}),
    "recurrent": (RecurrentTRPO, {"policy_kwargs": {"lstm_hidden_size": 8}}),
    "maskable": (MaskableTRPO, {}),
}


class Faulty(gym.Wrapper):
    """Puts a value into what one step returns."""

    def __init__(self, env: gym.Env, place: str, value: float) -> None:
        super().__init__(env)
        self.place, self.value, self.steps, self.active = place, value, 0, True

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self.active and self.steps == STEP:
            if self.place == "reward":
                reward = self.value
            elif isinstance(observation, dict):
                observation["vector"][0] = self.value
            else:
                observation[0] = self.value
        self.steps += 1
        return observation, reward, terminated, truncated, info


def faulty_model(arm: str, place: str, value: float, observation: str = "vector") -> tuple[Any, Faulty]:
    algorithm, options = ARMS[arm]
    space = OBSERVATION_SPACES[observation]
    action = ACTION_SPACES["multidiscrete" if algorithm is MaskableTRPO else "box"]
    faulty = Faulty(RandomEnv(space, action, episode_length=50), place, value)
    sound = RandomEnv(space, action, episode_length=50)
    env = DummyVecEnv([lambda: sound, lambda: faulty])
    return algorithm(policy_name(algorithm, observation), env, **SMALL, **options), faulty


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("place", "observation"), [("reward", "vector"), ("observation", "vector"), ("observation", "dict")]
)
def test_names_what_and_where_and_goes_on_after_repair(arm: str, value: float, place: str, observation: str) -> None:
    model, faulty = faulty_model(arm, place, value, observation)
    before = [param.detach().clone() for param in model.policy.parameters()]
    step = STEP if place == "reward" else STEP + 1  # what a step returns is seen at the next
    with pytest.raises(ValueError, match=rf"{place}.*environment {ENV} at step {step}.*VecCheckNan"):
        model.learn(256)
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    faulty.active = False
    model.learn(64, reset_num_timesteps=False)
    assert model._n_updates > 0
    assert all(param.isfinite().all() for param in model.policy.parameters())


@pytest.mark.parametrize("arm", ARMS)
def test_the_observation_after_the_last_step_counts_too(arm: str) -> None:
    model, faulty = faulty_model(arm, "observation", np.nan)
    faulty.steps = STEP - (model.n_steps - 1)
    with pytest.raises(ValueError, match=f"observation.*environment {ENV} at step {model.n_steps}"):
        model.learn(64)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # SB3's explained variance overflows
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("reward", [1e15, 1e20, 1e30, 1e38, 3e38])
def test_gigantic_rewards_never_reach_the_parameters_as_nan(arm: str, reward: float) -> None:
    model, _ = faulty_model(arm, "reward", reward)
    try:
        model.learn(128)
    except ValueError as error:
        assert "not finite" in str(error)
    assert all(param.isfinite().all() for param in model.policy.parameters())


class Masked(BaseFeaturesExtractor):
    """A causal self-attention over the entries of a vector: its mask holds -inf, and an unused mark holds NaN."""

    def __init__(self, observation_space: Any, kind: str = "buffer") -> None:
        super().__init__(observation_space, 5)
        self.inputs, self.attention = nn.Linear(1, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.outputs = nn.Linear(4, 1)
        mask, mark = torch.full((5, 5), -torch.inf).triu(1), torch.tensor([torch.nan, 1.0])
        if kind == "buffer":
            self.register_buffer("mask", mask)
            self.register_buffer("mark", mark)
        else:
            self.mask, self.mark = nn.Parameter(mask, kind == "trainable"), nn.Parameter(mark, kind == "trainable")

    def forward(self, observations: Tensor) -> Tensor:
        entries = self.inputs(observations.unsqueeze(-1))
        attended, _ = self.attention(entries, entries, entries, attn_mask=self.mask.detach(), need_weights=False)
        return self.outputs(attended).squeeze(-1)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("kind", ["buffer", "frozen", "trainable"])
def test_what_is_not_finite_and_stays_as_it_is_does_no_harm(arm: str, kind: str) -> None:
    algorithm, options = ARMS[arm]
    extractor = {"features_extractor_class": Masked, "features_extractor_kwargs": {"kind": kind}}
    options = {**options, "policy_kwargs": {**options.get("policy_kwargs", {}), **extractor}}
    model = make(algorithm, "multidiscrete" if algorithm is MaskableTRPO else "box", **options)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(64)
    assert model._reported_rejections == [] and "train/value_loss" in model.logger.name_to_value
    after = model.policy.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items() if "attention" in name)
    for name in (name for name in before if name.endswith(("mask", "mark"))):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)


def broken(tensor: Tensor, value: float, place: int = 0) -> None:
    with torch.no_grad():
        tensor.view(-1)[place] = value


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["log_std", "mark", "running_mean"])
def test_what_an_update_breaks_is_undone(name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one entry beside another that never was finite, and a statistic that the update moves."""
    model = make(TRPO, "box", policy_kwargs={"features_extractor_class": Masked})
    model.policy.mark = nn.Parameter(torch.tensor([torch.nan, 1.0]))
    model.policy.register_buffer("running_mean", torch.zeros(2))
    with_rollout(model)
    before = {key: tensor.clone() for key, tensor in model.policy.state_dict().items()}
    update = TRPO._update

    def breaking(self: Any) -> dict[str, float]:
        record = update(self)
        broken(getattr(self.policy, name), value, place=1)
        return record

    monkeypatch.setattr(TRPO, "_update", breaking)
    model.train()
    assert model._reported_rejections == ["a parameter became non-finite"]
    for key, tensor in model.policy.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


class Ignores(BaseFeaturesExtractor):
    """Takes what is not finite for zero, and says that it was missing."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 10)

    def forward(self, observations: Tensor) -> Tensor:
        known = observations.isfinite()
        return torch.cat([torch.where(known, observations, 0.0), known.float()], dim=1)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_observation_that_the_policy_has_a_use_for_is_served(arm: str, value: float) -> None:
    algorithm, options = ARMS[arm]
    action = ACTION_SPACES["multidiscrete" if algorithm is MaskableTRPO else "box"]
    env = Faulty(RandomEnv(OBSERVATION_SPACES["vector"], action, episode_length=50), "observation", value)
    policy = {**options.get("policy_kwargs", {}), "features_extractor_class": Ignores}
    options = {**SMALL, **options, "policy_kwargs": policy}
    model = algorithm(policy_name(algorithm, "vector"), env, **options).learn(64)
    assert env.steps == 64 and model._n_updates > 0 and model._reported_rejections == []


# Policies that forbid actions by logits of minus infinity


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
