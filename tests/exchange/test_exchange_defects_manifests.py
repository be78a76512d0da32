"""Measured defects of the first seed system (E1 to E22), here of manifests, keys and writers, each as something that works."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from exchange_helpers import contents, files, watched

from s3loader import S3ExchangeStore, ShardSizePolicy, open_store
from s3loader.errors import (
    AccessDeniedError,
    ConfigError,
    InvalidManifestError,
    NoSpaceError,
    OutcomeUnknownError,
    S3ExchangeError,
)
from s3loader.testing import FaultProxy, Rule, server


def test_e01_writers_in_one_folder_and_repeated_appends_never_share_a_shard_name(store: S3ExchangeStore) -> None:
    for name, batch in (("a", "a"), ("b", "b"), ("a", "c")):
        with store.open_manifest_writer(f"d/{name}.jsonl", shard_size=ShardSizePolicy(max_entries=2)) as writer:
            for i in range(2):
                writer.add_to_shard(f"{batch}{i}", f"{batch}{i}".encode())
    assert contents(store, "d/a.jsonl") == [b"a0", b"a1", b"c0", b"c1"]
    assert contents(store, "d/b.jsonl") == [b"b0", b"b1"]
    assert list(store.list_keys("d/shards/")) == [f"d/shards/shard-00000{n}.tar" for n in (1, 2, 3)]


def test_e01_a_shard_without_an_index_counts_as_taken(store: S3ExchangeStore) -> None:
    store.put_object("d/shards/shard-000001.tar", b"somebody else's")
    with store.open_manifest_writer("d/m.jsonl", shard_size=ShardSizePolicy(max_entries=9)) as writer:
        writer.add_to_shard("x", b"x")
    assert store.get_object("d/shards/shard-000001.tar").read() == b"somebody else's"
    assert contents(store, "d/m.jsonl") == [b"x"]


def test_e02_an_append_that_interleaves_with_another_loses_neither() -> None:
    seen, backend = watched(open_store(f"memory://{uuid.uuid4().hex}"))
    store, rival = S3ExchangeStore(seen), S3ExchangeStore(open_store(seen.url))
    store.write_manifest("m.jsonl", files("first"))
    raced: list[int] = []

    def between_read_and_write(key: str, data: Any, mode: Any) -> None:
        if key == "m.jsonl" and not raced:
            raced.append(1)
            rival.write_manifest("m.jsonl", files("rival"), mode="append_parts")

    backend.on_put = between_read_and_write
    store.write_manifest("m.jsonl", files("mine"), mode="append_parts")
    assert raced
    assert [entry["key"] for entry in store.iter_manifest_entries("m.jsonl")] == ["first", "rival", "mine"]


@pytest.mark.parametrize("line", [b'{"kind":"surprise","key":"k"}\n', b"not json\n", b"\xff\xfe\n"])
def test_e03_a_root_that_cannot_be_parsed_is_an_error_and_stays(store: S3ExchangeStore, line: bytes) -> None:
    body = b'{"kind":"file","key":"old"}\n' + line
    store.put_object("m.jsonl", body)
    with pytest.raises(InvalidManifestError) as caught:
        store.write_manifest("m.jsonl", files("new"), mode="append_parts")
    assert caught.value.line_number == 2
    with pytest.raises(InvalidManifestError), store.open_manifest_writer("m.jsonl") as writer:
        writer.add_file("new")
    assert store.get_object("m.jsonl").read() == body


def test_a_refused_append_leaves_no_part_or_says_which() -> None:
    root, backend = watched(open_store(f"memory://{uuid.uuid4().hex}"))
    store = S3ExchangeStore(root)
    broken = b"not json\n"
    root.put("m.jsonl", broken)
    store.put_shard_archive("a.tar", [{"source": b"x", "member_path": "x"}], compression=None)
    before = list(store.list_keys(sidecars=True))
    for append in (
        lambda: store.write_manifest("m.jsonl", files("k"), mode="append_parts"),
        lambda: store.put_sharded("m.jsonl", [store.get_shard("a.tar")]),
    ):
        with pytest.raises(InvalidManifestError) as refused:
            append()
        assert not hasattr(refused.value, "__notes__")
        assert list(store.list_keys(sidecars=True)) == before

    def deny(key: str) -> None:
        raise AccessDeniedError("no", op="delete", url=key)

    backend.delete = deny  # type: ignore[method-assign]
    with pytest.raises(InvalidManifestError) as kept:
        store.write_manifest("m.jsonl", files("k"), mode="append_parts")
    (part,) = store.list_keys("manifests/")
    assert part in kept.value.__notes__[0]


def test_an_append_that_may_have_happened_keeps_its_part() -> None:
    root, backend = watched(open_store(f"memory://{uuid.uuid4().hex}"))
    store = S3ExchangeStore(root)

    def lose(key: str, data: Any, mode: Any) -> None:
        if key == "m.jsonl":
            backend.on_put = None
            backend.inner.put(key, bytes(data) + b"not json\n")
            raise OutcomeUnknownError("lost")

    backend.on_put = lose
    with pytest.raises(OutcomeUnknownError) as caught:
        store.write_manifest("m.jsonl", files("k"), mode="append_parts")
    (part,) = store.list_keys("manifests/")
    assert part in caught.value.__notes__[0]
    assert part.encode() in root.get("m.jsonl")


def test_e08_deleting_a_manifest_deletes_its_parts(store: S3ExchangeStore) -> None:
    for i in range(3):
        store.write_manifest("d/m.jsonl", [store.put_object(f"d/{i}", b"x")], mode="append_parts")
    assert store.delete_manifest("d/m.jsonl", dry_run=True) == {
        "deleted_object_count": 3,
        "deleted_archive_count": 0,
        "deleted_manifest_count": 4,
        "errors": {},
    }
    assert len(list(store.list_keys())) == 7
    store.delete_manifest("d/m.jsonl")
    assert list(store.list_keys("", sidecars=True)) == []


def test_e09_compaction_keeps_references_or_counts_them(store: S3ExchangeStore) -> None:
    for i in range(2):
        store.write_manifest("d/m.jsonl", [store.put_object(f"d/{i}", b"x")], mode="append_parts")
    kept = store.compact_manifest("d/m.jsonl", "d/kept.jsonl", resolve_refs=False)
    assert (kept["total_entries"], kept["resolved_refs"]) == (2, 0)
    assert store.get_object("d/kept.jsonl").read() == store.get_object("d/m.jsonl").read()
    flat = store.compact_manifest("d/m.jsonl", "d/flat.jsonl")
    assert (flat["total_entries"], flat["resolved_refs"], flat["removed_entries"]) == (2, 2, 0)
    store.delete_key("d/1")
    gone = store.compact_manifest("d/m.jsonl", "d/gone.jsonl")
    assert (gone["total_entries"], gone["removed_entries"]) == (1, 1)
    everything = store.compact_manifest("d/m.jsonl", "d/all.jsonl", apply_deletes=False)
    assert everything["total_entries"] == 2


def test_e14_base_prefix_is_literal_by_default_and_whole_on_request(store: S3ExchangeStore) -> None:
    literal = S3ExchangeStore(store.objects, base_prefix="prod")
    literal.put_object("training/1", b"x")
    assert list(store.list_keys()) == ["training/1"]
    assert literal.scope(prefix="training").key("{prefix}/1") == "prod/training/1"
    whole = S3ExchangeStore(store.objects, base_prefix="prod", prefix_all=True)
    key = whole.scope(prefix="training").key("{prefix}/2")
    whole.write_manifest("m.jsonl", [whole.put_object(key, b"yy")])
    assert list(store.list_keys()) == ["prod/m.jsonl", "prod/training/2", "training/1"]
    assert list(whole.list_keys("training")) == ["training/2"]
    assert contents(whole, "m.jsonl") == [b"yy"]
    assert whole.get_object_metadata("training/2")["ContentLength"] == 2


def test_e15_delete_prefix_counts_what_was_deleted_and_reports_the_rest(store: S3ExchangeStore, tmp_path: Path) -> None:
    for key in ("a/1", "a/2", "ab/3", "b/4"):
        store.put_object(key, b"x")
    with pytest.raises(ConfigError):
        store.delete_prefix("")
    with pytest.raises(ConfigError):
        store.delete_prefix("a", regex="(")
    dry = store.delete_prefix("a/", dry_run=True)
    assert (dry, dry.keys) == (2, ["a/1", "a/2"])
    assert store.delete_prefix("a/", regex="2$") == 1
    assert list(store.list_keys()) == ["a/1", "ab/3", "b/4"]
    with server("moto") as s3:
        bucket = s3.bucket()
        body = (
            b'<?xml version="1.0"?><DeleteResult><Error><Key>a/1</Key><Code>AccessDenied</Code>'
            b"<Message>no</Message></Error></DeleteResult>"
        )
        rule = Rule("error", method="POST", path="delete", status=200, body=body)
        with FaultProxy(s3.endpoint_url, [rule]) as proxy:
            remote = S3ExchangeStore(s3.open_store(bucket, endpoint_url=proxy.endpoint_url))
            for key in ("a/1", "a/2"):
                remote.put_object(key, b"x")
            result = remote.delete_prefix("a/")
    assert result == 1
    assert list(result.errors) == ["a/1"]
    assert "AccessDenied" in result.errors["a/1"]


def test_e21_templates_have_no_attributes_and_values_cannot_leave_their_folder(store: S3ExchangeStore) -> None:
    for template in ("a/{x.__class__}", "a/{x[0]}", "a/{x!r}", "a/{x:>9}", "a/{", "a/}"):
        with pytest.raises(ConfigError):
            store._resolve_key(template, {"x": "v"})
    for value in ("../up", "a#b", "a/../b", "tab\t", "nul\0"):
        with pytest.raises(ConfigError):
            store.scope(x=value).key("a/{x}")
    assert store.scope(x="sub/dir", n=3).key("a//{x}/{n}/") == "a/sub/dir/3"
    assert store.scope(x="{y}", y="no").key("{{{x}}}") == "{{y}}"
    with pytest.raises(S3ExchangeError) as caught:
        store.scope(a=1).key("{b}")
    assert caught.value.placeholder == "b"


def test_e22_uploads_overlap_errors_surface_and_nothing_half_done_is_published(store: S3ExchangeStore) -> None:
    seen, backend = watched(store.objects)
    parallel = S3ExchangeStore(seen)
    together = threading.Barrier(4, timeout=600)
    backend.on_put = lambda key, data, mode: together.wait() and None if key.startswith("k") else None
    with parallel.open_manifest_writer("m.jsonl") as writer:
        entries = [writer.put_object(f"k{i}", b"x" * i) for i in range(4)]  # each waits for the three others
        assert [entry["size_bytes"] for entry in entries] == [0, 1, 2, 3]
    assert [entry["key"] for entry in store.iter_manifest_entries("m.jsonl")] == ["k0", "k1", "k2", "k3"]

    def full(key: str, data: Any, mode: Any) -> None:
        if key == "bad":
            raise NoSpaceError("disk full", op="put", url=key)

    backend.on_put = full
    writer = parallel.open_manifest_writer("n.jsonl")
    with pytest.raises(NoSpaceError) as caught, writer:  # at the call that finds it, or when the block ends
        _ = [writer.put_object(key, b"x") for key in ("good", "bad")]
    assert not store.exists("n.jsonl")
    assert "good" in "".join(caught.value.__notes__)
    assert writer.abandon()["deleted_object_count"] == 2
    assert not store.exists("good")
