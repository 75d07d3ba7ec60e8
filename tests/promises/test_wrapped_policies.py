"""A policy behind ``torch.compile``, or behind any object that forwards attributes, takes the steps of the policy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from envs import make, with_rollout
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from sb3_trpo_ext import (
    NPG,
    TRPO,
    MaskableTRPO,
    PPOClip,
    PPOPenalty,
    RecurrentNPG,
    RecurrentPPOClip,
    RecurrentTRPO,
)
from sb3_trpo_ext.core.parameters import flatten
from sb3_trpo_ext.critic.base import Regression, ValueFunction
from sb3_trpo_ext.policy.problem import PolicyOutput
from sb3_trpo_ext.rollout.buffers import whole_rollout
from sb3_trpo_ext.rollout.known_classes import owner_of


class Module(nn.Module):
    """As ``torch.optim.swa_utils.AveragedModel`` holds a model, and forwards what it does not know."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.module = policy

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


class Proxy:
    """No module at all."""

    def __init__(self, policy: nn.Module) -> None:
        self.wrapped = policy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": lambda policy: torch.compile(policy, backend="eager"),
    "module": Module,
    "twice": lambda policy: Module(Module(policy)),
    "proxy": Proxy,
}
ALGORITHMS = [TRPO, NPG, PPOPenalty, PPOClip, RecurrentTRPO, RecurrentNPG, RecurrentPPOClip, MaskableTRPO]


def parameters(model: Any) -> Tensor:
    return flatten(list(model.policy.parameters())).detach().clone()


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_wrapped_policy_takes_the_same_steps(algorithm: Any, wrapper: str) -> None:
    plain, wrapped = (make(algorithm, "discrete", fast_rollouts=False, fast_updates=False) for _ in range(2))
    wrapped.policy = WRAPPERS[wrapper](wrapped.policy)
    before = parameters(plain)
    for model in (plain, wrapped):
        model.set_random_seed(0)
        model.learn(96)
    assert not torch.equal(before, parameters(plain))
    assert torch.equal(parameters(wrapped), parameters(plain))


@pytest.mark.parametrize("wrapper", ["compiled", "module"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_wrapped_policy_learns_by_default(algorithm: Any, wrapper: str) -> None:
    model = make(algorithm, "discrete")
    model.policy = WRAPPERS[wrapper](model.policy)
    before = parameters(model)
    model.learn(64)
    assert not torch.equal(before, parameters(model))


@pytest.mark.parametrize("critic", ["gauss_newton", "adam"])
def test_a_wrapper_with_a_value_of_its_own_is_asked_for_it(critic: str) -> None:
    class Doubled(Module):
        def predict_values(self, obs: Any) -> Tensor:
            return 2 * self.module.predict_values(obs)

    model = make(TRPO, "box", critic=critic, fast_rollouts=False)
    model.policy = Doubled(model.policy)
    with_rollout(model)
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    values = ValueFunction(Regression(model.policy, batch))
    torch.testing.assert_close(values(values.batch), 2 * model.policy.module.predict_values(batch.inputs).flatten())
    model.train()


def test_a_wrapper_with_a_distribution_of_its_own_is_asked_for_it() -> None:
    class Shifted(Module):
        def evaluate_actions(self, obs: Any, actions: Tensor) -> Any:
            return self.module.evaluate_actions(obs + 1, actions)

        def get_distribution(self, obs: Any) -> Any:
            return self.module.get_distribution(obs + 1)

    model = make(PPOPenalty, "box", fast_rollouts=False)
    model.policy = Shifted(model.policy)
    with_rollout(model)
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    expected = PolicyOutput.of(model.policy.module, batch).z
    assert not torch.allclose(expected, PolicyOutput.of(model.policy, batch).z)
    expected = PolicyOutput.of(model.policy, batch).z
    model.policy.module.get_distribution(batch.inputs)  # leaves another distribution in the policy
    torch.testing.assert_close(PolicyOutput.after_evaluation(model.policy, batch).z, expected)


def test_the_owner_of_a_method_is_known_through_wrappers_alone() -> None:
    policy, other = (make(TRPO, "box").policy for _ in range(2))
    known = (ActorCriticPolicy,)
    for wrap in (*WRAPPERS.values(), lambda each: each):
        assert owner_of(wrap(policy), "predict_values", known) is policy
        assert owner_of(wrap(policy), "no_such_method", known) is None
    policy.predict_values = other.predict_values  # V of another network
    assert owner_of(Module(policy), "predict_values", known) is other
    policy.predict_values = lambda obs: torch.zeros(len(obs), 1)
    assert owner_of(Module(policy), "predict_values", known) is None
