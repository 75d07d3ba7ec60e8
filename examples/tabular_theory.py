"""The theory of TRPO on Markov decision processes small enough to be solved exactly.

    python examples/tabular_theory.py                     # a minute; draws tabular_theory.png

On random finite MDPs with softmax policies every expectation is a finite sum, so what Schulman et al. (2015,
https://arxiv.org/abs/1502.05477; "the paper") prove can be checked to the last digits of float64:

1. the performance-difference identity J(π') = J(π) + Σ_s d_π'(s) Σ_a π'(a|s) A_π(s,a);
2. L_π, which puts d_π in the place of d_π', matches J in value and gradient;
3. the lower bound J(π') >= L_π(π') - C · D_KL^max(π, π') with C = 4εγ/(1-γ)²;
4. Algorithm 1, which maximises that bound, improves at every step, and how short its steps are;
5. TRPO's own update (this package's core, fed with sums instead of samples) beside Algorithm 1 and the policy gradient;
6. the box of TRPO with action values of the lecture CS885 (University of Waterloo, 2020), exact and from samples, and
   what its max_a Q(s',a) in the place of Σ_a π Q does to 2 and 3: its Q is Q* whatever π is, and Q* - Σ_a π Q* is no
   advantage of π.

J is the paper's η, d_π its unnormalised visitation frequency ρ_π. Nothing is sampled but in the sampled form of 6.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
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
BOOTSTRAPS = ("expected", "max")
BOX_SAMPLES = 1000
BOX_UPDATES = 40


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
        values: V_π(s), shape ``(S,)``.
        gamma: γ.
    """

    log_policy: Tensor
    performance: Tensor
    visits: Tensor
    advantages: Tensor
    values: Tensor
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
    return Solved(log_policy, mdp.start @ values, visits, advantages, values, mdp.gamma)


def uniform(mdp: MDP) -> Solved:
    """The policy that all learning starts from."""
    return solve(mdp, torch.zeros_like(mdp.rewards))


def best(mdp: MDP) -> Solved:
    """π* by policy iteration. A logit of 1000 makes the softmax deterministic in float64."""
    solved = uniform(mdp)
    while solved.advantages.max() > 1e-9:
        greedy = torch.nn.functional.one_hot(solved.advantages.argmax(1), mdp.rewards.shape[1])
        solved = solve(mdp, 1000 * greedy.double())
    return solved


def best_performance(mdp: MDP) -> float:
    """J*."""
    return float(best(mdp).performance)


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
        frequencies: How often each state and action came, ``(S, A)``, summing to one; None for d_π π, normalised.

    Attributes:
        theta: The logits.
        params: They alone.
        theta_old: Those of π, ``(S·A,)``.
        gradient: That of the objective at π, ``(S·A,)``.
        start: The evaluation of π.
    """

    def __init__(self, old: Solved, frequencies: Tensor | None = None) -> None:
        self._old = old
        exact = (old.visits / old.visits.sum()).unsqueeze(1) * old.log_policy.exp()
        self._frequencies = exact if frequencies is None else frequencies
        self._weights = self._frequencies.sum(1)
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
        expected = self._weights.unsqueeze(1) * self._old.log_policy.exp()  # over π, not the actions that were seen

        def log_probabilities() -> tuple[Jacobian, Metric]:
            return Linearization(self.theta.log_softmax(1), self.params), lambda v: expected * v

        return GaussNewtonProduct([log_probabilities], damping)

    def _objective(self) -> Tensor:
        ratio = (self.theta.log_softmax(1) - self._old.log_policy).exp()
        return (self._frequencies * importance_sampled_surrogate(ratio, self._old.advantages)).sum()


def trpo_step(old: Solved, radius: float = RADIUS, damping: float = 1e-8, frequencies: Tensor | None = None) -> Tensor:
    """TRPO's update by this package's core.

    In a tabular softmax F⁻¹∇L is the advantage function, up to scale and a constant in each state: the step is
    π'(a) ∝ π(a) · exp(tA(a)) with one t for all states, where Algorithm 1 has π(a) / (1 - tA(a)).

    Args:
        old: π.
        radius: δ, the bound on the mean KL divergence.
        damping: λ. The Fisher matrix is singular, as a softmax does not notice a constant added to a state's logits.
        frequencies: Of states and actions in a sample, ``(S, A)``; None for those of π itself.
    """
    problem = Problem(old, frequencies)
    steps = len(problem.gradient)
    direction = natural_direction(problem.fisher(damping), problem, max_steps=steps, residual_tol=1e-8)
    if direction.is_usable:
        size = boundary_scale(direction.curvature, radius)
        test = Acceptance(TrustRegion(radius), problem.start, size * direction.slope)
        backtrack(problem, direction, size, test.rejection)
    return problem.theta.detach()


def with_action_values(old: Solved, action_values: Tensor) -> Solved:
    """π with Q(s,a) - Σ_a π(a|s) Q(s,a) in the place of its advantages, for any Q ``(S, A)``."""
    baseline = (old.log_policy.exp() * action_values).sum(1, keepdim=True)
    return replace(old, advantages=action_values - baseline)


def fixed_point(mdp: MDP, old: Solved, bootstrap: str) -> Tensor:
    """Where the box's Q comes to rest under π, ``(S, A)``: at Q_π for ``"expected"``, at Q* for ``"max"``."""
    settled = old if bootstrap == "expected" else best(mdp)
    return settled.advantages + settled.values.unsqueeze(1)


