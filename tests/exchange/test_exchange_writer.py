"""`ManifestWriter`: thresholds, order, memory, failures, and what is left behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import threading
import tracemalloc
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, get_type_hints

import pytest
from exchange_helpers import watched
from forking import in_child

from s3loader import ManifestWriter, ManifestWriterConfig, S3ExchangeStore, ShardSizePolicy, open_store
from s3loader.errors import (
    ClosedError,
    ConfigError,
    InvalidManifestError,
    NoSpaceError,
    S3ExchangeError,
    SourceNotFoundError,
)
from s3loader.exchange import WriterKeywords
from s3loader.testing import server


def keys(store: S3ExchangeStore, manifest: str) -> list[str]:
    return list(store.get_manifest(manifest).get_keys())


def test_parts_are_cut_after_the_threshold_is_reached(store: S3ExchangeStore) -> None:
    seen = []
    with store.open_manifest_writer("d/m.jsonl", part_max_entries=2) as writer:
        for i in range(5):
            writer.add_file(f"k{i}")
            seen.append((writer.stats()["part_entries"], writer.stats()["parts_uploaded"]))
    assert seen == [(1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert [e["kind"] for e in store.iter_manifest_entries("d/m.jsonl", resolve_refs=False)] == ["manifest_ref"] * 3
    assert keys(store, "d/m.jsonl") == [f"k{i}" for i in range(5)]
    with store.open_manifest_writer("d/n.jsonl", part_max_bytes=100) as writer:
        writer.add_file("a" * 100)
        assert writer.stats()["parts_uploaded"] == 1
        assert list(writer.stats()) == [
            "part_entries", "part_bytes", "parts_uploaded", "shard_entries", "shard_bytes", "shards_created", "is_closed",
        ]  # fmt: skip


def test_existing_lines_are_kept_verbatim_by_an_append(store: S3ExchangeStore) -> None:
    body = b'{"key":"old",  "kind":"file","extra":[1,2]}\n\n{"kind":"shard","archive_key":"s.tar"}'  # no newline at its end
    store.put_object("d/m.jsonl", body)
    store.write_manifest("d/m.jsonl", [{"kind": "file", "key": "new"}], mode="append_parts")
    after = store.get_object("d/m.jsonl").read()
    assert after.startswith(body + b"\n")
    assert after.count(b"\n") == 4
    assert json.loads(after.splitlines()[-1])["key"].startswith("d/manifests/part-")


def test_nothing_to_write(store: S3ExchangeStore) -> None:
    with store.open_manifest_writer("d/m.jsonl") as writer:
        assert writer.flush_part() is None
    assert writer.published is None
    store.write_manifest("d/m.jsonl", [], mode="append_parts")
    assert not store.exists("d/m.jsonl")
    store.write_manifest("d/m.jsonl", [{"kind": "file", "key": "old"}])
    with store.open_manifest_writer("d/m.jsonl", mode="overwrite", shard_size=ShardSizePolicy(max_entries=2)) as writer:
        assert writer.flush_part() is None
        assert writer.flush_shard() is None
    assert store.get_object("d/m.jsonl").read() == b"\n"
    with pytest.raises(ConfigError, match="mode cannot be 'x'"):
        store.write_manifest("d/m.jsonl", [], mode="x")  # type: ignore[arg-type]


def test_a_closed_writer_says_so(store: S3ExchangeStore) -> None:
    writer = store.open_manifest_writer("m.jsonl")
    writer.add_file("k")
    with pytest.raises(RuntimeError, match="Shard buffering not enabled"):
        writer.add_to_shard("x", b"x")
    writer.close()
    assert writer.is_closed
    with pytest.raises(RuntimeError, match="ManifestWriter is already closed"):
        writer.close()
    for use in (lambda: writer.add_file("k"), lambda: writer.put_object("k", b""), writer.flush_part, writer.flush_shard):
        with pytest.raises(RuntimeError, match="ManifestWriter is closed"):
            use()
    assert writer.abandon()["deleted_manifest_count"] == 0
    assert keys(store, "m.jsonl") == ["k"]


def test_bad_arguments(store: S3ExchangeStore, tmp_path: Path) -> None:
    for options in ({"mode": "x"}, {"part_max_entries": 0}, {"publish": "create"}, {"shard_compression": "rar"}):
        with pytest.raises(ConfigError):
            store.open_manifest_writer("m.jsonl", **options)  # type: ignore[arg-type]
    for limits in ({}, {"max_entries": 0}, {"max_bytes": -1}):
        with pytest.raises(ConfigError):
            ShardSizePolicy(**limits)
    with store.open_manifest_writer("m.jsonl", shard_size=ShardSizePolicy(max_entries=5)) as writer:
        with pytest.raises(InvalidManifestError):
            writer.add_entry({"kind": "file"})  # type: ignore[typeddict-item]
        for path in ("../x", "/x", "__manifest__.jsonl"):
            with pytest.raises(ConfigError):
                writer.add_to_shard(path, b"x")
        for call in (writer.add_to_shard, writer.put_object):
            with pytest.raises(SourceNotFoundError, match=r"/no/such/file.*\n.*encoded"):
                call("x", "/no/such/file")
            for nothing in (None, 5, [b"x"]):
                with pytest.raises(ConfigError, match=r"(?s)cannot be .* takes bytes.*Path or an open file"):
                    call("x", nothing)  # type: ignore[arg-type]
            for unreadable in (tmp_path, "nul\0", "x" * 5000):
                with pytest.raises(ConfigError, match="cannot read the local file"):
                    call("x", unreadable)
        with pytest.raises(ConfigError, match="source cannot be None"):
            writer.add_to_shard("x", None, size_bytes=3)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="size_bytes required"):
            writer.add_to_shard("x", _Pipe(b"abc"))
        writer.add_to_shard("pipe", _Pipe(b"abc"), size_bytes=3)
        with pytest.raises(ConfigError, match="not 2 bytes"):
            writer.add_to_shard("short", _Pipe(b"abc"), size_bytes=2)
        with pytest.raises(ConfigError, match="not 9 bytes"):
            writer.add_to_shard("long", _Pipe(b"abc"), size_bytes=9)
        writer.add_to_shard("file", io.BytesIO(b"seekable"))
    assert [body.read() for body, _ in store.iter_objects("m.jsonl")] == [b"abc", b"seekable"]
    assert list(store.list_keys("shards/")) == ["shards/shard-000001.tar"]  # what failed took no other name
    with store.open_manifest_writer("n.jsonl", shard_size=ShardSizePolicy(max_entries=5)) as writer:
        with pytest.raises(ConfigError):
            writer.add_to_shard("../x", b"x")
        writer.add_file("k")
    assert len(list(store.list_keys("shards/", sidecars=True))) == 2  # and an empty shard none at all


class _Pipe(io.RawIOBase):
    """Gives one byte at a time and cannot seek."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(1, size) if size >= 0 else -1)

    def readable(self) -> bool:
        return True


