"""Compare what the methods of the family learn, with each other and with sb3-contrib's at equal steps.

    python examples/benchmarks/family.py                 # run what is missing, two jobs at a time, then report
    python examples/benchmarks/family.py --report        # report what is there
    python examples/benchmarks/family.py --tasks CartPole  # only tasks whose name contains a word

A job is (arm, task, seed), in a process of its own with one thread, and leaves one row in ``results/family.csv.gz``
(columns: `jobs.py`); finished jobs are never run again. The score is the mean return of 20 evaluation episodes with
deterministic actions.

Tasks: *CartPole* and *Pendulum* for every method; *CartPole without velocities*, which only memory can solve;
*invalid actions*, sb3-contrib's environments in which most actions are forbidden at each step (100 is perfect; its
multi-binary one is made smaller, so that random play does not solve it).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3
from jobs import Job, interval, run_missing, scores, write_row
from sb3_contrib.common.envs import (
    InvalidActionEnvDiscrete,
    InvalidActionEnvMultiBinary,
    InvalidActionEnvMultiDiscrete,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

import sb3_trpo_ext

TABLE = "family"


@dataclass(frozen=True)
class Arm:
    """An algorithm and its arguments beyond those of the task."""

    algorithm: Any
    policy: str = "MlpPolicy"
    settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Attributes:
        make: Environment maker.
        steps: Training steps.
        arms: Who learns it.
        settings: Arguments of all arms.
        n_envs: Environments.
        normalize: Wrap in VecNormalize.
        seeds: Seeds of the runs.
    """

    make: Callable[[], gym.Env[Any, Any]]
    steps: int
    arms: dict[str, Arm]
    settings: dict[str, Any]
    n_envs: int = 8
    normalize: bool = False
    seeds: Iterable[int] = range(5)

    def env(self, seed: int) -> VecEnv:
        """The environments of a run."""
        env = make_vec_env(self.make, n_envs=self.n_envs, seed=seed)
        return VecNormalize(env, gamma=self.settings.get("gamma", 0.99)) if self.normalize else env


