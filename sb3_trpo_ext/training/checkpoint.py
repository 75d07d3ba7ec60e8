"""Runs that go on after their process was killed: ``learn(..., checkpoint_dir=...)``.

Of several workers each writes a part, with its own environments and random generators. All write at the same moments,
and go on from the same checkpoint; with another number of workers all have the learning state of the first one, and
begin new episodes.
"""

from __future__ import annotations

import math
import os
import pickle
import platform
import random
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from gymnasium import Env, spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat, configure
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
from torch import nn

from sb3_trpo_ext.core.arguments import check_integer
from sb3_trpo_ext.rollout.env_copies import vec_layers
from sb3_trpo_ext.rollout.env_state import EnvStates, layers
from sb3_trpo_ext.rollout.object_state import (
    Attributes,
    References,
    is_data,
    parameters_of,
    put_space_generators,
    space_generators,
)
from sb3_trpo_ext.training.checkpoint_files import Checkpoint, CheckpointFolder
from sb3_trpo_ext.training.communicator import ProcessGroup
from sb3_trpo_ext.training.parallel import ParallelAlgorithm
from sb3_trpo_ext.training.transaction import Atomic, Restorable
from sb3_trpo_ext.training.transaction import Attributes as AttributesAsTheyWere

SECONDS_BETWEEN = 30.0
"""Between two checkpoints, where ``checkpoint_freq`` is None."""

ELSEWHERE = (
    "policy",
    "env",
    "rollout_buffer",
    "device",
    "reduction",
    "value_critic",
    "_critic_arguments",
    "start_time",
    "_vec_normalize_env",
    "_logger",
    "_custom_logger",
    "_plain_policy",
    "_last_stand_in",
    "_run",
    "_processes",
    "_session",
)
"""Attributes of a model that are saved otherwise, or made anew."""

MADE_OF_ARGUMENTS = ("policy_class", "lr_schedule", "n_envs", "_checked_size")
"""Attributes of a model that its constructor makes of its arguments."""

MAY_DIFFER = {
    "policy",
    "env",
    "seed",
    "verbose",
    "tensorboard_log",
    "device",
    "fast_rollouts",
    "fast_updates",
    "stats_window_size",
    "distributed",
}
"""Arguments that a run may be continued with other values of: they are not what is learnt."""

OF_A_CALLBACK = ("model", "locals", "globals", "parent", "training_env")
"""Attributes that tell a callback where it is."""

PACKAGES = ("sb3-trpo-ext", "stable-baselines3", "sb3-contrib", "gymnasium", "torch", "numpy", "mujoco")
POINTS = 11
"""Where a schedule is compared with another."""

WITHOUT_STATE = ("ConvertCallback", "CallbackList", "ProgressBarCallback")
"""Callbacks that a run may be continued without."""

SelfResumable = TypeVar("SelfResumable", bound="ResumableAlgorithm")


