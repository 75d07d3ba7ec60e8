import math
from typing import Any

import numpy as np
import pytest
import torch
from envs import SMALL, RandomEnv, in_float64, make, with_rollout
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.core.parameters import flatten
from sb3_trpo_ext.critic.base import Regression, ValueFunction
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonCritic, ValueProblem
from sb3_trpo_ext.policy.problem import PolicyProblem
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import whole_rollout


def samples(size: int = 40, scale: float = 1.0) -> Batch:
    """Random observations with random returns, in float64."""
    observations = torch.randn(size, 5, dtype=torch.float64)
    returns = scale * torch.randn(size, dtype=torch.float64)
    empty = torch.zeros(size, dtype=torch.float64)
    return Batch(observations, empty, empty, empty, returns, empty, torch.full_like(empty, 1 / size))


def mean_squared_error(model: Any, batch: Batch) -> float:
    return 2 * ValueProblem(ValueFunction(Regression(model.policy, batch))).start.loss


def test_a_linear_critic_reaches_the_least_squares_solution_in_one_step() -> None:
    model = in_float64(make(TRPO, policy_kwargs={"net_arch": []}))
    batch = samples()
    critic = GaussNewtonCritic(damping=1e-12, cg_steps=50, n_steps=1)
    error = critic.fit(Regression(model.policy, batch))
    design = torch.cat([batch.observations, torch.ones(len(batch), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(design, batch.returns.unsqueeze(1)).solution
    ours = torch.cat([model.policy.value_net.weight.T, model.policy.value_net.bias.unsqueeze(1)])
    torch.testing.assert_close(ours.detach(), solution, rtol=1e-5, atol=1e-6)
    assert error == pytest.approx(float((design @ solution - batch.returns.unsqueeze(1)).square().mean()))


@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e5), damping=st.floats(1e-4, 10))
def test_the_loss_never_rises_whatever_the_scale_of_the_returns(seed: int, scale: float, damping: float) -> None:
    torch.manual_seed(seed)
    model = in_float64(make(TRPO, policy_kwargs={"net_arch": [4]}, n_steps=2))
    batch = samples(scale=scale)
    before = mean_squared_error(model, batch)
    after = GaussNewtonCritic(damping=damping).fit(Regression(model.policy, batch))
    assert after == pytest.approx(mean_squared_error(model, batch))
    assert after < before


def test_chunks_change_nothing() -> None:
    results = []
    for chunk_size in (None, 7):
        torch.manual_seed(0)
        model, batch = in_float64(make(TRPO)), samples()
        GaussNewtonCritic().fit(Regression(model.policy, batch, chunk_size=chunk_size))
        results.append(model.policy.predict_values(batch.observations).detach())
    torch.testing.assert_close(*results)


def test_returns_that_are_not_finite_move_nothing() -> None:
    model, batch = in_float64(make(TRPO)), samples(scale=float("nan"))
    before = [param.detach().clone() for param in model.policy.parameters()]
    GaussNewtonCritic().fit(Regression(model.policy, batch))
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        {"damping": 0},
        {"damping": float("nan")},
        {"cg_steps": 0},
        {"n_steps": 0},
        {"max_backtracks": 0},
        {"curvature_samples": 0},
    ],
)
def test_impossible_arguments_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make(TRPO, critic="gauss_newton", critic_kwargs=arguments)


class CountedExtractor(BaseFeaturesExtractor):
    """A trainable extractor that counts the samples it has seen."""

    seen = 0

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 6)
        self.net = nn.Linear(5, 6)

    def forward(self, observations: Tensor) -> Tensor:
        type(self).seen += len(observations)
        return torch.tanh(self.net(observations))


class DoublingPolicy(ActorCriticPolicy):
    """A policy with a value function of its own."""

    def predict_values(self, obs: Any) -> Tensor:
        return 2 * super().predict_values(obs)