def test_objects_from_bytes_paths_files_and_pipes(store: S3ExchangeStore, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"from a path")
    large = tmp_path / "large.bin"
    large.write_bytes(bytes(9 << 20))
    scratch = bytearray(b"mutable")
    with store.open_manifest_writer("m.jsonl") as writer:
        writer.put_object("1", scratch)
        scratch[:] = b"changed"
        writer.put_object("2", path)
        path.unlink()
        writer.put_object("3", str(large), id="big", content_type="x/y")
        writer.put_object("4", io.BytesIO(b"from a file"))
        writer.put_object("5", _Pipe(b"slowly"))
        writer.put_object("6", memoryview(b"view"))
    found = {entry["key"]: body.read() for body, entry in store.iter_objects("m.jsonl")}  # type: ignore[typeddict-item]
    assert found.pop("3") == bytes(9 << 20)
    assert found == {"1": b"mutable", "2": b"from a path", "4": b"from a file", "5": b"slowly", "6": b"view"}
    sizes = [entry["size_bytes"] for entry in store.iter_manifest_entries("m.jsonl")]  # type: ignore[typeddict-item]
    assert sizes == [7, 11, 9 << 20, 11, 6, 4]
    assert store.objects.head("3").content_type == "x/y"


def test_an_entry_under_way_is_complete_for_whoever_looks(store: S3ExchangeStore) -> None:
    seen, backend = watched(store.objects)
    gate = threading.Event()
    backend.on_put = lambda key, data, mode: gate.wait() and None
    with S3ExchangeStore(seen).open_manifest_writer("m.jsonl", mode="overwrite") as writer:
        entry: Any = writer.put_object("a", b"xyz", id="i", meta={"m": 1})
        later = writer.add_file("b")
        assert not isinstance(dict.get(entry, "etag"), str)
        threading.Timer(0.05, gate.set).start()
        expected = {"kind": "file", "key": "a", "id": "i", "meta": {"m": 1}, "content_type": None, "size_bytes": 3}
        expected["etag"] = entry["etag"]
        assert expected["etag"]
        fresh: Any = writer.put_object("a", b"xyz", id="i", meta={"m": 1})
        for looked in (dict(fresh), {**fresh}, fresh | {}, {} | fresh, fresh.copy(), json.loads(json.dumps(fresh))):
            assert list(looked) == list(expected)
        assert (len(fresh), "etag" in fresh, fresh.get("size_bytes"), list(fresh.values())[-2]) == (7, True, 3, 3)
        assert str(entry) == str(expected)
        assert entry == expected
        assert pickle.loads(pickle.dumps(entry)) == expected
        writer.add_entry(entry)
    assert keys(store, "m.jsonl") == ["a", later["key"], "a", "a"]


