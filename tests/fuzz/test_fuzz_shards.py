"""Shards: indexes, tar headers, zstd frames with their seek table, and the side-cars of other tools."""

from __future__ import annotations

import io
import random
import struct
import tarfile
import uuid
import warnings
from typing import Any

import pytest
import zstandard
from fuzzing import run_fuzz
from mutating import SAFETENSORS

from s3loader import ShardIndex, ShardReader, build_index, open_store
from s3loader.errors import FormatError
from s3loader.fetch import safetensors
from s3loader.shard import ShardBuilder, index_archive, load_index
from s3loader.shard.compression import unpack


def _shard(rng: random.Random, compression: str | None) -> tuple[bytes, ShardIndex]:
    builder = ShardBuilder(compression=compression, frame_size=600)
    body = b"".join(
        bytes(piece)
        for i in range(1 + rng.randrange(6))
        for piece in builder.add(f"{i // 2}.{'ab'[i % 2]}", rng.randbytes(300))
    )
    built = builder.finish(b"{}\n" if rng.random() < 0.5 else None)
    return built.head + body + built.tail, built.index


def _everything(index: ShardIndex) -> Any:
    rows = [(index.name(i), index.member(i)) for i in range(len(index))]
    where = [index.fetch_range(row.offset, row.offset + row.size) for _, row in rows] if index.random_access else []
    return (rows, where, index.groups.tolist(), index.samples, index.archive_size, index.compression, index.internal_manifest)


def test_indexes() -> None:
    """An index has a checksum of its own: it gives what was written, or an error."""
    store = open_store(f"memory://{uuid.uuid4().hex}")

    def read(data: bytes) -> Any:
        store.put("a.tar.idx", data)
        return _everything(load_index(store, "a.tar"))

    run_fuzz(
        "index",
        lambda rng: _shard(rng, rng.choice([None, "zstd"]))[1].to_bytes(),
        read,
        lambda valid, found: bool(valid == found),
        structure=SAFETENSORS,
        where="a.tar.idx",
    )


def _old(data: bytes) -> bytes:
    """The same index as version 1 wrote it."""
    tensors, metadata = safetensors.decode(data)
    for name in ("crc32c", "grouping", "torn", "edges", "not_files", "not_in_samples"):
        metadata.pop(name, None)
    return safetensors.encode(tensors, {**metadata, "version": "1"})


def test_indexes_of_version_1_send_nobody_outside_the_archive() -> None:
    def read(data: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            index = ShardIndex.from_bytes(data)
        for i in range(len(index)):
            index.name(i)
            member = index.member(i)
            low, high = index.fetch_range(member.offset, member.offset + member.size)
            assert 0 <= low <= high <= index.archive_size or member.size == 0

    run_fuzz("old index", lambda rng: _old(_shard(rng, rng.choice([None, "zstd"]))[1].to_bytes()), read, structure=SAFETENSORS)


def test_version_1_is_read_with_a_warning() -> None:
    index = _shard(random.Random(1), "zstd")[1]
    with pytest.warns(UserWarning, match="no checksum of its own"):
        again = ShardIndex.from_bytes(_old(index.to_bytes()))
    assert _everything(again) == _everything(index)


def _tar(rng: random.Random) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as tar:
        for i in range(1 + rng.randrange(4)):
            info = tarfile.TarInfo(rng.choice([f"{i}.txt", "d" * 120 + f"/{i}.txt", f"é{i}.txt"]))
            info.size = rng.choice([0, 1, 512, 700])
            tar.addfile(info, io.BytesIO(rng.randbytes(info.size)))
    return file.getvalue()


@pytest.mark.parametrize("checksums", [True, False])
def test_tar_archives(checksums: bool) -> None:
    """Headers carry checksums, contents do not: whatever is indexed can be read as the index says."""
    store = open_store(f"memory://{uuid.uuid4().hex}")

    def read(data: bytes) -> None:
        store.put("a.tar", data)
        reader = ShardReader(store, "a.tar", index=index_archive(store, "a.tar", checksums=checksums))
        for i in range(len(reader.index)):
            assert len(reader.read(i)) == reader.index.member(i).size
        ShardIndex.from_bytes(reader.index.to_bytes())

    run_fuzz(f"tar {checksums}", _tar, read, where="a.tar")


@pytest.mark.parametrize("compression", ["zstd", "gzip", "bz2", "xz"])
def test_compressed_archives(compression: str) -> None:
    """Frames, seek tables and streams: whatever is indexed can be read as the index says."""
    store = open_store(f"memory://{uuid.uuid4().hex}")

    def read(data: bytes) -> None:
        store.put("a.tar", data)
        made = index_archive(store, "a.tar")
        reader = ShardReader(store, "a.tar", index=made)
        assert [len(member.body.read()) for member in reader.iter_members()] == made.sizes.tolist()

    run_fuzz(f"archive {compression}", lambda rng: _shard(rng, compression)[0], read, where="a.tar")


def test_zstd_frames() -> None:
    """One frame gives exactly as many bytes as it should, or an error; nothing it states takes memory before."""

    def make(rng: random.Random) -> bytes:
        content = rng.choice([rng.randbytes(rng.randrange(300)), bytes(rng.randrange(100_000))])
        packed = zstandard.ZstdCompressor(write_checksum=True, write_content_size=rng.random() < 0.8).compress(content)
        return struct.pack("<I", len(content)) + packed

    def read(data: bytes) -> bytes:
        if len(data) < 4:
            raise FormatError("cut off")
        (size,) = struct.unpack_from("<I", data)
        plain = unpack(data[4:], size)
        assert len(plain) == size
        return plain

    run_fuzz("zstd frame", make, read)


@pytest.mark.parametrize("tool", ["wds2idx", "energon"])
def test_side_cars_of_other_tools(tool: str) -> None:
    """Whatever stands in one, the index is that of the archive."""
    store = open_store(f"memory://{uuid.uuid4().hex}")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for i in range(6):
            info = tarfile.TarInfo(f"{i // 2}.{'ab'[i % 2]}")
            info.size = 100 * i
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    archive.seek(0)
    with tarfile.open(fileobj=archive) as tar:
        members = tar.getmembers()
    store.put("a.tar", archive.getvalue())
    expected = _everything(index_archive(store, "a.tar", checksums=False))
    if tool == "wds2idx":
        rows = [members[i : i + 2] for i in range(0, 6, 2)]
        lines = [" ".join(f"{m.name[-1]} {m.offset_data} {m.size} {m.name}" for m in row) for row in rows]
        side_car, good = "a.idx", ("v1.2 3\n" + "\n".join(lines) + "\n").encode()
    else:
        end = members[-1].offset_data + 512
        side_car, good = "a.tar.idx", struct.pack("<4Q", *(m.offset for m in members[::2]), end)

    def read(data: bytes) -> Any:
        for key in ("a.tar.idx", "a.tar.s3loader.idx"):
            store.delete(key)
        store.put(side_car, data)
        build_index("a.tar", store=store, checksums=False, force=True)
        return _everything(load_index(store, "a.tar"))

    run_fuzz(f"side-car {tool}", lambda _: good, read, lambda _, found: bool(found == expected))
