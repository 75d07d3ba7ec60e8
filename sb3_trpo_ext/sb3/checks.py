"""Refuse what cannot work: impossible arguments at construction, non-finite rollouts before they reach a parameter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_trpo_ext.sb3.buffers import by_time


def check_integer(name: str, value: Any, least: int = 1, *, hint: str = "") -> None:
    """Raise `ValueError` unless ``value`` is an integer >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}. {hint}".rstrip())


def check_samples(name: str, value: Any) -> None:
    """Raise `ValueError` unless ``value`` is a number of samples, or None for all of them."""
    if value is not None:
        check_integer(name, value, hint="Pass None for all samples.")


def check_number(name: str, value: Any, *, positive: bool = False, hint: str = "") -> float:
    """Return ``value`` as a float, or raise `ValueError` unless it is a finite number >= 0 (> 0 if ``positive``)."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (positive and value == 0):
        kind = "positive" if positive else "non-negative"
        raise ValueError(f"`{name}` must be a finite, {kind} number, got {value!r}. {hint}".rstrip())
    return float(value)


POINTS_OF_A_SCHEDULE = 101
"""Where between the beginning and the end of training a schedule is looked at."""


def values_of(schedule: Any) -> Iterator[tuple[float, Any]]:
    """Pairs of the remaining progress, from 1 to 0, and what a schedule says there."""
    for progress in np.linspace(1.0, 0.0, POINTS_OF_A_SCHEDULE).tolist():
        value = schedule(progress)
        try:
            yield progress, float(value)  # what SB3 makes of it
        except (TypeError, ValueError):
            yield progress, value


def check_schedule(name: str, value: Any, *, positive: bool = False, hint: str = "") -> None:
    """Raise `ValueError` unless ``value`` is such a number as of `check_number`, or a schedule that is all along.

    Args:
        name: The argument.
        value: The number, or a function of the remaining progress.
        positive: Whether a number must not be zero; of a schedule, see `check_radius`.
        hint: What to do where a number is refused.
    """
    if not callable(value):
        check_number(name, value, positive=positive, hint=hint)
        return
    for progress, there in values_of(value):
        check_number(name, there, hint=f"That is its schedule where the remaining progress is {progress:.2g}.")


def check_radius(name: str, value: Any, *, hint: str = "") -> None:
    """Raise `ValueError` unless ``value`` is a positive number, or a schedule that is one from beginning to end."""
    if not callable(value):
        check_number(name, value, positive=True, hint=hint)
        return
    cure = f"lambda progress: {value(1.0)} * max(progress, 0.01)"
    for progress, there in values_of(value):
        hint = (
            f"That is its schedule where the remaining progress is {progress:.2g}; it must stay positive until the end "
            f"of training, as `{cure}` does."
        )
        check_number(name, there, positive=True, hint=hint)


def check_finite(name: str, value: Any) -> None:
    """Raise `ValueError` unless ``value`` is a finite number of either sign, or a schedule that is one all along."""
    for progress, there in values_of(value) if callable(value) else [(None, value)]:
        if not isinstance(there, (int, float, np.number)) or not math.isfinite(there):
            place = "" if progress is None else f" from its schedule where the remaining progress is {progress:.2g}"
            raise ValueError(f"`{name}` must be a finite number, got {there!r}{place}.")


def check_fraction(name: str, value: Any, *, include_zero: bool = False) -> None:
    """Raise `ValueError` unless ``value`` lies in (0, 1), or [0, 1)."""
    if check_number(name, value, positive=not include_zero) >= 1:
        raise ValueError(f"`{name}` must be less than 1, got {value}.")


def check_share(name: str, value: Any, *, hint: str = "") -> None:
    """Raise `ValueError` unless ``value`` lies in [0, 1]."""
    if check_number(name, value, hint=hint) > 1:
        raise ValueError(f"`{name}` must be at most 1, got {value}. {hint}".rstrip())


def check_rollout_size(n_steps: int, n_envs: int, *, normalize_advantage: bool) -> None:
    """One sample has no standard deviation: refuse it the way SB3's PPO does, with an `AssertionError`."""
    if normalize_advantage and n_steps * n_envs <= 1:
        raise AssertionError(
            f"`n_steps * n_envs` must be greater than 1 to normalise advantages. Currently n_steps={n_steps} "
            f"and n_envs={n_envs}: raise n_steps or pass normalize_advantage=False."
        )


def check_minibatches(n_steps: int, n_envs: int, batch_size: int) -> None:
    """Warn, as SB3's PPO does, where the last minibatch of an epoch is smaller than the others."""
    size = n_steps * n_envs
    if size % batch_size:
        warnings.warn(
            f"You have specified a mini-batch size of {batch_size}, but the rollout has `n_steps * n_envs = {size}` "
            f"samples: after every {size // batch_size} untruncated mini-batches, there will be a truncated mini-batch "
            f"of size {size % batch_size}. Choose a `batch_size` that is a factor of `n_steps * n_envs` "
            f"(n_steps={n_steps} and n_envs={n_envs}).",
            UserWarning,
            stacklevel=4,
        )


OF_THE_ENVIRONMENT = "Wrap the environment in stable_baselines3.common.vec_env.VecCheckNan to find where it comes from."
OF_THE_POLICY = (
    "What the policy saw was finite, so this is the policy's own doing: look for a standard deviation, a logit or a "
    "feature that can overflow."
)
OF_THE_SCALE = "The rewards and values were finite, their sums are not: scale the rewards down (VecNormalize)."


def check_trainable(policy: nn.Module) -> None:
    """Raise `RuntimeError` if a parameter can have no gradient, whatever is switched on."""
    for name, param in policy.named_parameters():
        if param.is_inference():
            raise RuntimeError(
                f"The parameter `{name}` of the policy was made within torch.inference_mode, so that it cannot have a "
                "gradient. Make it outside of it, or within torch.inference_mode(False)."
            )


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


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """Raise `ValueError` for spaces that SB3's encodings would misread, or cannot read."""
    parts = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
    for key, space in parts.items():
        name = f"the observation space {key!r} of `env`" if key else "the observation space of `env`"
        _check_start(name, space, cure="gymnasium.wrappers.TransformObservation")
        if isinstance(space, spaces.Box) and space.shape == ():
            raise ValueError(
                f"A policy sees vectors, and {name} is {space}, a number without an axis. Give it the shape (1,), as "
                "gymnasium.wrappers.ReshapeObservation(env, (1,)) does."
            )
        if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim > 1:
            raise ValueError(f"{name.capitalize()} must have one axis, got {space}. Flatten it.")
    _check_start("the action space of `env`", action_space, cure="gymnasium.wrappers.TransformAction")


def _check_start(name: str, space: spaces.Space, *, cure: str) -> None:
    start = getattr(space, "start", 0)
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)) and np.any(start):
        raise ValueError(
            f"SB3's encodings count from 0, and {name} is {space}, which counts from {start}: one value would be taken "
            f"for another. Wrap the environment so that it counts from 0, for example in {cure}."
        )
