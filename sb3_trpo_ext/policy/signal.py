"""Whether the advantages of a rollout say anything, or are equal but for the rounding that made them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_trpo_ext.core.advantages import rounding_of_advantages
from sb3_trpo_ext.core.reduction import moments_here
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import by_time

NO_SIGNAL = "all advantages are equal up to rounding, so that no action is better than another"
NO_PARAMETER = "the policy has no trainable parameter"
NO_GRADIENT = "the gradient of the surrogate is zero (zero right-hand side)"

CURES = {
    NO_SIGNAL: "Look at the rewards: in these rollouts they did not depend on what was done.",
    NO_PARAMETER: "Set `requires_grad` of the parameters that are to be trained.",
    NO_GRADIENT: "Look at the policy: a saturated one does not answer to its parameters; an `ent_coef` keeps it from "
    "saturating.",
}
"""What to do where there is nothing for a step to follow, which no argument of its length helps against."""


def without_noise(batch: Batch, buffer: RolloutBuffer) -> Batch:
    """The batch; with advantages of zero if those that it has differ by rounding alone.

    Standardising would blow such differences up to the size of a signal. What is equal for all samples favours no
    action either: in expectation its gradient is zero, with or without standardisation.

    Args:
        batch: Samples, those of the buffer at least.
        buffer: The rollout that they come from.
    """
    bounds = batch.reduction.largest_of(_bounds_here(batch, buffer))
    return _without_noise(batch, buffer, bounds)


def normalized_signal(batch: Batch, buffer: RolloutBuffer) -> Batch:
    """The batch `without_noise`, its advantages standardised; what workers tell of both goes in one message."""
    reduction = batch.reduction
    if reduction.workers == 1:
        return without_noise(batch, buffer).with_normalized_advantages()
    bounds = _bounds_here(batch, buffer)
    mine = torch.cat([bounds.double(), moments_here(batch.advantages, batch.weights)])
    told = reduction.gather(mine).view(reduction.workers, -1)
    most, moments = told[:, : len(bounds)].amax(dim=0), told[:, len(bounds) :]
    seen = _without_noise(batch, buffer, most.to(bounds))
    return seen.with_normalized_advantages(moments) if seen is batch else seen  # zeros stay what they are


def _bounds_here(batch: Batch, buffer: RolloutBuffer) -> torch.Tensor:
    """What is to be the largest over workers: Â, -Â, |V_old| and the steps of a recursion, ``(4,)``."""
    advantages, largest = batch.advantages[batch.weights > 0], batch.reduction.largest_share
    bounds = [largest(advantages), largest(-advantages), largest(batch.old_values.abs())]
    return torch.stack([*bounds, torch.tensor(longest_recursion(buffer)).to(bounds[0])])


def _without_noise(batch: Batch, buffer: RolloutBuffer, bounds: torch.Tensor) -> Batch:
    """See `without_noise`; ``bounds`` are those of all workers."""
    most, least, value, longest = bounds.tolist()
    least = -least
    spread, magnitude = most - least, max(abs(most), abs(least)) + value
    rounding = rounding_of_advantages(
        magnitude,
        int(longest),
        decay=buffer.gamma * buffer.gae_lambda,
        eps=torch.finfo(batch.advantages.dtype).eps,
    )
    # In accepting form: where something is not finite it is for others to say so.
    return replace(batch, advantages=torch.zeros_like(batch.advantages)) if spread <= rounding else batch


def has_signal(batch: Batch) -> bool:
    """Whether any advantage is not zero."""
    return batch.reduction.any(batch.advantages)


def longest_recursion(buffer: RolloutBuffer) -> int:
    """The most steps of a rollout over which advantages were summed up: those of its longest episode in it."""
    starts = by_time(buffer, buffer.episode_starts)
    if starts.shape != (buffer.buffer_size, buffer.n_envs):
        return int(buffer.buffer_size)
    rows = starts.T
    last = np.ones((len(rows), 1), dtype=bool)
    ends = np.flatnonzero(np.concatenate([rows[:, 1:] > 0, last], axis=1))
    return int(np.diff(ends, prepend=-1).max())
