"""Value functions: objects that a model keeps, saves and restores, known by name."""

from __future__ import annotations

from typing import Any

from sb3_trpo_ext.critic.adam import AdamCritic
from sb3_trpo_ext.critic.base import Critic
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonCritic
from sb3_trpo_ext.critic.semi_gradient import SemiGradientCritic

_CRITICS: dict[str, type[Critic]] = {
    "gauss_newton": GaussNewtonCritic,
    "adam": AdamCritic,
    "semi_gradient": SemiGradientCritic,
}


def register_critic(name: str, critic_class: type[Critic]) -> None:
    """Make a critic known by a name: ``TRPO(..., critic=name, critic_kwargs={...})`` then makes one of ``**kwargs``.

    Args:
        name: The name; one that is known already is given to another class.
        critic_class: A subclass of `Critic`, whose constructor takes ``critic_kwargs``.

    Raises:
        TypeError: If it is no such class.
    """
    if not (isinstance(critic_class, type) and issubclass(critic_class, Critic)):
        raise TypeError(f"`critic_class` must be a subclass of sb3_trpo_ext.Critic, got {critic_class!r}.")
    _CRITICS[name] = critic_class


def make_critic(critic: str | type[Critic], kwargs: dict[str, Any]) -> Critic:
    """The critic of a registered name, or of a class, made with its arguments.

    Raises:
        ValueError: If the name is not known, or the arguments are not the critic's.
    """
    kind = _CRITICS.get(critic) if isinstance(critic, str) else critic
    if not (isinstance(kind, type) and issubclass(kind, Critic)):
        names = ", ".join(map(repr, ("auto", "action_value", *_CRITICS)))
        raise ValueError(f"`critic` must be one of {names}, or a subclass of sb3_trpo_ext.Critic, got {critic!r}.")
    try:
        return kind(**kwargs)
    except TypeError as error:
        of_adam = (
            " The Adam critic has none but `n_rollouts`: use `learning_rate`, `batch_size` and `n_critic_updates`, or "
            "pass critic='gauss_newton'."
        )
        raise ValueError(
            f"`critic_kwargs` must be arguments of {kind.__name__}, got {kwargs!r} with critic={critic!r}: {error}."
            + of_adam * (kind is AdamCritic)
        ) from error
