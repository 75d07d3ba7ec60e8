"""What a critic and its λ are worth: the true gain of a step at fixed KL, by the estimator of the gradient.

    python examples/benchmarks/step_gain.py                     # Hopper-v5, HalfCheetah-v5; about ten minutes
    python examples/benchmarks/step_gain.py --tasks Walker2d-v5 --timesteps 100_000 --seeds 100 101 102

TRPO is trained for a while. Along its rollouts goes the V of every critic: that of a run with ``critic_kwargs=
{"n_rollouts": M}`` that had taken the same steps, fitted on the same rollouts by its own targets of λ = 0.95. Then
policy and critics are frozen, and rollouts are collected. Of each, every estimator, a critic and a λ, makes advantages,
their gradient g and the step s = x / sqrt(xᵀFx) with x = F⁻¹g, as an update would; all are equally far in KL, by F of
other rollouts.

The gain of a step is g*·s with the gradient g* of the *other* rollouts, E[∇log π (G - V)] with returns G that no λ
shortens, and a V that was solved on further rollouts of the frozen policy: noise and bias of the estimator both count.
It is printed relative to that of M = 1, λ = 0.95, with the standard error by the jackknife over rollouts, which sees
the noise of s, of g*, and of the pairing; seeds are averaged. "Solved" is that last V: what a critic could come to. A
gain of a gives as much as a step of the radius a²δ along the present estimator's.
"""

import argparse
from ast import literal_eval
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from fresh_rollouts import merged
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.core.natural_step import natural_direction
from sb3_trpo_ext.core.parameters import assign, flatten
from sb3_trpo_ext.critic.base import Regression
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonCritic
from sb3_trpo_ext.policy.plain_policy import PlainPolicy
from sb3_trpo_ext.policy.problem import PolicyProblem
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import whole_rollout
from sb3_trpo_ext.rollout.past_rollouts import PastRollout, joined

ROLLOUTS, DECAYS, SOLVED = (1, 2, 4, 8), (0.95, 0.9, 0.8, 0.7), "solved"
SETTINGS: dict[str, Any] = {"n_steps": 512, "target_kl": 0.02, "policy_kwargs": {"log_std_init": -0.5}, "device": "cpu"}
FURTHER = 24
"""Rollouts of the frozen policy that V is solved on."""


class CutOff(BaseCallback):
    """Notes which episodes of a rollout a time limit ended: step, environment, last observation."""

    def _on_rollout_start(self) -> None:
        self.found: list[tuple[int, int, Any]] = []
        self.step = 0

    def _on_step(self) -> bool:
        for index, info in enumerate(self.locals["infos"]):
            if self.locals["dones"][index] and info.get("TimeLimit.truncated"):
                self.found.append((self.step, index, info["terminal_observation"]))
        self.step += 1
        return True


class Values:
    """V of a run with this M and λ, and the rollouts that it has kept.

    Args:
        model: Whose rollouts they are.
        critic: How V is fitted.
        trace_decay: λ.
    """

    def __init__(self, model: "Followed", critic: GaussNewtonCritic, trace_decay: float) -> None:
        self.model, self.critic, self.trace_decay = model, critic, trace_decay
        self.theta = flatten(model.value_parameters).detach().clone()
        self.past: list[PastRollout] = []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the policy have this V, and then again its own."""
        others = flatten(self.model.value_parameters).detach().clone()
        assign(self.model.value_parameters, self.theta)
        yield
        self.theta = flatten(self.model.value_parameters).detach().clone()
        assign(self.model.value_parameters, others)

    def seen(self, rollout: PastRollout, trace_decay: float | None = None) -> Batch:
        """A rollout, with advantages and returns for the policy as it is by this V, which is in place."""
        decay = self.trace_decay if trace_decay is None else trace_decay
        return rollout.seen_by(self.model.policy, discount=self.model.gamma, trace_decay=decay, chunk_size=None)

    @torch.no_grad()
    def own(self, rollout: PastRollout) -> PastRollout:
        """A rollout of now, with what this V expects where a time limit ended an episode, instead of the model's."""
        policy, rewards = self.model.policy, rollout.rewards.copy()
        observations = [policy.obs_to_tensor(observation)[0] for *_, observation in self.model.cut_off.found]
        before = [float(policy.predict_values(each)) for each in observations]
        with self.in_place():
            now = [float(policy.predict_values(each)) for each in observations]
        for (step, env, _), old, new in zip(self.model.cut_off.found, before, now, strict=True):
            rewards[step, env] += self.model.gamma * (new - old)
        return replace(rollout, rewards=rewards)

    def fit(self, newest: Batch) -> None:
        """Fit V, which is in place, to the newest rollout and to those that are kept."""
        batch = joined([newest, *map(self.seen, self.past)])
        actor = frozenset(set(self.model.policy.parameters()) - set(self.model.value_parameters))
        samples = self.model.curvature_samples
        self.critic.fit(Regression(self.model.policy, batch, actor, curvature_samples=samples))


