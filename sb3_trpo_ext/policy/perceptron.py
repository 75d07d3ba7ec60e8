"""A multilayer perceptron with its derivatives by hand: y(x; θ), Jᵀu and J v with J = ∂y/∂θ.

Layer by layer, with h the input of an affine map, a = h Wᵀ + b, and y = φ(a):

    forward    a = h Wᵀ + b                     y = φ(a)
    J v        ȧ = h Ẇᵀ + ḃ + ḣ Wᵀ              ẏ = φ'(a) ȧ
    Jᵀ u       ∂W = uᵀ h, ∂b = Σ u, ∂h = u W    ∂a = φ'(a) u

The products of matrices are torch's and keep to its threads; the rest is NumPy's, which computes tanh of the same
memory several times as fast and costs less a call. All intermediate results live in memory that is allocated once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sb3_trpo_ext.rollout.forward import Array, NotCoveredError, plain_layers

Pieces = Mapping[Any, Tensor]
"""A tangent, a gradient or the parameters themselves: a tensor of its shape for each parameter."""

Operation = Callable[[], Any]


def parameters_of(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The parameters of plain layers, in their order.

    Raises:
        NotCoveredError: If there is another kind of layer, or one parameter in two places.
    """
    params = [param for layer in plain_layers(modules) for param in layer.parameters()]
    if len({*params}) < len(params):
        raise NotCoveredError("a parameter in two places")
    return params


class Perceptron:
    """Plain layers in a row, for the rows of one tensor.

    `pullback` and `pushforward` are at the parameters and inputs of the last `forward`.

    Args:
        modules: Linear layers and activations, a linear one first; `nn.Sequential` of them included.
        x: The inputs ``(N, F)``; what is written into it is read at the next forward pass.
        parameters: Where the parameters are; None for the modules' own memory.
        gradient: Where `pullback` writes; None for memory of its own.

    Attributes:
        params: The parameters of the modules, in their order.
        x: The inputs.
        y: The outputs ``(N, K)``, written by `forward`.
        u: To be filled in for `pullback`, ``(N, K)``.
        gradient: What `pullback` wrote, a tensor for each parameter.
        nbytes: Bytes of what is held for each row.

    Raises:
        NotCoveredError: If there is another kind of layer, or one parameter in two places.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        x: Tensor,
        parameters: Pieces | None = None,
        gradient: Pieces | None = None,
    ) -> None:
        self.params = parameters_of(modules)
        self._held: Pieces = parameters or {param: param.detach() for param in self.params}
        self.gradient: Pieces = gradient or {param: torch.empty_like(param) for param in self.params}
        self._ones = torch.ones(len(x), dtype=x.dtype).numpy()
        self._forward: list[Operation] = []
        self._pullback: list[Operation] = []
        self._slopes: list[Operation] = []
        self._slopes_are_known = False
        self.nbytes = x.nbytes
        self._tangents: list[Callable[[Pieces, Tensor | None], Tensor]] = []
        self.x = self.y = x
        self.u: Tensor = torch.empty(0)
        for layer in plain_layers(modules):
            if isinstance(layer, nn.Linear):
                self._append_affine(layer)
            else:
                self._append_activation(layer)

    def forward(self) -> Tensor:
        """From `x` to `y`."""
        self._slopes_are_known = False
        for operation in self._forward:
            operation()
        return self.y

    def pullback(self) -> None:
        """Jᵀu, the gradient of Σ u·y, into `gradient`; what is in `u` is lost."""
        self._know_slopes()
        for operation in reversed(self._pullback):
            operation()

    def pushforward(self, tangent: Pieces) -> Tensor:
        """J v, the derivative of y in the direction v, ``(N, K)``; valid until the next one."""
        self._know_slopes()
        image: Tensor | None = None
        for step in self._tangents:
            image = step(tangent, image)
        assert image is not None  # there is a layer
        return image

    def _know_slopes(self) -> None:
        if not self._slopes_are_known:
            for operation in self._slopes:
                operation()
            self._slopes_are_known = True

    def _append_affine(self, linear: nn.Linear) -> None:
        x, weight, bias = self.y, self._held[linear.weight], None if linear.bias is None else self._held[linear.bias]
        y, u = x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight))
        images: list[Tensor] = []  # allocated when asked for
        transposed = weight.t()
        self.nbytes += 3 * y.nbytes

        if len(self.u):
            self._pullback.append(partial(torch.mm, u, weight, out=self.u))
        self._pullback.append(_product(u.t(), x, self.gradient[linear.weight]))
        if bias is None:
            self._forward.append(partial(torch.mm, x, transposed, out=y))
        else:
            self._forward.append(partial(torch.addmm, bias, x, transposed, out=y))
            self._pullback.append(partial(np.dot, self._ones, u.numpy(), out=self.gradient[linear.bias].numpy()))

        def push(tangent: Pieces, before: Tensor | None) -> Tensor:
            if not images:
                images.append(torch.empty_like(y))
            image = images[0]
            if bias is None:
                torch.mm(x, tangent[linear.weight].t(), out=image)
            else:
                torch.addmm(tangent[linear.bias], x, tangent[linear.weight].t(), out=image)
            return image if before is None else image.addmm_(before, transposed)

        self._tangents.append(push)
        self.y, self.u = y, u

    def _append_activation(self, module: nn.Module) -> None:
        x, y, slope = self.y, torch.empty_like(self.y), torch.empty_like(self.y)
        function, derivative = ACTIVATIONS[type(module)](module)
        self._forward.append(partial(function, x.numpy(), y.numpy()))
        self._slopes.append(partial(derivative, x.numpy(), y.numpy(), slope.numpy()))
        self.nbytes += 2 * y.nbytes
        u = self.u.numpy()
        self._pullback.append(partial(np.multiply, u, slope.numpy(), u))

        def push(tangent: Pieces, before: Tensor | None) -> Tensor:
            assert before is not None  # an affine map comes first
            return before.mul_(slope)

        self._tangents.append(push)
        self.y = y


NARROW = 32
"""Columns below which torch takes several times NumPy's time for the product of a flat matrix with a narrow one."""


