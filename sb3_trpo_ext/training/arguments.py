"""Arguments that make sense with others alone: sizes of rollouts and minibatches, spaces, parameters to be trained."""

from __future__ import annotations

import warnings

import numpy as np
from gymnasium import spaces
from torch import nn


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


def check_trainable(policy: nn.Module) -> None:
    """Raise `RuntimeError` if a parameter can have no gradient, whatever is switched on."""
    for name, param in policy.named_parameters():
        if param.is_inference():
            raise RuntimeError(
                f"The parameter `{name}` of the policy was made within torch.inference_mode, so that it cannot have a "
                "gradient. Make it outside of it, or within torch.inference_mode(False)."
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
