"""A torch optimiser's steps on one flat vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sb3_trpo_ext.core.vectors import flatten, unflatten


class FlatOptimizer:
    """Lets Adam step all parameters as one vector: the same numbers, without ten small calls for each parameter.

    Adam treats every number by itself, so the steps are bit for bit those of the optimiser. An optimiser of another
    kind, or in a state that has no flat form (several groups, parameters that are not its own or that have taken
    different numbers of steps), steps itself. The optimiser's state is up to date when the block is left, by an
    exception too.

    Args:
        optimizer: The optimiser.
        fused: Run Adam as one kernel where torch has one; it rounds differently in the last bit.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, fused: bool = False) -> None:
        self._optimizer = optimizer
        self._fused = fused
        self._params: list[nn.Parameter] = []
        self._flat: _FlatAdam | None = None

    def __enter__(self) -> FlatOptimizer:
        """Nothing is laid out before the first step shows which parameters have gradients."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Bring the optimiser's state up to date."""
        self._write_back()

    def step(self, gradients: Mapping[nn.Parameter, Tensor], max_norm: float = math.inf) -> bool:
        """Step the parameters along their gradients, these scaled down together if their norm exceeds ``max_norm``.

        Returns:
            False, and nothing has moved, if the norm is asked about and not finite.
        """
        scale = None
        if max_norm < math.inf:
            norms = torch._foreach_norm(list(gradients.values()))
            norm = torch.linalg.vector_norm(torch.stack(norms))
            if not math.isfinite(norm):
                return False
            scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        params = list(gradients)
        if len(params) != len(self._params) or any(a is not b for a, b in zip(params, self._params, strict=True)):
            self._write_back()
            self._params = params
            if _has_a_flat_form(self._optimizer, gradients):
                self._flat = _FlatAdam(self._optimizer, params, fused=self._fused)
        if self._flat is not None:
            self._flat.step(gradients, scale)
        else:
            self._step_by_itself(gradients, scale)
        return True

    def _step_by_itself(self, gradients: Mapping[nn.Parameter, Tensor], scale: Tensor | None) -> None:
        self._optimizer.zero_grad()
        for param, gradient in gradients.items():
            param.grad = gradient if scale is None else gradient * scale
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _write_back(self) -> None:
        flat, self._flat, self._params = self._flat, None, []
        if flat is not None:
            flat.write_back(self._optimizer)


class _FlatAdam:
    """Torch's own Adam on a flat copy of some parameters, with a flat copy of an optimiser's state."""

    def __init__(self, optimizer: torch.optim.Optimizer, params: list[nn.Parameter], *, fused: bool) -> None:
        self._params = params
        self._vector = nn.Parameter(flatten(params).detach())
        self._views = list(unflatten(self._vector.detach(), params))
        kind = torch.optim.AdamW if isinstance(optimizer, torch.optim.AdamW) else torch.optim.Adam
        self._adam = kind([self._vector])
        group = self._adam.param_groups[0]
        group.update({key: value for key, value in optimizer.param_groups[0].items() if key != "params"})
        group["fused"] = True if fused and has_fused_adam(self._vector.device.type) else None
        # The fused kernel wants the number of steps where the parameters are, the plain one on the CPU.
        step_device = self._vector.device if group["fused"] else torch.device("cpu")
        states = [optimizer.state[param] for param in params if param in optimizer.state]
        if states:
            self._adam.state[self._vector] = {
                key: value.to(step_device, copy=True) if key == "step" else flatten([state[key] for state in states])
                for key, value in states[0].items()
            }

    def step(self, gradients: Mapping[nn.Parameter, Tensor], scale: Tensor | None) -> None:
        """One step of Adam, which brings the parameters along."""
        gradient = flatten(list(gradients.values()))
        self._vector.grad = gradient if scale is None else gradient.mul_(scale)
        self._adam.step()
        self._bring_along()

    @torch.no_grad()
    def _bring_along(self) -> None:
        torch._foreach_copy_(list[Tensor](self._params), self._views)

    def write_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimiser the state that it would have."""
        for key, value in self._adam.state[self._vector].items():
            pieces = [value] * len(self._params) if key == "step" else unflatten(value, self._params)
            for param, piece in zip(self._params, pieces, strict=True):
                optimizer.state[param][key] = piece.clone()


def _has_a_flat_form(optimizer: torch.optim.Optimizer, gradients: Mapping[nn.Parameter, Tensor]) -> bool:
    """Whether one vector can stand for the parameters."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or len(optimizer.param_groups) > 1:
        return False
    if any(optimizer.param_groups[0].get(flag) for flag in ("foreach", "capturable", "differentiable", "fused")):
        return False
    owned = set(optimizer.param_groups[0]["params"])
    if not all(param in owned for param in gradients):
        return False
    states: list[dict[str, Any]] = [optimizer.state.get(param, {}) for param in gradients]
    steps = {float(state["step"]) if "step" in state else None for state in states}
    kinds = {(param.device, param.dtype, gradient.layout) for param, gradient in gradients.items()}
    return len(steps) == 1 and len(kinds) == 1 and kinds.pop()[2] is torch.strided


@cache
def has_fused_adam(device: str) -> bool:
    """Whether torch has Adam as one kernel for a type of device."""
    try:
        torch.optim.Adam([torch.zeros(1, device=device)], fused=True)
    except RuntimeError:
        return False
    return True
