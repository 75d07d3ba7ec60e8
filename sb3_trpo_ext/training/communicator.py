"""The processes that ``torchrun`` started, as one: their messages, their failures, and how one notices another's loss.

All data go by torch.distributed. Its store, through which the processes have found each other, has what cannot be a
message: a sign of life of each, and why one of them gave up while others were waiting for it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
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

SLICE = timedelta(seconds=0.5)
"""How long a message is waited for at a time, where others may take their time: between two, Ctrl-C is heard."""

DIRECT_WORKERS, DIRECT_BYTES = 8, 2**20
"""Up to so many workers, and so large a vector, each sends what it has to all others. That is one step, where a ring
takes two for each worker, and on one machine a step takes longer than what is carried in it. Two always do so."""

LANES = 32
"""Sizes of messages for which the next one is asked for in advance."""

NO_DATA = 2**20
"""A tag that no message has."""

BEAT = 1.0
"""Seconds between two signs of life."""

AWAY = "away"
"""In the place of one: the worker does something of its own, as scripts do between two calls of ``learn``."""

ENDED = "ended"
"""In the place of one: its program has ended."""


class WorkerError(RuntimeError):
    """Another worker ended what all of them were doing. The message names its rank and the cause."""


def launched() -> tuple[int, int] | None:
    """Rank and number of the workers that this process is one of; None if it was not started as one."""
    if any(name not in os.environ for name in LAUNCHED):
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@dataclass
class _Lane:
    """Messages of one size from worker to worker.

    Attributes:
        tag: What they are told from others by; 0 for those of many sizes.
        is_used: Whether there has been one before.
        asked: Of which worker the next one has been asked for, where it is to be written, and what to wait for.
        rooms: Where messages of each worker are written, in turns.
    """

    tag: int
    is_used: bool = False
    asked: list[tuple[int, Tensor, Any]] = field(default_factory=list)
    rooms: list[dict[int, Tensor]] = field(default_factory=lambda: [{}, {}])

    def room(self, source: int, like: Tensor) -> Tensor:
        """Where the next message of a worker is to be written.

        What the one before brought stays as it is until the next one is here and that after it is asked for.
        """
        if not self.tag:
            return torch.empty_like(like)
        room = self.rooms[0].get(source)
        if room is None:
            self.rooms[0][source] = room = torch.empty_like(like)
        return room


class ProcessGroup:
    """Messages between the processes, by a group of torch.distributed that is made when the first one is sent.

    There is one object for a process. A worker that gives up in the midst of the others closes its connections, so that
    their messages fail, and a group of the next *generation* takes the place of the one that was.

    Attributes:
        rank: Which of the workers this one is.
        workers: How many there are.
        messages: How many have been sent.
        bytes: What of them has reached this worker.
        silence: Seconds without a sign of life after which a worker is taken to be lost.
    """

    silence: ClassVar[float] = 25.0
    _of_this_process: ClassVar[ProcessGroup | None] = None

    def __init__(self, rank: int, workers: int) -> None:
        self.rank, self.workers = rank, workers
        self.messages = self.bytes = 0
        self._others = [other for other in range(workers) if other != rank]
        self._group: Any = None
        self._store: Any = None
        self._generation = 0
        self._lanes: dict[Any, _Lane] = {}
        self._room = 1024
        self._saved: dict[str, int] = {}
        self._pulse: _Pulse | None = None
        self._is_ending = False

    @classmethod
    def known(cls) -> ProcessGroup | None:
        """That which this process has taken part in; None if it has not yet."""
        return cls._of_this_process

    @classmethod
    def of_this_process(cls) -> ProcessGroup | None:
        """That of the processes that torchrun started; None outside of it."""
        found = launched()
        if found is None:
            return None
        known = cls.known()
        if known is None or (known.rank, known.workers) != found:
            cls._of_this_process = known = cls(*found)
        return known

    def __deepcopy__(self, memo: object) -> ProcessGroup:
        """Itself: there is one object for a process."""
        return self

    def __reduce__(self) -> Any:
        """That of the process in which it is read."""
        return ProcessGroup.of_this_process, ()

    # Messages.

    def all_reduce(self, vector: Tensor) -> Tensor:
        """See `core.reduction.Communicator`."""
        if self._is_direct(vector):
            parts = self._to_all(vector)
            total = parts[0] + parts[1]
            for part in parts[2:]:
                total += part
            return total
        result = self._staged(vector).clone()
        self._take_part(lambda group: dist.all_reduce(result, group=group, async_op=True), result)
        self.bytes += 2 * result.nbytes * (self.workers - 1) // self.workers
        return result.to(vector.device)

    def all_gather(self, vector: Tensor, *, patient: bool = False) -> list[Tensor]:
        """See `core.reduction.Communicator`; others may take their time where this is to be patient."""
        if self._is_direct(vector) and not patient:
            return self._to_all(vector)
        mine = self._staged(vector).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.workers)]
        self._take_part(lambda group: dist.all_gather(parts, mine, group=group, async_op=True), mine)
        self.bytes += mine.nbytes * (self.workers - 1)
        return [part.to(vector.device) for part in parts]

    def broadcast(self, vector: Tensor) -> Tensor:
        """See `core.reduction.Communicator`."""
        if self._is_direct(vector):
            mine = self._staged(vector).contiguous()
            if self.rank == 0:
                self._direct(mine, "first", [], self._others)
                return vector
            return self._direct(mine, "first", [0], [])[0].to(vector.device)
        result = self._staged(vector).clone()
        self._take_part(lambda group: dist.broadcast(result, src=0, group=group, async_op=True), result)
        self.bytes += result.nbytes
        return result.to(vector.device)

    def exchange(self, mine: Any) -> list[Any]:
        """What each worker tells the others, anything that can be pickled; it waits for them as long as they take.

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
            self._room = 2 * max(sizes)
        return [pickle.loads(part[8 : 8 + size]) for part, size in zip(parts, sizes, strict=True)]

    def of_first(self, mine: Any) -> Any:
        """What the first worker tells the others."""
        text = torch.frombuffer(bytearray(pickle.dumps(mine if self.rank == 0 else None)), dtype=torch.uint8)
        size = int(self.broadcast(torch.tensor([len(text)])))
        text = self.broadcast(text if self.rank == 0 else torch.empty(size, dtype=torch.uint8))
        return pickle.loads(text.numpy().tobytes())

    def _gather_bytes(self, mine: bytes) -> list[bytes]:
        parts = self.all_gather(torch.frombuffer(bytearray(mine), dtype=torch.uint8), patient=True)
        return [part.numpy().tobytes() for part in parts]

    def _staged(self, vector: Tensor) -> Tensor:
        """A vector where the group takes it from: a GPU that several workers share has no group of its own."""
        return vector if vector.device.type == "cpu" or has_own_gpu() else vector.cpu()

    def _is_direct(self, vector: Tensor) -> bool:
        few = self.workers <= DIRECT_WORKERS and vector.nbytes <= DIRECT_BYTES
        return (few or self.workers == 2) and not (vector.is_cuda and has_own_gpu())

    def _to_all(self, vector: Tensor) -> list[Tensor]:
        """What each worker has, sent by each to all others."""
        mine = self._staged(vector).contiguous()
        found = self._direct(mine, "all", self._others, self._others) | {self.rank: mine}
        return [found[rank].to(vector.device) for rank in range(self.workers)]

    def _direct(self, mine: Tensor, kind: str, sources: list[int], targets: list[int]) -> dict[int, Tensor]:
        """Send a vector to some workers, and receive one like it from others.

        Sizes come again from update to update. Where they do, the next one is asked for as soon as this one is here:
        it then comes without a question and an answer before it.
        """
        group, key = self._ready(), (kind, mine.dtype, mine.numel())
        if key not in self._lanes and len(self._lanes) < LANES:
            self._lanes[key] = _Lane(tag=1 + len(self._lanes))
        lane = self._lanes.get(key, _Lane(tag=0))

        def ask() -> list[tuple[int, Tensor, Any]]:
            places = [(source, lane.room(source, mine)) for source in sources]
            lane.rooms.reverse()
            return [(source, place, group.recv([place], source, lane.tag)) for source, place in places]

        try:
            asked = lane.asked or ask()
            lane.asked = []
            works = [group.send([mine], target, lane.tag) for target in targets]
            for work in (*(work for *_, work in asked), *works):
                work.wait()
            if lane.is_used:
                lane.asked = ask()
            lane.is_used = lane.tag > 0
        except RuntimeError as error:
            self._explain(error)
        self.messages += 1
        self.bytes += mine.nbytes * len(sources)
        return {source: place for source, place, _ in asked}

    def _take_part(self, start: Callable[[Any], Any], vector: Tensor) -> None:
        """Take part in what all workers do with a vector, and wait until it is complete."""
        group, work = self._ready(), None
        try:
            work = start(group)
            (self._poll if vector.is_cuda else self._wait)(work)
        except BaseException as error:
            self._break()
            if work is not None and not _completes(work):
                # Whoever deletes a group waits for its messages, and this one may never be complete.
                for held in (group, work):
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
                self._group = None
            if isinstance(error, RuntimeError) and not isinstance(error, WorkerError):
                self._explain(error)
            raise
        self.messages += 1

    @staticmethod
    def _wait(work: Any) -> None:
        while True:
            try:
                work.wait(SLICE)
                return
            except RuntimeError as error:
                if "operation timed out" not in str(error).lower():
                    raise

    def _poll(self, work: Any) -> None:
        """Wait without blocking, for NCCL, whose messages nobody could break off."""
        while not work.is_completed():
            time.sleep(1e-5)
            if self._pulse is not None and self._pulse.verdict:
                raise WorkerError(self._pulse.verdict)
        work.wait()

    def _ready(self) -> Any:
        """The group, made anew if it has to be."""
        if self._group is None:
            backends = "cpu:gloo,cuda:nccl" if has_own_gpu() else "gloo"
            initialize_workers(backends)
            self._store = dist.distributed_c10d._get_default_store()
            self._meet_again()
            self._group = dist.new_group(timeout=AGES, backend=backends)
        return self._group

    def _meet_again(self) -> None:
        """After a failure, wait until all others are about to make the next group, which they may never be."""
        if not self._generation:
            return
        self._store.set(self._key(f"here/{self.rank}"), "")
        for other in self._others:
            while not self._store.check([self._key(f"here/{other}")]):
                if has_ended(self._store, other):
                    raise WorkerError(f"rank {other} has ended its program and trains no more")
                time.sleep(0.02)

    # Files.

    def note_saved(self, path: str | os.PathLike[str]) -> None:
        """The first worker has written a file, or this one has left that to it; outside of what is done together."""
        if self._store is None or self._pulse is not None:
            return  # what is done together all of them finish before one goes on
        key = _key_of_file(path)
        self._saved[key] = count = self._saved.get(key, 0) + 1
        if self.rank == 0:
            with suppress(RuntimeError):
                self._store.set(key, str(count))

    def wait_for_saved(self, path: str | os.PathLike[str]) -> None:
        """Wait until the first worker has written a file that this one has left to it, if it is about to."""
        key = _key_of_file(path)
        count = self._saved.get(key, 0)
        if self.rank == 0 or not count or self._pulse is not None:
            return
        since = time.monotonic()
        while not (self._store.check([key]) and int(self._store.get(key)) >= count):
            if beat_of(self._store, 0) is None:
                since = time.monotonic()
            if has_ended(self._store, 0) or time.monotonic() - since > 5 * BEAT:  # or trains, and waits for this one
                return
            time.sleep(0.02)

    # Failures.

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
            with _Pulse(self) as self._pulse, _terminates_in_order(self):
                try:
                    yield
                except BaseException as error:
                    self._is_ending = True
                    if not isinstance(error, WorkerError):
                        self.publish(self._store, f"rank {self.rank} ended it: {_in_words(error)}")
                    self._leave()
                    raise
        finally:
            self._pulse, self._is_ending = None, False

    def publish(self, store: Any, cause: str) -> str:
        """Keep the first cause that a worker tells; returns that which was kept."""
        try:
            kept = store.compare_set(self._key("cause"), "", cause)
        except RuntimeError:
            return cause
        return str((kept.decode() if isinstance(kept, bytes) else kept) or cause)

    def published(self, store: Any) -> str:
        """The cause that a worker has told; empty if none has."""
        key = self._key("cause")
        return store.get(key).decode() if store.check([key]) else ""

    def _key(self, name: str) -> str:
        return f"sb3_trpo_ext/{self._generation}/{name}"

    def _explain(self, error: RuntimeError) -> NoReturn:
        """Raise `WorkerError` with the reason for a broken connection: what a worker told, or which one is silent."""
        self._is_ending = True
        raise WorkerError(self._reason(error)) from error

    def _reason(self, error: RuntimeError) -> str:
        if self._pulse is not None and self._pulse.verdict:
            return self._pulse.verdict
        try:
            before = [beat_of(self._store, rank) for rank in range(self.workers)]
            end = time.monotonic() + 3 * BEAT
            while time.monotonic() < end:
                if cause := self.published(self._store):
                    return cause
                time.sleep(0.05)
            after = [beat_of(self._store, rank) for rank in range(self.workers)]
        except RuntimeError:
            return f"rank 0, or the store of torch.distributed, was lost ({error})"
        lost = [str(rank) for rank in self._others if before[rank] == after[rank]]
        ranks = f"rank {' and '.join(lost)}" if lost else "a rank"
        lines = str(error).splitlines() or [""]
        return self.publish(
            self._store, f"{ranks} was lost: its process ended, or the connection to it broke ({lines[0]})"
        )

    def _break(self) -> None:
        """Close the connections of the group, so that all messages under way fail, here and elsewhere.

        Gloo does so where a message has not come in time.
        """
        if self._group is not None:
            with suppress(RuntimeError):
                self._group.recv([torch.empty(1)], self._others[0], NO_DATA).wait(timedelta(milliseconds=1))

    def _leave(self) -> None:
        self._break()
        group, self._group = self._group, None
        self._lanes.clear()
        if group is not None:
            dist.destroy_process_group(group)
        self._generation += 1


