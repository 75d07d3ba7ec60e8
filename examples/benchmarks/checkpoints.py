"""What a checkpoint costs: seconds of one, as a share of the 30 between two.

    python examples/benchmarks/checkpoints.py

Runs with a checkpoint after each update and runs without any take turns. What lies between the end of a rollout and
the beginning of the next, an update and perhaps a checkpoint, is timed: one costs the difference of the medians.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo_ext import TRPO, PPOClip
from sb3_trpo_ext.training.checkpoint import SECONDS_BETWEEN

ARMS: dict[str, tuple[type[TRPO] | type[PPOClip], str, int, dict[str, Any]]] = {
    "TRPO, Hopper-v5": (TRPO, "Hopper-v5", 1, {}),
    "TRPO, Hopper-v5, 8 environments": (TRPO, "Hopper-v5", 8, {}),
    "PPOClip, Hopper-v5": (PPOClip, "Hopper-v5", 1, {}),
    "TRPO, Humanoid-v5, 4 rollouts reused": (TRPO, "Humanoid-v5", 1, {"sample_reuse": 4}),
}


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
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


if __name__ == "__main__":
    main()
