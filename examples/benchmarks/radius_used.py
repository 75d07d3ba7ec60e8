"""Measure how much of the trust region a step of TRPO uses, against the number of actions and of action dimensions.

    python examples/benchmarks/radius_used.py    # a few minutes; prints two tables and draws results/radius_used.png

Damping shortens the step to the boundary ½ sᵀ(F + λI)s = δ: it uses the share xᵀFx / xᵀ(F + λI)x of δ. With K actions
the entries of F are about 1/K, so a fixed λ takes all; over a Box of A dimensions λ = cg_damping · A does. Measured is
the KL divergence that the first update reaches, from a policy as it is initialised, divided by δ.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import torch
from gymnasium import spaces

from sb3_trpo_ext import TRPO

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ACTIONS = (2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
DIMENSIONS = (1, 2, 3, 6, 10, 17, 30, 50)
SEEDS = range(3)
RULES: dict[str, dict[str, Any]] = {
    "min_radius_used=0 (as sb3-contrib)": {"min_radius_used": 0.0},
    "min_radius_used=0.6": {"min_radius_used": 0.6},
    "min_radius_used=1": {"min_radius_used": 1.0},
}
Curve = dict[int, list[float]]


class Target(gym.Env):
    """Random observations; the reward is how near an action comes to what the observation asks for."""

    observation_space = spaces.Box(-1, 1, (8,))

    def __init__(self, action_space: spaces.Space) -> None:
        self.action_space = action_space
        self._observation = np.zeros(8, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode of one step."""
        super().reset(seed=seed)
        self._observation = self.np_random.uniform(-1, 1, 8).astype(np.float32)
        return self._observation, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """End it."""
        if isinstance(self.action_space, spaces.Discrete):
            action = 2.0 * float(action) / (self.action_space.n - 1) - 1.0
        reward = -float(np.square(action - self._observation[0]).mean())
        return self.reset()[0], reward, True, False, {}


def radius_used(action_space: spaces.Space, seed: int, **options: Any) -> float:
    """KL divergence of the first update over δ."""
    model = TRPO("MlpPolicy", Target(action_space), n_steps=1024, seed=seed, device="cpu", **options).learn(1024)
    log = model.logger.name_to_value
    return float(log["train/kl_divergence_loss"] / log["train/target_kl"])


def measured(space_of: Any, sizes: Sequence[int], options: dict[str, Any]) -> Curve:
    """For each size, the share of each seed."""
    return {size: [radius_used(space_of(size), seed, **options) for seed in SEEDS] for size in sizes}


def print_table(name: str, curves: dict[str, Curve]) -> None:
    """A Markdown table of means over seeds."""
    sizes = list(next(iter(curves.values())))
    print(f"| {name} | " + " | ".join(map(str, sizes)) + " |")
    print("|---" * (len(sizes) + 1) + "|")
    for rule, curve in curves.items():
        print(f"| {rule} | " + " | ".join(f"{np.mean(curve[size]):.2f}" for size in sizes) + " |")
    print()


def draw(path: Path, panels: dict[str, dict[str, Curve]]) -> None:
    """One panel a kind of space: the mean over seeds, and each of them."""
    figure, grid = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.2), sharey=True, layout="constrained")
    for axes, (name, curves) in zip(grid, panels.items(), strict=True):
        for (rule, curve), colour, marker in zip(curves.items(), ("C3", "C0", "C2"), "osD", strict=True):
            means = [np.mean(shares) for shares in curve.values()]
            axes.plot(list(curve), means, color=colour, marker=marker, markersize=4, label=rule)
            for size, shares in curve.items():
                axes.plot([size] * len(shares), shares, ".", color=colour, alpha=0.3)
        axes.axhline(0.5, color="grey", linestyle=":", label="half of δ")
        axes.set(xscale="log", xlabel=name, ylim=(0, 1.05))
        axes.set_xticks(list(next(iter(curves.values()))), minor=False)
        axes.set_xticklabels([str(size) for size in next(iter(curves.values()))], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("KL divergence reached / δ")
    grid[1].legend(loc="lower left")
    figure.suptitle(f"Radius used by the first step of TRPO, cg_damping = 0.1: {len(SEEDS)} seeds and their mean")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "results", help="where to draw")
    figures = parser.parse_args().figures
    torch.set_num_threads(1)
    panels = {
        "actions K of a Discrete space": {
            rule: measured(lambda size: spaces.Discrete(size), ACTIONS, options) for rule, options in RULES.items()
        },
        "dimensions A of a Box": {
            rule: measured(lambda size: spaces.Box(-1, 1, (size,)), DIMENSIONS, options)
            for rule, options in RULES.items()
        },
    }
    for name, curves in panels.items():
        print_table(name, curves)
    draw(figures / "radius_used.png", panels)


if __name__ == "__main__":
    main()
