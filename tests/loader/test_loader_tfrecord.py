"""TFRecord files as datasets: in the order, with the state and the checks that every dataset has."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from s3loader import Loader, open_dataset, open_store
from s3loader.checksum import crc32c
from s3loader.datagen import generate_tfrecord
from s3loader.errors import ConfigError, IntegrityError, ObjectNotFoundError, ShardReadError
from s3loader.shard import build_index, dali_index, index_tfrecord, parse_dali_index
from s3loader.torch import S3DataLoader, S3IterableDataset

SIZES = (0, 1, 100, 5000, 70_000)


def data(number: int) -> bytes:
    return bytes([number % 251]) * SIZES[number % len(SIZES)] + b"%d" % number


def masked(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return b"".join([length, struct.pack("<I", masked(crc32c(length))), content, struct.pack("<I", masked(crc32c(content)))])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 records in three files."""
    for file in range(3):
        records = (record(data(20 * file + i)) for i in range(20))
        (tmp_path / f"train-{file:05d}-of-00003").write_bytes(b"".join(records))
    return tmp_path


def contents(loader: Any) -> list[bytes]:
    return [bytes(sample) for batch in loader for sample in batch]


@pytest.mark.parametrize("name", ["", "train-*", "train-{00000..00002}-of-00003"])
def test_records_come_in_order_and_indexes_are_kept(folder: Path, name: str) -> None:
    url = f"{folder}/{name}"
    for _ in range(2):  # once an index is made, then it is found
        dataset = open_dataset(url, kind="tfrecord")
        assert len(dataset) == 60
        assert contents(Loader(dataset, batch_size=7, shuffle="none", tail="short")) == [data(i) for i in range(60)]
        assert len(list(folder.glob("*.idx"))) == 3


def test_shuffled_sharded_and_resumed(folder: Path) -> None:
    dataset = open_dataset(f"{folder}/", kind="tfrecord")
    for shuffle in ("block", "full", "shard"):
        ranks = [Loader(dataset, batch_size=5, shuffle=shuffle, seed=3, rank=rank, world_size=2) for rank in range(2)]
        first = [contents(rank) for rank in ranks]
        assert sorted(first[0] + first[1]) == sorted(data(i) for i in range(60))
    before = Loader(dataset, batch_size=5, seed=3)
    batches = iter(before)
    head = [bytes(sample) for _ in range(4) for sample in next(batches)]
    after = Loader(dataset, batch_size=8, seed=3)
    after.load_state_dict(before.state_dict())
    assert sorted(head + contents(after)) == sorted(data(i) for i in range(60))
    loader = S3DataLoader(S3IterableDataset.from_tfrecord(f"{folder}/", batch_size=6, return_type="bytes"), num_workers=2)
    assert sorted(sample for batch in loader for sample in batch) == sorted(data(i) for i in range(60))


def test_damage_is_noticed(folder: Path) -> None:
    path = folder / "train-00001-of-00003"
    whole = path.read_bytes()
    index_tfrecord(open_store(folder), path.name)
    dataset = open_dataset(f"{folder}/", kind="tfrecord")
    flipped = bytearray(whole)
    flipped[whole.index(b"\x17" * 5000) + 10] ^= 1  # of record 23: its checksum stands behind it
    path.write_bytes(flipped)
    with pytest.raises(IntegrityError, match="#3,"):
        contents(Loader(open_dataset(f"{folder}/", kind="tfrecord"), batch_size=5, shuffle="none"))
    assert len(dataset) == 60
    for damaged, words in (
        (whole[:-1], "cut off"),
        (whole[: len(whole) // 2 - 3], "cut off"),
        (whole + b"\0" * 5, "cut off"),
        (whole + b"\0" * 50, "damaged"),
        (b"\x1f\x8b" + whole, "gzip"),
        (gzip.compress(whole), "compressed with gzip"),
        (zlib.compress(whole), "compressed with zlib"),
        (b"hello, this is no record at all", "cut off"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ShardReadError, match=words):
            open_dataset(f"{folder}/", kind="tfrecord")


def test_dalis_index(folder: Path, tmp_path: Path) -> None:
    with open_store(folder) as store:
        name = "train-00000-of-00003"
        index = index_tfrecord(store, name)
        rows = parse_dali_index(dali_index(index))
        assert [offset for offset, _ in rows] == [sum(len(data(i)) + 16 for i in range(n)) for n in range(20)]
        assert [size for _, size in rows] == [len(data(i)) + 16 for i in range(20)]
        (built,) = build_index([name], store=store)  # the command `s3loader index` too
        assert (built.members, built.samples, built.error) == (20, 20, None)
        store.put("made", generate_tfrecord(7, 1000))
        assert len(index_tfrecord(store, "made")) == 7
    for wrong in ("1", "a 20", "0 5", "0 20 3", "-1 20"):
        with pytest.raises(ShardReadError, match="line 1"):
            parse_dali_index(wrong)


def test_what_tensorflow_wrote(tmp_path: Path) -> None:
    tf: Any = pytest.importorskip("tensorflow")
    path = str(tmp_path / "x.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for i in range(30):
            writer.write(data(i))
    assert contents(Loader(open_dataset(path, kind="tfrecord"), batch_size=4, shuffle="none", tail="short")) == [
        data(i) for i in range(30)
    ]
    for kind in ("GZIP", "ZLIB"):
        with tf.io.TFRecordWriter(path, options=kind) as writer:
            writer.write(b"x" * 1000)
        with pytest.raises(ShardReadError, match="s3loader pack") as refused:
            open_dataset(path, kind="tfrecord")
        assert kind.lower() in str(refused.value)


def test_what_means_nothing_to_records_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="group"):
        open_dataset(f"{folder}/", kind="tfrecord", group="webdataset")
    with pytest.raises(ObjectNotFoundError):
        open_dataset(f"{folder}/nothing", kind="tfrecord")
