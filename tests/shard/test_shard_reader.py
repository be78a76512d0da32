"""Members by ranged reads: zstd that any tool decompresses, gzip in bounded memory, foreign and changed archives."""

from __future__ import annotations

import gzip
import io
import random
import shutil
import subprocess
import tarfile
import tracemalloc
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader import ObjectStore, S3ExchangeStore, ShardReader, extract, open_store
from s3loader.errors import IntegrityError, ObjectChangedError, ObjectNotFoundError, ShardReadError
from s3loader.shard import ShardBuilder, ShardUpload, index_archive, index_key, list_archive
from s3loader.shard.compression import decompressor, read_seek_table
from s3loader.shard.tar import unsafe_reason
from s3loader.shard.upload import upload_pool

RANDOM = random.Random(1)
DATA = {f"d{i % 7}/{i:04d}.{ext}": RANDOM.randbytes(RANDOM.randrange(3000)) for i in range(60) for ext in ("bin", "txt")}


@pytest.fixture
def store() -> ObjectStore:
    return open_store(f"memory://{uuid.uuid4().hex}")


def put(store: ObjectStore, key: str, compression: str | None, data: dict[str, bytes] = DATA) -> None:
    items: Any = [{"source": content, "member_path": name} for name, content in data.items()]
    S3ExchangeStore(store).put_shard_archive(key, items, compression=compression)


def plain_tar(data: dict[str, bytes] = DATA) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in data.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def read_all(reader: ShardReader, positions: list[int] | None = None) -> list[tuple[str, bytes]]:
    return [(member.name, member.body.read()) for member in reader.iter_members(positions)]


@pytest.mark.parametrize("compression", [None, "gzip", "bz2", "xz", "zstd"])
@pytest.mark.parametrize("side_car", [True, False])
def test_all_members_and_single_ones(store: ObjectStore, compression: str | None, side_car: bool) -> None:
    put(store, "a.tar", compression)
    if not side_car:
        store.delete(index_key("a.tar"))
    assert read_all(ShardReader(store, "a.tar")) == list(DATA.items())
    reader = ShardReader(store, "a.tar")
    names = list(DATA)
    for name in (names[0], names[-1], names[55]):
        assert reader.open(name).read() == DATA[name]
    wanted = [100, 3, 3, 4, 5, 119, 0]
    assert read_all(reader, wanted) == [(names[i], DATA[names[i]]) for i in wanted]
    assert len(reader.open("__manifest__.jsonl").read().splitlines()) == len(DATA)
    with pytest.raises(KeyError):
        reader.open("nope")


PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=130).filter(
    lambda path: not path.endswith("/") and unsafe_reason(path) is None and path != "__manifest__.jsonl"
)


@given(
    st.lists(st.tuples(PATHS, st.binary(max_size=900)), max_size=12),
    st.sampled_from([None, "gzip", "bz2", "xz", "zstd"]),
    st.integers(1, 2000),
    st.data(),
)
@settings(max_examples=50, deadline=None)
def test_what_goes_in_comes_out_and_the_index_is_the_one_a_reader_would_make(
    members: list[tuple[str, bytes]], compression: str | None, frame_size: int, data: Any
) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    builder = ShardBuilder(compression=compression, frame_size=frame_size)
    pool = upload_pool(1)
    upload = ShardUpload(store, "a.tar", pool=pool, compression=compression)
    for path, content in members:
        if data.draw(st.booleans()):
            upload.write(builder.add(path, content))
        else:
            half = data.draw(st.integers(0, len(content)))
            for pieces in (builder.begin(path, len(content)), builder.write(content[:half]), builder.write(content[half:])):
                upload.write(pieces)
            upload.write(builder.end())
    _, index = upload.finish(builder.finish(b"{}\n"))
    assert index_archive(store, "a.tar").to_bytes() == index.to_bytes() == store.get(index_key("a.tar"))
    assert read_all(ShardReader(store, "a.tar")) == members
    positions = data.draw(st.lists(st.integers(0, len(members) - 1), max_size=8)) if members else []
    assert read_all(ShardReader(store, "a.tar"), positions) == [members[i] for i in positions]


def test_zstd_tools_read_our_zstd_shards(store: ObjectStore, tmp_path: Path) -> None:
    put(store, "a.tar.zst", "zstd")
    packed = store.get("a.tar.zst")
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed), read_across_frames=True) as stream:
        unpacked = stream.read()
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as tar:
        assert tar.getnames() == ["__manifest__.jsonl", *DATA]
    assert b"".join(decompressor("zstd", iter([packed]))) == unpacked
    table = read_seek_table(packed, len(packed))
    assert table is not None
    assert (sum(table.plain), len(table.plain) > 2) == (len(unpacked), True)
    tool = shutil.which("zstd")
    if tool is not None:  # the package's Python module proved it above; the tool where it is installed
        (tmp_path / "a.tar.zst").write_bytes(packed)
        run = subprocess.run([tool, "-dc", str(tmp_path / "a.tar.zst")], capture_output=True, check=True)
        assert run.stdout == unpacked


