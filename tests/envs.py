"""Environments and models that the tests share."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

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

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            super().reset(seed=seed)
            self.observation_space.seed(seed)
        self._time = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._time += 1
        reward = float(np.sum(action)) + 0.1 * self._time
        return self.observation_space.sample(), reward, self._time >= self._episode_length, False, {}


class NoisyExtractor(BaseFeaturesExtractor):
    """Batch norm and dropout: evaluation and training mode differ."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 8)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations)


def make(algorithm: Any, action: str = "discrete", observation: str = "vector", **kwargs: Any) -> Any:
    """A small model of an algorithm on a `RandomEnv`."""
    env = RandomEnv(OBSERVATION_SPACES[observation], ACTION_SPACES[action])
    return algorithm(POLICIES.get(observation, "MlpPolicy"), env, **{**SMALL, **kwargs})


def with_rollout(model: Any) -> Any:
    """Give a model a full rollout buffer, without an update."""
    model.train, train = lambda: None, model.train
    model.learn(model.n_steps)
    model.train = train
    return model


def in_float64(model: Any) -> Any:
    """Let a model's policy compute in float64 (SB3 casts observations to float32)."""
    model.policy.double()
    model.policy.features_extractor.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    return model
