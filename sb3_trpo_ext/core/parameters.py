"""Lists of parameters: as one flat vector of length P, and which of them an output reaches.

What an output reaches is told by its graph, never by a name.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors into one vector ``(P,)``, in order, row-major; empty for none."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else torch.empty(0)


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield views of ``vector`` with the shapes of ``like``: the inverse of `flatten`."""
    sizes = [tensor.numel() for tensor in like]
    for piece, tensor in zip(torch.split(vector, sizes), like, strict=True):
        yield piece.view_as(tensor)


@torch.no_grad()
def assign(params: Sequence[Tensor], vector: Tensor) -> None:
    """Write a vector ``(P,)`` into the parameters, in place."""
    for param, value in zip(params, unflatten(vector, params), strict=True):
        param.copy_(value)


def flat_vjp(outputs: Tensor, params: Sequence[Tensor], cotangent: Tensor, *, create_graph: bool = False) -> Tensor:
    """Vector-Jacobian product Jᵀw with J = ∂outputs/∂params, flattened.

    Args:
        outputs: Tensor of any shape, with its graph, which is kept.
        params: The P parameters in their own shapes; one that the outputs do not reach contributes zeros.
        cotangent: w, of the shape of ``outputs``.
        create_graph: Make the result differentiable (with respect to ``cotangent`` and ``params``).

    Returns:
        Vector ``(P,)``.
    """
    grads = torch.autograd.grad(
        outputs, params, cotangent, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    return flatten([torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)])


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
