"""Whose method an object answers with: its own, or that of an object which it wraps."""

from collections.abc import Iterable
from typing import Any

from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy

KNOWN_POLICIES = (MaskableActorCriticPolicy, RecurrentActorCriticPolicy, ActorCriticPolicy)
"""The policies of SB3 and sb3-contrib, subclasses first; each keeps one distribution, which a forward pass sets."""


def owner_of(wrapper: Any, name: str, known: Iterable[type]) -> Any | None:
    """The object whose method ``wrapper.name`` is, where that method is as one of the classes ``known`` defines it.

    A wrapper (``torch.compile``, or any that forwards attributes) answers with the bound method of what it wraps, and
    that reads the attributes of what it wraps. Anything that is not such a method (a method that is overridden or
    replaced, a plain function) has no owner here: what it does is not known.

    Args:
        wrapper: The object or a wrapper of it.
        name: The method.
        known: Classes that have it.
    """
    method = getattr(wrapper, name, None)
    function = getattr(method, "__func__", None)
    if function is None or all(function is not getattr(kind, name, None) for kind in known):
        return None
    return getattr(method, "__self__", None)
