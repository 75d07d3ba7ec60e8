"""What decides an environment's next steps, taken out of it and put into another one that was made alike.

Pickling an environment is not that: Gymnasium's MuJoCo tasks, for one, are made anew from their arguments then. Here
each layer, a wrapper or the task itself, hands over its attributes, and a simulation of MuJoCo its whole ``MjData``.
"""

from __future__ import annotations

import pickle
import sys
import traceback
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_trpo_ext.rollout.env_copies import vec_layers
from sb3_trpo_ext.rollout.object_state import (
    CODE,
    Attributes,
    References,
    is_data,
    put_space_generators,
    space_generators,
)

GET, SET = "get_checkpoint_state", "set_checkpoint_state"
"""The methods by which an environment, a wrapper or a vectorised one hands over its own state and takes it back."""

KNOWN_TASKS = ("gymnasium.envs.classic_control.", "gymnasium.envs.toy_text.", "gymnasium.envs.mujoco.")
"""Where the tasks are defined whose state is their attributes, and ``MjData``; what else they hold draws pictures."""

KNOWN_WRAPPERS = (
    "gymnasium.wrappers.",
    "stable_baselines3.common.",
    "sb3_contrib.common.",
    "rl_zoo3.",
    "sb3_trpo_ext.",
)

IN_WORKERS = "_sb3_trpo_ext_env_state"
"""The attribute by which a `SubprocVecEnv` is told what to call."""


def has_pair(owner: Any) -> bool:
    """Whether a class offers `GET` and `SET` itself; wrappers of old releases forward what they do not have."""
    return all(callable(getattr(type(owner), name, None)) for name in (GET, SET))


def layers(env: gym.Env) -> Iterator[gym.Env]:
    """An environment's wrappers, the outermost first, and what they wrap."""
    yield env
    while isinstance(env, gym.Wrapper):
        env = env.env
        yield env


def described(env: gym.Env) -> str:
    """The layers of an environment in words, and what it was registered and made with."""
    spec, task = getattr(env.unwrapped, "spec", None), ""
    if isinstance(spec, EnvSpec):
        made = {name: value for name, value in spec.kwargs.items() if name != "render_mode" and is_data(value)}
        task = f" ({spec.id}{f', {made}' if made else ''})"
    return " of ".join(map(_name_of, layers(env))) + task


def _name_of(layer: gym.Env) -> str:
    steps = getattr(layer, "_max_episode_steps", None) if isinstance(layer, TimeLimit) else None
    return type(layer).__qualname__ + (f" to {steps} steps" if steps else "")


def why_not_exact(env: gym.Env) -> str:
    """What cannot be taken out of an environment; empty if all can."""
    for layer in layers(env):
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        if has_pair(layer):
            continue
        if not isinstance(layer, gym.Wrapper):
            if not kind.startswith(KNOWN_TASKS):
                return f"{kind} is not known and has no methods `{GET}` and `{SET}`"
        elif not kind.startswith(KNOWN_WRAPPERS):
            for name, value in vars(layer).items():
                if not (is_data(value) or isinstance(value, (*CODE, spaces.Space, gym.Env, EnvSpec))):
                    return f"{kind} keeps `{name}`, a {type(value).__name__}, and has no methods `{GET}` and `{SET}`"
    return ""


def taken_from(env: gym.Env) -> bytes:
    """The state of each layer, or of an environment that is not exact what would go on in its next episode."""
    exact = not why_not_exact(env)
    return References({}).dumps([_of_layer(layer, exact) for layer in layers(env)])


def _of_layer(layer: gym.Env, exact: bool) -> dict[str, Any]:
    state: dict[str, Any] = {"spaces": space_generators(layer)}
    if has_pair(layer):
        state["own"] = getattr(layer, GET)()
        return state
    wanted = vars(layer)
    if not exact and not isinstance(layer, gym.Wrapper):
        wanted = {"_np_random": layer._np_random} if getattr(layer, "_np_random", None) is not None else {}
    state["attributes"] = {
        name: value for name, value in wanted.items() if name not in (IN_WORKERS, "spec", "env") and is_data(value)
    }
    state["files"] = {name: _text(value) for name, value in wanted.items() if isinstance(value, ResultsWriter)}
    # Its 700 kB are an arena that is nearly empty.
    state["mujoco"] = {
        name: zlib.compress(pickle.dumps(value, pickle.HIGHEST_PROTOCOL), 1)
        for name, value in wanted.items()
        if _is_mujoco(value, "MjData")
    }
    return state