class HiddenVelocities(gym.ObservationWrapper[Any, Any, Any]):
    """CartPole that shows positions alone."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, gym.spaces.Box)
        low, high = (self.observation(bound) for bound in (env.observation_space.low, env.observation_space.high))
        self.observation_space = gym.spaces.Box(low, high)

    def observation(self, observation: Any) -> Any:
        """Leave out entries 1 and 3."""
        return observation[[0, 2]]


CARTPOLE_PPO = {"batch_size": 256, "n_epochs": 10, "learning_rate": 1e-3}
PENDULUM_PPO = {"batch_size": 64, "n_epochs": 10, "learning_rate": 1e-3}
LSTM = {"lstm_hidden_size": 64}
MEMORY_TRPO = {
    "n_steps": 128,
    "gamma": 0.98,
    "gae_lambda": 0.9,
    "critic": "adam",
    "target_kl": LinearSchedule(0.03, 0.003, 1.0),
}
# The RL Zoo's entry for this task.
ZOO_RECURRENT_PPO = {
    "n_steps": 32,
    "batch_size": 256,
    "n_epochs": 20,
    "gamma": 0.98,
    "gae_lambda": 0.8,
    "learning_rate": LinearSchedule(1e-3, 0.0, 1.0),
    "clip_range": LinearSchedule(0.2, 0.0, 1.0),
}


def methods(ppo: dict[str, Any]) -> dict[str, Arm]:
    """The memoryless, unmasked methods."""
    ours = sb3_trpo_ext
    return {
        "TRPO": Arm(ours.TRPO),
        "TRPO max": Arm(ours.TRPO, settings={"trust_region": "max", "target_kl": 0.05}),
        "NPG": Arm(ours.NPG),
        "PPOPenalty": Arm(ours.PPOPenalty, settings=ppo),
        "PPOClip": Arm(ours.PPOClip, settings=ppo),
        "SB3 PPO": Arm(stable_baselines3.PPO, settings=ppo),
    }


MASKED = {"MaskableTRPO": Arm(sb3_trpo_ext.MaskableTRPO), "MaskablePPO": Arm(sb3_contrib.MaskablePPO)}
TASKS = {
    "CartPole": Task(lambda: gym.make("CartPole-v1"), 60_000, methods(CARTPOLE_PPO), {"n_steps": 256}),
    "Pendulum": Task(
        lambda: gym.make("Pendulum-v1"),
        150_000,
        methods(PENDULUM_PPO),
        {"n_steps": 1024, "gamma": 0.9},
        n_envs=2,
        normalize=True,
    ),
    "CartPole without velocities": Task(
        lambda: HiddenVelocities(gym.make("CartPole-v1")),
        200_000,
        {
            "RecurrentTRPO": Arm(sb3_trpo_ext.RecurrentTRPO, "MlpLstmPolicy", MEMORY_TRPO | {"policy_kwargs": LSTM}),
            "RecurrentPPO tuned": Arm(sb3_contrib.RecurrentPPO, "MlpLstmPolicy", ZOO_RECURRENT_PPO),
            "TRPO": Arm(sb3_trpo_ext.TRPO, settings=MEMORY_TRPO),
        },
        {},
        seeds=range(3),
    ),
    "invalid actions, Discrete": Task(
        lambda: InvalidActionEnvDiscrete(dim=80, n_invalid_actions=60), 20_000, MASKED, {"n_steps": 256}, n_envs=4
    ),
    "invalid actions, MultiDiscrete": Task(
        lambda: InvalidActionEnvMultiDiscrete(dims=[5, 5], n_invalid_actions=7),
        20_000,
        MASKED,
        {"n_steps": 256},
        n_envs=4,
    ),
    "invalid actions, MultiBinary": Task(
        lambda: InvalidActionEnvMultiBinary(dims=8, n_invalid_actions=4), 20_000, MASKED, {"n_steps": 256}, n_envs=4
    ),
}


def job_of(arm_name: str, task_name: str, seed: int) -> Job:
    """A job with its settings; schedules as they print."""
    task = TASKS[task_name]
    arm = task.arms[arm_name]
    fixed = {"policy": arm.policy, "n_timesteps": task.steps, "n_envs": task.n_envs, "normalize": task.normalize}
    settings = fixed | task.settings | (arm.settings or {})
    return Job(arm_name, task_name, seed, json.loads(json.dumps(settings, default=repr)))


def run_job(job: Job) -> None:
    """Train one model and write its score."""
    import torch

    torch.set_num_threads(1)
    task = TASKS[job.task]
    arm = task.arms[job.arm]
    env = task.env(job.seed)
    settings = {**task.settings, **(arm.settings or {})}
    model = arm.algorithm(arm.policy, env, seed=job.seed, device="cpu", **settings)
    started = time.process_time()
    model.learn(task.steps)
    cpu_seconds = time.process_time() - started
    score = evaluate(model, env, task, 1000 + job.seed)
    write_row(TABLE, job, score, cpu_seconds=cpu_seconds, algorithm=arm.algorithm)


def evaluate(model: Any, trained_in: VecEnv, task: Task, seed: int) -> float:
    """Mean return of 20 episodes."""
    env = make_vec_env(task.make, seed=seed)
    if isinstance(trained_in, VecNormalize):
        env = VecNormalize(env, training=False, norm_reward=False)
        env.obs_rms = trained_in.obs_rms
    if isinstance(model, sb3_contrib.MaskablePPO):
        from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked

        return float(np.mean(evaluate_masked(model, env, n_eval_episodes=20)[0]))
    from stable_baselines3.common.evaluation import evaluate_policy

    return float(np.mean(evaluate_policy(model, env, n_eval_episodes=20)[0]))


def report(tasks: list[str]) -> None:
    """Print a Markdown table: mean over seeds with its 95 % Student-t interval, and the worst seed."""
    print("| task (steps) | method | mean return | worst seed |")
    print("|---|---|---|---|")
    for name in tasks:
        for arm in TASKS[name].arms:
            found = scores(TABLE, arm, name, TASKS[name].seeds)
            if found:
                print(f"| {name} ({TASKS[name].steps // 1000}k) | {arm} | {interval(found)} | {min(found):.0f} |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=[""], metavar="WORD", help="only tasks whose name has one")
    parser.add_argument("--job", nargs=3, metavar=("ARM", "TASK", "SEED"), help="run one job (used internally)")
    parser.add_argument("--report", action="store_true", help="only report")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time")
    args = parser.parse_args()
    if args.job:
        run_job(job_of(args.job[0], args.job[1], int(args.job[2])))
        return
    tasks = [name for name in TASKS if any(word in name for word in args.tasks)]
    if not args.report:
        jobs = [job_of(arm, name, seed) for name in tasks for seed in TASKS[name].seeds for arm in TASKS[name].arms]
        run_missing(TABLE, [__file__], jobs, args.workers)
    report(tasks)


if __name__ == "__main__":
    main()
