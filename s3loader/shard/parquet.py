"""Parquet files: their footers, and row groups as byte ranges. `ParquetRows` are the rows of one, decoded.

As archives: each column chunk of a row group is a member, so that row groups and columns are byte ranges.

A member is called ``000003.price``: number of the row group, then the column's path. Behind the columns of each row group
stands ``000003.@footer``, the file's own footer: what it takes to decode them. Its bytes lie at the file's end, once; its rows
in the index are links to them. The index holds no checksums: pages may carry their own, which `decode_row_group` checks.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from s3loader.arguments import checked
from s3loader.errors import ConfigError, FormatError, RangeError, ShardReadError, UnsupportedOperationError
from s3loader.shard.index import ShardIndex
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer

__all__ = [
    "FOOTER",
    "ChunksOfGroups",
    "ParquetFooter",
    "ParquetRows",
    "chunks_of",
    "decode_row_group",
    "index_parquet",
    "is_parquet",
    "parse_footer",
    "read_footer",
]

FOOTER: Final = "@footer"
_MAGIC: Final = b"PAR1"
_TAIL: Final = 64 << 10
_END: Final = 8
"""Bytes behind the footer: its length, and the magic."""


def is_parquet(head: Buffer) -> bool:
    """Whether a file begins as Parquet files do."""
    return bytes(head[:4]) == _MAGIC


def index_parquet(store: ObjectStore, key: str, *, etag: str | None = None) -> ShardIndex:
    """The index of a Parquet file, from its footer: one request, two where it is large.

    Raises:
        ObjectNotFoundError: there is no such file.
        ShardReadError: it is damaged, cut off or encrypted.
        ConfigError: pyarrow is not installed.
    """
    url = f"{store.url}/{key}"
    footer = read_footer(store, key, etag=etag)
    found, length, size = footer.metadata, len(footer.data), footer.size
    offsets, sizes, names = array("Q"), array("Q"), []
    for number in range(found.num_row_groups):
        group = found.row_group(number)
        if not group.num_rows:
            continue
        for place in range(group.num_columns):
            column = group.column(place)
            start, count = _extent(column)
            if start < 4 or start + count > size - length:
                raise ShardReadError(f"row group {number} lies outside the file", op="index", url=url, hint="write it again")
            offsets.append(start)
            sizes.append(count)
            names.append(_named(number, column.path_in_schema, url))
        offsets.append(size - length)
        sizes.append(length)
        names.append(_named(number, FOOTER, url))
    encoded = [name.encode() for name in names]
    return ShardIndex(
        offsets=np.array(offsets, np.uint64),
        sizes=np.array(sizes, np.uint64),
        crc32c=None,
        names_blob=b"".join(encoded),
        name_ends=np.cumsum([len(name) for name in encoded], dtype=np.uint64),
        archive_size=size,
        etag=footer.etag,
    )


class ParquetFooter(NamedTuple):
    """What the end of a Parquet file says of it."""

    size: int
    """Bytes of the file."""
    etag: str
    data: bytes
    """The metadata, their length and the magic."""
    metadata: Any
    """`pyarrow.parquet.FileMetaData`."""


def read_footer(store: ObjectStore, key: str, *, etag: str | None = None) -> ParquetFooter:
    """The footer of a Parquet file: one request, two where it is large. Raises as `index_parquet`."""
    url = f"{store.url}/{key}"
    try:
        meta, tail = store.backend.get(key, -_TAIL, if_match=etag)
    except RangeError as error:
        raise ShardReadError("it is empty", op="index", url=url, hint="write it again") from error
    except UnsupportedOperationError:  # of stores that know no range from the end
        meta = store.head(key)
        tail = store.get_range(key, max(0, meta.size - _TAIL), meta.size, if_match=etag or meta.etag or None)
    tail = bytes(tail)
    length = int.from_bytes(tail[-_END:-4], "little") + _END
    if tail[-4:] != _MAGIC or length > meta.size - 4:
        raise ShardReadError("it has no Parquet footer", op="index", url=url, hint="it is cut off or encrypted: write it again")
    if length > len(tail):
        tail = store.get_range(key, meta.size - length, meta.size, if_match=etag or meta.etag or None)
    return parse_footer(tail[-length:], meta.size, meta.etag, url)


def parse_footer(data: bytes, size: int, etag: str, url: str) -> ParquetFooter:
    """The footer in its bytes.

    Raises:
        ShardReadError: it is damaged.
        ConfigError: pyarrow is not installed.
    """
    return ParquetFooter(size, etag, data, _metadata(data, url))


class ChunksOfGroups(NamedTuple):
    """Where columns lie in the row groups of a file; int64 arrays, groups x columns."""

    paths: list[str]
    starts: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]
    plain: np.ndarray[Any, Any]
    """Bytes that they have when they are not compressed."""


def chunks_of(footer: ParquetFooter, columns: Sequence[str] | None, url: str) -> ChunksOfGroups:
    """Where these columns lie; a column of lists or structs is all that is in it.

    Raises:
        ConfigError: there is no such column.
        ShardReadError: one lies outside the file.
    """
    found = footer.metadata
    known = [found.schema.column(i).path for i in range(found.num_columns)]
    numbers = list(range(len(known)))
    if columns is not None:
        for column in columns:
            if not any(path == column or path.startswith(f"{column}.") for path in known):
                names = ", ".join(dict.fromkeys(path.partition(".")[0] for path in known))
                raise ConfigError(f"{url} has no column {column!r}", hint=f"it has {names}")
        heads = tuple(f"{column}." for column in columns)
        numbers = [i for i, path in enumerate(known) if path in columns or path.startswith(heads)]
    shape = (found.num_row_groups, len(numbers))
    starts, sizes, plain = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    for group in range(found.num_row_groups):
        rows = found.row_group(group)
        if not rows.num_rows:
            starts[group] = len(_MAGIC)
            continue
        for place, number in enumerate(numbers):
            chunk = rows.column(number)
            starts[group, place], sizes[group, place] = _extent(chunk)
            plain[group, place] = max(chunk.total_uncompressed_size, chunk.total_compressed_size)
    if starts.size and (int(starts.min()) < 4 or int((starts + sizes).max()) > footer.size - len(footer.data)):
        raise ShardReadError("a row group lies outside the file", op="index", url=url, hint="write it again")
    return ChunksOfGroups([known[i] for i in numbers], starts, sizes, plain)


def _named(group: int, column: str, url: str) -> str:
    if "/" in column:
        raise ShardReadError(f"a column is called {column!r}", op="index", url=url, hint="rename it: a name takes no slash")
    return f"{group:06d}.{column}"


def _extent(column: Any) -> tuple[int, int]:
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    return start, column.total_compressed_size


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa  # type: ignore[import-not-found, import-untyped, unused-ignore]
        import pyarrow.parquet as pq  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise ConfigError("Parquet needs pyarrow", hint="pip install pyarrow") from None
    return pa, pq


def _metadata(footer: bytes, url: str) -> Any:
    pa, pq = _pyarrow()
    try:
        return pq.read_metadata(pa.BufferReader(_MAGIC + footer))
    except (ValueError, OSError) as error:
        raise ShardReadError(f"its footer is damaged: {error}", op="index", url=url, hint="write it again") from error


class _Sparse(io.RawIOBase):
    """A file of which only some ranges are there."""

    def __init__(self, ranges: Mapping[int, Buffer], size: int) -> None:
        super().__init__()
        self._ranges, self._size, self._at = ranges, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._size

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        for start, data in self._ranges.items():
            if start <= self._at < start + len(data):
                piece = memoryview(data)[self._at - start :][: len(view)]
                view[: len(piece)] = piece
                self._at += len(piece)
                return len(piece)
        return 0


@checked
def decode_row_group(sample: Mapping[str, Any]) -> Any:
    """The row group in a sample of `s3loader.from_parquet`, as a `pyarrow.Table` of the columns that were read.

    For ``transform=``; checksums of pages are checked where the writer made some.

    Raises:
        FormatError: it is damaged.
    """
    pa, pq = _pyarrow()
    key, footer = str(sample["__key__"]), bytes(sample[FOOTER])
    group = int(key.rpartition("/")[2].rpartition("#")[2])
    try:
        metadata = pq.read_metadata(pa.BufferReader(_MAGIC + footer))
        rows = metadata.row_group(group)
        chunks = [rows.column(place) for place in range(rows.num_columns)]
        ranges = {_extent(chunk)[0]: sample[chunk.path_in_schema] for chunk in chunks if chunk.path_in_schema in sample}
        columns = [chunk.path_in_schema for chunk in chunks if chunk.path_in_schema in sample]
        return _read_group(metadata, footer, group, ranges, columns)
    except (ValueError, OSError, IndexError) as error:
        raise FormatError(f"row group {group} cannot be decoded: {error}", hint="write the file again") from error


def _read_group(metadata: Any, footer: bytes, group: int, ranges: Mapping[int, Buffer], columns: Sequence[str]) -> Any:
    pa, pq = _pyarrow()
    end = max((start + len(data) for start, data in ranges.items()), default=4)
    file = pa.PythonFile(_Sparse({**ranges, end: footer}, end + len(footer)), mode="r")
    opened = pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True, pre_buffer=False)
    return opened.read_row_group(group, columns=list(columns), use_threads=False)


# -- rows ------------------------------------------------------------------------------------------


class ParquetRows:
    """The rows of a row group; decoded when the first one is wanted.

    Args:
        footer: Of the file.
        group: Number of the row group.
        ranges: What was read of it, by where it begins in the file.
        columns: Paths of the columns that were read.
    """

    def __init__(self, footer: ParquetFooter, group: int, ranges: Mapping[int, Buffer], columns: Sequence[str]) -> None:
        self._coded: tuple[Any, ...] | None = (footer.metadata, footer.data, group, ranges, columns)
        self._columns: dict[str, Callable[[int], Any]] = {}

    def row(self, number: int) -> dict[str, Any]:
        """Column to value: numpy scalars, texts, memoryviews of bytes, arrays of lists of numbers, None where there is none;
        Python's own objects for the rest (dates, decimals, structs, maps).

        Raises:
            FormatError: the row group is damaged.
        """
        if self._coded is not None:
            self._decode()
        return {name: value(number) for name, value in self._columns.items()}

    def _decode(self) -> None:
        assert self._coded is not None
        group = self._coded[2]
        try:
            table = _read_group(*self._coded)
            self._columns = {name: _column(table.column(name)) for name in table.column_names}
        except (ValueError, OSError, IndexError) as error:
            raise FormatError(f"row group {group} cannot be decoded: {error}", hint="write the file again") from error
        self._coded = None  # the table has what is needed


def _column(chunked: Any) -> Callable[[int], Any]:
    """The value of a column in each row."""
    pa, _ = _pyarrow()
    column = chunked.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # of no chunk, or too much for one
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _numbers(column)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return lambda row: None if (buffer := column[row].as_buffer()) is None else memoryview(buffer)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_type
        if pa.types.is_boolean(inner) or pa.types.is_integer(inner) or pa.types.is_floating(inner):
            return lambda row: _array(column[row])
    return lambda row: column[row].as_py()


def _numbers(column: Any) -> Callable[[int], Any]:
    if column.null_count and str(column.type) == "halffloat":
        return lambda row: column[row].as_py()
    if not column.null_count:
        return column.to_numpy(zero_copy_only=False).__getitem__  # type: ignore[no-any-return]
    there = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.fill_null(False if str(column.type) == "bool" else 0).to_numpy(zero_copy_only=False)
    return lambda row: values[row] if there[row] else None


def _array(value: Any) -> Any:
    """A list of numbers as a 1-D array; as a list where some are missing, None where it is."""
    values = value.values
    if values is None:
        return None
    return value.as_py() if values.null_count else values.to_numpy(zero_copy_only=False)
