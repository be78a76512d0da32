"""Datasets: whatever stands in a manifest, an index or an archive, the loader gives what was written, or an error."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import zstandard
from fuzzing import run_fuzz
from mutating import JSON_LINES, SAFETENSORS

from s3loader import ShardIndex
from s3loader.errors import IntegrityError, S3LoaderError
from s3loader.exchange import S3ExchangeStore, ShardSizePolicy
from s3loader.loader import Loader, from_manifest
from s3loader.store import ObjectStore

SAMPLES = 12
CONTENTS = [b"text %d" % i * (1 + 20 * i) for i in range(SAMPLES)]


def packed(compression: str | None) -> ObjectStore:
    """Two shards and two loose objects."""
    store = S3ExchangeStore(f"memory://{uuid.uuid4().hex}")
    policy = ShardSizePolicy(max_entries=SAMPLES // 2)
    with store.open_manifest_writer(
        "m.jsonl", mode="overwrite", shard_size=policy, shard_prefix="s", shard_compression=compression
    ) as writer:
        for i, content in enumerate(CONTENTS):
            writer.add_to_shard(f"{i:03d}.txt", content)
        writer.flush_shard()
        writer.put_object("loose/0.bin", b"loose 0")
        writer.put_object("loose/1.bin", b"")
    return store.objects


EXPECTED = [*CONTENTS, b"loose 0", b""]


def read(store: ObjectStore, *, verify: bool = True) -> list[bytes]:
    dataset = from_manifest("m.jsonl", store=store)
    return [bytes(s) for b in Loader(dataset, batch_size=4, shuffle="none", verify=verify) for s in b]


def same(_valid: Any, found: Any) -> bool:
    return bool(found == EXPECTED)


def names(store: ObjectStore, end: str) -> list[str]:
    return sorted(meta.key for meta in store.list("s/") if meta.key.endswith(end))


def test_manifests_that_a_dataset_is_made_of() -> None:
    store = packed(None)
    good = store.get("m.jsonl")

    def damaged(data: bytes) -> None:
        store.put("m.jsonl", data)
        read(store)

    run_fuzz("dataset manifest", lambda _: good, damaged, count=120, structure=JSON_LINES)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("part", ["index", "archive"])
def test_damaged_shards(part: str, compression: str | None) -> None:
    store = packed(compression)
    key = names(store, ".idx" if part == "index" else (".tar.zst" if compression else ".tar"))[0]
    good = store.get(key)

    def damaged(data: bytes) -> Any:
        store.put(key, data)
        return read(store)

    run_fuzz(
        f"dataset {part} {compression}",
        lambda _: good,
        damaged,
        same,
        count=120,
        structure=SAFETENSORS if part == "index" else None,
    )


def test_frames_have_the_index_s_sizes_also_without_checksums() -> None:
    store = packed("zstd")
    key = names(store, ".tar.zst")[0]
    good = store.get(key)
    sizes = [len(content) for content in EXPECTED]

    def damaged(data: bytes) -> None:
        store.put(key, data)
        assert [len(content) for content in read(store, verify=False)] == sizes

    run_fuzz("dataset frames", lambda _: good, damaged, count=120)


@pytest.mark.parametrize("verify", [True, False])
def test_a_frame_that_holds_more_than_the_index_says_is_never_inflated(verify: bool) -> None:
    """512 MiB in 16 KiB, in place of a small frame."""
    store = packed("zstd")
    key = names(store, ".tar.zst")[0]
    index = ShardIndex.from_bytes(store.get(f"{key}.idx"))
    assert index.frames is not None
    archive = bytearray(store.get(key))
    low, high = int(index.frames[1]), int(index.frames[2])
    bomb = zstandard.ZstdCompressor().compress(bytes(512 << 20))
    archive[low:high] = bomb[: high - low]
    store.put(key, bytes(archive))
    with pytest.raises(IntegrityError, match="holds 536870912 bytes"):
        read(store, verify=verify)
    exchange = S3ExchangeStore(store, verify=verify)
    with pytest.raises(S3LoaderError, match="holds 536870912 bytes"):
        list(exchange.iter_objects("m.jsonl"))
