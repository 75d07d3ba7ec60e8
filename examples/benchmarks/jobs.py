"""What the learning benchmarks share: jobs in processes of their own, one JSON file each, never run twice."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("sb3-trpo-ext", "stable-baselines3", "sb3-contrib", "torch")

Job = tuple[str, str, int]
"""Arm, environment, seed."""


def result_path(benchmark: str, job: Job) -> Path:
    """Where a job leaves its score."""
    return RESULTS / benchmark / ("-".join(map(str, job)).replace(" ", "_").replace(",", "") + ".json")


def write_result(benchmark: str, job: Job, result: dict[str, Any]) -> None:
    """Write the result of a job, whole or not at all."""
    arm, env, seed = job
    path = result_path(benchmark, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    versions = {name: version(name) for name in PACKAGES}
    partial.write_text(json.dumps({"arm": arm, "env": env, "seed": seed, **result, "versions": versions}) + "\n")
    partial.replace(path)


def run_missing(benchmark: str, script: str, jobs: Iterable[Job], workers: int) -> None:
    """Run the unfinished jobs: ``script --job ARM ENV SEED``, each with one thread."""

    def launch(job: Job) -> None:
        command = [sys.executable, script, "--job", *map(str, job)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        print("done:", *job, flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(launch, [job for job in jobs if not result_path(benchmark, job).exists()]))


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