class Ranks:
    """The processes that train together.

    Args:
        processes: Their messages; None where this one is alone.
    """

    def __init__(self, processes: ProcessGroup | None) -> None:
        self._processes = processes
        self.rank, self.world_size = (0, 1) if processes is None else (processes.rank, processes.workers)

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of them."""
        return any(self.gathered(flag))

    def gathered(self, mine: Any) -> list[Any]:
        """What each of them has, once all have it."""
        return [mine] if self._processes is None else self._processes.exchange(mine)


class AlreadyFinishedError(Exception):
    """The run in the directory is at its end; caught by ``learn``."""


class ResumableAlgorithm(ParallelAlgorithm):
    """An algorithm whose runs are written down between updates, and go on from there in another process.

    A subclass calls `_between_updates` before it collects a rollout.
    """

    _run: Run | None = None

    def learn(
        self: SelfResumable,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "OnPolicyAlgorithm",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        *,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_freq: int | None = None,
        **kwargs: Any,
    ) -> SelfResumable:
        """Train as SB3 does, with checkpoints if there is a directory for them."""
        check_checkpoint_arguments(checkpoint_dir, checkpoint_freq)
        arguments: dict[str, Any] = {
            "total_timesteps": total_timesteps,
            "callback": callback,
            "log_interval": log_interval,
            "tb_log_name": tb_log_name,
            "reset_num_timesteps": reset_num_timesteps,
            "progress_bar": progress_bar,
            **kwargs,
        }
        ranks = Ranks(self._processes)
        asked = ranks.gathered((checkpoint_dir is not None, checkpoint_freq))
        if len(set(asked)) > 1:
            words = [f"{'a directory' if given else None} and checkpoint_freq={freq}" for given, freq in asked]
            raise ValueError(
                f"`checkpoint_dir` and `checkpoint_freq` must be the same for all processes, got {'; '.join(words)}, "
                "rank by rank. Run one script with the same arguments on all of them."
            )
        if checkpoint_dir is None:
            super().learn(**arguments)
            return self
        began = 0 if reset_num_timesteps else int(self.num_timesteps)
        if math.isnan(total_timesteps):
            raise ValueError("`total_timesteps` must be a number of timesteps, got nan. Pass math.inf for no end.")
        total = began + (math.ceil(total_timesteps) if math.isfinite(total_timesteps) else total_timesteps)  # also 1e5
        run = Run(self, checkpoint_dir, checkpoint_freq, began, total, log_interval, ranks)
        with run:
            try:
                super().learn(**arguments | {"log_interval": run.log_interval})
            except AlreadyFinishedError:
                pass
            else:
                run.end()
        return self

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        """Prepare as SB3 does, and bring a run back that was begun before."""
        run = self._run
        if run is None:
            return super()._setup_learn(*args, **kwargs)
        with run.same_tensorboard_folder():
            total_timesteps, callback = super()._setup_learn(*args, **kwargs)
        run.begin(callback)
        return total_timesteps, callback

    def _between_updates(self) -> None:
        """Called before a rollout is collected: write a checkpoint if it is time for one."""
        if self._run is not None:
            self._run.between_updates()

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log as SB3 does, with iterations counted from the beginning of a run that was resumed."""
        if self._run is not None and iteration:
            iteration = self._run.logged_iteration(iteration)
            if not iteration:
                return
        super().dump_logs(iteration)

    def _checkpoints(self) -> tuple[Restorable, ...]:
        """All that an update may change."""
        return ()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_run"]


def check_checkpoint_arguments(checkpoint_dir: Any, checkpoint_freq: Any) -> None:
    """Raise `ValueError` or `TypeError` for arguments of ``learn`` that cannot work."""
    if checkpoint_freq is not None:
        check_integer("checkpoint_freq", checkpoint_freq, hint="Pass None for a checkpoint every 30 seconds.")
        if checkpoint_dir is None:
            raise ValueError(
                f"`checkpoint_freq` says how often to write into `checkpoint_dir`, got {checkpoint_freq} without one. "
                "Pass a directory too."
            )
    if checkpoint_dir is not None and not isinstance(checkpoint_dir, (str, os.PathLike)):
        raise TypeError(f"`checkpoint_dir` must be a path, got {checkpoint_dir!r}.")
    if checkpoint_dir is not None and not os.fspath(checkpoint_dir):
        raise ValueError("`checkpoint_dir` must be a path, got ''. Pass None for no checkpoints.")