def test_memory_stays_bounded_over_many_entries(tmp_path: Path) -> None:
    store = S3ExchangeStore(open_store(f"file://{tmp_path}"))
    note = "x" * 500
    with store.open_manifest_writer("m.jsonl", mode="overwrite") as writer:
        writer.add_file("warm up")
        tracemalloc.start()
        try:
            for i in range(45_000):  # 27 MB of lines: beyond what is kept in memory
                writer.add_file(f"k{i}", id=note)
            current, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert current < 20 << 20
    assert sum(1 for _ in store.iter_manifest_entries("m.jsonl")) == 45_001


def test_a_failed_upload_fails_every_later_call_and_publishes_nothing(store: S3ExchangeStore) -> None:
    seen, backend = watched(store.objects)

    def fail(key: str, data: Any, mode: Any) -> None:
        if key == "bad":
            raise NoSpaceError("disk full")

    backend.on_put = fail
    writer = S3ExchangeStore(seen).open_manifest_writer("m.jsonl", shard_size=ShardSizePolicy(max_entries=9))
    writer.add_to_shard("member", b"x")
    writer.put_object("good", b"x")
    with pytest.raises(NoSpaceError):
        _ = writer.put_object("bad", b"x")["etag"]  # type: ignore[typeddict-item]
    for use in (
        lambda: writer.put_object("more", b"x"),
        writer.stats,
        lambda: writer.add_to_shard("n", b"x"),
        writer.flush_part,
    ):
        with pytest.raises(NoSpaceError):
            use()
    with pytest.raises(NoSpaceError) as caught:
        writer.close()
    notes = "".join(caught.value.__notes__)
    assert "m.jsonl was not published" in notes
    assert "good" in notes
    assert writer.is_closed
    assert list(store.list_keys("", sidecars=True)) == ["good"]  # no claim, no shard, no manifest
    report = writer.abandon()
    assert (report["deleted_object_count"], report["errors"]) == (2, {})
    assert list(store.list_keys("", sidecars=True)) == []


def test_abandon_removes_shards_parts_and_objects_but_nothing_else(store: S3ExchangeStore) -> None:
    store.put_object("theirs", b"x")
    store.write_manifest("d/m.jsonl", [{"kind": "file", "key": "theirs"}])
    before = list(store.list_keys("", sidecars=True))
    writer = store.open_manifest_writer("d/m.jsonl", part_max_entries=1, shard_size=ShardSizePolicy(max_entries=1))
    with pytest.raises(ZeroDivisionError) as caught, writer:  # noqa: PT012 - the block is what is tested
        for i in range(3):
            writer.add_to_shard(f"{i}", b"x")
            writer.put_object(f"d/{i}", b"x")
        writer.stats()
        _ = [part.result() for part in writer._entries.parts]
        _ = 1 / 0
    assert "abandon" in "".join(caught.value.__notes__)
    assert len(list(store.list_keys())) == 2 + 3 + 3 + 6
    report = writer.abandon()
    assert {**report} == {
        "deleted_object_count": 3, "deleted_archive_count": 3, "deleted_manifest_count": 6, "errors": {},
    }  # fmt: skip
    assert list(store.list_keys("", sidecars=True)) == before
    assert writer.abandon()["deleted_object_count"] == 0
    open_one = store.open_manifest_writer("d/m.jsonl")
    open_one.put_object("d/x", b"x")
    open_one.stats()
    open_one.abandon()
    assert open_one.is_closed
    assert list(store.list_keys("", sidecars=True)) == before


def test_publish_on_error_publishes_and_says_when_it_cannot(store: S3ExchangeStore) -> None:
    writer = store.open_manifest_writer("m.jsonl", publish_on_error=True)
    with pytest.raises(ValueError, match="mine"), writer:  # noqa: PT012 - the block is what is tested
        writer.put_object("k", b"x")
        raise ValueError("mine")
    assert keys(store, "m.jsonl") == ["k"]
    store.put_object("bad.jsonl", b"no manifest\n")
    writer = store.open_manifest_writer("bad.jsonl", publish_on_error=True)
    with pytest.raises(ValueError, match="mine") as caught, writer:  # noqa: PT012 - the block is what is tested
        writer.put_object("k", b"x")
        raise ValueError("mine")
    assert "could not be published either" in "".join(caught.value.__notes__)


