"""What a policy step is worth on fresh rollouts, by how exactly its direction was solved for.

    python examples/benchmarks/surrogate_gain.py        # a quarter of an hour; prints a table for each environment

A policy is trained to several ages and held still there. From each of many rollouts of it a step is computed under
every solver setting (conjugate-gradient steps, relative residual to stop at, samples in the Fisher matrix) and scaled
so that all steps have the same mean KL divergence on fresh rollouts of the same policy. The gain in the surrogate is
then measured on the rollout that the step came from ("in-sample") and on the fresh ones, with standardised advantages.
Gains are given relative to the fresh gain of the reference, 15 steps on all samples, over all ages, with the 95 %
Student-t interval of the paired difference.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.core.conjugate_gradient import conjugate_gradient
from sb3_trpo_ext.core.vectors import assign, flatten
from sb3_trpo_ext.sb3.batch import Batch, consistent_evaluation, whole_rollout
from sb3_trpo_ext.sb3.policy_problem import PolicyProblem

RESULTS = Path(__file__).parent / "results" / "surrogate_gain.json"
ENVIRONMENTS = ("Hopper-v5", "HalfCheetah-v5")
AGES = (20_480, 102_400, 204_800)
ROLLOUTS = 20
FRESH_ROLLOUTS = 12


@dataclass(frozen=True)
class Setting:
    """How the direction is solved for."""

    max_steps: int = 15
    residual_tol: float = 1e-5
    samples: int | None = None

    def __str__(self) -> str:
        tolerance = f", residual {self.residual_tol:g}" if self.residual_tol > 1e-5 else ""
        return f"{self.max_steps} steps{tolerance}, {self.samples or 'all'} samples"


REFERENCE = Setting()
SETTINGS = [
    REFERENCE,
    *(Setting(max_steps=steps) for steps in (1, 2, 3, 5, 8, 10)),
    *(Setting(residual_tol=tol) for tol in (0.3, 0.1, 0.03)),
    *(Setting(samples=samples) for samples in (1024, 512, 256, 128)),
    *(Setting(residual_tol=tol, samples=samples) for tol in (0.3, 0.1, 0.03) for samples in (1024, 512, 256)),
]


def merged(batches: list[Batch]) -> Batch:
    """Several rollouts as one batch."""
    columns = {name: torch.cat([vars(batch)[name] for batch in batches]) for name in vars(batches[0])}
    return Batch(**columns | {"weights": columns["weights"] / len(batches)})


def rollout(model: Any) -> Batch:
    """A rollout of the policy as it stands; a copy, as the buffer is used again."""
    callback = model._init_callback(None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return merged([whole_rollout(model.rollout_buffer, model.action_space)])


def scaled_to_radius(problem: PolicyProblem, params: Any, theta: Tensor, direction: Tensor, radius: float) -> Tensor:
    """The direction scaled until the mean KL divergence on the problem's batch is the radius, by bisection."""
    low, high = 0.0, 1.0

    def divergence(scale: float) -> float:
        assign(params, theta + scale * direction)
        return problem.evaluate().divergence

    while divergence(high) < radius:
        low, high = high, 2 * high
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle) < radius else (low, middle)
    return low * direction


def gains(model: Any, batch: Batch, fresh: PolicyProblem) -> dict[str, tuple[float, float, int]]:
    """For each setting: gain in-sample, gain on fresh rollouts, conjugate-gradient steps taken."""
    problem = PolicyProblem(model.policy, batch)
    gradients = problem.gradients()
    params, g = list(gradients), flatten(list(gradients.values()))
    damping = model.cg_damping * model._action_dimensions()
    solutions = {  # all of them before the parameters move under the graph that they share
        setting: conjugate_gradient(
            problem.fisher(params, damping, setting.samples),
            g,
            max_steps=setting.max_steps,
            residual_tol=setting.residual_tol,
        )
        for setting in sorted(SETTINGS, key=lambda setting: setting.samples is not None)
    }
    theta, found = flatten(params).detach(), {}
    for setting, solution in solutions.items():
        direction = solution.solution / solution.solution.norm()
        assign(params, theta + scaled_to_radius(fresh, params, theta, direction, model.trust_region_radius()))
        in_sample = problem.evaluate().objective - problem.start.objective
        on_fresh = fresh.evaluate().objective - fresh.start.objective
        found[str(setting)] = in_sample, on_fresh, solution.steps
    assign(params, theta)
    return found


def measure(env_id: str, seed: int) -> list[dict[str, Any]]:
    """All gains on one environment."""
    env = VecNormalize(make_vec_env(env_id, n_envs=2, seed=seed))
    model = TRPO("MlpPolicy", env, n_steps=1024, seed=seed, device="cpu")
    records = []
    for age in AGES:
        env.training = True
        model.learn(age - model.num_timesteps, reset_num_timesteps=False)
        env.training = False
        with consistent_evaluation(model.policy):
            fresh_batch = merged([rollout(model) for _ in range(FRESH_ROLLOUTS)]).with_normalized_advantages()
            fresh = PolicyProblem(model.policy, fresh_batch)
            fresh.evaluate()
            for _ in range(ROLLOUTS):
                found = gains(model, rollout(model).with_normalized_advantages(), fresh)
                records.append({"env": env_id, "age": age, "seed": seed, "gains": found})
        print(f"{env_id}, seed {seed}, {age} steps: done", flush=True)
    return records


def report(records: list[dict[str, Any]]) -> None:
    """Print a Markdown table for each environment."""
    for env_id in ENVIRONMENTS:
        rows = [record["gains"] for record in records if record["env"] == env_id]
        reference = np.array([row[str(REFERENCE)][1] for row in rows])
        print(f"\n{env_id}: {len(rows)} rollouts, fresh gain of the reference {reference.mean():.4f}\n")
        print("| solver | steps taken | gain in-sample | gain on fresh rollouts |\n|---|---|---|---|")
        for setting in map(str, SETTINGS):
            inside, outside, steps = np.array([row[setting] for row in rows]).T
            difference = (outside - reference) / reference.mean()
            half_width = stats.t.ppf(0.975, len(rows) - 1) * stats.sem(difference)
            print(
                f"| {setting} | {steps.mean():.1f} | {inside.mean() / reference.mean():.2f} | "
                f"{outside.mean() / reference.mean():.3f} ± {half_width:.3f} |"
            )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--report", action="store_true", help="only print the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.report:
        measured = [record for env_id in ENVIRONMENTS for seed in args.seeds for record in measure(env_id, seed)]
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(measured) + "\n")
    report(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
