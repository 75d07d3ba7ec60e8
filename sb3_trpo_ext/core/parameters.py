"""Which parameters an output reaches: told by the graph, never by a name."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class HasParameters(Protocol):
    """A module, or what stands for one."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """All parameters."""


def trainable(module: HasParameters) -> list[nn.Parameter]:
    """Parameters that are not frozen, each once."""
    return [param for param in module.parameters() if param.requires_grad]


def gradient(terms: Iterable[Tensor], params: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Gradient of a sum of scalars, for those parameters that the graph of some term reaches.

    Each term's graph is released before the next is built, if ``terms`` builds them lazily.

    Args:
        terms: Scalars with their graphs.
        params: Candidates.

    Returns:
        Gradients by parameter, in the order of ``params``; a parameter that is not reached is absent, one that is
        reached with gradient zero is present.
    """
    total: list[Tensor | None] = [None] * len(params)
    for term in terms:
        if not term.requires_grad:
            continue
        grads = torch.autograd.grad(term, params, allow_unused=True)
        total = [
            grad if before is None else before if grad is None else before + grad
            for before, grad in zip(total, grads, strict=True)
        ]
    return {param: grad for param, grad in zip(params, total, strict=True) if grad is not None}


def leave_gradients(module: nn.Module, ascent: Mapping[nn.Parameter, Tensor]) -> None:
    """Leave the gradient of a loss in ``param.grad``, as a backward pass would, for those who log its norm.

    Args:
        module: Its parameters that are not in ``ascent`` get None.
        ascent: The gradient of the objective, minus the loss, by parameter.
    """
    for param in module.parameters():
        param.grad = -ascent[param] if param in ascent else None
