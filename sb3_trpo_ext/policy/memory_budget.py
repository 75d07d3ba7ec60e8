"""What the device asks of an update: a budget of memory, and few waits."""

from __future__ import annotations

import math
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sb3_trpo_ext.rollout.batch import Batch

MEMORY_BUDGET = 512 * 2**20
"""Bytes that the graphs of one chunk of an update may take."""

GRAPHS = 4
"""Tensors alive in a Fisher-vector product, in multiples of what the forward pass saves for its derivative.

The forward pass, its backward pass kept for differentiation, and the two passes of a product.
"""

TRIED = 64
"""Most samples on which it is measured what one costs: enough for what is rounded up to pages of memory."""

_COSTS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def affordable_samples(model: nn.Module, forward: Callable[[Batch], Tensor], batch: Batch) -> int:
    """Samples in a chunk whose graphs stay within `MEMORY_BUDGET`; at least one.

    What a sample costs is measured, once for each model: what autograd saves on a forward pass of some samples less
    what it saves for one, so that parameters and other constants drop out. Of a recurrent policy's batch that is the
    cost of a place with a hidden state of its own, the dearest kind of place; `SequenceBatch.split` counts places.

    Args:
        model: Whose forward pass it is.
        forward: That pass, with its graph.
        batch: Samples to try it on.
    """
    if model not in _COSTS:
        _COSTS[model] = _cost(forward, batch)
    return _affordable(_COSTS[model])


def _affordable(cost: int) -> int:
    return max(1, MEMORY_BUDGET // (GRAPHS * max(1, cost)))


def _cost(forward: Callable[[Batch], Tensor], batch: Batch) -> int:
    """Bytes that a sample costs: from two samples, then from as many more as those say that the budget allows."""
    constant, cost = _saved_bytes(forward, batch[:1]), 0
    for tried in (2, TRIED):
        apart = batch[: 2 * min(tried, _affordable(cost)) : 2]  # no two of them in one sequence
        if len(apart) > 1:
            cost = math.ceil((_saved_bytes(forward, apart) - constant) / (len(apart) - 1))
    return cost


def _saved_bytes(forward: Callable[[Batch], Tensor], batch: Batch) -> int:
    storages: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        # The same memory without its graph: where an operation saves its own output, that output would hold the
        # operation, the operation the output, and no collector sees the part of the ring that lies in C++.
        return saved.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        _output = forward(batch)  # alive until all is counted, so that no address is used twice
    return sum(storages.values())
