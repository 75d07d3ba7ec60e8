"""Advantages that differ by rounding alone move nothing; a small true difference is learnt from."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import make, with_rollout
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentTRPO
from sb3_trpo_ext.core.advantages import rounding_of_advantages
from sb3_trpo_ext.policy.signal import longest_recursion
from sb3_trpo_ext.rollout.batch import Batch

NATURAL = {"trpo": TRPO, "npg": NPG, "recurrent": RecurrentTRPO, "maskable": MaskableTRPO}
FIRST_ORDER = {"ppo": PPOClip, "ppo-penalty": PPOPenalty}


class Paid(gym.Env):
    """Pays ``base`` at every step and ``more`` for the second action; episodes of ``length`` steps, or endless."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Discrete(2)

    def __init__(self, base: float, more: float = 0.0, length: int | None = 1) -> None:
        self.base, self.more, self.length, self.time = base, more, length, 0

    def action_masks(self) -> np.ndarray:
        return np.ones(2, dtype=bool)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.time = 0
        return np.ones(2, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.time += 1
        return np.ones(2, np.float32), self.base + self.more * int(action), self.time == self.length, False, {}


class OwnBuffer(RolloutBuffer):
    """A buffer of another class, which is asked by its `get`."""


def rolled(algorithm: Any, env: Paid, value: float = 0.0, n_envs: int = 1, **options: Any) -> Any:
    """A model with a full rollout, whose critic says ``value`` of every state."""
    vec_env = DummyVecEnv([lambda: Paid(env.base, env.more, env.length)] * n_envs)
    recurrent = algorithm is RecurrentTRPO
    model = algorithm("MlpLstmPolicy" if recurrent else "MlpPolicy", vec_env, seed=0, device="cpu", **options)
    with torch.no_grad():
        model.policy.value_net.weight.zero_()
        model.policy.value_net.bias.fill_(value)
    model.train, train = lambda: None, model.train
    model.learn(model.n_steps * n_envs)
    model.train = train
    return model


def actor(model: Any) -> list[torch.Tensor]:
    critics = ("value", "vf_", "critic", "lstm_critic")
    return [p.detach().clone() for name, p in model.policy.named_parameters() if not any(c in name for c in critics)]


def moved(model: Any) -> bool:
    before = actor(model)
    model.train()
    return not all(torch.equal(a, b) for a, b in zip(before, actor(model), strict=True))


SIZES = [32, 50, 64, 100, 129, 256]


@pytest.mark.parametrize("name", NATURAL)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_constant_reward_moves_nothing(name: str, normalize: bool, capsys: pytest.CaptureFixture[str]) -> None:
    for size in SIZES:
        model = rolled(NATURAL[name], Paid(1.0), n_steps=size, normalize_advantage=normalize, verbose=1)
        assert np.ptp(model.rollout_buffer.advantages) <= 1e-6
        capsys.readouterr()
        assert not moved(model)
        assert "all advantages are equal up to rounding" in capsys.readouterr().out
        log = model.logger.name_to_value
        assert log["train/kl_divergence_loss"] == log["train/step_size"] == 0
        assert all((p.grad == 0).all() for p in model.policy.action_net.parameters())


@pytest.mark.parametrize("name", FIRST_ORDER)
@pytest.mark.parametrize("buffer", [None, OwnBuffer])
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_nor_does_it_in_the_first_order_methods(name: str, buffer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if buffer is not None and name == "ppo-penalty":
        pytest.skip("PPOPenalty refuses such buffers")
    for size in SIZES:
        model = rolled(FIRST_ORDER[name], Paid(1.0), n_steps=size, verbose=1, rollout_buffer_class=buffer)
        critic = model.policy.value_net.bias.detach().clone()
        capsys.readouterr()
        assert not moved(model)
        assert not torch.equal(critic, model.policy.value_net.bias)  # the critic still learns
        assert "all advantages are equal up to rounding" in capsys.readouterr().out


@settings(max_examples=60, deadline=None)
@given(
    n_steps=st.integers(2, 150),
    n_envs=st.integers(1, 3),
    reward=st.sampled_from([1e6, -1e6, 1e-6, 0.1, -3.3, 0.0, 1e-30]),
    case=st.sampled_from(["bandit", "myopic", "exact", "exact bandit"]),
    gamma=st.sampled_from([0.9, 0.99, 0.999, 1.0]),
    gae_lambda=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    algorithm=st.sampled_from([TRPO, NPG]),
)
def test_whatever_makes_all_advantages_equal(
    n_steps: int, n_envs: int, reward: float, case: str, gamma: float, gae_lambda: float, algorithm: Any
) -> None:
    options = {"n_steps": n_steps, "n_envs": n_envs, "gamma": gamma, "gae_lambda": gae_lambda}
    if case == "bandit":  # Â = r
        model = rolled(algorithm, Paid(reward), **options)
    elif case == "exact bandit":  # Â = r - V = 0 but for the rounding of V
        model = rolled(algorithm, Paid(reward), value=reward * (1 + 1e-7), **options)
    elif case == "myopic":  # Â = r, whatever follows
        model = rolled(algorithm, Paid(reward, length=7), **{**options, "gamma": 0.0})
    elif gamma == 1.0:  # Â = r + V - V of an endless task: r = 0
        model = rolled(algorithm, Paid(0.0, length=None), value=reward, **options)
    else:  # V = r / (1 - γ) is exact but for rounding, which the recursion adds up
        model = rolled(algorithm, Paid(reward, length=None), value=reward / (1 - gamma), **options)
    assert not moved(model)


@settings(max_examples=40, deadline=None)
@given(
    n_steps=st.integers(64, 200),
    base_value_more=st.sampled_from(
        [(0.0, 0.0, 1e-6), (0.0, 0.0, 1e-12), (-1e-6, 0.0, 1e-6), (100.0, 100.0, 1e-3), (100.0, 0.0, 1e-3), (0, 0, 1e6)]
    ),
    endless=st.booleans(),
    gae_lambda=st.sampled_from([0.0, 0.95, 1.0]),
    algorithm=st.sampled_from([TRPO, NPG]),
)
def test_a_small_true_difference_is_learnt_from(
    n_steps: int, base_value_more: tuple[float, float, float], endless: bool, gae_lambda: float, algorithm: Any
) -> None:
    base, value, more = base_value_more
    gamma = 0.99
    if endless and base:
        base *= 1 - gamma if value else 0.0
    env = Paid(base, more, None if endless else 1)
    model = rolled(algorithm, env, value, n_steps=n_steps, gamma=gamma, gae_lambda=gae_lambda)
    state = torch.ones(1, 2)

    def preference() -> float:
        with torch.no_grad():
            return float(model.policy.get_distribution(state).distribution.probs[0, 1])

    before = preference()
    assert moved(model)
    if gae_lambda == 0.0 or not endless:  # otherwise what follows an action is as large as what it brings
        assert preference() > before


@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty])
@pytest.mark.parametrize(("base", "value", "more"), [(0.0, 0.0, 1e-6), (100.0, 100.0, 1e-3)])
def test_the_first_order_methods_learn_from_it_too(algorithm: Any, base: float, value: float, more: float) -> None:
    assert moved(rolled(algorithm, Paid(base, more), value, n_steps=128))


