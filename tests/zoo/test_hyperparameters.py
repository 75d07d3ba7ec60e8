from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3
import yaml
from gymnasium import spaces
from stable_baselines3.common.callbacks import StopTrainingOnMaxEpisodes
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
from torch import nn

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.zoo import ALGORITHMS
from sb3_trpo_ext.zoo.experiment import hyperparameters_of

Build = Callable[..., Any]

NAMES = ["Ant", "HalfCheetah", "Hopper", "Walker2d", "Swimmer", "Reacher", "Humanoid", "HumanoidStandup", "Pusher"]
NAMES += ["InvertedPendulum", "InvertedDoublePendulum"]
MUJOCO = [f"{name}-{version}" for version in ("v5", "v4") for name in NAMES]
PROMISED = {
    *MUJOCO,
    "CartPole-v1",
    "Acrobot-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Pendulum-v1",
    "LunarLander-v3",
    "LunarLanderContinuous-v3",
    "BipedalWalker-v3",
    "atari",
    "default",
}
STAND_INS = {"atari": "PongNoFrameskip-v4", "default": "ObservedVector-v0"}
"""A task that takes the entry."""


class Observed(gym.Env[Any, Any]):
    """Any observation space; episodes of ten steps; every second step one of two actions is forbidden."""

    action_space = spaces.Discrete(2)

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.observation_space = space
        self._step = 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**kwargs)
        self._step = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._step += 1
        return self.observation_space.sample(), 1.0, self._step == 10, False, {}

    def action_masks(self) -> np.ndarray:
        return np.array([True, self._step % 2 == 0])


SPACES = {
    "Vector": spaces.Box(-1, 1, (3,)),
    "Discrete": spaces.Discrete(4),
    "MultiBinary": spaces.MultiBinary(3),
    "Image": spaces.Box(0, 255, (36, 36, 3), np.uint8),
    "Dict": spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": spaces.Discrete(3)}),
}
for space_name, observed in SPACES.items():
    gym.register(f"Observed{space_name}-v0", entry_point=lambda space=observed: Observed(space))


def entries(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text())


def ours() -> list[Any]:
    """All our entries; of two versions of a task with the same hyperparameters the older is a slow test."""
    found = []
    for algo in ALGORITHMS:
        listed = entries(hyperparameters_of(algo))
        for name, entry in listed.items():
            repeats = name.endswith("-v4") and listed.get(name.replace("-v4", "-v5")) == entry
            found.append(pytest.param(algo, name, marks=[pytest.mark.slow] if repeats else []))
    return found


ZOO_TRPO = Path(rl_zoo3.__file__).parent / "hyperparams" / "trpo.yml"


def make_or_skip(env: str) -> None:
    """Skip what cannot be installed here."""
    try:
        gym.make(env).close()
    except Exception as reason:
        pytest.skip(f"{env}: {reason}")


@pytest.mark.parametrize("algo", sorted(set(ALGORITHMS) - {"trpo_mask"}))
def test_every_promised_task_is_listed(algo: str) -> None:
    assert set(entries(hyperparameters_of(algo))) >= PROMISED


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("algo", "name"), ours())
def test_every_entry_makes_a_model_that_learns(experiment: Build, algo: str, name: str) -> None:
    env = STAND_INS.get(name, name)
    make_or_skip(env)
    few = {"n_envs": 2} if name == "atari" else {}
    model, _ = experiment(algo, env, hyperparams=few).setup_experiment()
    # Made as it is, it learns from short rollouts, in one pass.
    samples = 32 if name == "atari" else 256
    model.n_steps = min(model.n_steps, -(-samples // model.n_envs))
    if algo.startswith("ppo"):
        model.n_epochs = 1
    before = [parameter.clone() for parameter in model.policy.parameters()]
    rollouts = 2 if callable(model.learning_rate) else 1  # a rate that falls to zero is zero at the end of one
    model.learn(rollouts * model.n_steps * model.n_envs)
    assert model._n_updates >= 1
    moved = [not bool((now == then).all()) for now, then in zip(model.policy.parameters(), before, strict=True)]
    assert any(moved)
    model.env.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in entries(ZOO_TRPO) if "Bullet" not in n])
