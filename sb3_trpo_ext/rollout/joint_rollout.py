"""A rollout of several workers that each of them has whole, and the orders in which epochs go through it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor

from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import order_of_epoch, unchanged_numpy_state

INDEX_BYTES = torch.int32.itemsize + torch.int64.itemsize
"""Bytes that a sample takes in the order of an epoch, as it is told and as it is used."""


@dataclass(frozen=True, kw_only=True)
class JointRollout(Batch):
    """The samples of W workers with N each, one worker's after the other's.

    Attributes:
        orders: In which each epoch to come sees them, a column an epoch, ``(W · N, epochs)``. Its minibatches are those
            of workers that keep their samples: each one's next share, one worker's after the other's.
    """

    orders: Tensor

    @classmethod
    def of(cls, batch: Batch, buffer: RolloutBuffer, *, epochs: int, share: int) -> JointRollout:
        """Gather what all workers have, in one message.

        The orders are foretold: whoever draws that of an epoch when it begins, as one does without other workers, draws
        the same again, and has drawn as often as without.

        Args:
            batch: This worker's samples.
            buffer: The rollout buffer that they come from.
            epochs: How many there are to come.
            share: Samples of a worker in a minibatch.
        """
        samples, reduction = len(batch), batch.reduction
        with unchanged_numpy_state():
            drawn = torch.stack([order_of_epoch(buffer) for _ in range(epochs)], dim=1)
        mine = (drawn + reduction.rank * samples).int()
        joint = cls(**batch.rows(), orders=mine, reduction=reduction).gathered()
        assert isinstance(joint, JointRollout)
        by_worker = joint.orders.long().view(reduction.workers, samples, epochs)
        return replace(joint, orders=torch.cat([part.flatten(0, 1) for part in by_worker.split(share, dim=1)]))
