"""Fast rollouts: a `PolicySnapshot` acts, everything else is computed in one batch at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.vec_env import VecEnv
from threadpoolctl import threadpool_limits

from sb3_trpo_ext.sb3.snapshot import Array, NotCoveredError, PolicySnapshot


@dataclass
class Timeouts:
    """Terminal observations of episodes that a time limit ended, to be bootstrapped in one batch."""

    steps: list[int] = field(default_factory=list)
    envs: list[int] = field(default_factory=list)
    observations: list[Array] = field(default_factory=list)

    def note(self, step: int, dones: Array, infos: list[dict[str, Any]]) -> None:
        """Remember the timeouts among the episodes that ended at a step."""
        for env in np.flatnonzero(dones):
            terminal = infos[env].get("terminal_observation")
            if terminal is not None and infos[env].get("TimeLimit.truncated", False):
                self.steps.append(step)
                self.envs.append(int(env))
                self.observations.append(terminal)


class FastRollout:
    """One rollout by a `PolicySnapshot`, written into SB3's own `RolloutBuffer`.

    Callbacks are called as SB3 calls them, and find SB3's names in ``locals``, except ``values`` and ``log_probs``,
    which do not exist before the end of the rollout. If a callback changes the policy, the steps so far are valued
    with the policy that took them and the rollout goes on with the new one.

    NumPy stands in for torch: where torch has a single thread, so has NumPy's BLAS, whose threads would wait for each
    other at every step on a machine that runs several trainings.

    Args:
        model: The algorithm that collects.
        snapshot: Its policy.
        env: The environments.
        buffer: The buffer to fill.
        n_steps: Steps of each environment.
    """

    def __init__(self, model: Any, snapshot: PolicySnapshot, env: VecEnv, buffer: RolloutBuffer, n_steps: int) -> None:
        self._model = model
        self._snapshot = snapshot
        self._env = env
        self._buffer = buffer
        self._n_steps = n_steps
        space = model.action_space
        self._bounds = (space.low[None], space.high[None]) if isinstance(space, spaces.Box) else None
        self._valued = 0
        self._timeouts = Timeouts()

    def collect(self, callback: BaseCallback) -> bool:
        """Fill the buffer; False if the callback stopped the rollout."""
        with threadpool_limits(1 if torch.get_num_threads() == 1 else None, user_api="blas"):
            return self._collect(callback)

    def _collect(self, callback: BaseCallback) -> bool:
        model, buffer = self._model, self._buffer
        model.policy.set_training_mode(False)
        buffer.reset()
        # Views in which a step is written as it is.
        self._observations = buffer.observations.reshape(buffer.buffer_size, *model._last_obs.shape)
        self._actions = buffer.actions.reshape(buffer.buffer_size, self._env.num_envs, *model.action_space.shape)
        callback.on_rollout_start()
        drawn = self._snapshot.sampler.noise(self._n_steps, self._env.num_envs, self._snapshot.noise_width)
        noise = self._snapshot.sampler.scaled(drawn)
        names: dict[str, Any] = {
            "self": model,
            "env": self._env,
            "callback": callback,
            "rollout_buffer": buffer,
            "n_rollout_steps": self._n_steps,
        }
        watched = not is_idle(callback)
        for step in range(self._n_steps):
            self._step(noise[step], names)
            if watched:
                names["n_steps"], names["obs_tensor"] = step, torch.from_numpy(model._last_obs)
                callback.update_locals(names)
            if not callback.on_step():
                self._value_steps(step)
                return False
            self._store(step, names)
            if watched and not self._snapshot.is_current():
                self._value_steps(step + 1)
                self._snapshot = PolicySnapshot(model.policy)
                noise = self._snapshot.sampler.scaled(drawn)

        buffer.full = buffer.pos == buffer.buffer_size
        self._value_steps(self._n_steps)
        last_values = self._snapshot.values(model._last_obs)
        estimate_advantages(buffer, last_values, names["dones"])
        callback.update_locals({**names, "n_steps": self._n_steps, "values": torch.from_numpy(last_values)})
        callback.on_rollout_end()
        return True

    def _step(self, noise: Array, names: dict[str, Any]) -> None:
        """Act once in all environments."""
        model = self._model
        actions = self._snapshot.act(model._last_obs, noise)
        clipped = actions
        if self._bounds is not None:
            low, high = self._bounds
            flat = actions.reshape(-1)
            # The sum of squares is one quick call; it is also infinite where the largest float is near.
            if not math.isfinite(flat.dot(flat)) and not np.isfinite(flat).all():
                raise ValueError("The policy's action is not finite.")
            if low.ndim > 2:
                actions = actions.reshape(-1, *low.shape[1:])
            clipped = np.minimum(np.maximum(actions, low), high)
        names["actions"], names["clipped_actions"] = actions, clipped
        names["new_obs"], names["rewards"], names["dones"], names["infos"] = self._env.step(clipped)
        model.num_timesteps += self._env.num_envs

    def _store(self, step: int, names: dict[str, Any]) -> None:
        """Write the step into the buffer and move on."""
        model, buffer, dones = self._model, self._buffer, names["dones"]
        model._update_info_buffer(names["infos"], dones)
        self._observations[step] = model._last_obs
        self._actions[step] = names["actions"]
        buffer.rewards[step] = names["rewards"]
        buffer.episode_starts[step] = model._last_episode_starts
        buffer.pos = step + 1
        if np.count_nonzero(dones):
            self._timeouts.note(step, dones, names["infos"])
        model._last_obs, model._last_episode_starts = names["new_obs"], dones

    def _value_steps(self, end: int) -> None:
        """Values, log-probabilities and timeout bootstraps of the steps not yet valued, up to ``end``."""
        buffer, start = self._buffer, self._valued
        if end == start:
            return
        shape = buffer.values[start:end].shape
        observations = buffer.observations[start:end].reshape(-1, *buffer.obs_shape)
        actions = buffer.actions[start:end].reshape(len(observations), -1)
        buffer.values[start:end] = self._snapshot.values(observations).reshape(shape)
        buffer.log_probs[start:end] = self._snapshot.log_prob(observations, actions).reshape(shape)
        timeouts, self._timeouts = self._timeouts, Timeouts()
        if timeouts.steps:
            terminal = self._snapshot.values(np.stack(timeouts.observations))
            buffer.rewards[timeouts.steps, timeouts.envs] += self._model.gamma * terminal
        self._valued = end


def is_idle(callback: BaseCallback) -> bool:
    """Whether it is what SB3 makes of no callback: it looks at nothing and changes nothing."""
    return type(callback) is ConvertCallback and callback.callback is None


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
    advantage: Array = np.zeros_like(last_values)
    for target, delta, decay in zip(buffer.advantages[::-1], deltas[::-1], decays[::-1], strict=True):
        advantage = delta + decay * advantage
        target[:] = advantage
    buffer.returns = buffer.advantages + buffer.values


def fast_rollout(model: Any, env: VecEnv, buffer: RolloutBuffer, n_steps: int) -> FastRollout:
    """The fast path for a model.

    Raises:
        NotCoveredError: If it does not cover the model; the message says why.
    """
    if type(buffer) is not RolloutBuffer:
        raise NotCoveredError(f"rollout buffer {type(buffer).__name__}")
    return FastRollout(model, PolicySnapshot(model.policy), env, buffer, n_steps)
