"""Rollouts by a `FastPolicy`: what SB3's own collection hands over, in a fraction of its time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from threadpoolctl import ThreadpoolController
from torch import Tensor

from sb3_trpo_ext.core.shared_switch import SharedSwitch
from sb3_trpo_ext.rollout.action_spaces import kind_of
from sb3_trpo_ext.rollout.action_values import ActionValues
from sb3_trpo_ext.rollout.fast_policy import FastActionValuePolicy, FastPolicy
from sb3_trpo_ext.rollout.finite import check_actions
from sb3_trpo_ext.rollout.forward import Array, NotCoveredError, aligned
from sb3_trpo_ext.rollout.known_classes import is_idle, looks
from sb3_trpo_ext.rollout.returns import estimate_advantages

PENDING = 2**17
"""Numbers that may wait to be valued at the most, where one step does not have more."""

_libraries = cache(ThreadpoolController)  # to look for them takes a millisecond

_ONE_THREAD = SharedSwitch(lambda: _libraries().limit(limits=1, user_api="blas"))


def one_thread() -> AbstractContextManager[None]:
    """NumPy stands in for torch, and has one thread where torch has one.

    Its threads would wait for each other at every step on a machine that runs several trainings.
    """
    return _ONE_THREAD.used() if torch.get_num_threads() == 1 else nullcontext()


@contextmanager
def quiet() -> Iterator[None]:
    """NumPy does not warn of numbers that are not finite: whoever computes them looks at them, as with torch's."""
    before = np.geterr()
    try:
        try:
            np.seterr(all="ignore")
            yield
        finally:
            np.seterr(**before)
    finally:  # again, if an interrupt came between
        np.seterr(**before)


OVERRIDABLE = ("add", "reset", "compute_returns_and_advantage")
"""Methods of a buffer that it could have of its own."""


