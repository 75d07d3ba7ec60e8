"""What an update takes at its peak, each in a process of its own, beside SB3's PPO."""

import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import resource, sys
import gymnasium as gym
import torch
from stable_baselines3 import PPO
from sb3_trpo_ext import PPOClip

class Environment(gym.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}
    def step(self, action):
        return self.observation_space.sample(), float(action % 7), self.np_random.random() < 0.05, False, {}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.set_num_threads(1)
algorithm, observations, actions, options = sys.argv[1:]
space = gym.spaces.Discrete(int(observations)) if observations != "box" else gym.spaces.Box(-1, 1, (8,))
options = {**eval(options), **({"fast_rollouts": False} if algorithm == "PPOClip" else {})}
model = {"PPO": PPO, "PPOClip": PPOClip}[algorithm](
    "MlpPolicy", Environment(space, gym.spaces.Discrete(int(actions))), n_epochs=1, device="cpu", seed=0, **options
)
before = peak()
model.learn(2 * model.n_steps)
print((peak() - before) / 1024, sum(param.nbytes for param in model.policy.parameters()) / 2**20)
"""


def peaks(*arguments: str) -> list[list[float]]:
    """MiB by which two iterations of PPO and PPOClip raise the peak of a process each, and those of the parameters."""
    commands = [[sys.executable, "-c", PROGRAM, algorithm, *arguments] for algorithm in ("PPO", "PPOClip")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [process.communicate()[0] for process in processes]
    return [[float(number) for number in output.splitlines()[-1].split()] for output in outputs]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
@pytest.mark.parametrize(
    ("observations", "actions", "options"),
    [("box", 4672, {"n_steps": 1024}), (20_000, 4, {"n_steps": 512})],
    ids=["4672 actions", "one-hot of 20 000"],
)
def test_ppo_clip_takes_little_more_than_ppo(observations: Any, actions: int, options: dict[str, Any]) -> None:
    (theirs, _), (ours, parameters) = peaks(str(observations), str(actions), repr(options))
    copies = 4 * parameters  # of parameters, gradients and both moments, so that an update can be undone
    print(f"PPO {theirs:.0f} MiB, PPOClip {ours:.0f} MiB, of which copies {copies:.0f} MiB")
    assert ours < 1.5 * theirs + copies
