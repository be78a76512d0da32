"""What is not a plain file in a tar: links are read, other kinds are named, odd archives are refused at once."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from s3loader import ObjectStore, ShardReader, open_store
from s3loader.errors import ConfigError, ShardReadError
from s3loader.exchange import S3ExchangeStore
from s3loader.loader import Dataset, Loader, from_webdataset, open_dataset
from s3loader.shard import build_index, list_archive, load_index


@pytest.fixture
def store() -> ObjectStore:
    return open_store(f"memory://{uuid.uuid4().hex}")


def tar(*members: tuple[str, bytes] | tuple[str, bytes, str], kind: int = tarfile.GNU_FORMAT) -> bytes:
    """An archive of ``(name, content)`` and ``(name, type flag, target)``."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for member in members:
            info = tarfile.TarInfo(member[0])
            if len(member) == 3:
                info.type, info.linkname = member[1], member[2]
                archive.addfile(info)
            else:
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


HARD, SYM, DIR, FIFO, CHR = tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE


def samples_of(dataset: Dataset, **options: Any) -> dict[str, dict[str, bytes]]:
    return {
        sample["__key__"]: {name: bytes(value) for name, value in sample.items() if name != "__key__"}
        for batch in Loader(dataset, batch_size=3, **options)
        for sample in batch
    }


BIG = bytes(range(256)) * 4000
LINKED = (
    ("d", DIR, ""),
    ("d/a.jpg", b"picture a"),
    ("d/a.cls", b"1"),
    ("d/b.jpg", HARD, "d/a.jpg"),
    ("d/b.cls", b"2"),
    ("d/big.jpg", BIG),
    ("d/big.cls", b"3"),
    ("d/c.jpg", SYM, "e.jpg"),
    ("d/c.cls", SYM, "../d/./b.cls"),
    ("link", SYM, "d"),
    ("d/f.jpg", SYM, "../link/c.jpg"),
    ("d/f.cls", b"4"),
    ("d/e.jpg", b"picture e"),
    ("d/e.cls", HARD, "d/b.cls"),
    ("d/empty.jpg", b""),
    ("d/empty.cls", HARD, "d/empty.jpg"),
)
EXPECTED = {
    "d/a": {"jpg": b"picture a", "cls": b"1"},
    "d/b": {"jpg": b"picture a", "cls": b"2"},
    "d/big": {"jpg": BIG, "cls": b"3"},
    "d/c": {"jpg": b"picture e", "cls": b"2"},
    "d/f": {"jpg": b"picture e", "cls": b"4"},
    "d/e": {"jpg": b"picture e", "cls": b"2"},
    "d/empty": {"jpg": b"", "cls": b""},
}


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("shuffle", ["none", "block", "full"])
def test_links_are_rows_that_point_at_their_targets_bytes(store: ObjectStore, kind: int, shuffle: str) -> None:
    store.put("a.tar", tar(*LINKED, kind=kind))
    dataset = from_webdataset("a.tar", store=store)
    assert samples_of(dataset, shuffle=shuffle) == EXPECTED
    assert samples_of(dataset, shuffle=shuffle, memory_limit="64KiB") == EXPECTED
    only = from_webdataset("a.tar", store=store, members=["cls"])
    assert samples_of(only, shuffle=shuffle) == {key: {"cls": sample["cls"]} for key, sample in EXPECTED.items()}
    index = load_index(store, "a.tar")
    reader = ShardReader(store, "a.tar")
    assert {member.name: bytes(member.body.read()) for member in reader.iter_members()} == {
        f"{key}.{extension}": value for key, sample in EXPECTED.items() for extension, value in sample.items()
    }
    assert index.find("d/b.jpg") == 2
    assert index.member(2) == index.member(0)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_links_of_archives_that_are_read_in_order(store: ObjectStore, compression: str) -> None:
    data = tar(*LINKED)
    packed = gzip.compress(data) if compression == "gzip" else zstandard.ZstdCompressor().compress(data)
    store.put("a.tar.x", packed)
    for side_car in (False, True):
        if side_car:
            build_index("a.tar.x", store=store)
        found = {m.name: bytes(m.body.read()) for m in ShardReader(store, "a.tar.x").iter_members()}
        assert found == {f"{key}.{ext}": value for key, sample in EXPECTED.items() for ext, value in sample.items()}
    exchange = S3ExchangeStore(store)
    store.put("a.tar.gz", gzip.compress(data))
    assert exchange.get_object("a.tar.gz#d/b.jpg").read() == b"picture a"