class Box:
    """The lecture's TRPO with a table of action values, as it stands: Q, then one step of π, over and over.

    δ = r + γ B(s') - Q(s,a) moves Q(s,a) by α γⁿ δ, with B = max_a Q(s',a) or Σ_a π(a|s') Q(s',a);
    A(s,a) = r + γ B(s') - Σ_a π(a|s) Q(s,a) with the Q of that moment; θ maximises (1/N) Σ_n r_n(θ) A_n in the region.

    Args:
        mdp: What is learnt.
        bootstrap: ``"max"``, the lecture's B, or ``"expected"``.
        samples: N steps of π an update, in episodes that end with probability 1-γ so that states are seen as d_π has
            them; 0 for exact expectations: Q settles, and the objective is the sum of equation 9.
        rate: α.
        seed: Of the samples.
    """

    def __init__(self, mdp: MDP, bootstrap: str, samples: int = 0, rate: float = 0.2, seed: int = 0) -> None:
        self._mdp, self._bootstrap, self._samples, self._rate = mdp, bootstrap, samples, rate
        self._rng = np.random.default_rng(seed)
        self.action_values = torch.zeros_like(mdp.rewards)

    def __call__(self, old: Solved) -> Tensor:
        """The logits of the next policy."""
        if not self._samples:
            self.action_values = fixed_point(self._mdp, old, self._bootstrap)
            return trpo_step(with_action_values(old, self.action_values))
        counts, totals = self._rollout(old.log_policy.exp().numpy())
        advantages = torch.from_numpy(totals / np.maximum(counts, 1))
        return trpo_step(replace(old, advantages=advantages), frequencies=torch.from_numpy(counts / counts.sum()))

    def _rollout(self, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take the samples, moving Q at each; how often each state and action came, and the sum of its A."""
        mdp, q, gamma = self._mdp, self.action_values.numpy(), self._mdp.gamma
        rewards = mdp.rewards.numpy()
        starts, choices, moves = (
            np.cumsum(masses, axis=-1)[..., :-1] for masses in (mdp.start.numpy(), policy, mdp.transitions.numpy())
        )
        counts, totals, n = np.zeros_like(rewards), np.zeros_like(rewards), 0
        state = starts.searchsorted(self._rng.random())
        for cut, first, drawn, moved in self._rng.random((self._samples, 4)):
            if cut > gamma:
                state, n = starts.searchsorted(first), 0
            action = choices[state].searchsorted(drawn)
            following = moves[state, action].searchsorted(moved)
            ahead = q[following].max() if self._bootstrap == "max" else policy[following] @ q[following]
            target = rewards[state, action] + gamma * ahead
            counts[state, action] += 1
            totals[state, action] += target - policy[state] @ q[state]
            q[state, action] += self._rate * gamma**n * (target - q[state, action])
            state, n = following, n + 1
        return counts, totals


BOXES = {
    f"box, {bootstrap}, {'sampled' if samples else 'exact'}": (bootstrap, samples)
    for bootstrap in BOOTSTRAPS
    for samples in (0, BOX_SAMPLES)
}


def gradient_error(mdp: MDP, logits: Tensor, bootstrap: str) -> float:
    """By how much ∇L of the box's settled Q misses ∇J at π, relative to it (lemma 1.2's match to first order)."""
    old = solve(mdp, logits)
    exact = gradient_of(lambda theta: solve(mdp, theta).performance, logits)
    boxed = with_action_values(old, fixed_point(mdp, old, bootstrap))
    return float((policy_gradient(boxed) - exact).norm() / exact.norm())


def bound_of_box(mdp: MDP, logits: Tensor, new_logits: Tensor, bootstrap: str) -> float:
    """J(π') minus the lower bound that the box's settled Q makes of it; below zero it is no bound."""
    old = solve(mdp, logits)
    boxed = with_action_values(old, fixed_point(mdp, old, bootstrap))
    return float(solve(mdp, new_logits).performance - lower_bound(boxed, new_logits.log_softmax(1)))


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
        boxes: The curves of the `BOXES`.
        gradient_errors: By B, the `gradient_error` of a random policy of every MDP.
        bounds: By B, the smallest `bound_of_box` along a random direction, of every MDP.
    """

    mdp: MDP
    checks: Checks
    penalty: float
    divergences: dict[str, float]
    curves: dict[str, list[float]]
    smallest_change: dict[str, float]
    boxes: dict[str, list[float]]
    gradient_errors: dict[str, list[float]]
    bounds: dict[str, list[float]]


def measure(gamma: float, args: argparse.Namespace) -> Row:
    """Everything at one γ."""
    mdps = [random_mdp(args.seed + index, args.states, args.actions, gamma) for index in range(args.mdps)]
    generator = torch.Generator().manual_seed(args.seed)
    mdp = mdps[0]
    performances = {name: learn(mdp, update, args.iterations) for name, update in UPDATES.items()}
    best, errors, bounds = best_performance(mdp), dict[str, list[float]](), dict[str, list[float]]()
    for bootstrap in BOOTSTRAPS:
        pairs = [of_box(each, args.seed, bootstrap) for each in mdps]
        errors[bootstrap], bounds[bootstrap] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    boxes = {name: learn(mdp, Box(mdp, *options), min(BOX_UPDATES, args.iterations)) for name, options in BOXES.items()}
    return Row(
        mdp,
        worst([check(each, generator) for each in mdps]),
        uniform(mdp).penalty,
        first_steps(mdp),
        {name: [(j - js[0]) / (best - js[0]) for j in js] for name, js in performances.items()},
        {name: min(after - before for before, after in pairwise(js)) for name, js in performances.items()},
        {name: [(j - js[0]) / (best - js[0]) for j in js] for name, js in boxes.items()},
        errors,
        bounds,
    )


def of_box(mdp: MDP, seed: int, bootstrap: str) -> tuple[float, float]:
    """`gradient_error` at a random policy of an MDP, and the smallest `bound_of_box` along a random direction."""
    generator = torch.Generator().manual_seed(seed)
    logits, direction = (normal(generator, *mdp.rewards.shape) for _ in range(2))
    bounds = [bound_of_box(mdp, logits, logits + step * direction, bootstrap) for step in np.geomspace(1e-3, 10, 9)]
    return gradient_error(mdp, logits, bootstrap), min(bounds)


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
    title = f"Solid: γ = {rows[0].mdp.gamma}, dashed: γ = {rows[-1].mdp.gamma}"
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


def draw_gradient_errors(axes: Axes, rows: list[Row]) -> None:
    """How far ∇L of the box is from ∇J, by γ, over the MDPs."""
    gammas = [row.mdp.gamma for row in rows]
    for bootstrap, label in (("max", "max_a Q(s',a)"), ("expected", "Σ_a π Q(s',a)")):
        errors = np.array([row.gradient_errors[bootstrap] for row in rows])
        axes.semilogy(range(len(gammas)), np.median(errors, axis=1), "o-", label=label)
        axes.fill_between(range(len(gammas)), errors.min(axis=1), errors.max(axis=1), alpha=0.2)
    axes.set_xticks(range(len(gammas)), [str(gamma) for gamma in gammas])
    axes.set(title="First-order match of the lecture's box", xlabel="γ", ylabel="|∇L - ∇J| / |∇J|")


def draw_boxes(axes: Axes, row: Row) -> None:
    """The part of the way to J* by updates, of the boxes and TRPO."""
    for name, curve in row.boxes.items():
        axes.plot(curve, "--" if "sampled" in name else "-", label=name, alpha=0.8)
    axes.plot(row.curves["TRPO"][: len(curve)], "k:", label="TRPO")
    axes.set(title=f"The lecture's box, γ = {row.mdp.gamma}", xlabel="updates", ylabel="part of the way to $J^*$")


def draw(rows: list[Row], args: argparse.Namespace) -> None:
    """Draw the six panels."""
    figure, axes = plt.subplots(2, 3, figsize=(16, 8), layout="constrained")
    draw_bound(axes[0, 0], rows[1].mdp)
    draw_first_order(axes[0, 1], [row.mdp for row in rows])
    draw_learning(axes[1, 0], rows)
    draw_step_lengths(axes[1, 1], args)
    draw_gradient_errors(axes[0, 2], rows)
    draw_boxes(axes[1, 2], rows[len(rows) // 2])
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
    print("\nThe lecture's box by its bootstrap: |∇L - ∇J| / |∇J| at a random policy, median (largest) over the MDPs;")
    print("the smallest J minus its lower bound; and the part of the way to J* after the last update.")
    heads = ["γ", *(f"{head}: {kind}" for head in ("first order", "bound") for kind in BOOTSTRAPS), *BOXES]
    print("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in rows:
        errors = [f"{np.median(row.gradient_errors[b]):.2g} ({max(row.gradient_errors[b]):.2g})" for b in BOOTSTRAPS]
        bounds = [f"{min(row.bounds[b]):.1e}" for b in BOOTSTRAPS]
        ends = [f"{curve[-1]:.3f}" for curve in row.boxes.values()]
        print("| " + " | ".join([f"{row.mdp.gamma}", *errors, *bounds, *ends]) + " |")


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
