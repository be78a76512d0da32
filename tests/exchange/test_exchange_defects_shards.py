"""Measured defects of the first seed system (E1 to E22), here of shards and streams, each as something that works."""

from __future__ import annotations

import io
import json
import tarfile
import uuid
from pathlib import Path
from typing import Any

import pytest
from exchange_helpers import contents, files, shard, watched

from s3loader import (
    ExchangeObjectNotFoundError,
    ManifestNotFoundError,
    S3ExchangeStore,
    ShardSizePolicy,
    StoreOptions,
    open_store,
)
from s3loader.errors import (
    IntegrityError,
    InvalidManifestError,
    OutcomeUnknownError,
    ShardReadError,
    StoreConnectionError,
    TruncatedError,
)
from s3loader.shard import load_index
from s3loader.testing import FaultProxy, Rule, server


def test_e04_a_member_is_one_ranged_read_and_names_need_no_archive_bytes() -> None:
    seen, backend = watched(open_store(f"memory://{uuid.uuid4().hex}"))
    store = S3ExchangeStore(seen)
    data = shard(store, count=50)
    store.write_manifest("m.jsonl", [store.get_shard("s/a.tar").entry])
    backend.clear()
    assert [store.get_object(f"s/a.tar#m{i}").read() for i in (7, 3, 40)] == [data[7], data[3], data[40]]
    assert [key for key, _ in backend.reads] == ["s/a.tar.idx", "s/a.tar", "s/a.tar", "s/a.tar"]
    assert backend.bytes_of("s/a.tar") == 3000
    backend.clear()
    assert len(list(S3ExchangeStore(seen).get_manifest("m.jsonl").get_keys())) == 50
    internal = load_index(seen, "s/a.tar").internal_manifest
    assert internal is not None
    assert backend.bytes_of("s/a.tar") == internal.size


def test_e05_zstd_shards_have_random_access_and_gzip_streams() -> None:
    seen, backend = watched(open_store(f"memory://{uuid.uuid4().hex}"))
    store = S3ExchangeStore(seen)
    noise = [uuid.uuid4().bytes * 4096 for _ in range(20)]
    for compression, suffix in (("zstd", "zst"), ("gzip", "gz")):
        key = f"s/a.tar.{suffix}"
        store.put_shard_archive(
            key, [{"source": d, "member_path": f"m{i}"} for i, d in enumerate(noise)], compression=compression
        )
        backend.clear()
        assert store.get_object(f"{key}#m13").read() == noise[13]
    backend.clear()
    store.get_object("s/a.tar.zst#m2").read()
    assert backend.bytes_of("s/a.tar.zst") < store.objects.head("s/a.tar.zst").size / 10


def test_e06_a_flipped_byte_and_a_replaced_object_are_noticed(store: S3ExchangeStore) -> None:
    shard(store)
    seen, backend = watched(store.objects)
    spoiled = S3ExchangeStore(seen)
    backend.on_get = lambda key, data: data.replace(b"BBBB", b"BCBB") if key == "s/a.tar" else data
    with pytest.raises(IntegrityError) as caught:
        spoiled.get_object("s/a.tar#m1")
    assert (caught.value.archive, caught.value.member) == ("s/a.tar", "m1")
    assert caught.value.range[1] - caught.value.range[0] == 1000
    with pytest.raises(IntegrityError):
        contents(spoiled, [store.get_shard("s/a.tar").entry])
    entry = store.put_object("k", b"one")
    store.write_manifest("m.jsonl", [entry])
    store.put_object("k", b"longer")
    with pytest.raises(IntegrityError, match="6 bytes, its manifest entry says 3"):
        contents(store, "m.jsonl")
    store.put_object("k", b"")
    with pytest.raises(TruncatedError):
        contents(store, "m.jsonl")


def test_e06_a_mismatch_on_the_way_is_fetched_again_once(store: S3ExchangeStore) -> None:
    data = shard(store)
    seen, backend = watched(store.objects)
    spoiled = S3ExchangeStore(seen)
    left = [1]

    def once(key: str, got: bytes) -> bytes:
        if key == "s/a.tar" and left:
            left.pop()
            return got[:5] + b"?" + got[6:]
        return got

    backend.on_get = once
    assert spoiled.get_object("s/a.tar#m1").read() == data[1]
    assert not left


