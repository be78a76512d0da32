"""Containers and objects taken apart one level, the same way when they are saved and when they are restored into.

The registries of the frameworks in use are asked first (`jax.tree_util`, `torch.utils._pytree`): what is a child, what is
part of the type, and how a new one is made is theirs to say. Then come Python's own containers and their subclasses, then
objects with state, then plain dataclasses, which are made anew without their constructor: it has run once already.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from s3loader.checkpoint.state.leaves import Opened, WithState, framework_for, framework_with_state, registered
from s3loader.errors import CheckpointError, S3LoaderError

__all__ = ["Opened", "WithState", "loading", "open_container", "open_object", "with_fields", "with_variables"]

_MAPPINGS: Final[dict[type, tuple[str, Callable[[dict[Any, Any]], Any]]]] = {
    dict: ("dict", dict),
    OrderedDict: ("odict", OrderedDict),
    Counter: ("counter", Counter),
}


def open_container(value: Any) -> Opened | None:
    """What lies directly in a container; None for anything else."""
    kind = type(value)
    if kind in _MAPPINGS:
        tag, make = _MAPPINGS[kind]
        return Opened(tag, dict(value), make)
    if kind is list or kind is tuple:
        return Opened(kind.__name__, dict(enumerate(value)), lambda values: kind(values.values()), fixed=kind is tuple)
    if framework_constant(value) is not None:
        return None
    if (node := registered(value)) is not None:
        return node
    if isinstance(value, tuple):
        return _tuple(value)
    if isinstance(value, list | deque):
        return Opened("list", dict(enumerate(value)), lambda values: _refilled(value, list(values.values())))
    if isinstance(value, Mapping):
        tag = next((tag for base, (tag, _) in _MAPPINGS.items() if base is not dict and isinstance(value, base)), "dict")
        return Opened(tag, dict(value), lambda values: _refilled(value, values))
    if _is_dataclass(value) and not _is_stateful(value) and framework_with_state(value) is None:
        children = {name: getattr(value, name) for name in _state_fields(value)}
        rest = frozenset(field.name for field in dataclasses.fields(value)) - children.keys()
        return Opened("dict", children, lambda values: with_fields(value, values), fixed=True, named=True, rest=rest)
    return None


def open_object(value: Any) -> WithState | None:
    """The state of an object; None for anything else."""
    known = framework_with_state(value)
    if known is not None:
        return known
    if not _is_stateful(value):
        return None

    def load(state: Any, name: str, in_place: bool) -> Any:
        with loading(value, name):
            value.load_state_dict(state)
        return value

    return WithState(value.state_dict(), load)


@contextlib.contextmanager
def loading(value: Any, name: str) -> Iterator[None]:
    """What an object raises that does not take a state, with the object's name in the checkpoint."""
    try:
        yield
    except S3LoaderError:
        raise
    except Exception as error:  # whatever a foreign class raises
        raise CheckpointError(
            f"{name!r}: the {type(value).__qualname__} of the target does not take what was saved: "
            f"{type(error).__name__}: {error}",
            hint="give an object of the structure that was saved; `s3loader ckpt inspect` lists it",
        ) from error


def _is_stateful(value: Any) -> bool:
    methods = (getattr(value, name, None) for name in ("state_dict", "load_state_dict"))
    return not isinstance(value, type) and all(map(callable, methods))


def framework_constant(value: Any) -> tuple[str, Any] | None:
    """A small constant of a framework (a dtype, a device) as its tag and JSON; None for anything else."""
    framework = framework_for(value)
    return framework.encode(value) if framework is not None else None


def _tuple(value: tuple[Any, ...]) -> Opened:
    def make(values: Mapping[Any, Any]) -> Any:
        made = tuple.__new__(type(value), values.values())
        if hasattr(value, "__dict__"):
            made.__dict__.update(vars(value))
        return made

    fields: tuple[str, ...] | None = getattr(value, "_fields", None)
    if fields is None:
        return Opened("tuple", dict(enumerate(value)), make, fixed=True)
    return Opened("namedtuple", dict(zip(fields, value, strict=True)), make, fixed=True, named=True)


def _refilled(value: Any, values: Any) -> Any:
    """A container like `value`, a subclass of one of Python's, with other contents."""
    try:
        if isinstance(value, deque):
            made: Any = copy.copy(value)
            made.clear()
            made.extend(values)
        elif isinstance(value, MutableMapping):
            made = copy.copy(value)
            made.clear()
            made.update(values)
        elif isinstance(value, list):
            made = copy.copy(value)
            made[:] = values
        else:
            made = MappingProxyType(values) if isinstance(value, MappingProxyType) else type(value)(values)
    except Exception as error:  # whatever a foreign class raises
        raise CheckpointError(
            f"a {type(value).__qualname__} cannot be made with other contents: {type(error).__name__}: {error}",
            hint="give a dict or a list in its place, and convert what comes back",
        ) from error
    return made


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _state_fields(value: Any) -> list[str]:
    """Names of a dataclass's fields, but those that it marks as no state: flax's ``pytree_node=False``, JAX's and equinox's
    ``static=True``."""
    return [
        field.name
        for field in dataclasses.fields(value)
        if field.metadata.get("pytree_node", True) and not field.metadata.get("static", False)
    ]


def with_fields(value: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass like `value` with other values in some fields; no constructor runs, and it may be frozen."""
    made = object.__new__(type(value))
    kept = [*_slots(type(value)), *getattr(value, "__dict__", ())]
    for name in kept:
        if hasattr(value, name):
            object.__setattr__(made, name, getattr(value, name))
    for name, item in values.items():
        object.__setattr__(made, name, item)
    return made


def _slots(kind: type) -> Sequence[str]:
    names: list[str] = []
    for cls in kind.__mro__:
        slots = cls.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def with_variables(value: Any, variables: Mapping[str, Any]) -> WithState:
    """`value`, restored by assigning to each of its `variables`; it must have those that were saved, and no others."""

    def load(state: Any, name: str, in_place: bool) -> Any:
        missing, extra = sorted(variables.keys() - state.keys()), sorted(state.keys() - variables.keys())
        if missing or extra:
            raise CheckpointError(
                f"{name!r}, a {type(value).__name__}: the checkpoint lacks {missing[:3]} and has {extra[:3]} beside what the "
                "object has",
                hint="build it before restoring: model.build(...), optimizer.build(model.trainable_variables)",
            )
        return value

    return WithState(dict(variables), load, in_place=True)
