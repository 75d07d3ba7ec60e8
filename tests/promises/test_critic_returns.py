"""Critics fitted to returns of a λ of their own: those that SB3 would make with it, and advantages as they were."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from envs import make
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import FloatSchedule

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, RecurrentTRPO
from sb3_trpo_ext.critic.base import Regression
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonCritic
from sb3_trpo_ext.rollout.buffers import by_time
from sb3_trpo_ext.rollout.returns import decay_returns

DECAYS = st.sampled_from([0.0, 0.3, 0.95, 1.0])


class Watched(GaussNewtonCritic):
    """Keeps the returns that it was asked to fit."""

    def fit(self, regression: Regression) -> float:
        self.returns = regression.batch.returns.clone()
        return super().fit(regression)


def filled(decay: float, seed: int, steps: int, envs: int, gamma: float) -> RolloutBuffer:
    """A buffer of random rewards, values and ends of episodes, the same for every λ."""
    rng = np.random.default_rng(seed)
    room = (spaces.Box(-1, 1, (1,)), spaces.Discrete(2))
    buffer = RolloutBuffer(steps, *room, device="cpu", gae_lambda=decay, gamma=gamma, n_envs=envs)
    buffer.rewards[:], buffer.values[:] = rng.normal(size=(2, steps, envs))
    buffer.episode_starts[:] = rng.random((steps, envs)) < 0.2
    buffer.pos, buffer.full = steps, True
    last = torch.as_tensor(rng.normal(size=(envs, 1)), dtype=torch.float32)
    buffer.compute_returns_and_advantage(last, rng.random(envs) < 0.3)
    return buffer


@given(
    decays=st.tuples(DECAYS, DECAYS),
    seed=st.integers(0, 1000),
    steps=st.integers(1, 40),
    envs=st.integers(1, 3),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    was_dealt=st.booleans(),
)
def test_returns_are_those_of_the_other_decay(
    decays: tuple[float, float], seed: int, steps: int, envs: int, gamma: float, was_dealt: bool
) -> None:
    found, expected = (filled(decay, seed, steps, envs, gamma) for decay in decays)
    advantages, values = found.advantages.copy(), found.values.copy()
    for buffer in (found, expected):
        if was_dealt:
            next(buffer.get())
    decay_returns(found, decays[1])
    assert found.returns.dtype == np.float32 and found.returns.shape == expected.returns.shape
    np.testing.assert_allclose(found.returns, expected.returns, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(by_time(found, found.advantages), advantages)
    np.testing.assert_array_equal(by_time(found, found.values), values)


class Expected(BaseCallback):
    """The returns of every rollout with another λ."""

    def _on_rollout_end(self) -> None:
        buffer = deepcopy(self.model.rollout_buffer)  # type: ignore[attr-defined]
        decay_returns(buffer, 0.4)
        self.returns = buffer.returns

    def _on_step(self) -> bool:
        return True


KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "trpo": (TRPO, "box", {}),
    "npg": (NPG, "discrete", {}),
    "sb3's rollouts": (TRPO, "box", {"fast_rollouts": False, "fast_updates": False}),
    "recurrent": (RecurrentTRPO, "box", {}),
    "masks": (MaskableTRPO, "discrete", {}),
    "action values": (TRPO, "discrete", {"critic": "action_value"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_critic_sees_returns_of_its_own_decay_and_the_policy_what_it_saw_before(kind: str) -> None:
    algorithm, action, options = KINDS[kind]
    watch = {"critic_kwargs": {"fit": Watched}} if "critic" in options else {"critic": Watched, "critic_kwargs": {}}
    usual = make(algorithm, action, **{**watch, **options}).learn(32, callback=Expected())
    watch["critic_kwargs"] = {**watch["critic_kwargs"], "gae_lambda": 0.4}
    model, expected = make(algorithm, action, **{**watch, **options}), Expected()
    model.learn(32, callback=expected)
    returns = model.value_critic.returns
    np.testing.assert_array_equal(returns.numpy(), expected.returns.reshape(-1))
    assert not torch.allclose(returns, usual.value_critic.returns, atol=1e-2)
    np.testing.assert_array_equal(model.rollout_buffer.returns.reshape(-1), returns.numpy())
    for name, param in model.policy.named_parameters():
        if "value" not in name and "critic" not in name and "vf" not in name:
            assert torch.equal(param, usual.policy.get_parameter(name)), name


@pytest.mark.parametrize("critic", ["gauss_newton", "adam"])
def test_the_same_decay_changes_no_bit(critic: str) -> None:
    def learnt(**kwargs: Any) -> torch.Tensor:
        model = make(TRPO, critic=critic, batch_size=16, critic_kwargs=kwargs).learn(96)
        return torch.cat([param.detach().flatten() for param in model.policy.parameters()])

    usual = learnt()
    assert torch.equal(learnt(gae_lambda=0.95), usual)
    assert not torch.equal(learnt(gae_lambda=0.2), usual)


def test_earlier_rollouts_have_the_same_decay() -> None:
    """With λ = 0 the targets of V-trace are V + ρ (r + γV(s') - V): for a V that is zero everywhere, ρ r."""
    model = make(TRPO, "box", critic=Watched, critic_kwargs={"gae_lambda": 0.0, "n_rollouts": 2}).learn(32)
    rewards = torch.from_numpy(model.rollout_buffer.rewards.copy()).flatten()
    with torch.no_grad():
        for param in model.policy.value_net.parameters():
            param.zero_()
    model._theta_left = model._theta()  # as if the update had left it so
    model.learn(32, reset_num_timesteps=False)
    earlier = model.value_critic.returns[32:]
    assert len(earlier) == 32
    ratios = (earlier / rewards)[rewards.abs() > 1e-3]
    assert bool(((ratios > 0) & (ratios <= 1 + 1e-5)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_has_the_last_word_on_returns_and_its_advantages_change_none(kind: str) -> None:
    algorithm, action, options = KINDS[kind]
    watch = {"critic_kwargs": {"fit": Watched}} if "critic" in options else {"critic": Watched, "critic_kwargs": {}}
    watch["critic_kwargs"] = {**watch["critic_kwargs"], "gae_lambda": 0.4}

    class Change(BaseCallback):
        def _on_rollout_end(self) -> None:
            buffer: Any = self.model.rollout_buffer  # type: ignore[attr-defined]
            buffer.advantages = 2 * buffer.advantages + 1
            buffer.gae_lambda, buffer.gamma = 0.7, 0.5
            buffer.returns[0] = 7.0

        def _on_step(self) -> bool:
            return True

    def returns(callback: BaseCallback) -> np.ndarray:
        model = make(algorithm, action, **{**watch, **options}).learn(32, callback=callback)
        return model.value_critic.returns.numpy()

    expected = Expected()
    returns(expected)
    found = returns(Change())
    np.testing.assert_array_equal(found[1:], expected.returns.reshape(-1)[1:])
    assert found[0] == 7.0


@pytest.mark.parametrize("kind", ["masks", "action values", "trpo"])
def test_a_decay_that_is_changed_later_is_the_buffers_as_in_sb3(kind: str) -> None:
    algorithm, action, options = KINDS[kind]
    critic = {**options.pop("critic_kwargs", {}), "gae_lambda": 0.4}

    def learnt(decay: float) -> torch.Tensor:
        model = make(algorithm, action, **{**options, "critic_kwargs": critic}).learn(32)
        model.gae_lambda = decay
        model.learn(32)
        return torch.cat([param.detach().flatten() for param in model.policy.parameters()])

    assert torch.equal(learnt(0.5), learnt(0.95))


def test_explained_variance_is_of_the_returns_that_v_was_fitted_to() -> None:
    model = make(TRPO, "box", critic_kwargs={"gae_lambda": 0.4}).learn(32)
    values, returns = model.rollout_buffer.values, model.rollout_buffer.returns
    explained = 1 - np.var(returns - values) / np.var(returns)
    assert model.logger.name_to_value["train/explained_variance"] == pytest.approx(explained)


def test_what_cannot_be_is_refused() -> None:
    class Mine(RolloutBuffer):
        pass

    for critic in ("gauss_newton", "adam"):
        for wrong in (-0.1, 1.1, float("nan"), "much", True, FloatSchedule(0.9)):
            with pytest.raises(ValueError, match=r"`critic_kwargs\['gae_lambda'\]` must be"):
                make(TRPO, critic=critic, critic_kwargs={"gae_lambda": wrong})
        with pytest.raises(ValueError, match=r"`critic_kwargs\['gae_lambda'\]` needs the arrays of SB3's own rollout"):
            make(TRPO, critic=critic, critic_kwargs={"gae_lambda": 0.9}, rollout_buffer_class=Mine)
    with pytest.raises(ValueError, match=r"`critic_kwargs\['gae_lambda'\]` must be left out with bootstrap='max'"):
        make(TRPO, "discrete", critic="action_value", critic_kwargs={"gae_lambda": 0.9}, bootstrap="max")
    model = make(TRPO).learn(32)
    model.critic_kwargs = {"gae_lambda": 2}
    with pytest.raises(ValueError, match=r"`critic_kwargs\['gae_lambda'\]` must be at most 1, got 2"):
        model.learn(32)
    model.critic_kwargs = {}
    model.learn(32)
    model.value_critic.gae_lambda = float("nan")
    with pytest.raises(ValueError, match=r"`critic_kwargs\['gae_lambda'\]` must be a finite"):
        model.learn(32)
    model.value_critic.gae_lambda = 0.5
    before = model.rollout_buffer
    model.rollout_buffer = Mine(
        before.buffer_size, before.observation_space, before.action_space, "cpu", before.gae_lambda, before.gamma, 1
    )
    with pytest.raises(ValueError, match=r"`critic_kwargs\['gae_lambda'\]` needs the arrays of SB3's own rollout"):
        model.learn(32)
