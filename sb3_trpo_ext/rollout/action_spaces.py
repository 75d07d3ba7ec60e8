"""What the kinds of action spaces differ in, in one table."""

from __future__ import annotations

from dataclasses import dataclass

from gymnasium import spaces
from torch import Tensor


@dataclass(frozen=True)
class ActionKind:
    """A kind of action space.

    Attributes:
        is_index: Whether an action is one index without an axis of its own.
        is_bounded: Whether actions beyond bounds are clipped for the environment.
        averages_kl: Whether sb3-contrib averages its KL divergence over action dimensions.
        min_radius_used: What ``min_radius_used="auto"`` stands for: where the entries of the Fisher matrix are about
            1/K, the share of δ that damping leaves a step; half of it, and room for the error of the quadratic model.
    """

    is_index: bool = False
    is_bounded: bool = False
    averages_kl: bool = False
    min_radius_used: float = 0.6

    def as_taken(self, stored: Tensor) -> Tensor:
        """Actions as a rollout buffer stores them, ``(N, A)`` -> as ``log_prob`` takes them."""
        return stored.long().flatten() if self.is_index else stored


KINDS: dict[type[spaces.Space], ActionKind] = {
    spaces.Box: ActionKind(is_bounded=True, averages_kl=True, min_radius_used=0.0),
    spaces.Discrete: ActionKind(is_index=True),
    spaces.MultiDiscrete: ActionKind(),
    spaces.MultiBinary: ActionKind(averages_kl=True),
}
"""The action spaces of SB3's PPO."""


def kind_of(space: spaces.Space) -> ActionKind:
    """The kind of an action space, of one of the classes in `KINDS` or a subclass."""
    return next(kind for known, kind in KINDS.items() if isinstance(space, known))
