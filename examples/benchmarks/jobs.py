"""What the learning benchmarks share: jobs in processes of their own, never run twice, and one table for their rows.

A table is ``results/NAME.csv.gz``, with one row a job:

- ``id``: a hash of the arm, the task, the seed and the settings; a job whose id is there is never run again;
- ``arm``, ``task``, ``seed``, ``settings`` (JSON): who learns what, with which arguments;
- ``score``: what the job is judged by where it has no evaluations, else the mean return of the last one;
- ``evaluations`` (JSON, of `learning.py` alone): lists of ``timesteps``, ``cpu_seconds`` and ``returns``;
- ``cpu_seconds``: of training alone; empty in the rows of before it was measured;
- ``algorithm`` (class), ``versions`` (JSON) and ``command``.

A job leaves its row in a file of its own under ``results/.parts``, whole or not at all, and whoever reads the table
next moves it there: a process may be killed at any time. The variable BENCHMARK_RESULTS names another folder than
``results``.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from filelock import FileLock

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent / "results"))
PACKAGES = ("sb3-trpo-ext", "stable-baselines3", "sb3-contrib", "torch")


class Job(NamedTuple):
    """One run of a benchmark.

    Attributes:
        arm: Who learns.
        task: What is to be learnt.
        seed: Seed of the run.
        settings: Everything else that decides the outcome, as JSON has it.
    """

    arm: str
    task: str
    seed: int
    settings: dict[str, Any]

    @property
    def id(self) -> str:
        """What the row of the job is found by: equal for equal contents, in whatever order, and for these alone."""
        return sha256(canonical(list(self)).encode()).hexdigest()[:16]


COLUMNS = ["id", *Job._fields, "score", "evaluations", "cpu_seconds", "algorithm", "versions", "command"]


def canonical(content: Any) -> str:
    """The JSON text of a content, the same for every order of its keys.

    Raises:
        TypeError: What JSON would write like another content: tuples, keys that are no strings, objects.
        ValueError: Numbers that are not finite.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    if json.loads(text) != content:
        raise TypeError(f"must be JSON (lists, and dictionaries whose keys are texts), to be told apart; got {content}")
    return text


def write_row(
    table: str,
    job: Job,
    score: float,
    *,
    evaluations: dict[str, Any] | None = None,
    cpu_seconds: float | None = None,
    algorithm: type | None = None,
) -> None:
    """Leave the row of a finished job, whole or not at all; the arguments are the columns."""
    row = {
        "id": job.id,
        **job._asdict(),
        "settings": canonical(job.settings),
        "score": score,
        "evaluations": evaluations and canonical(evaluations),
        "cpu_seconds": cpu_seconds,
        "algorithm": algorithm and f"{algorithm.__module__}.{algorithm.__name__}",
        "versions": canonical({name: version(name) for name in PACKAGES}),
        "command": shlex.join(["python", f"examples/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    path = RESULTS / ".parts" / table / f"{job.id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(row))
    partial.replace(path)


def rows(table: str) -> pd.DataFrame:
    """The rows of all finished jobs, in the order in which they were added."""
    path, parts = RESULTS / f"{table}.csv.gz", RESULTS / ".parts" / table
    if any(parts.glob("*.json")):
        with FileLock(parts / "lock"):  # another process may be here too
            left = sorted(parts.glob("*.json"), key=lambda part: part.stat().st_mtime)
            found = read(path).to_dict("records") + [json.loads(part.read_text()) for part in left]
            partial = parts / "table.partial"
            merged = pd.DataFrame(found, columns=COLUMNS).drop_duplicates("id")
            merged.to_csv(partial, index=False, compression={"method": "gzip", "mtime": 0})
            partial.replace(path)
            for part in left:  # whoever is killed before this moves them once more
                part.unlink()
    return read(path)


def read(path: Path) -> pd.DataFrame:
    """A table as it was written, to the last digit; an empty one where there is none."""
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(path, float_precision="round_trip")


@cache
def current(table: str) -> pd.DataFrame:
    """The rows that count, by arm, task and seed: of an arm on a task, those with the settings of its last row."""
    found = rows(table)
    last = found.groupby(["arm", "task"])["settings"].transform("last")
    return found[found["settings"] == last].set_index(["arm", "task", "seed"]).sort_index()


def run_missing(
    table: str, script: Sequence[str], jobs: Iterable[Job], workers: int, budget_minutes: float | None = None
) -> int:
    """Run the unfinished jobs, ``script --job ARM TASK SEED``, each with one thread.

    A job that fails is reported and the others go on; Ctrl-C stops all of them.

    Args:
        table: Where the rows of finished jobs are.
        script: What runs a job: a file and arguments before ``--job``.
        jobs: All jobs; the finished ones are left out.
        workers: Jobs at a time.
        budget_minutes: No job is started after this time; None starts them all.

    Returns:
        The number of jobs that failed.
    """
    from rich import progress as rich

    finished = set(rows(table)["id"])
    missing = [job for job in jobs if job.id not in finished]
    deadline = time.monotonic() + 60 * budget_minutes if budget_minutes is not None else math.inf
    columns = (*rich.Progress.get_default_columns(), rich.MofNCompleteColumn())
    with rich.Progress(*columns, speed_estimate_period=3600) as progress, ThreadPoolExecutor(workers) as pool:
        done = progress.add_task(table, total=len(missing))

        def launch(job: Job) -> bool:
            if time.monotonic() > deadline:
                return True
            names = (job.arm, job.task, str(job.seed))
            command = [sys.executable, *script, "--job", *names]
            finished = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
            progress.console.print("done:" if finished else "[red]failed:[/red]", *names)
            progress.advance(done)
            return finished

        try:
            return list(pool.map(launch, missing)).count(False)
        except KeyboardInterrupt:
            deadline = -math.inf  # the running jobs have been interrupted too; start no others
            raise
        finally:
            rows(table)


def scores(table: str, arm: str, task: str, seeds: Iterable[int]) -> list[float]:
    """The scores of the jobs that are finished."""
    found = current(table)["score"]
    return [found[arm, task, seed] for seed in seeds if (arm, task, seed) in found.index]


def interval(values: Sequence[float], *, digits: int = 0) -> str:
    """The mean with its 95 % Student-t interval; "-" for less than two."""
    from scipy import stats

    if len(values) < 2:
        return "-"
    half_width = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.{digits}f} ± {half_width:.{digits}f} (n={len(values)})"