class Run:
    """One call of ``learn`` with checkpoints, from its first process to its last.

    Args:
        model: The model that learns.
        path: Where the checkpoints are.
        freq: Timesteps between two; None for `SECONDS_BETWEEN`.
        began: ``num_timesteps`` at the beginning of the call.
        total: ``num_timesteps`` at its end.
        log_interval: Of ``learn``.
        ranks: The processes that train together.
    """

    def __init__(
        self,
        model: Any,
        path: str | os.PathLike[str],
        freq: int | None,
        began: int,
        total: float,
        log_interval: int | None,
        ranks: Ranks,
    ) -> None:
        self._model, self._freq, self._ranks = model, freq, ranks
        self._folder = folder = CheckpointFolder(path, ranks.rank, ranks.world_size)
        self._began, self._total = began, total
        self._asked_log_interval = log_interval
        self._identity = _identity(model)
        self._found = self._usable(folder.newest())
        self._require_one_folder()
        self._was_asked_to_end = False  # by SIGTERM, at any moment
        self._terminated = False  # as all ranks have agreed, between two updates
        self._pending: bytes | None = None
        self._iterations = self._iterations_before = 0
        self._tried_at = self._written_at = began
        self._previous_handler: Any = None

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the model has no run."""

    def __reduce__(self) -> Any:
        """Nor has one that was pickled."""
        return type(None), ()

    # The frame: what happens around SB3's loop.

    def __enter__(self) -> Run:
        """Begin to listen for SIGTERM."""
        self._model._run = self
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is not None:
            self._previous_handler = signal.signal(signal.SIGTERM, self._note_termination)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave signals and model as they were."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
        del self._model._run
        if self._was_asked_to_end and isinstance(error, (EOFError, ConnectionError)):
            # The signal went to the whole group of processes, and the environments in some of them are gone.
            self._leave()

    def _note_termination(self, number: int, frame: Any) -> None:
        self._was_asked_to_end = True

    def _leave(self) -> None:
        """End the program as SIGTERM asks."""
        what = f"The checkpoint at {self._written_at} timesteps is in {self._folder.path}"
        if self._written_at == self._began:
            what = "There was no update yet"
        self._tell(f"Ended by SIGTERM. {what}: the same command goes on from there.")
        raise SystemExit(0)

    def _tell(self, text: str) -> None:
        if not self._ranks.rank:
            print(text, flush=True)

    @property
    def log_interval(self) -> int | None:
        """What SB3's loop, which counts from one, is told: of a resumed run `logged_iteration` decides."""
        resumed = self._found is not None and self._asked_log_interval is not None
        return 1 if resumed else self._asked_log_interval

    def logged_iteration(self, iteration: int) -> int:
        """The number of an iteration since the beginning of the run, or 0 if it is not to be logged."""
        iteration += self._iterations_before
        return 0 if self._asked_log_interval and iteration % self._asked_log_interval else iteration

    def same_tensorboard_folder(self) -> _SameFolder:
        """While SB3 prepares, let a resumed run's log go on where it was."""
        return _SameFolder(self._model, self._found)

    def begin(self, callback: BaseCallback) -> None:
        """All is prepared: learn what there is to be written, and bring back what was."""
        self._state = RunState(self._model, callback)
        self._identity["the environment"] = self._state.environment
        self._due_since = time.monotonic()
        if self._found is None:
            self._state.taken()  # what cannot be taken is known now
            return
        manifest = self._found.manifest
        self._require_same(manifest["run"])
        self._state.world = self._found.own, manifest["world_size"], self._ranks.world_size
        self._tried_at = self._written_at = manifest["steps"]
        finished = manifest["steps"] >= self._total
        state = self._state.read(self._found.part)
        with Atomic(*self._model._checkpoints(), AttributesAsTheyWere(self._model, *_existing(self._model))):
            self._state.put(state, callbacks=finished, environments=finished)
        self._model._total_timesteps = self._total
        self._iterations = self._iterations_before = state["iterations"]
        self._model.start_time = time.time_ns() - state["elapsed"]
        if finished:
            self._model._last_obs = self._model._last_obs if self._state.is_exact(state) else None
            self._tell(
                f"The run in {self._folder.path} has its {self._total} timesteps: nothing is left to do. A larger "
                "`total_timesteps` goes on, an empty `checkpoint_dir` starts anew."
            )
            raise AlreadyFinishedError
        # Again before the first rollout: callbacks may change anything when training starts.
        self._pending = self._found.part
        self._found = replace(self._found, part=b"")
        self._tell(f"Resumed from {self._found.path}, at {manifest['steps']} of {self._total} timesteps.")

    def between_updates(self) -> None:
        """Before a rollout: bring the rest of the run back, or write it down if it is time."""
        self._terminated = self._ranks.any(self._was_asked_to_end)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._state.resume(self._state.read(pending), self._total)
            self._due_since = time.monotonic()
        elif self._iterations > self._iterations_before and self._ranks.any(self._terminated or self._is_due()):
            self._write()
        if self._terminated:
            self._leave()
        self._iterations += 1

    def end(self) -> None:
        """SB3's loop has ended."""
        model = self._model
        if model.num_timesteps >= self._total:
            self._write(finished=True)
        else:
            self._tell(
                f"A callback stopped the run in {self._folder.path} at {model.num_timesteps} of {self._total} "
                "timesteps. The same command goes on from its last checkpoint."
            )
        if self._ranks.any(self._was_asked_to_end):
            self._leave()

    def _is_due(self) -> bool:
        if self._freq is None:
            return time.monotonic() - self._due_since >= SECONDS_BETWEEN
        steps = self._model.num_timesteps - self._began
        return steps // self._freq > (self._tried_at - self._began) // self._freq

    def _write(self, finished: bool = False) -> None:
        """Write a checkpoint; a disk that is full does not end the run."""
        steps, state = int(self._model.num_timesteps), self._state.taken(self._iterations)
        said = {
            "finished": finished,
            "began": self._began,
            "total": self._total,
            "run": self._identity,
            "tensorboard": self._tensorboard_folder(),
            "versions": _versions(),
        }
        part, problem = None, None
        try:
            part = self._folder.write_part(steps, state)
        except OSError as error:
            problem = error
        parts = self._ranks.gathered(part)
        written = [each for each in parts if each is not None]
        if len(written) == len(parts) and self._ranks.rank == 0:
            try:
                self._folder.write_manifest(steps, written, said)
            except OSError as error:
                problem = error
        if self._ranks.rank == 0 and (problem is not None or len(written) < len(parts)):
            self._folder.discard(steps)
        if problem is None:
            self._written_at = steps if len(written) == len(parts) else self._written_at
        elif self._terminated:
            raise problem
        else:
            warnings.warn(f"No checkpoint could be written at {steps} timesteps: {problem}", stacklevel=2)
        self._tried_at, self._due_since = steps, time.monotonic()

    def _tensorboard_folder(self) -> str | None:
        writes = any(isinstance(each, TensorBoardOutputFormat) for each in self._model.logger.output_formats)
        own = not self._model._custom_logger and writes and self._model.logger.dir
        return Path(self._model.logger.dir).name if own else None

    def _require_one_folder(self) -> None:
        """Raise `ValueError` if processes write into different directories, or find different checkpoints."""
        if self._ranks.world_size == 1:
            return
        (mark, *_) = self._ranks.gathered(self._folder.leave_mark() if self._ranks.rank == 0 else None)
        found = self._ranks.gathered(self._folder.has(mark))
        self._folder.remove_mark(mark)
        if not all(found):
            raise ValueError(
                f"`checkpoint_dir` {str(self._folder.path)!r} must be one directory for all processes, but rank "
                f"{found.index(False)} does not find there what rank 0 writes. Pass one that all of them share."
            )
        newest = self._ranks.gathered(self._found and self._found.manifest["steps"])
        if len(set(newest)) > 1:
            raise ValueError(
                f"`checkpoint_dir` {str(self._folder.path)!r} must be one directory for all processes, but the newest "
                f"checkpoints that they find are of {', '.join(map(str, newest))} timesteps, rank by rank. Pass one "
                "that all of them share."
            )

    def _usable(self, found: Checkpoint | None) -> Checkpoint | None:
        """A checkpoint that this run may go on from, or None if it is to begin here.

        Raises:
            ValueError: If it is of another run; the message says what differs.
        """
        if found is None:
            return None
        there = found.manifest
        if there["began"] != self._began:
            if there["finished"] and there["steps"] == self._began:
                return None  # the next call of ``learn``, which begins where that one ended
            raise ValueError(
                f"`checkpoint_dir` {str(self._folder.path)!r} holds a call of `learn` that began at {there['began']} "
                f"timesteps, and this one begins at {self._began}. Use a directory for each call, and start with the "
                "model that the call began with."
            )
        self._require_same(there["run"])
        others = {name: (old, new) for name, new in _versions().items() if (old := there["versions"].get(name)) != new}
        if others:
            listing = ", ".join(f"{name} {old} there, {new} here" for name, (old, new) in others.items())
            warnings.warn(
                f"The run was begun with other versions, and may differ in last bits: {listing}.", stacklevel=5
            )
        return found

    def _require_same(self, there: Mapping[str, str]) -> None:
        differences = _differences(there, self._identity)
        if differences:
            raise ValueError(
                f"`checkpoint_dir` {str(self._folder.path)!r} holds another run: {'; '.join(differences)}. Start the "
                "same command again, or use an empty directory for another run."
            )


