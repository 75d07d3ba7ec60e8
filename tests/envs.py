"""Environments and models that the tests share."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn
from torch.distributions import Beta, kl_divergence

from sb3_trpo_ext import Family
from sb3_trpo_ext.core.parameters import flatten
from sb3_trpo_ext.policy.problem import PolicyOutput
from sb3_trpo_ext.rollout.batch import Batch

ACTION_SPACES: dict[str, spaces.Space] = {
    "box": spaces.Box(-1, 1, (3,)),
    "box2d": spaces.Box(-2, 2, (2, 2)),
    "discrete": spaces.Discrete(4),
    "multidiscrete": spaces.MultiDiscrete([3, 2, 4]),
    "multibinary": spaces.MultiBinary(3),
}
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
OBSERVATION_SPACES: dict[str, spaces.Space] = {
    "vector": spaces.Box(-1, 1, (5,)),
    "discrete": spaces.Discrete(6),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multibinary": spaces.MultiBinary(4),
    "image": IMAGE,
    "dict": spaces.Dict({"vector": spaces.Box(-1, 1, (4,)), "image": IMAGE}),
}
POLICIES = {"image": "CnnPolicy", "dict": "MultiInputPolicy"}
MASKABLE = [name for name, space in ACTION_SPACES.items() if not isinstance(space, spaces.Box)]
SMALL = {"n_steps": 32, "device": "cpu", "seed": 0}


class RandomEnv(gym.Env):
    """Random observations; a reward that depends on the action; episodes of a fixed length."""

    def __init__(
        self,
        observation_space: spaces.Space = OBSERVATION_SPACES["vector"],
        action_space: spaces.Space = ACTION_SPACES["discrete"],
        episode_length: int = 10,
    ) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self._episode_length = episode_length
        self._time = 0
        self._rng = np.random.default_rng(0)
        self._allowed: list[np.ndarray] | None = None

    def action_masks(self) -> np.ndarray:
        """Random masks that allow at least one option of each choice; a step then takes an allowed one."""
        self._allowed = [self._rng.random(size) < 0.6 for size in options_of(self.action_space)]
        for allowed in self._allowed:
            allowed[self._rng.integers(len(allowed))] = True
        return np.concatenate(self._allowed)

    def _check(self, action: Any) -> None:
        if self._allowed is not None:
            pairs = zip(self._allowed, np.atleast_1d(action), strict=True)
            assert all(allowed[int(choice)] for allowed, choice in pairs), "a forbidden action"
        self._allowed = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            super().reset(seed=seed)
            self.observation_space.seed(seed)
            self._rng = np.random.default_rng(seed)
        self._time = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._time += 1
        self._check(action)
        reward = float(np.sum(action)) + 0.1 * self._time
        return self.observation_space.sample(), reward, self._time >= self._episode_length, False, {}


def options_of(space: spaces.Space) -> list[int]:
    """Options of each choice, in the order of a mask."""
    if isinstance(space, spaces.MultiBinary):
        return [2] * space.n
    return [int(size) for size in (space.nvec if isinstance(space, spaces.MultiDiscrete) else [space.n])]


class NoisyExtractor(BaseFeaturesExtractor):
    """Batch norm and dropout: evaluation and training mode differ."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 8)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations)