def _completes(work: Any, seconds: float = 2.0) -> bool:
    """Whether a message is over, completed or failed, within some time."""
    end = time.monotonic() + seconds
    while not work.is_completed():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _key_of_file(path: str | os.PathLike[str]) -> str:
    return f"sb3_trpo_ext/saved/{os.path.abspath(path).removesuffix('.zip')}"


def beat_of(store: Any, rank: int) -> bytes | None:
    """The last sign of life of a worker; None if it gives none, as it does not train with the others now."""
    key = f"sb3_trpo_ext/beat/{rank}"
    beat = store.get(key) if store.check([key]) else None
    return None if beat in (None, AWAY.encode(), ENDED.encode()) else beat


def has_ended(store: Any, rank: int) -> bool:
    """Whether the program of a worker has come to its end, in order."""
    key = f"sb3_trpo_ext/beat/{rank}"
    return bool(store.check([key]) and store.get(key) == ENDED.encode())


class _Pulse:
    """Signs of life in the store, by a thread that also watches the next worker, and breaks off what is hopeless.

    Args:
        group: The workers.

    Attributes:
        verdict: Why messages were broken off; empty if they were not.
    """

    def __init__(self, group: ProcessGroup) -> None:
        store = group._store
        self.verdict = ""
        self._group, self._store = group, store.clone() if hasattr(store, "clone") else store
        self._neighbour, self._key = (group.rank + 1) % group.workers, f"sb3_trpo_ext/beat/{group.rank}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="sb3_trpo_ext-pulse")

    def __enter__(self) -> _Pulse:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join(2 * BEAT)
        with suppress(RuntimeError):
            self._store.set(self._key, AWAY)

    def _run(self) -> None:
        last, since = None, time.monotonic()
        now = since
        while not self.verdict:
            try:
                self._store.set(self._key, str(time.time()))
                beat = beat_of(self._store, self._neighbour)
                self.verdict = self._group.published(self._store)
            except RuntimeError:
                if self._ended.is_set():
                    return
                # Nobody would end this process if another were lost, and the same command may be started again.
                self.verdict = "torchrun, or whoever else keeps the store of torch.distributed, was lost"
                break
            slept, now = time.monotonic() - now, time.monotonic()
            if beat is None or beat != last or slept > 10 * BEAT:  # after a stop of all it is the other's turn too
                last, since = beat, now
            elif now - since > self._group.silence and not self.verdict:
                self.verdict = self._group.publish(
                    self._store,
                    f"rank {self._neighbour} has given no sign of life for {self._group.silence:g} s: it is frozen, or "
                    "cut off",
                )
            if self._ended.wait(BEAT):
                return
        self._group._break()


