"""A torch optimiser's steps on one flat vector."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.optim.adam import adam

from sb3_trpo_ext.core.parameters import HasParameters, flatten, trainable, unflatten
from sb3_trpo_ext.core.reduction import ALONE, Reduction

Lowest = Mapping[nn.Parameter, float]
"""Parameters whose numbers are raised to a lowest one after each step: the step is projected."""

LARGEST_FLAT = 2**18
"""Numbers above which copying the vector takes longer than the small calls that it saves, but for the fused kernel."""

_TORCHS_CODE = str(Path(torch.__file__).parent)


class FlatOptimizer:
    """Lets Adam step all parameters as one vector: the same numbers, without ten small calls for each parameter.

    Adam treats every number by itself, so the steps are bit for bit those of the optimiser. Between ``zero_grad`` and
    the step all is as in SB3: the gradients are in ``p.grad``, scaled, and stay there. The optimiser's own state is up
    to date when the block is left, by an exception too.

    An optimiser of another kind, of many parameters, in a state that has no flat form (several groups, parameters that
    are not its own or that have taken different numbers of steps), or with something attached that could look at it
    between two steps (a hook of the optimiser, of all optimisers, of a parameter or a module; a method replaced, as
    learning rate schedulers do), steps itself.

    Args:
        optimizer: The optimiser.
        module: Whose trainable parameters it moves.
        frozen: Parameters that are not to be moved; in the block they have no gradient, afterwards that from before.
        fused: Run Adam as one kernel where torch has one; it rounds differently in the last bit.
        reduction: Between the workers that are to round alike; where one cannot, none does.
        lowest: See `Lowest`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        module: nn.Module,
        frozen: AbstractSet[nn.Parameter] = frozenset(),
        *,
        fused: bool = False,
        reduction: Reduction = ALONE,
        lowest: Lowest | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._frozen = frozen
        self._fused = fused
        self._lowest: Lowest = lowest or {}
        self._params = [param for param in trainable(module) if param not in frozen]
        self._by_itself = (
            not is_plain_adam(optimizer, module, self._params)
            or is_observed(module)
            or (not fused and sum(param.numel() for param in self._params) > LARGEST_FLAT)
        )
        if reduction.workers > 1:
            self._by_itself = reduction.any(torch.tensor(self._by_itself))
        self._reached: list[nn.Parameter] = []
        self._flat: FlatAdam | None = None
        self._set_aside: list[tuple[nn.Parameter, Tensor | None]] = []

    def __enter__(self) -> FlatOptimizer:
        """Nothing is laid out before the first step shows which parameters have gradients."""
        self._set_aside = [(param, param.grad) for param in self._frozen]
        for param in self._frozen:
            param.grad = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Bring the optimiser's state up to date."""
        self._write_back()
        for param, grad in self._set_aside:
            param.grad = grad

    def descend(self, loss: Tensor, max_norm: float | None = None, *, reduction: Reduction = ALONE) -> bool:
        """Step the parameters that a loss reaches along its gradient.

        Args:
            loss: A scalar with its graph, which is released.
            max_norm: The gradient is scaled down to this norm if its own is larger; None to leave it as it is.
            reduction: Of whose samples the loss is a share.

        Returns:
            False, and nothing has moved, if ``max_norm`` is given and the gradient's norm is not finite.
        """
        self._clear()
        if not self._backward(loss):
            return True
        reached = [param for param in self._params if param.grad is not None]
        if reduction.workers > 1:
            _set_gradients(reached, reduction.gradients(_gradients(reached)))
        return self._step_within(reached, max_norm)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """The gradient of a loss, whose graph is released, by every parameter that may be moved."""
        self._clear()
        self._backward(loss)
        return [torch.zeros_like(param) if param.grad is None else param.grad for param in self._params]

    def no_gradients(self) -> list[Tensor]:
        """What `gradients` would return of a loss that nothing reaches."""
        self._clear()
        return [torch.zeros_like(param) for param in self._params]

    def descend_along(self, totals: Sequence[Tensor], max_norm: float | None = None) -> bool:
        """Step along the total of what `gradients` returned to each worker; see `descend`."""
        reached = [param for param in self._params if param.grad is not None]
        if not reached:
            return True
        _set_gradients(
            reached, [total for param, total in zip(self._params, totals, strict=True) if param.grad is not None]
        )
        return self._step_within(reached, max_norm)

    def _clear(self) -> None:
        if self._by_itself:
            self._optimizer.zero_grad()
        else:
            for param in self._params:
                param.grad = None

    def _step_within(self, reached: list[nn.Parameter], max_norm: float | None) -> bool:
        """Step along the gradients, scaled down to a norm; False, and nothing has moved, if theirs is not finite."""
        if reached and max_norm is not None and not _clip(_gradients(reached), max_norm):
            return False
        self._step(reached)
        return True

    def _step(self, reached: list[nn.Parameter]) -> None:
        """Step along the gradients, by the flat Adam where that may."""
        if self._by_itself or not reached:
            self._step_by_itself()
            return
        if len(reached) != len(self._reached) or any(a is not b for a, b in zip(reached, self._reached, strict=True)):
            self._write_back()
            self._reached = reached
            if _has_a_flat_form(self._optimizer, reached):
                self._flat = FlatAdam(self._optimizer, reached, fused=self._fused, lowest=self._lowest)
        if self._flat is not None:
            self._flat.step()
        else:
            self._step_by_itself()

    @torch.no_grad()
    def _step_by_itself(self) -> None:
        self._optimizer.step()
        for param, lowest in self._lowest.items():
            param.clamp_(min=lowest)

    def _backward(self, loss: Tensor) -> bool:
        """Fill in the gradients of what is to be moved; False if nothing that the loss is made of can move."""
        if not loss.requires_grad:
            return False
        if not self._frozen:
            loss.backward()  # type: ignore[no-untyped-call]
        elif self._params:  # without what only the frozen ones need
            loss.backward(inputs=self._params)  # type: ignore[no-untyped-call]
        return True

    def _write_back(self) -> None:
        flat, self._flat, self._reached = self._flat, None, []
        if flat is not None:
            flat.write_back(self._optimizer)


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of several tensors together, rounded as `torch.nn.utils.clip_grad_norm_` rounds it."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