class Pending:
    """Steps that were taken and are still to be valued.

    Args:
        policy: The policy that takes them.
        n_steps: Most steps to keep; fewer where these would be more than `PENDING` numbers.
    """

    def __init__(self, policy: FastPolicy, n_steps: int) -> None:
        width = policy.critic_input.numel() + policy.outputs.numel()
        self.room = max(1, min(n_steps, PENDING // width))
        self.start = self.end = 0
        self._policy = policy
        self._sources = policy.critic_input.numpy(), policy.outputs.numpy()
        self.inputs, self.outputs = (
            aligned(self.room, *source.shape, dtype=source.dtype) for source in (policy.critic_input, policy.outputs)
        )
        self._arrays = self.inputs.numpy(), self.outputs.numpy()
        self.actions: list[Array] = []
        self.masks: list[Array] = []
        self.timeouts: list[tuple[int, int, Any, Tensor]] = []

    def drop_last(self) -> None:
        """Forget the last step."""
        self.end -= 1
        self.actions.pop()
        if self.masks:
            self.masks.pop()

    def note(self, actions: Array, masks: Array | None) -> None:
        """Keep what the policy saw and put out, and the actions that were drawn from that."""
        slot = self.end - self.start
        (inputs, outputs), (seen, put_out) = self._arrays, self._sources
        inputs[slot], outputs[slot] = seen, put_out
        self.actions.append(actions)
        if masks is not None:
            self.masks.append(masks)
        self.end += 1

    def note_timeouts(self, step: int, rewards: Array, dones: Array, infos: list[dict[str, Any]]) -> None:
        """Keep the last observations of episodes that a time limit ended at a step."""
        for env in np.flatnonzero(dones):
            if is_timeout(infos[env]):
                last = self._policy.encoded(infos[env]["terminal_observation"])
                self.timeouts.append((step, int(env), rewards[env], last))

    def value(self, buffer: RolloutBuffer, gamma: float) -> None:
        """Write values, log-probabilities and bootstrapped rewards into a buffer; nothing is pending then."""
        count, policy = self.end - self.start, self._policy
        if count:
            steps = slice(self.start, self.end)
            inputs, outputs = self.inputs[:count], self.outputs[:count].flatten(0, 1)
            actions = torch.from_numpy(np.concatenate(self.actions))
            masks = np.concatenate(self.masks) if self.masks else None
            buffer.values[steps] = policy.values(inputs, outputs, masks).numpy()
            buffer.log_probs[steps] = policy.log_prob(outputs, actions, masks).numpy().reshape(count, -1)
        if self.timeouts:
            bootstrapped = gamma * policy.values(torch.stack([last for *_, last in self.timeouts]))
            for (step, env, reward, _), value in zip(self.timeouts, bootstrapped, strict=True):
                rewards = np.array([reward])  # as SB3 adds to the rewards of a step, in their own type
                rewards[0] += value
                buffer.rewards[step, env] = rewards[0]
        self.start = self.end
        self.actions, self.masks, self.timeouts = [], [], []


class FastRollout:
    """One rollout, written into SB3's own `RolloutBuffer` or `DictRolloutBuffer`.

    Environments, callbacks, buffer, logger and random generators get what SB3's ``collect_rollouts`` gives them. What
    nobody looks at before the end of a rollout (values, log-probabilities, bootstrapped rewards) is computed for many
    steps at once, unless a callback of unknown class could look, or change the policy, at any step. Where the model's
    ``fast_rollouts`` is ``"exact"``, all is the same to the last bit, otherwise up to the rounding of products.

    Args:
        model: The algorithm that collects.
        env: The environments.
        buffer: The buffer to fill.
        n_steps: Steps of each environment.

    Raises:
        NotCoveredError: If policy or buffer are not covered; the message says why.
    """

    buffers: ClassVar[tuple[type[RolloutBuffer], ...]] = (RolloutBuffer, DictRolloutBuffer)
    name_of_done: ClassVar[str] = "done"
    """The name in ``locals`` of whether the last environment is done."""
    shows_clipped_actions: ClassVar[bool] = True
    unscales: ClassVar[bool] = True
    """Whether SB3's loop asks the policy to bring its actions from [-1, 1] to the bounds if it squashes them."""
    asks_before_acting: ClassVar[bool] = False
    """Whether there are masks to be asked for, or a memory that has to see what the policy sees."""

    def __init__(self, model: Any, env: VecEnv, buffer: RolloutBuffer, n_steps: int) -> None:
        if type(buffer) not in self.buffers or any(name in vars(buffer) for name in OVERRIDABLE):
            raise NotCoveredError(f"rollout buffer {type(buffer).__name__}")
        if buffer.buffer_size != n_steps or buffer.n_envs != env.num_envs:
            raise NotCoveredError(f"a rollout buffer for {buffer.buffer_size} steps of {buffer.n_envs} environments")
        self._model, self._env, self._buffer, self._n_steps = model, env, buffer, n_steps
        self._exact = model.fast_rollouts == "exact"
        space = model.action_space
        self._bounds = (space.low[None], space.high[None]) if kind_of(space).is_bounded else None
        self._reshaped = len(space.shape) != 1
        self._policy: FastPolicy | None = self._fast_policy()

    def _fast_policy(self) -> FastPolicy:
        policy = self._model.policy
        kind = FastActionValuePolicy if isinstance(policy, ActionValues) else FastPolicy
        return kind(policy, self._env.num_envs, exact=self._exact)

    def collect(self, callback: BaseCallback) -> bool:
        """Fill the buffer; False if the callback stopped the rollout."""
        with nullcontext() if self._exact else one_thread():
            return self._collect(callback)

    def _collect(self, callback: BaseCallback) -> bool:
        model, buffer = self._model, self._buffer
        note = getattr(model._update_info_buffer, "__func__", None)
        self._notes_itself = note is not BaseAlgorithm._update_info_buffer
        model.policy.set_training_mode(False)
        buffer.reset()
        names: dict[str, Any] = {
            "self": model,
            "env": self._env,
            "callback": callback,
            "rollout_buffer": buffer,
            "n_rollout_steps": self._n_steps,
        }
        self._begin(names)
        callback.on_rollout_start()
        self._lay_out()
        watched = looks(callback) or model.policy_changes_in_rollouts or not self._is_current()
        self._squashes = self._asks_to_unscale()
        loop = self._watched if watched else self._unwatched
        if not loop(callback, names):
            return False
        buffer.full = buffer.pos == buffer.buffer_size
        names["n_steps"] = self._n_steps
        with torch.no_grad():
            values = self._last_values(obs_as_tensor(model._last_obs, model.device), names)
        if "compute_returns_and_advantage" in vars(buffer):  # the model's own
            buffer.compute_returns_and_advantage(values, names["dones"])
        else:
            estimate_advantages(buffer, values.cpu().numpy().flatten(), names["dones"])
        self._end(callback, names | {"values": values})
        callback.on_rollout_end()
        return True

    def _asks_to_unscale(self) -> bool:
        return bool(self.unscales and self._model.policy.squash_output)

    def _lay_out(self) -> None:
        """Views of the buffer's arrays into which a step is written as it is."""
        model, buffer = self._model, self._buffer
        self._rows = _by_step(buffer.observations, model._last_obs)
        self._actions = buffer.actions.reshape(self._n_steps, self._env.num_envs, *model.action_space.shape)
        self._rewards, self._episode_starts = buffer.rewards, buffer.episode_starts

    def _unwatched(self, callback: BaseCallback, names: dict[str, Any]) -> bool:
        """Take the steps and value many of them at once."""
        model, buffer, policy = self._model, self._buffer, self._policy
        assert policy is not None  # since it is current
        pending, idle = Pending(policy, self._n_steps), is_idle(callback)
        before = [param.detach().clone() for param in model.policy.parameters()]
        for step in range(self._n_steps):
            policy.see(model._last_obs)
            masks = self._masks(names) if self.asks_before_acting else None
            actions = policy.act(masks)
            pending.note(actions if self._bounds else actions.copy(), masks)  # an environment may write into its own
            self._step(actions, names)
            if not idle:
                names["n_steps"] = step
                callback.update_locals(names)
            if not callback.on_step():
                pending.drop_last()
                pending.value(buffer, model.gamma)
                return False
            if np.count_nonzero(names["dones"]):
                self._note_timeouts(pending, step, names)
            self._store(step, names)
            if pending.end - pending.start == pending.room:
                pending.value(buffer, model.gamma)
        pending.value(buffer, model.gamma)
        self._require_unchanged(before)
        return True

    def _require_unchanged(self, before: list[Tensor]) -> None:
        """Notice a policy that something else than a callback has changed, such as an environment that holds it."""
        same = partial(torch.allclose, rtol=0.0, atol=0.0, equal_nan=True)
        if self._is_current() and all(map(same, self._model.policy.parameters(), before)):
            return
        self._model.policy_changes_in_rollouts = True
        warnings.warn(
            "The policy changed while a rollout was collected, and no callback did it: values and log-probabilities of "
            "that rollout are those of the changed policy. From the next one on each step is valued by itself.",
            UserWarning,
            stacklevel=2,
        )

    def _watched(self, callback: BaseCallback, names: dict[str, Any]) -> bool:
        """Take the steps, each with all that SB3 shows of it, by a policy that may change between two of them."""
        model, buffer = self._model, self._buffer
        for step in range(self._n_steps):
            if not self._is_current():
                self._policy = self._fast_policy_or_none()
            names["n_steps"], names["obs_tensor"] = step, obs_as_tensor(model._last_obs, model.device)
            with torch.no_grad():
                actions, names["values"], names["log_probs"] = self._acted(names)
            self._squashes = self._asks_to_unscale()
            self._step(actions, names)
            callback.update_locals(names)
            if not callback.on_step():
                return False
            self._bootstrap(names)
            self._lay_out()  # the callback may have emptied the buffer, or replaced its arrays
            row = buffer.pos
            buffer.values[row] = names["values"].cpu().numpy().flatten()
            buffer.log_probs[row] = names["log_probs"].cpu().numpy().flatten()
            self._store(row, names)
        return True

    def _is_current(self) -> bool:
        return self._policy is not None and self._policy.is_current(self._model.policy)

    def _fast_policy_or_none(self) -> FastPolicy | None:
        try:
            return self._fast_policy()
        except NotCoveredError:
            return None

    def _acted(self, names: dict[str, Any]) -> tuple[Array, Tensor, Tensor]:
        """Actions, values ``(E, 1)`` and log-probabilities ``(E,)`` of a step, by a policy of any kind."""
        if self._policy is None:
            actions, values, log_probs = self._called(names)
            return actions.cpu().numpy(), values, log_probs
        policy = self._policy
        policy.see(self._model._last_obs)
        masks = self._masks(names) if self.asks_before_acting else None
        drawn = policy.act(masks)
        log_probs = policy.log_prob(policy.outputs.clone(), torch.from_numpy(drawn), masks)
        return drawn, policy.value(), log_probs

    def _step(self, actions: Array, names: dict[str, Any]) -> None:
        """Act in all environments."""
        executed = actions
        if self._bounds is not None:
            flat = actions.reshape(-1)
            # The sum of squares is one quick call; it is also infinite where the largest float is near.
            if not math.isfinite(flat.dot(flat)) and not np.isfinite(flat).all():
                check_actions(actions, step=self._buffer.pos)
            if self._reshaped:
                actions = actions.reshape(len(actions), *self._model.action_space.shape)
            if self._squashes:
                executed = self._model.policy.unscale_action(actions)
            else:
                low, high = self._bounds
                executed = np.minimum(np.maximum(actions, low), high)
        names["actions"] = actions
        if self.shows_clipped_actions:
            names["clipped_actions"] = executed
        names["new_obs"], names["rewards"], names["dones"], names["infos"] = self._env.step(executed)
        self._model.num_timesteps += self._env.num_envs

    def _store(self, step: int, names: dict[str, Any]) -> None:
        """Write the step into the buffer and move on."""
        model, dones = self._model, names["dones"]
        for info in names["infos"]:
            if self._notes_itself or "episode" in info or "is_success" in info:
                model._update_info_buffer(names["infos"], dones)
                break
        if isinstance(self._rows, dict):
            for key, rows in self._rows.items():
                rows[step] = model._last_obs[key]
        else:
            self._rows[step] = model._last_obs
        self._actions[step] = names["actions"]
        self._rewards[step] = names["rewards"]
        self._episode_starts[step] = model._last_episode_starts
        self._buffer.pos = step + 1
        model._last_obs, model._last_episode_starts = names["new_obs"], dones

    def _bootstrap(self, names: dict[str, Any]) -> None:
        """Add the value of what would have followed where a time limit ended an episode."""
        model, rewards = self._model, names["rewards"]
        for env, done in enumerate(names["dones"]):
            names["idx"], names[self.name_of_done] = env, done
            info = names["infos"][env]
            if done and is_timeout(info):
                names["terminal_obs"] = model.policy.obs_to_tensor(info["terminal_observation"])[0]
                with torch.no_grad():
                    names["terminal_value"] = self._terminal_value(names)
                rewards[env] += model.gamma * names["terminal_value"].cpu()

    # What the policies with masks and with memory do otherwise.

    def _begin(self, names: dict[str, Any]) -> None:
        """Prepare before the callback hears of the rollout."""

    def _masks(self, names: dict[str, Any]) -> Array | None:
        """Which actions are allowed; a memory is brought up to date."""
        return None

    def _called(self, names: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Call the policy as SB3 does."""
        actions, values, log_probs = self._model.policy(names["obs_tensor"])
        return actions, values, log_probs

    def _note_timeouts(self, pending: Pending, step: int, names: dict[str, Any]) -> None:
        """Take care of the episodes that a time limit ended at a step."""
        pending.note_timeouts(step, names["rewards"], names["dones"], names["infos"])

    def _terminal_value(self, names: dict[str, Any]) -> Tensor:
        """V of the last observation of an episode, ``(1,)``."""
        value: Tensor = self._model.policy.predict_values(names["terminal_obs"])[0]
        return value

    def _last_values(self, observation: Any, names: dict[str, Any]) -> Tensor:
        """V of what follows the rollout, ``(E, 1)``."""
        values: Tensor = self._model.policy.predict_values(observation)
        return values

    def _end(self, callback: BaseCallback, names: dict[str, Any]) -> None:
        """Show what SB3 shows at the end."""
        if kind_of(self._model.action_space).is_index:
            names["actions"] = names["actions"].reshape(-1, 1)
        callback.update_locals(names)


def is_timeout(info: dict[str, Any]) -> bool:
    """Whether a time limit, and nothing else, ended the episode."""
    return info.get("terminal_observation") is not None and bool(info.get("TimeLimit.truncated", False))


def _by_step(arrays: Any, observations: Any) -> Any:
    """Views of a buffer's observations into which those of a step are written as they are."""
    if isinstance(arrays, dict):
        return {key: _by_step(array, observations[key]) for key, array in arrays.items()}
    return arrays.reshape(len(arrays), *observations.shape)
