"""Whole objects of one kind: raw bytes, NPZ, TFRecord, HDF5, Parquet."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from s3loader.arguments import whole_number
from s3loader.checksum import crc32c
from s3loader.datagen.source import Generator
from s3loader.errors import ConfigError
from s3loader.shard.tfrecord import masked_crc
from s3loader.types import Buffer
from s3loader.units import MIB

__all__ = [
    "OBJECT_TYPES",
    "ObjectType",
    "generate",
    "generate_chunks",
    "generate_hdf5",
    "generate_npz",
    "generate_parquet",
    "generate_tfrecord",
]

ObjectType: TypeAlias = Literal["raw", "npz", "tfrecord", "hdf5", "parquet"]
OBJECT_TYPES: Final = ("raw", "npz", "tfrecord", "hdf5", "parquet")
_ZIP_TIME: Final = (1980, 1, 1, 0, 0, 0)
"""Of all members, so that the same seed gives the same file."""
_FRAME: Final = 16
"""Bytes around one record of a TFRecord file."""


def generate(
    size: int | str,
    object_type: str = "raw",
    *,
    seed: int | None = None,
    index: int = 0,
    dedup: float = 1,
    compress: float = 1,
) -> memoryview:
    """One object of about `size` bytes; of raw, NPZ and TFRecord of exactly so many.

    Args:
        size: Bytes, or text such as ``"8MiB"``. Never less than the format needs.
        object_type: ``"raw"``, ``"npz"`` (array ``data``, uint8), ``"tfrecord"`` (one record), ``"hdf5"`` (dataset ``data``,
            uint8) or ``"parquet"`` (columns ``id`` and ``data``); upper case is fine.
        seed, index, dedup, compress: As of `Generator`; they concern the payload.

    Raises:
        ConfigError: an argument is unusable, or the library of the format is not installed.
    """
    pieces = list(generate_chunks(size, object_type, seed=seed, index=index, dedup=dedup, compress=compress, chunk=1 << 62))
    return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))


def generate_chunks(
    size: int | str,
    object_type: str = "raw",
    *,
    seed: int | None = None,
    index: int = 0,
    dedup: float = 1,
    compress: float = 1,
    chunk: int = 8 * MIB,
) -> Iterator[memoryview]:
    """As `generate`, in pieces: raw and TFRecord objects take memory for one piece only, however large they are."""
    kind = object_type.lower() if isinstance(object_type, str) else ""
    if kind not in OBJECT_TYPES:
        raise ConfigError(f"unknown object_type {object_type!r}", hint=f"use one of {', '.join(OBJECT_TYPES)}")
    source = Generator(size, seed=seed, index=index, dedup=dedup, compress=compress)
    if kind == "raw":
        return source.chunks(min(chunk, max(1, source.size)))
    if kind == "tfrecord":
        return _tfrecord_chunks(_resized(source, source.size - _FRAME), chunk)
    if kind == "npz":
        inner = _resized(source, source.size - _npz_overhead("data"))
        return iter([_zipped({"data": inner.whole()}, {"data": ((inner.size,), np.dtype(np.uint8))})])
    payload = source.whole()
    if kind == "hdf5":
        return iter([memoryview(_hdf5({"data": np.frombuffer(payload, np.uint8)}))])
    rows = max(1, min(1024, source.size // 1024))
    return iter([memoryview(_parquet(payload, rows, rows))])


def generate_npz(
    shape: int | Sequence[int],
    dtype: Any = "uint8",
    *,
    names: Sequence[str] = ("data",),
    seed: int | None = None,
    index: int = 0,
    dedup: float = 1,
    compress: float = 1,
) -> memoryview:
    """An NPZ file (stored, not deflated) whose arrays have this shape and dtype.

    Args:
        shape: Of each array.
        dtype: Of each array: anything numpy has without objects. Floats are uniform in [0, 1), so that none is NaN; other
            kinds are random bits.
        names: Of the arrays; they differ.
        seed, index, dedup, compress: As of `Generator`; of floats, they concern the bits that are drawn.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if not all(isinstance(n, int) and n >= 0 for n in shape) or not names:
        raise ConfigError(f"no shape: {shape!r}" if names else "no names", hint="give sizes from 0 on, and a name at least")
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise ConfigError(f"dtype cannot be {dtype!r}", hint="a dtype of numbers")
    first = Generator(0, seed=seed, index=index)
    count = int(np.prod(shape, dtype=np.int64))
    arrays: dict[str, Buffer] = {}
    for number, name in enumerate(names):
        source = Generator(count * kind.itemsize, seed=first.seed, index=index + (number << 64), dedup=dedup, compress=compress)
        arrays[name] = _as_floats(source.whole(), kind)
    return _zipped(arrays, dict.fromkeys(names, (shape, kind)))


def generate_tfrecord(
    records: int,
    record_size: int | str,
    *,
    example: bool = False,
    seed: int | None = None,
    index: int = 0,
    dedup: float = 1,
    compress: float = 1,
) -> memoryview:
    """A TFRecord file of so many records of one size, whose CRC-32Cs TensorFlow accepts.

    Args:
        records: How many.
        record_size: Payload bytes of each; with `example`, of its feature ``image``.
        example: Each record is a serialized ``tf.train.Example`` with the features ``image`` (bytes) and ``label`` (int64, the
            number of the record); False: random bytes.
        seed, index, dedup, compress: As of `Generator`.
    """
    one = Generator(record_size, seed=seed, index=index)
    number = whole_number(records)
    if number is None or number < 0:
        raise ConfigError(f"records cannot be {records!r}", hint="a whole number from 0 on")
    source = Generator(one.size * number, seed=one.seed, index=index, dedup=dedup, compress=compress)
    payload = source.whole()
    wrap: Callable[[Buffer, int], Buffer] = _example if example else lambda data, _: data
    out = bytearray()
    for at in range(number):
        record = wrap(payload[at * one.size : (at + 1) * one.size], at)
        out += _record_head(len(record))
        out += record
        out += _masked(crc32c(record))
    return memoryview(out)


