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
    "n" * 200,
)
"""Keys that every store must take, and keep apart."""

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


def longest_key(store: ObjectStore) -> str:
    """A key of as many bytes as S3 takes, 1,024 with the store's own prefix, in names of 127."""
    prefix = store.url.split("/", 3)[3:]
    room = 1024 - (len(prefix[0].strip("/").encode()) + 1 if prefix else 0)
    return ("/".join(["n" * 127] * 8))[:room].rstrip("/")


class KeyTests(Base):
    """A key is the string it is."""

    def test_hard_keys(self, store: ObjectStore) -> None:
        keys = [key for key in (*HARD_KEYS, longest_key(store)) if key not in self.mangled_keys]
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

    def test_odd_keys_are_literal_or_refused(self, store: ObjectStore) -> None:
        others = {"b": b"b", "a/b": b"a/b", "lead": b"lead"}
        for name, value in others.items():
            store.put(name, value)
        for key in ODD_KEYS:
            if key in self.mangled_keys:
                continue
            try:
                store.put(key, b"odd")
            except (StoreError, ConfigError):
                assert not self._is_there(store, key), key
            else:
                assert store.get(key) == b"odd", key
                assert store.head(key).key == key
                assert key in [entry.key for entry in store.list()]
                assert store.get(store.copy(key, "copy").key) == b"odd"
                store.delete(key)
                store.delete("copy")
                assert not store.exists(key), key
            found = {entry.key: store.get(entry.key) for entry in store.list()}
            assert found == others, f"{key!r} touched another key"

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