def test_the_trpo_file_of_the_zoo_means_what_it_meant(experiment: Build, name: str) -> None:
    env = STAND_INS.get(name, name)
    make_or_skip(env)
    entry = entries(ZOO_TRPO)[name]
    model, _ = experiment("trpo", env, config=str(ZOO_TRPO)).setup_experiment()
    assert type(model) is TRPO
    for argument in ("n_steps", "batch_size", "gamma", "cg_max_steps", "cg_damping", "n_critic_updates", "gae_lambda"):
        if argument in entry:
            assert getattr(model, argument) == entry[argument]
    if {"batch_size", "learning_rate", "n_critic_updates"} & set(entry):
        assert model._critic_kind() == "adam"
    box = isinstance(model.action_space, spaces.Box)
    dimensions = model.action_space.shape[0] if box else 1
    assert model.trust_region_radius() == pytest.approx(entry.get("target_kl", 0.01) * dimensions)
    model.n_critic_updates = 1
    model.learn(model.n_steps * model.n_envs)
    assert model.logger.name_to_value["train/target_kl"] == pytest.approx(model.trust_region_radius())
    model.env.close()


@pytest.mark.parametrize(
    ("argument", "text", "last"), [("target_kl", "lin_0.02", 0.0002), ("ent_coef", "lin_0.02", 0.0)]
)
def test_schedules_fall_linearly_and_end_well(experiment: Build, argument: str, text: str, last: float) -> None:
    hyperparams = {argument: text, "n_steps": 32, "n_envs": 2}
    model, _ = experiment("trpo", "CartPole-v1", hyperparams=hyperparams).setup_experiment()
    schedule = getattr(model, argument)
    assert [schedule(1.0), schedule(0.5), schedule(0.0)] == pytest.approx([0.02, (0.02 + last) / 2, last])
    assert schedule(-0.1) == pytest.approx(last)  # a last rollout may go beyond the end
    model.learn(200)
    assert model.num_timesteps == 256


@pytest.mark.parametrize(
    ("algo", "argument"), [("npg", "step_size"), ("npg", "target_kl"), ("ppo_penalty", "target_kl")]
)
def test_schedules_in_the_rest_of_the_family(experiment: Build, algo: str, argument: str) -> None:
    hyperparams = {argument: "lin_0.02", "n_steps": 32, "n_envs": 2, "learning_rate": "lin_0.01"}
    model, _ = experiment(algo, "CartPole-v1", hyperparams=hyperparams).setup_experiment()
    model.learn(200)
    assert getattr(model, argument)(0.5) == pytest.approx(0.0101)
    assert model.lr_schedule(0.5) == pytest.approx(0.005)


@pytest.mark.parametrize("text", ["linear_0.01", "lin_", "0.01", "lin_much"])
def test_a_schedule_that_is_none_is_named(experiment: Build, text: str) -> None:
    with pytest.raises(ValueError, match=f"`target_kl` must be a number, or a schedule like 'lin_0.01', got '{text}'"):
        experiment("trpo", "CartPole-v1", hyperparams={"target_kl": text}).setup_experiment()


@pytest.mark.parametrize(
    ("algo", "argument", "text", "values"),
    [
        ("trpo", "log_std", "lin_-0.5_-1.5", (-0.5, -1.0, -1.5)),
        ("npg", "log_std", "lin_-1_-0.25", (-1.0, -0.625, -0.25)),
        ("ppo_clip", "log_std", "lin_0_-2e0", (0.0, -1.0, -2.0)),
        ("ppo_penalty", "log_std", "lin_-0.5_-0.5", (-0.5, -0.5, -0.5)),
        ("trpo", "target_kl_std", "lin_0.01", (0.01, 0.00505, 0.0001)),
        ("trpo", "target_kl", "lin_0.02_0.005", (0.02, 0.0125, 0.005)),
    ],
)
def test_a_schedule_between_two_numbers(
    experiment: Build, algo: str, argument: str, text: str, values: tuple[float, ...]
) -> None:
    short = {argument: text, "n_envs": 2, "n_steps": 16, "use_sde": False}
    if algo.startswith("ppo"):
        short |= {"batch_size": 16}
    manager = experiment(algo, "Pendulum-v1", hyperparams=short)
    model, saved = manager.setup_experiment()
    assert [getattr(model, argument)(left) for left in (1.0, 0.5, 0.0)] == pytest.approx(list(values))
    assert saved[argument] == text
    model.learn(64)
    if argument == "log_std":
        assert model.policy.log_std.tolist() == pytest.approx([values[1]])


@pytest.mark.parametrize("word", ["learned", "fixed"])
def test_a_word_is_no_schedule(experiment: Build, word: str) -> None:
    hyperparams = {"log_std": word, "log_std_min": None, "use_sde": False, "n_envs": 1}
    model, _ = experiment("trpo", "Pendulum-v1", hyperparams=hyperparams).setup_experiment()
    assert model.log_std == word


