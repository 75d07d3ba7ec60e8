"""What of an object's attributes is state: what its constructor was not given, and what has changed since."""

from __future__ import annotations

import inspect
import io
import pickle
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from hashlib import sha256
from random import Random
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

CODE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, type, partial, property)
"""What an attribute holds that is code, not state."""

NUMBERS = (bool, int, float, complex, str, bytes, bytearray, type(None), np.generic, Tensor)
CONTAINERS = (tuple, list, set, frozenset, deque)
GENERATORS = (np.random.Generator, np.random.BitGenerator, np.random.RandomState, Random)

LIBRARIES = ("gymnasium", "stable_baselines3", "sb3_contrib")
"""Whose small helper objects (running means, stacked frames) are data where their attributes are."""

NOT_HELPERS = (spaces.Space, gym.Env, VecEnv)


class References:
    """Objects that are there on both sides, such as the model: a pickle names them and does not hold them.

    Args:
        objects: By name.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = dict(objects)
        self._names = {id(each): name for name, each in objects.items() if each is not None}

    def dumps(self, value: Any) -> bytes:
        """Pickle a value."""
        file = io.BytesIO()
        _Pickler(file, self._names).dump(value)
        return file.getvalue()

    def loads(self, data: bytes) -> Any:
        """Read what `dumps` made, perhaps with other objects of the same names."""
        return _Unpickler(io.BytesIO(data), self._objects).load()

    def can_hold(self, value: Any) -> bool:
        """Whether a value can be pickled."""
        try:
            self.dumps(value)
        except Exception:  # any object may have its own way to refuse
            return False
        return True


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: Any, names: Mapping[int, str]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._names = names

    def persistent_id(self, obj: Any) -> str | None:
        return self._names.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.device.type != "cpu":
            return _on_device, (obj.detach().cpu(), str(obj.device))
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, objects: Mapping[str, Any]) -> None:
        super().__init__(file)
        self._objects = objects

    def persistent_load(self, name: Any) -> Any:
        try:
            return self._objects[name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to `{name}`, which is not there") from None


def _on_device(tensor: Tensor, device: str) -> Tensor:
    """A tensor where it was, or on the CPU where there is no such device."""
    try:
        return tensor.to(device)
    except (RuntimeError, AssertionError):
        return tensor


DEEPEST = 20
"""Containers in containers that are looked into; there could be a circle."""


def is_data(value: Any, depth: int = 0) -> bool:
    """Whether a value is numbers, texts, arrays and random generators, in containers or not: nothing hides in it."""
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject
    if isinstance(value, (*NUMBERS, *GENERATORS)):
        return True
    depth += 1
    if depth > DEEPEST:
        return False
    if isinstance(value, dict):
        return all(is_data(key, depth) and is_data(each, depth) for key, each in value.items())
    if isinstance(value, CONTAINERS):
        return all(is_data(each, depth) for each in value)
    if type(value).__module__.split(".")[0] not in LIBRARIES or isinstance(value, NOT_HELPERS) or callable(value):
        return False
    return hasattr(value, "__dict__") and is_data(vars(value), depth)


def parameters_of(kind: type) -> set[str]:
    """Names of what the constructors of a class and of its parents take."""
    names: set[str] = set()
    for each in kind.__mro__:
        if each is not object and "__init__" in vars(each):
            names |= set(inspect.signature(each.__init__).parameters)  # type: ignore[misc]
    return names - {"self", "args", "kwargs"}


class Attributes:
    """The attributes of an object that a run changes.

    What is named like an argument of its constructor is given by whoever makes the object again: it belongs to the
    state only if it has changed since this was made (or if a checkpoint says so). Code is never state. All else is, if
    it can be pickled.

    Args:
        owner: The object.
        references: What a pickle does not hold.
        skip: Attributes that are taken care of elsewhere.
        given: Attributes that the constructor makes of its arguments, beside those that have their names.
        changing: Arguments that training changes by itself.
    """

    def __init__(
        self,
        owner: Any,
        references: References,
        *,
        skip: Iterable[str] = (),
        given: Iterable[str] = (),
        changing: Iterable[str] = (),
    ) -> None:
        self.owner = owner
        self._references = references
        self._skip = set(skip)
        self._given = (parameters_of(type(owner)) | set(given)) - set(changing)
        self._unable: set[str] = set()
        given_now = {name: value for name, value in vars(owner).items() if self._is_given(name)}
        self._before = {name: self._digest(value) for name, value in given_now.items()}
        self._functions = {name: value for name, value in given_now.items() if callable(value)}
        self._brought: set[str] = set()

    def values(self) -> dict[str, Any]:
        """The attributes that are state, not copied."""
        return {name: value for name, value in vars(self.owner).items() if self._is_state(name, value)}

    def put(self, values: Mapping[str, Any]) -> None:
        """Give the object such attributes; a list that its constructor was given, and who gave it reads, is filled."""
        self._brought |= values.keys()
        for name, value in values.items():
            now = vars(self.owner).get(name)
            if self._is_given(name) and type(now) is type(value) is list:
                now[:] = value
            else:
                vars(self.owner)[name] = value

    def leave_out_what_cannot_be_pickled(self) -> None:
        """Look for values that cannot be pickled; `values` is without them from now on."""
        self._unable |= {name for name, value in self.values().items() if not self._references.can_hold(value)}

    @property
    def left_out(self) -> dict[str, str]:
        """Attributes that cannot be pickled, with their types."""
        return {name: type(vars(self.owner)[name]).__name__ for name in self._unable if name in vars(self.owner)}

    def _is_given(self, name: str) -> bool:
        return name not in self._skip and (name in self._given or name.lstrip("_") in self._given)

    def _is_state(self, name: str, value: Any) -> bool:
        if name in self._skip or name in self._unable:
            return False
        if self._is_given(name):
            if value is self._functions.get(name, self):
                return False  # whatever the function has seen since
            return name in self._brought or self._digest(value) != self._before.get(name)
        return not isinstance(value, (*CODE, spaces.Space))

    def _digest(self, value: Any) -> bytes | None:
        try:
            return sha256(self._references.dumps(value)).digest()
        except Exception:  # any object may have its own way to refuse
            return None


def space_generators(owner: Any) -> dict[str, Any]:
    """The random generators of the spaces that are attributes of an object, by path."""
    found: dict[str, Any] = {}
    for path, space in _spaces_in(vars(owner), ""):
        if space._np_random is not None:
            found[path] = space._np_random.bit_generator.state
    return found


def put_space_generators(owner: Any, states: Mapping[str, Any]) -> None:
    """Let the spaces of an object draw on from there."""
    for path, space in _spaces_in(vars(owner), ""):
        if path in states:
            space.np_random.bit_generator.state = states[path]


def _spaces_in(values: Mapping[Any, Any], path: str) -> Iterable[tuple[str, spaces.Space]]:
    for name, value in values.items():
        here = f"{path}.{name}"
        if isinstance(value, spaces.Space):
            yield here, value
            yield from _spaces_in(vars(value), here)
        elif path and isinstance(value, dict):  # the parts of a space
            yield from _spaces_in(value, here)
        elif path and isinstance(value, (tuple, list)):
            yield from _spaces_in(dict(enumerate(value)), here)
