"""Algorithms whose critic may have a value for each action: what follows from Q in a rollout and in the surrogate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from sb3_trpo_ext.core.advantages import trace_advantages
from sb3_trpo_ext.rollout.action_values import ActionValues, Bootstrap, following_values, with_action_values
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import MASKABLE_BUFFERS, VIEWED_BUFFERS, by_time, whole_rollout
from sb3_trpo_ext.rollout.fast import is_timeout
from sb3_trpo_ext.rollout.past_rollouts import bootstrap_values
from sb3_trpo_ext.training.checkpoint import ResumableAlgorithm

VALUED = 512
"""Most states in one forward pass where a rollout is valued again."""

ROUNDING = 16 * torch.finfo(torch.float32).eps
"""Advantages up to so much of the largest |Q| are differences of rounding."""


class CutOff(NamedTuple):
    """An episode that a time limit ended: at which step of the rollout, in which environment, and its last info."""

    step: int
    env: int
    info: dict[str, Any]


@contextmanager
def replaced(owner: Any, name: str, method: Any) -> Iterator[None]:
    """Give an object another method within the block; one of its own that it had before it has again afterwards."""
    before = {name: vars(owner)[name]} if name in vars(owner) else {}
    setattr(owner, name, method)
    try:
        yield
    finally:
        vars(owner).pop(name, None)
        vars(owner).update(before)


class ActionValueAlgorithm(ResumableAlgorithm):
    """An algorithm that knows what to do with a policy of `ActionValues`, and is as it is with any other.

    Args:
        policy: As in SB3.
        env: As in SB3.
        bootstrap: What is expected to follow a state, in advantages and returns: ``"expected"``, V(s) = Σ_a π Q, or
            ``"max"``, max_a Q(s,a).
        surrogate: ``"sampled"``, by the actions taken, or ``"expected"``, the sum over all.
        **kwargs: As in SB3.
    """

    critic: Any
    """What the model was asked for as its critic."""

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        bootstrap: Bootstrap = "expected",
        surrogate: Literal["sampled", "expected"] = "sampled",
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, env, **kwargs)
        self.bootstrap = bootstrap
        self.surrogate = surrogate
        self._masks_after: Tensor | None = None

    def _choose_policy_class(self) -> None:
        """Give the policy a value for each action, if that is asked for; `ValueError` where it can have none."""
        if self.has_action_values:
            self.policy_class = with_action_values(self.policy_class, self.action_space)

    @property
    def has_action_values(self) -> bool:
        """Whether the critic has a value for each action."""
        return self.critic == "action_value" or issubclass(self.policy_class, ActionValues)

    def _check_action_values(self) -> None:
        """Raise `ValueError` about arguments that say something of action values."""
        for name, known, default in (
            ("bootstrap", ("expected", "max"), "expected"),
            ("surrogate", ("sampled", "expected"), "sampled"),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"`{name}` must be {' or '.join(map(repr, known))}, got {value!r}.")
            if value != default and not self.has_action_values:
                raise ValueError(
                    f"`{name}={value!r}` needs a value for each action, got it with critic={self.critic!r}. Pass "
                    "critic='action_value' too."
                )
        if self.has_action_values and not issubclass(self.policy_class, ActionValues):
            raise ValueError(
                "`critic='action_value'` came when the policy had been made already, a "
                f"{self.policy_class.__name__} with a value for each state. Make a new model with it."
            )
        if self.has_action_values and self.rollout_buffer_class not in (None, *VIEWED_BUFFERS):
            raise ValueError(
                "A critic with a value for each action needs the arrays of SB3's own rollout buffers, got "
                f"rollout_buffer_class={self.rollout_buffer_class!r}. Leave out one of the two."
            )

    # What a rollout says of advantages and returns.

    def _following_masks(self, env: VecEnv, *args: Any) -> Any:
        """Which actions are allowed after the rollout, ``(E, K)``; None where all are."""
        return None

    @contextmanager
    def _own_estimates(self, env: VecEnv, buffer: RolloutBuffer, *args: Any) -> Iterator[None]:
        """Let a rollout end with advantages and returns that bootstrap as the model is asked to.

        Args:
            env: The environments.
            buffer: The buffer that the rollout fills.
            *args: What a parent class of sb3-contrib takes beyond these.
        """
        if not self.has_action_values or (self.bootstrap == "expected" and not isinstance(buffer, MASKABLE_BUFFERS)):
            yield  # SB3's own are what is asked for
            return
        cut_off: list[CutOff] = []
        note = self._update_info_buffer

        def note_cut_off(infos: list[dict[str, Any]], dones: np.ndarray) -> None:
            note(infos, dones)
            ends = [int(index) for index in np.flatnonzero(dones) if is_timeout(infos[index])]
            cut_off.extend(CutOff(buffer.pos, index, infos[index]) for index in ends)

        def estimate(last_values: Tensor, dones: np.ndarray) -> None:
            masks = self._following_masks(env, *args)
            self._masks_after = None if masks is None else torch.as_tensor(np.asarray(masks)).view(buffer.n_envs, -1)
            self._estimate(buffer, cut_off, dones)
            cut_off.clear()  # their rewards are as they should be, if a callback asks once more

        # What SB3's loop calls once a step, and at the end before the callback hears of it.
        own = replaced(self, "_update_info_buffer", note_cut_off)
        with own, replaced(buffer, "compute_returns_and_advantage", estimate):
            yield

    def _excluded_save_params(self) -> list[str]:
        replaced = getattr(vars(self).get("_update_info_buffer"), "__module__", "") == __name__
        ours = ["_masks_after", "_update_info_buffer"] if replaced else ["_masks_after"]
        return [*super()._excluded_save_params(), *ours]

    @torch.no_grad()
    def _estimate(self, buffer: RolloutBuffer, cut_off: list[CutOff], dones: np.ndarray) -> None:
        """Fill in advantages G - V(s) and returns G, the λ-returns that bootstrap as the model is asked to.

        Args:
            buffer: The buffer, full of what SB3's loop wrote: where a time limit ended an episode, γV of its last state
                is in the reward.
            cut_off: The episodes that a time limit ended.
            dones: Which episodes ended at the last step, ``(E,)``.
        """
        for step, env, info in cut_off:
            last = self.policy.obs_to_tensor(info["terminal_observation"])[0]
            added = float(self.policy.predict_values(last))
            due = float(self._bootstraps(last, self._mask_of(info)))
            buffer.rewards[step, env] += self.gamma * (due - added)
        shape = buffer.buffer_size, buffer.n_envs
        batch = whole_rollout(buffer, self.action_space)
        observations = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]
        last_values = self._bootstraps(observations, self._masks_after)
        values = torch.cat([batch.old_values, last_values]).view(shape[0] + 1, shape[1])
        bootstraps = values
        if self.bootstrap == "max":
            parts = [bootstrap_values(self.policy, part, self.bootstrap) for part in batch.split(VALUED)]
            bootstraps = torch.cat([*parts, last_values]).view_as(values)
        starts = np.concatenate([by_time(buffer, buffer.episode_starts)[1:], dones[None]]).astype(np.float32)
        advantages = trace_advantages(
            torch.as_tensor(by_time(buffer, buffer.rewards)).to(values),
            values,
            1.0 - torch.as_tensor(starts).to(values),
            torch.ones(shape).to(values),
            discount=buffer.gamma,
            trace_decay=buffer.gae_lambda,
            bootstraps=bootstraps,
        )
        buffer.advantages = advantages.cpu().numpy().astype(buffer.values.dtype)
        buffer.returns = buffer.advantages + buffer.values

    def _bootstraps(self, observations: Any, masks: Any) -> Tensor:
        """What is expected to follow some states, ``(N,)``."""
        return following_values(self.policy, observations, masks, self.bootstrap)

    def _mask_of(self, info: dict[str, Any]) -> Any:
        """Which actions an episode's last state allows, where its environment says so as Gymnasium's do; or None.

        Nobody can ask for it: the environment is in its next episode already.
        """
        if self._masks_after is None:  # the policy takes every action
            return None
        try:
            mask = np.asarray(info.get("action_mask", ())).astype(bool)
        except ValueError:  # something else of that name
            return None
        allows = mask.shape == (int(self.action_space.n),) and bool(mask.any())  # type: ignore[attr-defined]
        return torch.as_tensor(mask).view(1, -1) if allows else None

    # What the policy step sees.

    @torch.no_grad()
    def _with_action_advantages(self, batch: Batch, chunk_size: int | None, *, standardize: bool) -> Batch:
        """The batch with A(s,·) = Q(s,·) - V(s), those of rounding alone zero, divided by their deviation if asked for.

        Under π_old their mean is zero in every state, so that the deviation is the square root of E[Σ_a π_old A²].
        """
        policy: Any = self.policy
        reduction, parts, squares, largest = batch.reduction, [], [], []
        for part in batch.split(chunk_size):
            values, masses = policy.action_values(part.inputs), policy.probabilities(part.inputs, part.action_masks)
            advantages = advantages_of_all(values, masses)
            parts.append(advantages)
            squares.append(part.mean((masses * advantages.square()).sum(dim=1)))
            largest.append(torch.stack([reduction.largest_share(each.abs()) for each in (advantages, values)]))
        _, variance, bounds = reduction.totals([], torch.stack(squares).sum()[None], torch.stack(largest).amax(dim=0))
        most, magnitude = bounds.tolist()
        advantages = torch.cat(parts)
        if most <= ROUNDING * magnitude:  # in accepting form: what is not finite others will say
            advantages = torch.zeros_like(advantages)
        elif standardize:
            advantages = advantages / (variance.sqrt() + 1e-8)
        return replace(batch, action_advantages=advantages)


def advantages_of_all(action_values: Tensor, probabilities: Tensor) -> Tensor:
    """A(s,·) = Q(s,·) - Σ_a π(a|s) Q(s,a), zero for what π never does, ``(N, K)``.

    Args:
        action_values: Q(s,·), ``(N, K)``.
        probabilities: π(·|s), ``(N, K)``.
    """
    done = probabilities > 0
    values = torch.where(done, action_values, 0.0)
    return torch.where(done, values - (probabilities * values).sum(dim=1, keepdim=True), 0.0)
