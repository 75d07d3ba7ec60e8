"""Switches of the whole process that several trainings may need at once."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

PATIENCE = 5.0
"""Seconds after which a lock that is held for microseconds at a time is taken for lost."""


class SharedSwitch:
    """A switch of the whole process that is off its usual state as long as anyone needs it.

    Torch keeps these flags for the process, not for a thread. Trainings in several threads that each saved and restored
    them would restore one another's. So the first that enters saves and switches, the last that leaves restores, and
    nobody else touches them.

    Args:
        switched: Makes the context in which the flags are switched.
    """

    def __init__(self, switched: Callable[[], AbstractContextManager[Any]]) -> None:
        self._switched = switched
        self._lock = threading.RLock()
        self._users = 0
        self._undo = ExitStack()

    def __enter__(self) -> None:
        """Switch, unless it is switched already."""
        lock = self._acquired()
        try:
            self._users += 1
            try:
                if self._users == 1:
                    self._undo.enter_context(self._switched())
            except BaseException:  # an interrupt too: whoever did not get in does not leave either
                self._users -= 1
                raise
        finally:
            lock.release()

    def __exit__(self, *exception: object) -> None:
        """Switch back, unless someone else still needs it."""
        lock = self._acquired()
        try:
            self._users -= 1
            if not self._users:
                self._undo.close()
        finally:
            lock.release()

    def _acquired(self) -> Any:
        """The lock, held; another one if it is lost, as when an interrupt came between taking and letting go of it."""
        if not self._lock.acquire(timeout=PATIENCE):
            self._lock = threading.RLock()
            self._lock.acquire()
        return self._lock