def _gradients(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


def _set_gradients(params: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient


def _clip(gradients: list[Tensor], max_norm: float) -> bool:
    """`torch.nn.utils.clip_grad_norm_`, but of a norm that is finite alone; whether it is."""
    norm = gradient_norm(gradients)
    finite = math.isfinite(norm)
    if finite:
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return finite


class FlatAdam:
    """Torch's own Adam on a flat copy of some parameters, with a flat copy of an optimiser's state.

    Args:
        optimizer: An optimiser of which `is_plain_adam` and `has_one_state` say that it has a flat form.
        params: The parameters.
        fused: Run Adam as one kernel where torch has one.
        lowest: See `Lowest`.

    Attributes:
        vector: The parameters, ``(P,)``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        params: list[nn.Parameter],
        *,
        fused: bool,
        lowest: Lowest | None = None,
    ) -> None:
        self._params = params
        self.vector = nn.Parameter(flatten(params).detach())
        self._views = list(unflatten(self.vector.detach(), params))
        pieces = self.pieces(self.vector.detach())
        self._bounded = [(pieces[param], bound) for param, bound in (lowest or {}).items() if param in pieces]
        kind = torch.optim.AdamW if isinstance(optimizer, torch.optim.AdamW) else torch.optim.Adam
        self._adam = kind([self.vector])
        self._group = group = self._adam.param_groups[0]
        group.update({key: value for key, value in optimizer.param_groups[0].items() if key != "params"})
        group["fused"] = True if fused and has_fused_adam(self.vector.device.type) else None
        # The fused kernel wants the number of steps where the parameters are, the plain one on the CPU.
        step_device = self.vector.device if group["fused"] else torch.device("cpu")
        states = [optimizer.state[param] for param in params if param in optimizer.state]
        if states:
            self._adam.state[self.vector] = {
                key: value.to(step_device, copy=True) if key == "step" else flatten([state[key] for state in states])
                for key, value in states[0].items()
            }
        self._is_usual = kind is torch.optim.Adam and not any(
            group[option] for option in ("weight_decay", "amsgrad", "maximize")
        )

    def pieces(self, vector: Tensor) -> dict[nn.Parameter, Tensor]:
        """Views of a vector ``(P,)``, by parameter."""
        return dict(zip(self._params, unflatten(vector, self._params), strict=True))

    def step(self) -> None:
        """One step of Adam along the parameters' gradients, which brings the parameters along."""
        self.vector.grad = flatten(_gradients(self._params))
        self._adam.step()
        self._raise()
        self.bring_along()

    def _raise(self) -> None:
        for piece, lowest in self._bounded:
            piece.clamp_(min=lowest)

    def step_along(self, gradient: Tensor) -> None:
        """One step of Adam of the vector alone, without telling those who watch optimisers."""
        self._step_along(gradient)
        self._raise()

    def _step_along(self, gradient: Tensor) -> None:
        state, group = self._adam.state.get(self.vector), self._group
        if not (self._is_usual and state):
            self.vector.grad = gradient
            self._adam.step()
            return
        # What the optimiser would call, without what it does before.
        beta1, beta2 = group["betas"]
        adam(
            [self.vector.detach()],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            fused=bool(group["fused"]),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )

    @torch.no_grad()
    def take_over(self, reduction: Reduction) -> None:
        """The first worker's vector and state, in one message; that has stepped, where this one may not have."""
        state = self._adam.state[self.vector]
        if not state:
            kinds = ("exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * self._group["amsgrad"])
            state.update({"step": torch.zeros(())} | {kind: torch.zeros_like(self.vector) for kind in kinds})
        names = sorted(state)
        vector, *others = reduction.of_first([self.vector, *(state[name] for name in names)])
        self.vector.copy_(vector)
        state.update(zip(names, others, strict=True))

    @torch.no_grad()
    def bring_along(self) -> None:
        """Write the vector into the parameters."""
        torch._foreach_copy_(list[Tensor](self._params), self._views)

    def write_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimiser the state that it would have."""
        for key, value in self._adam.state[self.vector].items():
            pieces = [value] * len(self._params) if key == "step" else unflatten(value, self._params)
            for param, piece in zip(self._params, pieces, strict=True):
                optimizer.state[param][key] = piece.clone()


class FlatDescent:
    """Adam along gradients that somebody writes into a vector, of parameters that are read from a vector.

    When the block is left, by an exception too, parameters and the optimiser's state are brought up to date, and the
    gradient of the last step is in ``p.grad``.

    Args:
        optimizer: An optimiser that `can_descend`.
        params: The parameters.
        others: Those that no gradient reaches, and of which none from before is left.
        lowest: See `Lowest`.

    Attributes:
        parameters: Where they are in the block.
        gradient: The vector ``(P,)`` to step along; zero at first.
        gradients: Views of it, by parameter.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        params: list[nn.Parameter],
        others: Iterable[nn.Parameter] = (),
        lowest: Lowest | None = None,
    ) -> None:
        self._optimizer, self._params, self._others, self._lowest = optimizer, params, list(others), lowest
        self._has_stepped = False

    def __enter__(self) -> FlatDescent:
        """Lay the parameters and the optimiser's state out as vectors."""
        self._adam = FlatAdam(self._optimizer, self._params, fused=True, lowest=self._lowest)
        self.parameters = self._adam.pieces(self._adam.vector.detach())
        self.gradient = torch.zeros_like(self._adam.vector.detach())
        self.gradients = self._adam.pieces(self.gradient)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write parameters, gradients and state back."""
        if self._has_stepped:
            self._adam.bring_along()
            self._adam.write_back(self._optimizer)
            for param, gradient in self.gradients.items():
                param.grad = gradient.clone()
            for param in self._others:
                param.grad = None

    def step(self) -> None:
        """One step along the gradient."""
        self._has_stepped = True
        self._adam.step_along(self.gradient)


def take_over_steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], reduction: Reduction) -> None:
    """Take over the first worker's parameters and state of an optimiser, for what rounds otherwise elsewhere.

    Args:
        optimizer: An optimiser that `can_descend`, and has stepped where the first worker is.
        params: The parameters.
        reduction: Of the workers.
    """
    adam = FlatAdam(optimizer, params, fused=True)
    adam.take_over(reduction)
    adam.bring_along()
    adam.write_back(optimizer)


def can_descend(optimizer: torch.optim.Optimizer, module: HasParameters, params: Sequence[nn.Parameter]) -> bool:
    """Whether a `FlatDescent` takes the steps of an optimiser; see `is_plain_adam`."""
    return is_plain_adam(optimizer, module, params) and has_one_state(optimizer, params)


def has_one_state(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter]) -> bool:
    """Whether an Adam has stepped all of some parameters equally often."""
    states: list[dict[str, Any]] = [optimizer.state.get(param, {}) for param in params]
    return len({float(state["step"]) if "step" in state else None for state in states}) == 1


def _has_a_flat_form(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> bool:
    """Whether one vector can stand for the parameters that have gradients."""
    kinds = {(param.device, param.dtype, None if param.grad is None else param.grad.layout) for param in params}
    return has_one_state(optimizer, params) and len(kinds) == 1 and kinds.pop()[2] is torch.strided


def is_plain_adam(optimizer: torch.optim.Optimizer, module: HasParameters, params: Sequence[nn.Parameter]) -> bool:
    """Whether the steps of some parameters are those of torch's Adam, unobserved, with one setting for all.

    Args:
        optimizer: The optimiser.
        module: Whose parameters it may have, and no others.
        params: The parameters.
    """
    kind, group = type(optimizer), optimizer.param_groups[0]
    return (
        kind in (torch.optim.Adam, torch.optim.AdamW)
        and vars(optimizer).keys() <= _own_attributes(kind)
        and all(_is_torchs(getattr(kind, method)) for method in ("step", "zero_grad"))
        and not _has_hooks(vars(optimizer))
        and not _has_hooks(vars(sys.modules[torch.optim.Optimizer.__module__]))
        and len(optimizer.param_groups) == 1
        and {*params} <= {*group["params"]} <= {*module.parameters()}
        and not any(group.get(flag) for flag in ("foreach", "capturable", "differentiable", "fused"))
    )


def is_observed(module: nn.Module) -> bool:
    """Whether a hook of a parameter or of a module, its own or for all, may look at a gradient on its way."""
    return (
        _has_hooks(vars(nn.modules.module))
        or any(_has_hooks(vars(each)) for each in module.modules())
        or any(param._backward_hooks or param._post_accumulate_grad_hooks for param in module.parameters())
    )


def is_awaited(param: nn.Parameter) -> bool:
    """Whether somebody holds the node at which a parameter's gradient arrives: a multi-gradient hook, or a graph.

    Torch makes that node where it is asked for it, and forgets it with whoever holds it; so does a mark left on it.
    """

    def notes() -> Any:
        return get_gradient_edge(param).node.metadata

    notes()["asked"] = True
    return bool(notes().pop("asked", False))


def _has_hooks(attributes: Mapping[str, Any]) -> bool:
    return any(name.endswith("_hooks") and isinstance(value, dict) and value for name, value in attributes.items())


@cache
def _own_attributes(kind: type[torch.optim.Optimizer]) -> frozenset[str]:
    """What an optimiser has of itself; whoever replaces one of its methods adds to it."""
    return frozenset(vars(kind([torch.zeros(1)])))  # type: ignore[call-arg]


def _is_torchs(method: Any) -> bool:
    """Whether a method, and all that it is wrapped in, is torch's own code."""
    while method is not None:
        code = getattr(method, "__code__", None)
        if code is None or not code.co_filename.startswith(_TORCHS_CODE):
            return False
        method = getattr(method, "__wrapped__", None)
    return True


@cache
def has_fused_adam(device: str) -> bool:
    """Whether torch has Adam as one kernel for a type of device."""
    try:
        torch.optim.Adam([torch.zeros(1, device=device)], fused=True)
    except RuntimeError:
        return False
    return True
