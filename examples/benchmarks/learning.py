"""What TRPO learns, against sb3_contrib.TRPO, SB3's PPO and A2C with the settings that the RL Zoo tuned for each task.

    python examples/benchmarks/learning.py                          # run what is missing, two jobs at a time
    python examples/benchmarks/learning.py --arms PPO --tasks Hopper-v5 --seeds 0 1
    python examples/benchmarks/learning.py --arms "TRPO momentum=0.5" "TRPO target_kl=0.02" --seeds 100 101
    python examples/benchmarks/learning.py --study step-sizes       # another of the STUDIES
    python examples/benchmarks/learning.py --table tuning           # keep the results in another table
    python examples/benchmarks/learning.py --budget-minutes 60      # start no job after an hour
    python examples/benchmarks/report.py                            # tables and figures of what is there

A job is (arm, task, seed), in a process of its own with one thread. It trains through the RL Zoo's own experiment
manager, so that environments, wrappers and schedules are those of ``train --algo ALGO --env TASK``, is evaluated at 25
points (variants of an arm: at the last three of them) by 20 episodes with deterministic actions, and leaves one row in
``results/learning.csv.gz`` or the ``--table`` that is named (columns: `jobs.py`). Its evaluations are the timesteps and
the CPU seconds of training so far, without the evaluations themselves, and the 20 returns of each. Jobs are known by
their settings: what has been run with other settings in the zoo's files or ours is run again.

With one thread, CPU seconds are the wall-clock of a core that does nothing else; jobs that share a machine with others
can be compared by them.
"""

import argparse
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import yaml
from gymnasium.wrappers import RecordEpisodeStatistics
from jobs import Job, run_missing, write_row
from stable_baselines3.common.callbacks import EvalCallback

TABLE = "learning"
RANDOM = "random"
RANDOM_EPISODES = 100
EVALUATIONS = 25
EPISODES = 20
EVALUATION_SEED = 1_000_000
MUJOCO = ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "InvertedDoublePendulum-v5", "Reacher-v5")
MAIN_STEPS = {
    **dict.fromkeys(MUJOCO, 300_000),
    "CartPole-v1": 100_000,
    "Acrobot-v1": 100_000,
    "LunarLander-v3": 200_000,
}
STEPS = {**MAIN_STEPS, "Swimmer-v5": 300_000, "Ant-v5": 300_000}
ZOO_MUJOCO_DEFAULTS = "Ant-v4"
"""The zoo's entry for MuJoCo tasks that it has not tuned; its files name it through this task."""


@dataclass(frozen=True)
class Arm:
    """Who learns.

    Attributes:
        algo: Name of the algorithm in the RL Zoo.
        peer: Whether it is the zoo's own algorithm with the zoo's own settings, instead of ours.
        overrides: Settings beyond the entry of the hyperparameter file.
        tasks: What it is run on.
        skipped: How many of the evaluations are left out, from the start.
    """

    algo: str
    peer: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = tuple(STEPS)
    skipped: int = 0


TWO_TASKS = ("Hopper-v5", "HalfCheetah-v5")
ARMS = {
    "TRPO": Arm("trpo"),
    "sb3_contrib TRPO": Arm("trpo", peer=True),
    "PPO": Arm("ppo", peer=True),
    "PPOClip": Arm("ppo_clip", tasks=TWO_TASKS),
    "NPG": Arm("npg", tasks=TWO_TASKS),
    "A2C": Arm("a2c", peer=True, tasks=TWO_TASKS),
}


@dataclass(frozen=True)
class Study:
    """What is run for one question: every arm on every task that it is meant for, with every seed."""

    arms: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: int


STEP_SIZES = {
    "TRPO": ("target_kl", (0.001, 0.003, 0.01, 0.03, 0.1)),
    "A2C": ("learning_rate", (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)),
}


def step_size_arm(arm: str, value: float) -> str:
    """The arm with another step size, for 200k steps."""
    return f"{arm} {STEP_SIZES[arm][0]}={value} n_timesteps=200000"


STUDIES = {
    "main": Study(tuple(ARMS), tuple(MAIN_STEPS), 5),
    "step-sizes": Study(
        tuple(step_size_arm(arm, value) for arm, (_, values) in STEP_SIZES.items() for value in values),
        ("Hopper-v5",),
        3,
    ),
    "long": Study(
        ("TRPO n_timesteps=1000000", "sb3_contrib TRPO n_timesteps=1000000"),
        ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Swimmer-v5", "Ant-v5"),
        3,
    ),
}
"""The comparison at 300k steps and less, the range of step sizes that learn, and what a million steps bring."""


def arm_named(name: str) -> Arm:
    """An arm of `ARMS`, or a variant with overrides after its name: ``"TRPO momentum=0.5 n_steps=512"``."""
    base = next((base for base in sorted(ARMS, key=len, reverse=True) if f"{name} ".startswith(f"{base} ")), None)
    if base is None:
        raise argparse.ArgumentTypeError(f"unknown arm {name!r}; there are {', '.join(ARMS)}")
    words = (word.partition("=") for word in name.removeprefix(base).split())
    overrides = {key: yaml.safe_load(value) for key, _, value in words}
    if not overrides:
        return ARMS[base]
    return replace(ARMS[base], overrides=ARMS[base].overrides | overrides, skipped=EVALUATIONS - 3)


def known_arm(name: str) -> str:
    """The name, if `arm_named` knows it."""
    arm_named(name)
    return name


