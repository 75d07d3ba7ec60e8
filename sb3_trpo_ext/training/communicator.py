"""The processes that ``torchrun`` started, as one: their messages, their failures, and how one notices another's loss.

All data go by torch.distributed. Its store, through which the processes have found each other, has what cannot be a
message: a sign of life of each, and why one of them gave up while others were waiting for it.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from types import FrameType
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, and those who do as it does, put into the environment of each process."""

AGES = timedelta(days=7)
"""How long a message may take. Others may evaluate for minutes or hours: whether they live is not told by that."""

LOOK = timedelta(seconds=0.5)
"""How long a message is waited for before it is asked what has become of the others."""

BEAT = 1.0
"""Seconds between two signs of life."""


class WorkerError(RuntimeError):
    """Another worker ended what all of them were doing. The message names its rank and the cause."""


def launched() -> tuple[int, int] | None:
    """Rank and number of the workers that this process is one of; None if it was not started as one."""
    if any(name not in os.environ for name in LAUNCHED):
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class ProcessGroup:
    """Messages between the processes, by a group of torch.distributed that is made when the first one is sent.

    There is one object for a process. When a worker gives up in the midst of the others, whose next message would never
    come, the group is left as it is and another one, of the next *generation*, takes its place: nobody can say what was
    on its way.

    Attributes:
        rank: Which of the workers this one is.
        workers: How many there are.
        messages: How many have been sent.
        bytes: What of them has reached this worker, and what it has passed on in a sum.
        silence: Seconds without a sign of life after which a worker is taken to be lost.
    """

    silence: ClassVar[float] = 25.0
    _of_this_process: ClassVar[ProcessGroup | None] = None

    def __init__(self, rank: int, workers: int) -> None:
        self.rank, self.workers = rank, workers
        self.messages = self.bytes = 0
        self._group: Any = None
        self._generation = 0
        self._room = 1024
        self._pulse: _Pulse | None = None
        self._watched: tuple[Any, float] = None, 0.0
        self._explaining = False

    @classmethod
    def of_this_process(cls) -> ProcessGroup | None:
        """That of the processes that torchrun started; None outside of it."""
        found = launched()
        if found is None:
            return None
        known = cls._of_this_process
        if known is None or (known.rank, known.workers) != found:
            cls._of_this_process = known = cls(*found)
        return known

    # Messages.

    def all_reduce(self, vector: Tensor) -> Tensor:
        """See `core.reduction.Communicator`."""
        result = self._staged(vector).clone()
        self._send(result, lambda group: dist.all_reduce(result, group=group, async_op=True))
        self.bytes += 2 * result.nbytes * (self.workers - 1) // self.workers
        return result.to(vector.device)

    def all_gather(self, vector: Tensor) -> list[Tensor]:
        """See `core.reduction.Communicator`."""
        mine = self._staged(vector).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.workers)]
        self._send(mine, lambda group: dist.all_gather(parts, mine, group=group, async_op=True))
        self.bytes += mine.nbytes * (self.workers - 1)
        return [part.to(vector.device) for part in parts]

    def broadcast(self, vector: Tensor) -> Tensor:
        """See `core.reduction.Communicator`."""
        result = self._staged(vector).clone()
        self._send(result, lambda group: dist.broadcast(result, src=0, group=group, async_op=True))
        self.bytes += result.nbytes
        return result.to(vector.device)

    def exchange(self, mine: Any) -> list[Any]:
        """What each worker tells the others, anything that can be pickled.

        One message where what each has to tell fits into the room for it, which follows what they had to tell before.
        """
        text = pickle.dumps(mine)
        size = len(text).to_bytes(8, "little")
        first, rest = (size + text)[: self._room], (size + text)[self._room :]
        parts = self._gather_bytes(first.ljust(self._room, b"\0"))
        sizes = [int.from_bytes(part[:8], "little") for part in parts]
        missing = max(sizes) + 8 - self._room
        if missing > 0:
            more = self._gather_bytes(rest.ljust(missing, b"\0"))
            parts = [part + other for part, other in zip(parts, more, strict=True)]
        self._room = max(self._room, 2 * max(sizes)) if missing > 0 else self._room
        return [pickle.loads(part[8 : 8 + size]) for part, size in zip(parts, sizes, strict=True)]

    def of_first(self, mine: Any) -> Any:
        """What the first worker tells the others."""
        text = torch.frombuffer(bytearray(pickle.dumps(mine if self.rank == 0 else None)), dtype=torch.uint8)
        size = int(self.broadcast(torch.tensor([len(text)])))
        text = self.broadcast(text if self.rank == 0 else torch.empty(size, dtype=torch.uint8))
        return pickle.loads(text.numpy().tobytes())

    def _gather_bytes(self, mine: bytes) -> list[bytes]:
        parts = self.all_gather(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
        return [part.numpy().tobytes() for part in parts]

    def _staged(self, vector: Tensor) -> Tensor:
        """A vector where the group takes it from: a GPU that several workers share has no group of its own."""
        return vector if vector.device.type == "cpu" or has_own_gpu() else vector.cpu()

    def _send(self, vector: Tensor, start: Callable[[Any], Any]) -> None:
        """Take part in a message, and wait until it is complete."""
        if self._pulse is not None and self._pulse.is_lost:  # a second run may be started in the place of this one
            raise WorkerError("torchrun, or whoever keeps the store of torch.distributed, was lost.")
        work = None
        group = self._ready()
        try:
            work = start(group)
            (self._poll if vector.is_cuda else self._wait)(work)
        except BaseException:
            if work is not None and not work.is_completed():
                # Whoever deletes a group waits for its messages, and this one may never be complete.
                for held in (group, work):
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
                self._group = None
            raise
        self.messages += 1

    def _wait(self, work: Any) -> None:
        while True:
            try:
                work.wait(LOOK)
                return
            except RuntimeError as error:
                if "timed out" not in str(error).lower():
                    self._explain(error)
            self._look()

    def _poll(self, work: Any) -> None:
        """Wait without blocking, for NCCL, which would give up its communicator where a wait is not long enough."""
        end = time.monotonic() + LOOK.total_seconds()
        while not work.is_completed():
            time.sleep(1e-5)
            if time.monotonic() > end:
                self._look()
                end = time.monotonic() + LOOK.total_seconds()
        try:
            work.wait()
        except RuntimeError as error:
            self._explain(error)

    def _ready(self) -> Any:
        """The group, made anew if it has to be."""
        if self._group is None:
            backends = "cpu:gloo,cuda:nccl" if has_own_gpu() else "gloo"
            if not dist.is_initialized():
                dist.init_process_group(backends)
            self._store = dist.distributed_c10d._get_default_store()
            self._group = dist.new_group(timeout=AGES, backend=backends)
        return self._group

    # Failures.

    def give_up(self, error: BaseException) -> None:
        """Let the others know that this worker will not go on, and leave the group."""
        if not isinstance(error, WorkerError):
            self._publish(f"rank {self.rank} ended it: {_in_words(error)}")
        self._leave()

    def _publish(self, cause: str) -> str:
        """Keep the first cause that a worker tells; that which was kept."""
        try:
            kept = self._store.compare_set(self._key("cause"), "", cause)
        except RuntimeError:
            return cause
        return str((kept.decode() if isinstance(kept, bytes) else kept) or cause)

    def _key(self, name: str) -> str:
        return f"sb3_trpo_ext/{self._generation}/{name}"

    def _look(self) -> None:
        """Raise `WorkerError` if another worker has given up, or gives no sign of life."""
        try:
            if self._store.check([self._key("cause")]):
                raise WorkerError(self._store.get(self._key("cause")).decode())
            neighbour = (self.rank + 1) % self.workers
            beat = self._beat(neighbour)
        except WorkerError:
            raise
        except RuntimeError as error:
            self._explain(error)
        now = time.monotonic()
        if beat is None or beat != self._watched[0]:
            self._watched = beat, now
        elif now - self._watched[1] > self.silence:
            silent = f"rank {neighbour} has given no sign of life for {self.silence:g} s: it is frozen, or cut off"
            raise WorkerError(self._publish(silent))

    def _explain(self, error: RuntimeError) -> NoReturn:
        """Raise `WorkerError` with the reason for a broken connection: what a worker told, or which one is silent."""
        self._explaining = True
        try:
            raise WorkerError(self._reason(error)) from error
        finally:
            self._explaining = False

    def _reason(self, error: RuntimeError) -> str:
        try:
            before = [self._beat(rank) for rank in range(self.workers)]
            end = time.monotonic() + 3 * BEAT
            while time.monotonic() < end:
                if self._store.check([self._key("cause")]):
                    return self._store.get(self._key("cause")).decode()
                time.sleep(0.1)
            after = [self._beat(rank) for rank in range(self.workers)]
        except RuntimeError:
            return f"rank 0, or the store of torch.distributed, was lost ({error})"
        lost = [str(rank) for rank in range(self.workers) if rank != self.rank and before[rank] == after[rank]]
        ranks = f"rank {' and '.join(lost)}" if lost else "a rank"
        return self._publish(f"{ranks} was lost: its process ended, or the connection to it broke ({error})")

    def _beat(self, rank: int) -> bytes | None:
        """The last sign of life of a worker; None if it has never given one."""
        key = f"sb3_trpo_ext/beat/{rank}"
        return self._store.get(key) if self._store.check([key]) else None

    def _leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)
        self._generation += 1
        self._watched = None, 0.0

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all workers do or none: where one of them raises, the others raise `WorkerError` at their next message.

        Within the block each gives signs of life, and SIGTERM raises SystemExit, if nothing else was made of it.
        """
        if self._pulse is not None:
            yield
            return
        self._ready()
        try:
            with _Pulse(self._store, self.rank) as self._pulse, _terminates_in_order(self):
                try:
                    yield
                except BaseException as error:
                    self.give_up(error)
                    raise
        finally:
            self._pulse = None


class _Pulse:
    """Signs of life in the store, by a thread of their own.

    Args:
        store: The store.
        rank: Whose.

    Attributes:
        is_lost: Whether the store has gone, and torchrun, or whoever had it, with it.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self._store = store.clone() if hasattr(store, "clone") else store
        self._key = f"sb3_trpo_ext/beat/{rank}"
        self._ended = threading.Event()
        self.is_lost = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="sb3_trpo_ext-pulse")

    def __enter__(self) -> _Pulse:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join(2 * BEAT)

    def _run(self) -> None:
        while True:
            try:
                self._store.set(self._key, str(time.time()))
            except RuntimeError:
                self.is_lost = not self._ended.is_set()
                return
            if self._ended.wait(BEAT):
                return


@contextmanager
def _terminates_in_order(group: ProcessGroup) -> Iterator[None]:
    """SIGTERM ends the block by SystemExit, so that the update is undone and the others are told."""
    usual = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not usual:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        if not group._explaining:  # torchrun ends all when one is lost, and the others are about to say which
            raise SystemExit(f"Rank {group.rank} was ended by SIGTERM.")

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@cache
def has_own_gpu() -> bool:
    """Whether every worker of this machine has a GPU of its own, as NCCL wants it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return torch.cuda.is_available() and dist.is_nccl_available() and torch.cuda.device_count() >= local


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