def test_an_entropy_bonus_is_a_signal_of_its_own() -> None:
    model = rolled(TRPO, Paid(1.0), n_steps=64, ent_coef=0.01)
    with torch.no_grad():
        model.policy.action_net.bias[0] += 1.0
    before = model.policy.action_net.bias.detach().clone()
    model.train()
    log = model.logger.name_to_value
    assert log["train/is_line_search_success"]
    assert model.policy.action_net.bias[0] < before[0]


def test_momentum_does_not_roll_on_through_a_rollout_without_signal() -> None:
    model = rolled(TRPO, Paid(0.0, 1.0), n_steps=64, momentum=0.9)
    model.train()
    memory = model.gradient_memory
    assert memory is not None
    model.rollout_buffer.advantages[:] = model.rollout_buffer.advantages[0, 0]
    assert not moved(model)
    np.testing.assert_array_equal(model.gradient_memory, memory)


def test_past_rollouts_are_judged_with_the_new_one() -> None:
    model = rolled(TRPO, Paid(1.0), n_steps=64, sample_reuse=3)
    before = actor(model)
    model.learn(4 * 64, reset_num_timesteps=False)
    assert len(model._past_rollouts) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, actor(model), strict=True))


def test_a_mean_that_is_large_beside_the_differences_is_taken_off_to_the_last_bit() -> None:
    n = 1999  # no power of two, so that weights round
    advantages = 1e6 + torch.arange(n).remainder(2).float()
    zeros = torch.zeros(n)
    batch = Batch(zeros, zeros, zeros, advantages, zeros, zeros, torch.full((n,), 1.0 / n)).with_normalized_advantages()
    assert abs(float(batch.advantages.double().mean())) < 1e-4
    assert float(batch.advantages.double().std()) == pytest.approx(1.0, rel=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rounding_of_the_recursion_is_bounded(data: st.DataObject) -> None:
    """float32 against float64 on random rewards and values."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    steps = data.draw(st.integers(1, 300))
    gamma, decay = data.draw(st.sampled_from([0.5, 0.99, 1.0])), data.draw(st.sampled_from([0.0, 0.95, 1.0]))
    scale = 10.0 ** data.draw(st.integers(-6, 6))
    rewards, values = (scale * rng.standard_normal(size) for size in (steps, steps + 1))
    rewards, values = rewards.astype(np.float32), values.astype(np.float32)

    def advantages(kind: Any) -> np.ndarray:
        r, v = rewards.astype(kind), values.astype(kind)
        found, ahead = np.zeros(steps, kind), kind(0)
        for t in reversed(range(steps)):
            ahead = r[t] + kind(gamma) * v[t + 1] - v[t] + kind(gamma * decay) * ahead
            found[t] = ahead
        return found

    error = np.abs(advantages(np.float32) - advantages(np.float64)).max()
    magnitude = float(np.abs(advantages(np.float64)).max() + np.abs(values).max())
    eps = float(np.finfo(np.float32).eps)
    assert 2 * error <= rounding_of_advantages(magnitude, steps, decay=gamma * decay, eps=eps)


@pytest.mark.parametrize("flattened", [False, True])
def test_the_longest_recursion_is_that_of_the_longest_episode(flattened: bool) -> None:
    class Buffer:
        buffer_size, n_envs = 6, 2
        episode_starts = np.array([[1, 0], [0, 0], [1, 0], [0, 0], [0, 1], [1, 0]], np.float32)

    if flattened:
        Buffer.episode_starts = Buffer.episode_starts.T.reshape(-1, 1)
    assert longest_recursion(Buffer()) == 4  # type: ignore[arg-type]


def test_a_mixed_rollout_is_not_silent() -> None:
    model = with_rollout(make(TRPO, "box"))
    assert moved(model)
