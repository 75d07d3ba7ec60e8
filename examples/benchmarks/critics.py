"""Compare what TRPO learns with either critic and either way of collecting, and what sb3_contrib.TRPO learns.

    python examples/benchmarks/critics.py                # run what is missing, two jobs at a time, then report
    python examples/benchmarks/critics.py --report       # report what is there

A job is (arm, environment, seed), in a process of its own with one thread, and leaves one JSON file; finished jobs are
never run again. The score is the mean return of the last 100 training episodes.
"""

import argparse
from typing import Any

import numpy as np
from jobs import Job, interval, run_missing, scores, write_result

BENCHMARK = "critics"
TIMESTEPS = {"CartPole-v1": 50_000, "Pendulum-v1": 100_000, "Hopper-v5": 150_000, "HalfCheetah-v5": 150_000}
ARMS: dict[str, dict[str, Any]] = {
    "default": {},  # Gauss-Newton critic, fast rollouts
    "adam": {"critic": "adam"},
    "sb3_rollouts": {"fast_rollouts": False},
    "sb3_contrib": {},
}
SEEDS = range(10)


def run_job(arm: str, env_id: str, seed: int) -> None:
    """Train one model and write its score."""
    import torch
    from sb3_contrib import TRPO as ContribTRPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    from sb3_trpo_ext import TRPO

    torch.set_num_threads(1)
    env = VecNormalize(make_vec_env(env_id, n_envs=2, seed=seed))
    settings: dict[str, Any] = {"n_steps": 1024, "seed": seed, "device": "cpu"}
    algorithm = ContribTRPO if arm == "sb3_contrib" else TRPO
    model = algorithm("MlpPolicy", env, **settings, **ARMS[arm])
    model.learn(TIMESTEPS[env_id])
    assert model.ep_info_buffer is not None
    score = float(np.mean([episode["r"] for episode in model.ep_info_buffer]))
    write_result(BENCHMARK, (arm, env_id, seed), {"timesteps": TIMESTEPS[env_id], "score": score})


def report() -> None:
    """Print a Markdown table: mean over seeds with its 95 % Student-t interval."""
    print("| environment (steps) | " + " | ".join(ARMS) + " |")
    print("|---" * (len(ARMS) + 1) + "|")
    for env_id, steps in TIMESTEPS.items():
        cells = [interval(scores(BENCHMARK, arm, env_id, SEEDS)) for arm in ARMS]
        print(f"| {env_id} ({steps // 1000}k) | " + " | ".join(cells) + " |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs=3, metavar=("ARM", "ENV", "SEED"), help="run one job (used internally)")
    parser.add_argument("--report", action="store_true", help="only report")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time")
    args = parser.parse_args()
    if args.job:
        run_job(args.job[0], args.job[1], int(args.job[2]))
        return
    if not args.report:
        jobs: list[Job] = [(arm, env_id, seed) for seed in SEEDS for env_id in TIMESTEPS for arm in ARMS]
        run_missing(BENCHMARK, __file__, jobs, args.workers)
    report()


if __name__ == "__main__":
    main()
