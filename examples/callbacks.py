"""Callbacks work as in SB3: evaluation, checkpoints, and one of your own that watches the KL divergence of the updates.

python examples/callbacks.py --output runs/callbacks
"""

import argparse
from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import TRPO


class WatchDivergence(BaseCallback):
    """Keep the KL divergence of every update, and stop training if one leaves the trust region.

    An update is logged before the next rollout starts, and the logger keeps its numbers until they are written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.divergences: list[float] = []

    def _on_rollout_start(self) -> None:
        logged = self.logger.name_to_value
        if "train/kl_divergence_loss" in logged:
            self.divergences.append(logged["train/kl_divergence_loss"])

    def _on_step(self) -> bool:
        assert isinstance(self.model, TRPO)
        return not self.divergences or self.divergences[-1] <= self.model.trust_region_radius()


def main() -> None:
    """Train with three callbacks and say what they saw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=50_000, help="environment steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/callbacks"), help="folder (default: %(default)s)")
    args = parser.parse_args()

    model = TRPO("MlpPolicy", make_vec_env("CartPole-v1", n_envs=8, seed=0), n_steps=256, seed=0)
    # SB3 counts the frequencies in steps of each environment.
    every = max(args.timesteps // 5 // model.n_envs, 1)
    evaluation = EvalCallback(make_vec_env("CartPole-v1", seed=1), eval_freq=every, log_path=str(args.output))
    checkpoints = CheckpointCallback(save_freq=every, save_path=str(args.output), name_prefix="trpo")
    watch = WatchDivergence()
    model.learn(args.timesteps, callback=[evaluation, checkpoints, watch])

    print(f"Best evaluation: mean return {evaluation.best_mean_reward:.1f}")
    print(f"Checkpoints: {len(list(args.output.glob('trpo_*_steps.zip')))} in {args.output}")
    print(f"KL divergence: at most {max(watch.divergences):.4f} in {len(watch.divergences)} updates")


if __name__ == "__main__":
    main()
