"""Raw MDS shards of MosaicML Streaming: where their samples are, and what the columns of one mean.

A shard file is all little-endian: u32 number of samples n; n + 1 u32 offsets from the file's start, of each sample and of
the end; the writer's configuration as JSON, not needed here; the samples. A sample is the u32 size of each column
that has no fixed size, then the contents of all columns, both in the order of ``column_names``. The format has no
checksums of samples: a damaged one is noticed only if it no longer parses.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any, Final

import numpy as np

from s3loader.errors import FormatError, IntegrityError, S3LoaderError, ShardReadError
from s3loader.loader.layout import Shard
from s3loader.plan.permutation import Int64Array
from s3loader.shard.compression import decompressor
from s3loader.shard.index import ShardIndex
from s3loader.shard.samples import Grouping
from s3loader.store.backend import ReadResult
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer, ReadRequest

__all__ = ["COMPRESSIONS_OF_MDS", "Columns", "CompressedMdsShard", "MdsShard"]

COMPRESSIONS_OF_MDS: Final = {"gz": "gzip", "bz2": "bz2", "zstd": "zstd"}
"""Name in the index, before a colon and the level, to name in `decompressor`; ``br`` and ``snappy`` are not read."""

_ARRAY_DTYPES: Final = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    18: "float16",
    32: "uint32",
    33: "int32",
    34: "float32",
    64: "uint64",
    65: "int64",
    66: "float64",
}
_NAMES: Final = frozenset(_ARRAY_DTYPES.values())


def _little(name: str) -> np.dtype[Any]:
    return np.dtype(name).newbyteorder("<")


def _int(data: memoryview) -> int:
    return int.from_bytes(data, "little", signed=True)


def _scalar(dtype: np.dtype[Any], data: memoryview) -> Any:
    return np.frombuffer(data, dtype)[0]


def _text(data: memoryview) -> str:
    return str(data, "utf-8")


def _parsed(parse: Callable[[str], Any], data: memoryview) -> Any:
    return parse(_text(data))


def _encoded(data: memoryview) -> memoryview:
    return data


def _array(dtype: np.dtype[Any] | None, shape: tuple[int, ...] | None, data: memoryview) -> Any:
    """A copy. What the column does not fix stands before the values: one byte for the dtype; one with the number of axes
    times 4 plus log2 of the bytes of a length, and the length of each axis."""
    at = 0
    if dtype is None:
        dtype, at = _little(_ARRAY_DTYPES[data[0]]), 1
    if shape is None:
        axes, width = data[at] >> 2, 1 << (data[at] & 3)
        end = at + 1 + axes * width
        shape = tuple(np.frombuffer(data[at + 1 : end], f"<u{width}").tolist()) if axes else ()
        at = end
    return np.frombuffer(data[at:], dtype).reshape(shape).copy()


_TEXTS: Final[dict[str, Callable[[memoryview], Any]]] = {
    "str": _text,
    "json": partial(_parsed, json.loads),
    "str_int": partial(_parsed, int),
    "str_float": partial(_parsed, float),
    "str_decimal": partial(_parsed, Decimal),
}


def _decoder(name: str, encoding: str) -> tuple[Callable[[memoryview], Any], int | None]:
    """(function, fixed size in bytes or None) of an encoding; images and unknown ones stay encoded."""
    if encoding == "int":
        return _int, 8
    if encoding in _NAMES:
        return partial(_scalar, _little(encoding)), np.dtype(encoding).itemsize
    kind, _, rest = encoding.partition(":")
    if kind == "pkl":
        raise ShardReadError(
            f"column {name!r} is pickled, and unpickling runs whatever code the data brings",
            hint="write the column as json, ndarray or bytes",
            column=name,
        )
    if kind != "ndarray":
        return _TEXTS.get(encoding, _encoded), None
    wanted, _, axes = rest.partition(":")
    if wanted and wanted not in _NAMES:
        raise ShardReadError(f"column {name!r}: unknown dtype in {encoding!r}", column=name)
    dtype = _little(wanted) if wanted else None
    shape = tuple(int(axis) for axis in axes.split(",")) if axes else None
    if shape is not None and min(shape) < 0:
        raise ShardReadError(f"column {name!r}: negative axis in {encoding!r}", column=name)
    size = None if dtype is None or shape is None else math.prod(shape) * dtype.itemsize
    return partial(_array, dtype, shape), size


class Columns:
    """The columns of a shard, as its index describes them; picklable.

    Raises:
        ShardReadError: a column is pickled, or the description contradicts itself.
    """

    def __init__(self, names: Sequence[str], encodings: Sequence[str], sizes: Sequence[int | None]) -> None:
        if not all(isinstance(text, str) for text in (*names, *encodings)) or not all(
            type(s) in (int, type(None)) for s in sizes
        ):
            raise ShardReadError("names and encodings of the columns are texts, sizes whole numbers or null")
        if not len(names) == len(encodings) == len(sizes) == len(set(names)):
            raise ShardReadError("names, encodings and sizes of the columns differ in number, or a name comes twice")
        self._columns = []
        for name, encoding, size in zip(names, encodings, sizes, strict=True):
            decode, fixed = _decoder(name, encoding)
            if fixed not in (None, size) or (size is not None and size < 0):
                raise ShardReadError(f"column {name!r}, {encoding}, cannot have size {size}", column=name)
            self._columns.append((name, size, decode))
        self._head = struct.Struct(f"<{sum(size is None for size in sizes)}I")

    def __getstate__(self) -> dict[str, Any]:
        return {"_columns": self._columns, "_head": self._head.format}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._columns = state["_columns"]
        self._head = struct.Struct(state["_head"])

    def row(self, data: memoryview) -> dict[str, Any]:
        """Column to value; ``bytes``, images and encodings that are not known are memoryviews.

        Raises:
            IntegrityError: the sizes do not add up to what there is.
            FormatError: a value does not follow its encoding.
        """
        at = self._head.size
        told = iter(self._head.unpack_from(data) if len(data) >= at else ())
        ends = [at := at + (next(told, 0) if size is None else size) for _, size, _ in self._columns]
        if at != len(data):
            raise IntegrityError(f"its columns take {at} bytes, it has {len(data)}")
        row: dict[str, Any] = {}
        at = self._head.size
        for (name, _, decode), end in zip(self._columns, ends, strict=True):
            try:
                row[name] = decode(data[at:end])
            except (ValueError, ArithmeticError, LookupError, RecursionError) as error:
                raise FormatError(f"column {name!r} does not follow its encoding: {error}", column=name) from error
            at = end
        return row


@dataclass(frozen=True, slots=True)
class MdsShard(Shard):
    """One raw MDS shard; `size` is what its dataset's index says."""

    first: int = 0
    """Number of its first sample in the dataset."""
    columns: Columns | None = None

    @property
    def head_size(self) -> int:
        """Bytes up to the end of the offsets."""
        return 4 * (self.samples + 2)

    def head_request(self, tag: int) -> ReadRequest:
        """The read of its offsets."""
        return ReadRequest(self.key, 0, self.head_size, self.if_match, tag=tag)

    def offsets_of(self, start: Buffer) -> Int64Array:
        """Where its samples begin in the file, and where the last one ends: samples + 1, int64.

        Args:
            start: Its first `head_size` bytes.

        Raises:
            ShardReadError: the offsets are not in order.
        """
        if len(start) != self.head_size:
            raise ShardReadError(f"its offsets take {self.head_size} bytes, {len(start)} came")
        head = np.frombuffer(start, "<u4").astype(np.int64)
        offsets: Int64Array = head[1:]
        if len(head) != self.samples + 2 or head[0] != self.samples:
            raise ShardReadError(f"it has {int(head[0]) if len(head) else 0} samples, the dataset expects {self.samples}")
        if offsets[0] < self.head_size or offsets[-1] != self.size or (np.diff(offsets) < 0).any():
            raise ShardReadError("its offsets are out of order, or do not end where the file does")
        return offsets

    def index_of(self, answer: ReadResult) -> ShardIndex:
        """Its samples as members, each called by its number in the dataset.

        Raises:
            IntegrityError: it has another size than the dataset's index says.
            ShardReadError: the offsets are not in order.
        """
        check_size(self, answer.size)
        offsets = self.offsets_of(answer.data)
        names = [b"%d" % number for number in range(self.first, self.first + self.samples)]
        return ShardIndex(
            offsets=offsets[:-1].astype(np.uint64),
            sizes=np.diff(offsets).astype(np.uint64),
            crc32c=None,
            names_blob=b"".join(names),
            name_ends=np.cumsum([len(name) for name in names], dtype=np.uint64),
            archive_size=self.size,
            etag=answer.etag,
            known_grouping=Grouping.each(self.samples),
        )

    def row(self, name: str, data: memoryview) -> dict[str, Any]:
        """The sample called `name`; a column ``__key__`` of its own stands in place of that name.

        Raises:
            IntegrityError: it is damaged.
            FormatError: a value does not follow its encoding.
        """
        assert self.columns is not None
        try:
            return {"__key__": name, **self.columns.row(data)}
        except S3LoaderError as error:
            error.op, error.url = "read", self.key
            raise


