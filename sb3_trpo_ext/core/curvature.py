"""Matrix-free Gauss-Newton products v ↦ (Jᵀ M J + λI) v."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sb3_trpo_ext.core.parameters import flat_vjp
from sb3_trpo_ext.core.reduction import ALONE, Reduction

Metric = Callable[[Tensor], Tensor]
"""A linear map on outputs, (N, K) -> (N, K): the Hessian M of a loss in its outputs, sample weights included."""


class Jacobian(Protocol):
    """J = ∂z/∂θ of one forward pass, as products in both directions."""

    def jvp(self, vector: Tensor) -> Tensor:
        """J v: ``(P,)`` -> ``(N, K)``."""

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Jᵀ w: ``(N, K)`` -> ``(P,)``."""


Segment = Callable[[], tuple[Jacobian, Metric]]
"""Runs the model on some of the samples: the Jacobian of its outputs z, and the metric there."""


class Linearization:
    """The Jacobian J = ∂z/∂θ of one forward pass, as products in both directions.

    J v needs only reverse mode: w ↦ Jᵀw is linear, so its own vector-Jacobian product with v is J v (the
    "double-VJP trick"). The graph of Jᵀw is built once and serves every product.

    Args:
        outputs: z with its graph, shape ``(N, K)``.
        params: θ, P numbers in all.
    """

    def __init__(self, outputs: Tensor, params: Sequence[Tensor]) -> None:
        self._outputs = outputs
        self._params = params
        self._cotangent = torch.zeros_like(outputs, requires_grad=True)
        self._pullback = flat_vjp(outputs, params, self._cotangent, create_graph=True)

    def jvp(self, vector: Tensor) -> Tensor:
        """J v: ``(P,)`` -> ``(N, K)``."""
        (image,) = torch.autograd.grad(self._pullback, self._cotangent, vector, retain_graph=True)
        return image

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Jᵀ w: ``(N, K)`` -> ``(P,)``."""
        return flat_vjp(self._outputs, self._params, cotangent)


class GaussNewtonProduct:
    """v ↦ (Jᵀ M J + λI) v, summed over segments of the batch.

    With z the parameters of a distribution and M its Fisher metric this is the Fisher-vector product, equal to the
    Hessian of E_s[KL(π_old‖π_θ)] at θ_old (Schulman et al. 2015, appendix C.1). With z = V and M = the sample
    weights it is the Gauss-Newton matrix of the value loss.

    Args:
        segments: Forward passes that together cover the samples.
        damping: λ >= 0, added to the diagonal.
        keep: Whether each is run once, now, and kept for all products; otherwise they are run and released in turn at
            each product, so memory is bounded by the largest. None keeps a single one.
        reduction: Of whose samples the segments are a share.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        damping: float,
        *,
        keep: bool | None = None,
        reduction: Reduction = ALONE,
    ) -> None:
        self._segments = segments
        self._damping = damping
        self._reduction = reduction
        keep = len(segments) == 1 if keep is None else keep
        self._kept = [segment() for segment in segments] if keep else None

    def _parts(self) -> Iterable[tuple[Jacobian, Metric]]:
        return (segment() for segment in self._segments) if self._kept is None else self._kept

    def __call__(self, vector: Tensor) -> Tensor:
        """Multiply a vector ``(P,)``."""
        damped = self._damping * vector
        alone = self._reduction.workers == 1
        result = damped if alone else torch.zeros_like(vector)
        for jacobian, metric in self._parts():
            result = result + jacobian.vjp(metric(jacobian.jvp(vector)))
        return result if alone else damped + self._reduction.total(result)

    def undamped_curvature(self, vector: Tensor, damped: float) -> float:
        """vᵀ Jᵀ M J v, the curvature along a vector without its damping.

        The difference of ``damped`` and λ‖v‖², unless that leaves fewer than three digits; then by one more product.

        Args:
            vector: v, ``(P,)``.
            damped: vᵀ(Jᵀ M J + λI)v.
        """
        difference = damped - self._damping * float(vector.dot(vector))
        if difference > 1e3 * torch.finfo(vector.dtype).eps * damped:
            return difference
        result = vector.new_zeros(())
        for jacobian, metric in self._parts():
            image = jacobian.jvp(vector)
            result = result + (image * metric(image)).sum()
        return self._reduction.number(result)
