"""Value functions: objects that a model keeps, saves and restores, known by name."""

from __future__ import annotations

from typing import Any

from sb3_trpo_ext.critic.adam import AdamCritic
from sb3_trpo_ext.critic.base import Critic
from sb3_trpo_ext.critic.gauss_newton import GaussNewtonCritic
from sb3_trpo_ext.critic.semi_gradient import SemiGradientCritic
from sb3_trpo_ext.rollout.buffers import VIEWED_BUFFERS

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


def check_order(critic: Critic, *, has_memory: bool, buffer: type | None) -> None:
    """Raise `ValueError` if a critic needs the steps of a rollout in their order, and the model does not know it.

    Args:
        critic: The critic.
        has_memory: Whether rollouts are cut into sequences for a policy with memory.
        buffer: The model's ``rollout_buffer_class``.
    """
    if critic.needs_order and (has_memory or buffer not in (None, *VIEWED_BUFFERS)):
        name = next((name for name, kind in _CRITICS.items() if kind is type(critic)), type(critic).__name__)
        found = "a policy with memory" if has_memory else f"rollout_buffer_class={buffer!r}"
        raise ValueError(
            f"The critic {name!r} needs the steps of a rollout in their order, as SB3's own rollout buffers for "
            f"policies without memory keep them, got {found}. Use another critic, or leave that out."
        )


def make_critic(critic: str | type[Critic], kwargs: dict[str, Any], *, argument: str = "critic") -> Critic:
    """The critic of a registered name, or of a class, made with its arguments.

    Args:
        critic: The name or the class.
        kwargs: The arguments.
        argument: What a user calls the first.

    Raises:
        ValueError: If the name is not known, or the arguments are not the critic's.
    """
    kind = _CRITICS.get(critic) if isinstance(critic, str) else critic
    if not (isinstance(kind, type) and issubclass(kind, Critic)):
        others = ("auto", "action_value") if argument == "critic" else ("auto",)
        names = ", ".join(map(repr, (*others, *_CRITICS)))
        raise ValueError(f"`{argument}` must be one of {names}, or a subclass of sb3_trpo_ext.Critic, got {critic!r}.")
    try:
        return kind(**kwargs)
    except TypeError as error:
        of_adam = (
            " The Adam critic has none but `n_rollouts` and `gae_lambda`: use `learning_rate`, `batch_size` and "
            f"`n_critic_updates`, or pass {argument}='gauss_newton'."
        )
        raise ValueError(
            f"`critic_kwargs` must be arguments of {kind.__name__}, got {kwargs!r} with {argument}={critic!r}: {error}."
            + of_adam * (kind is AdamCritic)
        ) from error
