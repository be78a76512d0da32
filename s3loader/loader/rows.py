"""Rows of Parquet files as samples: row groups are what is fetched, footers are the indexes."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from s3loader.errors import IntegrityError, S3LoaderError, ShardReadError
from s3loader.loader.layout import Layout, SampleBuffer, SampleRead, Shard
from s3loader.plan.permutation import Int64Array
from s3loader.shard.index import ShardIndex
from s3loader.shard.parquet import ParquetFooter, ParquetRows, chunks_of, parse_footer
from s3loader.shard.samples import Grouping
from s3loader.store.backend import ReadResult
from s3loader.types import ReadRequest

__all__ = ["ParquetShard", "RowLayout", "RowRead", "RowsOfGroup", "row_units"]

_MEMORY: Final = 8
"""What a footer takes in memory, parsed, for each of its bytes; about."""


@dataclass(frozen=True, slots=True)
class ParquetShard(Shard):
    """One Parquet file, whose rows are samples."""

    groups: tuple[int, ...] = ()
    """Rows of each row group."""
    footer: int = 0
    """Bytes of the footer."""
    columns: tuple[str, ...] | None = None
    """Those that are read; None: all."""
    plain: int = 0
    """Bytes of these columns when they are not compressed."""

    @property
    def content(self) -> int:
        """Bytes that its samples take in memory, about."""
        return self.plain

    @classmethod
    def of(cls, key: str, footer: ParquetFooter, columns: Sequence[str] | None, url: str) -> tuple[ParquetShard, RowLayout]:
        """A file as its footer describes it.

        Raises:
            ShardReadError: the footer contradicts itself.
            ConfigError: there is no such column.
        """
        groups = [footer.metadata.row_group(group).num_rows for group in range(footer.metadata.num_row_groups)]
        if sum(groups) != footer.metadata.num_rows or min(groups, default=0) < 0:
            raise ShardReadError("its row groups do not add up to its rows", op="index", url=url, hint="write it again")
        chunks = chunks_of(footer, columns, url)
        shard = cls(
            key,
            sum(groups),
            size=footer.size,
            pin=footer.etag,
            now=footer.size,
            groups=tuple(groups),
            footer=len(footer.data),
            columns=None if columns is None else tuple(columns),
            plain=int(chunks.plain.sum()),
        )
        return shard, RowLayout(shard, footer, url)

    def head_request(self, tag: int) -> ReadRequest:
        """The read of its footer."""
        return ReadRequest(self.key, self.size - self.footer, self.size, self.if_match, tag=tag)

    def layout_of(self, answer: ReadResult, url: str) -> RowLayout:
        """Its rows, from its footer.

        Raises:
            IntegrityError: it has another size than it had, or other row groups.
            ShardReadError: the footer is damaged.
            ConfigError: pyarrow is not installed.
        """
        if 0 <= answer.size != self.size or len(answer.data) != self.footer:
            raise IntegrityError(f"it has {answer.size} bytes, {self.size} when the dataset was opened", hint="open it again")
        layout = RowLayout(self, parse_footer(bytes(answer.data), self.size, answer.etag, url), url)
        if layout.groups.samples != len(self.groups):
            raise IntegrityError("it has other row groups than when the dataset was opened", hint="open it again")
        return layout


class RowLayout(Layout):
    """Rows of one file as samples. `groups` says where the row groups lie: its samples, whose members are column chunks.

    As a layout of its own it has a member for each row, with the place of its row group and its share of its bytes; these
    arrays are made when they are asked for.
    """

    __slots__ = ("_before", "_rows", "footer", "groups", "paths")
    groups: Layout
    footer: ParquetFooter
    paths: list[str]
    """Of the columns that are read."""
    _before: Int64Array
    """Rows of the file before each row group, then all."""
    _rows: Int64Array | None
    """Those that are kept; None: all."""

    def __init__(self, shard: ParquetShard, footer: ParquetFooter, url: str, rows: Int64Array | None = None) -> None:
        chunks = chunks_of(footer, shard.columns, url)
        groups, columns = chunks.starts.shape
        members = groups * columns
        index = ShardIndex(
            offsets=chunks.starts.ravel().astype(np.uint64),
            sizes=chunks.sizes.ravel().astype(np.uint64),
            crc32c=None,
            names_blob=b"",
            name_ends=np.zeros(members, dtype=np.uint64),
            archive_size=shard.size,
            etag=footer.etag,
            known_grouping=Grouping.each(members),
        )
        etag = shard.if_match or footer.etag
        offsets, sizes = chunks.starts.ravel(), chunks.sizes.ravel()
        first = np.arange(groups + 1, dtype=np.int64) * columns
        own: dict[str, Any] = {
            "groups": Layout(first, offsets, sizes, None, shard, etag, index),
            "footer": footer,
            "paths": chunks.paths,
            "_before": np.concatenate([[0], np.cumsum(np.array(shard.groups, dtype=np.int64))]),
            "_rows": rows,
            "crc32c": None,
            "source": shard,
            "etag": etag,
            "index": index,
            "nbytes": _MEMORY * len(footer.data) + 4 * offsets.nbytes + (0 if rows is None else rows.nbytes),
            "wanted": None,
            "lower": False,
            "largest_gap": 0,
            "inner_gap": 0,
            "linked": False,
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)

    @property
    def samples(self) -> int:
        """How many rows there are."""
        return int(self._before[-1]) if self._rows is None else len(self._rows)

    def rows(self, numbers: Int64Array) -> tuple[Int64Array, Int64Array]:
        """(row group, row in it) of samples."""
        rows = numbers if self._rows is None else self._rows[numbers]
        group = np.searchsorted(self._before, rows, side="right") - 1
        return group, rows - self._before[group]

    def name_of(self, group: int, row: int) -> str:
        """Name of a row: its number in the file."""
        return f"{int(self._before[group]) + row:09d}"

    def bytes_of(self, group: int) -> int:
        """Bytes of the columns of a row group, as they are stored."""
        low, high = self.groups.first[group], self.groups.first[group + 1]
        return int(self.groups.sizes[low:high].sum())

    def own_reads(self, numbers: Int64Array, target: SampleBuffer, at: int) -> Iterator[SampleRead]:
        """One for each row group."""
        groups, rows = self.rows(numbers)
        edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
        for low, high in itertools.pairwise(edges):
            yield RowRead(self, int(groups[low]), rows[low:high], numbers[low:high], target, at + low)

    # what every layout has

    @property
    def first(self) -> Int64Array:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Each row is a member."""
        return np.arange(self.samples + 1, dtype=np.int64)

    @property
    def offsets(self) -> Int64Array:  # pyright: ignore[reportIncompatibleVariableOverride]
        """First byte of the row group of each row."""
        group, _ = self.rows(np.arange(self.samples, dtype=np.int64))
        starts: Int64Array = np.minimum.reduceat(self.groups.offsets, self.groups.first[:-1])
        return starts[group]

    @property
    def sizes(self) -> Int64Array:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Share of each row in the bytes of its row group."""
        group, row = self.rows(np.arange(self.samples, dtype=np.int64))
        stored: Int64Array = np.add.reduceat(self.groups.sizes, self.groups.first[:-1])[group]
        count: Int64Array = np.diff(self._before)[group]
        return stored * (row + 1) // count - stored * row // count

    def first_member(self, number: int) -> int:
        """Itself."""
        return number

    def extent(self, number: int) -> tuple[int, int]:
        """That of its row group."""
        group, _ = self.rows(np.array([number], dtype=np.int64))
        return self.groups.extent(int(group[0]))

    def name(self, member: int) -> str:
        """Number of the row in its file, as text."""
        group, row = self.rows(np.array([member], dtype=np.int64))
        return self.name_of(int(group[0]), int(row[0]))

    def select(self, samples: Int64Array) -> RowLayout:
        """Only some of the rows, by number, in rising order."""
        assert isinstance(self.source, ParquetShard)
        return RowLayout(self.source, self.footer, self.source.key, samples if self._rows is None else self._rows[samples])

    def numbers_of(self, names: Container[str]) -> dict[str, int]:
        """Numbers of the rows that are called so."""
        rows = np.arange(self.samples) if self._rows is None else self._rows
        return {name: number for number, row in enumerate(rows.tolist()) if (name := f"{row:09d}") in names}


class RowRead(SampleRead):
    """Rows of one row group of a Parquet file, which is read whole.

    Attributes:
        rows: The file's rows.
        group: Number of the row group.
        inside: Numbers of the rows in it, int64.
    """

    __slots__ = ("group", "inside", "rows")

    def __init__(
        self, rows: RowLayout, group: int, inside: Int64Array, numbers: Int64Array, target: SampleBuffer, at: int
    ) -> None:
        self.rows = rows
        self.group = group
        self.inside = inside
        super().__init__(rows.groups, numbers, target, at, 0, rows.bytes_of(group))
        self.ranges = self._split(rows.groups)

    def members(self) -> Int64Array:
        """The column chunks of the row group."""
        first = self.rows.groups.first
        return np.arange(int(first[self.group]), int(first[self.group + 1]), dtype=np.int64)


class RowsOfGroup:
    """Rows of a row group, made when they are handed out."""

    __slots__ = ("_group", "_layout", "_rows")

    def __init__(self, layout: RowLayout, group: int, rows: ParquetRows) -> None:
        self._layout = layout
        self._group = group
        self._rows = rows

    def row(self, number: int) -> dict[str, Any]:
        """``__key__``, and each column by its name; a column of that name stands in its place.

        Raises:
            FormatError: the row group is damaged.
        """
        try:
            return {"__key__": self.name(number), **self._rows.row(number)}
        except S3LoaderError as error:
            error.op, error.url = "read", self._layout.key(0)
            raise

    def name(self, number: int) -> str:
        """What a row is called."""
        return self._layout.name_of(self._group, number)


def row_units(parts: Sequence[Any], selected: Sequence[Int64Array] | None) -> Int64Array | None:
    """Rows of each row group of all parts, those that are kept; None where the parts are not all Parquet files."""
    if not parts or not all(isinstance(part, ParquetShard) for part in parts):
        return None
    counts = []
    for number, part in enumerate(parts):
        groups = np.array(part.groups, dtype=np.int64)
        if selected is not None:
            group = np.searchsorted(np.cumsum(groups), selected[number], side="right")
            groups = np.bincount(group, minlength=len(groups)).astype(np.int64)
        counts.append(groups)
    return np.concatenate(counts)
