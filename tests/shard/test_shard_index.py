"""The index side-car: its bytes, its checks, and the builder that makes it."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from s3loader import ShardIndex, open_store
from s3loader.checksum import crc32c
from s3loader.errors import ConfigError, ObjectNotFoundError, ShardReadError
from s3loader.shard import BuiltShard, ShardBuilder, index_key, load_index, sample_key
from s3loader.shard.index import claim_bytes, read_counts
from s3loader.shard.samples import NO_SAMPLE

NAMES = ["a/1.jpg", "a/1.json", "a/2.jpg", "b/2.jpg", "b/2", ".hidden", "ü.seg.png", "ü.txt", "a/1.jpg"]


def build(
    compression: str | None = None, names: list[str] = NAMES, internal: bytes | None = b"{}\n"
) -> tuple[bytes, BuiltShard]:
    builder = ShardBuilder(compression=compression)
    body = b"".join(bytes(piece) for i, name in enumerate(names) for piece in builder.add(name, bytes([i]) * (i * 300)))
    built = builder.finish(internal)
    return built.head + body + built.tail, built


def test_the_index_says_where_everything_is_in_a_tar_that_tarfile_reads() -> None:
    data, built = build()
    index = built.index
    assert len(data) == index.archive_size == len(data) // 10240 * 10240
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        listed = tar.getmembers()
    assert [m.name for m in listed] == ["__manifest__.jsonl", *NAMES]
    assert index.names() == NAMES == [index.name(i) for i in range(len(index))]
    assert [index.member(i)[:2] for i in range(len(index))] == [(m.offset_data, m.size) for m in listed[1:]]
    for i in range(len(index)):
        member = index.member(i)
        assert crc32c(data[member.offset : member.offset + member.size]) == member.crc32c
    assert index.internal_manifest is not None
    assert data[index.internal_manifest.offset :][: index.internal_manifest.size] == b"{}\n"
    assert index.groups.tolist() == [0, 0, 1, 2, NO_SAMPLE, NO_SAMPLE, 3, 3, 4]
    assert index.samples == 5
    assert index.find("a/1.jpg") == 8  # the last of that name
    assert "nope" not in index
    with pytest.raises(KeyError):
        index.find("nope")
    with pytest.raises(IndexError):
        index.member(9)
    assert index.name(-1) == "a/1.jpg"


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
def test_a_side_car_is_a_safetensors_file_and_comes_back_equal(compression: str | None, tmp_path: Any) -> None:
    _, built = build(compression)
    raw = built.index.to_bytes()
    assert raw == build(compression)[1].index.to_bytes()
    again = ShardIndex.from_bytes(raw)
    assert again.to_bytes() == raw
    assert (again.names(), again.compression, again.samples) == (NAMES, compression, 5)
    path = tmp_path / "a.idx"
    path.write_bytes(raw)
    with safe_open(str(path), "np") as file:
        assert file.get_tensor("offset").tolist() == built.index.offsets.tolist()
        assert file.metadata()["members"] == "9"
    counts = read_counts(raw[:1024], len(raw))
    assert (counts.members, counts.samples, counts.archive_size) == (9, 5, built.index.archive_size)


def test_what_another_safetensors_writer_makes_is_read_too() -> None:
    _, built = build()
    raw = built.index.to_bytes()
    length = struct.unpack_from("<Q", raw)[0]
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    index = built.index
    assert index.crc32c is not None
    tensors = {
        "offset": index.offsets,
        "size": index.sizes,
        "crc32c": index.crc32c,
        "group": index.groups,
        "names": np.frombuffer(index.names_blob, dtype=np.uint8),
        "name_end": index.name_ends,
    }
    assert ShardIndex.from_bytes(save(tensors, metadata)).names() == NAMES


def test_an_archive_without_members() -> None:
    data, built = build(names=[])
    index = ShardIndex.from_bytes(built.index.to_bytes())
    assert (len(index), index.samples, index.names()) == (0, 0, [])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["__manifest__.jsonl"]
    assert build(names=[], internal=None)[1].index.internal_manifest is None


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_fuzz_a_damaged_side_car_is_refused_or_sends_nobody_outside_the_archive(data: Any) -> None:
    raw = bytearray(build(data.draw(st.sampled_from([None, "zstd"])))[1].index.to_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    cut = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    try:
        index = ShardIndex.from_bytes(bytes(cut))
    except ShardReadError:
        return
    for i in range(len(index)):
        member = index.member(i)
        low, high = index.fetch_range(member.offset, member.offset + member.size)
        assert 0 <= low <= high <= index.archive_size or member.size == 0
    assert len(index.names()) == len(index)


def test_load_index_tells_missing_foreign_claimed_and_stale_apart() -> None:
    store = open_store("memory://load-index")
    with pytest.raises(ObjectNotFoundError):
        load_index(store, "a.tar")
    _, built = build()
    store.put(index_key("a.tar"), built.index.to_bytes())
    assert len(load_index(store, "a.tar")) == 9
    with pytest.raises(ShardReadError, match="made for ETag"):
        load_index(store, "a.tar", etag="other")
    for content in (b"", b"v1.2 1\njpg 512 3 a.jpg\n", struct.pack("<3Q", 0, 1024, 2048), b"\x08" + bytes(50)):
        store.put(index_key("b.tar"), content)
        with pytest.raises(ShardReadError, match="not a shard index"):
            load_index(store, "b.tar")
    store.put(index_key("b.tar"), claim_bytes("me"))
    with pytest.raises(ShardReadError, match="claimed"):
        load_index(store, "b.tar")
    store.put("b.tar.s3loader.idx", built.index.to_bytes())
    store.put(index_key("b.tar"), struct.pack("<3Q", 0, 1024, 2048))  # Energon's own stays, ours is beside it
    assert len(load_index(store, "b.tar")) == 9


@pytest.mark.parametrize(
    ("name", "key"),
    [("a.jpg", "a"), ("d/a.seg.png", "d/a"), ("d.x/a", "d.x/a"), ("a", "a"), (".a.b", ".a.b"), ("d/.a", "d/.a"), ("", "")],
)
def test_sample_keys_are_webdatasets(name: str, key: str) -> None:
    assert sample_key(name) == key


def test_a_builder_checks_what_it_is_given() -> None:
    builder = ShardBuilder()
    for path in ("../x", "__manifest__.jsonl", ""):
        with pytest.raises(ConfigError):
            builder.add(path, b"")
    builder.begin("a", 3)
    with pytest.raises(ConfigError, match="not ended"):
        builder.add("b", b"")
    builder.write(b"12")
    with pytest.raises(ConfigError, match="shorter"):
        builder.end()
    with pytest.raises(ConfigError, match="longer"):
        builder.write(b"34")
    builder.write(b"3")
    builder.end()
    one, two = builder.finish(b"x\n"), builder.finish(b"another\n")
    assert one.index.archive_size == two.index.archive_size
    with pytest.raises(ConfigError, match="finished"):
        builder.add("c", b"")
