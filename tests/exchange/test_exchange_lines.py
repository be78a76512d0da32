"""Manifest lines and manifests: byte for byte the first system's, and every input an entry or a typed error."""

from __future__ import annotations

import io
import json
import math
import uuid
from typing import Any

import pytest
from exchange_helpers import files, watched
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader import (
    Manifest,
    ManifestNotFoundError,
    S3ExchangeStore,
    ShardSizePolicy,
    infer_id_from_key,
    normalize_key,
    open_store,
)
from s3loader.errors import ConfigError, InvalidManifestError
from s3loader.exchange import encode_manifest, iter_manifest, lines, parse_line, serialize_entry
from s3loader.exchange.keys import is_shard_key, is_sidecar_key, split_virtual_key
from s3loader.exchange.lines import iter_entries

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.one_of(
    st.fixed_dictionaries({"kind": st.just("file"), "key": st.text()}, optional={"id": st.text(), "meta": VALUES, "x": VALUES}),
    st.fixed_dictionaries({"kind": st.just("shard"), "archive_key": st.text()}, optional={"count": st.integers()}),
    st.fixed_dictionaries({"kind": st.just("manifest_ref"), "key": st.text()}),
)


def same(a: Any, b: Any) -> bool:
    """Equality in which NaN is itself."""
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(ENTRIES)
@settings(max_examples=100, deadline=None)
def test_a_line_is_json_dumps_and_reads_back(entry: Any) -> None:
    line = serialize_entry(entry)
    assert line == json.dumps(entry, separators=(",", ":"))
    assert line.isascii()
    assert "\n" not in line
    assert same(parse_line(line, 1), entry)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "Line 7: Empty line"),
        ("  \t", "Line 7: Empty line"),
        ("{", "Line 7: Invalid JSON: "),
        ("[1]", "Line 7: Invalid JSON: an object was expected, not list"),
        ("{}", "Line 7: Missing 'kind' field"),
        ('{"kind":"x"}', "Line 7: Unknown entry kind: x"),
        ('{"kind":["file"],"key":"k"}', "Line 7: Unknown entry kind: "),
        ('{"kind":"file"}', "Line 7: File entry missing 'key'"),
        ('{"kind":"file","key":5}', "Line 7: File entry's 'key' is not a string"),
        ('{"kind":"shard","key":"k"}', "Line 7: Shard entry missing 'archive_key'"),
        ('{"kind":"manifest_ref"}', "Line 7: Manifest ref entry missing 'key'"),
        ("[" * 100_000, "Line 7: Invalid JSON: "),
    ],
)
def test_what_is_wrong_with_a_line(line: str, message: str) -> None:
    with pytest.raises(InvalidManifestError) as caught:
        parse_line(line, 7)
    assert caught.value.message.startswith(message)
    assert caught.value.line_number == 7


OTHERS = st.floats().map(lambda value: json.dumps({"kind": "file", "key": "k", "meta": value}).encode())
"""Lines with NaN and Infinity, as other writers make them: they are read, not written."""


@given(st.lists(st.one_of(ENTRIES.map(serialize_entry).map(str.encode), OTHERS, st.binary(max_size=40)), max_size=8), st.data())
@settings(max_examples=150, deadline=None)
def test_fuzz_a_manifest_gives_all_its_entries_or_says_which_line_is_wrong(parts: list[bytes], data: Any) -> None:
    body = b"\n".join(parts)
    cut = data.draw(st.integers(1, 50))
    chunks = [body[i : i + cut] for i in range(0, len(body), cut)]
    rows = [(number, row) for number, row in enumerate(body.split(b"\n"), 1) if row.strip()]
    expected: list[Any] = []
    bad = None
    for number, row in rows:
        try:
            entry = json.loads(row.decode("utf-8", "surrogatepass"))
            kind = {"file": "key", "shard": "archive_key", "manifest_ref": "key"}[entry["kind"]]
            if not isinstance(entry[kind], str):
                raise ValueError
        except (ValueError, KeyError, TypeError, IndexError):
            bad = number
            break
        expected.append(entry)
    found: list[Any] = []
    said = None
    try:
        found.extend(iter_entries(chunks))
    except InvalidManifestError as error:
        said = error.line_number
    assert said == bad
    assert same(found, expected)


