"""Environments with one lesson each, to be learnt in seconds."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from sb3_trpo_ext import TRPO, PPOClip

ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gauss-newton": (TRPO, {"critic": "gauss_newton"}),
    "adam": (TRPO, {"critic": "adam", "learning_rate": 1e-2, "batch_size": 64}),
    "ppo": (PPOClip, {"learning_rate": 3e-3, "batch_size": 64}),
}
TO_OBSERVATION = {-1.0: np.array([-1], np.float32), 1.0: np.array([1], np.float32)}


class Probe(gym.Env):
    """Episodes of ``length`` steps over observations -1 and 1 with reward(observation, action, last)."""

    observation_space = spaces.Box(-1, 1, (1,))

    def __init__(self, reward: Any, action_space: spaces.Space, length: int = 1, ordered: bool = False) -> None:
        self.reward, self.action_space, self.length, self.ordered = reward, action_space, length, ordered
        self.time, self.observation = 0, 1.0

    def _observe(self) -> np.ndarray:
        sign = 2.0 * self.time - 1 if self.ordered else float(self.np_random.choice([-1, 1]))
        self.observation = sign
        return TO_OBSERVATION[min(sign, 1.0)]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        last = self.time == self.length - 1
        reward = float(self.reward(self.observation, action, last))
        self.time += 1
        return self._observe(), reward, last, False, {}


def learnt(arm: str, env: Probe, timesteps: int = 4096, **options: Any) -> Any:
    algorithm, arguments = ARMS[arm]
    return algorithm("MlpPolicy", env, n_steps=256, seed=0, device="cpu", **arguments, **options).learn(timesteps)


def value(model: Any, observation: float) -> float:
    with torch.no_grad():
        return float(model.policy.predict_values(torch.tensor([[observation]])))


def action(model: Any, observation: float) -> Any:
    return model.predict(np.array([observation], np.float32), deterministic=True)[0]


@pytest.mark.parametrize("arm", ARMS)
def test_the_value_of_a_constant_reward(arm: str) -> None:
    model = learnt(arm, Probe(lambda o, a, last: 1.0, spaces.Discrete(2)))
    assert value(model, 1.0) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("arm", ARMS)
def test_the_value_depends_on_the_observation(arm: str) -> None:
    model = learnt(arm, Probe(lambda o, a, last: o, spaces.Discrete(2)))
    assert value(model, 1.0) == pytest.approx(1, abs=0.1)
    assert value(model, -1.0) == pytest.approx(-1, abs=0.1)


@pytest.mark.parametrize("arm", ARMS)
def test_a_later_reward_is_discounted(arm: str) -> None:
    env = Probe(lambda o, a, last: float(last), spaces.Discrete(2), length=2, ordered=True)
    model = learnt(arm, env, timesteps=8192, gamma=0.5)
    assert value(model, 1.0) == pytest.approx(1, abs=0.1)
    assert value(model, -1.0) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("arm", ARMS)
def test_the_action_that_pays(arm: str) -> None:
    model = learnt(arm, Probe(lambda o, a, last: 1.0 if a == 1 else -1.0, spaces.Discrete(2)))
    assert action(model, 1.0) == action(model, -1.0) == 1


@pytest.mark.parametrize("arm", ARMS)
def test_the_action_that_pays_depends_on_the_observation(arm: str) -> None:
    model = learnt(arm, Probe(lambda o, a, last: 1.0 if (a == 1) == (o > 0) else -1.0, spaces.Discrete(2)))
    assert (action(model, -1.0), action(model, 1.0)) == (0, 1)


@pytest.mark.parametrize("arm", ARMS)
def test_a_continuous_action_finds_its_target(arm: str) -> None:
    env = Probe(lambda o, a, last: -np.square(a - 0.5 * o).sum(), spaces.Box(-1, 1, (2,)))
    # All are there by 10 000 steps. Long after, with σ at 0.02, a single step of PPO may throw the mean off again.
    model = learnt(arm, env, timesteps=12_288)
    assert action(model, 1.0) == pytest.approx([0.5, 0.5], abs=0.15)
    assert action(model, -1.0) == pytest.approx([-0.5, -0.5], abs=0.15)
