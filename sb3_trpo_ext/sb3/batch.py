"""What one update sees: the samples, their weights, and how to ask the policy for π(·|s) and V(s)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, PyTorchObs, RolloutBufferSamples
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

VIEWED_BUFFERS = (RolloutBuffer, DictRolloutBuffer)
"""SB3's own buffers, whose arrays are known."""

MOVED_AT_ONCE = 256 * 2**20
"""Bytes of observations up to which all of them are put on the policy's device for the time of an update."""


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
        weights: Sample weights, ``(N,)``, summing to 1 over the whole batch and to less over a part of it.
    """

    observations: PyTorchObs
    actions: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    old_values: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: slice | Tensor) -> Batch:
        """A part of the batch: views of it by a slice, copies by a tensor of indices."""
        observations = self.observations
        return Batch(
            {key: value[index] for key, value in observations.items()}
            if isinstance(observations, dict)
            else observations[index],
            self.actions[index],
            self.old_log_prob[index],
            self.advantages[index],
            self.returns[index],
            self.old_values[index],
            self.weights[index],
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the observations."""
        tensors = self.observations.values() if isinstance(self.observations, dict) else [self.observations]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def inputs(self) -> PyTorchObs:
        """The observations on the device of the weights, the policy's; what is large moves there part by part."""
        device = self.weights.device
        if isinstance(self.observations, dict):
            return {key: value.to(device) for key, value in self.observations.items()}
        return self.observations.to(device)

    def split(self, size: int | None) -> list[Batch]:
        """Parts of at most ``size`` samples in order; the whole batch if None."""
        if size is None or size >= len(self):
            return [self]
        return [self[start : start + size] for start in range(0, len(self), size)]

    def subset(self, size: int) -> Batch:
        """At most ``size`` samples, drawn without replacement by numpy's global generator, reweighted to a mean.

        That generator is the one from which SB3's rollout buffers draw their minibatches; nothing is drawn if the
        batch is no larger than ``size``.
        """
        if size >= len(self):
            return self
        chosen = np.sort(np.random.permutation(len(self))[:size])
        part = self[torch.from_numpy(chosen)]
        return replace(part, weights=part.weights / part.weights.sum())

    def mean(self, values: Tensor) -> Tensor:
        """This part's share of the mean of ``values`` ``(N,)`` over samples: every mean goes through here."""
        return (self.weights * values).sum()

    def with_normalized_advantages(self) -> Batch:
        """(Â - mean) / std over the samples of positive weight, with the unbiased standard deviation."""
        mean = self.mean(self.advantages)
        count = (self.weights > 0).sum()
        variance = self.mean((self.advantages - mean).square()) * count / (count - 1)
        return replace(self, advantages=(self.advantages - mean) / (variance.sqrt() + 1e-8))


def whole_rollout(buffer: RolloutBuffer, action_space: spaces.Space) -> Batch:
    """All samples of a full rollout buffer.

    The arrays of SB3's own buffers are viewed as they are, so that a rollout of images is not in memory twice; another
    class of buffer is asked by its ``get``.
    """
    if type(buffer) in VIEWED_BUFFERS:
        return _viewed(buffer, action_space)
    with unchanged_numpy_state():
        data = next(iter(buffer.get(batch_size=None)))
    return _of_samples(data, buffer, action_space)


def minibatches(buffer: RolloutBuffer, batch: Batch, size: int, action_space: spaces.Space) -> Iterator[Batch]:
    """One epoch of minibatches of a rollout, those that the buffer's ``get`` would give, drawn as it draws them.

    Args:
        buffer: The full buffer.
        batch: Its `whole_rollout`, or that with other observations.
        size: Samples in a minibatch; the last may be smaller.
        action_space: For buffers that are not viewed: those are asked by their ``get``.
    """
    if type(buffer) not in VIEWED_BUFFERS:
        for data in buffer.get(size):
            yield _of_samples(data, buffer, action_space)
        return
    order = torch.from_numpy(_env_major(buffer)[np.random.permutation(len(batch))])
    if batch.nbytes <= MOVED_AT_ONCE:
        yield from batch[order].split(size)
    else:
        for part in order.split(size):
            yield batch[part]


