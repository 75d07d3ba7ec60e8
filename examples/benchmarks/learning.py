"""What TRPO learns, against sb3_contrib.TRPO, SB3's PPO and A2C with the settings that the RL Zoo tuned for each task.

    python examples/benchmarks/learning.py                          # run what is missing, two jobs at a time
    python examples/benchmarks/learning.py --arms PPO --tasks Hopper-v5 --seeds 0 1
    python examples/benchmarks/learning.py --arms "TRPO momentum=0.5" "TRPO target_kl=0.02" --seeds 100 101
    python examples/benchmarks/learning.py --budget-minutes 60      # start no job after an hour
    python examples/benchmarks/report.py                            # tables and figures of what is there

A job is (arm, task, seed), in a process of its own with one thread. It trains through the RL Zoo's own experiment
manager, so that environments, wrappers and schedules are those of ``train --algo ALGO --env TASK``, is evaluated at 25
points (10 for variants of an arm) by 20 episodes with deterministic actions, and leaves, under ``results/learning``,

- ``*.evaluations.csv.gz``: timesteps, seconds and CPU seconds of training so far (without the evaluations), 20 returns;
- ``*.monitor.csv.gz``: return, length and time of every training episode, in the format of SB3's ``Monitor``;
- ``*.json``: settings, command and versions, written last: a job without it is run again, a job with it never.

With one thread, CPU seconds are the wall-clock of a core that does nothing else; jobs that share a machine with others
can be compared by them.
"""

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import yaml
from gymnasium.wrappers import RecordEpisodeStatistics
from jobs import Job, result_path, run_missing, write_result
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.monitor import get_monitor_files

BENCHMARK = "learning"
RANDOM = "random"
EPISODES = 20
EVALUATION_SEED = 1_000_000
MUJOCO = ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "InvertedDoublePendulum-v5", "Reacher-v5")
STEPS = {
    **dict.fromkeys(MUJOCO, 300_000),
    "CartPole-v1": 100_000,
    "Acrobot-v1": 100_000,
    "LunarLander-v3": 200_000,
}
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
        evaluations: How often it is evaluated.
    """

    algo: str
    peer: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    tasks: Iterable[str] = tuple(STEPS)
    evaluations: int = 25


TWO_TASKS = ("Hopper-v5", "HalfCheetah-v5")
ARMS = {
    "TRPO": Arm("trpo"),
    "sb3_contrib TRPO": Arm("trpo", peer=True),
    "PPO": Arm("ppo", peer=True),
    "PPOClip": Arm("ppo_clip", tasks=TWO_TASKS),
    "NPG": Arm("npg", tasks=TWO_TASKS),
    "A2C": Arm("a2c", peer=True, tasks=TWO_TASKS),
}


def arm_named(name: str) -> Arm:
    """An arm of `ARMS`, or a variant with overrides after its name: ``"TRPO momentum=0.5 n_steps=512"``."""
    base = next((base for base in sorted(ARMS, key=len, reverse=True) if f"{name} ".startswith(f"{base} ")), None)
    if base is None:
        raise argparse.ArgumentTypeError(f"unknown arm {name!r}; there are {', '.join(ARMS)}")
    words = (word.partition("=") for word in name.removeprefix(base).split())
    overrides = {key: yaml.safe_load(value) for key, _, value in words}
    if not overrides:
        return ARMS[base]
    return replace(ARMS[base], overrides=ARMS[base].overrides | overrides, evaluations=10)


def known_arm(name: str) -> str:
    """The name, if `arm_named` knows it."""
    arm_named(name)
    return name


def settings(arm: Arm, task: str) -> dict[str, Any]:
    """The entry of the task in the hyperparameter file of the arm, with the overrides of the arm.

    The zoo's files know the MuJoCo tasks as ``-v4``; where they do not know a task at all, their entry for untuned
    MuJoCo tasks is taken.
    """
    package = files("rl_zoo3" if arm.peer else "sb3_trpo_ext.zoo")
    entries = yaml.safe_load((package / "hyperparams" / f"{arm.algo}.yml").read_text())
    names = (task, task.replace("-v5", "-v4"), ZOO_MUJOCO_DEFAULTS)
    entry = next(entries[name] for name in names if name in entries)
    return {**entry, **arm.overrides}


class TimedEvaluation(EvalCallback):
    """SB3's evaluation, with the time that training took without it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: list[tuple[float, float]] = []
        self._started = self._clocks()

    @staticmethod
    def _clocks() -> np.ndarray:
        return np.array((time.perf_counter(), time.process_time()))

    def _on_training_start(self) -> None:
        self._started = self._clocks()

    def _on_step(self) -> bool:
        if self.n_calls % self.eval_freq:
            return True
        before = self._clocks()
        self.seconds.append(tuple(before - self._started))
        proceed = super()._on_step()
        self._started += self._clocks() - before
        return proceed

    def table(self) -> pd.DataFrame:
        """One row an evaluation."""
        columns = {
            "timesteps": self.evaluations_timesteps,
            "seconds": [f"{wall:.2f}" for wall, _ in self.seconds],
            "cpu_seconds": [f"{cpu:.2f}" for _, cpu in self.seconds],
        }
        returns = np.round(np.array(self.evaluations_results), 2)
        return pd.DataFrame({**columns, **{f"return_{k}": returns[:, k] for k in range(EPISODES)}})


