"""Between a list of parameter tensors and one flat vector of length P."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


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
