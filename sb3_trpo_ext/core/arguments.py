"""Impossible arguments are refused by name, value and cure."""

import math
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any


def check_integer(name: str, value: Any, least: int = 1, *, hint: str = "") -> None:
    """Raise `ValueError` unless ``value`` is an integer >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}. {hint}".rstrip())


def check_samples(name: str, value: Any) -> None:
    """Raise `ValueError` unless ``value`` is a number of samples, or None for all of them."""
    if value is not None:
        check_integer(name, value, hint="Pass None for all samples.")


def check_number(name: str, value: Any, *, positive: bool = False, hint: str = "") -> float:
    """Return ``value`` as a float, or raise `ValueError` unless it is a finite number >= 0 (> 0 if ``positive``)."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (positive and value == 0):
        kind = "positive" if positive else "non-negative"
        raise ValueError(f"`{name}` must be a finite, {kind} number, got {value!r}. {hint}".rstrip())
    return float(value)


POINTS_OF_A_SCHEDULE = 101
"""Where between the beginning and the end of training a schedule is looked at."""


def values_of(schedule: Any) -> Iterator[tuple[float, Any]]:
    """Pairs of the remaining progress, from 1 to 0, and what a schedule says there."""
    for point in range(POINTS_OF_A_SCHEDULE):
        progress = 1.0 - point / (POINTS_OF_A_SCHEDULE - 1)
        value = schedule(progress)
        try:
            yield progress, float(value)  # what SB3 makes of it
        except (TypeError, ValueError):
            yield progress, value


def check_schedule(name: str, value: Any, *, positive: bool = False, hint: str = "") -> None:
    """Raise `ValueError` unless ``value`` is such a number as of `check_number`, or a schedule that is all along.

    Args:
        name: The argument.
        value: The number, or a function of the remaining progress.
        positive: Whether a number must not be zero; of a schedule, see `check_radius`.
        hint: What to do where a number is refused.
    """
    if not callable(value):
        check_number(name, value, positive=positive, hint=hint)
        return
    for progress, there in values_of(value):
        check_number(name, there, hint=f"That is its schedule where the remaining progress is {progress:.2g}.")


def check_radius(name: str, value: Any, *, hint: str = "") -> None:
    """Raise `ValueError` unless ``value`` is a positive number, or a schedule that is one from beginning to end."""
    if not callable(value):
        check_number(name, value, positive=True, hint=hint)
        return
    cure = f"lambda progress: {value(1.0)} * max(progress, 0.01)"
    for progress, there in values_of(value):
        hint = (
            f"That is its schedule where the remaining progress is {progress:.2g}; it must stay positive until the end "
            f"of training, as `{cure}` does."
        )
        check_number(name, there, positive=True, hint=hint)


def check_finite(name: str, value: Any) -> None:
    """Raise `ValueError` unless ``value`` is a finite number of either sign, or a schedule that is one all along."""
    for progress, there in values_of(value) if callable(value) else [(None, value)]:
        if not isinstance(there, Real) or not math.isfinite(there):
            place = "" if progress is None else f" from its schedule where the remaining progress is {progress:.2g}"
            raise ValueError(f"`{name}` must be a finite number, got {there!r}{place}.")


def check_fraction(name: str, value: Any, *, include_zero: bool = False) -> None:
    """Raise `ValueError` unless ``value`` lies in (0, 1), or [0, 1)."""
    if check_number(name, value, positive=not include_zero) >= 1:
        raise ValueError(f"`{name}` must be less than 1, got {value}.")


def check_share(name: str, value: Any, *, hint: str = "") -> None:
    """Raise `ValueError` unless ``value`` lies in [0, 1]."""
    if check_number(name, value, hint=hint) > 1:
        raise ValueError(f"`{name}` must be at most 1, got {value}. {hint}".rstrip())