@pytest.mark.parametrize("text", ["lin_-0.5", "held", "lin_-0.5_low", "lin_0_1_2", "fixed_-0.5"])
def test_a_spread_that_is_none_is_named(experiment: Build, text: str) -> None:
    words = f"`log_std` must be 'learned', 'fixed', or a schedule like 'lin_-0.5_-1.5', got '{text}'"
    with pytest.raises(ValueError, match=words):
        experiment("trpo", "Pendulum-v1", hyperparams={"log_std": text}).setup_experiment()


def test_a_constant_learning_rate_is_a_choice_of_the_adam_critic(experiment: Build) -> None:
    model, _ = experiment("trpo", "CartPole-v1", hyperparams={"learning_rate": 3e-4}).setup_experiment()
    assert isinstance(model.learning_rate, ConstantSchedule)
    assert model._critic_kind() == "adam"


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        "dict(activation_fn=nn.ReLU, net_arch=[8])",
        {
            "activation_fn": "torch.nn.ReLU",
            "net_arch": [8],
            "features_extractor_class": "stable_baselines3.common.torch_layers.FlattenExtractor",
        },
    ],
)
def test_wrappers_normalisation_frames_networks_and_callbacks(experiment: Build, policy_kwargs: Any) -> None:
    hyperparams = {
        "env_wrapper": [
            {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 20}},
            "gymnasium.wrappers.FlattenObservation",
        ],
        "normalize": "dict(norm_reward=False)",
        "frame_stack": 3,
        "policy_kwargs": policy_kwargs,
        "callback": [{"stable_baselines3.common.callbacks.StopTrainingOnMaxEpisodes": {"max_episodes": 3}}],
        "n_envs": 1,
        "n_steps": 16,
        "n_timesteps": 640,
    }
    manager = experiment("trpo", "CartPole-v1", hyperparams=hyperparams)
    model, saved = manager.setup_experiment()
    assert saved["policy_kwargs"] == policy_kwargs  # as written: what is saved can be read again
    assert isinstance(model.env, VecFrameStack)
    assert model.observation_space.shape == (12,)
    normalise = model.get_vec_normalize_env()
    assert isinstance(normalise, VecNormalize) and not normalise.norm_reward
    assert isinstance(model.policy.features_extractor, FlattenExtractor)
    assert [type(layer) for layer in model.policy.mlp_extractor.policy_net] == [nn.Linear, nn.ReLU]
    assert isinstance(manager.callbacks[0], StopTrainingOnMaxEpisodes)
    manager.learn(model)
    assert 0 < model.num_timesteps <= 60  # stopped by the callback after three episodes


@pytest.mark.parametrize("algo", ["trpo", "ppo_clip", "trpo_lstm"])
@pytest.mark.parametrize("kind", SPACES)
def test_the_default_entry_runs_whatever_is_observed(experiment: Build, algo: str, kind: str) -> None:
    short = {"n_steps": 16, "n_envs": 2}
    model, _ = experiment(algo, f"Observed{kind}-v0", hyperparams=short).setup_experiment()
    model.learn(32)
    assert model._n_updates >= 1
    policy = type(model.policy).__name__
    assert ("Cnn" in policy, "MultiInput" in policy) == (kind == "Image", kind == "Dict")


def test_a_callback_of_the_users_own_module(experiment: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_callbacks.py").write_text(
        "from stable_baselines3.common.callbacks import BaseCallback\n"
        "class Stop(BaseCallback):\n"
        "    def _on_step(self):\n"
        "        return False\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    manager = experiment("npg", "CartPole-v1", hyperparams={"callback": "my_callbacks.Stop"})
    model, _ = manager.setup_experiment()
    manager.learn(model)
    assert model.num_timesteps == model.n_envs


@pytest.mark.parametrize("algo", ["trpo", "npg", "ppo_clip", "ppo_penalty", "trpo_mask"])
def test_entries_may_ask_for_values_of_actions(experiment: Build, algo: str, tmp_path: Path) -> None:
    entry = {"n_timesteps": 64, "policy": "auto", "n_envs": 2, "n_steps": 16, "batch_size": 16}
    entry |= {"critic": "action_value", "bootstrap": "max", "surrogate": "expected"}
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump({"ObservedDict-v0": entry}))
    model, _ = experiment(algo, "ObservedDict-v0", config=str(config)).setup_experiment()
    model.learn(64)
    assert (model.has_action_values, model.bootstrap, model.surrogate) == (True, "max", "expected")
