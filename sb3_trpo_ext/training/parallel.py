"""Data-parallel training: what a model does differently where its process is one of several that torchrun started.

Each process runs the script as it is, with environments of its own. From ``learn`` on all of them train one model.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import pathlib
import random
import re
import sys
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3
import torch
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    ProgressBarCallback,
)
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback

from sb3_trpo_ext.core.arguments import values_of
from sb3_trpo_ext.core.reduction import ALONE, Reduction, SharedReduction, merged_moments, moments_here
from sb3_trpo_ext.rollout.buffers import by_time
from sb3_trpo_ext.rollout.known_classes import is_idle
from sb3_trpo_ext.rollout.object_state import parameters_of
from sb3_trpo_ext.rollout.worker_envs import (
    keep_one_monitor,
    merged,
    normalizers_of,
    pending_seeds,
    set_statistics,
    statistics_of,
)
from sb3_trpo_ext.training.communicator import ProcessGroup, has_own_gpu, launched
from sb3_trpo_ext.training.worker_callbacks import CountingCallback, callback_of

OWN_TO_A_WORKER = {"policy", "env", "verbose", "tensorboard_log", "seed", "device", "kl_coef", "_init_setup_model"}
"""Constructor arguments in which workers may differ, or of which the first worker's value is taken over by all."""