@contextmanager
def _terminates_in_order(group: ProcessGroup) -> Iterator[None]:
    """SIGTERM ends the block by SystemExit, so that the update is undone and the others are told."""
    usual = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not usual:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        if not group._is_ending:  # torchrun ends all when one is lost, and the others are about to say which
            raise SystemExit(f"Rank {group.rank} was ended by SIGTERM.")

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def initialize_workers(backends: str = "gloo") -> tuple[int, int]:
    """Initialise torch.distributed as a model does, for a script that needs it before; nothing if somebody has.

    Returns:
        Rank and number of the processes that train together; 0 and 1, and nothing is initialised, where one is alone.

    Where ``torchrun --max-restarts`` starts processes again, the store may still hold the addresses of those before
    (https://github.com/pytorch/pytorch/issues/135712): on one machine each start has a part of the store for itself.
    """
    found = launched() or (0, 1)
    if dist.is_initialized() or found[1] == 1:
        return found
    atexit.register(_finalize)  # whose threads the end of the interpreter would take for an error
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if start == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backends)
        return found
    store, rank, workers = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"sb3_trpo_ext/start {start}", store)
    dist.init_process_group(backends, store=store, rank=rank, world_size=workers)
    return found


def _finalize() -> None:
    """Leave torch.distributed, if nobody has."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.distributed_c10d._get_default_store().set(f"sb3_trpo_ext/beat/{dist.get_rank()}", ENDED)
        dist.destroy_process_group()


@cache
def has_own_gpu() -> bool:
    """Whether every worker of this machine has a GPU of its own, as NCCL wants it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return torch.cuda.is_available() and dist.is_nccl_available() and torch.cuda.device_count() >= local


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