def test_manifests_as_files() -> None:
    entries: Any = [{"kind": "file", "key": "ü", "meta": None}, {"kind": "manifest_ref", "key": "m"}]
    assert encode_manifest(entries) == b'{"kind":"file","key":"\\u00fc","meta":null}\n{"kind":"manifest_ref","key":"m"}\n'
    assert encode_manifest([]) == b"\n"
    assert list(Manifest.iter_lines(io.BytesIO(b"\n \r\n" + encode_manifest(entries)[:-1] + b"\r\n\n"))) == entries
    assert list(Manifest.iter_lines(io.BytesIO(encode_manifest(entries)), limit=1)) == entries[:1]
    with pytest.raises(InvalidManifestError):
        encode_manifest([{"kind": "other"}])  # type: ignore[typeddict-item,list-item]


@pytest.mark.parametrize("value", [{1}, b"x", object(), float("nan"), [float("inf")], {"a": -float("inf")}, {(1, 2): 3}])
@pytest.mark.parametrize("mode", ["overwrite", "append_parts"])
def test_what_json_has_not_is_refused_with_the_name_of_entry_and_field(store: S3ExchangeStore, value: Any, mode: Any) -> None:
    entries: Any = [{"kind": "file", "key": "good"}, {"kind": "file", "key": "bad", "meta": value}]
    with pytest.raises(InvalidManifestError, match=r"file entry 'bad': its 'meta' is not JSON") as caught:
        store.write_manifest("m.jsonl", entries, mode=mode)
    assert "None may stand for NaN" in str(caught.value)
    refused = (InvalidManifestError, ConfigError)  # of another type than a dict, or a dict of what JSON has not
    with pytest.raises(refused, match="meta"), store.open_manifest_writer("m.jsonl") as writer:
        writer.put_object("bad", b"x", meta=value)
    with store.open_manifest_writer("n.jsonl", shard_size=ShardSizePolicy(max_entries=5)) as writer:
        with pytest.raises(refused, match="meta"):
            writer.add_to_shard("p", b"x", meta=value)
        with pytest.raises(refused, match="meta"):
            writer.add_file("bad", meta=value)
        writer.add_to_shard("q", b"x")
    assert list(store.get_manifest("n.jsonl").get_keys()) == ["shards/shard-000001.tar#q"]
    assert not store.exists("m.jsonl")
    assert not store.exists("bad")


def test_lists_within_themselves_and_odd_field_names(store: S3ExchangeStore) -> None:
    circle: list[Any] = []
    circle.append(circle)
    for bad in ({"kind": "file", "key": "k", "meta": circle}, {"kind": "file", "key": "k", (1,): 2}):
        with pytest.raises(InvalidManifestError, match="'k'"):
            store.write_manifest("m.jsonl", [bad])  # type: ignore[list-item]


@pytest.mark.parametrize("bad", [None, 5, "m.jsonl", {"kind": "file", "key": "k"}])
def test_what_is_no_list_of_entries(store: S3ExchangeStore, bad: Any) -> None:
    for mode in ("overwrite", "append_parts"):
        with pytest.raises(ConfigError, match="entries"):
            store.write_manifest("m.jsonl", bad, mode=mode)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="entries"):
            store.put_sharded("m.jsonl", bad, update_mode=mode)  # type: ignore[arg-type]
    assert list(store.list_keys()) == []


def test_a_line_without_end_is_not_read_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 1000)
    with pytest.raises(InvalidManifestError, match="longer than"):
        list(iter_entries(b"x" * 100 for _ in range(1 << 30)))


def test_references_are_followed_once_depth_first_and_never_in_circles(store: S3ExchangeStore) -> None:
    ref = lambda key: {"kind": "manifest_ref", "key": key}  # noqa: E731
    file = lambda key: {"kind": "file", "key": key}  # noqa: E731
    tree: Any = {
        "root": [file("1"), ref("a"), file("4"), ref("a"), ref("root")],
        "a": [file("2"), ref("b"), ref("root")],
        "b": [file("3")],
    }
    for key, entries in tree.items():
        store.write_manifest(key, entries)
    assert [e["key"] for e in store.iter_manifest_entries("root")] == ["1", "2", "3", "4"]
    assert len(list(store.iter_manifest_entries("root", resolve_refs=False))) == 5
    assert [e["key"] for e in store.iter_manifest_entries("root", limit=2)] == ["1", "2"]
    assert list(store.iter_manifest_entries("root", limit=0)) == []
    assert [e["key"] for e in store.iter_manifest_entries([ref("b"), file("x")])] == ["3", "x"]
    tree = {"r": [ref("p"), ref("q"), ref("s"), ref("t"), file("z")], "p": [], "q": [ref("s")]}
    tree |= {"s": [file("s1")], "t": [file("t1")]}
    for key, entries in tree.items():
        store.write_manifest(key, entries)
    assert [e["key"] for e in store.iter_manifest_entries("r")] == ["s1", "t1", "z"]  # s: met before its turn
    store.write_manifest("broken", [ref("gone")])
    with pytest.raises(ManifestNotFoundError) as caught:
        list(store.iter_manifest_entries("broken"))
    assert (caught.value.key, caught.value.manifest_key) == ("gone", "gone")
    for i in range(200):
        store.write_manifest(f"deep{i}", [ref(f"deep{i + 1}")])
    with pytest.raises(InvalidManifestError, match="nested deeper"):
        list(store.iter_manifest_entries("deep0"))


