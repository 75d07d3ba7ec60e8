"""What one update sees: the samples, their weights, and how to ask the policy for π(·|s) and V(s)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor

from sb3_trpo_ext.core.reduction import ALONE, Reduction, merged_moments
from sb3_trpo_ext.rollout.action_values import Evaluated, has_action_values, of_taken


@dataclass(frozen=True)
class Batch:
    """N samples of a rollout.

    Attributes:
        observations: Tensor ``(N, ...)`` or a dict of them; see `inputs`.
        actions: As the policy's ``log_prob`` takes them.
        old_log_prob: log π_old(a|s), ``(N,)``.
        advantages: Â, ``(N,)``.
        returns: Regression targets of the critic, ``(N,)``.
        old_values: What the critic said when they were collected, ``(N,)``.
        weights: Sample weights, ``(N,)``, summing to 1 over the whole batch and to less over a part of it, such as
            that of one of several workers.
        action_masks: Which actions were allowed, as sb3-contrib's maskable policies take them, ``(N, K)``; or None.
        old_z: The coordinates of π_old, ``(N, K)``, where an algorithm needs them; or None.
        action_advantages: A(s,·) of all K actions, ``(N, K)``, where the surrogate is the sum over them; or None.
        reduction: How what samples say becomes a number; see `core.reduction`.
    """

    observations: PyTorchObs
    actions: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    old_values: Tensor
    weights: Tensor
    action_masks: Tensor | None = None
    old_z: Tensor | None = None
    action_advantages: Tensor | None = None
    reduction: Reduction = ALONE

    is_drawn_evenly: ClassVar[bool] = True
    """Whether `_drawn` draws as many samples as it is asked for, by every worker the same."""

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: slice | Tensor) -> Batch:
        """A part of the batch: views of it by a slice, copies by a tensor of indices."""
        return type(self)(**self.rows(lambda column: column[index]), reduction=self.reduction)

    def rows(self, change: Callable[[Tensor], Tensor] = lambda column: column) -> dict[str, Any]:
        """The fields that have a row for each sample, by name, each tensor of them changed."""
        return {name: _map(getattr(self, name), change) for name in _columns(self)}

    @staticmethod
    def joined(batches: Sequence[Batch]) -> Batch:
        """All samples of several batches of one kind, their weights as they are."""
        if len(batches) == 1:
            return batches[0]
        columns = {name: _join([getattr(batch, name) for batch in batches]) for name in _columns(batches[0])}
        return replace(batches[0], **columns)

    def gathered(self) -> Batch:
        """The samples of all workers, which each of them then has whole."""
        if self.reduction.workers == 1:
            return self
        columns: list[Tensor] = []
        self.rows(lambda column: columns.append(column) or column)  # type: ignore[func-returns-value]
        whole = iter(self.reduction.gather_all(columns, alike=self.is_drawn_evenly))
        return type(self)(**self.rows(lambda column: next(whole)))

    @property
    def places(self) -> int:
        """What a forward pass over the whole batch goes through: its samples, and their padding."""
        return len(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the observations."""
        tensors = self.observations.values() if isinstance(self.observations, dict) else [self.observations]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def not_finite(self) -> Tensor:
        """The samples with an observation that is NaN or infinite somewhere."""
        tensors = self.observations.values() if isinstance(self.observations, dict) else [self.observations]
        odd = torch.stack([~tensor.isfinite().flatten(start_dim=1).all(dim=1).cpu() for tensor in tensors])
        return torch.nonzero(odd.any(dim=0)).flatten()

    @property
    def inputs(self) -> PyTorchObs:
        """The observations on the device of the weights, the policy's; what is large moves there part by part."""
        device = self.weights.device
        if isinstance(self.observations, dict):
            return {key: value.to(device) for key, value in self.observations.items()}
        return self.observations.to(device)

    def split(self, size: int | None) -> Sequence[Batch]:
        """Parts of at most ``size`` samples in order; the whole batch if None."""
        if size is None or size >= len(self):
            return [self]
        return [self[start : start + size] for start in range(0, len(self), size)]

    def in_order(self, rows: Sequence[Tensor], size: int | None = None) -> Tensor:
        """Rows of the parts of ``split(size)`` -> rows of the batch, ``(N, ...)``."""
        return torch.cat(list(rows))

    def subset(self, size: int | None, worth: float = math.inf) -> Batch:
        """At most ``size`` samples of all workers, drawn without replacement by each from its own.

        They are gathered, so that each worker has them whole and `reduction` is that of one process, unless they take
        more bytes than ``worth``; then each keeps its own. NumPy's global generator draws, the one from which SB3's
        rollout buffers draw their minibatches; nothing is drawn if the batch is no larger than ``size``, or that is
        None.

        Args:
            size: Most samples; None for all.
            worth: Bytes that to gather them is worth.
        """
        workers = self.reduction.workers
        here = len(self) if size is None else -(-size // workers)
        part = self if here >= len(self) else self._drawn(here)
        if workers == 1:
            return self if part is self else part.reweighted()
        if workers * min(here, len(self)) * self.row_bytes > worth:  # the same for all workers
            return self if part is self else part.reweighted()
        return part.gathered().reweighted()

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        sizes: list[int] = []
        self.rows(lambda column: sizes.append(column.shape[1:].numel() * column.element_size()) or column)  # type: ignore[func-returns-value]
        return sum(sizes)

    def _drawn(self, size: int) -> Batch:
        """So many samples, in order."""
        return self[torch.from_numpy(np.sort(np.random.permutation(len(self))[:size]))]

    def reweighted(self) -> Batch:
        """The same samples with weights that sum to one."""
        return replace(self, weights=self.weights / self.reduction.total(self.weights.sum()))

    def distribution(self, policy: Any) -> Distribution:
        """π(·|s), of which `unpadded` rows are the samples' own.

        SB3 keeps one object for it: it holds until the policy's next forward pass.
        """
        return policy.get_distribution(self.inputs, **self._masks)

    def values(self, policy: Any) -> Tensor:
        """What the critic says of the samples: V(s), or Q(s,a) where it has a value for each action, ``(N,)``."""
        if has_action_values(policy):
            return of_taken(policy.action_values(self.inputs), self.actions)
        values: Tensor = policy.predict_values(self.inputs)
        return values.flatten()

    def evaluate_actions(self, policy: ActorCriticPolicy) -> tuple[Tensor, Tensor, Tensor | None]:
        """V(s), log π(a|s) and, if it has a closed form, the entropy of π(·|s), ``(N,)`` each, in one forward pass."""
        values, log_prob, entropy = policy.evaluate_actions(self.inputs, self.actions, **self._masks)
        return values.flatten(), log_prob, entropy

    def evaluate_action_values(self, policy: Any) -> Evaluated:
        """Q(s,·), ``(N, K)``, in place of V(s)."""
        evaluated: Evaluated = policy.evaluate_action_values(self.inputs, self.actions, **self._masks)
        return evaluated

    @property
    def _masks(self) -> dict[str, Tensor]:
        """The masks, by the name that policies have for them."""
        return {} if self.action_masks is None else {"action_masks": self.action_masks}

    def over_actions(self, values: Tensor) -> Tensor:
        """Σ_a π_old(a|s) x(s,a), for categorical actions and a batch that has `old_z`: ``(N, K)`` -> ``(N,)``.

        What there is of the actions taken alone, ``(N,)``, stays as it is.
        """
        if values.dim() == 1:
            return values
        assert self.old_z is not None  # which is log π_old
        return (self.old_z.exp() * values).sum(dim=1)

    def padded(self, rows: Tensor) -> Tensor:
        """Samples -> the rows that the policy is given; there is nothing to pad here."""
        return rows

    def unpadded(self, rows: Tensor) -> Tensor:
        """What the policy returned -> the rows of the samples."""
        return rows

    def mean(self, values: Tensor) -> Tensor:
        """This part's share of the weighted mean of ``values`` ``(N,)`` over the whole batch."""
        return self.reduction.mean(values, self.weights)

    def with_normalized_advantages(self, parts: Tensor | None = None) -> Batch:
        """(Â - mean) / std over the samples of positive weight, with the unbiased standard deviation.

        Args:
            parts: `moments_here` of the advantages of each worker, ``(W, 4)``, if they have been told.
        """
        if self.reduction.workers > 1:
            told = self.reduction.moments(self.advantages, self.weights) if parts is None else merged_moments(parts)
            mean, variance = told
            advantages = (self.advantages.double() - mean) / (variance.sqrt() + 1e-8)
            return replace(self, advantages=advantages.to(self.advantages.dtype))
        total = self.reduction.total
        centred = self.advantages - total(self.mean(self.advantages))
        centred = centred - total(self.mean(centred))  # what rounding left of a mean that is large beside the rest
        count = total((self.weights > 0).sum())
        variance = total(self.mean(centred.square())) * count / (count - 1)
        if not variance < math.inf:
            largest = self.reduction.largest(centred.abs())
            if 1 < largest < math.inf:  # only the squares overflow
                return replace(self, advantages=centred / largest).with_normalized_advantages()
        return replace(self, advantages=centred / (variance.sqrt() + 1e-8))


def fits(chunks: Sequence[Batch], size: int | None) -> bool:
    """Whether the graphs of all chunks may be kept at once where those of ``size`` samples may; None for any number."""
    return len(chunks) == 1 or size is None or sum(chunk.places for chunk in chunks) <= size


def _columns(batch: Batch) -> list[str]:
    """The fields of a batch that have a row for each sample."""
    return [field.name for field in fields(batch) if field.name != "reduction"]


def _map(column: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor of a field."""
    if column is None:
        return None
    if isinstance(column, dict):
        return {key: change(value) for key, value in column.items()}
    if isinstance(column, tuple):
        return tuple(map(change, column))
    return change(column)


def _join(columns: Sequence[Any]) -> Any:
    """One field of several batches, one after the other."""
    first = columns[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: torch.cat([column[key] for column in columns]) for key in first}
    if isinstance(first, tuple):
        return tuple(torch.cat(parts) for parts in zip(*columns, strict=True))
    return torch.cat(list(columns))
