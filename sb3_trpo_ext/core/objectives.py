"""Surrogate objectives, one number a sample; the caller takes the (weighted) mean."""

import torch
from torch import Tensor


def importance_sampled_surrogate(ratio: Tensor, advantages: Tensor) -> Tensor:
    """r·Â with r = π_θ(a|s)/π_old(a|s); its mean is L(θ), Schulman et al. (2015), equation 14.

    Args:
        ratio: r, shape ``(N,)``.
        advantages: Â, shape ``(N,)``.
    """
    return ratio * advantages


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """min(r·Â, clip(r, 1-ε, 1+ε)·Â), Schulman et al. (2017), equation 7.

    Args:
        ratio: r, shape ``(N,)``.
        advantages: Â, shape ``(N,)``.
        clip_range: ε > 0.
    """
    return torch.min(advantages * ratio, advantages * torch.clamp(ratio, 1 - clip_range, 1 + clip_range))
