"""Made-up data: the same for the same seed, and what its factors say is what is measured."""

from __future__ import annotations

import hashlib
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s3loader import ConfigError
from s3loader.datagen import (
    BLOCK,
    OBJECT_TYPES,
    Generator,
    generate,
    generate_chunks,
    generate_hdf5,
    generate_npz,
    generate_parquet,
    generate_tfrecord,
)


def unique_blocks(data: memoryview, size: int = BLOCK) -> float:
    blocks = [bytes(data[at : at + size]) for at in range(0, len(data), size)]
    return len(blocks) / len(set(blocks))


@pytest.mark.parametrize("compress", [1, 1.3, 2, 4, 9.5, 16, 33, 100])
@pytest.mark.parametrize("dedup", [1, 4, 7.5])
def test_factors_measure_true(compress: float, dedup: float) -> None:
    data = Generator("4MiB", seed=1, dedup=dedup, compress=compress).whole()
    assert len(data) / len(zlib.compress(data)) == pytest.approx(compress, rel=0.05)
    assert unique_blocks(data) == pytest.approx(dedup, rel=0.05)
    if compress <= 16:
        assert unique_blocks(data, 512) == pytest.approx(dedup, rel=0.05)


def test_the_stream_never_changes() -> None:
    """A digest that keeps every seed's bytes as they are, on all machines and versions."""
    digests = {
        name: hashlib.sha256(Generator(1_000_003, seed=7, index=3, **factors).whole()).hexdigest()[:16]
        for name, factors in {"plain": {}, "both": {"dedup": 3, "compress": 4.5}}.items()
    }
    assert digests == {"plain": "cd9fb153a8cb328f", "both": "e508bc0e13d80510"}


def test_any_part_is_the_part_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    for factors in ({}, {"dedup": 5, "compress": 3}):
        source = Generator(300_001, seed=4, **factors)
        whole = bytes(source.whole())
        assert b"".join(source.chunks(70_000)) == whole
        for _ in range(200):
            offset, size = (int(rng.integers(0, limit)) for limit in (len(whole) + 10, 9000))
            room = bytearray(size + 1)
            count = source.fill(memoryview(room)[1:], offset)  # odd addresses too
            assert room[1 : 1 + count] == whole[offset : offset + size]
            assert count == max(0, min(size, len(whole) - offset))


def test_objects_and_seeds_differ() -> None:
    some = [bytes(Generator(BLOCK * 3, seed=seed, index=index).whole()) for seed in range(5) for index in range(5)]
    blocks = {data[at : at + BLOCK] for data in some for at in range(0, len(data), BLOCK)}
    assert len(blocks) == 75
    drawn = Generator(100)
    assert bytes(drawn.whole()) == bytes(Generator(100, seed=drawn.seed).whole())
    assert bytes(drawn.whole()) != bytes(Generator(100).whole())


@pytest.mark.parametrize("object_type", OBJECT_TYPES)
@pytest.mark.parametrize("size", [0, 1, 511, 5000, "1MiB"])
def test_objects_of_every_type(object_type: str, size: Any) -> None:
    made = generate(size, object_type.upper(), seed=2, index=1)
    assert made == generate(size, object_type, seed=2, index=1)
    assert made == b"".join(generate_chunks(size, object_type, seed=2, index=1, chunk=100_000))
    read = {"npz": read_npz, "tfrecord": read_tfrecord, "hdf5": read_hdf5, "parquet": read_parquet}
    payload = read[object_type](made) if object_type in read else bytes(made)
    if size == "1MiB":
        assert len(made) == pytest.approx(1 << 20, rel=0.05)
        if object_type in ("raw", "npz", "tfrecord"):
            assert len(made) == 1 << 20
        assert payload == bytes(Generator(len(payload), seed=2, index=1).whole())
    assert generate("64KiB", object_type, seed=2, index=2) != generate("64KiB", object_type, seed=2, index=1)


def read_npz(data: memoryview) -> bytes:
    with np.load(io.BytesIO(data)) as file:
        assert file["data"].dtype == np.uint8
        return bytes(file["data"])


def read_hdf5(data: memoryview) -> bytes:
    h5py = pytest.importorskip("h5py")
    with h5py.File(io.BytesIO(data)) as file:
        return bytes(file["data"][:])


def read_parquet(data: memoryview) -> bytes:
    pq = pytest.importorskip("pyarrow.parquet")
    return b"".join(pq.read_table(io.BytesIO(data))["data"].to_pylist())


def read_tfrecord(data: memoryview) -> bytes:
    """As TensorFlow reads it, every CRC-32C checked (by another library than ours)."""
    crc = pytest.importorskip("google_crc32c").value
    length = int.from_bytes(data[:8], "little")

    def masked(part: memoryview) -> bytes:
        found = crc(bytes(part))
        return ((((found >> 15) | (found << 17)) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")

    assert data[8:12] == masked(data[:8])
    assert data[12 + length :] == masked(data[12 : 12 + length])
    return bytes(data[12 : 12 + length])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 3), "<f4"), (7, "float64"), ((2, 2, 2), "int16"), ((), "f2"), ((0, 3), "u1"), (5, "c8"), (3, ">f8")],
)
def test_npz_has_its_shape_and_dtype(shape: Any, dtype: str) -> None:
    with np.load(io.BytesIO(generate_npz(shape, dtype, names=("x", "y"), seed=1))) as file:
        for name in ("x", "y"):
            assert file[name].shape == (shape if isinstance(shape, tuple) else (shape,))
            assert file[name].dtype == np.dtype(dtype)
            assert np.isfinite(file[name]).all()
        if file["x"].size:
            assert not np.array_equal(file["x"], file["y"])


def test_hdf5_and_parquet_have_their_shapes() -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(io.BytesIO(generate_hdf5((5, 6), "float32", name="x", seed=1))) as file:
        assert file["x"].shape == (5, 6)
        assert file["x"].dtype == np.float32
    pq = pytest.importorskip("pyarrow.parquet")
    file = pq.ParquetFile(io.BytesIO(generate_parquet(100, 50, row_group=30, seed=1)))
    assert file.metadata.num_row_groups == 4
    assert {len(row) for row in file.read()["data"].to_pylist()} == {50}


def test_tensorflow_reads_the_records(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    path = tmp_path / "x.tfrecord"
    path.write_bytes(generate_tfrecord(5, 1000, example=True, seed=3))
    feature = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}
    rows = [tf.io.parse_single_example(record, feature) for record in tf.data.TFRecordDataset(str(path))]
    assert [int(row["label"]) for row in rows] == [0, 1, 2, 3, 4]
    assert b"".join(row["image"].numpy() for row in rows) == bytes(Generator(5000, seed=3).whole())


@pytest.mark.parametrize(
    "call",
    [
        lambda: generate(-1),
        lambda: generate("8 potatoes"),
        lambda: generate(10, "zip"),
        lambda: generate(10, seed=-1),
        lambda: generate(10, dedup=0),
        lambda: generate(10, compress=0.5),
        lambda: generate(10, compress=1000),
        lambda: generate(10, compress=float("nan")),
        lambda: Generator(10, seed="x"),  # type: ignore[arg-type]
        lambda: Generator(10).fill(b"abc"),
        lambda: generate_npz((2, -1)),
        lambda: generate_npz(2, object),
        lambda: generate_tfrecord(-1, 5),
    ],
)
def test_what_cannot_be_made_says_so(call: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert caught.value.hint
