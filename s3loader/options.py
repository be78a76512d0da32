"""Frozen options: how a class of them is filled, how its values are checked, and how a changed copy is made."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar, get_args

from s3loader.arguments import whole_number
from s3loader.errors import ConfigError

__all__ = ["at_least", "changed", "fill", "one_of"]

T = TypeVar("T")


def fill(options: Any, **values: Any) -> None:
    """Set the fields of a frozen dataclass, in its own constructor."""
    for name, value in values.items():
        object.__setattr__(options, name, value)


def changed(options: T, changes: dict[str, Any]) -> T:
    """A copy of a dataclass with other values, checked like any other.

    Raises:
        ConfigError: a value is out of range, or there is no such option.
    """
    kept = {field.name: getattr(options, field.name) for field in fields(options)}  # type: ignore[arg-type]
    return type(options)(**{**kept, **changes})


def one_of(name: str, value: Any, choices: Any, hint: str = "leave it out for the default") -> Any:
    """`value`, if it is one of these.

    Args:
        name: Of the option.
        value: What was given.
        choices: A `Literal`, or a tuple.
        hint: What to do otherwise.

    Raises:
        ConfigError: it is not.
    """
    allowed = choices if isinstance(choices, tuple) else get_args(choices)
    if value not in allowed:
        said = ", ".join("None" if choice is None else f'"{choice}"' for choice in allowed)
        raise ConfigError(f"{name} must be one of {said}, not {value!r}", hint=hint)
    return value


def at_least(name: str, value: Any, least: int = 1, hint: str = "leave it out for the default") -> int:
    """`value`, if it is a whole number from `least` up.

    Raises:
        ConfigError: it is not.
    """
    found = whole_number(value)
    if found is None or found < least:
        raise ConfigError(f"{name} must be a whole number from {least} up, not {value!r}", hint=hint)
    return found
