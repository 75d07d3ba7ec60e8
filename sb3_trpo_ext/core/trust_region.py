"""The trust-region step: scale to the boundary, backtrack, and never leave a half-made update behind."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor


def boundary_scale(curvature: float, radius: float) -> float:
    """Factor sqrt(2δ / xᵀFx) that brings x to the boundary ½ sᵀFs = δ of the quadratic trust region.

    Args:
        curvature: xᵀFx > 0, finite.
        radius: δ > 0.

    Source: Schulman et al. (2015), appendix C.
    """
    return math.sqrt(2.0 * radius / curvature)


def boundary_curvature(damped: float, undamped: float, min_used: float) -> float:
    """The curvature that the boundary is measured with, so that damping leaves a step a share of the radius.

    Scaled by xᵀ(F + λI)x a step uses the share xᵀFx / xᵀ(F + λI)x of δ in the undamped model, which goes to zero with
    the entries of F. Scaled by the smaller of xᵀ(F + λI)x and xᵀFx / u it uses that share, but u at least; its
    direction stays, and where the share is u anyway its length too.

    Args:
        damped: xᵀ(F + λI)x > 0.
        undamped: xᵀFx.
        min_used: u in [0, 1]: 0 measures with damping alone, 1 without.
    """
    return min(damped, undamped / min_used) if min_used and undamped > 0 else damped


class Trial(Protocol):
    """What the line search has to know of a trial point."""

    @property
    def objective(self) -> float:
        """The objective to increase: L(θ), or minus a loss."""

    @property
    def divergence(self) -> float:
        """Distance D(θ) from the starting point, compared with the radius."""


TrialT = TypeVar("TrialT", bound=Trial)


@dataclass(frozen=True)
class LineSearchResult(Generic[TrialT]):
    """Outcome of a backtracking line search.

    Attributes:
        trial: The accepted trial point, or None.
        fraction: Fraction of the full step that was accepted, 0 if none was.
        reason: Why the last trial was rejected, in words; empty if accepted.
    """

    trial: TrialT | None
    fraction: float
    reason: str


@dataclass(frozen=True)
class Acceptance:
    """The acceptance test: enough improvement, inside the region.

    Written in accepting form, so that a NaN anywhere fails it.

    Attributes:
        start: Objective at the starting point.
        radius: δ; ``math.inf`` for no constraint.
        expected: Improvement that the linear model predicts for the full step, gᵀs.
        ratio: Fraction of the predicted improvement that is required; 0 accepts any improvement.
    """

    start: float
    radius: float
    expected: float
    ratio: float = 0.0

    def rejection(self, trial: Trial, fraction: float) -> str:
        """Empty if the trial at ``fraction`` of the full step is accepted, otherwise the reason in words."""
        improvement = trial.objective - self.start
        required = self.ratio * fraction * self.expected
        if 0 < improvement < math.inf and improvement >= required and trial.divergence <= self.radius:
            return ""
        if not math.isfinite(trial.objective):
            return "the objective at the trial point is not finite"
        if not math.isfinite(trial.divergence):
            return "the KL divergence at the trial point is not finite"
        if trial.divergence > self.radius:
            return "the KL divergence exceeds the radius"
        if improvement <= 0:
            return "the objective does not improve"
        return "the objective improves by less than the required fraction of the predicted improvement"


def backtracking_line_search(
    trial_at: Callable[[float], TrialT], acceptance: Acceptance, *, shrink: float = 0.8, max_steps: int = 10
) -> LineSearchResult[TrialT]:
    """Try the fractions 1, β, β², … of a step and return the first that is accepted.

    The caller's ``trial_at`` moves the parameters; after a rejection they stand at the last trial point, and the
    caller restores them (see `Atomic`).

    Args:
        trial_at: Moves to a fraction of the full step and evaluates there.
        acceptance: The test.
        shrink: β in (0, 1).
        max_steps: Most trials.

    Source: Schulman et al. (2015), appendix C.
    """
    fraction, reason = 1.0, "no step was tried"
    for _ in range(max_steps):
        trial = trial_at(fraction)
        reason = acceptance.rejection(trial, fraction)
        if not reason:
            return LineSearchResult(trial, fraction, "")
        fraction *= shrink
    return LineSearchResult(None, 0.0, reason)


class Checkpoint:
    """A bit-exact copy of some tensors that can be put back in place."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._saved = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back, in place."""
        for tensor, copy in self._saved:
            tensor.copy_(copy)


class Restorable(Protocol):
    """Anything that can be put back to how it was when this was made."""

    def restore(self) -> None:
        """Put it back."""


class Atomic:
    """Leave the states as they were if the block is left by any exception, KeyboardInterrupt included.

    A class rather than a generator: a generator that an interrupt leaves suspended would be closed, and would then
    restore, whenever the traceback that holds it is released.

    Args:
        states: What to put back.
    """

    def __init__(self, *states: Restorable) -> None:
        self._states = states

    def __enter__(self) -> None:
        """Nothing to do: the states were saved when they were made."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """Put the states back after an exception, which goes on."""
        if kind is not None:
            for state in self._states:
                state.restore()
