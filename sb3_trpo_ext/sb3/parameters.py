"""Which parameters an output reaches: told by the graph, never by a name."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sb3_trpo_ext.core.trust_region import Checkpoint


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that are not frozen, each once."""
    return [param for param in module.parameters() if param.requires_grad]


def gradient(
    terms: Iterable[Tensor], params: Sequence[nn.Parameter], *, retain_graph: bool = False
) -> dict[nn.Parameter, Tensor]:
    """Gradient of a sum of scalars, for those parameters that the graph of some term reaches.

    Each term's graph is released before the next is built, if ``terms`` builds them lazily.

    Args:
        terms: Scalars with their graphs.
        params: Candidates.
        retain_graph: Keep the graphs for further use.

    Returns:
        Gradients by parameter, in the order of ``params``; a parameter that is not reached is absent, one that is
        reached with gradient zero is present.
    """
    total: list[Tensor | None] = [None] * len(params)
    for term in terms:
        if not term.requires_grad:
            continue
        grads = torch.autograd.grad(term, params, retain_graph=retain_graph, allow_unused=True)
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


class PolicyCheckpoint(Checkpoint):
    """All parameters and buffers of a policy as they are now, frozen ones and running statistics included.

    Args:
        policy: The policy.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(chain(policy.parameters(), policy.buffers()))

    def found_broken(self) -> bool:
        """Whether a parameter, or a buffer that was finite, has become NaN or infinite since.

        What already was not finite and has not changed is the policy's own affair: a mask of -inf, a mark of NaN.
        """
        return any(_has_broken(tensor, before) for tensor, before in self._saved)


def _has_broken(tensor: Tensor, before: Tensor) -> bool:
    broken = ~tensor.isfinite()
    if not bool(broken.any()):
        return False
    if not isinstance(tensor, nn.Parameter):
        return bool(before.isfinite().all())
    same = (tensor == before) | (tensor.isnan() & before.isnan())
    return bool((broken & ~same).any())


class GradientCheckpoint:
    """What a module's parameters hold as ``grad``, to be put back.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._saved = [(param, None if param.grad is None else param.grad.clone()) for param in module.parameters()]

    def restore(self) -> None:
        """Put them back."""
        for param, grad in self._saved:
            param.grad = grad


class OptimizerCheckpoint:
    """A copy of an optimiser's state (moments, step counts, hyperparameters) that can be put back.

    Args:
        optimizer: Any torch optimiser.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._saved = _copied(optimizer.state_dict())

    def restore(self) -> None:
        """Put the state back."""
        self._optimizer.load_state_dict(_copied(self._saved))


def _copied(state: Any) -> Any:
    """Copy nested dicts and lists down to their tensors; a plain deepcopy would trip over graph tensors."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_copied(value) for value in state)
    return state
