"""What an update sees of a rollout buffer, without a copy, and the minibatches of SB3."""

from typing import Any

import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, POLICIES, RandomEnv, with_rollout
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.rollout.action_spaces import kind_of
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import minibatches, whole_rollout

FIELDS = {"old_log_prob": "old_log_prob", "advantages": "advantages", "returns": "returns", "old_values": "old_values"}


class OwnBuffer(RolloutBuffer):
    """A subclass, whose arrays may be anything."""


def collected(action: str, observation: str, **options: Any) -> Any:
    env = make_vec_env(lambda: RandomEnv(OBSERVATION_SPACES[observation], ACTION_SPACES[action]), n_envs=3, seed=0)
    policy = POLICIES.get(observation, "MlpPolicy")
    return with_rollout(TRPO(policy, env, n_steps=8, device="cpu", seed=0, fast_rollouts=False, **options))


def tensors(observations: Any) -> list[Tensor]:
    return list(observations.values()) if isinstance(observations, dict) else [observations]


def assert_same(part: Batch, data: Any, action_space: Any) -> None:
    for mine, theirs in zip(tensors(part.observations), tensors(data.observations), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(part.actions, kind_of(action_space).as_taken(data.actions))
    for name, theirs in FIELDS.items():
        assert torch.equal(getattr(part, name), getattr(data, theirs).flatten()), name


@pytest.mark.parametrize("buffer_class", [None, OwnBuffer])
@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_minibatches_are_those_of_sb3(action: str, observation: str, reordered: bool, buffer_class: Any) -> None:
    if buffer_class is OwnBuffer and observation == "dict":
        pytest.skip("SB3 wants a DictRolloutBuffer here")
    model = collected(action, observation, rollout_buffer_class=buffer_class)
    buffer, space = model.rollout_buffer, model.action_space
    if reordered:
        next(buffer.get())
    batch = whole_rollout(buffer, space)
    np.random.seed(5)
    ours = list(minibatches(buffer, batch, 7, space))
    np.random.seed(5)
    for mine, theirs in zip(ours, buffer.get(7), strict=True):
        assert_same(mine, theirs, space)


@pytest.mark.parametrize("observation", ["vector", "image", "dict"])
def test_a_rollout_of_sb3s_own_buffers_is_viewed(observation: str) -> None:
    buffer = collected("box", observation).rollout_buffer
    assert type(buffer) in (RolloutBuffer, DictRolloutBuffer)
    state = np.random.get_state()[1]
    batch = whole_rollout(buffer, ACTION_SPACES["box"])
    for mine, theirs in zip(tensors(batch.observations), tensors(buffer.observations), strict=True):
        assert np.shares_memory(mine.numpy(), theirs)
    assert not buffer.generator_ready
    assert np.array_equal(state, np.random.get_state()[1])
    assert float(batch.weights.sum()) == pytest.approx(1)


def test_a_subset_is_drawn_by_numpys_generator_and_reweighted() -> None:
    batch = whole_rollout(collected("box", "dict").rollout_buffer, ACTION_SPACES["box"])
    assert batch.subset(len(batch)) is batch
    np.random.seed(1)
    first = batch.subset(5)
    np.random.seed(1)
    assert torch.equal(first.returns, batch.subset(5).returns)
    assert not torch.equal(first.returns, batch.subset(5).returns)
    assert len(first) == 5
    assert set(first.returns.tolist()) <= set(batch.returns.tolist())
    assert float(first.weights.sum()) == pytest.approx(1)
