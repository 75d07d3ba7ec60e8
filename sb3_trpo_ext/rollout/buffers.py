"""From SB3's and sb3-contrib's rollout buffers to batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples
from torch import Tensor

from sb3_trpo_ext.core.reduction import ALONE, Reduction
from sb3_trpo_ext.rollout.action_spaces import kind_of
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.sequences import SequenceBatch

MASKABLE_BUFFERS = (MaskableRolloutBuffer, MaskableDictRolloutBuffer)
RECURRENT_BUFFERS = (RecurrentRolloutBuffer, RecurrentDictRolloutBuffer)

VIEWED_BUFFERS = (RolloutBuffer, DictRolloutBuffer, *MASKABLE_BUFFERS)
"""The buffers of SB3 and sb3-contrib, whose arrays are known."""

MOVED_AT_ONCE = 256 * 2**20
"""Bytes of observations up to which all of them are put on the policy's device for the time of an update."""


def whole_rollout(buffer: RolloutBuffer, action_space: spaces.Space, reduction: Reduction = ALONE) -> Batch:
    """All samples of a full rollout buffer, ordered by time, those of a recurrent one as sequences.

    The arrays of SB3's own buffers are viewed as they are, so that a rollout of images is not in memory twice, unless a
    callback has called ``get``, which reorders them. Another class of buffer is asked by its ``get``.

    Args:
        buffer: The buffer.
        action_space: Its actions'.
        reduction: How what the samples say becomes a number.

    Raises:
        RuntimeError: If the buffer is not full.
    """
    check_full(buffer)
    if isinstance(buffer, RECURRENT_BUFFERS):
        return _sequences(buffer, action_space, reduction)
    if type(buffer) in VIEWED_BUFFERS:
        return _viewed(buffer, action_space, reduction)
    with unchanged_numpy_state():
        data = next(iter(buffer.get(batch_size=None)))
    return _of_samples(data, buffer, action_space, reduction)


def resize(buffer: RolloutBuffer, n_steps: int, n_envs: int) -> None:
    """Give a rollout buffer room for so many steps of so many environments; if it had other room, it is empty then.

    Raises:
        ValueError: If it is of a class that keeps its arrays as they were.
    """
    if (buffer.buffer_size, buffer.n_envs) == (n_steps, n_envs):
        return
    before = buffer.buffer_size, buffer.n_envs
    buffer.buffer_size, buffer.n_envs = n_steps, n_envs
    if isinstance(buffer, RECURRENT_BUFFERS):
        _, layers, _, width = buffer.hidden_state_shape
        buffer.hidden_state_shape = (n_steps, layers, n_envs, width)
    buffer.reset()
    if np.shape(buffer.rewards)[:2] != (n_steps, n_envs):
        found = np.shape(buffer.rewards)
        buffer.buffer_size, buffer.n_envs = before
        raise ValueError(
            f"The rollout buffer {type(buffer).__name__} was made for {before[0]} steps of {before[1]} environments, "
            f"and does not follow `n_steps`, now {n_steps}, or the number of environments, now {n_envs}: after its "
            f"`reset`, `rewards` has the shape {found}. Let its `reset` make arrays of `self.buffer_size` and "
            "`self.n_envs`, or make a new model."
        )


def check_full(buffer: RolloutBuffer) -> None:
    """Raise `RuntimeError` unless a rollout fills the buffer: rows that were never written must not be learnt from."""
    if not buffer.full:
        raise RuntimeError(
            f"The rollout buffer holds {buffer.pos} of {buffer.buffer_size} steps: an update needs a full one "
            "(`rollout_buffer.full` is False). Collect a whole rollout first, as `learn` does; one that a callback "
            "stopped is not whole."
        )


def by_time(buffer: RolloutBuffer, array: NDArray[Any]) -> NDArray[Any]:
    """An array of a buffer of SB3 with the axes ``(T, E, ...)``, also after ``get`` has put it in another order.

    SB3 flattens an array at the first ``get`` to ``(E · T, ...)``, one environment after the other, and some arrays of
    a buffer (rewards) not at all. Which of the two it is, its own shape says.

    Args:
        buffer: The buffer.
        array: One of its arrays.
    """
    steps, envs = buffer.buffer_size, buffer.n_envs
    if array.shape[:2] == (steps, envs) or len(array) != steps * envs:
        return array
    rows = array.reshape(envs, steps, *array.shape[1:]).swapaxes(0, 1)
    return rows[:, :, 0] if rows.shape[2:] == (1,) and array.ndim == 2 else rows


def minibatches(buffer: RolloutBuffer, batch: Batch, size: int, action_space: spaces.Space) -> Iterator[Batch]:
    """One epoch of minibatches of a rollout, those that the buffer's ``get`` would give, drawn as it draws them.

    Args:
        buffer: The full buffer.
        batch: Its `whole_rollout`, or that with other observations, or with the samples of other rollouts after it.
        size: Samples in a minibatch; the last may be smaller.
        action_space: For buffers that are not viewed: those are asked by their ``get``.
    """
    if isinstance(batch, SequenceBatch):
        order = torch.from_numpy(np.roll(np.arange(len(batch)), -np.random.randint(len(batch))))
        for part in order.split(size):
            yield batch[part]
        return
    if type(buffer) not in VIEWED_BUFFERS:
        for data in buffer.get(size):
            yield _of_samples(data, buffer, action_space, batch.reduction)
        return
    order = order_of_epoch(buffer, len(batch))
    if batch.nbytes <= MOVED_AT_ONCE:
        yield from batch[order].split(size)
    else:
        for part in order.split(size):
            yield batch[part]


