"""What an update sees of a rollout buffer, without a copy: minibatches of SB3, and sequences with bounded padding."""

from typing import Any

import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, POLICIES, RandomEnv, in_float64, make, with_rollout
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from sb3_trpo_ext import TRPO, RecurrentPPOClip, RecurrentTRPO
from sb3_trpo_ext.core.parameters import flatten
from sb3_trpo_ext.critic.base import Regression
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonCritic
from sb3_trpo_ext.policy import memory_budget as device
from sb3_trpo_ext.policy.evaluation import consistent_evaluation
from sb3_trpo_ext.policy.memory_budget import _saved_bytes, affordable_samples
from sb3_trpo_ext.policy.problem import PolicyOutput, PolicyProblem
from sb3_trpo_ext.rollout.action_spaces import kind_of
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import minibatches, whole_rollout
from sb3_trpo_ext.rollout.sequences import PADDED, SequenceBatch

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


# Padding: bounded for every mixture of lengths, and without influence on any result

LENGTHS = st.lists(st.one_of(st.just(1), st.integers(1, 5), st.integers(6, 40)), min_size=1, max_size=25)
SMALL_POLICY = {"lstm_hidden_size": 3, "net_arch": [4]}


def policy(action: str = "box") -> Any:
    return in_float64(make(RecurrentTRPO, action, policy_kwargs=SMALL_POLICY)).policy


def batch_of(lengths: list[int], action: str = "box", seed: int = 0) -> SequenceBatch:
    """Sequences of given lengths, each from a hidden state of its own or from the beginning of an episode."""
    size, random = sum(lengths), np.random.default_rng(seed)
    starts = torch.zeros(size, dtype=torch.bool)
    starts[np.cumsum([0, *lengths[:-1]])] = True
    space = ACTION_SPACES[action]
    space.seed(seed)
    actions = torch.as_tensor(np.stack([space.sample() for _ in range(size)]))

    def vector() -> Tensor:
        return torch.from_numpy(random.standard_normal(size))

    return SequenceBatch(
        torch.from_numpy(random.standard_normal((size, 5))),
        actions if action == "discrete" else actions.double(),
        -vector().abs(),
        vector(),
        vector(),
        vector(),
        vector().softmax(0),
        starts=starts,
        resets=starts * torch.from_numpy(random.random(size) < 0.7).double(),
        states=tuple(torch.from_numpy(random.standard_normal((size, 1, 3))) for _ in range(4)),
    )


def one_by_one(batch: SequenceBatch) -> list[SequenceBatch]:
    """Each sequence alone: nothing to pad."""
    cuts = torch.nonzero(batch.starts).flatten().tolist()
    return [batch[a:b] for a, b in zip(cuts, [*cuts[1:], len(batch)], strict=True)]


@given(LENGTHS, st.one_of(st.none(), st.integers(1, 300)))
def test_places_are_bounded_and_every_sample_is_in_one_part(lengths: list[int], size: int | None) -> None:
    batch = batch_of(lengths)
    parts = batch.split(size)
    for part in parts:
        assert part.places == len(part._grid.rows) <= PADDED * len(part)
        assert size is None or part.places <= size or int(part.starts.sum()) == 1
    assert torch.equal(batch.in_order([part.weights for part in parts], size), batch.weights)
    assert sum(len(part) for part in parts) == len(batch)
    assert sum(int(part.starts.sum()) for part in parts) == len(lengths), "a sequence was cut or joined to another"


