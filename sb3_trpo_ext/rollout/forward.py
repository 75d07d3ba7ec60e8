"""Forward passes through plain layers, without what a call of a module costs.

No module is called, nothing is allocated, and what is not needed to act waits until many steps can be computed at once.
A step's products are NumPy's, which are quickest for a few rows, or torch's own. The two add up in different orders and
so differ in the last bits of float32, which is all that can tell a rollout from SB3's; with torch's nothing can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

Array = NDArray[Any]
Activation = Callable[[Tensor], Tensor]
"""A map of numbers that writes into its argument."""

ACTIVATIONS: dict[type[nn.Module], Callable[[nn.Module], Activation]] = {
    nn.Tanh: lambda module: torch.tanh_,
    nn.ReLU: lambda module: torch.relu_,
    nn.Sigmoid: lambda module: torch.sigmoid_,
    nn.SiLU: lambda module: lambda x: F.silu(x, inplace=True),
    nn.ELU: lambda module: lambda x: F.elu(x, module.alpha, inplace=True),  # type: ignore[arg-type]
    nn.LeakyReLU: lambda module: lambda x: F.leaky_relu(x, module.negative_slope, inplace=True),  # type: ignore[arg-type]
    nn.Identity: lambda module: lambda x: x,
}

NUMPY: dict[type[nn.Module], Callable[[Array], Callable[[], Any]]] = {
    nn.Tanh: lambda x: partial(np.tanh, x, x),
    nn.ReLU: lambda x: partial(np.maximum, x, np.float32(0), out=x),
}
"""Activations that NumPy computes more quickly, as operations on an array."""

ALIGNMENT = 4
"""Numbers of 32 bits in the 16 bytes at whose multiples NumPy and torch allocate memory."""

TRIALS = 32
"""Blocks of random numbers, at most, on which two ways to compute a layer are compared."""


class NotCoveredError(Exception):
    """The fast path does not cover this model; the message says why."""


def plain_layers(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Linear layers and activations in a row, a linear one first, of which modules are made.

    Raises:
        NotCoveredError: If there is another kind of layer.
    """
    layers: list[nn.Module] = []
    for module in modules:
        for part in module if type(module) is nn.Sequential else [module]:
            if type(part) is not nn.Linear and (type(part) not in ACTIVATIONS or not layers):
                raise NotCoveredError(f"layer {type(part).__name__}")
            layers.append(part)
    return layers