class _SameFolder:
    """Let SB3 find a logger that goes on in the TensorBoard folder of the run."""

    def __init__(self, model: Any, found: Checkpoint | None) -> None:
        name = found.manifest["tensorboard"] if found is not None else None
        self._model, self._active = model, False
        if found is not None and name is not None and not model._custom_logger and model.tensorboard_log is not None:
            self._active, self._step = True, found.manifest["steps"]
            self._folder = os.path.join(model.tensorboard_log, name)

    def __enter__(self) -> None:
        if self._active:
            formats = ["stdout", "tensorboard"] if self._model.verbose >= 1 else ["tensorboard"]
            self._model._logger = configure(self._folder, formats)
            _purge(self._model._logger, self._folder, self._step)
            self._model._custom_logger = True

    def __exit__(self, *exception: object) -> None:
        if self._active:
            self._model._custom_logger = False


def _purge(logger: Logger, folder: str, step: int) -> None:
    """Let TensorBoard forget what was logged after a step: it is logged again."""
    for each in logger.output_formats:
        if isinstance(each, TensorBoardOutputFormat):
            each.writer.close()
            each.writer = type(each.writer)(log_dir=folder, purge_step=step + 1)


class RunState:
    """All that decides how a run goes on.

    Args:
        model: The model, whose ``learn`` is prepared.
        callback: The callback of ``learn``.

    Attributes:
        world: Whether what is read was written by this rank, how many there were, and how many there are.
    """

    def __init__(self, model: Any, callback: BaseCallback) -> None:
        self._model = model
        self.world = (True, 1, 1)
        self._callbacks = _named(_callbacks(getattr(callback, "counted", callback)))
        self._other_envs = {
            f"{path}.{name}": value
            for path, each in self._callbacks.items()
            for name, value in vars(each).items()
            if isinstance(value, (VecEnv, Env)) and value is not model.env
        }
        self._references = References(dict(self._objects()))
        changing = {name for each in model._checkpoints() for name in getattr(each, "names", ())}
        attributes = Attributes(model, self._references, skip=ELSEWHERE, given=MADE_OF_ARGUMENTS, changing=changing)
        self._attributes = {"model": attributes} | {
            path: Attributes(each, self._references, skip=OF_A_CALLBACK) for path, each in self._callbacks.items()
        }
        buffer = model.rollout_buffer
        if not _is_of_library(buffer):
            self._attributes["rollout_buffer"] = Attributes(buffer, self._references, skip=_rows_of(buffer))
        for name, module in model.policy.named_modules():
            if not _is_of_library(module):
                skip = (*vars(nn.Module()), *(key for key, value in vars(module).items() if not is_data(value)))
                self._attributes[f"policy.{name}"] = Attributes(module, self._references, skip=skip)
        self._envs = EnvStates(model.env, self._references)
        self._other_states = {
            path: EnvStates(each, self._references)
            for path, each in self._other_envs.items()
            if isinstance(each, VecEnv)
        }
        self._told: set[str] = set()

    @property
    def environment(self) -> str:
        """The environments in words."""
        return self._envs.description

    def _objects(self) -> Iterator[tuple[str, Any]]:
        """What a pickle names and does not hold."""
        model = self._model
        yield "model", model
        for name in ("policy", "rollout_buffer", "value_critic", "reduction", "_logger", "_vec_normalize_env"):
            yield f"model.{name}", getattr(model, name, None)
        yield "policy.optimizer", getattr(model.policy, "optimizer", None)
        yield from self._callbacks.items()
        for path, env in {"model.env": model.env, **self._other_envs}.items():
            while isinstance(env, VecEnvWrapper):
                yield path, env
                path, env = f"{path}.venv", env.venv
            yield path, env
            for index, each in enumerate(env.envs if isinstance(env, DummyVecEnv) else [env]):
                for depth, layer in enumerate(layers(each) if isinstance(each, Env) else ()):
                    yield f"{path}.envs[{index}]{'.env' * depth}", layer

    def taken(self, iterations: int = 0) -> bytes:
        """The state as it is now. Nothing is changed by it, and no random number drawn."""
        try:
            return self._references.dumps(self._collected(iterations))
        except Exception:  # something that cannot be pickled
            for each in self._all_attributes():
                each.leave_out_what_cannot_be_pickled()
        self._tell_of_what_is_left_out()
        return self._references.dumps(self._collected(iterations))

    def _all_attributes(self) -> list[Attributes]:
        wrappers = [each.attributes for each in (self._envs, *self._other_states.values())]
        return [*self._attributes.values(), *(each for several in wrappers for each in several)]

    def _tell_of_what_is_left_out(self) -> None:
        own = (each for each in self._all_attributes() if not _is_of_library(each.owner))
        for each in own:
            for name, kind in each.left_out.items():
                place = f"`{type(each.owner).__name__}.{name}`"
                if place not in self._told:
                    self._told.add(place)
                    warnings.warn(f"{place} is not in the checkpoints: a {kind} cannot be pickled.", stacklevel=3)

    def _collected(self, iterations: int) -> dict[str, Any]:
        model, logger = self._model, self._model.logger
        return {
            "iterations": iterations,
            "elapsed": time.time_ns() - model.start_time,
            "parameters": model.get_parameters(),
            "gradients": [param.grad for param in model.policy.parameters()],
            "attributes": {path: each.values() for path, each in self._attributes.items()},
            "logger": {
                name: {key: value for key, value in getattr(logger, name, {}).items() if is_data(value)}
                for name in ("name_to_value", "name_to_count", "name_to_excluded")  # figures and videos are not kept
            },
            "environments": self._envs.taken(),
            "other environments": {path: each.taken() for path, each in self._other_states.items()},
            "spaces": space_generators(model),
            "generators": _generators(),
        }

    def read(self, data: bytes) -> dict[str, Any]:
        """What `taken` made, complete before any of it is used."""
        try:
            with torch.inference_mode(False):  # whose tensors could not be learnt from
                state = self._references.loads(data)
        except (pickle.UnpicklingError, AttributeError, ImportError, EOFError, TypeError) as error:
            raise ValueError(
                f"The checkpoint holds something that cannot be read here, and nothing was loaded: {error}. Start the "
                "same program that wrote it, or use an empty `checkpoint_dir`."
            ) from error
        return dict(state)

    def is_exact(self, state: Mapping[str, Any]) -> bool:
        """Whether the environments go on where they were."""
        return bool(state["environments"]["exact"]) and not self._why_not_exact()

    def _why_not_exact(self) -> str:
        _, before, now = self.world
        return self._envs.reason if before == now else f"the run had {before} processes, and has {now}"

    @torch.inference_mode(False)
    def put(self, state: Mapping[str, Any], *, callbacks: bool, environments: bool) -> None:
        """Give the model, and what else is asked for, a state."""
        model = self._model
        model.set_parameters(state["parameters"], device=model.device)
        with torch.no_grad():
            for param, grad in zip(model.policy.parameters(), state["gradients"], strict=True):
                param.grad = None if grad is None else grad.to(param.device)
        for name, values in state["attributes"].items():
            if name in self._attributes and (callbacks or name not in self._callbacks):
                self._attributes[name].put(values)
        if callbacks:
            self._tell_of_dropped_callbacks(state)
        if environments:
            for path, each in self._other_states.items():
                if path in state["other environments"]:
                    each.put(state["other environments"][path])
            self._envs.put(state["environments"], statistics_only=self.world[1] != self.world[2])
        for name, values in state["logger"].items():
            kept = getattr(model.logger, name, {})
            kept.clear()
            kept.update(values)
        if self.world[0]:  # another rank draws other numbers
            put_space_generators(model, state["spaces"])
            _put_generators(state["generators"])

    def _tell_of_dropped_callbacks(self, state: Mapping[str, Any]) -> None:
        there = {name for name in state["attributes"] if name.startswith("callback ")}
        gone = [name.split()[1] for name in sorted(there - self._callbacks.keys())]
        if set(gone) - {*WITHOUT_STATE}:
            warnings.warn(f"The run had callbacks whose state is dropped: {', '.join(gone)}.", stacklevel=4)

    def resume(self, state: Mapping[str, Any], total: float) -> None:
        """Give everything its state, and let environments that do not go on begin new episodes."""
        model = self._model
        self.put(state, callbacks=True, environments=True)
        model._total_timesteps = total
        if self.world[1] != self.world[2]:
            model._forget_rollouts()
        if self.is_exact(state):
            model._note_statistics()
            return
        reason = self._why_not_exact() or "they could not be saved"
        warnings.warn(
            f"The environments begin new episodes, and all else goes on exactly: {reason}.",
            UserWarning,
            stacklevel=4,
        )
        seed = None
        if model.seed is not None:
            seed = (model.seed + model.num_timesteps + model.reduction.rank * model.n_envs) % 2**31
        model._last_obs = self._envs.restarted(seed)
        model._last_episode_starts = np.ones(model.env.num_envs, dtype=bool)
        if model._vec_normalize_env is not None:
            model._last_original_obs = model._vec_normalize_env.get_original_obs()
        if self.world[0]:
            _put_generators(state["generators"])
        model._note_statistics()


