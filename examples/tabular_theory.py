"""The theory of TRPO on Markov decision processes small enough to be solved exactly.

    python examples/tabular_theory.py                     # half a minute; draws tabular_theory.png

On random finite MDPs with softmax policies every expectation is a finite sum, so what Schulman et al. (2015,
https://arxiv.org/abs/1502.05477; "the paper") prove can be checked to the last digits of float64:

1. the performance-difference identity J(π') = J(π) + Σ_s d_π'(s) Σ_a π'(a|s) A_π(s,a);
2. L_π, which puts d_π in the place of d_π', matches J in value and gradient;
3. the lower bound J(π') >= L_π(π') - C · D_KL^max(π, π') with C = 4εγ/(1-γ)²;
4. Algorithm 1, which maximises that bound, improves at every step, and how short its steps are;
5. TRPO's own update (this package's core, fed with sums instead of samples) beside Algorithm 1 and the policy gradient.

J is the paper's η, d_π its unnormalised visitation frequency ρ_π. Nothing is sampled.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from scipy.optimize import brentq
from torch import Tensor

from sb3_trpo_ext.core.curvature import GaussNewtonProduct, Jacobian, Linearization, Metric
from sb3_trpo_ext.core.natural_step import Acceptance, TrustRegion, backtrack, boundary_scale, natural_direction
from sb3_trpo_ext.core.objectives import importance_sampled_surrogate, theoretical_penalty
from sb3_trpo_ext.core.parameters import flatten

GAMMAS = (0.5, 0.8, 0.9, 0.95, 0.99)
RADIUS = 0.01
STEP_SIZES = (1, 10)


@dataclass(frozen=True)
class MDP:
    """A finite Markov decision process.

    Attributes:
        transitions: P(s'|s,a), shape ``(S, A, S)``.
        rewards: r(s,a), shape ``(S, A)``.
        start: μ(s), the distribution of the first state, shape ``(S,)``.
        gamma: γ in (0, 1).
    """

    transitions: Tensor
    rewards: Tensor
    start: Tensor
    gamma: float


@dataclass(frozen=True)
class Solved:
    """A policy with all that there is to know of it.

    Attributes:
        log_policy: log π(a|s), shape ``(S, A)``; also the policy's logits.
        performance: J(π) = E[Σ_t γ^t r_t].
        visits: d_π(s) = Σ_t γ^t P(s_t = s), shape ``(S,)``; sums to 1/(1-γ).
        advantages: A_π(s,a), shape ``(S, A)``.
        gamma: γ.
    """

    log_policy: Tensor
    performance: Tensor
    visits: Tensor
    advantages: Tensor
    gamma: float

    @property
    def penalty(self) -> float:
        """C = 4εγ/(1-γ)² with ε = max |A_π(s,a)|."""
        return theoretical_penalty(self.gamma, float(self.advantages.abs().max()))


Update = Callable[[Solved], Tensor]
"""From a policy to the logits ``(S, A)`` of the next."""


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_mdp(seed: int, states: int, actions: int, gamma: float) -> MDP:
    """A random MDP; the seed decides all but γ.

    Logits of standard deviation 3 give a state and an action few likely successors. With many, all actions would lead
    to much the same future.
    """
    generator = torch.Generator().manual_seed(seed)
    transitions = (3 * normal(generator, states, actions, states)).softmax(-1)
    return MDP(transitions, normal(generator, states, actions), normal(generator, states).softmax(-1), gamma)


def solve(mdp: MDP, logits: Tensor) -> Solved:
    """Evaluate the policy softmax(logits) by two linear systems, differentiably: (I - γP_π) V = r_π and its adjoint."""
    log_policy = logits.log_softmax(1)
    policy = log_policy.exp()
    flow = torch.eye(len(policy), dtype=policy.dtype) - mdp.gamma * torch.einsum("sa,sat->st", policy, mdp.transitions)
    values = torch.linalg.solve(flow, (policy * mdp.rewards).sum(1))
    visits = torch.linalg.solve(flow.T, mdp.start)
    advantages = mdp.rewards + mdp.gamma * mdp.transitions @ values - values.unsqueeze(1)
    return Solved(log_policy, mdp.start @ values, visits, advantages, mdp.gamma)


def uniform(mdp: MDP) -> Solved:
    """The policy that all learning starts from."""
    return solve(mdp, torch.zeros_like(mdp.rewards))


def best_performance(mdp: MDP) -> float:
    """J* by policy iteration. A logit of 1000 makes the softmax deterministic in float64."""
    solved = uniform(mdp)
    while solved.advantages.max() > 1e-9:
        greedy = torch.nn.functional.one_hot(solved.advantages.argmax(1), mdp.rewards.shape[1])
        solved = solve(mdp, 1000 * greedy.double())
    return float(solved.performance)


def performance_difference(old: Solved, new: Solved) -> Tensor:
    """J(π') - J(π) = Σ_s d_π'(s) Σ_a π'(a|s) A_π(s,a) (the paper's equation 1, after Kakade and Langford, 2002)."""
    return (new.visits.unsqueeze(1) * new.log_policy.exp() * old.advantages).sum()


def surrogate(old: Solved, logits: Tensor) -> Tensor:
    """L_π(π') = J(π) + Σ_s d_π(s) Σ_a π'(a|s) A_π(s,a) (the paper's equation 3)."""
    return old.performance + (old.visits.unsqueeze(1) * logits.softmax(1) * old.advantages).sum()


def kl(old: Solved, logits: Tensor) -> Tensor:
    """KL(π(·|s)‖π'(·|s)) of every state, shape ``(S,)``."""
    return (old.log_policy.exp() * (old.log_policy - logits.log_softmax(1))).sum(1)


def lower_bound(old: Solved, logits: Tensor) -> Tensor:
    """L_π(π') - C · D_KL^max(π, π') <= J(π') (the paper's theorem 1, as in equation 9)."""
    return surrogate(old, logits) - old.penalty * kl(old, logits).max()


def policy_gradient(old: Solved) -> Tensor:
    """∇J = ∇L_π at π in the logits: d_π(s) π(a|s) A_π(s,a)."""
    return old.visits.unsqueeze(1) * old.log_policy.exp() * old.advantages


def policy_gradient_step(old: Solved, step_size: float) -> Tensor:
    """Plain gradient ascent on J."""
    return old.log_policy + step_size * policy_gradient(old)


def largest_divergence(gamma: float) -> float:
    """(1-γ)²/(8γ²), which the step of Algorithm 1 exceeds in no MDP, for any policy.

    As E_π[A] = 0, Pinsker's inequality bounds the gain of L by 2ε·TV/(1-γ) <= ε·sqrt(2α)/(1-γ) for D_KL^max = α, and
    the maximiser's penalty Cα by that gain.
    """
    return (1 - gamma) ** 2 / (8 * gamma**2)


def best_within(old: Solved, divergence: float) -> tuple[Tensor, float]:
    """Maximise L_π subject to D_KL^max(π, π') <= α.

    L is a sum over states, so each state has a problem of its own: maximise Σ_a π'(a) A(a) - λ KL(π‖π'). Its solution
    is π'(a) ∝ π(a) / (1 - tA(a)) with 0 < t < 1/max A. KL(π‖π') grows with t, which bisection finds.

    Args:
        old: π.
        divergence: α > 0.

    Returns:
        The logits of π', and dL/dα = Σ_s d_π(s) λ(s): what a little more divergence would gain.
    """
    policy = old.log_policy.exp()
    # In units of the state's largest advantage t is below 1. The floor is for states where nothing is left to gain.
    unit = old.advantages.max(1, keepdim=True).values.clamp(min=1e-12)
    relative = old.advantages / unit

    def tilt(log_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log(1 - tA), log Σ_a π(a) / (1 - tA(a)), and KL(π‖π')."""
        gain = log_t.exp().unsqueeze(1) * relative
        log_denominator = torch.log1p(-gain)
        # Σ π/(1 - tA) - 1, written so that it keeps its digits where t is small.
        log_sum = torch.log1p((policy * gain / (1 - gain)).sum(1))
        return log_denominator, log_sum, (policy * log_denominator).sum(1) + log_sum

    low, high = torch.full_like(old.visits, -40.0), torch.zeros_like(old.visits)
    for _ in range(50):
        log_t = (low + high) / 2
        inside = tilt(log_t)[2] <= divergence
        low, high = torch.where(inside, log_t, low), torch.where(inside, high, log_t)
    log_denominator, log_sum, _ = tilt(low)
    multipliers = unit.squeeze(1) / (low + log_sum).exp()
    return old.log_policy - log_denominator, float(old.visits @ multipliers)


def algorithm_1_step(old: Solved) -> Tensor:
    """Maximise L_π(π') - C · D_KL^max(π, π') over all policies (the paper's Algorithm 1), to machine precision.

    The best L within D_KL^max <= α is concave in α; the maximum of the bound is where its slope is C.
    """

    def excess(log_divergence: float) -> float:
        return math.log(best_within(old, math.exp(log_divergence))[1] / old.penalty)

    high = math.log(largest_divergence(old.gamma))
    low = high - 40
    if excess(low) <= 0:  # a step too short for float64: π is optimal
        return old.log_policy
    return best_within(old, math.exp(brentq(excess, low, high, xtol=1e-9)))[0]


@dataclass(frozen=True)
class Evaluation:
    """A policy compared with π, with exact expectations.

    Attributes:
        objective: E[π'(a|s)/π(a|s) · A].
        divergence: E[KL(π(·|s)‖π'(·|s))].
    """

    objective: float
    divergence: float


class Problem:
    """TRPO's problem around π, for this package's core: every state and action is a sample of its exact frequency.

    Args:
        old: π.

    Attributes:
        theta: The logits.
        params: They alone.
        theta_old: Those of π, ``(S·A,)``.
        gradient: That of the objective at π, ``(S·A,)``.
        start: The evaluation of π.
    """

    def __init__(self, old: Solved) -> None:
        self._old = old
        self._weights = old.visits / old.visits.sum()
        self._frequencies = self._weights.unsqueeze(1) * old.log_policy.exp()
        self.theta = old.log_policy.clone().requires_grad_()
        self.params = [self.theta]
        self.theta_old = flatten([old.log_policy])
        self.gradient = flatten(torch.autograd.grad(self._objective(), self.theta))
        self.start = self.evaluate()

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Evaluate the logits as they are now."""
        return Evaluation(float(self._objective()), float(self._weights @ kl(self._old, self.theta)))

    def fisher(self, damping: float) -> GaussNewtonProduct:
        """Products with E[∇log π ∇log πᵀ] + λI, whose first part is a Gauss-Newton matrix in log π."""

        def log_probabilities() -> tuple[Jacobian, Metric]:
            return Linearization(self.theta.log_softmax(1), self.params), lambda v: self._frequencies * v

        return GaussNewtonProduct([log_probabilities], damping)

    def _objective(self) -> Tensor:
        ratio = (self.theta.log_softmax(1) - self._old.log_policy).exp()
        return (self._frequencies * importance_sampled_surrogate(ratio, self._old.advantages)).sum()


def trpo_step(old: Solved, radius: float = RADIUS, damping: float = 1e-8) -> Tensor:
    """TRPO's update by this package's core.

    In a tabular softmax F⁻¹∇L is the advantage function, up to scale and a constant in each state: the step is
    π'(a) ∝ π(a) · exp(tA(a)) with one t for all states, where Algorithm 1 has π(a) / (1 - tA(a)).

    Args:
        old: π.
        radius: δ, the bound on the mean KL divergence.
        damping: λ. The Fisher matrix is singular, as a softmax does not notice a constant added to a state's logits.
    """
    problem = Problem(old)
    steps = len(problem.gradient)
    direction = natural_direction(problem.fisher(damping), problem, max_steps=steps, residual_tol=1e-8)
    if direction.is_usable:
        size = boundary_scale(direction.curvature, radius)
        test = Acceptance(TrustRegion(radius), problem.start, size * direction.slope)
        backtrack(problem, direction, size, test.rejection)
    return problem.theta.detach()


UPDATES: dict[str, Update] = {
    "Algorithm 1": algorithm_1_step,
    "TRPO": trpo_step,
    **{f"gradient, step {size}": partial(policy_gradient_step, step_size=size) for size in STEP_SIZES},
}


def learn(mdp: MDP, update: Update, iterations: int) -> list[float]:
    """J before each of some updates and after the last, from the uniform policy."""
    solved = uniform(mdp)
    performances = [float(solved.performance)]
    for _ in range(iterations):
        solved = solve(mdp, update(solved))
        performances.append(float(solved.performance))
    return performances


@dataclass(frozen=True)
class Checks:
    """What the identities and the bound came to, worst over random MDPs, policies, directions and step lengths.

    Attributes:
        identity: Largest error of the performance-difference identity.
        first_order: Largest difference between L_π and J at π, and between components of their gradients.
        slack: Smallest J(π') minus its lower bound.
        tightness: Largest (L_π(π') - J(π')) / (C · D_KL^max): the part of the penalty that was needed.
    """

    identity: float
    first_order: float
    slack: float
    tightness: float


def gradient_of(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """∇ of a function of the logits, by automatic differentiation."""
    theta = logits.clone().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def check(mdp: MDP, generator: torch.Generator) -> Checks:
    """Check one random policy of an MDP along one random direction, at steps from 0.001 to 10."""
    logits, direction = normal(generator, *mdp.rewards.shape), normal(generator, *mdp.rewards.shape)
    old = solve(mdp, logits)
    gradients = [gradient_of(f, logits) for f in (lambda t: solve(mdp, t).performance, partial(surrogate, old))]
    first_order = max(
        float((surrogate(old, logits) - old.performance).abs()), float((gradients[0] - gradients[1]).abs().max())
    )
    identity, slack, tightness = 0.0, math.inf, -math.inf
    for length in np.geomspace(1e-3, 10, 9):
        new = solve(mdp, logits + length * direction)
        change = new.performance - old.performance
        identity = max(identity, float((change - performance_difference(old, new)).abs()))
        slack = min(slack, float(new.performance - lower_bound(old, new.log_policy)))
        needed = surrogate(old, new.log_policy) - new.performance
        tightness = max(tightness, float(needed / (old.penalty * kl(old, new.log_policy).max())))
    return Checks(identity, first_order, slack, tightness)


def worst(checks: list[Checks]) -> Checks:
    """The worst of several."""
    return Checks(
        max(c.identity for c in checks),
        max(c.first_order for c in checks),
        min(c.slack for c in checks),
        max(c.tightness for c in checks),
    )


def first_steps(mdp: MDP) -> dict[str, float]:
    """Mean KL divergence of the first step of Algorithm 1 and of TRPO from the uniform policy."""
    old = uniform(mdp)
    weights = old.visits / old.visits.sum()
    return {name: float(weights @ kl(old, UPDATES[name](old))) for name in ("Algorithm 1", "TRPO")}


@dataclass(frozen=True)
class Row:
    """All that is measured at one γ.

    Attributes:
        mdp: The MDP of the seed; the checks are over many.
        checks: Identities and bound.
        penalty: C at the uniform policy.
        divergences: KL of the first steps of Algorithm 1 and TRPO.
        curves: For every method, the part of the way from J of the uniform policy to J*, by updates.
        smallest_change: For every method, the smallest change of J in one update.
    """

    mdp: MDP
    checks: Checks
    penalty: float
    divergences: dict[str, float]
    curves: dict[str, list[float]]
    smallest_change: dict[str, float]


def measure(gamma: float, args: argparse.Namespace) -> Row:
    """Everything at one γ."""
    mdps = [random_mdp(args.seed + index, args.states, args.actions, gamma) for index in range(args.mdps)]
    generator = torch.Generator().manual_seed(args.seed)
    mdp = mdps[0]
    performances = {name: learn(mdp, update, args.iterations) for name, update in UPDATES.items()}
    best = best_performance(mdp)
    return Row(
        mdp,
        worst([check(each, generator) for each in mdps]),
        uniform(mdp).penalty,
        first_steps(mdp),
        {name: [(j - js[0]) / (best - js[0]) for j in js] for name, js in performances.items()},
        {name: min(after - before for before, after in pairwise(js)) for name, js in performances.items()},
    )


def updates_to(curve: list[float], level: float) -> str:
    """After how many updates a curve reaches a level."""
    return next((str(index) for index, value in enumerate(curve) if value >= level), f"> {len(curve) - 1}")


def along_a_random_direction(mdp: MDP, lengths: np.ndarray) -> tuple[Solved, np.ndarray, np.ndarray, np.ndarray]:
    """The uniform policy, and J, L and D_KL^max on a line through it."""
    direction = normal(torch.Generator().manual_seed(5), *mdp.rewards.shape)
    old = uniform(mdp)
    points = [length * direction for length in lengths]
    rows = [(solve(mdp, point).performance, surrogate(old, point), kl(old, point).max()) for point in points]
    performance, surrogates, divergence = np.array(rows).T
    return old, performance, surrogates, divergence


def draw_bound(axes: Axes, mdp: MDP) -> None:
    """J, L and the lower bound, which falls out of the picture."""
    lengths = np.linspace(-2, 2, 401)
    old, performance, surrogates, divergence = along_a_random_direction(mdp, lengths)
    axes.plot(lengths, performance, label="$J$")
    axes.plot(lengths, surrogates, "--", label="$L_π$")
    axes.plot(lengths, surrogates - old.penalty * divergence, label="$L_π - C\\,D_{KL}^{max}$")
    axes.plot(lengths, surrogates - old.penalty / 100 * divergence, ":", label="the same with $C/100$")
    low, high = performance.min(), performance.max()
    axes.set(ylim=(low - 0.7 * (high - low), high + 0.2 * (high - low)))
    axes.set(title=f"Lower bound, γ = {mdp.gamma}", xlabel="step along a random direction", ylabel="return")


def draw_first_order(axes: Axes, mdps: list[MDP]) -> None:
    """|J - L| against the length of the step."""
    lengths = np.geomspace(1e-3, 1, 31)
    for mdp in mdps:
        _, performance, surrogates, _ = along_a_random_direction(mdp, lengths)
        axes.loglog(lengths, abs(performance - surrogates), label=f"γ = {mdp.gamma}")
    axes.loglog(lengths, 10 * lengths**2, "k:", label="slope 2")
    axes.set(title="$L_π$ matches $J$ to first order", xlabel="step along a random direction", ylabel="$|J - L_π|$")


def draw_learning(axes: Axes, rows: list[Row]) -> None:
    """The part of the way to J* by updates, of every method, at the smallest and the largest γ."""
    for row, style in ((rows[0], "-"), (rows[-1], "--")):
        for index, (name, curve) in enumerate(row.curves.items()):
            label = name if style == "-" else None
            axes.semilogx(range(1, len(curve)), curve[1:], style, color=f"C{index}", label=label)
    title = f"From the uniform policy; solid: γ = {rows[0].mdp.gamma}, dashed: γ = {rows[-1].mdp.gamma}"
    axes.set(title=title, xlabel="updates", ylabel="part of the way to $J^*$")


def draw_step_lengths(axes: Axes, args: argparse.Namespace) -> None:
    """The length sqrt(2 KL) of the first steps against the horizon 1/(1-γ), over several MDPs."""
    horizons = np.geomspace(2, 1000, 10)
    seeds = range(args.seed, args.seed + 5)
    gammas = [float(1 - 1 / horizon) for horizon in horizons]
    ceiling = [math.sqrt(2 * largest_divergence(gamma)) for gamma in gammas]
    steps = [[first_steps(random_mdp(seed, args.states, args.actions, gamma)) for seed in seeds] for gamma in gammas]
    axes.loglog(horizons, ceiling, "k:", label="ceiling of Algorithm 1, (1-γ)/2γ")
    for name in ("Algorithm 1", "TRPO"):
        lengths = np.sqrt([[2 * step[name] for step in at_gamma] for at_gamma in steps])
        axes.loglog(horizons, np.median(lengths, axis=1), "o-", label=name)
        axes.fill_between(horizons, lengths.min(axis=1), lengths.max(axis=1), alpha=0.2)
    axes.set(title="First step", xlabel="horizon 1/(1-γ)", ylabel="length sqrt(2 KL)")


def draw(rows: list[Row], args: argparse.Namespace) -> None:
    """Draw the four panels."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    draw_bound(axes[0, 0], rows[1].mdp)
    draw_first_order(axes[0, 1], [row.mdp for row in rows])
    draw_learning(axes[1, 0], rows)
    draw_step_lengths(axes[1, 1], args)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(args.figure, dpi=120)


def report(rows: list[Row], args: argparse.Namespace) -> None:
    """Print what was found, and a Markdown table of it by γ."""
    checks = worst([row.checks for row in rows])
    changes = {name: min(row.smallest_change[name] for row in rows) for name in UPDATES}
    print(f"{args.mdps} random MDPs of {args.states} states and {args.actions} actions at each γ, worst case:")
    print(f"  performance-difference identity: error {checks.identity:.1e}")
    print(f"  L and J at π, value and gradient: difference {checks.first_order:.1e}")
    print(f"  lower bound: slack {checks.slack:.1e}, {100 * checks.tightness:.2g} % of the penalty needed")
    print(f"Smallest change of J in any of {args.iterations} updates at any γ (rounding alone makes some 1e-12):")
    for name, change in changes.items():
        print(f"  {name}: {change:+.1e}")
    print(f"Figure: {args.figure.resolve()}")
    print("\nFirst steps are from the uniform policy; updates are counted to 90 % / 99 % of the way from there to J*.")
    heads = ["γ", "C", "identity: error", "bound: slack (penalty needed)", "first step: KL, Algorithm 1", "KL, TRPO"]
    heads += ["TRPO's is longer by", *(f"updates: {name}" for name in UPDATES)]
    print("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in rows:
        print("| " + " | ".join(cells(row)) + " |")


def cells(row: Row) -> list[str]:
    """A row of the table."""
    short, long = (row.divergences[name] for name in ("Algorithm 1", "TRPO"))
    return [
        f"{row.mdp.gamma}",
        f"{row.penalty:,.0f}",
        f"{row.checks.identity:.0e}",
        f"{row.checks.slack:.0e} ({100 * row.checks.tightness:.2g} %)",
        f"{short:.1e}",
        f"{long:.1e}",
        f"{math.sqrt(long / short):,.1f} times",
        *(" / ".join(updates_to(curve, level) for level in (0.9, 0.99)) for curve in row.curves.values()),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the first MDP (default: %(default)s)")
    parser.add_argument("--states", type=int, default=10, help="S (default: %(default)s)")
    parser.add_argument("--actions", type=int, default=4, help="A (default: %(default)s)")
    parser.add_argument("--mdps", type=int, default=20, help="random MDPs checked at every γ (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=300, help="most updates (default: %(default)s)")
    parser.add_argument("--figure", type=Path, default=Path("tabular_theory.png"), help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(gamma, args) for gamma in GAMMAS]
    draw(rows, args)
    report(rows, args)


if __name__ == "__main__":
    main()
