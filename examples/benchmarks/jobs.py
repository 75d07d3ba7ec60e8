"""What the learning benchmarks share: jobs in processes of their own, one JSON file each, never run twice."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent / "results"))
PACKAGES = ("sb3-trpo-ext", "stable-baselines3", "sb3-contrib", "torch")

Job = tuple[str, str, int]
"""Arm, environment, seed."""


def result_path(benchmark: str, job: Job) -> Path:
    """Where a job leaves its score."""
    name = "-".join(map(str, job)).replace(" ", "_").replace(":", "=").replace(",", "").replace('"', "")
    return RESULTS / benchmark / f"{name}.json"


def write_result(benchmark: str, job: Job, result: dict[str, Any]) -> None:
    """Write the result of a job, whole or not at all."""
    arm, env, seed = job
    path = result_path(benchmark, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    versions = {name: version(name) for name in PACKAGES}
    partial.write_text(json.dumps({"arm": arm, "env": env, "seed": seed, **result, "versions": versions}) + "\n")
    partial.replace(path)


def run_missing(
    benchmark: str, script: str, jobs: Iterable[Job], workers: int, budget_minutes: float | None = None
) -> int:
    """Run the unfinished jobs, ``script --job ARM ENV SEED``, each with one thread.

    A job that fails is reported and the others go on; Ctrl-C stops all of them.

    Args:
        benchmark: Where the results are.
        script: What runs a job.
        jobs: All jobs; the finished ones are left out.
        workers: Jobs at a time.
        budget_minutes: No job is started after this time; None starts them all.

    Returns:
        The number of jobs that failed.
    """
    from rich import progress as rich

    missing = [job for job in jobs if not result_path(benchmark, job).exists()]
    deadline = time.monotonic() + 60 * budget_minutes if budget_minutes is not None else math.inf
    columns = (*rich.Progress.get_default_columns(), rich.MofNCompleteColumn())
    with rich.Progress(*columns, speed_estimate_period=3600) as progress, ThreadPoolExecutor(workers) as pool:
        done = progress.add_task(benchmark, total=len(missing))

        def launch(job: Job) -> bool:
            if time.monotonic() > deadline:
                return True
            command = [sys.executable, script, "--job", *map(str, job)]
            finished = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
            progress.console.print("done:" if finished else "[red]failed:[/red]", *job)
            progress.advance(done)
            return finished

        try:
            return list(pool.map(launch, missing)).count(False)
        except KeyboardInterrupt:
            deadline = -math.inf  # the running jobs have been interrupted too; start no others
            raise


def scores(benchmark: str, arm: str, env: str, seeds: Iterable[int]) -> list[float]:
    """The scores of the jobs that are finished."""
    paths = [result_path(benchmark, (arm, env, seed)) for seed in seeds]
    return [json.loads(path.read_text())["score"] for path in paths if path.exists()]


def interval(values: Sequence[float], *, digits: int = 0) -> str:
    """The mean with its 95 % Student-t interval; "-" for less than two."""
    from scipy import stats

    if len(values) < 2:
        return "-"
    half_width = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.{digits}f} ± {half_width:.{digits}f} (n={len(values)})"
