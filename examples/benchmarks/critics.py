"""Compare what is learnt with either critic, either way of collecting and either way of updating.

TRPO with its critics and rollouts, beside sb3_contrib.TRPO; PPOClip by hand and by autograd.

    python examples/benchmarks/critics.py                # run what is missing, two jobs at a time, then report
    python examples/benchmarks/critics.py --report       # report what is there
    python examples/benchmarks/critics.py --arms PPOClip "PPOClip by autograd"

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
UPDATES: dict[str, dict[str, Any]] = {"PPOClip": {}, "PPOClip by autograd": {"fast_updates": False}}
UPDATE_TASKS = ("CartPole-v1", "Hopper-v5")
SEEDS = range(10)
UPDATE_SEEDS = range(20, 40)


def job_of(arm: str, env_id: str, seed: int) -> Job:
    """A job with its settings."""
    settings = {"n_timesteps": TIMESTEPS[env_id], "n_envs": 2, "n_steps": 1024, **(ARMS | UPDATES)[arm]}
    return Job(arm, env_id, seed, settings)


def run_job(job: Job) -> None:
    """Train one model and write its score."""
    import torch
    from sb3_contrib import TRPO as ContribTRPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    from sb3_trpo_ext import TRPO, PPOClip

    torch.set_num_threads(1)
    settings = dict(job.settings)
    steps, n_envs = settings.pop("n_timesteps"), settings.pop("n_envs")
    env = VecNormalize(make_vec_env(job.task, n_envs=n_envs, seed=job.seed))
    algorithm: Any = {"sb3_contrib": ContribTRPO, **dict.fromkeys(UPDATES, PPOClip)}.get(job.arm, TRPO)
    model = algorithm("MlpPolicy", env, seed=job.seed, device="cpu", **settings)
    started = time.process_time()
    model.learn(steps)
    cpu_seconds = time.process_time() - started
    assert model.ep_info_buffer is not None
    score = float(np.mean([episode["r"] for episode in model.ep_info_buffer]))
    write_row(TABLE, job, score, cpu_seconds=cpu_seconds, algorithm=algorithm)


def report() -> None:
    """Print Markdown tables: mean over seeds with its 95 % Student-t interval."""
    for arms, tasks in ((ARMS, tuple(TIMESTEPS)), (UPDATES, UPDATE_TASKS)):
        print("\n| environment (steps) | " + " | ".join(arms) + " |")
        print("|---" * (len(arms) + 1) + "|")
        for env_id in tasks:
            cells = [interval(scores(TABLE, arm, env_id, UPDATE_SEEDS if arms is UPDATES else SEEDS)) for arm in arms]
            print(f"| {env_id} ({TIMESTEPS[env_id] // 1000}k) | " + " | ".join(cells) + " |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs=3, metavar=("ARM", "ENV", "SEED"), help="run one job (used internally)")
    parser.add_argument("--report", action="store_true", help="only report")
    parser.add_argument("--arms", nargs="*", choices=(*ARMS, *UPDATES), default=(*ARMS, *UPDATES), help="only these")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time")
    args = parser.parse_args()
    if args.job:
        run_job(job_of(args.job[0], args.job[1], int(args.job[2])))
        return
    if not args.report:
        jobs = [job_of(arm, env_id, seed) for seed in SEEDS for env_id in TIMESTEPS for arm in ARMS]
        jobs += [job_of(arm, env_id, seed) for seed in UPDATE_SEEDS for env_id in UPDATE_TASKS for arm in UPDATES]
        run_missing(TABLE, [__file__], [job for job in jobs if job.arm in args.arms], args.workers)
    report()


if __name__ == "__main__":
    main()
