"""What a policy step and a critic fit are worth on fresh rollouts, by how exactly they were solved for.

    python examples/benchmarks/fresh_rollouts.py            # half an hour, then the tables
    python examples/benchmarks/fresh_rollouts.py --report   # the tables of what was measured

One row a rollout is written to ``results/fresh_rollouts.csv.gz``: environment, age and seed of the model, and, as JSON,
what every setting of the policy step gained and what every setting of the critic left.

A model is trained to several ages and held still there. Many rollouts are collected from it, and more fresh ones.

Policy: from each rollout a step is computed under every solver setting (conjugate-gradient steps, relative residual to
stop at, samples in the Fisher matrix) and scaled so that all steps have the same mean KL divergence on the fresh
rollouts. The gain in the surrogate is measured on the rollout that the step came from ("in-sample") and on the fresh
ones, with standardised advantages. Reference: 15 steps on all samples.

Critic: on each rollout the Gauss-Newton critic is fitted under every setting. The squared error that is left is
measured on that rollout and on the fresh ones, relative to the error before the fit. Reference: all samples.

Both are paired with their reference, over all ages, with the 95 % Student-t interval of the difference.
"""

import argparse
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jobs import RESULTS
from scipy import stats
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.core.natural_step import natural_direction
from sb3_trpo_ext.core.parameters import assign, flatten
from sb3_trpo_ext.critic.base import Regression
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonCritic
from sb3_trpo_ext.policy.evaluation import consistent_evaluation
from sb3_trpo_ext.policy.problem import Comparison, PolicyProblem
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import whole_rollout

TABLE = RESULTS / "fresh_rollouts.csv.gz"
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


VALUE_REFERENCE: dict[str, Any] = {"cg_steps": 10, "n_steps": 1, "curvature_samples": None, "damping": 0.01}
VALUE_CHANGES: list[dict[str, Any]] = [
    {},
    *({"cg_steps": steps} for steps in (3, 5, 8, 15)),
    *({"damping": damping} for damping in (0.001, 0.03, 0.1)),
    *({"n_steps": steps} for steps in (2, 3)),
    *(
        {"curvature_samples": samples, "cg_steps": steps, "damping": damping}
        for samples in (1024, 512)
        for steps in (5, 8, 10)
        for damping in (0.01, 0.03, 0.1)
    ),
]
VALUE_SETTINGS = [VALUE_REFERENCE | change for change in VALUE_CHANGES]


def value_name(setting: dict[str, Any]) -> str:
    """A setting of the critic in words."""
    samples = setting["curvature_samples"] or "all"
    return f"{setting['n_steps']} x {setting['cg_steps']} steps, {samples} samples, damping {setting['damping']:g}"


def merged(batches: list[Batch]) -> Batch:
    """Several rollouts as one batch, a copy."""
    joined = Batch.joined(batches)
    return replace(joined, **{**joined.rows(torch.clone), "weights": joined.weights / len(batches)})


def rollout(model: Any) -> Batch:
    """A rollout of the policy as it stands; a copy, as the buffer is used again."""
    callback = model._init_callback(None)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return merged([whole_rollout(model.rollout_buffer, model.action_space)])


def scaled_to_radius(problem: Comparison, params: Any, theta: Tensor, direction: Tensor, radius: float) -> Tensor:
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


def gains(model: Any, batch: Batch, fresh: Comparison) -> dict[str, tuple[float, float, int]]:
    """For each setting: gain in-sample, gain on fresh rollouts, conjugate-gradient steps taken."""
    problem = PolicyProblem(model.policy, batch)
    params, theta = problem.params, problem.theta_old
    damping = model.cg_damping * model._action_dimensions()
    solutions = {  # all of them before the parameters move under the graph that they share
        setting: natural_direction(
            PolicyProblem(model.policy, batch, curvature_samples=setting.samples).fisher(damping),
            problem,
            max_steps=setting.max_steps,
            residual_tol=setting.residual_tol,
        )
        for setting in sorted(SETTINGS, key=lambda setting: setting.samples is not None)
    }
    found = {}
    for setting, solution in solutions.items():
        direction = solution.x / solution.x.norm()
        assign(params, theta + scaled_to_radius(fresh, params, theta, direction, model.trust_region_radius()))
        in_sample = problem.evaluate().objective - problem.start.objective
        on_fresh = fresh.evaluate().objective - fresh.start.objective
        found[str(setting)] = in_sample, on_fresh, solution.cg.steps
    assign(params, theta)
    return found


