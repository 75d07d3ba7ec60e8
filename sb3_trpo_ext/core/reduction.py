"""From many samples to one number: every mean, sum, maximum and count over samples is taken here.

Samples may be spread over workers, each with its part. What a worker computes of its part is a *share*, with its graph;
shares of one quantity become the quantity by `Reduction.total`, which is the same for all workers. In one process a
share is the whole, and nothing happens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sb3_trpo_ext.core.parameters import flatten, unflatten


class Reduction:
    """Samples of one process. One for W workers overrides `workers`, `total`, `_largest` and `gather`.

    All workers have equally many samples of a rollout and of a minibatch, and call these methods in the same order.
    """

    workers = 1

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

    def standardized(self, values: Tensor) -> Tensor:
        """(x - mean) / (std + 1e-8) with the unbiased standard deviation, as SB3 standardises a minibatch."""
        if self.workers == 1:
            return (values - values.mean()) / (values.std() + 1e-8)
        count = self.count(len(values))
        centred = values - self.total(self.mean(values))
        variance = self.total(centred.square().sum()) / (count - 1)
        return centred / (variance.sqrt() + 1e-8)

    def standardized_rows(self, values: Tensor) -> Tensor:
        """The same for each row of ``(M, n)``, a minibatch of which this worker has n samples."""
        if self.workers == 1:
            return (values - values.mean(dim=1, keepdim=True)) / (values.std(dim=1, keepdim=True) + 1e-8)
        count = self.count(values.shape[1])
        centred = values - self.total(values.sum(dim=1, keepdim=True)) / count
        variance = self.total(centred.square().sum(dim=1, keepdim=True)) / (count - 1)
        return centred / (variance.sqrt() + 1e-8)

    def gradients(self, shares: Sequence[Tensor]) -> list[Tensor]:
        """The totals of gradients of any shapes, in one exchange."""
        if self.workers == 1:
            return list(shares)
        flat = self.total(flatten(shares))
        return list(unflatten(flat, shares))


ALONE = Reduction()
"""That of a single process."""
