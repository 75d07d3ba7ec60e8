"""What a checkpoint costs: seconds of one, as a share of the 30 between two; and a run that is killed ten times.

    python examples/benchmarks/checkpoints.py            # minutes
    python examples/benchmarks/checkpoints.py --killed   # the run alone, and its picture

Runs with a checkpoint after each update and runs without any take turns. What lies between the end of a rollout and
the beginning of the next, an update and perhaps a checkpoint, is timed: one costs the difference of the medians.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo_ext import TRPO, PPOClip
from sb3_trpo_ext.training.checkpoint import SECONDS_BETWEEN

ARMS: dict[str, tuple[type[TRPO] | type[PPOClip], str, int, dict[str, Any]]] = {
    "TRPO, Hopper-v5": (TRPO, "Hopper-v5", 1, {}),
    "TRPO, Hopper-v5, 8 environments": (TRPO, "Hopper-v5", 8, {}),
    "PPOClip, Hopper-v5": (PPOClip, "Hopper-v5", 1, {}),
    "TRPO, Humanoid-v5, 4 rollouts reused": (TRPO, "Humanoid-v5", 1, {"sample_reuse": 4}),
}

FIGURE = Path(__file__).parent / "results" / "killed_run.png"
KILLS = 10


class Clock(BaseCallback):
    """Notes when each rollout begins and ends: between the two lie an update and a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._ended = 0.0

    def _on_rollout_start(self) -> None:
        if self._ended:
            self.seconds.append(time.perf_counter() - self._ended)

    def _on_rollout_end(self) -> None:
        self._ended = time.perf_counter()

    def _on_step(self) -> bool:
        return True


def seconds_between_rollouts(arm: str, updates: int, folder: Path | None) -> list[float]:
    """Seconds of each update, with its checkpoint if there is a folder."""
    algorithm, task, n_envs, kwargs = ARMS[arm]
    env = VecNormalize(make_vec_env(task, n_envs=n_envs))
    model = algorithm("MlpPolicy", env, n_steps=2048 // n_envs, seed=0, device="cpu", **kwargs)
    clock = Clock()
    model.learn(2048 * updates, callback=clock, checkpoint_dir=folder, checkpoint_freq=1 if folder else None)
    env.close()
    return clock.seconds[1:]


def train(folder: Path, checkpoints: bool) -> None:
    """Train an agent on Hopper-v5 that is the same every time, with a Monitor's file in a folder."""
    torch.set_num_threads(1)
    env = VecNormalize(make_vec_env("Hopper-v5", 2, monitor_dir=str(folder)))
    model = TRPO("MlpPolicy", env, n_steps=1024, seed=0, device="cpu")
    keep: dict[str, Any] = {"checkpoint_dir": folder / "run", "checkpoint_freq": 1} if checkpoints else {}
    model.learn(150_000, **keep)


def training(folder: Path, *, checkpoints: bool) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--train", str(folder), str(int(checkpoints))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for_another(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait for a checkpoint that is not there yet, or for the process."""
    before = {*folder.glob("*/manifest.json")}
    while process.poll() is None and not {*folder.glob("*/manifest.json")} - before:
        time.sleep(0.05)


def kill_and_draw() -> None:
    """Kill a run at random moments, start it again, and draw it over one that was left alone."""
    import matplotlib.pyplot as plt

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        training(Path(one), checkpoints=False).wait()
        goes_on, resumed = True, list[int]()
        while goes_on:
            process = training(Path(other), checkpoints=True)
            if len(resumed) < KILLS:
                wait_for_another(Path(other) / "run", process)
                time.sleep(random.uniform(0, 5))
                process.kill()
            said = process.communicate()[0]
            goes_on = process.returncode != 0
            resumed += [int(steps) for steps in re.findall(r"^Resumed from .*, at (\d+) of", said, flags=re.M)]
        alone, killed = load_results(one), load_results(other)
    same = bool((alone[["r", "l"]].values == killed[["r", "l"]].values).all())
    print(f"Resumed {len(resumed)} times; the same episodes: {same}")
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for runs, style in ((alone, {"linewidth": 6, "alpha": 0.3, "label": "left alone"}), (killed, {"label": "killed"})):
        axis.plot(runs["l"].cumsum(), runs["r"].rolling(50).mean(), **style)
    for number, steps in enumerate(resumed):
        axis.axvline(steps, color="gray", linestyle=":", label="" if number else "resumed from here")
    axis.set(
        xlabel="timesteps",
        ylabel="return, mean of 50 episodes",
        title=f"TRPO, Hopper-v5: a run that was killed {len(resumed)} times",
    )
    axis.legend()
    figure.savefig(FIGURE, dpi=120)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--killed", action="store_true", help="only kill a run and draw it")
    parser.add_argument("--train", nargs=2, metavar=("FOLDER", "CHECKPOINTS"), help="used internally")
    arguments = parser.parse_args()
    if arguments.train:
        train(Path(arguments.train[0]), bool(int(arguments.train[1])))
        return
    if arguments.killed:
        kill_and_draw()
        return
    torch.set_num_threads(1)
    print(f"{'':38} {'one (ms)':>9} {'on disk (kB)':>13} {f'share of {SECONDS_BETWEEN:.0f} s':>14}")
    for arm in ARMS:
        without, with_, size = list[float](), list[float](), 0
        for _ in range(arguments.repeats):
            without += seconds_between_rollouts(arm, arguments.updates, None)
            with tempfile.TemporaryDirectory() as name:
                with_ += seconds_between_rollouts(arm, arguments.updates, Path(name))
                size = max(path.stat().st_size for path in Path(name).rglob("*.pkl"))
        one = float(np.median(with_) - np.median(without))
        print(f"{arm:38} {1e3 * one:9.1f} {size / 1e3:13.0f} {one / SECONDS_BETWEEN:14.2%}")
    kill_and_draw()


if __name__ == "__main__":
    main()