def put_into(env: gym.Env, data: bytes) -> None:
    """Let an environment go on from there."""
    states: list[dict[str, Any]] = References({}).loads(data)
    for layer, state in zip(layers(env), states, strict=True):
        put_space_generators(layer, state["spaces"])
        if "own" in state:
            getattr(layer, SET)(state["own"])
            continue
        vars(layer).update(state["attributes"])
        for name, text in state["files"].items():
            _rewrite(getattr(layer, name), text)
        for name, data in state["mujoco"].items():
            _put_mujoco(layer, name, pickle.loads(zlib.decompress(data)))


def _is_mujoco(value: Any, kind: str) -> bool:
    return type(value).__name__ == kind and type(value).__module__.startswith("mujoco")


def _put_mujoco(layer: Any, name: str, data: Any) -> None:
    """Copy a simulation in place: renderers hold on to it."""
    import mujoco

    here = getattr(layer, name)
    for now, then in ((layer.model, data.model), (layer.model.opt, data.model.opt)):  # masses, gravity may have changed
        for field in dir(then):
            value = None if field.startswith("_") else getattr(then, field)
            if isinstance(value, np.ndarray) and value.size and not np.array_equal(value, getattr(now, field)):
                getattr(now, field)[...] = value
    mujoco.mj_copyData(here, layer.model, data)


def _text(writer: ResultsWriter) -> str:
    """What was written into a Monitor's file."""
    writer.file_handler.flush()
    with open(writer.file_handler.name, newline="") as file:
        return file.read()


def _rewrite(writer: ResultsWriter | None, text: str) -> None:
    """Let a Monitor's file, which a new Monitor has begun anew, go on."""
    if writer is not None:
        writer.file_handler.seek(0)
        writer.file_handler.truncate()
        writer.file_handler.write(text)
        writer.file_handler.flush()


def prepare_restart(env: gym.Env) -> None:
    """Let an environment be reset though an episode has begun, which a Monitor may forbid."""
    for layer in layers(env):
        if isinstance(layer, Monitor):
            layer.needs_reset = True


# Many environments.


def in_worker(action: str, *args: Any) -> tuple[str, Any]:
    """What a worker of a `SubprocVecEnv` calls by `env_method`, which lends no environment to a function.

    The worker's own loop, which calls this, has it. An exception would end the worker: it is returned.
    """
    env = sys._getframe(1).f_locals.get("env")
    try:
        if not isinstance(env, gym.Env):
            return "reason", "the workers of this SubprocVecEnv do not show their environments"
        return "value", _ACTIONS[action](env, *args)
    except Exception:
        return "error", traceback.format_exc()


_ACTIONS: dict[str, Any] = {
    "described": described,
    "why_not_exact": why_not_exact,
    "taken_from": taken_from,
    "put_into": put_into,
    "prepare_restart": prepare_restart,
}