class AttentionExtractor(BaseFeaturesExtractor):
    """Self-attention over the entries of the observation."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 20)
        self.embed, self.attend = nn.Linear(1, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, observations: Tensor) -> Tensor:
        return self.attend(self.embed(observations.unsqueeze(2))).flatten(1)


def make(algorithm: Any, action: str = "discrete", observation: str = "vector", **kwargs: Any) -> Any:
    """A small model of an algorithm on a `RandomEnv`."""
    env = RandomEnv(OBSERVATION_SPACES[observation], ACTION_SPACES[action])
    if issubclass(algorithm, RecurrentPPO):
        kwargs["policy_kwargs"] = {"lstm_hidden_size": 8, **kwargs.get("policy_kwargs", {})}
    return algorithm(policy_name(algorithm, observation), env, **{**SMALL, **kwargs})


def policy_name(algorithm: Any, observation: str) -> str:
    """The alias of SB3's or sb3-contrib's policy for an observation space."""
    name = POLICIES.get(observation, "MlpPolicy")
    return name.replace("Policy", "LstmPolicy") if issubclass(algorithm, RecurrentPPO) else name


def with_rollout(model: Any) -> Any:
    """Give a model a full rollout buffer, without an update."""
    model.train, train = lambda: None, model.train
    model.learn(model.n_steps)
    model.train = train
    return model


def dense_fisher(policy: Any, batch: Batch, params: list[Tensor]) -> Tensor:
    """The Hessian of the mean KL at θ_old, ``(P, P)``, one row at a time."""
    output = PolicyOutput.of(policy, batch)
    kl = batch.mean(output.family.kl(output.z.detach(), output.z))
    slope = flatten(torch.autograd.grad(kl, params, create_graph=True))
    return torch.stack([flatten(torch.autograd.grad(each, params, retain_graph=True)) for each in slope])


def v_trace(
    rewards: Tensor, values: Tensor, continues: Tensor, ratios: Tensor, *, discount: float, decay: float
) -> Tensor:
    """V-trace targets as the sum of their definition, ``(T, E)``; values are ``(T + 1, E)`` (Espeholt et al. 2018)."""
    rho, traces = ratios.clamp(max=1.0), decay * ratios.clamp(max=1.0)
    deltas = rho * (rewards + discount * continues * values[1:] - values[:-1])
    targets = values[:-1].clone()
    for start in range(len(rewards)):
        for step in range(start, len(rewards)):
            reached = (continues * traces)[start:step].prod(dim=0)
            targets[start] += discount ** (step - start) * reached * deltas[step]
    return targets


def in_float64(model: Any) -> Any:
    """Let a model's policy compute in float64 (SB3 casts observations to float32)."""
    model.policy.double()
    model.policy.features_extractor.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    return model


# A distribution that SB3 does not have, written as a user would write it


class BetaDistribution(Distribution):
    """Independent Betas, stretched from [0, 1] to [-1, 1]."""

    distribution: Any

    def proba_distribution_net(self, latent_dim: int, action_dim: int) -> nn.Module:
        return nn.Linear(latent_dim, 2 * action_dim)

    def proba_distribution(self, outputs: Tensor) -> "BetaDistribution":
        self.distribution = Beta(*(1 + nn.functional.softplus(outputs)).chunk(2, dim=1))
        return self

    def log_prob(self, actions: Tensor) -> Tensor:
        unit = ((actions + 1) / 2).clamp(1e-6, 1 - 1e-6)
        return (self.distribution.log_prob(unit) - torch.log(torch.tensor(2.0))).sum(dim=1)

    def entropy(self) -> Tensor | None:
        return None

    def sample(self) -> Tensor:
        return 2 * self.distribution.sample() - 1

    def mode(self) -> Tensor:
        return 2 * self.distribution.mean - 1

    def actions_from_params(self, outputs: Tensor) -> Tensor:
        return self.proba_distribution(outputs).sample()

    def log_prob_from_params(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        actions = self.actions_from_params(outputs)
        return actions, self.log_prob(actions)


class BetaFamily(Family):
    """z = (α, β), with torch's KL in float64."""

    def coordinates(self, distribution: BetaDistribution) -> Tensor:
        return torch.cat([distribution.distribution.concentration1, distribution.distribution.concentration0], dim=1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        p, q = (Beta(*z.double().chunk(2, dim=1)) for z in (old, new))
        return kl_divergence(p, q).sum(dim=1).to(new.dtype)


def with_distribution(policy_class: type[ActorCriticPolicy], distribution_class: type[Distribution]) -> type[Any]:
    """A policy class of SB3's or sb3-contrib's that makes this distribution."""

    class CustomPolicy(policy_class):  # type: ignore[misc, valid-type]
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.action_dist = distribution_class()
            action_dim = self.action_space.shape[0]
            self.action_net = self.action_dist.proba_distribution_net(self.mlp_extractor.latent_dim_pi, action_dim)
            del self.log_std
            self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

        def _get_action_dist_from_latent(self, latent_pi: Tensor, *args: Any) -> Distribution:
            return self.action_dist.proba_distribution(self.action_net(latent_pi))

    return CustomPolicy