@cache
def hyperparameters(package: str, algo: str) -> dict[str, Any]:
    """The hyperparameter file of an algorithm."""
    return yaml.safe_load((files(package) / "hyperparams" / f"{algo}.yml").read_text())


def settings(arm: Arm, task: str) -> dict[str, Any]:
    """The entry of the task in the hyperparameter file of the arm, with our timesteps and the overrides of the arm.

    The zoo's files know the MuJoCo tasks as ``-v4``; where they do not know a task at all, their entry for untuned
    MuJoCo tasks is taken.
    """
    entries = hyperparameters("rl_zoo3" if arm.peer else "sb3_trpo_ext.zoo", arm.algo)
    names = (task, task.replace("-v5", "-v4"), ZOO_MUJOCO_DEFAULTS)
    entry = next(entries[name] for name in names if name in entries)
    return {**entry, "n_timesteps": STEPS[task], **arm.overrides}


def job_of(arm: str, task: str, seed: int) -> Job:
    """A job with its settings."""
    return Job(arm, task, seed, {"episodes": RANDOM_EPISODES} if arm == RANDOM else settings(arm_named(arm), task))


class TimedEvaluation(EvalCallback):
    """SB3's evaluation without the first ones, and with the CPU time that training took without it."""

    def __init__(self, *args: Any, skipped: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped = skipped
        self.cpu_seconds: list[float] = []

    def _on_training_start(self) -> None:
        self._started = time.process_time()

    def _on_step(self) -> bool:
        if self.n_calls % self.eval_freq or self.n_calls <= self.skipped * self.eval_freq:
            return True
        before = time.process_time()
        self.cpu_seconds.append(round(before - self._started, 2))
        proceed = super()._on_step()
        self._started += time.process_time() - before
        return proceed


def run_random(table: str, job: Job) -> None:
    """Write what uniformly drawn actions return: the zero of normalised scores."""
    env = RecordEpisodeStatistics(gym.make(job.task), buffer_length=RANDOM_EPISODES)
    env.action_space.seed(job.seed)
    env.reset(seed=EVALUATION_SEED + job.seed)
    while len(env.return_queue) < RANDOM_EPISODES:
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    write_row(table, job, float(np.mean(env.return_queue)))


def run_job(table: str, job: Job) -> None:
    """Train one model and write its evaluations."""
    import torch
    from rl_zoo3 import exp_manager

    from sb3_trpo_ext.zoo import register

    torch.set_num_threads(1)
    arm = arm_named(job.arm)
    steps = job.settings["n_timesteps"]
    if not arm.peer:
        register()  # before this, "trpo" is sb3-contrib's
    with tempfile.TemporaryDirectory() as scratch, open(Path(scratch) / "log", "w") as log, redirect_stdout(log):
        config = Path(scratch) / "config.yml"
        config.write_text(yaml.safe_dump({job.task: job.settings}))
        manager = exp_manager.ExperimentManager(
            argparse.Namespace(),
            arm.algo,
            job.task,
            scratch,
            eval_freq=-1,
            seed=job.seed,
            verbose=0,
            device="cpu",
            config=str(config),
        )
        experiment = manager.setup_experiment()
        assert experiment is not None
        model = experiment[0]
        evaluation_env = manager.create_envs(EPISODES, eval_env=True)
        evaluation_env.seed(EVALUATION_SEED + job.seed)
        evaluation = TimedEvaluation(
            evaluation_env,
            skipped=arm.skipped,
            n_eval_episodes=EPISODES,
            eval_freq=steps // EVALUATIONS // manager.n_envs,
            log_path=scratch,
            verbose=0,
        )
        model.learn(steps, callback=evaluation)
    kept = EVALUATIONS - arm.skipped
    evaluations = {
        "timesteps": evaluation.evaluations_timesteps[:kept],
        "cpu_seconds": evaluation.cpu_seconds[:kept],
        "returns": np.round(evaluation.evaluations_results[:kept], 2).tolist(),
    }
    write_row(
        table,
        job,
        float(np.mean(evaluations["returns"][-1])),
        evaluations=evaluations,
        cpu_seconds=evaluations["cpu_seconds"][-1],
        algorithm=type(model),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="main", help="arms, tasks and seeds, where not given")
    parser.add_argument("--arms", nargs="*", type=known_arm, metavar="ARM", help="only these, or variants of them")
    parser.add_argument("--tasks", nargs="*", choices=STEPS, metavar="TASK", help="only these tasks")
    parser.add_argument("--seeds", nargs="*", type=int, help="seeds of every arm and task")
    parser.add_argument("--table", default=TABLE, help="where the results are kept (default: %(default)s)")
    parser.add_argument("--job", nargs=3, metavar=("ARM", "TASK", "SEED"), help="run one job (used internally)")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time")
    parser.add_argument("--budget-minutes", type=float, help="start no job after this time")
    args = parser.parse_args()
    if args.job:
        job = job_of(args.job[0], args.job[1], int(args.job[2]))
        (run_random if job.arm == RANDOM else run_job)(args.table, job)
        return
    study = STUDIES[args.study]
    tasks = args.tasks or study.tasks
    jobs = [job_of(RANDOM, task, 0) for task in tasks]
    jobs += [
        job_of(arm, task, seed)
        for seed in args.seeds or range(study.seeds)
        for task in tasks
        for arm in args.arms or study.arms
        if task in arm_named(arm).tasks
    ]
    sys.exit(run_missing(args.table, [__file__, "--table", args.table], jobs, args.workers, args.budget_minutes))


if __name__ == "__main__":
    main()
