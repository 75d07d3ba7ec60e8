"""Advantages of one policy from what another did."""

import torch
from torch import Tensor


def trace_advantages(
    rewards: Tensor,
    values: Tensor,
    continues: Tensor,
    ratios: Tensor,
    *,
    discount: float,
    trace_decay: float,
    bootstraps: Tensor | None = None,
) -> Tensor:
    """Advantages of π from trajectories of μ: generalised advantage estimation with truncated importance weights.

    A_t = δ_t + Σ_{j>=1} γ^j (Π_{i=1..j} c_{t+i}) δ_{t+j} with δ_t = r_t + γV(s_{t+1}) - V(s_t) and
    c_t = λ·min(1, π(a_t|s_t)/μ(a_t|s_t)): the traces of V-trace (Espeholt et al. 2018,
    https://arxiv.org/abs/1802.01561) for an advantage, as Queeney et al. (2022, https://arxiv.org/abs/2206.13714) use
    them. Where π = μ it is the GAE(γ, λ) of Schulman et al. (2016).

    With other estimates B of what follows, such as max_a Q(s,a), it is G_t - V(s_t) of the return
    G_t = r_t + γ ((1 - c) B(s_{t+1}) + c G_{t+1}), c being c_{t+1}: for B = max_a Q(s,a) and π = μ the λ-return of
    Peng and Williams (1996, "Incremental multi-step Q-learning"), and for λ = 0 the advantage r + γB(s') - V(s).

    Args:
        rewards: r, ``(T, E)``.
        values: V, ``(T + 1, E)``: of the states, and of what follows the last.
        continues: 1 where s_{t+1} belongs to the episode of s_t, 0 where that ended, ``(T, E)``.
        ratios: π(a|s)/μ(a|s), ``(T, E)``.
        discount: γ.
        trace_decay: λ.
        bootstraps: B, ``(T + 1, E)``; None for V.

    Returns:
        A, ``(T, E)``.
    """
    bootstraps = values if bootstraps is None else bootstraps
    deltas = rewards + discount * continues * bootstraps[1:] - values[:-1]
    traces = trace_decay * ratios.clamp(max=1.0)
    advantages = torch.empty_like(deltas)
    ahead = torch.zeros_like(deltas[0])  # what follows the last step is unknown
    for t in reversed(range(len(deltas))):
        advantages[t] = deltas[t] + discount * continues[t] * ahead
        ahead = traces[t] * (advantages[t] + (values[t] - bootstraps[t]))
    return advantages


def trace_targets(values: Tensor, advantages: Tensor, ratios: Tensor) -> Tensor:
    """Targets of V for π from trajectories of μ: V-trace, with ρ̄ = 1 and c = λ·min(1, π/μ).

    v_t = V(s_t) + Σ_{j>=0} γ^j (Π_{i<j} c_{t+i}) ρ_{t+j} δ_{t+j} with ρ_t = min(1, π(a_t|s_t)/μ(a_t|s_t)), which is
    V(s_t) + ρ_t A_t of `trace_advantages`. Where π = μ they are the λ-returns A + V (Espeholt et al. 2018, equation 1
    and remark 2, https://arxiv.org/abs/1802.01561).

    Args:
        values: V, of any shape.
        advantages: A of `trace_advantages`, of the same shape.
        ratios: π(a|s)/μ(a|s), likewise.
    """
    return values + ratios.clamp(max=1.0) * advantages


def rounding_of_advantages(magnitude: float, steps: int, *, decay: float, eps: float) -> float:
    """How far apart rounding alone can set advantages Â_t = δ_t + γλ Â_{t+1} that are all equal.

    A summand δ_t = r_t + γV(s_{t+1}) - V(s_t) is wrong by up to half a unit in the last place for each of its products
    and sums, γ and two values among them; the recursion adds such errors up over the steps of an episode like the
    summands themselves. The result is ``4 · eps · magnitude · Σ_{k<steps} (γλ)^k``, twice what one advantage can be
    off: two can be so in opposite directions.

    Args:
        magnitude: max |Â| + max |V|, which bounds the rewards too.
        steps: Steps of the longest recursion.
        decay: γλ.
        eps: Relative spacing of the numbers that rewards, values and advantages are stored in.
    """
    length = steps if decay == 1.0 else (1.0 - decay**steps) / (1.0 - decay)
    return 4.0 * eps * magnitude * length
