from collections.abc import Callable
from typing import Any

import pytest
import torch
from envs import make, with_rollout
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.training.transaction import Atomic, Checkpoint

CRITICS = ["gauss_newton", "adam"]


class Learned(BaseFeaturesExtractor):
    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 6)
        self.net = nn.Linear(5, 6)

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations).tanh()


class Misnamed(ActorCriticPolicy):
    """The policy uses a module whose name speaks of values; the critic one whose name speaks of the policy."""

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        super()._build(lr_schedule)
        self.value_embedding = nn.Linear(64, 64)
        self.policy_bonus = nn.Linear(64, 1)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1))

    def get_distribution(self, obs: Any) -> Any:
        features = self.extract_features(obs)
        latent = self.mlp_extractor.forward_actor(features)
        return self._get_action_dist_from_latent(self.value_embedding(latent))

    def predict_values(self, obs: Any) -> Tensor:
        latent = self.mlp_extractor.forward_critic(self.extract_features(obs))
        return self.value_net(latent) + self.policy_bonus(latent)

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)


def moved(model: Any, update: Callable[[], object]) -> set[str]:
    """Names of the parameters that an update changes."""
    before = {name: param.detach().clone() for name, param in model.policy.named_parameters()}
    update()
    return {name for name, param in model.policy.named_parameters() if not torch.equal(param, before[name])}


def moved_by_each(model: Any) -> tuple[set[str], set[str]]:
    """Parameters moved by the policy step alone, and by the critic's fit alone."""
    from sb3_trpo_ext.policy.evaluation import consistent_evaluation
    from sb3_trpo_ext.rollout.buffers import whole_rollout

    with_rollout(model)
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    steps = []
    with consistent_evaluation(model.policy):
        problem = model._problem(batch)
        actor = moved(model, lambda: steps.append(model._policy_step(problem)))
        regression = model._regression(batch, frozenset(problem.gradients))
        critic = moved(model, lambda: model.value_critic.fit(regression))
    assert not steps[0].reason
    return actor, critic


def named(model: Any, *prefixes: str) -> set[str]:
    return {name for name, _ in model.policy.named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize("critic", CRITICS)
def test_names_mean_nothing(critic: str) -> None:
    model = TRPO(Misnamed, make(TRPO, "box").env, n_steps=32, device="cpu", seed=0, critic=critic)
    actor, value = moved_by_each(model)
    assert actor == named(model, "log_std", "mlp_extractor.policy_net", "action_net", "value_embedding")
    assert value == named(model, "mlp_extractor.value_net", "value_net", "policy_bonus")


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_extractor_belongs_to_the_policy(critic: str, shared: bool) -> None:
    options = {"features_extractor_class": Learned, "share_features_extractor": shared}
    model = make(TRPO, "discrete", critic=critic, policy_kwargs=options)
    actor, value = moved_by_each(model)
    own = () if shared else ("vf_features_extractor",)
    assert actor == named(model, "features_extractor", "mlp_extractor.policy_net", "action_net")
    assert value == named(model, "mlp_extractor.value_net", "value_net", *own)


@pytest.mark.parametrize("critic", CRITICS)
def test_a_frozen_parameter_never_moves(critic: str) -> None:
    model = make(TRPO, "box", critic=critic)
    frozen = named(model, "mlp_extractor.policy_net.0", "mlp_extractor.value_net.0", "log_std")
    for name, param in model.policy.named_parameters():
        param.requires_grad_(name not in frozen)
    actor, value = moved_by_each(model)
    assert actor == named(model, "mlp_extractor.policy_net", "action_net") - frozen
    assert value == named(model, "mlp_extractor.value_net", "value_net") - frozen


@pytest.mark.parametrize("critic", CRITICS)
def test_a_policy_that_is_frozen_whole_is_left_alone(critic: str) -> None:
    model = with_rollout(make(TRPO, "box", critic=critic))
    for param in model.policy.parameters():
        param.requires_grad_(False)
    assert moved(model, model.train) == set()


@pytest.mark.parametrize("net_arch", [[], [8], {"pi": [], "vf": [8]}, {"pi": [8, 4], "vf": []}])
def test_any_net_arch_learns(net_arch: Any) -> None:
    actor, value = moved_by_each(make(TRPO, "discrete", policy_kwargs={"net_arch": net_arch}))
    assert any("action_net" in name for name in actor)
    assert any("value_net" in name for name in value)
    assert not actor & value


# Transaction


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_block_leaves_the_same_bits(error: type[BaseException]) -> None:
    tensor = torch.tensor([float("nan"), -0.0, 5e-324, float("inf")], dtype=torch.float64)
    bits = tensor.view(torch.int64).clone()
    with pytest.raises(error), Atomic(Checkpoint([tensor])):
        tensor.fill_(1.0)
        raise error
    assert torch.equal(tensor.view(torch.int64), bits)


def test_a_finished_block_keeps_its_changes() -> None:
    tensor = torch.zeros(2)
    with Atomic(Checkpoint([tensor])):
        tensor.fill_(1.0)
    assert torch.equal(tensor, torch.ones(2))
