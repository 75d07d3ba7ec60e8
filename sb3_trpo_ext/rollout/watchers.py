"""Which callbacks look at a rollout while it is collected."""

from __future__ import annotations

from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback

KNOWN_MODULES = ("stable_baselines3.common.callbacks", "sb3_contrib.common.maskable.callbacks", "rl_zoo3.callbacks")
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
