"""The value function by semi-gradient temporal differences, one step of the environments after the other."""

from __future__ import annotations

import torch

from sb3_trpo_ext.core.parameters import gradient
from sb3_trpo_ext.critic.base import Critic, Regression, ValueFunction
from sb3_trpo_ext.rollout.past_rollouts import bootstrap_values


class SemiGradientCritic(Critic):
    """w ← w + α γⁿ δ ∇Q_w(s,a) along a rollout, with δ = r + γ B(s') - Q_w(s,a) at the w of that step.

    B is Σ_a π(a|s') Q_w(s',a), or max_a Q_w(s',a) with ``bootstrap="max"``; with a state-value function V takes the
    place of both. The E environments move together: a step of the rollout is one step of w, along the mean over them.
    α is the model's ``learning_rate``; n counts the steps since the episode began, or the rollout if that was later.
    What follows a time limit is valued as it was when that was reached.

    Source: the boxes of TRPO and PPO in CS885, University of Waterloo, 2020; Sutton and Barto (2018), "Reinforcement
    Learning", sections 9.3 and 10.1, whose tasks are not discounted where functions are approximated.

    Args:
        discounted: Whether there is a γⁿ, as in those boxes. With it a long episode's late steps teach nothing.
    """

    needs_order = True

    def __init__(self, *, discounted: bool = False) -> None:
        if not isinstance(discounted, bool):
            raise ValueError(f"`critic_kwargs['discounted']` must be True or False, got {discounted!r}.")
        self.discounted = discounted

    def fit(self, regression: Regression) -> float:
        """Take the steps; see `Critic.fit`."""
        rollout, values = regression.trajectories, ValueFunction(regression, keep_features=False)
        assert rollout is not None  # see needs_order
        steps, envs = rollout.rewards.shape
        parts = regression.batch.split(envs)
        rewards, starts = (torch.as_tensor(array).to(parts[0].weights) for array in (rollout.rewards, rollout.starts))
        (rate,) = {group["lr"] for group in regression.policy.optimizer.param_groups}
        reduction, ages = regression.batch.reduction, torch.zeros_like(starts[0], dtype=torch.float64)
        for step, part in enumerate(parts):
            ages = torch.where(starts[step] > 0, 0.0, ages)
            following = (
                rollout.values_after(regression.policy, regression.bootstrap)
                if step + 1 == steps
                else bootstrap_values(regression.policy, parts[step + 1], regression.bootstrap)
            )
            targets = rewards[step] + regression.discount * (1.0 - starts[step + 1]) * following
            predicted = values(part)
            error = (targets - predicted).detach()
            scale = (regression.discount**ages if self.discounted else torch.ones_like(ages)).to(error)
            slopes = gradient([reduction.mean(scale * error * predicted)], values.params)
            totals = reduction.gradients(list(slopes.values()))
            with torch.no_grad():
                for param, total in zip(slopes, totals, strict=True):
                    param.add_(total, alpha=rate)
            ages = ages + 1.0
        with torch.no_grad():
            chunks = regression.batch.split(regression.chunk_size)
            losses = [chunk.mean((values(chunk) - chunk.returns).square()) for chunk in chunks]
        return reduction.number(torch.stack(losses).sum())
