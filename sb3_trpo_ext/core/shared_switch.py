"""Switches of the whole process that several trainings may need at once."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

PATIENCE = 5.0
"""Seconds after which a lock that is held for microseconds at a time is taken for lost."""


class SharedSwitch:
    """A switch of the whole process that is off its usual state as long as anyone uses it.

    Torch keeps these flags for the process, not for a thread. Trainings in several threads that each saved and restored
    them would restore one another's. So the first that enters saves and switches, the last that leaves restores, and
    nobody else touches them.

    Args:
        switched: Makes the context in which the flags are switched.
    """

    def __init__(self, switched: Callable[[], AbstractContextManager[Any]]) -> None:
        self._switched = switched
        self._lock = threading.RLock()
        self._uses: set[object] = set()
        self._undo = ExitStack()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Switch, unless it is switched already; afterwards switch back, unless someone else still needs it.

        Whatever an interrupt cuts short is done again, and nothing is done twice: one interrupt leaves no trace.
        """
        use = object()
        try:
            try:
                self._enter(use)
                yield
            finally:
                self._leave(use)
        finally:
            self._leave(use)

    def _enter(self, use: object) -> None:
        lock = self._acquired()
        try:
            if not self._uses:
                self._undo.enter_context(self._switched())
            self._uses.add(use)
        finally:
            lock.release()

    def _leave(self, use: object) -> None:
        lock = self._acquired()
        try:
            self._uses.discard(use)
            if not self._uses:
                self._undo.close()
        finally:
            lock.release()

    def _acquired(self) -> Any:
        """The lock, held; another one if it is lost, as when an interrupt came between taking and letting go of it."""
        if not self._lock.acquire(timeout=PATIENCE):
            self._lock = threading.RLock()
            self._lock.acquire()
        return self._lock
