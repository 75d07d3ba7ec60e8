"""The noise of the surrogate's gradient: by the actions taken (equation 14) and summed over all (equation 9).

    python examples/benchmarks/gradient_noise.py                      # CartPole-v1, LunarLander-v3; two minutes
    python examples/benchmarks/gradient_noise.py --rollouts 100

TRPO with action values is trained for a while, then policy and critic are frozen and rollouts are collected. Of each,
the gradient g at θ_old is taken with three advantages: the λ-return of the action taken less V(s), Q(s,a) - V(s) of the
action taken, and the same of all actions, weighted by π. The noise is E‖g - ḡ‖² / ‖ḡ‖², by which one rollout misses the
mean over many; ‖ḡ‖² is corrected for what noise adds to it. Advantages are not standardised, and all three see the same
rollouts; the interval is a bootstrap over these. The second and third have the same mean and differ by the noise of the
actions alone; the first has another mean, that of the returns instead of the critic's.
"""

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.env_util import make_vec_env

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.policy.evaluation import consistent_evaluation
from sb3_trpo_ext.policy.problem import PolicyProblem
from sb3_trpo_ext.rollout.action_values import of_taken
from sb3_trpo_ext.rollout.buffers import whole_rollout

TASKS: dict[str, dict[str, Any]] = {"CartPole-v1": {}, "LunarLander-v3": {"gamma": 0.999, "gae_lambda": 0.98}}
ESTIMATORS = ("sampled, λ-returns", "sampled, Q", "expected, Q")
RESAMPLES = 2000


def gradients(model: TRPO) -> list[np.ndarray]:
    """∇L at θ_old of the rollout in the buffer, by each of the `ESTIMATORS`."""
    with consistent_evaluation(model.policy):
        batch = whole_rollout(model.rollout_buffer, model.action_space)
        every = model._with_action_advantages(batch, None, standardize=False)
        assert every.action_advantages is not None
        taken = replace(batch, advantages=of_taken(every.action_advantages, batch.actions))
        return [PolicyProblem(model.policy, seen).gradient.double().numpy() for seen in (batch, taken, every)]


def noise(found: np.ndarray) -> float:
    """E‖g - ḡ‖² / ‖ḡ‖² from gradients ``(R, P)``, each of one rollout."""
    mean = found.mean(axis=0)
    spread = float(np.square(found - mean).sum() / (len(found) - 1))
    return spread / max(float(mean @ mean) - spread / len(found), 1e-300)


def measure(task: str, args: argparse.Namespace) -> list[np.ndarray]:
    """Gradients of many rollouts of one policy, ``(R, P)`` for each estimator."""
    env = make_vec_env(task, n_envs=8, seed=args.seed)
    options = {"critic": "action_value", "n_steps": 256, "seed": args.seed, "device": "cpu", **TASKS[task]}
    model = TRPO("MlpPolicy", env, **options).learn(args.timesteps)
    found: list[list[np.ndarray]] = []
    model.train = lambda: found.append(gradients(model))  # type: ignore[method-assign]
    model.learn(args.rollouts * 8 * 256, reset_num_timesteps=False)
    return [np.stack(each) for each in zip(*found, strict=True)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=tuple(TASKS))
    parser.add_argument("--timesteps", type=int, default=30_000, help="of training before (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=60, help="of the frozen policy (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(args.seed)
    print("| task | " + " | ".join(ESTIMATORS) + " | " + "variance, sampled Q / expected Q |")
    print("|---" * (len(ESTIMATORS) + 2) + "|")
    for task in args.tasks:
        found = measure(task, args)
        draws = [rng.integers(args.rollouts, size=args.rollouts) for _ in range(RESAMPLES)]
        cells = [interval(noise(each), [noise(each[draw]) for draw in draws]) for each in found]
        sampled, expected = (lambda draw, each=each: each[draw].var(axis=0).sum() for each in found[1:])
        every = np.arange(args.rollouts)
        ratios = [sampled(draw) / expected(draw) for draw in draws]
        print(f"| {task} | " + " | ".join([*cells, interval(sampled(every) / expected(every), ratios)]) + " |")


def interval(value: float, resampled: list[float]) -> str:
    """A number with its 95 % bootstrap interval."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return f"{value:.2g} ({low:.2g} to {high:.2g})"


if __name__ == "__main__":
    main()
