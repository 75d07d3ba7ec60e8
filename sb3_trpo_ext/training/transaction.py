"""An update as one transaction: whatever goes wrong in it, it happens wholly or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from itertools import chain
from typing import Any, Protocol

import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor, nn


class Restorable(Protocol):
    """Anything that can be put back to how it was when this was made."""

    def restore(self) -> None:
        """Put it back."""


class Atomic:
    """Leave the states as they were if the block is left by any exception, KeyboardInterrupt included.

    A class rather than a generator: a generator that an interrupt leaves suspended would be closed, and would then
    restore, whenever the traceback that holds it is released.

    Args:
        states: What to put back.
    """

    def __init__(self, *states: Restorable) -> None:
        self._states = states

    def __enter__(self) -> None:
        """Nothing to do: the states were saved when they were made."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """Put the states back after an exception, which goes on."""
        if kind is not None:
            for state in self._states:
                state.restore()


class Checkpoint:
    """A bit-exact copy of some tensors that can be put back in place."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._saved = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back, in place."""
        for tensor, copy in self._saved:
            tensor.copy_(copy)


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


class Stateful(Protocol):
    """Anything with a state of nested dicts: an optimiser, a critic."""

    def state_dict(self) -> dict[str, Any]:
        """The state, or views of it."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take a state over."""


class StateCheckpoint:
    """A copy of a state (an optimiser's moments, step counts and hyperparameters) that can be put back.

    Args:
        owner: Whose state.
    """

    def __init__(self, owner: Stateful) -> None:
        self._owner = owner
        self._saved = _copied(owner.state_dict())

    def restore(self) -> None:
        """Put the state back."""
        self._owner.load_state_dict(_copied(self._saved))


def _copied(state: Any) -> Any:
    """Copy nested dicts and lists down to their tensors; a plain deepcopy would trip over graph tensors."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        copies = map(_copied, state)
        return type(state)(*copies) if hasattr(state, "_fields") else type(state)(copies)
    return deepcopy(state)


class Attributes:
    """Numbers that a model keeps beside its policy, to be put back with an update that is undone.

    Args:
        model: The model.
        *names: Its attributes.
    """

    def __init__(self, model: OnPolicyAlgorithm, *names: str) -> None:
        self.names = names
        self._model, self._saved = model, {name: getattr(model, name) for name in names}

    def restore(self) -> None:
        """Put them back."""
        for name, value in self._saved.items():
            setattr(self._model, name, value)
