"""RecurrentTRPO: memory in the policy, padding in nothing."""

from dataclasses import replace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, SMALL, RandomEnv, dense_fisher, make, with_rollout
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor, nn

from sb3_trpo_ext import TRPO, RecurrentNPG, RecurrentPPOClip, RecurrentTRPO
from sb3_trpo_ext.policy.evaluation import consistent_evaluation
from sb3_trpo_ext.policy.problem import PolicyOutput, PolicyProblem
from sb3_trpo_ext.rollout.buffers import minibatches, whole_rollout
from sb3_trpo_ext.rollout.sequences import SequenceBatch

KINDS: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared": {"shared_lstm": True, "enable_critic_lstm": False},
    "actor only": {"enable_critic_lstm": False},
    "two layers": {"n_lstm_layers": 2},
}


def collected(kind: str = "separate", action: str = "box", n_envs: int = 3, **options: Any) -> Any:
    """A model with a rollout of 24 steps of environments whose episodes have 5, 8, 11, … steps."""
    spaces = OBSERVATION_SPACES[options.pop("observation", "vector")], ACTION_SPACES[action]
    env = DummyVecEnv(
        [lambda length=length: RandomEnv(*spaces, episode_length=length) for length in (5, 8, 11)[:n_envs]]
    )
    policy = "MultiInputLstmPolicy" if isinstance(spaces[0], gym.spaces.Dict) else "MlpLstmPolicy"
    kwargs = {"lstm_hidden_size": 6, "net_arch": [5], **KINDS[kind], **options.pop("policy_kwargs", {})}
    model = RecurrentTRPO(policy, env, **{**SMALL, "n_steps": 24, "policy_kwargs": kwargs, **options})
    with torch.no_grad():
        for param in model.policy.parameters():
            param.add_(0.2 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    return with_rollout(model)


def batch_of(model: Any) -> SequenceBatch:
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    assert isinstance(batch, SequenceBatch)
    return batch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_the_batch_is_the_rollout(kind: str, action: str) -> None:
    model = collected(kind, action)
    batch, buffer = batch_of(model), model.rollout_buffer
    in_order = [array.swapaxes(0, 1).reshape(-1) for array in (buffer.values, buffer.log_probs, buffer.advantages)]
    for tensor, array in zip((batch.old_values, batch.old_log_prob, batch.advantages), in_order, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
    with torch.no_grad():
        values, log_prob, _ = batch.evaluate_actions(model.policy)
        torch.testing.assert_close(values, batch.old_values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(log_prob, batch.old_log_prob, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch.values(model.policy), batch.old_values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_is_what_contribs_buffer_gives(kind: str) -> None:
    model = collected(kind)
    np.random.seed(0)
    parts = list(minibatches(model.rollout_buffer, batch_of(model), 20, model.action_space))
    np.random.seed(0)
    theirs = list(model.rollout_buffer.get(20))
    assert len(parts) == len(theirs) == 4
    for ours, data in zip(parts, theirs, strict=True):
        mask = data.mask > 0
        torch.testing.assert_close(ours.advantages, data.advantages[mask])
        torch.testing.assert_close(ours.actions, data.actions[mask])
        with torch.no_grad():
            expected = model.policy.evaluate_actions(
                data.observations, data.actions, data.lstm_states, data.episode_starts
            )
            for mine, peer in zip(ours.evaluate_actions(model.policy), expected, strict=True):
                torch.testing.assert_close(mine, peer.flatten()[mask], rtol=1e-4, atol=1e-5)


def one_by_one(batch: SequenceBatch) -> list[Any]:
    """Each sequence as a batch of its own: nothing to pad."""
    cuts = torch.nonzero(batch.starts).flatten().tolist()
    return [batch[a:b] for a, b in zip(cuts, [*cuts[1:], len(batch)], strict=True)]


@pytest.mark.parametrize("action", ACTION_SPACES)
@pytest.mark.parametrize("observation", ["vector", "dict"])
def test_a_padded_batch_equals_the_same_batch_unpadded(action: str, observation: str) -> None:
    model = collected(action=action, observation=observation)
    batch = batch_of(model)
    assert len(batch._grid.rows) > len(batch), "nothing was padded"
    with torch.no_grad():
        whole = PolicyOutput.of(model.policy, batch).z.clone()
        parts = [PolicyOutput.of(model.policy, part).z.clone() for part in one_by_one(batch)]
    torch.testing.assert_close(whole, torch.cat(parts))

    results = []
    with consistent_evaluation(model.policy):
        for chunks in (None, 1):
            problem = PolicyProblem(model.policy, batch, ent_coef=0.1, chunk_size=chunks)
            product = problem.fisher(0.1)(torch.ones(len(problem.gradient)))
            assert problem.start.divergence == problem.start.kl_max == 0
            results.append((problem.gradient, product, torch.tensor(problem.start.objective)))
    for padded, unpadded in zip(*results, strict=True):
        assert torch.linalg.vector_norm(padded - unpadded) <= 1e-4 * torch.linalg.vector_norm(unpadded)


def test_what_stands_in_the_padding_changes_nothing() -> None:
    model = collected()
    batch = batch_of(model)
    grid = batch._grid
    other = replace(batch)
    behind = torch.ones(len(grid.rows), dtype=torch.bool)
    behind[grid.kept] = False
    vars(other)["_grid"] = replace(grid, rows=torch.where(behind, 0, grid.rows))
    results = [PolicyProblem(model.policy, each).gradients for each in (batch, other)]
    for param, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][param])


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_products_against_the_hessian_of_the_kl(kind: str) -> None:
    model = collected(kind, policy_kwargs={"lstm_hidden_size": 3, "net_arch": [3]})
    model.policy.double()
    batch = batch_of(model)
    doubled = {
        name: value.double()
        for name, value in vars(batch).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    batch = replace(batch, **doubled, states=tuple(state.double() for state in batch.states))
    model.policy.features_extractor.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    with consistent_evaluation(model.policy):
        params = PolicyProblem(model.policy, batch).params
        fisher = PolicyProblem(model.policy, batch).fisher(0.0)
        ours = torch.stack([fisher(row) for row in torch.eye(sum(p.numel() for p in params), dtype=torch.float64)])
        torch.testing.assert_close(ours, dense_fisher(model.policy, batch, params))


def test_float32_products_agree_with_the_hessian() -> None:
    model = collected(policy_kwargs={"lstm_hidden_size": 3, "net_arch": [3]})
    batch = batch_of(model)
    with consistent_evaluation(model.policy):
        params = PolicyProblem(model.policy, batch).params
        fisher = PolicyProblem(model.policy, batch).fisher(0.0)
        ours = torch.stack([fisher(row) for row in torch.eye(sum(p.numel() for p in params))])
        torch.testing.assert_close(ours, dense_fisher(model.policy, batch, params), rtol=1e-3, atol=1e-5)


class Bypassed(RecurrentActorCriticPolicy):
    """An LSTM that is not there: its output is its input."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "lstm_hidden_size": 5})
        self.lstm_actor.requires_grad_(False)
        self.lstm_critic.requires_grad_(False)

    @staticmethod
    def _process_sequence(features: Tensor, states: Any, starts: Tensor, lstm: nn.LSTM) -> Any:
        return features, states


@pytest.mark.parametrize("action", ["box", "discrete"])
@pytest.mark.parametrize("critic", ["gauss_newton", "adam"])
def test_with_the_lstm_bypassed_it_is_trpo(action: str, critic: str) -> None:
    env = RandomEnv(OBSERVATION_SPACES["vector"], ACTION_SPACES[action])
    options = {**SMALL, "critic": critic, "batch_size": 32, "n_critic_updates": 2, "curvature_samples": None}
    if critic == "gauss_newton":
        options["critic_kwargs"] = {"cg_steps": 3}  # more multiply the rounding errors
    ours = RecurrentTRPO(Bypassed, env, **options)
    theirs = TRPO("MlpPolicy", env, fast_rollouts=False, **options)
    with torch.no_grad():
        for name, param in theirs.policy.named_parameters():
            ours.policy.get_parameter(name).copy_(param)
    for model in (ours, theirs):
        model.set_random_seed(0)
        model.learn(64)
    for name, param in theirs.policy.named_parameters():
        torch.testing.assert_close(ours.policy.get_parameter(name), param, rtol=1e-3, atol=1e-4)


def test_episodes_of_length_one_have_no_memory() -> None:
    """The update is that of a policy that sees one step from a hidden state of zero."""

    class OneStep(RecurrentActorCriticPolicy):
        @staticmethod
        def _process_sequence(features: Tensor, states: Any, starts: Tensor, lstm: nn.LSTM) -> Any:
            zeros = torch.zeros(lstm.num_layers, len(features), lstm.hidden_size)
            output, _ = lstm(features.unsqueeze(0), (zeros, zeros))
            return output.squeeze(0), states

    env = RandomEnv(OBSERVATION_SPACES["vector"], ACTION_SPACES["box"], episode_length=1)
    models = [
        RecurrentTRPO(policy, env, **SMALL, fast_rollouts=False, policy_kwargs={"lstm_hidden_size": 4}).learn(64)
        for policy in ("MlpLstmPolicy", OneStep)
    ]
    for ours, theirs in zip(*(model.policy.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_policy_that_wants_to_know_episode_starts_is_told() -> None:
    class Asking(RecurrentActorCriticPolicy):
        seen: ClassVar[list[float]] = []

        def _process_sequence(self, features: Tensor, states: Any, starts: Tensor, lstm: nn.LSTM) -> Any:
            self.seen.append(float(starts.sum()))
            return RecurrentActorCriticPolicy._process_sequence(features, states, starts, lstm)

    model = with_rollout(RecurrentTRPO(Asking, RandomEnv(), **SMALL, policy_kwargs={"lstm_hidden_size": 4}))
    Asking.seen.clear()
    batch_of(model).values(model.policy)
    assert Asking.seen[-1] >= 3


def test_sequences_stay_whole_in_chunks_and_subsets() -> None:
    batch = batch_of(collected())
    begins = batch.observations[batch.starts]
    for parts in (batch.split(30), batch.split(1), [batch.subset(30)]):
        found = torch.cat([part.observations[part.starts] for part in parts])
        assert {tuple(row.tolist()) for row in found} <= {tuple(row.tolist()) for row in begins}
        np.testing.assert_allclose(sum(float(part.weights.sum()) for part in parts), 1.0, rtol=1e-5)
    rows = batch.in_order([part.observations for part in batch.split(30)], 30)
    assert torch.equal(rows, batch.observations)
    assert all(len(part._grid.rows) <= 30 for part in batch.split(30))
    assert 30 <= len(batch.subset(30)) < len(batch)
    assert batch.subset(10_000) is batch


def test_a_cut_sequence_goes_on_from_the_state_of_the_rollout() -> None:
    model = collected(n_envs=1)
    batch = batch_of(model)
    cut = 3
    assert not batch.starts[cut]
    with torch.no_grad():
        whole, rest = batch.values(model.policy), batch[cut:].values(model.policy)
    torch.testing.assert_close(whole[cut:], rest, rtol=1e-4, atol=1e-5)


def test_a_nan_in_the_hidden_state_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)  # let it come that far

    class Once(RandomEnv):
        broken = True

        def step(self, action: Any) -> Any:
            observation, *rest = super().step(action)
            if self.broken and self._time == 4:
                observation = np.full_like(observation, np.nan)
            return observation, *rest

    env = Once(OBSERVATION_SPACES["vector"], ACTION_SPACES["box"])
    model = RecurrentTRPO("MlpLstmPolicy", env, **SMALL, fast_rollouts=False)
    with pytest.raises(ValueError, match="observation"):
        model.learn(64)
    assert not all(state.isfinite().all() for pair in model._last_lstm_states for state in pair)
    env.broken = False
    model.learn(64, reset_num_timesteps=False)
    assert all(state.isfinite().all() for pair in model._last_lstm_states for state in pair)


@pytest.mark.parametrize("algorithm", [RecurrentTRPO, RecurrentNPG, RecurrentPPOClip])
def test_predict_carries_the_state(algorithm: Any) -> None:
    model = make(algorithm, "box", batch_size=16).learn(32)
    assert isinstance(model, RecurrentPPO)
    observation = OBSERVATION_SPACES["vector"].sample()
    first, state = model.predict(observation, deterministic=True)
    second, _ = model.predict(observation, state=state, deterministic=True)
    assert not np.array_equal(first, second)
    again, _ = model.predict(observation, state=state, episode_start=np.array([True]), deterministic=True)
    np.testing.assert_allclose(first, again, rtol=1e-5)


def test_vec_normalize_and_several_environments() -> None:
    env = VecNormalize(make_vec_env(RandomEnv, n_envs=4, seed=0))
    model = RecurrentTRPO("MlpLstmPolicy", env, **SMALL, policy_kwargs={"lstm_hidden_size": 8}).learn(256)
    assert model.rollout_path == "fast"


@pytest.mark.parametrize(("name", "value"), [("rollout_buffer_class", dict), ("rollout_buffer_kwargs", {"a": 1})])
def test_a_buffer_cannot_be_chosen(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        make(RecurrentTRPO, **{name: value})


def test_a_policy_without_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="MlpPolicy"):
        RecurrentTRPO("MlpPolicy", RandomEnv())


def test_ppo_with_memory_takes_the_steps_of_recurrent_ppo() -> None:
    policy = {"lstm_hidden_size": 8, "optimizer_class": torch.optim.SGD}  # Adam makes steps of rounding errors
    options = {**SMALL, "batch_size": 16, "n_epochs": 2, "learning_rate": 0.1, "policy_kwargs": policy}
    models = [algorithm("MlpLstmPolicy", RandomEnv(), **options) for algorithm in (RecurrentPPOClip, RecurrentPPO)]
    before = [param.detach().clone() for param in models[0].policy.parameters()]
    for model in models:
        model.set_random_seed(0)
        model.learn(64)
    for ours, theirs in zip(*(model.policy.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert any((a - b).abs().max() > 0.01 for a, b in zip(before, models[0].policy.parameters(), strict=True))