def run_random(task: str, seed: int, episodes: int = 100) -> None:
    """Write what uniformly drawn actions return: the zero of normalised scores."""
    env = RecordEpisodeStatistics(gym.make(task), buffer_length=episodes)
    env.action_space.seed(seed)
    env.reset(seed=EVALUATION_SEED + seed)
    while len(env.return_queue) < episodes:
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    write_result(BENCHMARK, (RANDOM, task, seed), {"episodes": episodes, "score": float(np.mean(env.return_queue))})


def run_job(arm_name: str, task: str, seed: int) -> None:
    """Train one model; write its evaluations, its training episodes and its settings."""
    import torch
    from rl_zoo3 import exp_manager

    from sb3_trpo_ext.zoo import register

    torch.set_num_threads(1)
    arm = arm_named(arm_name)
    steps = arm.overrides.get("n_timesteps", STEPS[task])
    if not arm.peer:
        register()  # before this, "trpo" is sb3-contrib's
    entry = settings(arm, task)
    path = result_path(BENCHMARK, (arm_name, task, seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, open(Path(scratch) / "log", "w") as log, redirect_stdout(log):
        config = Path(scratch) / "config.yml"
        config.write_text(yaml.safe_dump({task: entry}))
        manager = exp_manager.ExperimentManager(
            argparse.Namespace(),
            arm.algo,
            task,
            scratch,
            n_timesteps=steps,
            eval_freq=-1,
            seed=seed,
            verbose=0,
            device="cpu",
            config=str(config),
        )
        experiment = manager.setup_experiment()
        assert experiment is not None
        model = experiment[0]
        evaluation_env = manager.create_envs(EPISODES, eval_env=True)
        evaluation_env.seed(EVALUATION_SEED + seed)
        every = steps // arm.evaluations // manager.n_envs
        evaluation = TimedEvaluation(
            evaluation_env, n_eval_episodes=EPISODES, eval_freq=every, log_path=scratch, verbose=0
        )
        model.learn(steps, callback=evaluation)
        table = evaluation.table().head(arm.evaluations)
        table.to_csv(path.with_suffix(".evaluations.csv.gz"), index=False)
        write_episodes(manager.save_path, path.with_suffix(".monitor.csv.gz"), task)
    score = float(np.mean(evaluation.evaluations_results[arm.evaluations - 1]))
    command = f"python examples/benchmarks/learning.py --job '{arm_name}' {task} {seed}"
    result = {"timesteps": steps, "score": score, "algorithm": f"{type(model).__module__}.{type(model).__name__}"}
    write_result(BENCHMARK, (arm_name, task, seed), {**result, "settings": entry, "command": command})


def write_episodes(folder: str, path: Path, task: str) -> None:
    """Join the monitor files of all environments into one, in the order in which the episodes ended."""
    frames = [pd.read_csv(file, skiprows=1) for file in get_monitor_files(folder)]
    episodes = pd.concat(frames).sort_values("t", kind="stable")
    with gzip.open(path, "wt") as file:
        file.write("#" + json.dumps({"t_start": 0.0, "env_id": task}) + "\n")
        episodes.round({"r": 2, "t": 1}).to_csv(file, index=False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", type=known_arm, default=list(ARMS), metavar="ARM", help="only these")
    parser.add_argument(
        "--tasks", nargs="*", choices=STEPS, default=list(STEPS), metavar="TASK", help="only these tasks"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)), help="seeds of every arm and task")
    parser.add_argument("--job", nargs=3, metavar=("ARM", "TASK", "SEED"), help="run one job (used internally)")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time")
    parser.add_argument("--budget-minutes", type=float, help="start no job after this time")
    args = parser.parse_args()
    if args.job:
        arm, task, seed = args.job[0], args.job[1], int(args.job[2])
        run_random(task, seed) if arm == RANDOM else run_job(arm, task, seed)
        return
    jobs: list[Job] = [(RANDOM, task, 0) for task in args.tasks]
    jobs += [
        (arm, task, seed)
        for seed in args.seeds
        for task in args.tasks
        for arm in args.arms
        if task in arm_named(arm).tasks
    ]
    sys.exit(run_missing(BENCHMARK, __file__, jobs, args.workers, args.budget_minutes))


if __name__ == "__main__":
    main()
