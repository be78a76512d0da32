"""Keys: literal, whatever they hold."""

from __future__ import annotations

from typing import Final

import pytest

from s3loader.errors import ConfigError, StoreError
from s3loader.store import ObjectStore
from s3loader.testing.suite._base import Base

__all__ = ["HARD_KEYS", "ODD_KEYS", "KeyTests"]

HARD_KEYS: Final = (
    "plain",
    "a b",
    "a  b ",
    " a",
    "a+b",
    "a#b",
    "a?b=c&d",
    "a%20b",
    "a%2Fb",
    "100%",
    "%zz",
    "a'b\"c",
    "a;b:c,d@e=f$g!h(i)*j~k",
    "a|b\\c^d`e{f}[g]<h>",
    "x&amp;y<z>",
    "ünïcödé/日本語/🙂",
    "e\u0301",
    "\u00e9",
    ".hidden/.x",
    "a...b/c..",
    "a=b/c=1.5/part-0",
    "-",
    "0",
    "CON",
    "/".join(["n" * 127] * 8),
)
"""Keys that every store must take, and keep apart. The last is 1,023 bytes long."""

ODD_KEYS: Final = (
    "a//b",
    "/lead",
    "trail/",
    "a/../b",
    "../a",
    "..",
    ".",
    "./a",
    "a/.",
    "a/./b",
    "tab\tkey",
    "n" * 1024,
    "n" * 1025,
)
"""Keys that some stores cannot have, or none should: literal, or refused with an error."""


class KeyTests(Base):
    """A key is the string it is."""

    def test_hard_keys(self, store: ObjectStore) -> None:
        keys = [key for key in HARD_KEYS if key not in self.mangled_keys]
        for key in keys:
            store.put(key, key.encode())
        for key in keys:
            assert store.get(key) == key.encode(), key
            assert store.head(key).key == key
            assert store.get_range(key, 0, 1) == key.encode()[:1]
        assert [entry.key for entry in store.list()] == sorted(keys, key=str.encode)
        for key in keys:
            assert key in [entry.key for entry in store.list(key)], key
        assert [bytes(result.data) for result in store.get_many(keys)] == [key.encode() for key in keys]
        assert store.delete_many(keys[::2]) == []
        for key in keys[1::2]:
            store.delete(key)
        assert list(store.list()) == []

    @pytest.mark.parametrize("key", ODD_KEYS, ids=lambda key: repr(key[:12]))
    def test_odd_keys_are_literal_or_refused(self, store: ObjectStore, key: str) -> None:
        if key in self.mangled_keys:
            pytest.skip("the server itself changes this key")
        others = {"b": b"b", "a/b": b"a/b", "lead": b"lead", "trail": b"trail"}
        others = {name: value for name, value in others.items() if name.rstrip("/") != key.rstrip("/")}
        for name, value in others.items():
            store.put(name, value)
        try:
            store.put(key, b"odd")
        except (StoreError, ConfigError):
            assert not self._is_there(store, key)
        else:
            assert store.get(key) == b"odd"
            assert store.head(key).key == key
            assert key in [entry.key for entry in store.list()]
            copied = store.copy(key, "copy")
            assert store.get(copied.key) == b"odd"
            store.delete(key)
            assert not store.exists(key)
            store.delete("copy")
        assert {entry.key: store.get(entry.key) for entry in store.list()} == others, "another key was touched"

    @staticmethod
    def _is_there(store: ObjectStore, key: str) -> bool:
        try:
            return store.exists(key)
        except (StoreError, ConfigError):
            return False

    def test_the_empty_key_is_refused(self, store: ObjectStore) -> None:
        for call in (lambda: store.put("", b"x"), lambda: store.get(""), lambda: store.head(""), lambda: store.delete("")):
            with pytest.raises((StoreError, ConfigError)):
                call()
        assert list(store.list()) == []