def test_zstd_of_others_is_read_with_and_without_a_seek_table(store: ObjectStore) -> None:
    tar = plain_tar()
    store.put("one.tar.zst", zstandard.ZstdCompressor().compress(tar))
    frames = [zstandard.ZstdCompressor().compress(tar[i : i + 5000]) for i in range(0, len(tar), 5000)]
    skippable = b"\x53\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"xyz"
    store.put("many.tar.zst", skippable + b"".join(frames))
    for key in ("one.tar.zst", "many.tar.zst"):
        assert read_all(ShardReader(store, key)) == list(DATA.items())
        assert not ShardReader(store, key).index.random_access


def test_gzip_streams_in_bounded_memory(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    size = 24 << 20
    block = bytes(1 << 20)
    raw = tmp_path / "big.tar.gz"
    with gzip.open(raw, "wb", compresslevel=1) as file, tarfile.open(fileobj=file, mode="w|") as tar:
        for name in ("first", "second"):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BufferedReader(_Zeros(size)))
    tracemalloc.start()
    try:
        body = ShardReader(store, "big.tar.gz").open("second")
        total = 0
        while chunk := body.read(len(block)):
            total += len(chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == size
    assert peak < 24 << 20


class _Zeros(io.RawIOBase):
    def __init__(self, size: int) -> None:
        self.left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.left)
        self.left -= count
        return count


def test_a_large_member_streams_and_its_last_read_verifies(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    content = RANDOM.randbytes(1 << 20) * 20
    for compression in (None, "zstd"):
        put(store, "a.tar", compression, {"small": b"x", "large": content})
        body = ShardReader(store, "a.tar").open("large")
        assert body.size == len(content)
        assert b"".join(body.iter_chunks(1 << 20)) == content
    put(store, "a.tar", None, {"large": content})
    index = ShardReader(store, "a.tar").index
    assert index.crc32c is not None
    store.put(index_key("a.tar"), replace(index, crc32c=index.crc32c ^ np.uint32(1)).to_bytes())
    body = ShardReader(store, "a.tar").open("large")
    with pytest.raises(IntegrityError) as caught:
        body.read()
    assert caught.value.member == "large"


def test_a_replaced_archive_is_never_read_through_an_old_index(store: ObjectStore) -> None:
    put(store, "a.tar", None, {"x": b"1" * 100, "y": b"2" * 100})
    reader = ShardReader(store, "a.tar")
    assert reader.open("x").read() == b"1" * 100
    put(store, "a.tar", None, {"y": b"3" * 100, "x": b"4" * 100})  # with its index
    assert reader.open("x").read() == b"4" * 100
    store.put("a.tar", plain_tar({"x": b"5" * 100}))  # without: the side-car is stale now
    assert reader.open("x").read() == b"5" * 100
    assert ShardReader(store, "a.tar").open("x").read() == b"5" * 100
    pinned = ShardReader(store, "a.tar", etag="another")
    with pytest.raises(ObjectChangedError):
        pinned.open("x")
    with pytest.raises(ObjectNotFoundError):
        ShardReader(store, "gone.tar").open("x")


@pytest.mark.parametrize("compression", ["gzip", "bz2", "xz", "zstd"])
def test_damaged_streams_are_typed_errors(store: ObjectStore, compression: str) -> None:
    put(store, "a.tar", compression)
    whole = store.get("a.tar")
    for spoiled in (whole[: len(whole) // 2], whole[:300], whole[:100] + bytes(50) + whole[150:]):
        store.put("b.tar", spoiled)
        with pytest.raises(ShardReadError):
            read_all(ShardReader(store, "b.tar"))


def test_a_short_zstd_stream_cannot_fill_the_memory() -> None:
    maker = zstandard.ZstdCompressor(level=1).compressobj()
    zeros = bytes(1 << 20)
    bomb = b"".join([maker.compress(zeros) for _ in range(256)]) + maker.flush()
    sizes = [len(piece) for piece in decompressor("zstd", iter([bomb]))]
    assert sum(sizes) == 256 << 20
    assert max(sizes) <= 130 << 20  # 4 KiB of RLE blocks


def test_extraction_refuses_what_would_leave_the_folder_and_lists_it_safely(store: ObjectStore, tmp_path: Path) -> None:
    put(store, "good.tar", None)
    written = extract(store, "good.tar", tmp_path / "out")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in written] == list(DATA)
    assert all(path.read_bytes() == DATA[path.relative_to(tmp_path / "out").as_posix()] for path in written)
    for name, kind in (("../up", b"0"), ("/abs", b"0"), ("a/../../b", b"0"), ("link", b"2"), ("hard", b"1"), ("fifo", b"6")):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("fine"))
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind in b"12" else ""
            tar.addfile(info)
        store.put("bad.tar", file.getvalue())
        assert [member.name for member in list_archive(store, "bad.tar")] == ["fine", name]
        with pytest.raises(ShardReadError, match="refusing to extract"):
            extract(store, "bad.tar", tmp_path / "bad")
        assert not (tmp_path / "bad").exists()
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "d0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="outside"):
        extract(store, "good.tar", tmp_path / "trap")
