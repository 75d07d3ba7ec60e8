"""The value function by minibatches of Adam, as in sb3-contrib."""

from __future__ import annotations

import torch
from torch import Tensor

from sb3_trpo_ext.core.arguments import check_integer
from sb3_trpo_ext.core.flat_optimizer import FlatDescent, FlatOptimizer, can_descend
from sb3_trpo_ext.core.parameters import trainable
from sb3_trpo_ext.critic.base import ONE_ROLLOUT, Critic, Regression, ValueFunction, check_decay
from sb3_trpo_ext.policy.perceptron import Perceptron
from sb3_trpo_ext.rollout.action_values import of_taken


class AdamCritic(Critic):
    """Minibatch regression with the policy's optimiser, as in sb3-contrib.

    Torch's Adam runs on one flat vector, as one fused kernel where torch has one, for a V of plain layers without
    autograd. Its settings are the model's own arguments ``learning_rate``, ``batch_size`` and ``n_critic_updates``; its
    state is the optimiser's, which the model keeps.

    Args:
        n_rollouts: M: every epoch sees the samples of the last M rollouts, and takes M times as many steps; see
            `GaussNewtonCritic`.
        gae_lambda: λ of the returns that V is fitted to; None for the model's. See there too.
    """

    def __init__(self, *, n_rollouts: int = 1, gae_lambda: float | None = None) -> None:
        check_integer("critic_kwargs['n_rollouts']", n_rollouts, hint=ONE_ROLLOUT)
        check_decay(gae_lambda)
        self.gae_lambda = gae_lambda
        self.n_rollouts = n_rollouts

    def fit(self, regression: Regression) -> float:
        """Run the epochs; the returned error is the mean over minibatches, each before its step."""
        policy, moved = regression.policy, [p for p in trainable(regression.policy) if p not in regression.frozen]
        by_hand = can_descend(policy.optimizer, policy, moved)
        values = ValueFunction(regression, keep_features=regression.minibatches_are_parts, by_hand=by_hand)
        losses = (_losses_by_hand if values.by_hand else _losses)(regression, values)
        return regression.batch.reduction.number(torch.stack(losses).sum() / len(losses))


def _losses(regression: Regression, values: ValueFunction) -> list[Tensor]:
    """This worker's share of the loss on each minibatch, before the step along its gradient."""
    policy, losses = regression.policy, []
    reduction = regression.batch.reduction
    with FlatOptimizer(policy.optimizer, policy, regression.frozen, fused=True, reduction=reduction) as optimizer:
        for _ in range(regression.epochs):
            for part in regression.minibatches(values.batch):
                loss = part.reduction.mean((part.returns - values(part)).square())
                optimizer.descend(loss, reduction=part.reduction)
                losses.append(loss.detach())
    return losses


def _losses_by_hand(regression: Regression, values: ValueFunction) -> list[Tensor]:
    """The same without autograd: the gradient of E[(R - V)²] is Jᵀu with u = 2 (V - R) / n."""
    plain, losses = values.by_hand, []
    assert plain is not None  # see `fit`
    networks: dict[int, Perceptron] = {}
    reached = plain.critic_parameters()
    params, others = ([p for p in values.params if (p in reached) == asked] for asked in (True, False))
    with FlatDescent(regression.policy.optimizer, params, others) as descent:
        for _ in range(regression.epochs):
            for part in regression.minibatches(values.batch):
                features, rows, reduction = part.inputs, len(part), part.reduction
                assert isinstance(features, Tensor)  # those of fixed features
                if rows not in networks:
                    x = torch.empty_like(features, memory_format=torch.contiguous_format)
                    networks[rows] = Perceptron(plain.critic_modules, x, descent.parameters, descent.gradients)
                network = networks[rows]
                network.x.copy_(features)
                y = network.forward()
                error = (of_taken(y, part.actions) if plain.has_action_values else y[:, 0]) - part.returns
                losses.append(reduction.mean(error.square()))
                slope = error * (2.0 / reduction.count(rows))
                if plain.has_action_values:
                    network.u.zero_().scatter_(1, part.actions.view(-1, 1), slope.unsqueeze(1))
                else:
                    network.u[:, 0] = slope
                network.pullback()
                descent.gradient.copy_(reduction.total(descent.gradient))
                descent.step()
    return losses
