"""`read_manifest`: the samples of a dataset as a `ray.data.Dataset`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final, Unpack

import numpy as np
import pyarrow as pa
import ray.data
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from s3loader import ConfigError, Dataset, Loader
from s3loader.adapters import DatasetSource, MemberKeywords, checked, open_source

__all__ = ["ManifestDatasource", "read_manifest"]

_KEY: Final = "__key__"
_BYTES: Final = "bytes"
"""Column of samples that are whole members or objects."""
_RANGE: Final = 8 << 20
"""Bytes of the runs of samples that a task is made of, about: one range of a shard."""
_BLOCK: Final = 64 << 20
"""Bytes of content at which a block of Ray ends."""
_BATCH: Final = 64


@checked
def read_manifest(
    url: DatasetSource,
    *,
    columns: list[str] | None = None,
    decode: Any = None,
    transform: Any = None,
    concurrency: int | None = None,
    override_num_blocks: int | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    **source: Unpack[MemberKeywords],
) -> ray.data.Dataset:
    """The samples at a URL as a `ray.data.Dataset`, a row each, in their order: a manifest, or all else `open_dataset` reads.

    Columns are the extensions of a sample's members (``jpg``, ``cls``), of bytes unless `decode` says otherwise, and
    ``__key__``; of samples that are whole (``group=None``), ``__key__`` and ``bytes``. What a sample has not is null. Checksums
    are verified. `select_columns` keeps the other members from being fetched.

    A task reads a run of neighbouring samples, cut by the sizes the manifest tells; it carries the entries of its own shards,
    no open store, and no credentials but those given here: each node finds its own.

    Args:
        url: Of the dataset.
        columns: Only these.
        decode: As of `LoaderOptions`: ``"auto"``, a function, or functions by extension. None: bytes.
        transform: Called with each sample, a mapping; gives a mapping.
        concurrency, override_num_blocks, ray_remote_args: As of `ray.data.read_datasource`.
        source: Keywords of `open_dataset` and `open_store`; `group` is ``"webdataset"`` where it is not given.

    Raises:
        ConfigError: an option is unusable.
        ObjectNotFoundError: there is nothing there.
    """
    if not isinstance(url, Dataset):
        source = {"group": "webdataset", **source}
    dataset, _ = open_source(url, source)
    place = {name: value for name, value in source.items() if name in _PLACE}
    datasource = ManifestDatasource(dataset, columns=columns, decode=decode, transform=transform, place=place)
    return ray.data.read_datasource(
        datasource,
        concurrency=concurrency,
        override_num_blocks=override_num_blocks,
        ray_remote_args=ray_remote_args,
    )


_PLACE: Final = {*MemberKeywords.__optional_keys__} - {
    *("kind", "store", "group", "members", "where", "index_dir", "on_torn"),
    *("allow_missing_end", "allow_trailing", "lower_extensions"),
}


class ManifestDatasource(Datasource):  # type: ignore[misc]  # Ray is not looked into
    """The samples of a dataset, for `ray.data.read_datasource`.

    Args:
        dataset: An open `s3loader.Dataset`.
        columns: Only these.
        decode, transform: As of `read_manifest`.
        place: Keywords of `open_store` with which tasks open the dataset's store.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        columns: list[str] | None = None,
        decode: Any = None,
        transform: Any = None,
        place: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._dataset = dataset
        self._options = {"decode": decode, "transform": transform}
        self._place = dict(place or {})
        self._projection_map = None if columns is None else {name: name for name in columns}

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        state["_dataset"] = self._dataset.without_store(self._place)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_dataset": state["_dataset"]()})

    def get_name(self) -> str:
        """For progress and plans."""
        return "S3Loader"

    def supports_projection_pushdown(self) -> bool:
        """Columns that are not asked for are not fetched."""
        return self._options["transform"] is None

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes of all samples, as the manifest tells them."""
        return self._dataset.catalog.total_bytes or None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Runs of whole ranges, `parallelism` of them where there are as many."""
        dataset, columns = self._dataset, self._get_data_columns()
        count, size = len(dataset), dataset.catalog.total_bytes
        if not count:
            return []
        run = max(1, min(count, count * _RANGE // max(1, size)))  # samples
        runs = -(-count // run)
        tasks = max(1, min(parallelism, runs))
        edges = [min(count, runs * number // tasks * run) for number in range(tasks + 1)]
        if columns is not None and dataset.group is not None and self._options["transform"] is None:
            wanted = [name for name in columns if name != _KEY]
            dataset = dataset.only(wanted) if wanted else dataset
        made = []
        for first, stop in itertools.pairwise(edges):
            part = dataset.slice(first, stop)
            read = partial(_read, part.without_store(self._place), columns, self._options)
            rows = stop - first if per_task_row_limit is None else min(stop - first, per_task_row_limit)
            keys = (getattr(shard, "key", None) for shard in part.parts)  # none of loose objects
            files = tuple(f"{part.store.url}/{key}" for key in keys if key is not None)
            facts = BlockMetadata(num_rows=rows, size_bytes=size * (stop - first) // count, exec_stats=None, input_files=files)
            made.append(ReadTask(read, facts, per_task_row_limit=per_task_row_limit))
        return made


def _read(
    make: Callable[[], Dataset],
    columns: list[str] | None,
    options: dict[str, Any],
) -> Iterator[Block]:
    """In a task: blocks of one run of samples."""
    dataset = make()
    rows: list[dict[str, Any]] = []
    held = 0
    for batch in Loader(dataset, batch_size=_BATCH, shuffle="none", tail="short", **options).iter_batches():
        whole = [place.key for place in batch.places()] if dataset.group is None else None
        for number, sample in enumerate(batch.data):
            row = _row(sample, None if whole is None else whole[number], dataset.name)
            held += sum(len(value) for value in row.values() if isinstance(value, bytes))
            rows.append(row)
        if held >= _BLOCK:
            yield _block(rows, columns)
            rows, held = [], 0
    if rows:
        yield _block(rows, columns)


def _row(sample: Any, key: str | None, name: str) -> dict[str, Any]:
    if not isinstance(sample, Mapping):
        if key is None:
            raise ConfigError(
                f"a row must be a mapping, not {type(sample).__name__}", url=name, hint="let transform give one, by column"
            )
        sample = {_KEY: key, _BYTES: sample}
    return {
        str(column): bytes(value) if isinstance(value, (memoryview, bytearray)) else value
        for column, value in sample.items()
        if column == _KEY or not str(column).startswith("__")
    }


def _block(rows: list[dict[str, Any]], columns: list[str] | None) -> Block:
    """Rows as a table of Arrow: bytes stay bytes (numpy would cut zeros off their ends), arrays become Ray's tensors."""
    names = list(dict.fromkeys(name for row in rows for name in row)) if columns is None else (columns or [_KEY])
    table = None
    for name in names:
        values = [row.get(name) for row in rows]
        if all(value is None or isinstance(value, bytes) for value in values):
            column = pa.table({name: pa.array(values, pa.binary())})
        elif all(value is None or isinstance(value, (str, int, float, bool)) for value in values):
            column = pa.table({name: pa.array(values)})
        else:
            column = BlockAccessor.for_block(BlockAccessor.batch_to_block({name: _array(values)})).to_arrow()
        table = column if table is None else table.append_column(column.field(name), column.column(name))
    return table


def _array(values: list[Any]) -> np.ndarray[Any, Any]:
    shapes = {getattr(value, "shape", None) for value in values}
    if len(shapes) == 1 and None not in shapes:
        return np.stack(values)
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found
