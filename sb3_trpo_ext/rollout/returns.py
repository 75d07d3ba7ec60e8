"""Advantages and returns of a collected rollout."""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_trpo_ext.rollout.buffers import by_time
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


def decay_returns(buffer: RolloutBuffer, trace_decay: float) -> None:
    """Let the returns of a full buffer be λ-returns of another λ than that of its advantages, which stay.

    Advantages Â_t = δ_t + γλ Â_t+1 say what δ was, Â_t - γλ Â_t+1, and with it R_t = V(s_t) + Σ_k (γλ')^k δ_t+k;
    nothing is carried over the end of an episode. So neither rewards nor what V says of the state after the last one
    are needed.

    Args:
        buffer: The buffer, with the advantages of its own ``gae_lambda``.
        trace_decay: λ'.
    """
    if trace_decay == buffer.gae_lambda:
        return
    values, advantages = by_time(buffer, buffer.values), by_time(buffer, buffer.advantages).astype(np.float64)
    goes_on = buffer.gamma * (1.0 - by_time(buffer, buffer.episode_starts)[1:])
    deltas = advantages.copy()
    deltas[:-1] -= goes_on * buffer.gae_lambda * advantages[1:]
    for t in reversed(range(len(goes_on))):
        deltas[t] += goes_on[t] * trace_decay * deltas[t + 1]
    returns = (values + deltas).astype(buffer.returns.dtype)
    flat = buffer.returns.shape != returns.shape  # since ``get`` has put the samples of an environment together
    buffer.returns = returns.T.reshape(buffer.returns.shape) if flat else returns