class Layer:
    """An affine map and the activations that follow it.

    It reads the parameters where they are: what is written into them in place acts from the next step on.

    Args:
        linear: The affine map.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.n_in, self.n_out = int(linear.in_features), int(linear.out_features)
        self.kinds: list[Any] = []
        self.activations: list[Activation] = []
        self.weight = linear.weight.detach()  # the parameter's own memory
        self.transposed = self.weight.t()
        self.bias = torch.zeros(self.n_out, dtype=torch.float32) if linear.bias is None else linear.bias.detach()

    def follow_by(self, module: nn.Module) -> None:
        """Append an activation."""
        self.kinds.append(type(module))
        self.activations.append(ACTIVATIONS[type(module)](module))

    def looked_up(self, ones: Tensor) -> Tensor:
        """Affine images of sums of one-hot vectors, from the indices of their ones: ``(N, K)`` -> ``(N, out)``."""
        image = torch.zeros((), dtype=torch.float32)
        for column in ones.T:
            image = image + self.weight.index_select(1, column).t()
        return image + self.bias


class Mlp:
    """Plain layers in a row, for the same number of rows at every step.

    Args:
        modules: Linear layers and activations, a linear one first; `nn.Sequential` of them included.
        input: What a step reads, ``(E, F)``; integers where it is the indices of the ones in sums of one-hot vectors.
        exact: Whether to round as torch does.

    Attributes:
        output: What a step writes, ``(E, out)``.

    Raises:
        NotCoveredError: If there is another kind of layer.
    """

    def __init__(self, modules: Sequence[nn.Module], input: Tensor, *, exact: bool) -> None:
        self._layers: list[Layer] = []
        self._exact = exact
        for part in plain_layers(modules):
            if isinstance(part, nn.Linear):
                self._layers.append(Layer(part))
            else:
                self._layers[-1].follow_by(part)
        self._operations: list[Callable[[], Any]] = []
        self.output = input
        for layer in self._layers:
            self._append(layer)

    def _append(self, layer: Layer) -> None:
        """Let a step go through another layer, in memory that is allocated once."""
        x = self.output
        out = torch.empty(len(x), layer.n_out, dtype=torch.float32)
        if not x.is_floating_point():
            self._operations.append(lambda: out.copy_(layer.looked_up(x)))
        elif not self._exact:
            array = out.numpy()
            self._operations.append(partial(x.numpy().dot, layer.transposed.numpy(), array))
            self._operations.append(partial(np.add, array, layer.bias.numpy()[None], array))
        elif len(x) == 1 and is_a_matrix_vector_product(layer.n_in, layer.n_out):
            self._operations.append(partial(torch.addmv, layer.bias, layer.weight, x[0], out=out[0]))
        else:
            self._operations.append(partial(torch.addmm, layer.bias, x, layer.transposed, out=out))
        for kind, activation in zip(layer.kinds, layer.activations, strict=True):
            quick = not self._exact and kind in NUMPY
            self._operations.append(NUMPY[kind](out.numpy()) if quick else partial(activation, out))
        self.output = out

    def step(self) -> None:
        """From `input` to `output`."""
        for operation in self._operations:
            operation()

    def block(self, x: Tensor) -> Tensor:
        """Outputs of T steps of R rows, ``(T, R, F)`` -> ``(T, R, out)``; if exact, the numbers of T single steps."""
        for layer in self._layers:
            if not x.is_floating_point():
                x = layer.looked_up(x.flatten(0, 1)).view(*x.shape[:2], -1)
            else:
                x = affine_block(x, layer) if self._exact else F.linear(x, layer.weight, layer.bias)
            for kind, activation in zip(layer.kinds, layer.activations, strict=True):
                if not self._exact and kind in NUMPY:
                    NUMPY[kind](x.numpy())()
                    continue
                alike = not self._exact or rounds_alike_in_blocks(kind, x[0].numel())
                for part in [x] if alike else x:
                    activation(part)
        return x


def affine_block(x: Tensor, layer: Layer) -> Tensor:
    """Affine images of T steps of R rows, ``(T, R, F)`` -> ``(T, R, out)``, by the quickest way that rounds alike."""
    way = quickest_block(x.shape[1], layer.n_in, layer.n_out, torch.get_num_threads())
    return way(x if _is_aligned(x) else aligned(*x.shape).copy_(x), layer.weight, layer.bias)


def aligned(n_steps: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory ``(n_steps, *shape)`` in which each step lies as it would alone: how a product rounds depends on that."""
    size = math.prod(shape)
    return torch.zeros(n_steps, -(-size // ALIGNMENT) * ALIGNMENT, dtype=dtype)[:, :size].view(n_steps, *shape)


def _is_aligned(x: Tensor) -> bool:
    return x.stride(0) % ALIGNMENT == 0 and x.storage_offset() % ALIGNMENT == 0


def _at_once(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def _batched(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    n_steps, n_rows, _ = x.shape
    return torch.baddbmm(bias.expand(n_steps, n_rows, -1), x, weight.t().expand(n_steps, -1, -1))


def _one_by_one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = x.new_empty(*x.shape[:2], len(weight))
    if x.shape[1] == 1 and is_a_matrix_vector_product(weight.shape[1], weight.shape[0]):
        for step, image in zip(x[:, 0].unbind(), out[:, 0].unbind(), strict=True):
            torch.addmv(bias, weight, step, out=image)
        return out
    transposed = weight.t()
    for step, image in zip(x.unbind(), out.unbind(), strict=True):
        torch.addmm(bias, step, transposed, out=image)
    return out


@cache
def quickest_block(n_rows: int, n_in: int, n_out: int, threads: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """How to compute many steps at once, with the bits that they have one by one.

    A matrix product adds up in an order that depends on its shape, the library and the processor; which larger products
    have the order of the small one is found by trying.

    Args:
        n_rows: Rows of a step.
        n_in: Numbers in a row.
        n_out: Numbers in its image.
        threads: Threads of torch, on which it may depend.
    """
    x, weight, bias = _trial(n_rows, n_in, n_out)
    expected = torch.stack([F.linear(step.clone(), weight, bias) for step in x])
    for way in (_at_once, _batched):
        if torch.equal(way(x, weight, bias), expected):
            return way
    return _one_by_one


@cache
def is_a_matrix_vector_product(n_in: int, n_out: int) -> bool:
    """Whether a product with a matrix of a single row rounds as the product with a vector, which is quicker."""
    x, weight, bias = _trial(1, n_in, n_out)
    pairs = [(torch.addmv(bias, weight, step[0]), F.linear(step, weight, bias)[0]) for step in map(torch.clone, x)]
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


@cache
def rounds_alike_in_blocks(kind: type[nn.Module], size: int) -> bool:
    """Whether an activation gives many steps of ``size`` numbers at once the bits that it gives each.

    Torch computes what is left over behind the last whole vector of the processor by other functions.
    """
    x = torch.randn(TRIALS, size, generator=torch.Generator().manual_seed(size), dtype=torch.float32)
    activation = ACTIVATIONS[kind](kind())
    return torch.equal(torch.stack([activation(step.clone()) for step in x]), activation(x))


def _trial(n_rows: int, n_in: int, n_out: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_in)
    trials = max(2, min(TRIALS, 2**18 // (n_rows * n_in)))
    shapes = (trials, n_rows, n_in), (n_out, n_in), (n_out,)
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes)
    return aligned(*x.shape).copy_(x), weight, bias
