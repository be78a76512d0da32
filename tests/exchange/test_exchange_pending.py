"""What `put_object` of a writer returns shows what it holds, however one looks, though its upload may still be under way."""

from __future__ import annotations

import copy
import io
import json
import pickle
import pprint
import threading
from collections.abc import Callable
from typing import Any

import msgpack
import pandas as pd
import pyarrow as pa
import pytest
import simplejson
from exchange_helpers import watched

from s3loader import S3ExchangeStore, ShardSizePolicy
from s3loader.errors import NoSpaceError, S3LoaderError

META = {"labels": [1, 2], "b": {"c": None}}


def dumped(entry: Any, **options: Any) -> Any:
    file = io.StringIO()
    json.dump(entry, file, **options)
    return json.loads(file.getvalue())


def matched(entry: Any) -> Any:
    match entry:
        case {"kind": "file", **rest}:
            return {"kind": "file", **rest}


def updated(entry: Any) -> Any:
    result: dict[str, Any] = {}
    result.update(entry)
    return result


def merged(entry: Any) -> Any:
    result: dict[str, Any] = {"key": 0}
    result |= entry
    return result


LOOKS: dict[str, Callable[[Any], Any]] = {
    "json": lambda e: json.loads(json.dumps(e)),
    "json sorted": lambda e: json.loads(json.dumps(e, sort_keys=True)),
    "json indented": lambda e: json.loads(json.dumps(e, indent=1)),
    "json nested": lambda e: json.loads(json.dumps([{"entry": e}]))[0]["entry"],
    "json to a file": dumped,
    "json to a file, indented": lambda e: dumped(e, indent=2, sort_keys=True),
    "simplejson": lambda e: json.loads(simplejson.dumps(e)),
    "msgpack": lambda e: msgpack.unpackb(msgpack.packb(e)),
    "pandas": lambda e: pd.DataFrame([e]).to_dict("records")[0],
    "pandas series": lambda e: dict(pd.Series(e)),
    "arrow": lambda e: pa.Table.from_pylist([e]).to_pylist()[0],
    "repr": lambda e: eval(repr(e)),
    "str": lambda e: eval(str(e)),
    "format": lambda e: eval(f"{e}"),
    "pprint": lambda e: eval(pprint.pformat(e)),
    "dict": dict,
    "**": lambda e: {**e},
    "keywords": lambda e: dict(**e),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    ".copy": lambda e: e.copy(),
    "pickle": lambda e: pickle.loads(pickle.dumps(e)),
    "pickle 0": lambda e: pickle.loads(pickle.dumps(e, 0)),
    "e | {}": lambda e: e | {},
    "{} | e": lambda e: {} | e,
    "{} |= e": merged,
    "update": updated,
    "items": lambda e: dict(e.items()),
    "keys": lambda e: {name: e[name] for name in list(e.keys())},
    "iter": lambda e: {name: e.get(name) for name in e},
    "values": lambda e: dict(zip(list(e), e.values(), strict=True)),
    "reversed": lambda e: {name: e[name] for name in reversed(e)},
    "match": matched,
    "sorted": lambda e: dict(sorted(e.items())),
    "zip": lambda e: dict(zip(e, e.values(), strict=True)),
    "setdefault": lambda e: {**e, "etag": e.setdefault("etag", "none")},
    "pop": lambda e: {"etag": e.pop("etag"), **e},
    "popitem": lambda e: dict([e.popitem(), *e.items()]),
    "format_map": lambda e: {**e, "etag": "{etag}".format_map(e)},
}


@pytest.fixture
def entries(store: S3ExchangeStore) -> Any:
    """Entries nobody has looked at, and afterwards what the manifest says."""
    with store.open_manifest_writer("d/m.jsonl") as writer:
        yield lambda: writer.put_object("d/k", b"12345", id="x", meta=META, content_type="text/plain")


def expected(store: S3ExchangeStore) -> dict[str, Any]:
    described = store.objects.head("d/k")
    fields = {"kind": "file", "key": "d/k", "id": "x", "meta": META, "content_type": "text/plain", "size_bytes": 5}
    return {**fields, "etag": described.etag}


@pytest.mark.parametrize("how", LOOKS)
def test_whoever_looks_first_sees_all_of_it(how: str, store: S3ExchangeStore, entries: Any) -> None:
    seen = LOOKS[how](entries())
    assert seen == expected(store)