@settings(max_examples=15)
@given(LENGTHS, st.one_of(st.none(), st.integers(1, 200)), st.sampled_from(["box", "discrete"]))
def test_results_are_those_of_the_sequences_one_by_one(lengths: list[int], size: int | None, action: str) -> None:
    model, batch = policy(action), batch_of(lengths, action)
    alone = one_by_one(batch)
    with torch.no_grad():
        answers = [part.evaluate_actions(model) for part in alone]
        expected = [torch.cat([answer[i] for answer in answers]) for i in range(3)]
        for found, wanted in zip(batch.evaluate_actions(model), expected, strict=True):
            torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(batch.values(model), expected[0])
        old_z = torch.cat([PolicyOutput.of(model, part).z.clone() for part in alone])

    with consistent_evaluation(model):
        problem = PolicyProblem(model, batch, ent_coef=0.1, chunk_size=size)
        oracles = [PolicyProblem(model, part, ent_coef=0.1) for part in alone]
        for param, gradient in problem.gradients.items():
            torch.testing.assert_close(gradient, torch.stack([each.gradients[param] for each in oracles]).sum(0))
        torch.testing.assert_close(problem.old_z, old_z)
        direction = torch.ones_like(problem.gradient)
        product = problem.fisher(0.0)(direction)
        torch.testing.assert_close(product, sum(oracle.fisher(0.0)(direction) for oracle in oracles))
        with torch.no_grad():
            problem.params[0].add_(0.1)
        moved = [oracle.evaluate() for oracle in oracles]
        found = problem.evaluate()
        assert found.objective == pytest.approx(sum(each.objective for each in moved))
        assert found.divergence == pytest.approx(sum(each.divergence for each in moved))
        assert found.kl_max == pytest.approx(max(each.kl_max for each in moved))


@settings(max_examples=10)
@given(LENGTHS)
def test_the_critic_learns_the_same_whatever_the_parts(lengths: list[int]) -> None:
    models, batch = [policy() for _ in range(2)], batch_of(lengths)
    for model, size in zip(models, (None, 1), strict=True):
        GaussNewtonCritic(cg_steps=3).fit(Regression(model, batch, chunk_size=size))
    found, wanted = (flatten(list(model.parameters())) for model in models)
    torch.testing.assert_close(found, wanted)


def rollout_of(lengths: list[int], algorithm: Any = RecurrentTRPO, hidden: int = 64, **options: Any) -> Any:
    """A model with a rollout of environments whose episodes have these lengths."""
    spaces = OBSERVATION_SPACES["vector"], ACTION_SPACES["box"]
    env = DummyVecEnv([lambda length=length: RandomEnv(*spaces, episode_length=length) for length in lengths])
    options = {"n_steps": max(lengths), "policy_kwargs": {"lstm_hidden_size": hidden}, **options}
    return with_rollout(algorithm("MlpLstmPolicy", env, device="cpu", seed=0, **options))


@pytest.mark.parametrize("lengths", [[1, 256], [256, 1], [256, 256], [1, 1], [3, 200, 1]])
@pytest.mark.parametrize("hidden", [16, 64, 256])
def test_a_chunk_keeps_within_the_budget(lengths: list[int], hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rollout_of(lengths, hidden=hidden)
    batch = whole_rollout(model.rollout_buffer, model.action_space)

    def forward(part: Any) -> Tensor:
        return PolicyOutput.of(model.policy, part).z

    longest = max(lengths)
    whole = _saved_bytes(forward, batch[:longest]) + _saved_bytes(forward, batch[-longest:])
    monkeypatch.setattr(device, "MEMORY_BUDGET", device.GRAPHS * whole)
    size = affordable_samples(model.policy, forward, batch)
    assert size >= longest // 2
    constant = _saved_bytes(forward, batch[:1])
    for part in batch.split(size):
        assert _saved_bytes(forward, part) - constant <= 1.1 * whole


@pytest.mark.parametrize("algorithm", [RecurrentTRPO, RecurrentPPOClip])
def test_one_step_episodes_beside_a_long_one_cost_what_their_samples_cost(algorithm: Any) -> None:
    options = {"batch_size": 128, "n_epochs": 1} if algorithm is RecurrentPPOClip else {}
    model = rollout_of([1, 64], algorithm, hidden=8, **options)
    seen: list[int] = []
    model.policy.features_extractor.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    model.train()
    assert seen and max(seen) <= PADDED * 128
