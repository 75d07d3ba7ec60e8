"""Surrogate objectives, one number a sample; the caller takes the (weighted) mean."""

import torch
from torch import Tensor


def importance_sampled_surrogate(ratio: Tensor, advantages: Tensor) -> Tensor:
    """r·Â with r = π_θ(a|s)/π_old(a|s); its mean is L(θ), Schulman et al. (2015), equation 14.

    Args:
        ratio: r, shape ``(N,)``, or ``(N, K)`` of all actions.
        advantages: Â, of the same shape.
    """
    return ratio * advantages


def expected_surrogate(probabilities: Tensor, advantages: Tensor) -> Tensor:
    """Σ_a π_θ(a|s) A(s,a), exact over actions; its mean is the L(θ) before importance sampling.

    Schulman et al. (2015), equation 9, whose sum over states is the mean over those of a rollout.

    Args:
        probabilities: π_θ(·|s), shape ``(N, K)``.
        advantages: A(s,·), shape ``(N, K)``.
    """
    return (probabilities * advantages).sum(dim=1)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """min(r·Â, clip(r, 1-ε, 1+ε)·Â), Schulman et al. (2017), equation 7.

    Args:
        ratio: r, shape ``(N,)``, or ``(N, K)`` of all actions.
        advantages: Â, of the same shape.
        clip_range: ε > 0.
    """
    return torch.min(advantages * ratio, advantages * torch.clamp(ratio, 1 - clip_range, 1 + clip_range))


def theoretical_penalty(gamma: float, max_advantage: float) -> float:
    """C = 4εγ / (1-γ)², with which L(θ) - C · D_KL^max(θ_old, θ) bounds the return from below.

    Maximising that bound improves the return at every step (Schulman et al. 2015, theorem 1 and algorithm 1), by steps
    whose KL divergence shrinks with (1-γ)²: at γ = 0.99 and ε = 1, C is 39 600.

    Args:
        gamma: Discount factor γ in [0, 1).
        max_advantage: ε = max |A(s,a)|.
    """
    return 4.0 * max_advantage * gamma / (1.0 - gamma) ** 2


def adapted_penalty(penalty: float, divergence: float, target: float) -> float:
    """The next β of a KL penalty: half where the policy moved less than asked, double where it moved more.

    Half if d < target / 1.5, double if d > 1.5 · target, the same between, and where d is not a number (Schulman et
    al. 2017, section 4).

    Args:
        penalty: β.
        divergence: d, the mean KL divergence that the update reached.
        target: d_targ.
    """
    if divergence < target / 1.5:
        return penalty / 2.0
    if divergence > target * 1.5:
        return penalty * 2.0
    return penalty


def searched_penalty(penalty: float, factor: float, smallest: float, largest: float) -> tuple[float, float]:
    """The next β of a KL penalty, and in which direction to go on, where an update had to be undone.

    β is multiplied by the factor, and where that leads no further, by its inverse: repeated, it comes past every β
    between the bounds, up to the factor, so that no range of β in which updates succeed is missed for ever.

    Args:
        penalty: β.
        factor: 2 to go up, 1/2 to go down.
        smallest: Of β, > 0.
        largest: Of β.
    """
    moved = bounded_penalty(penalty * factor, smallest, largest)
    if moved != penalty:
        return moved, factor
    return bounded_penalty(penalty / factor, smallest, largest), 1.0 / factor


def bounded_penalty(penalty: float, smallest: float, largest: float) -> float:
    """β within its bounds; the smallest where it is not a number."""
    return min(penalty, largest) if penalty >= smallest else smallest