LIBRARIES = ("stable_baselines3", "sb3_contrib", "rl_zoo3", "sb3_trpo_ext", "torch")


def _is_of_library(owner: Any) -> bool:
    return type(owner).__module__.split(".")[0] in LIBRARIES


def _rows_of(buffer: Any) -> list[str]:
    """The attributes of a rollout buffer that a new rollout begins with anew."""
    sizes = buffer.buffer_size, buffer.buffer_size * buffer.n_envs
    begun = ["pos", "full", "generator_ready"]
    for name, value in vars(buffer).items():
        if isinstance(value, dict) or (isinstance(value, np.ndarray) and len(value) in sizes):
            begun.append(name)
    return begun


def _existing(model: Any) -> list[str]:
    return [name for name in vars(model) if name != "_run"]


def _callbacks(callback: BaseCallback) -> Iterator[BaseCallback]:
    """A callback and those that it calls."""
    yield callback
    for name, value in vars(callback).items():
        if name not in OF_A_CALLBACK:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(each, BaseCallback):
                    yield from _callbacks(each)


def _named(callbacks: Iterable[BaseCallback]) -> dict[str, BaseCallback]:
    """Callbacks by class and number, so that one that is new or gone changes no other's name."""
    found: dict[str, BaseCallback] = {}
    for each in callbacks:
        kind = type(each).__qualname__
        count = sum(type(other).__qualname__ == kind for other in found.values())
        found[f"callback {kind} {count}"] = each
    return found


