"""Datasets into shards of another size: whole samples, in their order, resumable and by several processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final, Unpack

from s3loader.arguments import checked, whole_number
from s3loader.errors import ConfigError
from s3loader.inspection.dataset import classes_of
from s3loader.inspection.samples import open_for_inspection
from s3loader.loader.dataset import Dataset
from s3loader.loader.layout import LooseRun, Shard
from s3loader.loader.loader import Loader
from s3loader.packing.run import Exists, PackPlan, PackReport, Verify, pack, plan_pack
from s3loader.packing.sources import Sample, Source, as_sample
from s3loader.progress import ShowProgress
from s3loader.store.open import JobKeywords, StoreKeywords
from s3loader.tasks import executor_of
from s3loader.units import parse_size

__all__ = ["of_dataset", "plan_repack", "repack"]

_SHARDS_OF_A_PART: Final = 8
_BATCH: Final = 64


@checked
def repack(
    source: Any,
    url: str,
    *,
    shard_size: int | str = "64MiB",
    shard_samples: int | None = None,
    compression: str | None = None,
    workers: int = 0,
    exists: Exists = "resume",
    verify: Verify = "index",
    on_torn: Any = "error",
    index_dir: str | None = None,
    progress: ShowProgress = None,
    **store: Unpack[JobKeywords],
) -> PackReport:
    """Write a dataset anew at `url`, in shards of another size; the source is only read.

    Samples stay whole and keep keys, members, bytes and order. A key that comes twice in one part gets the name of its shard in
    front. Called again after an interruption, it goes on with the parts that are missing.

    Args:
        source: What `open_dataset` opens: a manifest, tar shards (also foreign ones), an MDS folder; or an open `Dataset`.
        url: Where to; another place than the source's.
        shard_size, shard_samples, compression, workers, exists, verify, progress: As of `pack`.
        on_torn: Samples whose members lie apart: ``"error"``, or ``"split"`` takes each stretch for a sample.
        index_dir: For indexes of source shards that have none, if their store may not be written to.
        store: Keywords for `open_store`, of both.

    Raises:
        ConfigError: the source is the target, or a folder of files (which `pack` takes).
        S3LoaderError: as `open_dataset` and `pack` raise.
    """
    _, place = executor_of(store, workers)
    return pack(
        _source(source, shard_size, on_torn, index_dir, place),
        url,
        shard_size=shard_size,
        shard_samples=shard_samples,
        compression=compression,
        workers=workers,
        exists=exists,
        verify=verify,
        progress=progress,
        **store,
    )


@checked
def plan_repack(
    source: Any,
    url: str,
    *,
    shard_size: int | str = "64MiB",
    on_torn: Any = "error",
    index_dir: str | None = None,
    **store: Unpack[StoreKeywords],
) -> PackPlan:
    """What `repack` would do; writes nothing. Arguments as of `repack`."""
    return plan_pack(_source(source, shard_size, on_torn, index_dir, store), url, shard_size=shard_size, **store)


def _source(source: Any, shard_size: int | str, on_torn: Any, index_dir: str | None, place: StoreKeywords) -> Source:
    size = parse_size(shard_size, "shard_size_bytes" if whole_number(shard_size) is not None else "shard_size")
    opened = isinstance(source, Dataset)
    dataset = source if opened else open_for_inspection(source, on_torn=on_torn, index_dir=index_dir, **place)
    return of_dataset(dataset, size * _SHARDS_OF_A_PART, None if opened else place)


def of_dataset(dataset: Dataset, part_bytes: int, place: Mapping[str, Any] | None = None) -> Source:
    """The samples of a dataset in its own order, in parts of whole shards.

    Args:
        dataset: Grouped, or of a kind whose samples are mappings (MDS).
        part_bytes: Bytes of one part, about.
        place: Keywords with which other processes open its store themselves; None: they take the open one, credentials
            included.

    Raises:
        ConfigError: it has no samples, or they are whole objects.
    """
    if not len(dataset):
        raise ConfigError("there is nothing to pack: the dataset has no samples", url=dataset.name, hint="check the URL")
    if all(isinstance(part, LooseRun) for part in dataset.parts) and dataset.group is None:
        raise ConfigError("its samples are whole objects", url=dataset.name, hint="pack the folder they lie in (s3loader pack)")
    if dataset.catalog.units is not None:
        raise ConfigError(
            "its samples are rows of Parquet files", url=dataset.name, hint="pack the files: s3loader pack FILES URL"
        )
    parts: list[Callable[[], Iterable[Sample]]] = []
    low, filled = 0, 0
    for number, part in enumerate(dataset.parts):
        filled += part.size or max(part.now, 0) if isinstance(part, Shard) else int(part.known_sizes.clip(0).sum())
        if filled >= part_bytes or number == len(dataset.parts) - 1:
            first, stop = int(dataset.starts[low]), int(dataset.starts[number] + dataset.catalog.counts[number])
            if stop > first:
                run = dataset.slice(first, stop)
                parts.append(partial(_samples_of, run if place is None else run.without_store(place), first))
            low, filled = number + 1, 0
    facts = f"{dataset.catalog.digest} {part_bytes} {len(dataset)}"
    found = dataset.stored_bytes
    digest = hashlib.sha256(facts.encode()).hexdigest()
    left_out = {kind: list(some.names) for kind, some in dataset.left_out.items()}
    return Source(parts, len(dataset), found, digest, classes_of(dataset), left_out=left_out)


def _samples_of(run: Dataset | Callable[[], Dataset], number: int) -> Iterator[Sample]:
    part = run if isinstance(run, Dataset) else run()
    seen: set[str] = set()
    for batch in Loader(part, batch_size=_BATCH, shuffle="none", tail="short").iter_batches():
        for sample, place in zip(batch.data, batch.places(), strict=True):
            if not isinstance(sample, Mapping):
                raise ConfigError("its samples are whole objects", url=part.name, hint="pack the folder they lie in")
            key, values = as_sample({n: bytes(v) if isinstance(v, memoryview) else v for n, v in sample.items()}, number)
            while key in seen:
                key = f"{place.shard.rpartition('/')[2].partition('.')[0] or 'again'}/{key}"
            seen.add(key)
            yield key, values
            number += 1
