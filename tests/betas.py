"""A distribution that SB3 does not have, written as a user would write it."""

from typing import Any

import torch
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn
from torch.distributions import Beta, kl_divergence

from sb3_trpo_ext import Family


class BetaDistribution(Distribution):
    """Independent Betas, stretched from [0, 1] to [-1, 1]."""

    distribution: Any

    def proba_distribution_net(self, latent_dim: int, action_dim: int) -> nn.Module:
        return nn.Linear(latent_dim, 2 * action_dim)

    def proba_distribution(self, outputs: Tensor) -> "BetaDistribution":
        self.distribution = Beta(*(1 + nn.functional.softplus(outputs)).chunk(2, dim=1))
        return self

    def log_prob(self, actions: Tensor) -> Tensor:
        unit = ((actions + 1) / 2).clamp(1e-6, 1 - 1e-6)
        return (self.distribution.log_prob(unit) - torch.log(torch.tensor(2.0))).sum(dim=1)

    def entropy(self) -> Tensor | None:
        return None

    def sample(self) -> Tensor:
        return 2 * self.distribution.sample() - 1

    def mode(self) -> Tensor:
        return 2 * self.distribution.mean - 1

    def actions_from_params(self, outputs: Tensor) -> Tensor:
        return self.proba_distribution(outputs).sample()

    def log_prob_from_params(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        actions = self.actions_from_params(outputs)
        return actions, self.log_prob(actions)


class BetaFamily(Family):
    """z = (α, β), with torch's KL in float64."""

    def coordinates(self, distribution: BetaDistribution) -> Tensor:
        return torch.cat([distribution.distribution.concentration1, distribution.distribution.concentration0], dim=1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        p, q = (Beta(*z.double().chunk(2, dim=1)) for z in (old, new))
        return kl_divergence(p, q).sum(dim=1).to(new.dtype)


def with_distribution(policy_class: type[ActorCriticPolicy], distribution_class: type[Distribution]) -> type[Any]:
    """A policy class of SB3's or sb3-contrib's that makes this distribution."""

    class CustomPolicy(policy_class):  # type: ignore[misc, valid-type]
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.action_dist = distribution_class()
            action_dim = self.action_space.shape[0]
            self.action_net = self.action_dist.proba_distribution_net(self.mlp_extractor.latent_dim_pi, action_dim)
            del self.log_std
            self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

        def _get_action_dist_from_latent(self, latent_pi: Tensor, *args: Any) -> Distribution:
            return self.action_dist.proba_distribution(self.action_net(latent_pi))

    return CustomPolicy