def _generators() -> dict[str, Any]:
    """The states of the global random generators."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _put_generators(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    for index, state in enumerate(states.get("cuda", [])):
        if torch.cuda.is_available() and index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, index)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# What makes two runs the same.


def _identity(model: Any) -> dict[str, Any]:
    """What has to be the same where a run goes on, as texts by name."""
    changing = {name for each in model._checkpoints() for name in getattr(each, "names", ())}
    names = parameters_of(type(model)) - MAY_DIFFER - changing
    *wrappers, _ = (type(env).__qualname__ for env in vec_layers(model.env))
    arguments = {name: described(getattr(model, name)) for name in sorted(names) if name in vars(model)}
    return {
        "the algorithm": type(model).__qualname__,
        "the policy": model.policy_class.__qualname__,
        "the observation space": str(model.observation_space),
        "the action space": str(model.action_space),
        "n_envs": str(model.n_envs),
        "the wrappers of the environments": ", ".join(wrappers) or "none",
        **arguments,
        "the policy's parameters": _shapes(model.policy),
    }


def _shapes(policy: nn.Module) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in policy.state_dict().items())


def described(value: Any) -> str:
    """A text that is the same for the same argument in another process."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {described(each)}" for key, each in sorted(value.items(), key=str)) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(described, value)) + ")"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(described, value))) + "}"
    if callable(value) and not isinstance(value, (nn.Module, spaces.Space)):
        try:
            found = [float(value(1.0 - point / (POINTS - 1))) for point in range(POINTS)]
        except Exception:  # not a schedule
            return getattr(value, "__qualname__", type(value).__qualname__)
        return repr(found[0]) if len(set(found)) == 1 else f"a schedule from {found[0]} to {found[-1]} by {found[1:-1]}"
    return type(value).__qualname__


def _differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What differs between two runs, in words."""
    both = [name for name in here if name in there]  # an argument of another release does not count
    found = [f"{name} is {there[name]} there and {here[name]} here" for name in both if there[name] != here[name]]
    if len(found) > 1:  # what follows from another difference
        found = [each for each in found if not each.startswith("the policy's parameters")]
    return found
