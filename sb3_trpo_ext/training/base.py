"""What every algorithm of the family shares: rollouts that are checked, updates that are atomic, and the log."""

from __future__ import annotations

import inspect
import math
import os
import time
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.core.arguments import check_finite, check_integer, check_schedule
from sb3_trpo_ext.core.flat_optimizer import Lowest
from sb3_trpo_ext.core.parameters import gradient, trainable
from sb3_trpo_ext.policy.evaluation import UNVALIDATED, consistent_evaluation
from sb3_trpo_ext.policy.exploration import (
    LogStd,
    asked_of,
    check_exploration,
    representable,
    require_spread,
    set_spread,
)
from sb3_trpo_ext.policy.plain_policy import PlainPolicy
from sb3_trpo_ext.policy.signal import CURES
from sb3_trpo_ext.rollout.action_spaces import KINDS
from sb3_trpo_ext.rollout.buffers import by_time, check_full, resize, whole_rollout
from sb3_trpo_ext.rollout.env_copies import cheap_copies
from sb3_trpo_ext.rollout.fast import one_thread, quiet
from sb3_trpo_ext.rollout.fast_kinds import fast_rollout
from sb3_trpo_ext.rollout.finite import check_observation, check_policy, check_rollout
from sb3_trpo_ext.rollout.forward import NotCoveredError
from sb3_trpo_ext.rollout.known_classes import looks
from sb3_trpo_ext.training.action_values import ActionValueAlgorithm
from sb3_trpo_ext.training.arguments import check_spaces, check_trainable
from sb3_trpo_ext.training.transaction import (
    Atomic,
    Attributes,
    GradientCheckpoint,
    PolicyCheckpoint,
    Restorable,
    StateCheckpoint,
)

OURS = {"fast_rollouts", "fast_updates", "distributed", "bootstrap", "surrogate", "log_std", "log_std_min"}

PASSED_ON = {*inspect.signature(OnPolicyAlgorithm.__init__).parameters, *OURS} - {
    "monitor_wrapper",
    "supported_action_spaces",
    "_init_setup_model",
}
"""Arguments of SB3's template that its algorithms offer to users, and that of ours."""

REJECTIONS_BEFORE_WARNING = 10

PROBED = 256
"""Most samples in one forward pass where observations that are not finite are looked at."""


SelfAlgorithm = TypeVar("SelfAlgorithm", bound="TrustRegionAlgorithm")


@dataclass(frozen=True)
class Outcome:
    """What an update did.

    Attributes:
        record: What to log of it.
        reason: Why the policy is as it was, in words; empty if it moved.
    """

    record: dict[str, float]
    reason: str = ""


class UpdateRejectedError(Exception):
    """Undo the update and go on with the next rollout; the message is the reason in words."""


