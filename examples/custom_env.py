"""Train TRPO on an environment of your own: a point that is to be moved to the origin.

python examples/custom_env.py
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import TRPO


class Point(gym.Env[np.ndarray, np.ndarray]):
    """A point in the plane. An action moves it by at most 0.1 along each axis; each step costs its distance to 0."""

    observation_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start anywhere in the unit square."""
        super().reset(seed=seed)
        self._at = self.np_random.uniform(-1.0, 1.0, 2)
        return self._at.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Move."""
        self._at = np.clip(self._at + 0.1 * np.clip(action, -1.0, 1.0), -2.0, 2.0)
        return self._at.astype(np.float32), -float(np.linalg.norm(self._at)), False, False, {}


def main() -> None:
    """Check the environment, train, and compare what it returns before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=50_000, help="environment steps (default: %(default)s)")
    args = parser.parse_args()

    check_env(Point())
    # TimeLimit truncates an episode and does not terminate it, so that the value of its last state is bootstrapped.
    env, test_env = (make_vec_env(lambda: TimeLimit(Point(), 50), n_envs=4, seed=seed) for seed in (0, 1))
    model = TRPO("MlpPolicy", env, n_steps=512, gamma=0.95, seed=0)
    print("Before training: mean return {:.2f} ± {:.2f}".format(*evaluate_policy(model, test_env, n_eval_episodes=50)))
    model.learn(args.timesteps)
    print("After training:  mean return {:.2f} ± {:.2f}".format(*evaluate_policy(model, test_env, n_eval_episodes=50)))


if __name__ == "__main__":
    main()