class ParallelAlgorithm(OnPolicyAlgorithm):
    """An algorithm of SB3 that is one of W workers where torchrun started its process, and as it is otherwise.

    Args:
        policy: As in SB3.
        env: As in SB3.
        distributed: Whether to train together with the other processes that ``torchrun`` started, if it did. One that
            it started alone trains bit for bit as without it.
        **kwargs: As in SB3.
    """

    reduction: Reduction = ALONE
    """How what samples say becomes a number, for a model whose samples are spread over workers."""

    def __init__(
        self, policy: str | type[ActorCriticPolicy], env: GymEnv | str, *, distributed: bool = True, **kwargs: Any
    ) -> None:
        found = launched() if distributed else None
        if found is not None and found[1] > 1:
            if found[0]:
                kwargs["verbose"] = 0
            if str(kwargs.get("device", "auto")) in ("auto", "cuda") and has_own_gpu():
                kwargs["device"] = f"cuda:{os.environ.get('LOCAL_RANK', found[0])}"
        super().__init__(policy, env, **kwargs)
        self.distributed = distributed
        self._processes: ProcessGroup | None = None
        self._session: Session | None = None

    def _join_workers(self) -> None:
        """Become one of the workers, if there are others."""
        if not isinstance(self.distributed, bool):
            raise ValueError(f"`distributed` must be True or False, got {self.distributed!r}.")
        processes = ProcessGroup.of_this_process() if self.distributed else None
        self._processes = processes if processes is not None and processes.workers > 1 else None
        self._session = None
        if self._processes is None:
            vars(self).pop("reduction", None)
            return
        self.reduction = SharedReduction(self._processes)
        if self._processes.rank:
            self.verbose, self.tensorboard_log = 0, None

    def _setup_model(self) -> None:
        super()._setup_model()
        self._part_random_streams()

    def _minibatch_share(self) -> int:
        """Samples of this worker in a minibatch."""
        return self.batch_size // self.reduction.workers  # type: ignore[attr-defined]

    def _check_minibatch_share(self) -> None:
        """Raise `ValueError` if a minibatch cannot be shared out."""
        workers, size = self.reduction.workers, self.batch_size  # type: ignore[attr-defined]
        if size % workers:
            raise ValueError(
                f"`batch_size` is the size of a minibatch of all workers together and must be a multiple of their "
                f"number, {workers}, got {size}. Pass {max(size // workers, 1) * workers}, or another number of "
                "workers."
            )

    # Random numbers.

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed all generators; those of worker r > 0 otherwise than the first one's, and environment i as r·E + i."""
        super().set_random_seed(seed)
        rank = self.reduction.rank
        if seed is None or not rank:
            return
        self.action_space.seed(seed + rank)
        if self.env is not None:
            self.env.seed(seed + rank * self.env.num_envs)
        if hasattr(self, "policy"):  # otherwise when it was made, the same by all
            self._part_random_streams()

    def _part_random_streams(self) -> None:
        """Let the generators of workers r > 0 go on as others would, and the first one's as that of one process."""
        rank = self.reduction.rank
        if not rank:
            return
        drawn = [int(torch.randint(2**31, ())), int(np.random.randint(2**31)), random.getrandbits(31)]
        for_torch, for_numpy, for_python = (
            int(state) for state in np.random.SeedSequence([*drawn, rank]).generate_state(3)
        )
        torch.manual_seed(for_torch)
        np.random.seed(for_numpy)
        random.seed(for_python)
        if self.use_sde:
            self.policy.reset_noise(self.n_envs)

    # Learning.

    def _note_statistics(self) -> None:
        """Take the running statistics of the environments as they are for those that all workers have."""
        if self._session is not None:
            self._session.note_statistics()

    def _together(self) -> AbstractContextManager[None]:
        """What all workers do or none; see `ProcessGroup.together`."""
        return nullcontext() if self._processes is None else self._processes.together()

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        processes = self._processes
        if processes is None:
            return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        self._session = session = Session(self, processes)
        session.agree(total_timesteps, reset_num_timesteps)
        found = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar and not processes.rank
        )
        session.compare_first_observations()
        return found

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if self._processes is not None:
            callback = callback_of(callback, self._processes.rank)
            if progress_bar:
                callback, progress_bar = CallbackList([callback, ProgressBarCallback()]), False
            if not is_idle(callback):  # nobody looks at a count that ends with the rollout
                callback = CountingCallback(callback, self._processes.workers)
        return super()._init_callback(callback, progress_bar)

    def _as_one_rollout(self, collect: Callable[[], bool]) -> bool:
        """Collect a rollout, and tell the other workers of it; whether all of them have a whole one."""
        session = self._session
        if session is None:
            return collect()
        session.begin_rollout()
        try:
            return session.end_rollout(collect())
        except BaseException:
            session.forget_rollout()
            raise

    def _forget_rollouts(self) -> None:
        """Drop rollouts of earlier updates: they may be of another worker's environments."""

    def _shared_attributes(self) -> tuple[str, ...]:
        """Numbers beside the policy that are the same for all workers, and are told by the first one."""
        return ("num_timesteps", "_n_updates", "_current_progress_remaining")

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """A ``learn`` that all workers begin and end together."""
        try:
            with self._together():
                yield
                if self._session is not None:
                    self._session.end()
        finally:
            self._session = None

    # Updates.

    def _stand_in_of_all(self) -> Any:
        """What computes an update by hand; where messages depend on who computes it, if every worker can."""
        found = self._stand_in()  # type: ignore[attr-defined]
        if self.reduction.workers > 1 and self._must_compute_alike():
            others_cannot = self.reduction.any(torch.tensor(found is None))
            if others_cannot and found is not None:
                self.update_path = "autograd: another worker does without fast updates"
                return None
        return found

    def _must_compute_alike(self) -> bool:
        """Whether an update by hand sends other messages than one by autograd."""
        return True

    @torch.no_grad()
    def _share_buffers(self) -> None:
        """Take over the first worker's buffers, such as running means that each has moved by its own samples."""
        buffers = list(self.policy.buffers()) if self.reduction.workers > 1 else []
        for buffer, shared in zip(buffers, self.reduction.of_first(buffers) if buffers else [], strict=True):
            buffer.copy_(shared)

    def _of_first_when_all_are_done(self, mine: Any) -> Any:
        """What the first worker made of something that all of them have computed, once all have; it can be pickled."""
        return mine if self._processes is None else self._processes.exchange(mine)[0]

    def _messages_since(self) -> dict[str, float]:
        """How many messages, and how many bytes in them, an update and the rollout before it took; to be logged."""
        if self._processes is None:
            return {}
        messages, size = self._processes.messages, self._processes.bytes
        self._processes.messages = self._processes.bytes = 0
        return {"train/messages": messages, "train/message_bytes": size}

    def _explained_variance_of_all(self, values: np.ndarray, returns: np.ndarray) -> float:
        """SB3's ``explained_variance`` over all workers."""
        parts = None if self._session is None else self._session.moments_of_returns
        if parts is None:
            both = torch.as_tensor(np.stack([returns, returns - values]))
            parts = self.reduction.gather(moments_here(both)).view(self.reduction.workers, -1)
        variance, unexplained = merged_moments(parts)[1].tolist()
        return math.nan if variance == 0 else 1.0 - unexplained / variance

    # Files.

    def set_logger(self, logger: Logger) -> None:
        """As in SB3; only the first worker writes."""
        if self.reduction.rank:
            logger.close()
            logger = Logger(folder=None, output_formats=[])
        super().set_logger(logger)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """As in SB3. Of several workers the first one writes files; it waits for no other."""
        if not (self.reduction.rank and isinstance(path, (str, pathlib.Path))):
            super().save(path, exclude, include)
        if self._processes is not None and isinstance(path, (str, pathlib.Path)):
            self._processes.note_saved(path)

    @classmethod
    def load(cls, path: str | pathlib.Path | io.BufferedIOBase, *args: Any, **kwargs: Any) -> Any:
        """As in SB3; what the script has saved before is there, though the first worker alone has written it."""
        processes = ProcessGroup.known()
        if processes is not None and isinstance(path, (str, pathlib.Path)):
            processes.wait_for_saved(path)
        return super().load(path, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model that was pickled is one of the workers of the process that reads it, if there are any."""
        vars(self).update(state)
        processes = state.get("_processes")
        if processes is None or processes.workers == 1:
            self._processes = None
            vars(self).pop("reduction", None)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "reduction", "_processes", "_session"]


class Session:
    """One ``learn`` of W workers: what they agree on before, and tell each other after each rollout.

    Args:
        model: The model of this worker.
        processes: All of them.

    Attributes:
        others_steps: Steps of this rollout that were counted for the other workers.
        moments_of_returns: What each worker said of the returns of the last rollout; see `core.reduction`.
    """

    moments_of_returns: torch.Tensor | None = None
    others_steps: int = 0

    def __init__(self, model: Any, processes: ProcessGroup) -> None:
        self._model, self._processes = model, processes
        self._normalizers = list(normalizers_of(model.env))
        self._arguments = shared_arguments(model)
        self._steps_before = 0
        self._episodes_before: tuple[list[Any], list[Any]] = [], []

    def agree(self, total_timesteps: int, reset_num_timesteps: bool) -> None:
        """Compare what must be equal, and take over the first worker's policy, optimiser, critic and statistics.

        Raises:
            ValueError: If two workers differ; the same for all.
        """
        model, processes = self._model, self._processes
        here = settings(model) | {"learn": f"{total_timesteps} {reset_num_timesteps}"}
        state = (
            *self._fingerprint(),
            model.num_timesteps,
            *(_checksum(statistics_of(each)) for each in self._normalizers),
        )
        told = processes.exchange((here, pending_seeds(model.env), state))
        for rank, (there, _, _) in enumerate(told):
            differing = [name for name in here if there.get(name) != told[0][0].get(name)]
            if differing or there.keys() != told[0][0].keys():
                name = (differing or sorted(there.keys() ^ told[0][0].keys()))[0]
                raise ValueError(
                    f"All workers must be set up alike, but `{name}` is {told[0][0].get(name)} on rank 0 and "
                    f"{there.get(name)} on rank {rank}. Run one script with the same arguments on all of them."
                )
        self.seeds_are_apart = self._part_seeds([seeds for _, seeds, _ in told])
        if len({state for _, _, state in told}) > 1:
            self._take_over()
        self.note_statistics()
        keep_one_monitor(model.env, is_first=not processes.rank)

    def note_statistics(self) -> None:
        """Running statistics are the same for all workers now: what is added from here on is to be merged."""
        self._merged = [statistics_of(each) for each in self._normalizers]

    def _part_seeds(self, seeds: list[list[int | None]]) -> bool:
        """Seed environment i of worker r as r·E + i where workers would seed theirs alike; whether all differ now."""
        known = [seed for each in seeds for seed in each]
        if None in known:
            return False
        if len(set(known)) < len(known) and self._processes.rank:
            self._model.env.seed(seeds[0][0] + self._processes.rank * self._model.env.num_envs)
        return True

    def _take_over(self) -> None:
        """The first worker's state, bit for bit."""
        model = self._model
        names = (*model._shared_attributes(), "ep_info_buffer", "ep_success_buffer")
        attributes = {name: getattr(model, name, None) for name in names}
        statistics = [statistics_of(each) for each in self._normalizers]
        parameters = model.get_parameters()
        buffer = io.BytesIO()
        if not self._processes.rank:
            torch.save((parameters, attributes, statistics), buffer)
        found = self._processes.of_first(buffer.getvalue())
        if not self._processes.rank:
            return
        # Written by another process of this very program.
        parameters, attributes, statistics = torch.load(io.BytesIO(found), model.device, weights_only=False)
        for name, state in parameters.items():
            owner: Any = model
            for part in name.split("."):
                owner = getattr(owner, part)
            owner.load_state_dict(state)
        for name, value in attributes.items():
            setattr(model, name, value)
        for normalizer, statistic in zip(self._normalizers, statistics, strict=True):
            set_statistics(normalizer, statistic)

    def compare_first_observations(self) -> None:
        """Warn where two workers begin alike, as those with the same seeds of environments do."""
        observations = self._model._last_obs
        arrays = observations.values() if isinstance(observations, dict) else [observations]
        text = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
        found = self._processes.exchange(hashlib.sha256(text).digest())
        if self.seeds_are_apart or self._processes.rank or len(set(found)) == len(found):
            return
        first, second = next((found.index(each), i) for i, each in enumerate(found) if found.index(each) != i)
        warnings.warn(
            f"The first observations of ranks {first} and {second} are the same. If their environments do not always "
            "begin alike, these have the same seed, and the two collect the same episodes: pass `seed` to the model, "
            "or seed the environments by RANK.",
            UserWarning,
            stacklevel=5,
        )

    def begin_rollout(self) -> None:
        """Remember what the rollout adds to."""
        model = self._model
        self._steps_before, self.others_steps = model.num_timesteps, 0
        self._episodes_before = list(model.ep_info_buffer), list(model.ep_success_buffer)
        model.ep_info_buffer, model.ep_success_buffer = map(deque, self._episodes_before)  # without an end

    def forget_rollout(self) -> None:
        """Drop the episodes of a rollout that nobody will learn from."""
        infos, successes = self._episodes_before
        self._keep_episodes(infos, successes)

    def _keep_episodes(self, infos: Iterable[Any], successes: Iterable[Any]) -> None:
        model, window = self._model, self._model._stats_window_size
        model.ep_info_buffer, model.ep_success_buffer = deque(infos, maxlen=window), deque(successes, maxlen=window)

    def end_rollout(self, completed: bool) -> bool:
        """Tell what the rollout added, merge what those of all did, and compare the models.

        Returns:
            Whether all of them have a whole one: where one was stopped all stop.
        """
        model, processes = self._model, self._processes
        infos, successes = self._episodes_before
        mine = (
            completed,
            model.num_timesteps - self._steps_before - self.others_steps,
            self._fingerprint(),
            list(model.ep_info_buffer)[len(infos) :],
            list(model.ep_success_buffer)[len(successes) :],
            [statistics_of(each) for each in self._normalizers],
            self._moments_here() if completed else None,
        )
        told = processes.exchange(mine)
        all_completed, steps, fingerprints, new_infos, new_successes, statistics, moments = zip(*told, strict=True)
        self.moments_of_returns = torch.as_tensor(np.stack(moments)) if all(all_completed) else None
        for rank, fingerprint in enumerate(fingerprints):
            if fingerprint != fingerprints[0]:
                raise RuntimeError(
                    f"Rank {rank} has another model than rank 0 has: something has changed parameters, optimiser, "
                    "critic or arguments of one of them alone. Let a callback that does so run everywhere: "
                    "every_rank(callback)."
                )
        model.num_timesteps, self.others_steps = self._steps_before + sum(steps), 0
        self._keep_episodes(chain(infos, *new_infos), chain(successes, *new_successes))
        for index, normalizer in enumerate(self._normalizers):
            self._merged[index] = merged(self._merged[index], [each[index] for each in statistics])
            set_statistics(normalizer, self._merged[index])
        return all(all_completed)

    def _moments_here(self) -> np.ndarray:
        """Those of the returns, and of what the values leave unexplained of them."""
        buffer = self._model.rollout_buffer
        values, returns = (by_time(buffer, array).ravel() for array in (buffer.values, buffer.returns))
        return moments_here(torch.as_tensor(np.stack([returns, returns - values]))).numpy()

    def _fingerprint(self) -> tuple[int, ...]:
        """Checksums of parameters and buffers, of the optimiser's and of the critic's state, and of attributes.

        Arguments count too that are numbers, texts or switches, and no schedules and the like.
        """
        model = self._model
        attributes = [getattr(model, name, None) for name in model._shared_attributes() if name != "num_timesteps"]
        arguments = [getattr(model, name, None) for name in self._arguments]
        plain = [value for value in arguments if isinstance(value, (int, float, str))]
        states = [*model.get_parameters().values(), attributes, plain]
        return tuple(_checksum(state) for state in states)

    def end(self) -> None:
        """Wait for the others, one of which may have failed since the last rollout."""
        self._processes.exchange(None)


def _checksum(value: Any, before: int = 0) -> int:
    """A checksum of nested dicts and lists of tensors, arrays and numbers."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        return zlib.crc32(value.view(-1).view(torch.uint8).numpy(), before)
    if isinstance(value, np.ndarray):
        return zlib.crc32(np.ascontiguousarray(value).tobytes(), before)
    if isinstance(value, dict):
        value = [each for pair in value.items() for each in pair]
    if isinstance(value, (list, tuple)):
        for each in value:
            before = _checksum(each, before)
        return before
    return zlib.crc32(repr(value).encode(), before)


def settings(model: Any) -> dict[str, str]:
    """What must be the same for all workers, in words: versions, spaces, shapes and the constructor's arguments."""
    found = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "gymnasium": gym.__version__,
        "stable_baselines3": stable_baselines3.__version__,
        "sb3_contrib": sb3_contrib.__version__,
        "sb3_trpo_ext": sys.modules["sb3_trpo_ext"].__version__,
        "device": model.device.type,
        "processor": torch.backends.cpu.get_cpu_capability(),  # its rounding
        "threads of torch": "one" if torch.get_num_threads() == 1 else "several",
        "n_envs": str(model.n_envs),
        "observation_space": str(model.observation_space),
        "action_space": str(model.action_space),
        "policy": f"{model.policy_class.__module__}.{model.policy_class.__qualname__}",
        "parameters": str([(name, tuple(each.shape), str(each.dtype)) for name, each in _tensors(model.policy)]),
        "optimizer": type(model.policy.optimizer).__qualname__,
        "past rollouts": str(len(getattr(model, "_past_rollouts", ()))),
        "statistics of VecNormalize": str(len(list(normalizers_of(model.env)))),
    }
    return found | {name: _in_words(getattr(model, name)) for name in shared_arguments(model)}


def shared_arguments(model: Any) -> list[str]:
    """Names of the constructor's arguments that must be the same for all workers."""
    return sorted((parameters_of(type(model)) & vars(model).keys()) - OWN_TO_A_WORKER)


def _tensors(policy: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from policy.named_parameters()
    yield from policy.named_buffers()


def _in_words(value: Any) -> str:
    """A value, as far as two processes write it alike."""
    if callable(value) and not isinstance(value, type):
        try:
            return f"a schedule: {[number for _, number in values_of(value)][::50]}"
        except Exception:
            return f"a {type(value).__name__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
