"""Keys: literal, whatever they hold; and listings of them: complete, in order, lazily."""

from __future__ import annotations

import itertools
from typing import Final

import pytest

from s3loader.errors import ConfigError, StoreError
from s3loader.store import ObjectStore
from s3loader.testing.suite._base import Base
from s3loader.types import CommonPrefix, ObjectMeta

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


# -- listings --------------------------------------------------------------------------------------


def keys_of(store: ObjectStore, prefix: str = "", **options: str) -> list[str]:
    """The keys of a listing; those of common prefixes too."""
    return [entry.key for entry in store.list(prefix, **options)]


class ListTests(Base):
    """Every key once, by its UTF-8 bytes."""

    def test_empty(self, store: ObjectStore) -> None:
        assert keys_of(store) == []
        assert keys_of(store, "no/such/") == []
        assert keys_of(store, delimiter="/") == []

    def test_entries_say_what_head_says(self, store: ObjectStore) -> None:
        store.put("x/one", b"1")
        store.put("x/three", b"333")
        for entry in store.list("x/"):
            assert isinstance(entry, ObjectMeta)
            meta = store.head(entry.key)
            assert (entry.size, entry.etag) == (meta.size, meta.etag)
            assert (entry.last_modified is None) == (meta.last_modified is None)

    def test_order_is_that_of_bytes(self, store: ObjectStore) -> None:
        keys = ["B", "a!", "a-b", "a.b", "a/b", "a0", "b/c/d", "b/c0", "b0/c", "z", "é", "\u00ff", "\ufb01", "🙂"]
        keys = [key for key in keys if key not in self.mangled_keys]
        for key in reversed(keys):
            store.put(key, b"")
        assert keys_of(store) == sorted(keys, key=str.encode)

    def test_prefix_is_a_string_not_a_folder(self, store: ObjectStore) -> None:
        for key in ("a", "ab/c", "ab/d/e", "abc", "b"):
            store.put(key, b"")
        assert keys_of(store, "ab") == ["ab/c", "ab/d/e", "abc"]
        assert keys_of(store, "ab/") == ["ab/c", "ab/d/e"]
        assert keys_of(store, "ab/d") == ["ab/d/e"]
        assert keys_of(store, "abc") == ["abc"]
        assert keys_of(store, "abcd") == []

    def test_delimiter(self, store: ObjectStore) -> None:
        keys = ["a", "b-1/x", "b-1/y/z", "b-2/x", "c/d/e", "c/f"]
        for key in keys:
            store.put(key, b"")
        assert keys_of(store, delimiter="/") == ["a", "b-1/", "b-2/", "c/"]
        entries = list(store.list("c/", delimiter="/"))
        assert [type(entry) for entry in entries] == [CommonPrefix, ObjectMeta]
        assert [entry.key for entry in entries] == ["c/d/", "c/f"]
        assert keys_of(store, "b", delimiter="/") == ["b-1/", "b-2/"]
        assert keys_of(store, "b-1", delimiter="/") == ["b-1/"]
        if "-" in self.delimiters:
            assert keys_of(store, delimiter="-") == ["a", "b-", "c/d/e", "c/f"]
            assert keys_of(store, "b-", delimiter="/") == ["b-1/", "b-2/"]

    def test_start_after(self, store: ObjectStore) -> None:
        keys = ["a", "a/b", "b/c", "b/d"] if "a" in self.mangled_keys else ["a", "a.b", "b/c", "b/d"]
        for key in keys:
            store.put(key, b"")
        assert keys_of(store, start_after="a") == keys[1:]
        assert keys_of(store, start_after="a0") == keys[2:], "the key need not exist"
        assert keys_of(store, "b/", start_after="b/c") == ["b/d"]
        assert keys_of(store, "b/", start_after="a") == ["b/c", "b/d"]
        assert keys_of(store, start_after="b/d") == []
        assert keys_of(store, delimiter="/", start_after="a") == ["a.b", "b/"]

    def test_more_than_a_page(self, crowded: ObjectStore) -> None:
        keys = self.crowd()
        assert keys_of(crowded) == keys
        assert keys_of(crowded, "many/") == keys[:1003]
        assert keys_of(crowded, start_after="many/0500") == keys[501:]
        assert keys_of(crowded, delimiter="/") == ["many/", "other/"]
        assert keys_of(crowded, "other/", delimiter="/") == [f"other/{number:02}/" for number in range(51)]
        assert keys_of(crowded, "many/1", delimiter="/") == ["many/1000", "many/1001", "many/1002"]

    def test_may_be_left_early(self, crowded: ObjectStore) -> None:
        for _ in range(3):
            assert [entry.key for entry in itertools.islice(crowded.list(), 5)] == self.crowd()[:5]

    def test_two_listings_at_once(self, crowded: ObjectStore) -> None:
        pairs = zip(crowded.list("many/"), crowded.list("many/"), strict=True)
        assert all(one.key == two.key for one, two in itertools.islice(pairs, 1002))

    def test_deleting_what_is_listed(self, store: ObjectStore) -> None:
        keys = [f"k{i}" for i in range(20)]
        for key in keys:
            store.put(key, b"")
        for entry in store.list():
            store.delete(entry.key)
        assert keys_of(store) == []
