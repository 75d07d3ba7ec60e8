"""Solve F x = b with products only."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CGResult:
    """What conjugate gradients found, and why they stopped.

    Attributes:
        solution: x, shape ``(P,)``.
        curvature: xᵀFx, from the recursion residual r = b - F x, so that no further product is needed.
        steps: Products spent on x.
        residual: Relative residual ‖b - F x‖ / ‖b‖.
        stop: ``"converged"``, ``"max steps"``, ``"zero right-hand side"``, ``"non-positive curvature"`` or
            ``"non-finite curvature"``.
    """

    solution: Tensor
    curvature: float
    steps: int
    residual: float
    stop: str


def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    max_steps: int = 10,
    residual_tol: float = 1e-5,
    check_every: int | None = None,
) -> CGResult:
    r"""Approximate F⁻¹b for a symmetric positive definite F (Hestenes and Stiefel, 1952).

    Deviations from the textbook: starts at zero, so the iterates stay in the Krylov space of b and no random
    number is drawn; stops as soon as a search direction has no positive curvature and returns the best iterate
    before it (zero if there is none), because a step to the boundary along such an x would be meaningless. All
    scalars stay tensors, and a stopped iteration stands still, so that an accelerator need not be waited for.

    Args:
        product: v ↦ F v on vectors ``(P,)``.
        b: Right-hand side ``(P,)``, finite.
        max_steps: Most products spent.
        residual_tol: Stop when ‖b - F x‖ <= residual_tol · ‖b‖.
        check_every: Ask whether the iteration has stopped only every so many products. 1 wastes none; more spares an
            accelerator the waiting, and changes nothing in the result. None is 1 on the CPU and never elsewhere.

    Returns:
        The solution with its record.

    Source: Schulman et al. (2015), "Trust Region Policy Optimization", appendix C.
    """
    interval = check_every or (1 if b.device.type == "cpu" else max_steps)
    x = torch.zeros_like(b)
    residual, direction = b, b
    norm2 = b_norm2 = b.dot(b)
    going = b_norm2 > 0
    steps, curvature = torch.zeros_like(b_norm2), torch.ones_like(b_norm2)

    for step in range(max_steps):
        if step % interval == 0 and not bool(going):
            break
        image = product(direction)
        curvature = torch.where(going, direction.dot(image), curvature)
        going = going & (curvature > 0) & (curvature < math.inf)
        step_length = norm2 / curvature
        x = torch.where(going, x + step_length * direction, x)
        residual = torch.where(going, residual - step_length * image, residual)
        previous, norm2 = norm2, residual.dot(residual)
        direction = torch.where(going, residual + (norm2 / previous) * direction, direction)
        steps = steps + going
        going = going & (norm2 > residual_tol**2 * b_norm2)

    return _record(x, torch.stack([steps, norm2, b_norm2, curvature, x.dot(b - residual)]).tolist(), residual_tol)


def _record(x: Tensor, numbers: list[float], residual_tol: float) -> CGResult:
    """The result, and in words why the iteration stopped."""
    steps, norm2, b_norm2, last_curvature, curvature = numbers
    if not b_norm2 > 0:
        stop = "zero right-hand side"
    elif not 0 < last_curvature < math.inf:
        stop = "non-positive curvature" if last_curvature <= 0 else "non-finite curvature"
    else:
        stop = "converged" if norm2 <= residual_tol**2 * b_norm2 else "max steps"
    return CGResult(x, curvature, int(steps), (norm2 / b_norm2) ** 0.5 if b_norm2 > 0 else 0.0, stop)
