"""From many samples to one number: every mean, sum, maximum and count over samples is taken here.

Samples may be spread over workers, each with its part. What a worker computes of its part is a *share*, with its graph;
shares of one quantity become the quantity by `Reduction.total`, which is the same for all workers. In one process a
share is the whole, and nothing happens.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sb3_trpo_ext.core.parameters import flatten, unflatten

FEW = 64
"""Numbers up to which a total is the sum of what every worker tells."""


class Reduction:
    """Samples of one process. One for W workers overrides `workers`, `total`, `_largest` and `gather`.

    All workers have equally many samples of a rollout and of a minibatch, and call these methods in the same order.
    Those that take several things at once are made of the others here; `SharedReduction` makes them one message.
    """

    workers = 1
    rank = 0

    # Between workers.

    def total(self, share: Tensor) -> Tensor:
        """The sum of the shares of all workers, of a tensor without a graph."""
        return share

    def _largest(self, here: Tensor) -> Tensor:
        """The elementwise maximum over workers."""
        return here

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all workers, ``(W · N, ...)``, one worker after the other."""
        return rows

    # Several at once.

    def totals(self, vectors: Sequence[Tensor], sums: Tensor, largest: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Totals of vectors of any shapes and of some numbers ``(S,)``, and the maximum of others ``(M,)``."""
        if self.workers == 1:
            return list(vectors), sums, largest
        return self.gradients(vectors), self.total(sums), self._largest(largest)

    def totals_and_parts(
        self, vectors: Sequence[Tensor], sums: Tensor, largest: Tensor, mine: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """`totals`, and what each worker has of some numbers ``(n,)``, one after the other, ``(W · n,)``."""
        return *self.totals(vectors, sums, largest), self.gather(mine)

    def largest_of(self, here: Tensor) -> Tensor:
        """The maximum over workers of each of some numbers ``(M,)``."""
        return self._largest(here)

    def gather_all(self, tensors: Sequence[Tensor], *, alike: bool = True) -> list[Tensor]:
        """The rows of all workers of several tensors, one worker after the other.

        Args:
            tensors: Each with as many rows as the others.
            alike: Whether all workers have equally many.
        """
        return [self.gather(tensor) for tensor in tensors]

    def of_first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the first worker has of tensors that all of them have computed, for what rounds otherwise elsewhere."""
        return list(tensors)

    def moments(self, values: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance over all samples, ``(..., n)`` -> ``(...)`` each, in float64.

        Of each worker's own moments (Chan, Golub and LeVeque 1979), so that nothing cancels; all workers merge the
        same ones and have the same bits.

        Args:
            values: This worker's.
            weights: What a sample weighs, ``(n,)``; None for equal weights. Those of weight zero do not count.
        """
        parts = self.gather(moments_here(values, weights)).view(self.workers, -1)
        mean, variance = merged_moments(parts)
        return mean.view(values.shape[:-1]), variance.view(values.shape[:-1])

    # Over samples.

    def count(self, here: int) -> int:
        """All samples, of which ``here`` are this worker's."""
        return self.workers * here

    def mean(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """This worker's share of a mean over samples, ``(N,)`` -> ``()``.

        Args:
            values: One number a sample.
            weights: What a sample weighs, the sum over all being one, or less for a part of a batch; None for equal
                weights of all that are given.
        """
        if weights is not None:
            return (weights * values).sum()
        return values.sum() / self.count(len(values))

    def number(self, share: Tensor) -> float:
        """A total as a number."""
        return float(self.total(share.detach()))

    def largest(self, values: Tensor) -> Tensor:
        """The maximum over all samples, ``(N,)`` -> ``()``, without a graph; NaN if there is one."""
        return self._largest(self.largest_share(values))

    @staticmethod
    def largest_share(values: Tensor) -> Tensor:
        """The maximum over the samples at hand, of whose like `largest` makes that over all."""
        return values.detach().max()

    def smallest(self, values: Tensor) -> Tensor:
        """The minimum over all samples, ``(N,)`` -> ``()``, without a graph; NaN if there is one."""
        return -self.largest(-values)

    def any(self, flags: Tensor) -> bool:
        """Whether anything holds for any sample: True where one is neither False nor zero."""
        return bool(self._largest((flags != 0).any().to(torch.uint8)))

    def standardized(self, values: Tensor, parts: Tensor | None = None) -> Tensor:
        """(x - mean) / (std + 1e-8) with the unbiased standard deviation, as SB3 standardises a minibatch.

        Args:
            values: This worker's.
            parts: `moments_here` of each worker, ``(W, 4)``, if they have been told.
        """
        if self.workers == 1:
            return (values - values.mean()) / (values.std() + 1e-8)
        if parts is None:
            return self.standardized_rows(values[None])[0]
        mean, variance = merged_moments(parts)
        return ((values.double() - mean) / (variance.sqrt() + 1e-8)).to(values.dtype)

    def standardized_rows(self, values: Tensor) -> Tensor:
        """The same for each row of ``(M, n)``, a minibatch of which this worker has n samples."""
        if self.workers == 1:
            return (values - values.mean(dim=1, keepdim=True)) / (values.std(dim=1, keepdim=True) + 1e-8)
        mean, variance = self.moments(values)
        return ((values.double() - mean[:, None]) / (variance[:, None].sqrt() + 1e-8)).to(values.dtype)

    def gradients(self, shares: Sequence[Tensor]) -> list[Tensor]:
        """The totals of gradients of any shapes, in one exchange."""
        if self.workers == 1:
            return list(shares)
        flat = self.total(flatten(shares))
        return list(unflatten(flat, shares))


def moments_here(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """What `merged_moments` is to be told of one worker's samples; see `Reduction.moments`.

    Args:
        values: S quantities of each sample, ``(..., n)``.
        weights: What a sample weighs, ``(n,)``; None for equal weights.

    Returns:
        The S means and sums of squared deviations, the sum of weights and the number of samples, ``(2S + 2,)``.
    """
    wide = values.detach().double()
    given = wide.new_ones(wide.shape[-1]) if weights is None else weights.double()
    here = given.sum()
    mean = (given * wide).sum(dim=-1) / here if bool(here > 0) else torch.zeros_like(wide[..., 0])
    deviation = (given * (wide - mean[..., None]).square()).sum(dim=-1)
    return torch.cat([mean.flatten(), deviation.flatten(), torch.stack([here, (given > 0).sum().double()])])


def merged_moments(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over all workers, ``(S,)`` each.

    Args:
        parts: `moments_here` of each worker, ``(W, 2S + 2)``.
    """
    size = (parts.shape[1] - 2) // 2
    means, deviations, (weights, counts) = parts[:, :size], parts[:, size : 2 * size], parts[:, 2 * size :].T
    shares, count = (weights / weights.sum())[:, None], counts.sum()
    mean = (shares * means).sum(dim=0)
    within, between = deviations.sum(dim=0) / weights.sum(), (shares * (means - mean).square()).sum(dim=0)
    return mean, (within + between) * (count / (count - 1))


ALONE = Reduction()
"""That of a single process."""


class Communicator(Protocol):
    """Messages between W workers, each of which all of them take part in, in the same order.

    What others have told holds until the next message of that kind and size, which may be written in its place.
    """

    @property
    def workers(self) -> int:
        """W."""

    @property
    def rank(self) -> int:
        """Which of them this process is, from 0."""

    def all_reduce(self, vector: Tensor) -> Tensor:
        """The sum over workers, the same bits for all of them, ``(n,)``."""

    def all_gather(self, vector: Tensor) -> list[Tensor]:
        """What each worker has, ``(n,)`` each."""

    def broadcast(self, vector: Tensor) -> Tensor:
        """What the worker of rank 0 has, ``(n,)``."""


class SharedReduction(Reduction):
    """Samples of W workers.

    Args:
        communicator: Between them.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self.workers, self.rank = communicator.workers, communicator.rank

    def __deepcopy__(self, memo: object) -> "SharedReduction":
        """Itself: there is one group of processes."""
        return self

    def total(self, share: Tensor) -> Tensor:
        """See `Reduction.total`; few numbers are told to all, and added by each."""
        flat = share.detach().reshape(-1)
        if flat.numel() > FEW:
            return self._communicator.all_reduce(flat).view(share.shape)
        return torch.stack(self._communicator.all_gather(flat)).sum(dim=0).view(share.shape)

    def _largest(self, here: Tensor) -> Tensor:
        parts = self._communicator.all_gather(here.detach().reshape(-1))
        return torch.stack(parts).amax(dim=0).view(here.shape)

    def gather(self, rows: Tensor) -> Tensor:
        """See `Reduction.gather`."""
        (gathered,) = self.gather_all([rows])
        return gathered

    def totals(self, vectors: Sequence[Tensor], sums: Tensor, largest: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """See `Reduction.totals`.

        In one sum over workers, of which those numbers that are to be summed are a part; of the others each has places
        of its own in it, where all others add zero.
        """
        if not vectors:
            numbers = torch.cat([sums.detach(), largest.detach()])
            told = torch.stack(self._communicator.all_gather(numbers.double())).to(numbers)
            return [], told[:, : len(sums)].sum(dim=0), told[:, len(sums) :].amax(dim=0)
        found, total, told = self._with_places(vectors, sums, largest.detach())
        return found, total, told.amax(dim=0).to(largest) if len(largest) else largest

    def totals_and_parts(
        self, vectors: Sequence[Tensor], sums: Tensor, largest: Tensor, mine: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """See `Reduction.totals_and_parts`; in one message if there are vectors.

        Where these are narrower than the numbers, a number is told as what it is in their precision, and the rest.
        """
        if not vectors:
            return super().totals_and_parts(vectors, sums, largest, mine)
        rounded = mine.to(vectors[0].dtype)
        numbers = torch.cat([largest.detach().to(rounded), rounded, (mine - rounded).to(rounded)])
        found, total, told = self._with_places(vectors, sums, numbers)
        most, first, rest = torch.split(told, [len(largest), len(mine), len(mine)], dim=1)
        return found, total, most.amax(dim=0).to(largest), (first.to(mine) + rest.to(mine)).flatten()

    def _with_places(
        self, vectors: Sequence[Tensor], sums: Tensor, numbers: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Totals of vectors and of some numbers, and what each worker has of others, ``(W, len(numbers))``."""
        flat = [vector.detach().reshape(-1) for vector in vectors]
        places = flat[0].new_zeros(self.workers, len(numbers))
        places[self.rank] = numbers.to(places)
        found = self._communicator.all_reduce(torch.cat([*flat, sums.detach().to(places), places.view(-1)]))
        *pieces, total, told = torch.split(found, [*map(len, flat), len(sums), places.numel()])
        shaped = [piece.view(vector.shape) for piece, vector in zip(pieces, vectors, strict=True)]
        return shaped, total.to(sums), told.view(self.workers, -1)

    def gradients(self, shares: Sequence[Tensor]) -> list[Tensor]:
        """See `Reduction.gradients`; no message where there is none."""
        return super().gradients(shares) if shares else []

    def gather_all(self, tensors: Sequence[Tensor], *, alike: bool = True) -> list[Tensor]:
        """See `Reduction.gather_all`: the bytes of all tensors in one message, after one of their numbers of rows."""
        rows = [len(tensors[0])] * self.workers
        if not alike:
            rows = torch.stack(self._communicator.all_gather(torch.tensor([len(tensors[0])]))).flatten().tolist()
        packed = _packed(tensors)
        row = sum(tensor.shape[1:].numel() * tensor.element_size() for tensor in tensors)
        parts = self._communicator.all_gather(torch.cat([packed, packed.new_zeros(max(rows) * row - len(packed))]))
        if min(rows) == max(rows):
            return _columns(torch.stack(parts), tensors)
        columns = [_unpacked(part, tensors, count) for part, count in zip(parts, rows, strict=True)]
        return [torch.cat(column) for column in zip(*columns, strict=True)]

    def of_first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Reduction.of_first`."""
        return _unpacked(self._communicator.broadcast(_packed(tensors)), tensors)


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of some tensors, one after the other, where the first one is."""
    return torch.cat(
        [tensor.detach().to(tensors[0].device).contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    )


def _columns(parts: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of W times the rows of some others, from the bytes of W workers, ``(W, bytes)``."""
    found, end = [], 0
    for tensor in like:
        start, end = end, end + tensor.numel() * tensor.element_size()
        rows = parts[:, start:end].contiguous().view(tensor.dtype)
        found.append(rows.view(len(parts) * len(tensor), *tensor.shape[1:]).to(tensor.device))
    return found


def _unpacked(packed: Tensor, like: Sequence[Tensor], rows: int | None = None) -> list[Tensor]:
    """Tensors like some others, with so many rows if given, from their bytes; see `_packed`."""
    found, end = [], 0
    for tensor in like:
        shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
        start, end = end, end + torch.Size(shape).numel() * tensor.element_size()
        found.append(packed[start:end].clone().view(tensor.dtype).view(shape).to(tensor.device))
    return found
