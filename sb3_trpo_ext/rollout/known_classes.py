"""What is known of a class by its name: the policies of SB3 and sb3-contrib, and callbacks that do not look."""

from collections.abc import Iterable
from typing import Any

from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
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


KNOWN_MODULES = (
    "stable_baselines3.common.callbacks",
    "sb3_contrib.common.maskable.callbacks",
    "rl_zoo3.callbacks",
    "sb3_trpo_ext.training.worker_callbacks",
)
"""Where the callbacks are defined that neither look at values and log-probabilities nor change the policy."""


def is_idle(callback: BaseCallback) -> bool:
    """Whether it is what SB3 makes of no callback: it looks at nothing and changes nothing."""
    return type(callback) is ConvertCallback and callback.callback is None


def looks(callback: BaseCallback) -> bool:
    """Whether it, or one that it calls, is of a class that could look at a step or change the policy."""
    if type(callback) is ConvertCallback:
        return callback.callback is not None
    own = any(name.lstrip("_").startswith(("on_", "update_")) for name in vars(callback))
    if own or type(callback).__module__ not in KNOWN_MODULES:
        return True
    held = [each for value in vars(callback).values() for each in (value if isinstance(value, list) else [value])]
    parent = getattr(callback, "parent", None)
    return any(looks(each) for each in held if isinstance(each, BaseCallback) and each is not parent)
