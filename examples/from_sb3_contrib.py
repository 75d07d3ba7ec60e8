"""The same script before and after: what changes when you come from sb3_contrib.TRPO is one import.

python examples/from_sb3_contrib.py
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import sb3_contrib
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import sb3_trpo_ext

# Settings that were tuned for sb3-contrib keep their meaning: target_kl counts per action dimension as it does there,
# and learning_rate, batch_size or n_critic_updates away from their defaults choose its critic (critic="adam").
SETTINGS = {"n_steps": 1024, "gamma": 0.9, "target_kl": 0.02, "n_critic_updates": 15}


def train(algorithm: Any, timesteps: int) -> Any:
    """The script: nothing in it knows whose TRPO it is."""
    model = algorithm("MlpPolicy", make_vec_env("Pendulum-v1", n_envs=4, seed=0), seed=0, device="cpu", **SETTINGS)
    start = time.perf_counter()
    model.learn(timesteps)
    seconds = time.perf_counter() - start
    mean, std = evaluate_policy(model, make_vec_env("Pendulum-v1", seed=1), n_eval_episodes=20)
    print(f"{algorithm.__module__.split('.')[0]:<13} mean return {mean:7.1f} ± {std:.1f} after {seconds:.1f} s")
    return model


def main() -> None:
    """Before, after, and a model of before that goes on after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=100_000, help="environment steps (default: %(default)s)")
    timesteps = parser.parse_args().timesteps

    before = train(sb3_contrib.TRPO, timesteps)
    train(sb3_trpo_ext.TRPO, timesteps)

    with tempfile.TemporaryDirectory() as folder:
        before.save(Path(folder) / "model")
        model = sb3_trpo_ext.TRPO.load(Path(folder) / "model", env=make_vec_env("Pendulum-v1", n_envs=4, seed=2))
    model.learn(timesteps // 2, reset_num_timesteps=False)
    print(f"A model saved by sb3_contrib.TRPO at {before.num_timesteps} steps went on to {model.num_timesteps} here.")


if __name__ == "__main__":
    main()
