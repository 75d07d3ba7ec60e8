"""One mode for all evaluations of a policy, with operations that can be differentiated twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.distributions import Distribution
from torch.nn.attention import SDPBackend, sdpa_kernel

from sb3_trpo_ext.core.shared_switch import SharedSwitch


@contextmanager
def _plain_attention() -> Iterator[None]:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with sdpa_kernel(SDPBackend.MATH):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _unvalidated() -> Iterator[None]:
    validates = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validates)


UNVALIDATED = SharedSwitch(_unvalidated)
"""Torch does not look at the parameters of every distribution that it makes."""
PLAIN_ATTENTION = SharedSwitch(_plain_attention)
PLAIN_RECURRENCE = SharedSwitch(lambda: torch.backends.cudnn.flags(enabled=False))
UNCOMPILED = SharedSwitch(lambda: torch.compiler.set_stance("force_eager"))


def _is_plain(module: nn.Module) -> bool:
    """Whether it is known to use no fused kernel of attention and not to be compiled."""
    home = type(module).__module__
    return home.startswith(("stable_baselines3.", "sb3_contrib.")) or (
        home.startswith("torch.nn.modules.")
        and not home.endswith(".transformer")
        and not isinstance(module, nn.MultiheadAttention)
        and not any(name.startswith("forward") for name in vars(module))
    )


@contextmanager
def consistent_evaluation(policy: ActorCriticPolicy) -> Iterator[None]:
    """Evaluate the policy in one mode, and with operations that can be differentiated twice.

    Evaluation mode, the mode in which actions were sampled: dropout is off and batch norm uses, and does not move,
    its running statistics, so that the KL divergence at θ_old is exactly zero. Fused kernels of attention and of
    recurrent layers (cuDNN's) have no double backward and are replaced by the plain ones; modules compiled
    by ``torch.compile`` run uncompiled for the same reason. Those are switches of the process, which several threads
    may hold at once; when the last has finished, they are as they were. A policy of plain layers needs none of them.
    """
    with ExitStack() as stack:
        if not all(map(_is_plain, policy.modules())):
            stack.enter_context(PLAIN_ATTENTION.used())
            if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
                stack.enter_context(UNCOMPILED.used())
        if any(isinstance(module, nn.RNNBase) and module.weight_hh_l0.is_cuda for module in policy.modules()):
            stack.enter_context(PLAIN_RECURRENCE.used())
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