def _product(a: Tensor, b: Tensor, out: Tensor) -> Operation:
    """A b, written into ``out``."""
    if min(out.shape) < NARROW:
        return partial(np.dot, a.numpy(), b.numpy(), out.numpy())
    return partial(torch.mm, a, b, out=out)


Function = Callable[[Array, Array], Any]
Slope = Callable[[Array, Array, Array], Any]


SATURATED = 9.011
"""Where tanh in float32 is ±1; NumPy's comes to a bit less, which leaves a slope that is none."""


def _tanh(module: nn.Module) -> tuple[Function, Slope]:
    def function(x: Array, y: Array) -> None:
        np.tanh(x, out=y)
        if y.dtype == np.float32 and (x.max() > SATURATED or x.min() < -SATURATED):
            np.copyto(y, np.sign(x), where=np.abs(x) > SATURATED)

    def slope(x: Array, y: Array, out: Array) -> None:
        np.multiply(y, y, out=out)
        np.subtract(1, out, out=out)

    return function, slope


def _relu(module: nn.Module) -> tuple[Function, Slope]:
    return lambda x, y: np.maximum(x, 0, out=y), lambda x, y, out: np.greater(x, 0, out=out, casting="unsafe")


def _leaky_relu(module: Any) -> tuple[Function, Slope]:
    def slope(x: Array, y: Array, out: Array) -> None:
        np.copyto(out, np.where(x > 0, 1, module.negative_slope), casting="same_kind")

    return lambda x, y: np.copyto(y, np.where(x > 0, x, x * module.negative_slope)), slope


def _elu(module: Any) -> tuple[Function, Slope]:
    def function(x: Array, y: Array) -> None:
        np.copyto(y, np.where(x > 0, x, module.alpha * np.expm1(np.minimum(x, 0))))

    def slope(x: Array, y: Array, out: Array) -> None:
        np.copyto(out, np.where(x > 0, 1, y + module.alpha))

    return function, slope


def _logistic(x: Array) -> Array:
    """1/(1 + e^-x), without overflow."""
    small = np.exp(-np.abs(x))
    result: Array = np.where(x > 0, 1, small) / (1 + small)
    return result


def _sigmoid(module: nn.Module) -> tuple[Function, Slope]:
    return lambda x, y: np.copyto(y, _logistic(x)), lambda x, y, out: np.multiply(y, 1 - y, out=out)


def _silu(module: nn.Module) -> tuple[Function, Slope]:
    def slope(x: Array, y: Array, out: Array) -> None:
        share = _logistic(x)
        np.copyto(out, share + y * (1 - share))

    return lambda x, y: np.multiply(x, _logistic(x), out=y), slope


def _identity(module: nn.Module) -> tuple[Function, Slope]:
    return lambda x, y: np.copyto(y, x), lambda x, y, out: out.fill(1)


ACTIVATIONS: dict[type[nn.Module], Callable[[nn.Module], tuple[Function, Slope]]] = {
    nn.Tanh: _tanh,
    nn.ReLU: _relu,
    nn.LeakyReLU: _leaky_relu,
    nn.ELU: _elu,
    nn.Sigmoid: _sigmoid,
    nn.SiLU: _silu,
    nn.Identity: _identity,
}
"""φ and φ' of the activations of fast rollouts: x ↦ y, and x and y ↦ the slope, written into the last argument."""