def test_parts_are_fetched_ahead_and_errors_keep_their_turn() -> None:
    seen, backend = watched(open_store(f"memory://{uuid.uuid4().hex}"))
    store = S3ExchangeStore(seen)
    for i in range(100):
        store.write_manifest("m.jsonl", files(f"k{i}"), mode="append_parts")
    backend.clear()
    assert [e["key"] for e in store.iter_manifest_entries("m.jsonl")] == [f"k{i}" for i in range(100)]
    assert len(backend.reads) == 101
    backend.clear()
    assert [e["key"] for e in store.iter_manifest_entries("m.jsonl", limit=3)] == ["k0", "k1", "k2"]
    assert len(backend.reads) < 10
    refs = seen.get("m.jsonl").splitlines(keepends=True)
    gone = json.loads(refs[60])["key"]
    seen.put("m.jsonl", b"".join(refs[:70]) + b"nope\n" + b"".join(refs[70:]))
    with pytest.raises(InvalidManifestError) as caught:
        list(store.iter_manifest_entries("m.jsonl"))
    assert caught.value.line_number == 71
    reader = store.iter_manifest_entries("m.jsonl")
    assert [next(reader)["key"] for _ in range(70)] == [f"k{i}" for i in range(70)]
    seen.delete(gone)
    reader = store.iter_manifest_entries("m.jsonl")
    assert [next(reader)["key"] for _ in range(60)] == [f"k{i}" for i in range(60)]
    with pytest.raises(ManifestNotFoundError) as lost:
        next(reader)
    assert lost.value.key == gone
    empty: Any = [{"kind": "manifest_ref", "key": key} for key in ("e1", "e2", "e3", "e1", "x")]
    for key in ("e1", "e2", "e3"):
        seen.put(key, b"")
    store.write_manifest("x", [*files("last"), *empty])
    store.write_manifest("n.jsonl", empty)
    assert [e["key"] for e in store.iter_manifest_entries("n.jsonl")] == ["last"]


def test_a_bad_line_is_said_with_its_manifest(store: S3ExchangeStore) -> None:
    store.put_object("m.jsonl", b'{"kind":"file","key":"a"}\nnope\n')
    reader = store.iter_manifest_entries("m.jsonl")
    assert next(reader)["kind"] == "file"
    with pytest.raises(InvalidManifestError) as caught:
        next(reader)
    assert caught.value.line_number == 2
    assert "m.jsonl" in str(caught.value)


def test_an_empty_object_is_an_empty_manifest() -> None:
    root = open_store(f"memory://{uuid.uuid4().hex}")
    root.put("m.jsonl", b"")
    assert list(iter_manifest(root, "m.jsonl")) == []


@pytest.mark.parametrize(
    ("key", "name"),
    [("a/b.tar.gz", "b.tar"), (".hidden", ""), ("a/b/", ""), ("a", "a"), ("a.b/c", "c"), ("x.wav", "x")],
)
def test_ids_from_keys(key: str, name: str) -> None:
    assert infer_id_from_key(key) == name


def test_keys() -> None:
    assert normalize_key("//a///b/") == "a/b"
    assert split_virtual_key("a.tar#b#c") == ("a.tar", "b#c")
    assert split_virtual_key("a#") is None
    assert [is_shard_key(k) for k in ("a.tar", "a.tgz", "a.tar.zst", "a.TAR.GZ", "a.zip", "tar")] == [True] * 4 + [False] * 2
    assert [is_sidecar_key(k) for k in ("a.tar.idx", "a.tar.s3loader.idx", "a.idx", "a.tar")] == [True, True, False, False]


def test_a_store_needs_one_thing_it_understands() -> None:
    for arguments in ((), (5,), (object(),), ({},)):
        with pytest.raises(ConfigError):
            S3ExchangeStore(*arguments)
    with pytest.raises(ConfigError):
        S3ExchangeStore("memory://x", s3_client=object())
    with pytest.raises(ConfigError):
        Manifest(S3ExchangeStore("memory://x"))
