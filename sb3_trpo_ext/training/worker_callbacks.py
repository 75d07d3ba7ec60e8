"""Callbacks of several workers: which of them run on the first one only, and what they count."""

from __future__ import annotations

from collections.abc import Iterator

from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    ConvertCallback,
    EventCallback,
    EveryNTimesteps,
    ProgressBarCallback,
)
from stable_baselines3.common.type_aliases import MaybeCallback

BASES = (BaseCallback, EventCallback, CallbackList, ConvertCallback)
"""Classes of callbacks that say nothing of what a callback does."""

OF_THE_FIRST = ("stable_baselines3", "sb3_contrib", "rl_zoo3")
"""Packages whose callbacks evaluate, save, show progress or stop, which is to be done once."""


def main_only(callback: MaybeCallback) -> BaseCallback:
    """Let a callback run on the first worker only; what it decides holds for all.

    As SB3's own do that evaluate, save, show progress or stop. In a single process nothing changes.

    Args:
        callback: A callback, a list of them or a function.
    """
    return _marked(callback, False)


def every_rank(callback: MaybeCallback) -> BaseCallback:
    """Let a callback run on every worker, each with its own environments; where one of them stops, all stop.

    As callbacks of one's own do anyway. In a single process nothing changes.

    Args:
        callback: A callback, a list of them or a function.
    """
    return _marked(callback, True)


def _marked(callback: MaybeCallback, everywhere: bool) -> BaseCallback:
    if isinstance(callback, list):
        callback = CallbackList(callback)
    if not isinstance(callback, BaseCallback):
        callback = ConvertCallback(callback)
    callback._runs_everywhere = everywhere  # type: ignore[attr-defined]
    return callback


def callback_of(callback: MaybeCallback, rank: int) -> BaseCallback:
    """What of a callback runs on a worker."""
    if isinstance(callback, list):
        callback = CallbackList(callback)
    if not isinstance(callback, BaseCallback):
        return ConvertCallback(callback)
    if type(callback) is CallbackList and not hasattr(callback, "_runs_everywhere"):
        return CallbackList([callback_of(each, rank) for each in callback.callbacks])
    return callback if rank == 0 or _runs_everywhere(callback) else ConvertCallback(None)


def _runs_everywhere(callback: BaseCallback) -> bool:
    """Whether a callback runs on every worker, as what it was marked, or what its class is a kind of, says."""
    marked = getattr(callback, "_runs_everywhere", None)
    if marked is not None:
        return bool(marked)
    if type(callback) is EveryNTimesteps:
        return callback.callback is None or _runs_everywhere(callback.callback)
    kinds = (kind for kind in type(callback).__mro__ if kind not in BASES)
    return not any(kind.__module__.split(".")[0] in OF_THE_FIRST for kind in kinds)


def callbacks_in(callback: BaseCallback) -> Iterator[BaseCallback]:
    """A callback and, if it is a list, those in it."""
    yield callback
    for each in callback.callbacks if isinstance(callback, CallbackList) else ():
        yield from callbacks_in(each)


class CountingCallback(CallbackList):
    """Counts the steps of all workers, and then calls what is to run on this one.

    Args:
        callback: That.
        workers: How many there are, each of which takes as many steps.
    """

    def __init__(self, callback: BaseCallback, workers: int) -> None:
        super().__init__([callback])
        self.counted = callback
        self._others = workers - 1
        self._bars = [each for each in callbacks_in(callback) if isinstance(each, ProgressBarCallback)]

    def on_step(self) -> bool:
        """See `BaseCallback.on_step`."""
        steps, model = self._others * self.model.n_envs, self.model
        model.num_timesteps += steps
        model._session.others_steps += steps  # type: ignore[attr-defined]
        goes_on = super().on_step()
        for bar in self._bars:
            bar.pbar.update(steps)
        return goes_on