class Followed(TRPO):
    """TRPO, with the V of every estimator beside its own."""

    estimators: dict[Any, Values]

    def follow(self, critic_kwargs: dict[str, Any], own_targets: bool) -> None:
        """Begin, before the first rollout."""
        policy = self.policy
        self.cut_off = CutOff()
        self.value_parameters = [*policy.mlp_extractor.value_net.parameters(), *policy.value_net.parameters()]
        self.estimators = {}
        for rollouts in ROLLOUTS:
            values = None
            for decay in DECAYS:
                if values is None or own_targets:
                    values = Values(self, GaussNewtonCritic(n_rollouts=rollouts, **critic_kwargs), decay)
                self.estimators[rollouts, decay] = values

    def rollout(self) -> PastRollout:
        """What is in the buffer."""
        found = self._trajectories(whole_rollout(self.rollout_buffer, self.action_space))
        assert found is not None
        return found

    def _update(self) -> Any:
        every, rollout, seen = dict.fromkeys(self.estimators.values()), self.rollout(), {}
        for values in every:  # by the policy that made it
            own = values.own(rollout)
            with values.in_place():
                seen[values] = own, values.seen(own)
        outcome = super()._update()
        for values in every:
            own, batch = seen[values]
            with values.in_place():
                values.fit(batch)
            kept = [*values.past, own]
            values.past = kept[max(len(kept) - values.critic.n_rollouts + 1, 0) :]
        return outcome


def solved(model: Followed, rollouts: list[PastRollout]) -> Values:
    """V of the policy as it is, solved on many rollouts."""
    critic = GaussNewtonCritic(cg_steps=20, n_iterations=3, curvature_samples=None, damping=1e-3)
    values = Values(model, critic, DECAYS[0])
    for _ in range(5):  # each time with better returns
        with values.in_place():
            values.fit(joined([values.seen(rollout) for rollout in rollouts]))
    return values