def order_of_epoch(buffer: RolloutBuffer, samples: int | None = None) -> Tensor:
    """The order, drawn as ``get`` draws it, in which an epoch sees the samples of a `whole_rollout`.

    Args:
        buffer: The buffer.
        samples: How many there are, where those of other rollouts follow after them; None for the rollout alone.
    """
    index = _env_major(buffer)
    if samples is not None and samples > len(index):
        index = np.concatenate([index, np.arange(len(index), samples)])
    return torch.from_numpy(index[np.random.permutation(len(index))])


def _of_samples(
    data: RolloutBufferSamples | DictRolloutBufferSamples,
    buffer: RolloutBuffer,
    action_space: spaces.Space,
    reduction: Reduction,
) -> Batch:
    if data.old_log_prob.numel() != data.advantages.numel():
        raise ValueError(
            f"The rollout buffer {type(buffer).__name__} returned {data.old_log_prob.numel()} log-probabilities for "
            f"{data.advantages.numel()} advantages: `rollout_buffer_class.get` must return one of each a sample."
        )
    advantages = data.advantages.flatten()
    return Batch(
        observations=data.observations,
        actions=kind_of(action_space).as_taken(data.actions),
        old_log_prob=data.old_log_prob.flatten(),
        advantages=advantages,
        returns=data.returns.flatten(),
        old_values=data.old_values.flatten(),
        weights=torch.full_like(advantages, 1.0 / reduction.count(len(advantages))),
        action_masks=getattr(data, "action_masks", None),
        reduction=reduction,
    )


def _viewed(buffer: RolloutBuffer, action_space: spaces.Space, reduction: Reduction) -> Batch:
    size = buffer.buffer_size * buffer.n_envs

    def rows(array: NDArray[Any], *shape: int) -> Tensor:
        view = torch.from_numpy(by_time(buffer, array).reshape(size, *shape))
        return view.to(buffer.device) if array.nbytes <= MOVED_AT_ONCE else view

    def numbers(array: NDArray[Any]) -> Tensor:
        return rows(array).to(buffer.device)

    observations, shapes = buffer.observations, buffer.obs_shape
    actions = rows(buffer.actions, buffer.action_dim).to(buffer.device).float()
    masks = None
    if isinstance(buffer, MASKABLE_BUFFERS):
        masks = rows(buffer.action_masks, buffer.mask_dims).to(buffer.device)
    return Batch(
        observations={key: rows(value, *shapes[key]) for key, value in observations.items()}
        if isinstance(observations, dict) and isinstance(shapes, dict)
        else rows(observations, *shapes),
        actions=kind_of(action_space).as_taken(actions),
        old_log_prob=numbers(buffer.log_probs),
        advantages=numbers(buffer.advantages),
        returns=numbers(buffer.returns),
        old_values=numbers(buffer.values),
        weights=torch.full((size,), 1.0 / reduction.count(size), device=buffer.device),
        action_masks=masks,
        reduction=reduction,
    )


def _sequences(
    buffer: RecurrentRolloutBuffer | RecurrentDictRolloutBuffer, action_space: spaces.Space, reduction: Reduction
) -> Batch:
    """One environment after the other, each cut where its episodes begin."""
    order = torch.from_numpy(_env_major(buffer))
    lstm = (buffer.hidden_states_pi, buffer.cell_states_pi, buffer.hidden_states_vf, buffer.cell_states_vf)
    # (T, layers, E, H), until ``get`` makes of it what it makes of every array.
    timed = (state.swapaxes(1, 2) if state.ndim == 4 else by_time(buffer, state) for state in lstm)
    states = tuple(
        torch.from_numpy(state.reshape(len(order), *state.shape[-2:]))[order].to(buffer.device) for state in timed
    )
    resets = torch.from_numpy(by_time(buffer, buffer.episode_starts).reshape(-1))[order].to(buffer.device)
    first_steps = torch.arange(len(order), device=buffer.device) % buffer.buffer_size == 0
    samples = _viewed(buffer, action_space, reduction)[order]
    return SequenceBatch(
        **samples.rows(), reduction=reduction, starts=(resets > 0) | first_steps, resets=resets, states=states
    )


def _env_major(buffer: RolloutBuffer) -> NDArray[np.intp]:
    """Where SB3's order of samples, one environment after the other, finds them in a batch that is ordered by time."""
    index = np.arange(buffer.buffer_size * buffer.n_envs)
    return index.reshape(buffer.buffer_size, buffer.n_envs).T.reshape(-1)


@contextmanager
def unchanged_numpy_state() -> Iterator[None]:
    """Leave numpy's global random state, which SB3's rollout buffer draws its permutations from, as it was."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)