def test_e07_nothing_is_left_out_silently(store: S3ExchangeStore) -> None:
    shard(store)
    whole = store.get_object("s/a.tar").read()
    store.objects.put("cut.tar", whole[:2000])
    entry: Any = {"kind": "shard", "archive_key": "cut.tar"}
    store.write_manifest("m.jsonl", [entry])
    for use in (
        lambda: list(store.get_manifest("m.jsonl").get_keys()),
        lambda: list(store.list_manifest_files("m.jsonl")),
        lambda: contents(store, "m.jsonl"),
        lambda: store.compact_manifest("m.jsonl", "c.jsonl", expand_shards=True),
        lambda: list(store.iter_objects_from_keys(["cut.tar#m2"])),
    ):
        with pytest.raises(ShardReadError):
            use()
    gone: Any = {"kind": "shard", "archive_key": "gone.tar"}
    with pytest.raises(ExchangeObjectNotFoundError) as caught:
        contents(store, [gone])
    assert caught.value.key == "gone.tar"
    keys = ["s/a.tar#m0", "s/a.tar#nope", "gone.bin", "s/a.tar#m2", "gone.tar#m"]
    found = store.iter_objects_from_keys(keys, on_missing="report")
    assert [entry["key"] for _, entry in found] == ["s/a.tar#m0", "s/a.tar#m2"]
    assert found.missing == ["s/a.tar#nope", "gone.bin", "gone.tar#m"]
    with pytest.raises(ExchangeObjectNotFoundError):
        list(store.iter_objects_from_keys(keys))


def test_e10_a_limit_holds_inside_a_shard(store: S3ExchangeStore) -> None:
    shard(store)
    store.write_manifest("m.jsonl", [store.get_shard("s/a.tar").entry, store.put_object("k", b"x")])
    manifest = store.get_manifest("m.jsonl")
    for limit in range(6):
        wanted = ["s/a.tar#m0", "s/a.tar#m1", "s/a.tar#m2", "k"][:limit]
        assert list(manifest.get_keys(limit=limit)) == wanted
        assert [entry["key"] for _, entry in manifest.iter_objects(limit=limit)] == wanted
        assert len(list(store.get_shard("s/a.tar").iter_entries(limit=limit))) == min(3, limit)


@pytest.mark.parametrize(
    ("compression", "suffix"), [("bz2", "bz2"), ("xz", "xz"), ("gzip", "gz"), ("zstd", "zst"), (None, None)]
)
def test_e11_every_compression_round_trips(store: S3ExchangeStore, compression: str | None, suffix: str | None) -> None:
    key = f"s/a.tar.{suffix}" if suffix else "s/a.tar"
    data = shard(store, key, compression=compression)
    assert [store.get_object(f"{key}#m{i}").read() for i in range(3)] == data
    store.objects.delete(f"{key}.idx")  # and without our index, as s3exchange wrote it
    fresh = S3ExchangeStore(store.objects)
    assert contents(fresh, [fresh.get_shard(key).entry]) == data
    assert fresh.get_object(f"{key}#m2").read() == data[2]


def test_e12_a_missing_or_wrong_compression_field_does_not_matter(store: S3ExchangeStore) -> None:
    data = shard(store)
    for said in ({}, {"compression": "gzip"}, {"compression": None}):
        entry: Any = {"kind": "shard", "archive_key": "s/a.tar", **said}
        assert contents(store, [entry]) == data
        store.write_manifest("m.jsonl", [entry])
        assert len(list(store.get_manifest("m.jsonl").get_keys())) == 3
    assert store.get_shard("s/a.tar").compression is None


def test_e13_404_in_a_name_is_no_404_and_a_network_failure_is_not_not_found() -> None:
    with server("moto") as s3, FaultProxy(s3.endpoint_url, [Rule("refuse")]) as proxy:
        options = StoreOptions(max_attempts=1)
        store = S3ExchangeStore(s3.open_store(s3.bucket(), endpoint_url=proxy.endpoint_url, options=options))
        for use in (
            lambda: store.exists("img_404.jpg"),
            lambda: store.get_object("img_404.jpg"),
            lambda: list(store.iter_manifest_entries("404.jsonl")),
            lambda: list(store.iter_objects_from_keys(["404.bin"], on_missing="report")),
            lambda: store.write_manifest("404.jsonl", files("k"), mode="append_parts"),
        ):
            with pytest.raises((StoreConnectionError, OutcomeUnknownError)):
                use()
        denied = Rule("error", status=403, code="AccessDenied")
        with FaultProxy(s3.endpoint_url, [denied]) as refusing:
            locked = S3ExchangeStore(s3.open_store(s3.bucket(), endpoint_url=refusing.endpoint_url, options=options))
            with pytest.raises(PermissionError) as caught:
                list(locked.iter_manifest_entries("m.jsonl"))
            assert not isinstance(caught.value, (InvalidManifestError, ManifestNotFoundError))