def measure(task: str, seed: int, args: argparse.Namespace) -> tuple[np.ndarray, dict[Any, np.ndarray]]:
    """The reference gradient of every rollout, and every estimator's step, each ``(R, P)``."""
    env = VecNormalize(make_vec_env(task, n_envs=4, seed=seed))
    model = Followed("MlpPolicy", env, seed=seed, **SETTINGS)
    model.follow(args.critic_kwargs, own_targets=args.own_targets)
    model.learn(args.timesteps, callback=model.cut_off)
    env.training = False

    def look(rollouts: int, function: Callable[[PastRollout], None]) -> None:
        """Call a function after every rollout of the frozen policy."""
        model.train = lambda: function(model.rollout())  # type: ignore[method-assign]
        steps_left = rollouts * model.n_steps * model.n_envs
        model.learn(steps_left, callback=model.cut_off, reset_num_timesteps=False)

    further: list[PastRollout] = []
    look(FURTHER, further.append)
    plain, best = PlainPolicy(model.policy), solved(model, further)
    fisher = PolicyProblem(plain, merged([each.batch for each in further[:4]])).fisher(0.0)
    damping = model.cg_damping * model._action_dimensions()
    references: list[Tensor] = []
    steps: dict[Any, list[Tensor]] = {(critic, decay): [] for critic in (*ROLLOUTS, SOLVED) for decay in DECAYS}

    def step(problem: PolicyProblem, seen: Batch) -> Tensor:
        gradient = PolicyProblem(plain, seen.with_normalized_advantages()).gradient
        solving: dict[str, Any] = {"max_steps": model.cg_max_steps, "residual_tol": model.cg_residual_tol}
        x = natural_direction(problem.fisher(damping), problem, gradient, **solving).x
        return x / float(x @ fisher(x)) ** 0.5

    def compare(rollout: PastRollout) -> None:
        problem = PolicyProblem(plain, rollout.batch, curvature_samples=model.curvature_samples)
        for critic, decay in steps:
            values = best if critic == SOLVED else model.estimators[critic, decay]
            own = values.own(rollout)
            with values.in_place():
                steps[critic, decay].append(step(problem, values.seen(own, decay)))
        own = best.own(rollout)
        with best.in_place():
            references.append(PolicyProblem(plain, best.seen(own, 1.0)).gradient)

    look(args.rollouts, compare)
    return as_array(references), {name: as_array(each) for name, each in steps.items()}


def as_array(rows: list[Tensor]) -> np.ndarray:
    """Vectors as rows, in float64."""
    return torch.stack(rows).double().numpy()


def relative_gains(references: np.ndarray, steps: dict[Any, np.ndarray]) -> dict[Any, tuple[float, float]]:
    """Each estimator's gain relative to the present one's, with its standard error by the jackknife."""
    count = len(references)
    products = {name: references @ each.T for name, each in steps.items()}  # of rollout i with the step of rollout j

    def ratios(name: Any) -> list[float]:
        """All pairs of two rollouts, and all but those with one of them."""
        pairs = [product - np.diag(np.diag(product)) for product in (products[name], products[1, DECAYS[0]])]
        without = [each.sum() - each.sum(axis=0) - each.sum(axis=1) for each in pairs]
        return [float(pairs[0].sum() / pairs[1].sum()), *(without[0] / without[1]).tolist()]

    found = {}
    for name in steps:
        value, *left_out = ratios(name)
        found[name] = value, float(np.sqrt((count - 1) * np.var(left_out)))
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["Hopper-v5", "HalfCheetah-v5"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101])
    parser.add_argument("--timesteps", type=int, default=60_000, help="of training before (default: %(default)s)")
    own = "fit V to returns of the λ of the advantages too, as `gae_lambda` does; otherwise to those of 0.95"
    parser.add_argument("--own-targets", action="store_true", help=own)
    parser.add_argument("--critic-kwargs", type=literal_eval, default={}, help="such as \"{'n_iterations': 3}\"")
    parser.add_argument("--rollouts", type=int, default=32, help="of the frozen policy (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for task in args.tasks:
        found = [relative_gains(*measure(task, seed, args)) for seed in args.seeds]
        print(f"\n| {task}: critic | " + " | ".join(f"λ = {decay}" for decay in DECAYS) + " |")
        print("|---" * (len(DECAYS) + 1) + "|", flush=True)
        for critic in (*ROLLOUTS, SOLVED):
            cells = [pooled([each[critic, decay] for each in found]) for decay in DECAYS]
            label = f"solved on {FURTHER} rollouts" if critic == SOLVED else f"`n_rollouts` = {critic}"
            print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def pooled(found: list[tuple[float, float]]) -> str:
    """The mean over seeds, with its standard error."""
    values, errors = np.array(found).T
    return f"{values.mean():.2f} ± {np.sqrt(np.square(errors).sum()) / len(errors):.2f}"


if __name__ == "__main__":
    main()