def test_shards_and_loose_objects_keep_their_order_and_progress_is_told(store: S3ExchangeStore) -> None:
    told: list[Any] = []
    with store.open_manifest_writer(
        "m.jsonl", mode="overwrite", shard_size=ShardSizePolicy(max_entries=2), progress=told.append
    ) as writer:
        for i in range(6):
            writer.add_to_shard(f"s{i}", b"12345")
            writer.put_object(f"o{i}", b"x")
        assert writer.flush_shard() is None
        entry = writer.flush_shard() or {}
        assert entry == {}
        writer.add_to_shard("last", b"1")
        shard = writer.flush_shard()
        assert shard is not None
        assert shard["count"] == 1
    order = [e["key"] if e["kind"] == "file" else "shard" for e in store.iter_manifest_entries("m.jsonl")]
    assert order == ["o0", "shard", "o1", "o2", "shard", "o3", "o4", "shard", "o5", "shard"]
    assert (told[-1].entries, told[-1].objects, told[-1].shards, told[-1].parts) == (10, 6, 4, 0)
    assert [t.entries for t in told] == list(range(1, 11))


@pytest.mark.parametrize("compression", [None, "zstd", "gzip"])
def test_a_shard_beyond_one_part_streams_into_a_multipart_upload_with_its_first_part_last(compression: str | None) -> None:
    with server("ministack") as s3:
        store = S3ExchangeStore(s3.open_store(s3.bucket()))
        contents = [os.urandom(3 << 20) for _ in range(8)]
        with store.open_manifest_writer(
            "d/m.jsonl", shard_size=ShardSizePolicy(max_entries=100), shard_compression=compression
        ) as writer:
            for i, content in enumerate(contents):
                writer.add_to_shard(f"{i}.bin", content)
        key = next(store.iter_manifest_entries("d/m.jsonl"))["archive_key"]
        assert "-" in store.objects.head(key).etag  # the mark of a multipart upload
        assert [body.read() for body, _ in store.iter_objects("d/m.jsonl")] == contents
        assert store.get_object(f"{key}#7.bin").read() == contents[7]
        writer = store.open_manifest_writer("d/n.jsonl", shard_size=ShardSizePolicy(max_entries=100))
        with pytest.raises(KeyboardInterrupt), writer:  # noqa: PT012 - the block is what is tested
            for i, content in enumerate(contents):
                writer.add_to_shard(f"{i}.bin", content)
            raise KeyboardInterrupt
        assert list(store.objects.backend.list_multipart()) == []
        assert sorted(store.list_keys("d/shards/", sidecars=True)) == [key, key + ".idx"]


def test_a_writer_does_not_work_in_a_forked_child_and_the_parents_goes_on(store: S3ExchangeStore) -> None:
    with store.open_manifest_writer("m.jsonl", shard_size=ShardSizePolicy(max_entries=9)) as writer:
        writer.add_to_shard("a", b"a")

        def refused() -> None:
            with pytest.raises(ClosedError), writer:
                writer.add_to_shard("b", b"b")

        in_child(refused)
        writer.add_to_shard("c", b"c")
    assert [body.read() for body, _ in store.iter_objects("m.jsonl")] == [b"a", b"c"]


def test_an_object_store_will_do_instead_of_an_exchange_store() -> None:
    objects = open_store(f"memory://{uuid.uuid4().hex}")
    with ManifestWriter(objects, "m.jsonl", mode="overwrite", publish="create") as writer:
        writer.put_object("a/b.wav", b"x")
        writer.add_manifest("other.jsonl")
    assert [json.loads(line).get("id") for line in objects.get("m.jsonl").splitlines()] == ["b", None]
    with pytest.raises(S3ExchangeError) as caught:
        writer.close()
    assert isinstance(caught.value, RuntimeError)


def test_the_writers_keywords_are_the_fields_of_its_configuration():
    assert get_type_hints(WriterKeywords) == get_type_hints(ManifestWriterConfig)
    with pytest.raises(ConfigError, match=r"(?s)part_max.*part_max_bytes"):
        ManifestWriter(open_store("memory://keywords"), "m.jsonl", part_max=3)


def test_open_files_are_sources_everywhere(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"content")
    store = S3ExchangeStore(f"memory://{uuid.uuid4().hex}")
    opened = ExitStack()
    makers: list[Callable[[], IO[bytes]]] = [
        lambda: opened.enter_context((tmp_path / "x").open("rb")),
        lambda: io.BytesIO(b"content"),
    ]
    for number, make in enumerate(makers):
        store.put_object(f"{number}/plain", make())
        store.put_shard_archive(f"{number}/a.tar", [{"member_path": "x", "source": make()}], compression=None)  # type: ignore[typeddict-item]
        with store.open_manifest_writer(f"{number}/m.jsonl", shard_size=ShardSizePolicy(max_samples=9)) as writer:
            writer.put_object(f"{number}/object", make())
            writer.add_to_shard("a.bin", make())
            writer.add_sample("b", {"bin": make()})
        found = [stream.read() for stream, _ in store.iter_objects(f"{number}/m.jsonl")]
        found += [store.get_object(f"{number}/{key}").read() for key in ("plain", "a.tar#x")]
        assert found == [b"content"] * 5
    opened.close()
