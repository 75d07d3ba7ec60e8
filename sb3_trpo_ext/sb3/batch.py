"""What one update sees: the samples, their weights, and how to ask the policy for π(·|s) and V(s)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Batch:
    """N samples of a rollout.

    Attributes:
        observations: Tensor ``(N, ...)`` or a dict of them.
        actions: As the policy's ``log_prob`` takes them.
        old_log_prob: log π_old(a|s), ``(N,)``.
        advantages: Â, ``(N,)``.
        returns: Regression targets of the critic, ``(N,)``.
        weights: Sample weights, ``(N,)``, summing to 1 over the whole batch and to less over a part of it.
    """

    observations: PyTorchObs
    actions: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: slice) -> Batch:
        """A part of the batch; tensors are views of it."""
        observations = self.observations
        return Batch(
            {key: value[index] for key, value in observations.items()}
            if isinstance(observations, dict)
            else observations[index],
            self.actions[index],
            self.old_log_prob[index],
            self.advantages[index],
            self.returns[index],
            self.weights[index],
        )

    def split(self, size: int | None) -> list[Batch]:
        """Parts of at most ``size`` samples in order; the whole batch if None."""
        if size is None or size >= len(self):
            return [self]
        return [self[start : start + size] for start in range(0, len(self), size)]

    def thinned(self, factor: int) -> Batch:
        """Every ``factor``-th sample, reweighted to a mean; a random subset, as the buffer has shuffled them."""
        if factor == 1:
            return self
        part = self[::factor]
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
    """All samples of a full rollout buffer, in the random order that its ``get`` gives them."""
    data = next(iter(buffer.get(batch_size=None)))
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
        torch.full_like(data.advantages.flatten(), 1.0 / data.advantages.numel()),
    )


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