def test_e16_version_id_reaches_the_archive_of_a_virtual_key() -> None:
    with server("moto") as s3:
        bucket, client = s3.bucket(), s3.client()
        client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        store = S3ExchangeStore(s3_client=client, bucket=bucket)
        for text in (b"old", b"newer"):
            store.put_shard_archive("a.tar", [{"source": text, "member_path": "m"}], compression=None)
        versions = client.list_object_versions(Bucket=bucket, Prefix="a.tar")["Versions"]
        old = next(v["VersionId"] for v in versions if v["Key"] == "a.tar" and not v["IsLatest"])
        assert store.get_object("a.tar#m", version_id=old).read() == b"old"
        assert store.get_object("a.tar#m").read() == b"newer"


def test_e17_streams_keep_the_io_protocol_and_botocores(store: S3ExchangeStore) -> None:
    store.put_shard_archive("a.tar", [{"source": b"one\r\ntwo\nthree", "member_path": "m"}], compression=None)
    store.put_object("k", b"one\r\ntwo\nthree")
    for key in ("a.tar#m", "k"):
        body = store.get_object(key)
        assert list(body.iter_lines(chunk_size=4)) == [b"one", b"two", b"three"]
        assert body.readinto(bytearray(3)) == 0
        assert body.read() == b""
        assert io.BufferedReader(store.get_object(key)).readline() == b"one\r\n"
        assert list(store.get_object(key).iter_lines(limit=1)) == [b"one"]
        with store.get_object(key) as body:
            assert body.read(4) == b"one\r"
            assert b"".join(body.iter_chunks(2)) == b"\ntwo\nthree"
        with pytest.raises(ValueError, match="closed"):
            body.read()


def test_e18_headers_are_clean_and_contents_never_pile_up_in_memory(tmp_path: Path) -> None:
    seen, backend = watched(open_store(f"file://{tmp_path}/store"))
    store = S3ExchangeStore(seen)
    big = tmp_path / "big.bin"
    big.write_bytes(b"0123456789abcdef" * (5 << 16))  # 5 MiB: read in pieces
    link = tmp_path / "link"
    link.symlink_to(big)
    parts: list[int] = []
    upload = backend.upload_part

    def counted(key: str, upload_id: str, number: int, data: Any) -> Any:
        parts.append(len(data))
        return upload(key, upload_id, number, data)

    backend.upload_part = counted  # type: ignore[method-assign]
    with store.open_manifest_writer("m.jsonl", mode="overwrite", shard_size=ShardSizePolicy(max_entries=10)) as writer:
        for i in range(10):
            writer.add_to_shard(f"{i}.bin", str(link))
            assert writer.stats()["shard_entries"] == i + 1  # the next sample closes it
            if i < 9:
                assert 0 < writer._shards.held < 40 << 20
    assert len(parts) > 2
    archive = store.get_object("shards/shard-000001.tar").read()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = tar.getmembers()[1:]
        assert {(m.uid, m.gid, m.mtime, m.mode, m.isreg(), m.size) for m in members} == {(0, 0, 0, 0o644, True, 5 << 20)}
    assert store.get_object("shards/shard-000001.tar#7.bin").read() == big.read_bytes()


def test_e19_sizes_are_known_and_the_callers_meta_is_left_alone(store: S3ExchangeStore) -> None:
    shard(store)
    lines = store.get_object("s/a.tar#__manifest__.jsonl").read().splitlines()
    assert [json.loads(line)["size_bytes"] for line in lines] == [1000, 1000, 1000]
    meta = {"a": 1}
    with store.open_manifest_writer("m.jsonl", shard_size=ShardSizePolicy(max_entries=9)) as writer:
        writer.add_to_shard("x", b"x", meta=meta, content_type="text/plain")
    assert meta == {"a": 1}
    assert next(iter(store.list_manifest_files("m.jsonl")))["meta"] == {"a": 1, "content_type": "text/plain"}


def test_e20_of_members_with_one_name_iteration_gives_all_and_the_key_the_last(store: S3ExchangeStore) -> None:
    items: list[Any] = [{"source": text, "member_path": "same", "id": text.decode()} for text in (b"one", b"two")]
    store.put_shard_archive("a.tar", items, compression=None)
    assert [(body.read(), entry["id"]) for body, entry in store.get_shard("a.tar").iter_objects()] == [
        (b"one", "one"),
        (b"two", "two"),
    ]
    assert store.get_shard("a.tar").get_member("same").read() == b"two"
    assert store.get_object("a.tar#same").read() == b"two"
