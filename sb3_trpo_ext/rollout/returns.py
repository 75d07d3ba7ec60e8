"""Advantages and returns of a collected rollout."""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_trpo_ext.rollout.forward import Array


def estimate_advantages(buffer: RolloutBuffer, last_values: Array, dones: Array) -> None:
    """Generalised advantage estimates and λ-returns, as `RolloutBuffer.compute_returns_and_advantage` fills them in.

    δ_t = r_t + γ V(s_t+1) - V(s_t) and Â_t = δ_t + γλ Â_t+1, nothing being carried over the end of an episode; only the
    recursion is a loop (Schulman et al. 2016, equation 16).

    Args:
        buffer: The buffer, full.
        last_values: V of the observations after the last step, ``(E,)``.
        dones: Which episodes ended at the last step, ``(E,)``.
    """
    goes_on = 1.0 - np.concatenate([buffer.episode_starts[1:], dones[None].astype(np.float32)])
    next_values = np.concatenate([buffer.values[1:], last_values[None]])
    deltas = buffer.rewards + buffer.gamma * next_values * goes_on - buffer.values
    decays = buffer.gamma * buffer.gae_lambda * goes_on
    if buffer.n_envs == 1:  # scalars of NumPy round as its arrays, and take a fifth of the time
        backwards, advantage = [], np.float32(0)
        for delta, decay in zip(deltas[::-1, 0], decays[::-1, 0], strict=True):
            advantage = delta + decay * advantage
            backwards.append(advantage)
        buffer.advantages[::-1, 0] = backwards
    else:
        following: Array = np.zeros_like(last_values)
        for target, delta, decay in zip(buffer.advantages[::-1], deltas[::-1], decays[::-1], strict=True):
            np.multiply(decay, following, out=target)
            following = np.add(delta, target, out=target)
    buffer.returns = buffer.advantages + buffer.values
