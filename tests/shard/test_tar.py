"""Tar headers against `tarfile`, and a walk that gives the right members or a typed error for every input."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.errors import ConfigError, ShardReadError
from s3loader.shard import TarMember, walk
from s3loader.shard.tar import check_member_path, end_of_archive, member_header, unsafe_reason

PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=260).filter(
    lambda path: not path.endswith("/") and unsafe_reason(path) is None
)


def members(data: bytes, **options: Any) -> list[TarMember]:
    return list(walk(lambda offset, size: data[offset : offset + size], **options))


def archive(entries: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT, **info: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, data in entries:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            for field, value in info.items():
                setattr(header, field, value)
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


@given(PATHS, st.integers(0, 1 << 40))
@settings(max_examples=50, deadline=None)
def test_headers_are_byte_for_byte_tarfiles(path: str, size: int) -> None:
    info = tarfile.TarInfo(path)
    info.size = size
    assert member_header(path, size) == info.tobuf(tarfile.PAX_FORMAT)


@given(st.lists(st.tuples(PATHS, st.binary(max_size=1200)), max_size=6), st.sampled_from([0, 1, 2]))
@settings(max_examples=50, deadline=None)
def test_the_walk_finds_what_tarfile_finds(entries: list[tuple[str, bytes]], kind: int) -> None:
    kinds = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    try:
        data = archive(entries, kinds[kind])
    except ValueError:  # ustar has no room for some names
        return
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers()]
    found = members(data)
    assert [(m.name, m.offset, m.size) for m in found] == expected
    assert [data[m.offset : m.offset + m.size] for m in found] == [content for _, content in entries]


def test_what_is_written_here_tarfile_and_the_walk_read() -> None:
    data = b"".join([member_header("a", 3), b"abc".ljust(512, b"\0"), end_of_archive(1024)])
    assert len(data) == 10240
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.name, m.size, m.mtime, m.uid, m.mode) for m in tar.getmembers()] == [("a", 3, 0, 0, 0o644)]
    assert members(data) == [TarMember("a", 0, 512, 3, "file")]


def test_several_archives_in_a_row_are_one() -> None:
    one, two = archive([("a", b"1")]), archive([("b", b"22")])
    found = members(one + two)
    assert [(m.name, m.size) for m in found] == [("a", 1), ("b", 2)]
    assert found[1].offset == len(one) + 512


def test_base_256_sizes() -> None:
    header = bytearray(member_header("big", 0))
    header[124:136] = b"\x80" + (1 << 35).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)

    def read(offset: int, size: int) -> bytes:
        return (bytes(header) + bytes(size))[:size] if offset == 0 else bytes(size) if offset < (1 << 35) + 2048 else b""

    assert [(m.name, m.size) for m in walk(read)] == [("big", 1 << 35)]


def test_links_folders_and_devices_are_listed_and_have_no_content() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("s", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE), ("p", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "../../etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(info)
    found = members(file.getvalue())
    assert [m.kind for m in found] == ["dir", "symlink", "hardlink", "fifo"]
    assert found[1].link == "../../etc/passwd"


def test_global_pax_headers_and_names_that_are_not_utf8() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as tar:
        tar.addfile(tarfile.TarInfo("plain"))
    assert [m.name for m in members(file.getvalue())] == ["plain"]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("na\xefve"))
    assert [m.name for m in members(file.getvalue())] == ["na\udcefve"]


@pytest.mark.parametrize("version", ["GNU.sparse.major", "GNU.sparse.name"])
def test_sparse_and_multi_volume_members_are_refused(version: str) -> None:
    for kind, message in ((b"S", "sparse"), (b"M", "multi-volume")):
        data = archive([("x", b"")], tarfile.GNU_FORMAT, type=kind)
        with pytest.raises(ShardReadError, match=message):
            members(data)
    data = archive([("x", b"")], pax_headers={version: "1"})
    with pytest.raises(ShardReadError, match="sparse"):
        members(data)


def test_a_cut_off_archive_says_where_and_after_which_member() -> None:
    data = archive([("a", b"1" * 600), ("b", b"2" * 600)])
    for length in (1, 511, 512, 1000, 1536, 1600, 2048, 3072):
        with pytest.raises(ShardReadError) as caught:
            members(data[:length])
        assert caught.value.offset <= 3072
    assert caught.value.member == "b"
    assert [m.name for m in members(data[:3072], allow_missing_end=True)] == ["a", "b"]
    with pytest.raises(ShardReadError):
        members(data[:3000] + b"garbage")
    with pytest.raises(ShardReadError):
        members(b"")


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_fuzz_every_damaged_archive_gives_members_or_a_typed_error(data: Any) -> None:
    base = archive([("a/" + "n" * 120, b"1" * 700), ("b.txt", b"2" * 30), ("é.bin", b"")], data.draw(st.sampled_from([1, 2])))
    spoiled = bytearray(base)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 4096))
        patch = data.draw(st.binary(min_size=1, max_size=16))
        spoiled[at : at + len(patch)] = patch
    spoiled = spoiled[: data.draw(st.integers(0, len(spoiled)))]
    reads = []

    def read(offset: int, size: int) -> bytes:
        reads.append(size)
        assert len(reads) < 200  # never round in circles
        assert size <= 1 << 20  # never much at once
        return bytes(spoiled[offset : offset + size])

    try:
        for member in walk(read):
            assert member.size >= 0
            assert member.offset >= 512
    except ShardReadError:
        pass


@given(st.binary(max_size=3000))
@settings(max_examples=100, deadline=None)
def test_fuzz_bytes_that_are_no_archive(data: bytes) -> None:
    with pytest.raises(ShardReadError):
        members(data)


@pytest.mark.parametrize(
    "path", ["", "/abs", "../up", "a/../b", "a/..", "dir/", "a\0b", "C:\\x", "\\\\host", "a\\..\\b", "\ud800"]
)
def test_paths_that_cannot_be_extracted_are_not_written(path: str) -> None:
    with pytest.raises(ConfigError):
        check_member_path(path)


@pytest.mark.parametrize("path", ["a", "a/b.c", "..a", "a..b/...", ".hidden", "Ünï/cödé", "a b", "x" * 300])
def test_ordinary_paths_are_fine(path: str) -> None:
    check_member_path(path)