def test_every_tar_of_this_machine_links_alike(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.jpg").write_bytes(b"picture")
    (files / "a.cls").write_bytes(b"1")
    (files / "b.jpg").hardlink_to(files / "a.jpg")
    (files / "b.cls").symlink_to("a.cls")
    made = 0
    for number, command in enumerate(
        (
            ["tar", "-C", str(files), "-cf", "-", "--sort=name", "."],
            ["tar", "-C", str(files), "--format=pax", "-cf", "-", "a.jpg", "a.cls", "b.jpg", "b.cls"],
            ["tar", "-C", str(files), "--format=v7", "-cf", "-", "a.jpg", "a.cls", "b.jpg", "b.cls"],
            ["bsdtar", "-C", str(files), "-cf", "-", "a.jpg", "a.cls", "b.jpg", "b.cls"],
            ["busybox", "tar", "-C", str(files), "-cf", "-", "a.jpg", "a.cls", "b.jpg", "b.cls"],
        )
    ):
        if shutil.which(command[0]) is None:
            continue
        path = tmp_path / f"{number}.tar"
        path.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
        found = samples_of(open_dataset(f"file://{path}", group="webdataset"))
        names = {key.removeprefix("./"): sample for key, sample in found.items()}
        assert names == {key: {"jpg": b"picture", "cls": b"1"} for key in ("a", "b")}
        made += 1
    assert made


def test_a_hard_link_that_brings_its_bytes_is_a_file(store: ObjectStore) -> None:
    data = bytearray(tar(("a.jpg", b"one"), ("b.jpg", HARD, "a.jpg")))
    plain = tar(("b.jpg", b"two"))
    header = bytearray(plain[:512])
    header[156:157] = HARD
    header[157:162] = b"a.jpg"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    store.put("a.tar", bytes(data[:1024] + header + plain[512:]))
    assert samples_of(from_webdataset("a.tar", store=store)) == {"a": {"jpg": b"one"}, "b": {"jpg": b"two"}}


def test_other_kinds_are_counted_and_named(store: ObjectStore) -> None:
    members = [("a.jpg", b"1"), ("d", DIR, ""), ("f.jpg", FIFO, ""), ("c.jpg", CHR, ""), ("gone.jpg", SYM, "nothing")]
    members += [("out.jpg", SYM, "../../etc/passwd"), ("abs.jpg", SYM, "/etc/passwd"), ("h.jpg", HARD, "nothing")]
    members += [("x.jpg", SYM, "y.jpg"), ("y.jpg", SYM, "x.jpg"), ("folder.jpg", SYM, "d"), ("README", b"2")]
    store.put("a.tar", tar(*members))
    (report,) = build_index("a.tar", store=store)
    assert {kind: (some.count, some.names) for kind, some in report.not_files.items()} == {
        "folder": (1, ("d/",)),
        "fifo": (1, ("f.jpg",)),
        "character device": (1, ("c.jpg",)),
        "symbolic link without its file": (1, ("gone.jpg",)),
        "symbolic link out of the archive": (2, ("out.jpg", "abs.jpg")),
        "hard link without its file": (1, ("h.jpg",)),
        "symbolic link in a circle": (2, ("x.jpg", "y.jpg")),
        "symbolic link to a folder": (1, ("folder.jpg",)),
    }
    assert report.not_in_samples["without extension"].names == ("README",)
    assert (report.members, report.samples) == (2, 1)
    (again,) = build_index("a.tar", store=store)
    assert (again.action, again.not_files) == ("kept", report.not_files)
    text = str(Loader(from_webdataset("a.tar", store=store), batch_size=1).explain())
    for name in ("f.jpg", "gone.jpg", "out.jpg", "h.jpg", "README"):
        assert name in text


def test_many_odd_members_leave_the_head_of_an_index_short(store: ObjectStore) -> None:
    members: list[Any] = [("a.jpg", b"1")]
    members += [("\u00fc" * 90 + str(i), FIFO, "") for i in range(50)] + [("\u00fc" * 90 + f"_{i}", b"") for i in range(50)]
    store.put("a.tar", tar(*members))
    dataset = from_webdataset("a.tar", store=store)
    assert len(dataset) == 1
    assert dataset.left_out["fifo"].count == 50


# -- odd archives ---------------------------------------------------------------------------------

GOOD = tar(("a.jpg", b"1" * 600), ("b.jpg", b"2"))
SEQUENTIAL: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("compression", SEQUENTIAL)
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("group", [None, "webdataset"])
def test_what_has_no_random_access_is_refused_before_it_is_read(
    store: ObjectStore, compression: str, suffix: str, group: Any
) -> None:
    key = f"a{suffix}"
    store.put(key, SEQUENTIAL[compression](GOOD))
    with pytest.raises(ShardReadError, match="cannot be read at random") as caught:
        open_dataset(key, store=store, group=group)
    assert compression in caught.value.message
    assert "decompress it" in str(caught.value.hint)
    assert not store.exists(f"{key}.idx")  # nothing was indexed for it
    build_index(key, store=store)  # for readers in order
    with pytest.raises(ShardReadError, match="cannot be read at random"):
        open_dataset(key, store=store, group=group)


OTHERS = {
    "lzma": lzma.compress(GOOD, format=lzma.FORMAT_ALONE),
    "compress (.Z)": b"\x1f\x9d\x90" + bytes(600),
    "lz4": b"\x04\x22\x4d\x18" + bytes(600),
    "lzip": b"LZIP\x01" + bytes(600),
    "zip": b"PK\x03\x04" + bytes(600),
    "7-zip": b"7z\xbc\xaf\x27\x1c" + bytes(600),
    "Parquet": b"PAR1" + bytes(600),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_named_as_what_they_are(store: ObjectStore, kind: str) -> None:
    store.put("a.tar", OTHERS[kind])
    for use in (
        lambda: open_dataset("a.tar", store=store),
        lambda: build_index("a.tar", store=store),
        lambda: list_archive(store, "a.tar"),
        lambda: list(ShardReader(store, "a.tar").iter_members()),
    ):
        with pytest.raises(ShardReadError) as caught:
            use()
        assert kind in caught.value.message
        assert caught.value.hint


def test_a_member_may_be_called_like_a_magic_number(store: ObjectStore) -> None:
    store.put("a.tar", tar(("PK\x03\x04.jpg", b"1"), ("]", b"2")))
    store.put("b.tar", tar(("]", b"2")))
    assert len(open_dataset("a.tar", store=store)) == 2
    assert len(open_dataset("b.tar", store=store)) == 1


ENDS = {
    "trailing garbage": (GOOD + b"garbage", "allow_trailing"),
    "a trailing block": (GOOD + b"garbage".ljust(1024, b"x"), "allow_trailing"),
    "no end": (GOOD[:2560], "allow_missing_end"),
}


@pytest.mark.parametrize("case", ENDS)
def test_odd_ends_are_refused_with_the_option_that_accepts_them(store: ObjectStore, case: str) -> None:
    data, option = ENDS[case]
    store.put("a.tar", data)
    S3ExchangeStore(store).write_manifest("m.jsonl", [{"kind": "shard", "archive_key": "a.tar"}])
    for url in ("a.tar", "m.jsonl"):
        with pytest.raises(ShardReadError) as caught:
            open_dataset(url, store=store, group="webdataset")
        assert option in str(caught.value)
    with pytest.raises(ShardReadError, match=option):
        build_index("a.tar", store=store)
    for url in ("m.jsonl", "a.tar"):
        dataset = open_dataset(url, store=store, group="webdataset", **{option: True})
        assert samples_of(dataset) == {"a": {"jpg": b"1" * 600}, "b": {"jpg": b"2"}}
        store.delete("a.tar.idx")
    (report,) = build_index("a.tar", store=store, checksums=False, **{option: True})
    assert report.members == 2


def test_a_missing_end_never_hides_a_member_that_is_cut_off(store: ObjectStore) -> None:
    store.put("a.tar", GOOD[: 512 + 300])
    for checksums in (False, True):
        with pytest.raises(ShardReadError, match="cut off"):
            build_index("a.tar", store=store, checksums=checksums, allow_missing_end=True)
    store.put("empty.tar", b"")
    with pytest.raises(ShardReadError, match="empty"):
        open_dataset("empty.tar", store=store, allow_missing_end=True)


def test_sparse_files_are_refused_with_what_helps(tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("needs GNU tar")
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(1 << 20)
    for kind in ("gnu", "pax"):
        command = ["tar", "-C", str(tmp_path), f"--format={kind}", "--sparse", "-cf", str(tmp_path / f"{kind}.tar"), "a.bin"]
        subprocess.run(command, check=True)
        with pytest.raises(ShardReadError, match="sparse") as caught:
            open_dataset(f"file://{tmp_path}/{kind}.tar")
        assert "--sparse" in str(caught.value.hint)


def test_the_options_are_checked(store: ObjectStore) -> None:
    store.put("a.tar", GOOD)
    with pytest.raises(ConfigError):
        build_index("a.tar", store=store, on_torn="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("says", ["zstd", None])
def test_what_has_no_random_access_is_refused_also_where_a_manifest_counts(
    store: ObjectStore, indexed: bool, says: str | None
) -> None:
    noise = [(f"{i}.jpg", random.Random(i).randbytes(5000)) for i in range(8)]  # more than a header for each, compressed too
    data = zstandard.ZstdCompressor().compress(tar(*noise))
    store.put("a.tar.zst", data)
    if indexed:
        build_index("a.tar.zst", store=store)
    entry = {"kind": "shard", "archive_key": "a.tar.zst", "compression": says, "count": 8, "size_bytes": len(data)}
    S3ExchangeStore(store).write_manifest("m.jsonl", [entry])  # type: ignore[list-item]
    for group in (None, "webdataset"):
        with pytest.raises(ShardReadError, match="without a seek table: it cannot be read at random"):
            open_dataset("m.jsonl", store=store, group=group)  # type: ignore[arg-type]


def test_links_of_archives_with_absolute_names(store: ObjectStore) -> None:
    members = [("/d/a.jpg", b"1"), ("/d/b.jpg", HARD, "/d/a.jpg"), ("/d/c.jpg", SYM, "/d/a.jpg"), ("/d/e.jpg", SYM, "a.jpg")]
    store.put("a.tar", tar(*members, ("f.jpg", SYM, "/d/a.jpg"), ("g.jpg", HARD, "d/a.jpg")))
    dataset = from_webdataset("a.tar", store=store)
    assert samples_of(dataset) == {key: {"jpg": b"1"} for key in ("/d/a", "/d/b", "/d/c", "/d/e", "g")}
    assert dataset.left_out["symbolic link out of the archive"].names == ("f.jpg",)


def test_hard_links_that_lead_to_one_another_are_files_however_many(store: ObjectStore) -> None:
    chain = [(f"{i + 1:03d}.jpg", HARD, f"{i:03d}.jpg") for i in range(300)]
    store.put("a.tar", tar(("000.jpg", b"1"), *chain))
    assert samples_of(from_webdataset("a.tar", store=store)) == {f"{i:03d}": {"jpg": b"1"} for i in range(301)}


def test_a_file_that_was_given_to_tar_twice_is_one(tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("needs GNU tar")
    (tmp_path / "a.jpg").write_bytes(b"1")
    (tmp_path / "b.jpg").write_bytes(b"2")
    subprocess.run(
        ["tar", "-C", str(tmp_path), "-cf", str(tmp_path / "a.tar"), "a.jpg", "b.jpg", "./a.jpg", "b.jpg"], check=True
    )
    dataset = open_dataset(f"file://{tmp_path}/a.tar", group="webdataset")
    assert samples_of(dataset) == {"a": {"jpg": b"1"}, "b": {"jpg": b"2"}}
    assert dataset.left_out["hard link to itself"].count == 2


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>" + b" " * 600, "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "an XML document"),
    ],
)
def test_what_came_in_place_of_an_archive_is_named(store: ObjectStore, data: bytes, what: str) -> None:
    store.put("a.tar", data)
    with pytest.raises(ShardReadError, match=what) as caught:
        open_dataset("a.tar", store=store)
    assert "fetch the archive" in str(caught.value.hint)


def test_what_is_left_out_can_be_printed_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        tar(("a.jpg", b"1"), ("\udcff\n", b"2"), ("b\udcff.jpg", b"3"), ("c.jpg", b"4"), ("b\udcff.a", b"5"))
    )
    dataset = open_dataset(f"file://{tmp_path}/a.tar", group="webdataset", on_torn="split")
    text = str(Loader(dataset, batch_size=1).explain())
    assert r"(\udcff\n)" in text
    assert text.encode()
    run = subprocess.run(
        [sys.executable, "-m", "s3loader", "check", f"file://{tmp_path}/a.tar"], capture_output=True, check=False
    )
    assert run.returncode == 6, run.stderr
    assert rb"torn: b\udcff" in run.stdout


def test_a_seek_table_bounds_what_an_archive_inflates_to(store: ObjectStore) -> None:
    good = zstandard.ZstdCompressor().compress(GOOD)
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20))
    for frames in ([(bomb, 10240)], [(good, len(GOOD)), (bomb, 512)]):
        table = b"".join(struct.pack("<II", len(frame), size) for frame, size in frames)
        table = struct.pack("<II", 0x184D2A5E, len(table) + 9) + table + struct.pack("<IBI", len(frames), 0, 0x8F92EAB1)
        store.put("a.tar.zst", b"".join(frame for frame, _ in frames) + table)
        with pytest.raises(ShardReadError, match=r"more than the .* bytes that its seek table tells"):
            open_dataset("a.tar.zst", store=store)
