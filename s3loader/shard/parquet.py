"""Parquet files as archives: each column chunk of a row group is a member, so that row groups and columns are byte ranges.

A member is called ``000003.price``: number of the row group, then the column's path. Behind the columns of each row group
stands ``000003.@footer``, the file's own footer: what it takes to decode them. Its bytes lie at the file's end, once; its rows
in the index are links to them. The index holds no checksums: pages may carry their own, which `decode_row_group` checks.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from s3loader.arguments import checked
from s3loader.errors import ConfigError, FormatError, ShardReadError
from s3loader.shard.index import ShardIndex
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer

__all__ = ["FOOTER", "decode_row_group", "index_parquet", "is_parquet"]

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
    meta = store.head(key)
    pin = etag or meta.etag or None
    size = min(meta.size, _TAIL)
    tail = store.get_range(key, meta.size - size, meta.size, if_match=pin)
    length = int.from_bytes(tail[-_END:-4], "little") + _END
    if tail[-4:] != _MAGIC or length > meta.size - 4:
        raise ShardReadError("it has no Parquet footer", op="index", url=url, hint="it is cut off or encrypted: write it again")
    if length > size:
        tail = store.get_range(key, meta.size - length, meta.size, if_match=pin)
    found = _metadata(tail[-length:], url)
    offsets, sizes, names = array("Q"), array("Q"), []
    for number in range(found.num_row_groups):
        group = found.row_group(number)
        for place in range(group.num_columns):
            column = group.column(place)
            start, count = _extent(column)
            if start < 4 or start + count > meta.size - length:
                raise ShardReadError(f"row group {number} lies outside the file", op="index", url=url, hint="write it again")
            offsets.append(start)
            sizes.append(count)
            names.append(_named(number, column.path_in_schema, url))
        offsets.append(meta.size - length)
        sizes.append(length)
        names.append(_named(number, FOOTER, url))
    encoded = [name.encode() for name in names]
    return ShardIndex(
        offsets=np.array(offsets, np.uint64),
        sizes=np.array(sizes, np.uint64),
        crc32c=None,
        names_blob=b"".join(encoded),
        name_ends=np.cumsum([len(name) for name in encoded], dtype=np.uint64),
        archive_size=meta.size,
        etag=meta.etag,
    )


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
        end = max((start + len(data) for start, data in ranges.items()), default=4)
        file = pa.PythonFile(_Sparse({**ranges, end: footer}, end + len(footer)), mode="r")
        columns = [chunk.path_in_schema for chunk in chunks if chunk.path_in_schema in sample]
        opened = pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True, pre_buffer=False)
        return opened.read_row_group(group, columns=columns, use_threads=False)
    except (ValueError, OSError, IndexError) as error:
        raise FormatError(f"row group {group} cannot be decoded: {error}", hint="write the file again") from error