def test_what_is_changed_before_anybody_has_looked_stays_changed(store: S3ExchangeStore, entries: Any) -> None:
    changes: list[tuple[Callable[[Any], Any], dict[str, Any]]] = [
        (lambda e: e.__setitem__("etag", "mine"), {"etag": "mine"}),
        (lambda e: e.update(etag="mine", more=1), {"etag": "mine", "more": 1}),
        (lambda e: e.__ior__({"etag": "mine"}), {"etag": "mine"}),
        (lambda e: e["meta"].__setitem__("labels", 3), {"meta": {**META, "labels": 3}}),
    ]
    for change, difference in changes:
        entry = entries()
        change(entry)
        assert entry == {**expected(store), **difference}
    entry = entries()
    del entry["etag"]
    assert sorted(entry) == ["content_type", "id", "key", "kind", "meta", "size_bytes"]
    entry = entries()
    entry.clear()
    assert entry == {}
    assert json.dumps(entry) == "{}"
    assert type(entries() | {}) is type({} | entries()) is type(entries().copy()) is dict
    assert ({"etag": "given", "more": 1} | entries()) == {**expected(store), "more": 1}
    assert (entries() | {"etag": "given"}) == {**expected(store), "etag": "given"}
    assert (entries() | entries()) == expected(store)


def test_every_method_of_a_dict_waits(store: S3ExchangeStore, entries: Any) -> None:
    read_no_items = {"__hash__", "__new__", "__reduce_ex__", "__sizeof__", "__str__", "__class_getitem__", "fromkeys"}
    read_no_items |= {"__lt__", "__le__", "__gt__", "__ge__", "__init__", "__getattribute__"}
    kind = type(entries())
    assert [name for name in vars(dict) if name not in read_no_items and getattr(kind, name) == getattr(dict, name)] == []


def test_what_a_caller_changes_afterwards_is_not_written(store: S3ExchangeStore) -> None:
    seen, backend = watched(store.objects)
    gate = threading.Event()
    backend.on_put = lambda key, data, mode: key.startswith("k") and gate.wait() and None
    meta = {"numbers": [1]}
    with S3ExchangeStore(seen).open_manifest_writer("m.jsonl") as writer:
        first = writer.put_object("k", b"x", meta=meta)
        meta["numbers"].append(2)
        gate.set()
        assert first["meta"] == {"numbers": [1]}
        first["meta"]["numbers"].append(3)
    assert [entry["meta"] for entry in store.iter_manifest_entries("m.jsonl")] == [{"numbers": [1]}]


def test_comparing_waits(store: S3ExchangeStore) -> None:
    with store.open_manifest_writer("m.jsonl") as writer:
        entry: Any = writer.put_object("d/k", b"12345")
        writer.stats()  # its upload has ended, and nobody has looked
        same = {**writer.add_file("d/k", id="k", size_bytes=5), "etag": store.objects.head("d/k").etag}
        assert (entry != same) is False
        assert (entry == {**same, "size_bytes": 6}) is False


@pytest.mark.parametrize("how", ["json", "repr", "**", "pickle", "{} | e", "match", "msgpack"])
def test_the_error_of_an_upload_is_seen_by_whoever_looks(how: str, store: S3ExchangeStore) -> None:
    seen, backend = watched(store.objects)
    gate = threading.Event()

    def full(key: str, data: Any, mode: Any) -> None:
        gate.wait()
        raise NoSpaceError("disk full", op="put", url=key)

    backend.on_put = full
    writer = S3ExchangeStore(seen).open_manifest_writer("m.jsonl")
    entry: Any = writer.put_object("k", b"x")
    gate.set()
    for _ in range(2):
        with pytest.raises(NoSpaceError, match="disk full"):
            LOOKS[how](entry)
    writer.abandon()


def test_what_reads_past_the_methods_cannot_take_half_an_entry_for_a_whole_one(store: S3ExchangeStore) -> None:
    seen, backend = watched(store.objects)
    gate = threading.Event()
    backend.on_put = lambda key, data, mode: key == "k" and gate.wait() and None
    with S3ExchangeStore(seen).open_manifest_writer("m.jsonl") as writer:
        entry: Any = writer.put_object("k", b"x")
        raw: Any = dict(zip(dict.keys(entry), dict.values(entry), strict=True))
        try:
            assert {name: raw[name] for name in raw if name != "etag"} == {
                "kind": "file", "key": "k", "id": "k", "meta": None, "content_type": None, "size_bytes": 1,
            }  # fmt: skip
            with pytest.raises(TypeError, match="not JSON serializable"):
                json.dumps(raw)
            with pytest.raises(pa.ArrowInvalid, match="not known before the upload has ended"):
                pa.array([entry])
            with pytest.raises(S3LoaderError, match="upload was under way"):
                copy.deepcopy(raw)
        finally:
            gate.set()


def test_a_shard_shows_its_entry(store: S3ExchangeStore) -> None:
    with store.open_manifest_writer("m.jsonl", shard_size=ShardSizePolicy(max_samples=9)) as writer:
        writer.add_sample("a", {"txt": b"1"})
        entry = writer.flush_shard()
    assert entry is not None
    shard = store.get_shard(entry["archive_key"])
    assert dict(shard) == {**shard} == dict(shard.items()) == {name: shard[name] for name in shard} == shard.entry
    assert copy.copy(shard) == shard == shard.entry
    assert json.loads(json.dumps(dict(shard))) == shard.entry
