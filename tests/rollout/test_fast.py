"""The fast path collects what SB3's own collection would."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import RandomEnv, make
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_trpo_ext import TRPO, PPOClip
from sb3_trpo_ext.rollout.env_copies import cheap_copies
from sb3_trpo_ext.rollout.returns import estimate_advantages


def hooked(model: Any) -> None:
    model.policy.action_net.register_forward_hook(lambda module, inputs, output: output + 1)


def replaced(model: Any) -> None:
    model.policy.mlp_extractor.forward_actor = lambda features: torch.zeros(len(features), 64)


def wrapped(model: Any) -> None:
    model.policy.mlp_extractor = torch.compile(model.policy.mlp_extractor, backend="eager")


def double(model: Any) -> None:
    model.policy.action_net = nn.Sequential(model.policy.action_net, nn.Tanh())


def parametrised(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.policy.action_net)


def method(name: str) -> Callable[[Any], None]:
    return lambda model: setattr(model.policy, name, getattr(model.policy, name))


@pytest.mark.parametrize(
    "change",
    [hooked, replaced, wrapped, double, parametrised, method("forward"), method("_get_action_dist_from_latent")],
)
def test_a_policy_that_was_changed_falls_back(change: Callable[[Any], None]) -> None:
    model = make(TRPO, "box")
    change(model)
    model.train = lambda: None
    model.learn(32)
    assert model.rollout_path.startswith("stable_baselines3: ")


class OwnForward(ActorCriticPolicy):
    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        return super().forward(obs, deterministic)


class OwnBuffer(RolloutBuffer):
    pass


@pytest.mark.parametrize(
    "options",
    [
        {"use_sde": True},
        {"observation": "image"},
        {"observation": "dict"},
        {"policy_kwargs": {"activation_fn": nn.Softplus}},
        {"rollout_buffer_class": OwnBuffer},
        {"fast_rollouts": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("algorithm", [TRPO, PPOClip])
def test_what_is_not_covered_falls_back(algorithm: Any, options: dict[str, Any]) -> None:
    assert make(algorithm, "box", **options).learn(32).rollout_path.startswith("stable_baselines3: ")


def test_a_subclass_with_its_own_forward_falls_back() -> None:
    model = TRPO(OwnForward, RandomEnv(), n_steps=32, device="cpu").learn(32)
    assert model.rollout_path == "stable_baselines3: OwnForward has its own forward"


def test_verbose_says_which_path_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    make(TRPO, "box", verbose=1).learn(64)
    make(TRPO, "box", verbose=1, use_sde=True).learn(64)
    printed = capsys.readouterr().out
    assert printed.count("Rollouts: fast") == 1
    assert "has its own" not in printed
    assert printed.count("Rollouts: stable_baselines3: action distribution StateDependentNoiseDistribution") == 1


def test_a_callback_that_stops_leaves_the_steps_so_far() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 7

    model = make(TRPO, "box").learn(64, callback=Stop())
    assert (model.num_timesteps, model.rollout_buffer.pos, model._n_updates) == (7, 6, 0)


@pytest.mark.parametrize("n_envs", [1, 4])
def test_advantages_are_those_of_sb3_bit_for_bit(n_envs: int) -> None:
    box = gym.spaces.Box(-1, 1, (2,))
    ours, theirs = (RolloutBuffer(50, box, box, "cpu", 0.95, 0.99, n_envs) for _ in range(2))
    random = np.random.default_rng(0)
    for name in ("rewards", "values", "episode_starts"):
        drawn = random.random((50, n_envs)) < 0.1 if name == "episode_starts" else random.normal(size=(50, n_envs))
        for buffer in (ours, theirs):
            getattr(buffer, name)[:] = drawn
    last_values, dones = random.normal(size=n_envs).astype(np.float32), np.arange(n_envs) % 2 == 1
    estimate_advantages(ours, last_values, dones)
    theirs.compute_returns_and_advantage(torch.from_numpy(last_values), dones)
    assert np.array_equal(ours.advantages, theirs.advantages)
    assert np.array_equal(ours.returns, theirs.returns)


class Mutable:
    """Something that an environment might change in place."""

    def __init__(self) -> None:
        self.value = 0


class Keeper(gym.Env[np.ndarray, int]):
    """Returns one and the same observation and info, changed in place at each step."""

    observation_space, action_space = gym.spaces.Box(-100, 100, (2,)), gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.observation = np.zeros(2, dtype=np.float32)
        self.info: dict[str, Any] = {"n": 0, "list": [], "array": np.zeros(2), "object": Mutable(), "f": np.float64(0)}
        return self.observation, self.info

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.observation += 1
        self.info["n"] += 1
        self.info["list"].append(self.info["n"])
        self.info["array"] += 1
        self.info["object"].value += 1
        return self.observation, 0.0, self.info["n"] == 7, False, self.info


@pytest.mark.parametrize("wrap", [lambda env: env, VecNormalize])
def test_cheap_copies_are_as_deep_as_they_must_be(wrap: Callable[[Any], Any]) -> None:
    def described(info: dict[str, Any]) -> Any:
        return {k: v.value if k == "object" else np.asarray(v).tolist() for k, v in info.items() if k != "episode"}

    def run(cheap: bool) -> list[Any]:
        env = wrap(make_vec_env(Keeper, n_envs=2))
        env.reset()
        with cheap_copies(env) if cheap else nullcontext():
            steps = [env.step(np.zeros(2, dtype=int)) for _ in range(10)]
        assert type(env.unwrapped) is DummyVecEnv
        return [
            (obs.tolist(), rewards.tolist(), dones.tolist(), list(map(described, infos)))
            for obs, rewards, dones, infos in steps
        ]

    assert run(cheap=True) == run(cheap=False)
