import numpy as np
import torch
from envs import v_trace
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_trpo_ext.core.advantages import trace_advantages, trace_targets


def trajectories(seed: int, steps: int, envs: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    continues = (torch.rand(steps, envs, generator=generator, dtype=torch.float64) > 0.2).double()
    return {
        "rewards": normal(steps, envs),
        "values": normal(steps + 1, envs),
        "continues": continues,
        "ratios": torch.exp(0.5 * normal(steps, envs)),
    }


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 12), discount=st.floats(0, 1), decay=st.floats(0, 1))
def test_the_sum_of_the_definition(seed: int, steps: int, discount: float, decay: float) -> None:
    given_ = trajectories(seed, steps, 2)
    found = trace_advantages(**given_, discount=discount, trace_decay=decay)
    rewards, values, continues, ratios = (given_[k] for k in ("rewards", "values", "continues", "ratios"))
    for e in range(2):
        deltas = rewards[:, e] + discount * continues[:, e] * values[1:, e] - values[:-1, e]
        for t in range(steps):
            expected = deltas[t].clone()
            for j in range(1, steps - t):
                if not continues[t : t + j, e].all():
                    break
                traces = decay * ratios[t + 1 : t + j + 1, e].clamp(max=1.0)
                expected += discount**j * traces.prod() * deltas[t + j]
            torch.testing.assert_close(found[t, e], expected, rtol=1e-9, atol=1e-9)


def test_on_policy_it_is_the_estimator_of_sb3() -> None:
    given_ = trajectories(0, 30, 3)
    given_["ratios"] = torch.ones_like(given_["ratios"])
    buffer = RolloutBuffer(30, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", gae_lambda=0.9, gamma=0.95, n_envs=3)
    continues = given_["continues"].numpy()
    buffer.rewards = given_["rewards"].numpy()
    buffer.values = given_["values"][:-1].numpy()
    buffer.episode_starts = np.concatenate([np.zeros((1, 3)), 1 - continues[:-1]])
    buffer.compute_returns_and_advantage(given_["values"][-1], dones=1 - continues[-1])
    found = trace_advantages(**given_, discount=0.95, trace_decay=0.9)
    np.testing.assert_allclose(found, buffer.advantages, rtol=1e-5, atol=1e-6)


def test_a_large_ratio_counts_as_one_and_a_small_one_cuts() -> None:
    given_ = trajectories(1, 5, 1)
    given_["continues"][:] = 1.0
    large = trace_advantages(**given_ | {"ratios": torch.full((5, 1), 7.0)}, discount=0.9, trace_decay=0.8)
    on_policy = trace_advantages(**given_ | {"ratios": torch.ones(5, 1)}, discount=0.9, trace_decay=0.8)
    torch.testing.assert_close(large, on_policy)
    cut = trace_advantages(**given_ | {"ratios": torch.zeros(5, 1)}, discount=0.9, trace_decay=0.8)
    torch.testing.assert_close(cut, given_["rewards"] + 0.9 * given_["values"][1:] - given_["values"][:-1])


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 12), discount=st.floats(0, 1), decay=st.floats(0, 1))
def test_targets_of_values_are_those_of_v_trace(seed: int, steps: int, discount: float, decay: float) -> None:
    given_ = trajectories(seed, steps, 2)
    advantages = trace_advantages(**given_, discount=discount, trace_decay=decay)
    found = trace_targets(given_["values"][:-1], advantages, given_["ratios"])
    expected = v_trace(**given_, discount=discount, decay=decay)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_targets_of_values_are_the_returns_on_policy_and_the_values_where_nothing_is_likely_now() -> None:
    given_ = trajectories(2, 9, 2)
    for ratio, expected in ((1.0, None), (0.0, given_["values"][:-1])):
        ratios = torch.full_like(given_["ratios"], ratio)
        advantages = trace_advantages(**given_ | {"ratios": ratios}, discount=0.9, trace_decay=0.8)
        targets = trace_targets(given_["values"][:-1], advantages, ratios)
        torch.testing.assert_close(targets, given_["values"][:-1] + advantages if expected is None else expected)
