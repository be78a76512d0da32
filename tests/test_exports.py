"""The package root is a table of contents: sorted, complete, lazy, and every name resolves."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path

import pytest

import s3loader

STUB = Path(s3loader.__file__).with_suffix(".pyi")
FACADES = ["s3loader.s3", "s3loader.torch", "s3loader.tensorflow", "s3loader.jax", "s3loader.ray"]


def test_names_are_sorted_and_resolve() -> None:
    assert list(s3loader.__all__) == sorted(s3loader.__all__)
    for name in s3loader.__all__:
        assert getattr(s3loader, name) is not None
    assert set(s3loader.__all__) <= set(dir(s3loader))


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = s3loader.no_such_name  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("facade", FACADES)
def test_facade_names_resolve(facade: str) -> None:
    if facade == "s3loader.ray":
        pytest.importorskip("ray", reason="Ray is not installed: pip install 's3loader[ray]'")
    module = importlib.import_module(facade)
    assert list(module.__all__) == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None


def stub() -> str:
    """What type checkers and editors see of `s3loader`, from its table."""
    lines = ["# Written by tests/test_exports.py from the table in __init__.py.", "# ruff: noqa: I001", "# fmt: off"]
    for module, names in sorted(s3loader._NAMES.items()):
        listed = ", ".join(f"{name} as {name}" for name in sorted(names.split()))
        lines += [f"from s3loader.{module} import (", *(f"    {line}" for line in textwrap.wrap(listed, 120)), ")"]
    return "\n".join([*lines, "", "__version__: str", "__all__: list[str]", "_NAMES: dict[str, str]", ""])


def test_type_checkers_see_the_same_names() -> None:
    assert STUB.read_text() == stub(), "python tests/test_exports.py writes it anew"


def test_a_name_stands_once_in_the_table() -> None:
    names = [name for part in s3loader._NAMES.values() for name in part.split()]
    assert len(names) == len(set(names)) == len(s3loader.__all__)


if __name__ == "__main__":
    STUB.write_text(stub())