def samples_seen(critic: str, shared: bool, **options: Any) -> int:
    """Samples that the extractor runs on in a fit of the critic to 32 samples, and the fit lowers the error."""
    model = make(
        TRPO,
        critic=critic,
        batch_size=8,
        learning_rate=3e-3,
        policy_kwargs={"features_extractor_class": CountedExtractor, "share_features_extractor": shared},
        **options,
    )
    with_rollout(model)
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    policy = model.policy
    actor = frozenset(PolicyProblem(policy, batch).gradients)
    before = [param.detach().clone() for param in policy.parameters()]
    CountedExtractor.seen = 0
    model.value_critic.fit(model._regression(batch, actor))
    seen = CountedExtractor.seen
    for param, start in zip(policy.parameters(), before, strict=True):
        assert torch.equal(param, start) == (param in actor)
    return seen


@pytest.mark.parametrize("critic", ["gauss_newton", "adam"])
def test_features_are_computed_once_where_the_extractor_is_the_actors(critic: str) -> None:
    assert samples_seen(critic, shared=True) == 32
    assert samples_seen(critic, shared=False) >= 2 * 32


def test_a_buffer_of_the_users_is_asked_for_its_minibatches() -> None:
    class Buffer(RolloutBuffer):
        """Counts its minibatches."""

        minibatches = 0

        def _get_samples(self, *args: Any) -> Any:
            type(self).minibatches += 1
            return super()._get_samples(*args)

    samples_seen("adam", shared=True, rollout_buffer_class=Buffer)
    assert Buffer.minibatches == 1 + 10 * 4


@pytest.mark.parametrize("critic", ["gauss_newton", "adam"])
def test_a_value_function_of_the_policys_own_is_fitted(critic: str) -> None:
    model = TRPO(DoublingPolicy, RandomEnv(), critic=critic, batch_size=8, **SMALL)
    with_rollout(model)
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    error = model.value_critic.fit(model._regression(batch, frozenset(model.policy.action_net.parameters())))
    if critic == "gauss_newton":
        values = model.policy.predict_values(batch.inputs).flatten()
        assert error == pytest.approx(float((values - batch.returns).square().mean()), rel=1e-4)


def test_curvature_from_a_subset_is_that_of_the_subset() -> None:
    model, batch = in_float64(make(TRPO)), samples(60)
    values = ValueFunction(Regression(model.policy, batch))
    np.random.seed(2)
    subset = values.batch.subset(20)
    np.random.seed(2)
    thinned = ValueProblem(values, None, subset)
    alone = ValueProblem(ValueFunction(Regression(model.policy, batch.subset(20))))
    assert thinned.start.loss == pytest.approx(0.5 * mean_squared_error(model, batch))
    vector = torch.randn_like(thinned.gradient)
    torch.testing.assert_close(thinned.curvature(0.1)(vector), alone.curvature(0.1)(vector))


@pytest.mark.parametrize(
    ("own", "models", "expected"), [("auto", 20, 20), ("auto", None, 60), (10, 20, 10), (None, 20, 60)]
)
def test_the_curvature_sees_as_many_samples_as_were_asked_for(own: Any, models: int | None, expected: int) -> None:
    sizes = []

    class Counted(Batch):
        """Notes the sizes of its random subsets."""

        def subset(self, size: int | None, worth: float = math.inf) -> Batch:
            part = super().subset(size, worth)
            sizes.append(len(part))
            return part

    model = in_float64(make(TRPO))
    batch = Counted(**vars(samples(60)))
    GaussNewtonCritic(curvature_samples=own).fit(Regression(model.policy, batch, curvature_samples=models))
    assert (sizes or [60]) == [expected]


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adamw": {"optimizer_class": torch.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}},
    "amsgrad": {"optimizer_kwargs": {"amsgrad": True}},
    "foreach": {"optimizer_kwargs": {"foreach": True}},
    "sgd": {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_the_critic_as_it_does_by_autograd(name: str) -> None:
    ends, before = [], None
    for fast in (True, False):
        model = with_rollout(
            make(TRPO, "box", critic="adam", batch_size=12, policy_kwargs=OPTIMIZERS[name], fast_updates=fast)
        )
        before = flatten(list(model.policy.mlp_extractor.value_net.parameters())).detach().clone()
        np.random.seed(0)
        model.train()
        ends.append(flatten(list(model.policy.mlp_extractor.value_net.parameters())).detach())
    assert before is not None and float((ends[1] - before).norm()) > 1e-3
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
