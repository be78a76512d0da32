"""`S3ExchangeStore` on every kind of store: objects, keys, downloads, metadata, deletions."""

from __future__ import annotations

import datetime
import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exchange_helpers import files, watched
from forking import in_child

from s3loader import (
    ExchangeObjectNotFoundError,
    Manifest,
    ManifestNotFoundError,
    S3ExchangeStore,
    Shard,
    ShardSizePolicy,
    open_store,
)
from s3loader.config import S3Settings
from s3loader.errors import (
    AccessDeniedError,
    ConfigError,
    IntegrityError,
    InvalidManifestError,
    ObjectNotFoundError,
    ShardReadError,
)
from s3loader.exchange import encode_manifest
from s3loader.shard import ShardBuilder
from s3loader.testing import Server, server
from s3loader.types import DeleteFailure


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server("moto") as running:
        yield running


@pytest.fixture(params=["memory", "file", "client", "settings"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> S3ExchangeStore:
    if request.param == "memory":
        return S3ExchangeStore(open_store(f"memory://{uuid.uuid4().hex}"))
    if request.param == "file":
        return S3ExchangeStore(tmp_path / "store")
    s3: Server = request.getfixturevalue("s3")
    if request.param == "client":
        return S3ExchangeStore(s3.client(), s3.bucket())
    settings: S3Settings = s3.settings.replace(bucket=s3.bucket())
    return S3ExchangeStore(settings)


def test_everything_together(store: S3ExchangeStore, tmp_path: Path) -> None:
    with store.open_manifest_writer("d/m.jsonl", shard_size=ShardSizePolicy(max_entries=4), shard_compression="zstd") as writer:
        for i in range(6):
            writer.add_to_shard(f"{i}.txt", f"text {i}".encode(), id=f"id{i}", meta={"i": i})
        writer.put_object("d/loose#1.txt", b"a key with a mark")
        writer.put_object("d/empty", b"")
    found = {entry["id"]: body.read() for body, entry in store.iter_objects("d/m.jsonl")}  # type: ignore[typeddict-item]
    assert found == {**{f"id{i}": f"text {i}".encode() for i in range(6)}, "loose#1": b"a key with a mark", "empty": b""}
    first, second = "d/shards/shard-000001.tar.zst", "d/shards/shard-000002.tar.zst"
    keys = [f"{second}#4.txt", "d/empty", f"{first}#0.txt", "d/loose#1.txt", f"{first}#3.txt", f"{first}#2.txt"]
    got = [(entry["id"], entry["meta"], body.read()) for body, entry in store.iter_objects_from_keys(keys)]
    assert got == [
        ("id4", {"i": 4}, b"text 4"),
        ("empty", None, b""),
        ("id0", {"i": 0}, b"text 0"),
        ("loose#1", None, b"a key with a mark"),
        ("id3", {"i": 3}, b"text 3"),
        ("id2", {"i": 2}, b"text 2"),
    ]
    plain = [entry["id"] for _, entry in store.iter_objects_from_keys(keys[:1], details=False)]
    assert plain == ["4"]
    assert [store.exists(key) for key in (*keys, "gone", f"{first}#9.txt", "gone.tar#x")] == [True] * 6 + [False] * 3
    assert list(store.list_keys("d/")) == [
        "d/empty",
        "d/loose#1.txt",
        "d/m.jsonl",
        *[part["key"] for part in store.iter_manifest_entries("d/m.jsonl", resolve_refs=False)],  # type: ignore[typeddict-item]
        first,
        second,
    ]
    assert [e["key"] for e in store.list_by_manifest_prefix("d/m.jsonl", f"{second}#")] == [f"{second}#{i}.txt" for i in (4, 5)]  # type: ignore[typeddict-item]
    assert [e["key"] for e in store.list_by_manifest_prefix("d/m.jsonl", "d/e")] == ["d/empty"]  # type: ignore[typeddict-item]
    assert [e["kind"] for e in store.list_manifest_files("d/m.jsonl", include_shards=False)] == [
        "shard",
        "file",
        "file",
        "shard",
    ]
    target = store.download_object(f"{first}#1.txt", tmp_path / "new" / "folder" / "one.txt")
    assert target.read_bytes() == b"text 1"
    every = store.download_objects(keys[:3], tmp_path / "all")
    assert [path.name for path in every.values()] == ["4.txt", "empty", "0.txt"]
    for bad in (["x/a", "y/a"], ["x/", "y"]):
        with pytest.raises(ConfigError):
            store.download_objects(bad, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    report = store.delete_manifest("d/m.jsonl")
    assert (report["deleted_object_count"], report["deleted_archive_count"], report["deleted_manifest_count"]) == (2, 2, 2)
    assert list(store.list_keys("", sidecars=True)) == []


def test_metadata_has_boto3s_shape_everywhere(store: S3ExchangeStore) -> None:
    store.put_object("a.wav", b"12345", content_type="audio/wav")
    store.put_shard_archive("s.tar", [{"source": b"123", "member_path": "m"}], compression=None)
    head = store.get_object_metadata("a.wav")
    assert (head["ContentLength"], head["ContentType"], head["Metadata"], head["AcceptRanges"]) == (5, "audio/wav", {}, "bytes")
    assert head["ETag"].strip('"') == store.objects.head("a.wav").etag
    assert head["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert isinstance(head["LastModified"], datetime.datetime)
    assert head["LastModified"].tzinfo is not None
    assert store.get_object_metadata("s.tar#m")["ContentLength"] == 3
    for key in ("gone", "s.tar#gone", "gone.tar#m"):
        with pytest.raises(ExchangeObjectNotFoundError) as caught:
            store.get_object_metadata(key)
        assert caught.value.key == key


def test_what_is_missing_is_said_by_key(store: S3ExchangeStore) -> None:
    store.put_shard_archive("s.tar", [{"source": b"123", "member_path": "m"}], compression=None)
    for key in ("gone", "gone.tar#x", "s.tar#gone", "a#b"):
        with pytest.raises(ExchangeObjectNotFoundError) as caught:
            store.get_object(key)
        assert caught.value.key == key
        assert isinstance(caught.value, ObjectNotFoundError)
    with pytest.raises(ExchangeObjectNotFoundError):
        store.get_object("s.tar#m", resolve_virtual_keys=False)
    with pytest.raises(ExchangeObjectNotFoundError):
        store.get_shard("s.tar").get_member("gone")
    with pytest.raises(ManifestNotFoundError):
        list(store.iter_objects("gone.jsonl"))
    with pytest.raises(ExchangeObjectNotFoundError) as caught:
        list(store.iter_objects(files("gone")))
    assert caught.value.key == "gone"
    with pytest.raises(ManifestNotFoundError):
        store.delete_manifest("gone.jsonl")


def test_deleting_keys_archives_and_members(store: S3ExchangeStore) -> None:
    store.put_shard_archive("s.tar", [{"source": b"1", "member_path": "m"}], compression=None)
    store.put_object("k", b"x")
    with pytest.raises(ConfigError, match="cannot be deleted by itself"):
        store.delete_key("s.tar#m")
    assert store.delete_key("k", dry_run=True)["deleted_object_count"] == 1
    assert store.exists("k")
    store.delete_key("k")
    store.delete_key("k")
    store.delete_key("s.tar")
    assert list(store.list_keys("", sidecars=True)) == []
    store.put_shard_archive("t.tar", [{"source": b"1", "member_path": "m"}], compression=None)
    store.get_shard("t.tar").delete()
    assert list(store.list_keys("", sidecars=True)) == []


def test_a_manifest_that_lists_members_and_lost_parts_is_deleted_as_far_as_it_can_be() -> None:
    store = S3ExchangeStore(f"memory://{uuid.uuid4().hex}")
    store.put_shard_archive(
        "s.tar", [{"source": b"1", "member_path": "m"}, {"source": b"2", "member_path": "n"}], compression=None
    )
    members: Any = list(store.get_shard("s.tar").iter_entries())
    store.put_object("k", b"x")
    lost: Any = {"kind": "manifest_ref", "key": "lost.jsonl"}
    store.write_manifest("m.jsonl", [*members, *files("k", "k"), lost])
    report = store.delete_manifest("m.jsonl")
    assert (report["deleted_object_count"], report["deleted_archive_count"], report["deleted_manifest_count"]) == (1, 1, 0)
    assert list(report["errors"]) == ["lost.jsonl"]
    assert list(store.list_keys("", sidecars=True)) == ["m.jsonl"]  # kept, so that it can be run again
    store.write_manifest("lost.jsonl", [])
    assert store.delete_manifest("m.jsonl")["deleted_manifest_count"] == 2
    store.put_object("bad.jsonl", b'{"kind":"file","key":"k"}\nnope\n')
    store.put_object("k", b"x")
    with pytest.raises(InvalidManifestError):
        store.delete_manifest("bad.jsonl")
    assert store.exists("k")


def test_a_failed_delete_is_in_the_report_and_keeps_the_manifest() -> None:
    seen, backend = watched(open_store(f"memory://{uuid.uuid4().hex}"))
    store = S3ExchangeStore(seen)
    store.write_manifest("m.jsonl", [store.put_object(key, b"x") for key in ("a", "b", "locked")])
    delete_many = backend.delete_many

    def locked(keys: Any) -> Any:
        failures = [DeleteFailure(key, AccessDeniedError("object lock", op="delete")) for key in keys if key == "locked"]
        return delete_many([key for key in keys if key != "locked"]) + failures

    backend.delete_many = locked  # type: ignore[method-assign]
    report = store.delete_manifest("m.jsonl")
    assert (report["deleted_object_count"], report["deleted_manifest_count"]) == (1, 0)
    assert "object lock" in report["errors"]["locked"]
    assert store.exists("m.jsonl")
    assert store.exists("a"), "the first entry tells what the keys are relative to, when it is tried again"


def test_shards_are_mappings_and_manifests_are_iterable() -> None:
    store = S3ExchangeStore(f"memory://{uuid.uuid4().hex}")
    shard = store.put_shard_archive("s.tar", [{"source": b"1", "member_path": "m", "id": "i"}], compression=None)
    assert dict(shard) == shard.entry
    assert (shard["count"], shard.get("nope", 0), len(shard), shard.format, shard.compression) == (1, 0, 8, "tar", None)
    assert repr(shard) == "Shard('s.tar')"
    assert [e["id"] for e in shard.get_manifest()] == ["i"]  # type: ignore[typeddict-item]
    assert [e["id"] for e in store.get_manifest("s.tar")] == ["i"]  # type: ignore[typeddict-item]
    assert [e["id"] for e in store.iter_manifest_entries("s.tar")] == ["i"]  # type: ignore[typeddict-item]
    store.put_sharded("m.jsonl", [shard], update_mode="overwrite")
    manifest = store.get_manifest("m.jsonl")
    assert repr(manifest) == "Manifest(key='m.jsonl')"
    assert repr(Manifest.from_entries(store, manifest)) == "Manifest(entries=[1 entries])"
    assert Manifest.from_ref(store, {"kind": "manifest_ref", "key": "m.jsonl"}).key == "m.jsonl"
    manifest.save([*manifest, *files("k")])
    assert list(manifest.get_keys(expand_shards=False)) == ["s.tar", "k"]
    manifest.save(files("later"), mode="append_parts")
    assert list(manifest.get_keys()) == ["s.tar#m", "k", "later"]
    assert Shard.infer_archive_format("a.tgz") == ("tar", "gzip")
    with pytest.raises(ConfigError, match="Unsupported archive format"):
        store.get_shard("a.zip")
    with pytest.raises(ConfigError, match="Unsupported archive format: zip"):
        store.put_shard_archive("a.zip", [], format="zip")
    data, size = Shard.create_archive([{"source": b"1", "member_path": "m"}], "s.tar", compression=None)
    assert len(data) == size == 10240  # type: ignore[arg-type]
    path, size = Shard.create_archive(
        [{"source": b"1", "member_path": "m"}], "s.tar", compression="gzip", temp_file_threshold=10
    )
    assert isinstance(path, Path)
    store.objects.put("t.tar.gz", path)
    path.unlink()
    assert store.get_object("t.tar.gz#m").read() == b"1"
    with pytest.raises(ConfigError):
        Manifest.from_entries(store, []).save()


def test_an_internal_manifest_that_lies_is_an_error_and_one_that_is_old_or_absent_is_made_up_for() -> None:
    store = S3ExchangeStore(f"memory://{uuid.uuid4().hex}")
    old: Any = b'{"kind":"file","member_path":"m","id":"i","meta":null,"size_bytes":1}\n'  # before `key` was written
    lying: Any = b'{"kind":"file","member_path":"other","id":"i"}\n'
    for key, internal in (("old.tar", old), ("lying.tar", lying), ("none.tar", None), ("bad.tar", b"nope\n")):
        builder = ShardBuilder()
        body = b"".join(bytes(piece) for piece in builder.add("m", b"1"))
        built = builder.finish(internal)
        store.objects.put(key, built.head + body + built.tail)
    assert list(store.get_shard("old.tar").iter_entries()) == [
        {
            "kind": "file",
            "key": "old.tar#m",
            "member_path": "m",
            "id": "i",
            "meta": None,
            "size_bytes": 1,
            "archive_key": "old.tar",
        }
    ]
    assert next(iter(store.get_shard("none.tar").iter_entries()))["key"] == "none.tar#m"
    for key in ("lying.tar", "bad.tar"):
        for use in (store.get_shard(key).iter_entries, store.get_shard(key).iter_objects):
            with pytest.raises(ShardReadError, match="internal manifest"):
                list(use())


def test_verification_can_be_turned_off() -> None:
    seen, backend = watched(open_store(f"memory://{uuid.uuid4().hex}"))
    store = S3ExchangeStore(seen)
    store.put_shard_archive("s.tar", [{"source": b"AAAA", "member_path": "m"}], compression=None)
    backend.on_get = lambda key, data: data.replace(b"AAAA", b"AABA") if key == "s.tar" else data
    with pytest.raises(IntegrityError):
        store.get_object("s.tar#m")
    assert S3ExchangeStore(seen, verify=False).get_object("s.tar#m").read() == b"AABA"
    store.write_manifest("m.jsonl", [store.put_object("k", b"1")])
    store.put_object("k", b"2")
    assert [b.read() for b, _ in S3ExchangeStore(seen, verify=False).iter_objects("m.jsonl")] == [b"2"]


def test_a_boto3_client_inside_mock_aws() -> None:
    import boto3
    from moto import mock_aws

    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s")
        client.create_bucket(Bucket="bucket")
        store = S3ExchangeStore(s3_client=client, bucket="bucket")
        entry = store.put_object("k", b"fake audio data...")
        assert entry["etag"] == "548baa8d1efffaaae5d59f4bedcf09b3"
        assert store.s3_client is client
        store.write_manifest("m.jsonl", [entry], mode="append_parts")
        assert [body.read() for body, _ in store.iter_objects("m.jsonl")] == [b"fake audio data..."]


def test_stores_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    store = S3ExchangeStore(tmp_path / "store", base_prefix="p", verify=False)
    store.put_shard_archive("s.tar", [{"source": b"1", "member_path": "m"}], compression=None)
    assert store.get_object("s.tar#m").read() == b"1"
    again = pickle.loads(pickle.dumps(store))
    assert again.get_object("s.tar#m").read() == b"1"
    assert (again.base_prefix, again.access.verify) == ("p", False)
    whole = S3ExchangeStore(tmp_path / "store", base_prefix="p", prefix_all=True)
    whole.put_object("k", b"x")
    assert pickle.loads(pickle.dumps(whole)).get_object("k").read() == store.get_object("p/k").read() == b"x"
    in_child(lambda: store.get_object("s.tar#m").read() == b"1")


def test_an_error_in_a_manifest_comes_after_all_that_stands_before_it() -> None:
    store = S3ExchangeStore(f"memory://{uuid.uuid4().hex}")
    for name in ("a", "b"):
        store.put_shard_archive(f"{name}.tar", [{"source": name.encode(), "member_path": "m"}], compression=None)
    shards = [store.get_shard(f"{name}.tar").entry for name in ("a", "b")]
    lines = encode_manifest([shards[0], *files("k"), shards[1]]) + b"nope\n"
    store.put_object("k", b"loose")
    store.put_object("m.jsonl", lines)
    reader = store.iter_objects("m.jsonl")
    assert [next(reader)[0].read() for _ in range(3)] == [b"a", b"loose", b"b"]
    with pytest.raises(InvalidManifestError):
        next(reader)
    store.put_object("loose.jsonl", encode_manifest(files("k", "k", "k")) + b"nope\n")
    reader = store.iter_objects("loose.jsonl")
    assert [next(reader)[0].read() for _ in range(3)] == [b"loose"] * 3
    with pytest.raises(InvalidManifestError):
        next(reader)
    store.delete_key("b.tar")
    reader = store.iter_objects("m.jsonl")
    assert [next(reader)[0].read() for _ in range(2)] == [b"a", b"loose"]
    with pytest.raises(ExchangeObjectNotFoundError):
        next(reader)
