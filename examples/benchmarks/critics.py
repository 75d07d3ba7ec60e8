"""Compare what TRPO learns with either critic and either way of collecting, and what sb3_contrib.TRPO learns.

    python examples/benchmarks/critics.py                # run what is missing, two jobs at a time, then report
    python examples/benchmarks/critics.py --report       # report what is there

A job is (arm, environment, seed), in a process of its own with one thread, and leaves one row in
``results/critics.csv.gz`` (columns: `jobs.py`); finished jobs are never run again. The score is the mean return of the
last 100 training episodes.
"""

import argparse
import time
from typing import Any

import numpy as np
from jobs import Job, interval, run_missing, scores, write_row

TABLE = "critics"
TIMESTEPS = {"CartPole-v1": 50_000, "Pendulum-v1": 100_000, "Hopper-v5": 150_000, "HalfCheetah-v5": 150_000}
ARMS: dict[str, dict[str, Any]] = {
    "default": {},  # Gauss-Newton critic, fast rollouts
    "adam": {"critic": "adam"},
    "sb3_rollouts": {"fast_rollouts": False},
    "sb3_contrib": {},
}
SEEDS = range(10)


def job_of(arm: str, env_id: str, seed: int) -> Job:
    """A job with its settings."""
    return Job(arm, env_id, seed, {"n_timesteps": TIMESTEPS[env_id], "n_envs": 2, "n_steps": 1024, **ARMS[arm]})


def run_job(job: Job) -> None:
    """Train one model and write its score."""
    import torch
    from sb3_contrib import TRPO as ContribTRPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    from sb3_trpo_ext import TRPO

    torch.set_num_threads(1)
    settings = dict(job.settings)
    steps, n_envs = settings.pop("n_timesteps"), settings.pop("n_envs")
    env = VecNormalize(make_vec_env(job.task, n_envs=n_envs, seed=job.seed))
    algorithm = ContribTRPO if job.arm == "sb3_contrib" else TRPO
    model = algorithm("MlpPolicy", env, seed=job.seed, device="cpu", **settings)
    started = time.process_time()
    model.learn(steps)
    cpu_seconds = time.process_time() - started
    assert model.ep_info_buffer is not None
    score = float(np.mean([episode["r"] for episode in model.ep_info_buffer]))
    write_row(TABLE, job, score, cpu_seconds=cpu_seconds, algorithm=algorithm)


def report() -> None:
    """Print a Markdown table: mean over seeds with its 95 % Student-t interval."""
    print("| environment (steps) | " + " | ".join(ARMS) + " |")
    print("|---" * (len(ARMS) + 1) + "|")
    for env_id, steps in TIMESTEPS.items():
        cells = [interval(scores(TABLE, arm, env_id, SEEDS)) for arm in ARMS]
        print(f"| {env_id} ({steps // 1000}k) | " + " | ".join(cells) + " |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs=3, metavar=("ARM", "ENV", "SEED"), help="run one job (used internally)")
    parser.add_argument("--report", action="store_true", help="only report")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time")
    args = parser.parse_args()
    if args.job:
        run_job(job_of(args.job[0], args.job[1], int(args.job[2])))
        return
    if not args.report:
        jobs = [job_of(arm, env_id, seed) for seed in SEEDS for env_id in TIMESTEPS for arm in ARMS]
        run_missing(TABLE, [__file__], jobs, args.workers)
    report()


if __name__ == "__main__":
    main()
