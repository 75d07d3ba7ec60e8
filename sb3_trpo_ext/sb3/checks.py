"""Refuse what cannot work: impossible arguments at construction, non-finite rollouts before they reach a parameter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn


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
            f"`n_steps * n_envs` must be greater than 1 to normalise advantages, got n_steps={n_steps} and "
            f"n_envs={n_envs}. Raise n_steps or pass normalize_advantage=False."
        )


def check_minibatches(n_steps: int, n_envs: int, batch_size: int) -> None:
    """Warn, as SB3's PPO does, where the last minibatch of an epoch is smaller than the others."""
    size = n_steps * n_envs
    if size % batch_size:
        warnings.warn(
            f"You have specified a mini-batch size of {batch_size}, but the rollout has n_steps * n_envs = "
            f"{n_steps} * {n_envs} = {size} samples, so the last mini-batch of each epoch has {size % batch_size}. "
            "Choose a `batch_size` that divides n_steps * n_envs.",
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


def check_rollout(buffer: RolloutBuffer, last_observation: Any) -> None:
    """Raise `ValueError` naming what in a full rollout is not finite, with its step and environment index.

    Args:
        buffer: A rollout buffer that has not been flattened yet: arrays ``(T, E, ...)``.
        last_observation: The observation after the last step, ``(E, ...)`` or a dict of them.
    """
    for name, array in _named_observations(buffer.observations):
        _raise_unless_finite(name, array)
    check_observation(last_observation, step=buffer.buffer_size)
    for name, array, cure in (
        ("action", buffer.actions, OF_THE_POLICY),
        ("value", buffer.values, OF_THE_POLICY),
        ("log-probability", buffer.log_probs, OF_THE_POLICY),
        ("reward (with the bootstrapped value at a timeout)", buffer.rewards, OF_THE_ENVIRONMENT),
        ("advantage", buffer.advantages, OF_THE_SCALE),
        ("return", buffer.returns, OF_THE_SCALE),
    ):
        _raise_unless_finite(name, array, cure=cure)


def _named_observations(observation: Any) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(observation, dict):
        for key, value in observation.items():
            yield f"observation[{key!r}]", value
    else:
        yield "observation", observation


def _raise_unless_finite(name: str, array: np.ndarray, *, first_step: int = 0, cure: str = OF_THE_ENVIRONMENT) -> None:
    if not np.issubdtype(array.dtype, np.floating) or np.isfinite(array).all():
        return
    step, env, *_ = (int(index) for index in np.argwhere(~np.isfinite(array))[0])
    worst = array[step, env][~np.isfinite(array[step, env])].flat[0]
    raise ValueError(
        f"The rollout holds a {name} that is not finite ({worst}), in environment {env} at step {first_step + step}. "
        f"The policy is unchanged. {cure}"
    )
