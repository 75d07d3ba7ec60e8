"""Observations as the input of a network: SB3's preprocessing, flattening and concatenation, in one array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from torch import Tensor

from sb3_trpo_ext.rollout.forward import Array, NotCoveredError

Writer = Callable[[Array, Array], None]
"""Writes the features of observations ``(N, ...)`` into an array ``(N, F)``."""

WIDE = 2048
"""Features from which on one-hot vectors are not made, but their products looked up."""


class Encoder:
    """How a space becomes features.

    Args:
        space: Of vectors and of what is encoded one-hot, or a Dict of those in the order of SB3.
        by_index: Whether wide one-hot vectors may be given by the indices of their ones.

    Attributes:
        width: F, numbers in a row: features, or the indices of the ones in sums of one-hot vectors.
        dtype: float32 for features, int64 for indices.

    Raises:
        NotCoveredError: If there are images or spaces within spaces.
    """

    def __init__(self, space: spaces.Space, *, by_index: bool = True) -> None:
        self._flat = len(space.shape or ()) == 1
        parts = space.spaces if isinstance(space, spaces.Dict) else {None: space}
        self._writers: list[tuple[Any, slice, Writer]] = []
        self.dtype, self.width = torch.float32, 0
        if (
            by_index
            and isinstance(space, (spaces.Discrete, spaces.MultiDiscrete))
            and get_flattened_obs_dim(space) > WIDE
        ):
            self.dtype, self.width = torch.int64, len(_sizes(space))
            self._writers.append((None, slice(None), _indices(space)))
            return
        for key, part in parts.items():
            if is_image_space(part) or not isinstance(
                part, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
            ):
                raise NotCoveredError(f"observation space {space}")
            start, self.width = self.width, self.width + int(get_flattened_obs_dim(part))
            self._writers.append((key, slice(start, self.width), _writer(part)))

    def memory(self, *shape: int) -> Tensor:
        """Room for features, ``(*shape, F)``."""
        return torch.zeros(*shape, self.width, dtype=self.dtype)

    @property
    def is_copy(self) -> bool:
        """Whether features are the observations as they are, ``(N, F)``."""
        return len(self._writers) == 1 and self._writers[0][::2] == (None, _numbers) and self._flat

    def write(self, observations: Any, out: Array) -> None:
        """Write the features of observations ``(N, ...)``, or a dict of them, into an array ``(N, F)``."""
        for key, columns, writer in self._writers:
            writer(observations if key is None else observations[key], out if key is None else out[:, columns])


def _numbers(observations: Array, out: Array) -> None:
    out[...] = observations if observations.ndim == 2 else observations.reshape(out.shape)


def _sizes(space: spaces.Discrete | spaces.MultiDiscrete) -> list[int]:
    return [int(space.n)] if isinstance(space, spaces.Discrete) else [int(size) for size in space.nvec.reshape(-1)]


def _indices(space: spaces.Discrete | spaces.MultiDiscrete) -> Writer:
    """The places of the ones in the one-hot vectors of a space, one after the other."""
    sizes = np.array(_sizes(space))
    offsets = np.cumsum(sizes) - sizes

    def write(observations: Array, out: Array) -> None:
        chosen = observations.reshape(out.shape).astype(np.int64)
        if ((chosen < 0) | (chosen >= sizes)).any():
            raise ValueError(
                f"The observation {observations[((chosen < 0) | (chosen >= sizes)).any(axis=1)][0]} is outside of its "
                f"space {space}. Correct the environment."
            )
        np.add(chosen, offsets, out=out)

    return write


def _writer(space: spaces.Space) -> Writer:
    if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return _numbers
    indices, n_ones = _indices(space), len(_sizes(space))

    def one_hot(observations: Array, out: Array) -> None:
        ones = np.empty((len(out), n_ones), dtype=np.int64)
        indices(observations, ones)
        out[...] = 0
        np.put_along_axis(out, ones, 1, axis=1)

    return one_hot
