"""Compare what is learnt with either critic, either way of collecting and either way of updating.

TRPO with its critics and rollouts, beside sb3_contrib.TRPO; PPOClip by hand and by autograd; TRPO with action values by
what they bootstrap from and the surrogate, with the settings of the zoo's entries (MaskableTRPO on Taxi-v4).

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
ACTION_VALUES: dict[str, dict[str, Any]] = {
    "state values": {},
    **{
        f"Q {bootstrap} {surrogate}": {"critic": "action_value", "bootstrap": bootstrap, "surrogate": surrogate}
        for bootstrap in ("expected", "max")
        for surrogate in ("sampled", "expected")
    },
}
ACTION_VALUE_TASKS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {"n_timesteps": 50_000, "n_envs": 8, "n_steps": 256},
    "Acrobot-v1": {"n_timesteps": 100_000, "n_envs": 8, "n_steps": 128, "normalize": True},
    "MountainCar-v0": {"n_timesteps": 150_000, "n_envs": 16, "n_steps": 128, "gae_lambda": 0.98, "normalize": True},
    "LunarLander-v3": {"n_timesteps": 100_000, "n_envs": 8, "n_steps": 256, "gamma": 0.999, "gae_lambda": 0.98},
    "Taxi-v4": {"n_timesteps": 150_000, "n_envs": 8, "n_steps": 256, "masks": True},
}
SEEDS = range(10)
ACTION_VALUE_SEEDS = range(5)
UPDATE_SEEDS = range(20, 40)


def job_of(arm: str, env_id: str, seed: int) -> Job:
    """A job with its settings."""
    if arm in ACTION_VALUES:
        return Job(arm, env_id, seed, {**ACTION_VALUE_TASKS[env_id], **ACTION_VALUES[arm]})
    settings = {"n_timesteps": TIMESTEPS[env_id], "n_envs": 2, "n_steps": 1024, **(ARMS | UPDATES)[arm]}
    return Job(arm, env_id, seed, settings)


def run_job(job: Job) -> None:
    """Train one model and write its score."""
    import torch
    from sb3_contrib import TRPO as ContribTRPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    from sb3_trpo_ext import TRPO, MaskableTRPO, PPOClip
    from sb3_trpo_ext.zoo.wrappers import ActionMaskFromInfo

    torch.set_num_threads(1)
    settings = dict(job.settings)
    steps, n_envs, masks = settings.pop("n_timesteps"), settings.pop("n_envs"), settings.pop("masks", False)
    env = make_vec_env(job.task, n_envs, seed=job.seed, wrapper_class=ActionMaskFromInfo if masks else None)
    if settings.pop("normalize", job.arm not in ACTION_VALUES) or masks:
        env = VecNormalize(env, norm_obs=not masks)
    algorithm: Any = {"sb3_contrib": ContribTRPO, **dict.fromkeys(UPDATES, PPOClip)}.get(job.arm, TRPO)
    algorithm = MaskableTRPO if masks else algorithm
    model = algorithm("MlpPolicy", env, seed=job.seed, device="cpu", **settings)
    started = time.process_time()
    model.learn(steps)
    cpu_seconds = time.process_time() - started
    assert model.ep_info_buffer is not None
    score = float(np.mean([episode["r"] for episode in model.ep_info_buffer]))
    write_row(TABLE, job, score, cpu_seconds=cpu_seconds, algorithm=algorithm)


GROUPS: tuple[tuple[dict[str, dict[str, Any]], dict[str, int], range], ...] = (
    (ARMS, TIMESTEPS, SEEDS),
    (UPDATES, {task: TIMESTEPS[task] for task in UPDATE_TASKS}, UPDATE_SEEDS),
    (ACTION_VALUES, {task: each["n_timesteps"] for task, each in ACTION_VALUE_TASKS.items()}, ACTION_VALUE_SEEDS),
)
"""Arms that are compared with each other, on which tasks (timesteps), with which seeds."""


def report() -> None:
    """Print Markdown tables: mean over seeds with its 95 % Student-t interval."""
    for arms, tasks, seeds in GROUPS:
        print("\n| environment (steps) | " + " | ".join(arms) + " |")
        print("|---" * (len(arms) + 1) + "|")
        for env_id, steps in tasks.items():
            cells = [interval(scores(TABLE, arm, env_id, seeds)) for arm in arms]
            print(f"| {env_id} ({steps // 1000}k) | " + " | ".join(cells) + " |")


def main() -> None:
    """Command line."""
    names = [arm for arms, _, _ in GROUPS for arm in arms]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs=3, metavar=("ARM", "ENV", "SEED"), help="run one job (used internally)")
    parser.add_argument("--report", action="store_true", help="only report")
    parser.add_argument("--arms", nargs="*", choices=names, default=names, help="only these")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time")
    args = parser.parse_args()
    if args.job:
        run_job(job_of(args.job[0], args.job[1], int(args.job[2])))
        return
    if not args.report:
        jobs = [
            job_of(arm, env_id, seed)
            for arms, tasks, seeds in GROUPS
            for seed in seeds
            for env_id in tasks
            for arm in arms
        ]
        run_missing(TABLE, [__file__], [job for job in jobs if job.arm in args.arms], args.workers)
    report()


if __name__ == "__main__":
    main()
