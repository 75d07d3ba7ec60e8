"""The value function by minibatches of Adam, as in sb3-contrib."""

from __future__ import annotations

import torch

from sb3_trpo_ext.core.flat_optimizer import FlatOptimizer
from sb3_trpo_ext.critic.base import Critic, Regression, ValueFunction


class AdamCritic(Critic):
    """Minibatch regression with the policy's optimiser, as in sb3-contrib.

    Torch's Adam runs on one flat vector, as one fused kernel where torch has one. Its settings are the model's own
    arguments ``learning_rate``, ``batch_size`` and ``n_critic_updates``; its state is the optimiser's, which the model
    keeps.
    """

    def fit(self, regression: Regression) -> float:
        """Run the epochs; the returned error is the mean over minibatches, each before its step."""
        values = ValueFunction(regression, keep_features=regression.minibatches_are_parts)
        policy, losses = regression.policy, []
        with FlatOptimizer(policy.optimizer, policy, regression.frozen, fused=True) as optimizer:
            for _ in range(regression.epochs):
                for part in regression.minibatches(values.batch):
                    loss = part.reduction.mean((part.returns - values(part)).square())
                    optimizer.descend(loss, reduction=part.reduction)
                    losses.append(loss.detach())
        return regression.batch.reduction.number(torch.stack(losses).sum() / len(losses))
