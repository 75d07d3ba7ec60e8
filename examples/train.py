"""Train TRPO on an environment and show what it learnt.

    python examples/train.py
    python examples/train.py --env Hopper-v5 --timesteps 150000     # needs the extra "mujoco"

Prints the mean return over 20 evaluation episodes before and after, saves the model, and draws the learning curve.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_trpo_ext import TRPO


def mean_return(model: TRPO, env: VecEnv) -> str:
    """Mean and standard deviation of the return over 20 episodes of the deterministic policy."""
    mean, std = evaluate_policy(model, env, n_eval_episodes=20)
    return f"{mean:.1f} ± {std:.1f}"


def draw(episodes: pd.DataFrame, path: Path, title: str) -> None:
    """Draw the training returns over environment steps, with their running mean."""
    episodes = episodes.sort_values("t")
    steps, smooth = episodes["l"].cumsum(), episodes["r"].rolling(20, min_periods=1).mean()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, episodes["r"], ".", markersize=3, alpha=0.3, label="episode")
    axes.plot(steps, smooth, label="mean of the last 20 episodes")
    axes.set(xlabel="environment steps", ylabel="return", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, evaluate, save, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1", help="Gymnasium id (default: %(default)s)")
    parser.add_argument("--timesteps", type=int, default=50_000, help="environment steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder for results (default: %(default)s)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    folder = args.output / f"trpo-{args.env.replace('/', '-')}-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for old_log in folder.glob("*.monitor.csv"):
        old_log.unlink()

    env = VecNormalize(make_vec_env(args.env, n_envs=2, seed=args.seed, monitor_dir=str(folder)))
    eval_env = VecNormalize(make_vec_env(args.env, seed=args.seed + 1000), training=False, norm_reward=False)
    eval_env.obs_rms = env.obs_rms  # evaluate with the training environment's observation statistics
    model = TRPO("MlpPolicy", env, n_steps=1024, seed=args.seed, device="cpu")

    print(f"Before training: mean return {mean_return(model, eval_env)} over 20 episodes")
    model.learn(args.timesteps, progress_bar=True)
    print(f"After training:  mean return {mean_return(model, eval_env)} over 20 episodes")

    model.save(folder / "model.zip")
    env.save(str(folder / "vecnormalize.pkl"))
    env.close()
    picture = folder / "learning_curve.png"
    draw(load_results(str(folder)), picture, f"TRPO on {args.env}")
    print(f"Model: {folder / 'model.zip'}\nLearning curve: {picture.resolve()}")


if __name__ == "__main__":
    main()