@dataclass(frozen=True, slots=True)
class CompressedMdsShard:
    """One compressed MDS shard. No sample of it can be read alone: it is read whole, to be packed."""

    key: str
    size: int
    """Bytes as they are stored, by the dataset's index."""
    etag: str | None
    compression: str
    """As `decompressor` calls it."""
    plain: MdsShard
    """What is in it."""

    def rows(self, store: ObjectStore) -> Iterator[dict[str, Any]]:
        """Its samples, in order. The compressed and the plain shard are held in memory meanwhile.

        Raises:
            IntegrityError: it, or what is in it, has another size than the dataset's index says, or is damaged.
            ShardReadError: it is no such stream, or its offsets are not in order.
            FormatError: a value does not follow its encoding.
        """
        shard = self.plain
        try:
            data = store.get(self.key, if_match=self.etag)
            if len(data) != self.size:
                raise IntegrityError(f"it has {len(data)} bytes, the dataset's index says {self.size}")
            plain = bytearray()
            for piece in decompressor(self.compression, iter([data])):
                plain += piece
                if len(plain) > shard.size:
                    break
            if len(plain) != shard.size:
                raise IntegrityError(f"{len(plain)} bytes are in it, the dataset's index says {shard.size}")
            view = memoryview(plain)
            edges = itertools.pairwise(shard.offsets_of(view[: shard.head_size]).tolist())
            for number, (start, end) in enumerate(edges, shard.first):
                yield shard.row(str(number), view[start:end])
        except S3LoaderError as error:
            error.op, error.url = "read", f"{store.url}/{self.key}"
            raise


def check_size(shard: Shard, size: int) -> None:
    """Refuse a file of another size than the dataset's index says.

    Raises:
        IntegrityError: it has.
    """
    if 0 <= size != shard.size:
        raise IntegrityError(
            f"it has {size} bytes, the dataset's index says {shard.size}",
            hint="the copy is incomplete, or the shard was replaced: copy the whole folder again",
        )
