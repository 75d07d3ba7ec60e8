"""A rollout that is not finite is refused with its place, and nothing is lost."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, SMALL, RandomEnv, policy_name
from stable_baselines3.common.vec_env import DummyVecEnv

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
