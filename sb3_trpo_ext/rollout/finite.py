"""A rollout that is not finite is refused before it reaches a parameter, and what made it so is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_trpo_ext.rollout.buffers import by_time

OF_THE_ENVIRONMENT = "Wrap the environment in stable_baselines3.common.vec_env.VecCheckNan to find where it comes from."
OF_THE_POLICY = (
    "What the policy saw was finite, so this is the policy's own doing: look for a standard deviation, a logit or a "
    "feature that can overflow."
)
OF_THE_SCALE = "The rewards and values were finite, their sums are not: scale the rewards down (VecNormalize)."


def check_policy(policy: nn.Module) -> None:
    """Raise `ValueError` naming what of a policy itself cannot act: a parameter that is not finite, or a σ of 0 or inf.

    Frozen parameters and buffers may hold what they like.

    Args:
        policy: The policy.
    """
    cure = "The environment is not at fault: put the parameter right, or load a model from before it went wrong."
    for name, param in policy.named_parameters():
        if param.requires_grad and not bool(param.isfinite().all()):
            worst = float(param.detach()[~param.isfinite()][0])
            raise ValueError(f"The parameter `{name}` of the policy is not finite ({worst}). {cure}")
    log_std = getattr(policy, "log_std", None)
    if not isinstance(log_std, torch.Tensor):
        return
    log_std = log_std.detach()
    if isinstance(policy, ActorCriticPolicy) and isinstance(policy.action_dist, StateDependentNoiseDistribution):
        std = policy.action_dist.get_std(log_std)  # which has its own way to read it
        wrong = (std == 0) | ~std.isfinite()
    else:
        std = log_std.exp()
        wrong = (std.square() == 0) | ~std.isfinite()  # densities divide by the variance
    if bool(wrong.any()):
        place = int(torch.nonzero(wrong.flatten())[0])
        raise ValueError(
            f"The standard deviation of the policy's noise is {float(std.flatten()[place]):g}, where its parameter "
            f"`log_std` is {float(log_std.expand_as(std).flatten()[place]):g}. {cure}"
        )


def check_observation(observation: Any, *, step: int) -> None:
    """Raise `ValueError` if the observation that the policy is about to see is not finite.

    Args:
        observation: Array ``(E, ...)`` or a dict of them.
        step: Step of the rollout, for the message.
    """
    for name, array in _named_observations(observation):
        _raise_unless_finite(name, np.asarray(array)[None], first_step=step)


def check_actions(actions: np.ndarray, *, step: int) -> None:
    """Raise `ValueError` if an action ``(E, ...)`` that the policy is about to take is not finite."""
    _raise_unless_finite("action", actions[None], first_step=step, cure=OF_THE_POLICY)


def check_rollout(buffer: RolloutBuffer, last_observation: Any, serves_observations: Callable[[], bool]) -> None:
    """Raise `ValueError` naming what in a full rollout is not finite, with its step and environment index.

    What the policy makes of an observation is judged, not the observation: one that is not finite is the cause to be
    named where something else is not finite either, and at fault by itself where the policy cannot learn from it.

    Args:
        buffer: A full rollout buffer.
        last_observation: The observation after the last step, ``(E, ...)`` or a dict of them.
        serves_observations: Whether the policy is differentiable at those that are not finite; asked if there are any.
    """
    observations = [(name, by_time(buffer, array)) for name, array in _named_observations(buffer.observations)]
    made = [
        ("action", buffer.actions, OF_THE_POLICY),
        ("value", buffer.values, OF_THE_POLICY),
        ("log-probability", buffer.log_probs, OF_THE_POLICY),
        ("reward (with the bootstrapped value at a timeout)", buffer.rewards, OF_THE_ENVIRONMENT),
        ("advantage", buffer.advantages, OF_THE_SCALE),
        ("return", buffer.returns, OF_THE_SCALE),
    ]
    sound = all(map(_is_finite, (array for _, array, _ in made)))
    if sound and (all(_is_finite(array) for _, array in observations) or serves_observations()):
        return
    for name, array in observations:
        _raise_unless_finite(name, array)
    check_observation(last_observation, step=buffer.buffer_size)
    for name, array, cure in made:
        _raise_unless_finite(name, by_time(buffer, array), cure=cure)


def _named_observations(observation: Any) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(observation, dict):
        for key, value in observation.items():
            yield f"observation[{key!r}]", value
    else:
        yield "observation", observation


def _is_finite(array: np.ndarray) -> bool:
    return not np.issubdtype(array.dtype, np.floating) or bool(np.isfinite(array).all())


def _raise_unless_finite(name: str, array: np.ndarray, *, first_step: int = 0, cure: str = OF_THE_ENVIRONMENT) -> None:
    if _is_finite(array):
        return
    index = tuple(np.argwhere(~np.isfinite(array))[0])
    step, env, *_ = (*index, 0)  # a user's buffer may keep a single environment without an axis of its own
    raise ValueError(
        f"The rollout holds a {name} that is not finite ({array[index]}), in environment {env} at step "
        f"{first_step + step}. The policy is unchanged. {cure}"
    )
