"""Environments of several workers: their running statistics merged, and the files of their monitors written by one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecMonitor, VecNormalize

from sb3_trpo_ext.rollout.env_copies import vec_layers
from sb3_trpo_ext.rollout.env_state import layers


def normalizers_of(env: VecEnv | None) -> Iterator[VecNormalize]:
    """Those layers of vectorised environments that normalise."""
    return (layer for layer in vec_layers(env) if isinstance(layer, VecNormalize))


def pending_seeds(env: VecEnv) -> list[int | None]:
    """The seeds of the next reset, as far as they are known."""
    innermost = list(vec_layers(env))[-1]
    return list(getattr(innermost, "_seeds", [None]))


Moments = tuple[np.ndarray, np.ndarray, float]
"""Mean, variance and number of samples."""


def _running(normalizer: VecNormalize) -> dict[str, RunningMeanStd]:
    """The running statistics of an environment's observations and returns."""
    found: dict[str, RunningMeanStd] = {"returns": normalizer.ret_rms}
    seen: Any = getattr(normalizer, "obs_rms", None)
    if isinstance(seen, dict):
        found |= {f"observations {key}": each for key, each in seen.items()}
    elif seen is not None:
        found["observations"] = seen
    return found


def statistics_of(normalizer: VecNormalize) -> dict[str, Moments]:
    """The running statistics of an environment: views, not copies."""
    return {key: (each.mean, each.var, float(each.count)) for key, each in _running(normalizer).items()}


def set_statistics(normalizer: VecNormalize, statistics: dict[str, Moments]) -> None:
    """Give an environment running statistics."""
    for key, each in _running(normalizer).items():
        mean, var, each.count = statistics[key]
        each.mean, each.var = np.array(mean), np.array(var)


def merged(before: dict[str, Moments], told: list[dict[str, Moments]]) -> dict[str, Moments]:
    """Statistics with what each worker has added to them since they were the same for all, in the order of ranks.

    In one pass as for parts of one sample (Chan, Golub and LeVeque 1979).
    """
    result = {}
    for key, (mean, var, count) in before.items():
        together = RunningMeanStd(shape=np.shape(mean))
        together.mean, together.var, together.count = np.array(mean), np.array(var), count
        for there in told:
            mean_there, var_there, count_there = there[key]
            new = count_there - count
            if new > 0:
                new_mean = mean + (mean_there - mean) * (count_there / new)
                apart = np.square(new_mean - mean) * (count * new / count_there)
                new_var = np.maximum(var_there * count_there - var * count - apart, 0.0) / new
                together.update_from_moments(new_mean, new_var, new)
        result[key] = together.mean, together.var, float(together.count)
    return result


def keep_one_monitor(env: VecEnv, *, is_first: bool) -> None:
    """Let the first worker alone write the files of Monitor and VecMonitor, which all of them have opened.

    A file that another one has emptied since gets its head again, if nothing was written yet.
    """
    for holder in _monitors(env):
        writer = getattr(holder, "results_writer", None)
        if writer is None:
            continue
        if is_first:
            _write_head(holder, writer)
        else:
            writer.close()
            holder.results_writer = None
    innermost = list(vec_layers(env))[-1]
    sets = getattr(gym.Wrapper, "set_wrapper_attr", None)
    if isinstance(innermost, SubprocVecEnv) and sets is not None and "force" in inspect.signature(sets).parameters:
        innermost.env_method("set_wrapper_attr", "results_writer", _Writer() if is_first else None, force=False)


class _Writer:
    """Stands for the writer that a monitor in another process has, whose file gets its head again as it arrives."""

    def __reduce__(self) -> Any:
        return _writer_of_this_process, ()


def _writer_of_this_process() -> ResultsWriter | None:
    """The writer of the environment that the loop of a `SubprocVecEnv`, which reads this, runs."""
    frame = inspect.currentframe()
    while frame is not None:
        env = frame.f_locals.get("env")
        if isinstance(env, gym.Env):
            for holder in _wrapped_monitors(env):
                if holder.results_writer is not None:
                    _write_head(holder, holder.results_writer)
                return holder.results_writer
        frame = frame.f_back
    return None


def _monitors(env: VecEnv) -> Iterator[Any]:
    for layer in vec_layers(env):
        if isinstance(layer, VecMonitor):
            yield layer
        for each in getattr(layer, "envs", []):
            yield from _wrapped_monitors(each)


def _wrapped_monitors(env: gym.Env) -> Iterator[Monitor]:
    return (layer for layer in layers(env) if isinstance(layer, Monitor))


def _write_head(holder: Any, writer: ResultsWriter) -> None:
    """Write the first two lines of a file again if it has no other and another process has overwritten them."""
    file = writer.file_handler
    if file is None or file.closed or "a" in file.mode:
        return
    with open(file.name) as found:
        lines = found.read().splitlines()
    if len(lines) > 2 or file.tell() > 1000:
        return
    spec = getattr(holder, "spec", None)
    text = f'#{{"t_start": {holder.t_start}, "env_id": "{spec.id if spec is not None else None}"}}\n'
    if lines and f"{lines[0]}\n" == text:
        return
    file.seek(0)
    file.truncate()
    file.write(text)
    writer.logger.writeheader()
    file.flush()
