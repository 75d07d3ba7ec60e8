"""Solve F x = b with products only."""

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
    product: Callable[[Tensor], Tensor], b: Tensor, *, max_steps: int = 10, residual_tol: float = 1e-5
) -> CGResult:
    r"""Approximate F⁻¹b for a symmetric positive definite F (Hestenes and Stiefel, 1952).

    Deviations from the textbook: starts at zero, so the iterates stay in the Krylov space of b and no random
    number is drawn; stops as soon as a search direction has no positive curvature and returns the best iterate
    before it (zero if there is none), because a step to the boundary along such an x would be meaningless.

    Args:
        product: v ↦ F v on vectors ``(P,)``.
        b: Right-hand side ``(P,)``, finite.
        max_steps: Most products spent.
        residual_tol: Stop when ‖b - F x‖ <= residual_tol · ‖b‖.

    Returns:
        The solution with its record.

    Source: Schulman et al. (2015), "Trust Region Policy Optimization", appendix C.
    """
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    norm2 = b_norm2 = float(b.dot(b))
    stop = "max steps" if b_norm2 > 0 else "zero right-hand side"

    steps = 0
    while stop == "max steps" and steps < max_steps:
        image = product(direction)
        curvature = float(direction.dot(image))
        if not 0 < curvature < float("inf"):
            stop = "non-positive curvature" if curvature <= 0 else "non-finite curvature"
            break
        steps += 1
        step_length = norm2 / curvature
        x = x + step_length * direction
        residual = residual - step_length * image
        previous, norm2 = norm2, float(residual.dot(residual))
        if norm2 <= residual_tol**2 * b_norm2:
            stop = "converged"
        direction = residual + (norm2 / previous) * direction

    relative = (norm2 / b_norm2) ** 0.5 if b_norm2 > 0 else 0.0
    return CGResult(x, float(x.dot(b - residual)), steps, relative, stop)
