"""What the device asks of an update: a budget of memory, and few waits."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sb3_trpo_ext.sb3.batch import Batch

MEMORY_BUDGET = 512 * 2**20
"""Bytes that the graphs of one chunk of an update may take."""

GRAPHS = 4
"""Tensors alive in a Fisher-vector product, in multiples of what the forward pass saves for its derivative.

The forward pass, its backward pass kept for differentiation, and the two passes of a product.
"""


_COSTS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def affordable_samples(model: nn.Module, forward: Callable[[Batch], Tensor], batch: Batch) -> int:
    """Samples in a chunk whose graphs stay within `MEMORY_BUDGET`; at least one.

    What a sample costs is measured, once for each model: the bytes that autograd saves on a forward pass of two
    samples less those for one, so that parameters and other constants drop out.

    Args:
        model: Whose forward pass it is.
        forward: That pass, with its graph.
        batch: Samples to try it on.
    """
    if model not in _COSTS:
        _COSTS[model] = _saved_bytes(forward, batch[:2]) - _saved_bytes(forward, batch[:1])
    return max(1, MEMORY_BUDGET // (GRAPHS * max(1, _COSTS[model])))


def _saved_bytes(forward: Callable[[Batch], Tensor], batch: Batch) -> int:
    storages: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        _output = forward(batch)  # alive until all is counted, so that no address is used twice
    return sum(storages.values())


def check_interval(tensor: Tensor) -> int:
    """Products between two questions whether conjugate gradients have stopped: to ask an accelerator is to wait."""
    return 1 if tensor.device.type == "cpu" else 1_000_000
