"""Indexes for archives that came without one."""

from __future__ import annotations

import io
import struct
import tarfile
import uuid
from pathlib import Path
from typing import Any

import pytest
import webdataset

from s3loader import ShardReader, open_store
from s3loader.errors import ConfigError, ObjectNotFoundError, ShardReadError
from s3loader.shard import build_index, load_index
from s3loader.shard.foreign import parse_energon, parse_wds2idx, wds2idx_key
from s3loader.store import ForwardingBackend


def write_webdataset(folder: Path, shards: int = 3, samples: int = 5) -> None:
    """Tars as WebDataset's own writer makes them."""
    for number in range(shards):
        with webdataset.TarWriter(str(folder / f"shard-{number}.tar")) as sink:
            for i in range(samples):
                sink.write({"__key__": f"{number}/{i:03d}", "txt": f"text {number} {i}", "cls": i, "bin": bytes(5000)})


def tar_members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return [member for member in tar.getmembers() if member.isreg()]


def test_webdataset_shards_are_indexed_in_parallel_and_only_once(tmp_path: Path) -> None:
    write_webdataset(tmp_path)
    seen: list[Any] = []
    results = build_index(f"file://{tmp_path}/", progress=seen.append)
    assert [(result.action, result.members, result.samples) for result in results] == [("built", 15, 5)] * 3
    assert len(seen) == 3
    store = open_store(f"file://{tmp_path}")
    for number in range(3):
        index = load_index(store, f"shard-{number}.tar", etag=store.head(f"shard-{number}.tar").etag)
        expected = [(m.name, m.offset_data, m.size) for m in tar_members(tmp_path / f"shard-{number}.tar")]
        assert [(index.name(i), *index.member(i)[:2]) for i in range(len(index))] == expected
        assert index.crc32c is not None
        assert index.groups.tolist() == [i // 3 for i in range(15)]
    assert ShardReader(store, "shard-1.tar").open("1/002.txt").read() == b"text 1 2"
    write_webdataset(tmp_path, shards=1, samples=2)  # replaced: only this one is read again
    (tmp_path / "shard-2.tar.idx").unlink()  # as after a crash
    assert [result.action for result in build_index(f"file://{tmp_path}/")] == ["built", "kept", "built"]
    assert [result.action for result in build_index(f"{tmp_path}/", force=True)] == ["built"] * 3


def test_headers_alone_when_checksums_are_not_wanted() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(5):
            info = tarfile.TarInfo(f"{i}.bin")
            info.size = 4 << 20
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.put("a.tar", file.getvalue())
    moved = _Counter(store.backend)
    counting = type(store)(store.url, moved, options=store.options)
    build_index("a.tar", checksums=False, store=counting)
    assert moved.bytes < 1 << 20
    assert load_index(store, "a.tar").crc32c is None
    assert ShardReader(store, "a.tar").open("3.bin").read() == bytes([3]) * (4 << 20)
    assert build_index("a.tar", checksums=False, store=store)[0].action == "kept"
    assert build_index("a.tar", store=store)[0].action == "built"  # now with checksums
    assert load_index(store, "a.tar").crc32c is not None


class _Counter(ForwardingBackend):
    bytes = 0

    def get(self, *args: Any, **options: Any) -> Any:
        meta, data = self.inner.get(*args, **options)
        self.bytes += len(data)
        return meta, data


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_archives_in_a_row(kind: int) -> None:
    names = ["short.txt", "d/" + "n" * 150 + ".txt", "é" * 80 + ".txt", "d/" + "m" * 300]
    parts = []
    for half in (names[:2], names[2:]):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
            for name in half:
                info = tarfile.TarInfo(name)
                info.size = len(name)
                tar.addfile(info, io.BytesIO(bytes(len(name))))
        parts.append(file.getvalue())
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.put("a.tar", b"".join(parts))
    build_index("a.tar", store=store)
    assert load_index(store, "a.tar").names() == names


def test_one_bad_archive_does_not_stop_the_others(tmp_path: Path) -> None:
    write_webdataset(tmp_path, shards=2)
    cut = (tmp_path / "shard-0.tar").read_bytes()
    (tmp_path / "shard-0.tar").write_bytes(cut[:20000])
    urls = [f"file://{tmp_path}/shard-0.tar", f"file://{tmp_path}/gone.tar", str(tmp_path / "shard-1.tar")]
    results = build_index(urls, errors="return")
    assert [result.action for result in results] == ["failed", "failed", "built"]
    assert isinstance(results[0].error, ShardReadError)
    assert "shard-0.tar" in str(results[0].error)
    assert isinstance(results[1].error, ObjectNotFoundError)
    with pytest.raises(ShardReadError):
        build_index(urls)
    with pytest.raises(ConfigError):
        build_index(f"file://{tmp_path}/empty/")


def test_dali_and_energon_indexes(tmp_path: Path) -> None:
    write_webdataset(tmp_path, shards=2, samples=4)
    store = open_store(f"file://{tmp_path}")
    members = tar_members(tmp_path / "shard-0.tar")
    rows = [members[i : i + 3] for i in range(0, 12, 3)]
    lines = [" ".join(f"{m.name.split('.')[1]} {m.offset_data} {m.size} {m.name}" for m in row) for row in rows]
    (tmp_path / "shard-0.idx").write_text("v1.2 4\n" + "\n".join(lines) + "\n")
    assert wds2idx_key("shard-0.tar") == "shard-0.idx"
    components = parse_wds2idx((tmp_path / "shard-0.idx").read_bytes())
    assert [(c.sample, c.extension, c.offset) for c in components] == [
        (i // 3, m.name.split(".")[1], m.offset_data) for i, m in enumerate(members)
    ]
    other = tar_members(tmp_path / "shard-1.tar")
    energon = [other[i].offset for i in range(0, 12, 3)]
    last = other[-1]
    end = last.offset_data + (last.size + 511) // 512 * 512
    theirs = struct.pack("<5Q", *energon, end)
    (tmp_path / "shard-1.tar.idx").write_bytes(theirs)
    assert parse_energon(theirs).tolist() == [*energon, end]
    build_index([str(tmp_path / "shard-0.tar"), str(tmp_path / "shard-1.tar")], checksums=False)
    for number in (0, 1):
        index = load_index(store, f"shard-{number}.tar")
        assert index.names() == [m.name for m in tar_members(tmp_path / f"shard-{number}.tar")]
        assert index.groups.tolist() == [i // 3 for i in range(12)]
        assert ShardReader(store, f"shard-{number}.tar").open(f"{number}/001.txt").read() == f"text {number} 1".encode()
    assert (tmp_path / "shard-1.tar.idx").read_bytes() == theirs  # Energon keeps its own


@pytest.mark.parametrize(
    "text", ["", "v1.2", "v9 1\n", "v1.2 1\n", "v1.2 1\njpg 1 2\n", "v1.2 1\njpg x 2 n\n", "v1.2 2\njpg 1 2 n\n"]
)
def test_bad_dali_indexes(text: str) -> None:
    with pytest.raises(ShardReadError):
        parse_wds2idx(text.encode())


@pytest.mark.parametrize("data", [b"", b"1234567", struct.pack("<2Q", 512, 512), struct.pack("<2Q", 0, 100)])
def test_bad_energon_indexes(data: bytes) -> None:
    with pytest.raises(ShardReadError):
        parse_energon(data)


def test_side_cars_that_do_not_fit_the_archive_are_not_believed(tmp_path: Path) -> None:
    write_webdataset(tmp_path, shards=1)
    (tmp_path / "shard-0.idx").write_text("v1.2 1\ntxt 512 7 wrong.txt\n")
    build_index(str(tmp_path / "shard-0.tar"), checksums=False)
    index = load_index(open_store(f"file://{tmp_path}"), "shard-0.tar")
    assert index.names() == [m.name for m in tar_members(tmp_path / "shard-0.tar")]