class TrustRegionAlgorithm(ActionValueAlgorithm):
    """Template of the family: collect a rollout, check it, update as one transaction, log.

    A subclass implements `_update`. Whatever happens inside it, an exception or KeyboardInterrupt included, policy
    and optimiser are afterwards either exactly as before or fully updated.

    Attributes:
        rollout_path: How the last rollout was collected: ``"fast"``, or SB3's way and why.
        update_path: How the last update was computed: ``"fast"``, or by autograd and why.
        policy_changes_in_rollouts: Whether something else than a callback changes the policy while a rollout is
            collected, which fast rollouts then expect at every step. They notice it by themselves, one rollout late.
    """

    refused_arguments: ClassVar[Mapping[str, str]] = {}
    """What a user of a neighbouring algorithm may pass, and what to use instead."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        fast_rollouts: bool | Literal["exact"] = True,
        fast_updates: bool = True,
        log_std: LogStd = "learned",
        log_std_min: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, env, **kwargs, _init_setup_model=False, supported_action_spaces=tuple(KINDS))
        self.fast_rollouts = fast_rollouts
        self.fast_updates = fast_updates
        self.log_std = log_std
        self.log_std_min = log_std_min
        self.rollout_path = self.update_path = ""
        self._plain_policy: PlainPolicy | None = None
        self._last_stand_in: PlainPolicy | None = None
        self.policy_changes_in_rollouts = False
        self._rejections_in_a_row = 0
        self._reported_rejections: list[str] = []

    def _refuse(self, arguments: Mapping[str, Any]) -> None:
        """Raise `TypeError` if an argument that a class would pass on to SB3 is not one of users."""
        for name, value in arguments.items():
            if name in self.refused_arguments or name not in PASSED_ON:
                hint = f": {self.refused_arguments[name]}" if name in self.refused_arguments else ""
                raise TypeError(
                    f"{type(self).__name__}() got an unexpected keyword argument {name!r} (= {value!r}){hint}."
                )

    def _setup_model(self) -> None:
        """Check the arguments, then build; `load` comes through here too."""
        self._join_workers()
        self._choose_policy_class()
        self._check_arguments()
        self._checked_size = self._checked_again()
        self.learning_rate = plain(self.learning_rate)
        with torch.inference_mode(False):  # whose tensors could not be trained
            super()._setup_model()
        if asked := asked_of(self):
            require_spread(self.policy, asked)
            self._set_spread(1.0)

    def _check_arguments(self) -> None:
        """Raise or warn about arguments that cannot work, naming argument, value and cure."""
        check_spaces(self.observation_space, self.action_space)
        if self.fast_rollouts not in (True, False, "exact"):
            raise ValueError(f"`fast_rollouts` must be True, False or 'exact', got {self.fast_rollouts!r}.")
        if self.fast_updates not in (True, False):
            raise ValueError(f"`fast_updates` must be True or False, got {self.fast_updates!r}.")
        self._check_action_values()
        check_integer("n_steps", self.n_steps)
        check_schedule("learning_rate", self.learning_rate)
        check_finite("ent_coef", self.ent_coef)
        check_exploration(asked_of(self), self.action_space, use_sde=self.use_sde)

    def _checked_again(self) -> tuple[Any, ...]:
        """What the checks of arguments know, and a user may change between two rollouts: sizes, what is made of Q."""
        sizes = repr(self.n_steps), self.n_envs, repr(getattr(self, "batch_size", None))  # 32 is not 32.0
        return *sizes, repr(self.bootstrap), repr(self.surrogate), repr(self.critic)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Train in another environment: what was remembered of the last one is dropped; arguments as in SB3.

        Statistics of the optimiser stay, as in SB3, and so does what adapts by itself.
        """
        before = self.env
        super().set_env(env, force_reset)
        if self.env is not before:
            self._forget()
            if hasattr(self, "rollout_buffer"):  # not before `_setup_model`
                self.rollout_buffer.reset()

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: torch.device | str = "auto",
    ) -> None:
        """Take over parameters: what was remembered of the last policy is dropped; arguments as in SB3."""
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
        except RuntimeError as error:
            if "size mismatch for value_net" in str(error):
                asked = "for each action" if self.has_action_values else "of the state"
                raise ValueError(
                    f"The parameters are those of another kind of critic: this model's has a value {asked}, as "
                    f"critic={self.critic!r} asks for. Load them with the `critic` that they were saved with."
                ) from error
            raise
        self._set_spread(None)
        self._forget()

    def _forget(self) -> None:
        """Drop what is remembered from update to update and belongs to another environment or another policy.

        `load` comes through here too, by way of `set_parameters`.
        """
        self._rejections_in_a_row = 0
        self._reported_rejections = []
        behind: Any = super()  # in the order of classes: rollouts with a memory
        if hasattr(behind, "_forget"):
            behind._forget()

    def entropy_weight(self) -> float:
        """``ent_coef`` in force: itself, or its schedule at the remaining progress."""
        value = self._current_value(self.ent_coef)
        if callable(self.ent_coef):
            check_finite("ent_coef", value)
        return value

    def _current_value(self, argument: float | Schedule) -> float:
        """An argument as it is now: itself, or its schedule; the last rollout may go beyond the end, a schedule not."""
        return float(argument(max(self._current_progress_remaining, 0.0)) if callable(argument) else argument)

    def _rollout_progress(self) -> float:
        """How much of ``learn`` is done where a rollout begins, in [0, 1].

        What SB3 keeps as the progress is that of the last update: the previous ``learn``'s, at the start of another.
        """
        return min(self.num_timesteps / max(self._total_timesteps, 1), 1.0)

    def _set_spread(self, remaining: float | None) -> None:
        """Let σ be what `log_std` and `log_std_min` say; see `set_spread`."""
        if self.log_std != "learned" or self.log_std_min is not None:
            set_spread(self.policy, self.log_std, self.log_std_min, remaining)

    def _lowest(self) -> Lowest:
        """Bounds that no step of the optimiser goes below."""
        if self.log_std_min is None:
            return {}
        log_std: Any = self.policy.log_std
        return {log_std: representable(self.log_std_min, log_std)}

    def _prepare_update(self) -> None:
        """Follow arguments that were changed since the last update."""

    def _begin_update(self) -> None:
        """Prepare for an update, as a part of its transaction."""

    @abstractmethod
    def _update(self) -> Outcome:
        """Update policy and critic from the full rollout buffer."""

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int, *args: Any
    ) -> bool:
        """Collect a rollout as SB3 does, and refuse one that is not finite.

        ``n_steps`` may have changed since the last one: the buffer follows, and the arguments are checked again.

        Args:
            env: The environments.
            callback: Called at every step.
            rollout_buffer: The buffer to fill.
            n_rollout_steps: Steps of each environment.
            *args: What a parent class of sb3-contrib takes beyond these.

        Raises:
            ValueError: If an observation, action, reward, value, log-probability, advantage or return is NaN or
                infinite; the message names which, the environment and the step. The policy is unchanged and the
                next ``learn`` resets the environments. An observation of which the policy makes finite values and
                gradients passes. If a parameter or σ of the policy is not finite, or σ is zero, the message names
                that instead. Also if ``n_steps`` or ``batch_size`` has become impossible.
        """
        self._between_updates()
        return self._as_one_rollout(
            lambda: self._collect_checked(env, callback, rollout_buffer, n_rollout_steps, *args)
        )

    def _collect_checked(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int, *args: Any
    ) -> bool:
        """See `collect_rollouts`; of one worker."""
        start = time.perf_counter()
        self._set_spread(1.0 - self._rollout_progress())
        if self._checked_again() != self._checked_size:
            self._check_arguments()
            self._checked_size = self._checked_again()
        n_rollout_steps = self._steps_of_rollout(n_rollout_steps)
        resize(rollout_buffer, n_rollout_steps, env.num_envs)
        try:
            try:
                completed = self._collect(env, callback, rollout_buffer, n_rollout_steps, *args)
            except Exception as error:
                if not _is_raised_by_a_policy(error):
                    raise
                # A policy that refuses NaN says nothing of where it came from: itself, or what it saw.
                try:
                    check_policy(self.policy)
                    check_observation(self._last_obs, step=rollout_buffer.pos)
                except ValueError as located:
                    raise located from error
                raise
            if completed:
                try:
                    self._check_rollout(rollout_buffer)
                except ValueError:
                    check_policy(self.policy)  # which may be what made all the rest not finite
                    raise
        except ValueError:
            self._last_obs = None
            raise
        self.logger.record("time/rollout_s", time.perf_counter() - start)
        return completed

    def _check_rollout(self, buffer: RolloutBuffer) -> None:
        """Raise `ValueError` if a rollout must not be learnt from."""
        check_rollout(buffer, self._last_obs, lambda: self._learns_from(buffer))

    def _steps_of_rollout(self, asked: int) -> int:
        """Steps of each environment in the next rollout, of which SB3's ``learn`` asks for ``n_steps``."""
        return asked

    def _learns_from(self, buffer: RolloutBuffer) -> bool:
        """Whether the policy has finite gradients at the observations that are not finite themselves."""
        with torch.inference_mode(False), torch.enable_grad(), consistent_evaluation(self.policy):
            batch = whole_rollout(buffer, self.action_space)
            for part in batch[batch.not_finite].split(PROBED):
                try:
                    values, log_prob, _ = part.evaluate_actions(self.policy)
                except ValueError:  # torch refuses a distribution's parameters
                    return False
                slopes = gradient([values.sum() + log_prob.sum()], trainable(self.policy))
                if not all(bool(slope.isfinite().all()) for slope in slopes.values()):
                    return False
        return True

    def _collect(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int, *args: Any
    ) -> bool:
        """Collect by the fast path where it covers the model, otherwise by SB3's; ``rollout_path`` says which."""
        fast, path = None, "stable_baselines3: fast_rollouts=False"
        if self.fast_rollouts:
            try:
                fast, path = fast_rollout(self, env, rollout_buffer, n_rollout_steps, *args), "fast"
            except NotCoveredError as reason:
                path = f"stable_baselines3: {reason}"
        if path != self.rollout_path and self.verbose >= 1:
            print(f"Rollouts: {path}")
        self.rollout_path = path
        quick_copies = cheap_copies(env) if self.fast_rollouts and not looks(callback) else nullcontext()
        with quick_copies, self._own_estimates(env, rollout_buffer, *args):
            if fast is not None:
                return fast.collect(callback)
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps, *args)

    def learn(
        self: SelfAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        *,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_freq: int | None = None,
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """Train for ``total_timesteps`` steps of all environments together.

        Args:
            total_timesteps: As in SB3.
            callback: As in SB3.
            log_interval: As in SB3.
            tb_log_name: As in SB3; None for the name of the class.
            reset_num_timesteps: As in SB3.
            progress_bar: As in SB3.
            checkpoint_dir: Directory, one for each call, in which the whole state of the run is written between
                updates; None for nowhere. The same command, started again after its process was killed, goes on from
                the last checkpoint to the same ``total_timesteps``, with the numbers of a run that was not killed: of
                policy, optimiser, random generators, normalisation, callbacks, logs, and of Gymnasium's classic control
                and MuJoCo tasks with the usual wrappers. An environment, wrapper or VecEnv of your own goes on exactly
                if it has two methods: ``get_checkpoint_state()`` returns its own state (without that of what it wraps)
                as anything that can be pickled, ``set_checkpoint_state(state)`` takes it back. Where one has not, all
                begin new episodes, and a warning says so. A run that is at its end returns at once; one that a callback
                stopped goes on from its last checkpoint. SIGTERM ends the program after the next update and a
                checkpoint, with exit code 0. Checkpoints are pickles: load none that you do not trust.
            checkpoint_freq: Timesteps between two checkpoints, of which the last two are kept; None for 30 seconds.
            **kwargs: What a parent class of sb3-contrib takes beyond these.

        Raises:
            RuntimeError: See `train`.
            ValueError: If ``checkpoint_dir`` holds another run, or ``checkpoint_freq`` is not a positive integer.
        """
        check_trainable(self.policy)
        with self._learning():
            return super().learn(
                total_timesteps=total_timesteps,
                callback=callback,
                log_interval=log_interval,
                tb_log_name=tb_log_name or type(self).__name__,
                reset_num_timesteps=reset_num_timesteps,
                progress_bar=progress_bar,
                checkpoint_dir=checkpoint_dir,
                checkpoint_freq=checkpoint_freq,
                **kwargs,
            )

    def train(self) -> None:
        """Update policy and critic from the rollout buffer, as one transaction.

        Gradients are taken whatever the caller has switched off: within ``torch.no_grad`` and
        ``torch.inference_mode`` too.

        Raises:
            RuntimeError: If the buffer is not full, or the policy was made within ``torch.inference_mode``: such
                parameters have no gradients.
        """
        with torch.inference_mode(False), torch.enable_grad(), self._together():
            self._train()

    def _train(self) -> None:
        check_full(self.rollout_buffer)
        check_trainable(self.policy)
        outcome = Outcome({})
        self._prepare_update()
        try:
            states = self._checkpoints()
            # Twice: the outer one finishes what an interrupt cuts short while the inner one undoes an update.
            with Atomic(*states), Atomic(*states):
                self._begin_update()
                self._update_learning_rate(self.policy.optimizer)
                self._plain_policy = self._stand_in_of_all()
                with UNVALIDATED.used(), quiet(), one_thread() if self._plain_policy else nullcontext():
                    finished = self._update()
                self._share_buffers()
                self._check_outcome(finished.record, states)
                outcome = finished  # what was undone is not logged as done
        except UpdateRejectedError as rejection:
            outcome = Outcome({}, str(rejection))
            self._after_rejection(rejection)
        finally:
            self._plain_policy = None
        self._report(outcome)
        self._log(outcome.record)

    def _stand_in(self) -> PlainPolicy | None:
        """What computes an update by hand in the policy's stead, if it can; ``update_path`` says whether and why."""
        plain, path = None, "autograd: fast_updates=False"
        if self.fast_updates:
            try:
                plain, path = self._require_fast_updates(), "fast"
            except NotCoveredError as reason:
                path = f"autograd: {reason}"
        if path != self.update_path and self.verbose >= 1:
            print(f"Updates: {path}")
        self.update_path = path
        return plain

    def _require_fast_updates(self) -> PlainPolicy:
        """What stands for the policy; `NotCoveredError` where nothing can."""
        known, self._last_stand_in = self._last_stand_in, None
        self._last_stand_in = stand_in = known.renewed(self.policy) if known else PlainPolicy(self.policy)
        return stand_in

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_last_stand_in"]

    def _after_rejection(self, rejection: UpdateRejectedError) -> None:
        """Prepare the next update after one that was undone."""

    def _check_outcome(self, record: dict[str, float], before: Sequence[Restorable]) -> None:
        """Raise `UpdateRejectedError` if a finished update must be undone, knowing what was ``before`` it."""
        for loss in ("value_loss", "loss"):
            if not math.isfinite(record.get(f"train/{loss}", 0.0)):
                raise UpdateRejectedError(f"the {loss.replace('_', ' ')} is not finite")
        if any(state.found_broken() for state in before if isinstance(state, PolicyCheckpoint)):
            raise UpdateRejectedError("a parameter became non-finite")

    def _checkpoints(self) -> tuple[Restorable, ...]:
        """All that an update may change."""
        return (
            PolicyCheckpoint(self.policy),
            StateCheckpoint(self.policy.optimizer),
            GradientCheckpoint(self.policy),
            Attributes(self, "_n_updates"),
        )

    def _log(self, record: dict[str, float]) -> None:
        buffer = self.rollout_buffer
        # In the order of SB3, one environment after the other, for the same rounding.
        values, returns = (by_time(buffer, array).T.flatten() for array in (buffer.values, buffer.returns))
        explained = explained_variance if self.reduction.workers == 1 else self._explained_variance_of_all
        self.logger.record("train/explained_variance", explained(values, returns))
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", torch.exp(self.policy.log_std).mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for key, value in (record | self._messages_since()).items():
            self.logger.record(key, value)

    def _report(self, outcome: Outcome) -> None:
        """Count updates that left the policy as it was."""
        if outcome.record.get("train/kl_is_sampled"):
            name = type(getattr(self.policy, "action_dist", None)).__name__
            self._tell_once(
                "the KL divergence is estimated from the actions that were taken",
                f"none is registered for {name} (see sb3_trpo_ext.register_distribution)",
            )
        if outcome.reason:
            self._report_rejection(outcome.reason)
        else:
            self._rejections_in_a_row = 0

    def _report_rejection(self, reason: str) -> None:
        """Tell the user why an update was rejected: each reason once, and a warning when it goes on."""
        self._tell_once("update rejected, the policy is unchanged", reason)
        self._rejections_in_a_row += 1
        if self._rejections_in_a_row == REJECTIONS_BEFORE_WARNING:
            warnings.warn(
                f"{REJECTIONS_BEFORE_WARNING} updates in a row were rejected, the last because {reason}. "
                + CURES.get(reason, f"The usual cures: {self._cures()}."),
                UserWarning,
                stacklevel=4,
            )

    def _cures(self) -> str:
        """What a user may change, among the arguments of this class, where updates are rejected."""
        return "a larger batch (`n_steps`), and rewards of the order of one (VecNormalize)"

    def _tell_once(self, event: str, reason: str) -> None:
        """Print what happened and why, the first time that it happens for this reason."""
        if reason not in self._reported_rejections:
            self._reported_rejections.append(reason)
            if self.verbose >= 1:
                print(f"{type(self).__name__}: {event}: {reason}.")


def _is_raised_by_a_policy(error: Exception) -> bool:
    """Whether it comes from torch or the code that acts, rather than from an environment or a callback."""
    trace, where = error.__traceback__, ""
    while trace is not None:
        where, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return where.split(".")[0] in ("torch", "sb3_trpo_ext")


def plain(value: Any) -> Any:
    """A schedule as it is, and a number of NumPy as a float, which SB3's schedules take."""
    return float(value) if isinstance(value, np.number) else value


@contextmanager
def timed(record: dict[str, float], key: str) -> Iterator[None]:
    """Add the seconds that a block takes."""
    start = time.perf_counter()
    yield
    record[key] = record.get(key, 0.0) + time.perf_counter() - start
