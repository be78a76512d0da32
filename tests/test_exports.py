"""The package root is a table of contents: sorted, complete, lazy, and every name resolves."""

from __future__ import annotations

import importlib

import pytest

import s3loader

FACADES = ["s3loader.torch", "s3loader.tensorflow", "s3loader.jax"]


def test_names_are_sorted_and_resolve() -> None:
    assert list(s3loader.__all__) == sorted(s3loader.__all__)
    for name in s3loader.__all__:
        assert getattr(s3loader, name) is not None
    assert set(s3loader.__all__) <= set(dir(s3loader))


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = s3loader.no_such_name


@pytest.mark.parametrize("facade", FACADES)
def test_facade_names_resolve(facade: str) -> None:
    module = importlib.import_module(facade)
    assert list(module.__all__) == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
