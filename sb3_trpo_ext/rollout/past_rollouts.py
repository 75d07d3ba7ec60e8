"""Rollouts of earlier policies, made fit for another update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor

from sb3_trpo_ext.core.advantages import trace_advantages, trace_targets
from sb3_trpo_ext.rollout.action_values import Bootstrap, following_values, has_action_values
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import by_time


@dataclass(frozen=True)
class PastRollout:
    """A rollout as it was collected, kept by reference: SB3's buffers begin a new one with new arrays.

    Attributes:
        batch: Its T·E samples, ordered by time.
        rewards: ``(T, E)``, with the value that SB3 adds where an episode was cut off.
        starts: Whether an episode begins with a step, ``(T + 1, E)``: the last row is about the step that follows.
        following: Observations after the last step, as the environments gave them.
        following_masks: Which actions are allowed there, ``(E, K)``; None for all, or where nobody asked.
    """

    batch: Batch
    rewards: np.ndarray
    starts: np.ndarray
    following: Any
    following_masks: Any = None

    @classmethod
    def of(
        cls, buffer: RolloutBuffer, batch: Batch, following: Any, starts: np.ndarray, following_masks: Any = None
    ) -> PastRollout:
        """What a full buffer holds, with the observations and episode starts that follow it."""
        begins, rewards = by_time(buffer, buffer.episode_starts), by_time(buffer, buffer.rewards)
        return cls(batch, rewards, np.concatenate([begins, starts[None]]), following, following_masks)

    @torch.no_grad()
    def values_after(self, policy: ActorCriticPolicy, bootstrap: Bootstrap = "expected") -> Tensor:
        """What is expected to follow the last step, ``(E,)``."""
        observations = obs_as_tensor(self.following, policy.device)
        return following_values(policy, observations, self.following_masks, bootstrap)

    @torch.no_grad()
    def seen_by(
        self,
        policy: ActorCriticPolicy,
        *,
        discount: float,
        trace_decay: float,
        chunk_size: int | None,
        bootstrap: Bootstrap = "expected",
    ) -> Batch:
        """Its samples with the advantages and returns that they have for the policy as it is now.

        Returns are the targets of V-trace for V(s), and for Q(s,a) those of the same traces from the next step on: the
        action that the value is asked for was taken, whatever its probability is now.
        """
        chunks = self.batch.split(chunk_size)
        parts = [part.evaluate_actions(policy)[:2] for part in chunks]
        values, log_prob = (torch.cat(part) for part in zip(*parts, strict=True))
        last, shape = self.values_after(policy, bootstrap), self.rewards.shape
        bootstraps = None
        if bootstrap != "expected":
            expected = [bootstrap_values(policy, part, bootstrap) for part in chunks]
            bootstraps = torch.cat([*expected, last]).view(shape[0] + 1, shape[1])
        ratios = torch.exp(log_prob - self.batch.old_log_prob)
        advantages = trace_advantages(
            torch.as_tensor(self.rewards).to(values),
            torch.cat([values, last]).view(shape[0] + 1, shape[1]),
            1.0 - torch.as_tensor(self.starts[1:]).to(values),
            ratios.view(shape),
            discount=discount,
            trace_decay=trace_decay,
            bootstraps=bootstraps,
        ).flatten()
        of_actions = has_action_values(policy)
        returns = values + advantages if of_actions else trace_targets(values, advantages, ratios)
        return replace(self.batch, advantages=advantages, returns=returns)


@torch.no_grad()
def bootstrap_values(policy: ActorCriticPolicy, batch: Batch, bootstrap: Bootstrap) -> Tensor:
    """`following_values` of the states of a batch, ``(N,)``."""
    return following_values(policy, batch.inputs, batch.action_masks, bootstrap)


def joined(batches: Sequence[Batch]) -> Batch:
    """All samples of several rollouts, each with the same weight."""
    if len(batches) == 1:
        return batches[0]
    batch = Batch.joined(batches)
    return replace(batch, weights=torch.full_like(batch.weights, 1.0 / batch.reduction.count(len(batch))))


def shared_radius(radius: float, rollouts: int) -> float:
    """The radius of an update whose samples come from the last M policies: (2/(M+1))² of what one rollout may use.

    A sample of the policy i updates ago is left by i + 1 steps, (M+1)/2 in the mean over the M rollouts. Total
    variation obeys the triangle inequality, and its square is bounded by the KL divergence: with steps shortened by
    that mean, the samples are left as far in all as by one step of the full radius (Queeney et al. 2022, for uniform
    weights).
    """
    return radius * (2.0 / (rollouts + 1)) ** 2