def _of_samples(
    data: RolloutBufferSamples | DictRolloutBufferSamples, buffer: RolloutBuffer, action_space: spaces.Space
) -> Batch:
    if data.old_log_prob.numel() != data.advantages.numel():
        raise ValueError(
            f"The rollout buffer {type(buffer).__name__} returned {data.old_log_prob.numel()} log-probabilities for "
            f"{data.advantages.numel()} advantages: `rollout_buffer_class.get` must return one of each a sample."
        )
    return Batch(
        data.observations,
        policy_actions(data.actions, action_space),
        data.old_log_prob.flatten(),
        data.advantages.flatten(),
        data.returns.flatten(),
        data.old_values.flatten(),
        torch.full_like(data.advantages.flatten(), 1.0 / data.advantages.numel()),
    )


def _viewed(buffer: RolloutBuffer, action_space: spaces.Space) -> Batch:
    size = buffer.buffer_size * buffer.n_envs

    def rows(array: NDArray[Any], *shape: int) -> Tensor:
        view = torch.from_numpy(array.reshape(size, *shape))
        return view.to(buffer.device) if array.nbytes <= MOVED_AT_ONCE else view

    observations, shapes = buffer.observations, buffer.obs_shape
    return Batch(
        {key: rows(value, *shapes[key]) for key, value in observations.items()}
        if isinstance(observations, dict) and isinstance(shapes, dict)
        else rows(observations, *shapes),
        policy_actions(rows(buffer.actions, buffer.action_dim).to(buffer.device).float(), action_space),
        rows(buffer.log_probs).to(buffer.device),
        rows(buffer.advantages).to(buffer.device),
        rows(buffer.returns).to(buffer.device),
        rows(buffer.values).to(buffer.device),
        torch.full((size,), 1.0 / size, device=buffer.device),
    )


def _env_major(buffer: RolloutBuffer) -> NDArray[np.intp]:
    """Where SB3's order of samples, one environment after the other, finds them in a viewed buffer.

    SB3 reorders a buffer at the first call of its ``get``; before, it is ordered by time.
    """
    index = np.arange(buffer.buffer_size * buffer.n_envs)
    return index if buffer.generator_ready else index.reshape(buffer.buffer_size, buffer.n_envs).T.reshape(-1)


def policy_actions(actions: Tensor, action_space: spaces.Space) -> Tensor:
    """Actions as stored by a rollout buffer -> as ``log_prob`` takes them (Discrete: integers, no last axis)."""
    return actions.long().flatten() if isinstance(action_space, spaces.Discrete) else actions


@contextmanager
def unchanged_numpy_state() -> Iterator[None]:
    """Leave numpy's global random state, which SB3's rollout buffer draws its permutations from, as it was."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


@contextmanager
def consistent_evaluation(policy: ActorCriticPolicy) -> Iterator[None]:
    """Evaluate the policy in one mode, and with operations that can be differentiated twice.

    Evaluation mode, the mode in which actions were sampled: dropout is off and batch norm uses, and does not move,
    its running statistics, so that the KL divergence at θ_old is exactly zero. Fused attention kernels have no double
    backward and are replaced by the plain ones; modules compiled by ``torch.compile`` run uncompiled for the same
    reason.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        policy.set_training_mode(False)
        yield


@contextmanager
def explained_double_backward() -> Iterator[None]:
    """Say what to change where a module of the policy cannot be differentiated twice."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if "double backward" in message or ("derivative for" in message and "not implemented" in message):
            raise RuntimeError(
                "The Fisher-vector product differentiates the policy twice, and one of its operations has no double "
                f"backward ({message.splitlines()[0]}). Replace that operation in the policy by a composition of plain "
                "torch operations (do not call torch.compile on it), or use PPOClip, which differentiates once."
            ) from error
        raise