def fits(model: Any, batch: Batch, fresh: Batch) -> dict[str, tuple[float, float]]:
    """For each setting of the critic: error left on the rollout, and on fresh ones, relative to before the fit."""
    actor = frozenset(PolicyProblem(model.policy, batch).gradients)
    params = [param for param in model.policy.parameters() if param not in actor]
    theta, found = flatten(params).detach().clone(), {}

    def errors() -> tuple[float, float]:
        with torch.no_grad():
            inside, outside = (
                float((model.policy.predict_values(part.inputs).flatten() - part.returns).square().mean())
                for part in (batch, fresh)
            )
        return inside, outside

    before = errors()
    for setting in VALUE_SETTINGS:
        GaussNewtonCritic(**setting).fit(Regression(model.policy, batch, actor))
        after = errors()
        found[value_name(setting)] = after[0] / before[0], after[1] / before[1]
        assign(params, theta)
    return found


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Five significant digits are enough for the file."""
    return {name: [float(f"{value:.5g}") for value in values] for name, values in found.items()}


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
            fresh = Comparison(model.policy, fresh_batch)
            for _ in range(ROLLOUTS):
                batch = rollout(model).with_normalized_advantages()
                record: dict[str, Any] = {"env": env_id, "age": age, "seed": seed}
                record["gains"] = json.dumps(rounded(gains(model, batch, fresh)))
                record["fits"] = json.dumps(rounded(fits(model, batch, fresh_batch)))
                records.append(record)
        print(f"{env_id}, seed {seed}, {age} steps: done", flush=True)
    return records


def difference(values: np.ndarray, reference: np.ndarray) -> str:
    """The mean relative to the reference's, with the interval of the paired difference."""
    paired = (values - reference) / reference.mean()
    half_width = stats.t.ppf(0.975, len(paired) - 1) * stats.sem(paired)
    return f"{values.mean() / reference.mean():.3f} ± {half_width:.3f}"


def report(records: list[dict[str, Any]]) -> None:
    """Print two Markdown tables for each environment."""
    for env_id in ENVIRONMENTS:
        rows = [record for record in records if record["env"] == env_id]
        reference = np.array([row["gains"][str(REFERENCE)][1] for row in rows])
        print(f"\n{env_id}: {len(rows)} rollouts, fresh gain of the reference {reference.mean():.4f}\n")
        print("| solver | steps taken | gain in-sample | gain on fresh rollouts |\n|---|---|---|---|")
        for name in map(str, SETTINGS):
            inside, outside, steps = np.array([row["gains"][name] for row in rows]).T
            print(
                f"| {name} | {steps.mean():.1f} | {inside.mean() / reference.mean():.2f} | "
                f"{difference(outside, reference)} |"
            )
        inside, reference = np.array([row["fits"][value_name(VALUE_REFERENCE)] for row in rows]).T
        left = f"{inside.mean():.3f} of the error in-sample, {reference.mean():.3f} on fresh rollouts"
        print(f"\nThe reference leaves {left}.\n")
        print("| critic | error in-sample | error on fresh rollouts |\n|---|---|---|")
        for name in map(value_name, VALUE_SETTINGS):
            inside, outside = np.array([row["fits"][name] for row in rows]).T
            print(f"| {name} | {inside.mean() / reference.mean():.3f} | {difference(outside, reference)} |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--report", action="store_true", help="only print the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.report:
        measured = [record for env_id in ENVIRONMENTS for seed in args.seeds for record in measure(env_id, seed)]
        RESULTS.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(measured).to_csv(TABLE, index=False, compression={"method": "gzip", "mtime": 0})
    report(pd.read_csv(TABLE, converters={"gains": json.loads, "fits": json.loads}).to_dict("records"))


if __name__ == "__main__":
    main()
