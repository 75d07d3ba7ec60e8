"""Three processes that do what they are told, all of them the same, as torchrun would have started them."""

import multiprocessing
import os
import socket
import traceback
from typing import Any

import numpy as np
import torch

RANKS = 3
"""With two, every sum is the same in either order."""


def launch(rank: int, port: int) -> dict[str, str]:
    """What torchrun puts into the environment."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def serve(rank: int, port: int, connection: Any) -> None:
    os.environ.update(launch(rank, port))
    torch.set_num_threads(1)
    multiprocessing.current_process()._config["daemon"] = False  # it may have environments in processes of their own
    while (task := connection.recv()) is not None:
        function, arguments = task
        torch.manual_seed(rank)
        np.random.seed(rank)
        try:
            connection.send((function(rank, *arguments), None))
        except BaseException:
            connection.send((None, traceback.format_exc()))


class Ranks:
    """Runs a function in all of the processes at once."""

    def __init__(self) -> None:
        port = free_port()
        spawn = multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(RANKS):
            here, there = spawn.Pipe()
            self._processes.append(spawn.Process(target=serve, args=(rank, port, there), daemon=True))
            self._processes[-1].start()
            self._ends.append(here)

    def __call__(self, function: Any, *arguments: Any, timeout: float = 60.0) -> list[Any]:
        for end in self._ends:
            end.send((function, arguments))
        found = []
        for rank, end in enumerate(self._ends):
            assert end.poll(timeout), f"rank {rank} does not answer"
            found.append(end.recv())
        failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error]
        assert not failed, "\n".join(failed)
        return [result for result, _ in found]

    def close(self) -> None:
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