def generate_hdf5(
    shape: int | Sequence[int],
    dtype: Any = "uint8",
    *,
    name: str = "data",
    seed: int | None = None,
    index: int = 0,
    dedup: float = 1,
    compress: float = 1,
) -> memoryview:
    """An HDF5 file with one contiguous dataset (needs h5py). Arguments as of `generate_npz`."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    kind = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    source = Generator(count * kind.itemsize, seed=seed, index=index, dedup=dedup, compress=compress)
    return memoryview(_hdf5({name: np.frombuffer(_as_floats(source.whole(), kind), kind).reshape(shape)}))


def generate_parquet(
    rows: int,
    row_size: int | str,
    *,
    row_group: int = 1024,
    seed: int | None = None,
    index: int = 0,
    dedup: float = 1,
    compress: float = 1,
) -> memoryview:
    """A Parquet file, not compressed, with the columns ``id`` (int64) and ``data`` (binary). Needs pyarrow.

    Args:
        rows: How many.
        row_size: Bytes of `data` in each.
        row_group: Rows of one row group.
        seed, index, dedup, compress: As of `Generator`.
    """
    one = Generator(row_size, seed=seed, index=index)
    source = Generator(one.size * rows, seed=one.seed, index=index, dedup=dedup, compress=compress)
    return memoryview(_parquet(source.whole(), rows, row_group))


# -- how the formats are written ---------------------------------------------------------------------


def _resized(source: Generator, size: int) -> Generator:
    return Generator(max(0, size), seed=source.seed, index=source.index, dedup=source.dedup, compress=source.compress)


def _as_floats(data: memoryview, kind: Any) -> memoryview:
    """Of floats and complex numbers, uniform ones in [0, 1) in place of random bits."""
    if kind.kind not in "fc":
        return data
    part = np.dtype(kind.newbyteorder("=")) if kind.kind == "f" else np.dtype(f"f{kind.itemsize // 2}")
    bits: Any = {2: (np.uint16, 11), 4: (np.uint32, 24), 8: (np.uint64, 53)}.get(part.itemsize)
    if bits is None:
        raise ConfigError(f"dtype cannot be {kind}", hint="float16, float32 or float64")
    whole, digits = bits
    drawn = np.frombuffer(data, whole) >> whole(whole().itemsize * 8 - digits)
    floats = drawn.astype(part) * part.type(2.0**-digits)
    flat = floats.view(kind.newbyteorder("=")).astype(kind)
    return memoryview(flat.tobytes())


def _npy_head(shape: Sequence[int], kind: Any) -> bytes:
    out = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(out, fields)
    return out.getvalue()


def _zipped(arrays: dict[str, Buffer], facts: dict[str, tuple[Sequence[int], Any]]) -> memoryview:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy", _ZIP_TIME)
            with archive.open(info, "w", force_zip64=True) as member:
                member.write(_npy_head(*facts[name]))
                member.write(data)
    return out.getbuffer()


def _npz_overhead(name: str) -> int:
    return len(_zipped({name: b""}, {name: ((1 << 40,), np.dtype(np.uint8))}))


def _record_head(length: int) -> bytes:
    head = struct.pack("<Q", length)
    return head + _masked(crc32c(head))


def _masked(crc: int) -> bytes:
    """As TensorFlow stores a CRC-32C: rotated, and something added."""
    return struct.pack("<I", masked_crc(crc))


def _tfrecord_chunks(payload: Generator, chunk: int) -> Iterator[memoryview]:
    """One record."""
    yield memoryview(_record_head(payload.size))
    crc = 0
    for piece in payload.chunks(min(chunk, max(1, payload.size))):
        crc = crc32c(piece, crc)
        yield piece
    yield memoryview(_masked(crc))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, data: Buffer) -> bytes:
    return b"".join((_varint(number << 3 | 2), _varint(len(data)), data))


def _example(image: Buffer, label: int) -> bytes:
    """``tf.train.Example`` in protobuf's encoding."""
    values = {b"image": _field(1, _field(1, image)), b"label": _field(3, _field(1, _varint(label)))}
    features = b"".join(_field(1, _field(1, name) + _field(2, value)) for name, value in values.items())
    return _field(1, features)


def _hdf5(datasets: dict[str, Any]) -> bytes:
    try:
        import h5py  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise ConfigError("HDF5 needs h5py", hint="pip install h5py") from None
    out = io.BytesIO()
    with h5py.File(out, "w", track_order=False) as file:
        for name, data in datasets.items():
            file.create_dataset(name, data=data, track_times=False)
    return out.getvalue()


def _parquet(payload: memoryview, rows: int, row_group: int) -> bytes:
    try:
        import pyarrow as pa  # type: ignore[import-not-found, import-untyped, unused-ignore]
        import pyarrow.parquet as pq  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise ConfigError("Parquet needs pyarrow", hint="pip install pyarrow") from None
    ends = np.linspace(0, len(payload), rows + 1).astype(np.int64)
    values = pa.LargeBinaryArray.from_buffers(pa.large_binary(), rows, [None, pa.py_buffer(ends), pa.py_buffer(payload)])
    table = pa.table({"id": pa.array(np.arange(rows, dtype=np.int64)), "data": values})
    out = io.BytesIO()
    pq.write_table(table, out, compression="NONE", use_dictionary=False, row_group_size=row_group)
    return out.getvalue()
