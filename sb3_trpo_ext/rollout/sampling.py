"""Actions drawn from the outputs of an actor as SB3's distributions draw them, number for number.

Torch's generator is asked for the same draws, of the same shape and in the same order, and is left in the same state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from sb3_trpo_ext.rollout.forward import Array

LARGE, CLOSE = 100.0, 1e-4
"""Up to this size of log p - log e, differences above the second are larger than what rounding makes of them."""

MASKED_LOGIT = -1e8
"""What sb3-contrib's maskable distributions put in the place of the logit of an action that is not allowed."""


class Sampler(ABC):
    """Draws the actions of one step.

    Args:
        outputs: Where the actor writes its means or logits, ``(E, K)``.
    """

    def __init__(self, outputs: Tensor) -> None:
        self._outputs, self._array = outputs, outputs.numpy()
        self._flat = self._array.reshape(-1)

    @abstractmethod
    def sample(self, masks: Array | None = None) -> Array:
        """Actions ``(E, ...)`` for what the actor has written, in memory of their own.

        Args:
            masks: Which options are allowed, ``(E, K)``; None for all.
        """


class GaussianSampler(Sampler):
    """μ + σ ε with ε from one standard normal draw a step.

    Args:
        outputs: Where the actor writes μ, ``(E, A)``.
        log_std: log σ, ``(A,)``.
    """

    def __init__(self, outputs: Tensor, log_std: Tensor) -> None:
        super().__init__(outputs)
        self._noise = torch.empty_like(outputs)
        self._noise_array = self._noise.numpy()
        self.refresh(log_std)

    def refresh(self, log_std: Tensor) -> None:
        """Take over another log σ."""
        self._std = log_std.exp().expand_as(self._noise).contiguous().numpy()  # NumPy need not broadcast

    def sample(self, masks: Array | None = None) -> Array:
        """Draw ``(E, A)``."""
        self._noise.normal_()
        actions: Array = self._noise_array * self._std
        actions += self._array
        return actions


class BernoulliSampler(Sampler):
    """Coins of torch's own."""

    def sample(self, masks: Array | None = None) -> Array:
        """Draw ``(E, A)``, float32 as in SB3."""
        return torch.bernoulli(self._outputs.sigmoid()).numpy()


class CategoricalSampler(Sampler):
    """argmax p / e with e from one exponential draw an option: what torch's ``multinomial`` does for a single sample.

    The largest p / e is the largest log p - log e, for which p need not be normalised. If the logits are exact, and
    another option comes so close that rounding could tell them apart otherwise, the quotients themselves are computed,
    as torch does.

    Args:
        outputs: Where the actor writes the logits, ``(E, K)``.
        sizes: Options of each choice.
        single: Whether there is one choice, without an axis of its own.
        exact: Whether close calls are decided as torch decides them.
    """

    def __init__(self, outputs: Tensor, sizes: tuple[int, ...], *, single: bool, exact: bool) -> None:
        super().__init__(outputs)
        n_envs = len(outputs)
        ends = np.cumsum(sizes)
        self._parts = [slice(int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True)]
        self._draws = [torch.empty(n_envs, size, dtype=torch.float32) for size in sizes]
        self._arrays = [draw.numpy() for draw in self._draws]
        self._rows = np.arange(n_envs)
        self._single, self._exact = single, exact

    def sample(self, masks: Array | None = None) -> Array:
        """Draw ``(E,)`` or ``(E, choices)``, integers."""
        logits = self._array
        if masks is not None:
            logits = np.where(masks, logits, np.float32(MASKED_LOGIT))
        chosen = []
        large = not self._flat.dot(self._flat) < LARGE**2  # they would swallow log e; NaN is not small either
        for part, draw, array in zip(self._parts, self._draws, self._arrays, strict=True):
            draw.exponential_()
            scores = logits[:, part] - np.log(array)
            best = scores.argmax(axis=1)
            doubtful = large or (self._exact and self._is_close(scores, best))
            if doubtful or (masks is not None and not masks[:, part].any(axis=1).all()):
                best = self._by_quotients(masks, part, draw)
            chosen.append(best)
        return chosen[0] if self._single else np.stack(chosen, axis=1)

    def _is_close(self, scores: Array, best: Array) -> bool:
        """Whether rounding could make another option the best one."""
        top = scores[self._rows, best]
        return not top.dot(top) < LARGE**2 or np.count_nonzero(scores > top[:, None] - CLOSE) != len(scores)

    def _by_quotients(self, masks: Array | None, part: slice, draw: Tensor) -> Array:
        """What torch does, and the error that it raises where there is no distribution.

        That is not left to torch's default, which ``python -O`` and `torch.compile` switch off.
        """
        choice = torch.distributions.Categorical(logits=self._outputs[:, part], validate_args=True)
        if masks is not None:
            allowed = torch.as_tensor(masks[:, part], dtype=torch.bool)
            choice = torch.distributions.Categorical(logits=torch.where(allowed, choice.logits, MASKED_LOGIT))
        return (choice.probs / draw).argmax(dim=1).numpy()
