"""Compaction: one manifest out of many parts, line by line, and what becomes of the parts."""

from __future__ import annotations

import io
import tarfile
import uuid

import pytest
from exchange_helpers import Watched, watched

from s3loader import S3ExchangeStore, open_store
from s3loader.errors import AccessDeniedError, ConfigError, InvalidManifestError
from s3loader.types import DeleteFailure


def appended(store: S3ExchangeStore, manifest: str, count: int = 2) -> list[str]:
    """Keys of the parts of a manifest of `count` appends."""
    for i in range(count):
        store.write_manifest(manifest, [store.put_object(f"o/{i}", b"x")], mode="append_parts")
    return [key for key in store.list_keys() if "/part-" in key]


LINES = [
    b'{"kind":"file","key":"o/0","id":"0","meta":{"loss":NaN,"low":-Infinity},"content_type":null,"size_bytes":1,"etag":null}',
    b'{"key": "o/1", "kind": "file", "id": "\xc3\xbc",  "meta": {"max": Infinity, "big": 1e999, "n": 1.50}}',
    b'{"kind":"file","key":"o/0","meta":{"surrogate":"\\ud800"}}',
]


@pytest.mark.parametrize("apply_deletes", [True, False])
def test_lines_are_carried_over_byte_for_byte_also_those_that_are_no_json(store: S3ExchangeStore, apply_deletes: bool) -> None:
    appended(store, "m.jsonl")
    store.put_object("odd.jsonl", b"\r\n".join(LINES) + b"\n\n")
    with store.open_manifest_writer("m.jsonl") as writer:
        writer.add_manifest("odd.jsonl")
    refs = [entry["key"] for entry in store.iter_manifest_entries("m.jsonl", resolve_refs=False)]
    plain = [line for key in refs[:-1] for line in store.get_object(key).read().splitlines()]
    for target in ("c.jsonl", "m.jsonl", "m.jsonl"):
        report = store.compact_manifest("m.jsonl", target, apply_deletes=apply_deletes)
        assert report["total_entries"] == 5
        assert store.get_object(target).read().splitlines() == plain + LINES


def test_members_with_such_numbers_are_expanded(store: S3ExchangeStore) -> None:
    internal = b'{"kind":"file","key":"a","member_path":"a","meta":{"loss":NaN},"size_bytes":1}\n'
    with store.open_manifest_writer("m.jsonl", mode="overwrite") as writer:
        writer.add_entry(_foreign_shard(store, internal))
    assert store.compact_manifest("m.jsonl", "c.jsonl", expand_shards=True)["expanded_shards"] == 1
    assert b'"meta":{"loss":NaN}' in store.get_object("c.jsonl").read()


def _foreign_shard(store: S3ExchangeStore, internal: bytes) -> dict[str, object]:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in (("__manifest__.jsonl", internal), ("a", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    store.put_object("s.tar", archive.getvalue())
    return {"kind": "shard", "archive_key": "s.tar", "format": "tar", "compression": None, "count": 1, "size_bytes": 10240}


def test_a_line_that_is_nothing_still_stops_it(store: S3ExchangeStore) -> None:
    store.put_object("m.jsonl", LINES[0] + b'\n{"kind":"file","key":NaN}\n')
    with pytest.raises(InvalidManifestError, match="Line 2"):
        store.compact_manifest("m.jsonl", "c.jsonl")
    assert not store.exists("c.jsonl")


def test_compacting_in_place_can_take_the_old_parts_away(store: S3ExchangeStore) -> None:
    appended(store, "d/other.jsonl", 1)
    others = [key for key in store.list_keys() if "/part-" in key]
    parts = set(appended(store, "d/m.jsonl")) - set(others)
    with store.open_manifest_writer("d/m.jsonl", mode="append_parts") as writer:
        writer.add_manifest("d/other.jsonl")  # a manifest of its own: neither it nor its parts are m's
    last = set(store.list_keys("d/manifests/")) - parts - set(others)
    report = store.compact_manifest("d/m.jsonl", "d/m.jsonl", delete_parts=True)
    assert report["total_entries"] == 3
    assert [key for key in store.list_keys() if key.startswith("d/")] == ["d/m.jsonl", *others, "d/other.jsonl"]
    assert len(parts) == 2
    assert len(last) == 1
    store.delete_manifest("d/other.jsonl")
    store.delete_manifest("d/m.jsonl")
    assert list(store.list_keys("", sidecars=True)) == []


def test_parts_stay_where_they_may_be_needed(store: S3ExchangeStore) -> None:
    parts = appended(store, "m.jsonl")
    store.compact_manifest("m.jsonl", "refs.jsonl", resolve_refs=False)
    store.compact_manifest("m.jsonl", "m.jsonl")
    assert len(list(store.get_manifest("refs.jsonl"))) == 2
    for target, options in (("c.jsonl", {}), ("refs.jsonl", {"resolve_refs": False})):
        with pytest.raises(ConfigError, match="refer to its parts") as caught:
            store.compact_manifest("refs.jsonl", target, delete_parts=True, **options)
        assert "own key" in (caught.value.hint or "")
    assert [key for key in store.list_keys() if "/part-" in key] == parts


def refusing() -> tuple[S3ExchangeStore, Watched]:
    """A store that deletes nothing until ``del backend.delete_many``."""
    root, backend = watched(open_store(f"memory://{uuid.uuid4().hex}"))
    backend.delete_many = lambda keys: [DeleteFailure(key, AccessDeniedError("no", op="delete", url=key)) for key in keys]
    return S3ExchangeStore(root), backend


def test_a_part_that_cannot_be_deleted_is_named() -> None:
    store, _ = refusing()
    (part,) = appended(store, "m.jsonl", 1)
    with pytest.raises(AccessDeniedError) as caught:
        store.compact_manifest("m.jsonl", "m.jsonl", delete_parts=True)
    assert part in "".join(caught.value.__notes__)
    assert [entry["key"] for entry in store.get_manifest("m.jsonl")] == ["o/0"]


def test_a_refused_append_of_a_writer_leaves_no_parts_and_keeps_the_objects_for_abandon(store: S3ExchangeStore) -> None:
    store.put_object("m.jsonl", b"no manifest\n")
    writer = store.open_manifest_writer("m.jsonl", part_max_entries=1)
    for i in range(3):
        writer.put_object(f"o/{i}", b"x")
    with pytest.raises(InvalidManifestError, match="nothing was appended") as caught, writer:
        pass
    assert list(store.list_keys()) == ["m.jsonl", "o/0", "o/1", "o/2"]
    note = "".join(caught.value.__notes__)
    assert "o/0" in note
    assert "part-" not in note
    assert writer.abandon() == {
        "deleted_object_count": 3,
        "deleted_archive_count": 0,
        "deleted_manifest_count": 0,
        "errors": {},
    }
    assert store.get_object("m.jsonl").read() == b"no manifest\n"


def test_parts_of_a_refused_append_that_cannot_be_removed_are_left_to_abandon() -> None:
    store, backend = refusing()
    store.put_object("m.jsonl", b"no manifest\n")
    writer = store.open_manifest_writer("m.jsonl")
    with pytest.raises(InvalidManifestError) as caught, writer:
        writer.add_file("o")
    assert "part-" in "".join(caught.value.__notes__)
    del backend.delete_many
    assert writer.abandon()["deleted_manifest_count"] == 1
    assert list(store.list_keys()) == ["m.jsonl"]