class EnvStates:
    """The state of vectorised environments, wrapped or not.

    Args:
        env: The environments.
        references: What a pickle does not hold.

    Attributes:
        reason: Why they begin new episodes when a run is resumed; empty if they go on exactly.
    """

    def __init__(self, env: VecEnv, references: References) -> None:
        self.env = env
        *wrappers, self._base = vec_layers(env)
        self._wrappers: list[Any] = [
            each if has_pair(each) else Attributes(each, references, skip=("venv", "class_attributes"))
            for each in wrappers
        ]
        self.reason = ""
        if not has_pair(self._base):
            self.reason = next(filter(None, self._on_each("why_not_exact")), "")

    @property
    def description(self) -> str:
        """The layers of the environments in words."""
        wrappers = [type(each.owner if isinstance(each, Attributes) else each).__qualname__ for each in self._wrappers]
        kinds = dict.fromkeys(self._on_each("described"))
        return " of ".join([*wrappers, " and ".join(kinds) or type(self._base).__qualname__])

    @property
    def attributes(self) -> list[Attributes]:
        """Of the wrappers."""
        return [each for each in self._wrappers if isinstance(each, Attributes)]

    def taken(self) -> dict[str, Any]:
        """The state."""
        return {
            "wrappers": [_of_wrapper(each) for each in self._wrappers],
            "exact": not self.reason,
            "base": {} if has_pair(self._base) or self.reason else _data_of(self._base),
            "spaces": space_generators(self._base),
            "envs": getattr(self._base, GET)() if has_pair(self._base) else self._on_each("taken_from"),
        }

    def put(self, state: Mapping[str, Any], *, statistics_only: bool = False) -> None:
        """Take a state over, or that of the wrappers alone; where it is not exact, a reset is to follow."""
        for each, of_it in zip(self._wrappers, state["wrappers"], strict=True):
            _put_wrapper(each, of_it)
        if statistics_only:
            return
        put_space_generators(self._base, state["spaces"])
        if has_pair(self._base):
            getattr(self._base, SET)(state["envs"])
            return
        if state["exact"]:
            vars(self._base).update(state["base"])
        if state["envs"]:
            self._on_each("put_into", state["envs"])

    def restarted(self, seed: int | None) -> Any:
        """Begin new episodes without an effect on running statistics; the first observations."""
        self._on_each("prepare_restart")
        if seed is not None:
            self.env.seed(seed)
        normalizing = [each.owner for each in self.attributes if isinstance(each.owner, VecNormalize)]
        training = [each.training for each in normalizing]
        for each in normalizing:
            each.training = False
        try:
            return self.env.reset()
        finally:
            for each, before in zip(normalizing, training, strict=True):
                each.training = before

    def _on_each(self, action: str, arguments: list[Any] | None = None) -> list[Any]:
        """Do something with each environment, wherever it is."""
        base = self._base
        if isinstance(base, DummyVecEnv):
            given = [()] * base.num_envs if arguments is None else [(each,) for each in arguments]
            return [_ACTIONS[action](env, *each) for env, each in zip(base.envs, given, strict=True)]
        if isinstance(base, SubprocVecEnv):
            return self._in_workers(base, action, arguments)
        kind = f"{type(base).__module__}.{type(base).__qualname__}"
        return [f"{kind} is not known and has no methods `{GET}` and `{SET}`"] if action == "why_not_exact" else []

    @staticmethod
    def _in_workers(base: SubprocVecEnv, action: str, arguments: list[Any] | None) -> list[Any]:
        base.set_attr(IN_WORKERS, in_worker)
        try:
            if arguments is None:
                answers = base.env_method(IN_WORKERS, action)
            else:
                answers = [
                    base.env_method(IN_WORKERS, action, each, indices=[index])[0]
                    for index, each in enumerate(arguments)
                ]
        finally:
            base.env_method("__delattr__", IN_WORKERS)
        for kind, answer in answers:
            if kind == "error":
                raise RuntimeError(f"In a worker of the SubprocVecEnv:\n{answer}")
        if action != "why_not_exact" and any(kind == "reason" for kind, _ in answers):
            return []
        return [answer for _, answer in answers]


def _data_of(base: VecEnv) -> dict[str, Any]:
    return {name: value for name, value in vars(base).items() if name not in ("closed", "waiting") and is_data(value)}


def _of_wrapper(each: Attributes | VecEnvWrapper) -> dict[str, Any]:
    wrapper = each.owner if isinstance(each, Attributes) else each
    state: dict[str, Any] = {"class": type(wrapper).__qualname__, "spaces": space_generators(wrapper)}
    if not isinstance(each, Attributes):
        return state | {"own": getattr(wrapper, GET)()}
    files = {name: _text(value) for name, value in vars(wrapper).items() if isinstance(value, ResultsWriter)}
    return state | {"attributes": each.values(), "files": files}


def _put_wrapper(each: Attributes | VecEnvWrapper, state: Mapping[str, Any]) -> None:
    wrapper = each.owner if isinstance(each, Attributes) else each
    put_space_generators(wrapper, state["spaces"])
    if not isinstance(each, Attributes):
        getattr(wrapper, SET)(state["own"])
        return
    each.put(state["attributes"])
    for name, text in state["files"].items():
        _rewrite(getattr(wrapper, name), text)
