"""Loading a dataset in several orders, and saving and restoring a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Final, Unpack

import numpy as np

from s3loader.arguments import checked
from s3loader.bench.report import BenchReport, Row, advise, times_of
from s3loader.bench.scratch import Bound, Watch, opened, scratch
from s3loader.checkpoint import CheckpointManager
from s3loader.datagen import Generator
from s3loader.errors import ConfigError
from s3loader.exchange import ManifestWriter, ShardSizePolicy
from s3loader.inspection.samples import open_for_inspection
from s3loader.loader import Loader, open_dataset
from s3loader.loader.dataset import Dataset
from s3loader.store import ObjectStore, open_store
from s3loader.store.open import StoreKeywords
from s3loader.types import Location, ObjectURL
from s3loader.units import GIB, MIB, format_size, parse_size

__all__ = ["measure_ckpt", "measure_load"]

ORDERS: Final = ("none", "block", "full")
_TENSORS: Final = 8
_ROUNDS: Final = 5

Progress = Callable[[int, int], None]


@checked
def measure_load(
    url: Location,
    *,
    orders: Iterable[str] = ORDERS,
    batch_size: int = 64,
    sample_size: int | str = "100KiB",
    seconds: float = 20.0,
    max_bytes: int | str = 2 * GIB,
    existing: bool = False,
    index_dir: str | None = None,
    progress: Progress | None = None,
    **place: Unpack[StoreKeywords],
) -> BenchReport:
    """Load samples in several orders, in this process, without decoding.

    Args:
        url: A bucket or folder, in which a dataset is written below a random name, and deleted; with `existing`, a dataset.
        orders: Values of the loader's `shuffle`.
        batch_size: Samples of a batch.
        sample_size: Bytes of a sample that is written.
        seconds: All of it takes about so long; a quarter of it is for writing.
        max_bytes: Most bytes that are moved; likewise.
        existing: Load the dataset at `url`, and write nothing.
        index_dir: Of an existing one: where indexes are kept if the store may not be written to.
        progress: Is called with orders done, of how many.
        place: Keywords of `open_store`.

    Raises:
        ConfigError, S3LoaderError: as of `measure_put`, and `open_dataset`.
    """
    wanted = list(dict.fromkeys(orders))
    limit = parse_size(max_bytes, "max_bytes")
    if not wanted or batch_size < 1 or not 0 < seconds < 86400:
        raise ConfigError("there is nothing to measure", hint='orders=["block"], batch_size=64, seconds=20')
    if existing:
        dataset = open_for_inspection(url, index_dir=index_dir, **place)
        report = BenchReport("load", dataset.name, dataset.store.engine, began=time.time())
        _load_all(dataset, wanted, batch_size, seconds, limit, report, progress)
    else:
        with opened(url, place) as store:
            report = BenchReport("load", store.url, store.engine, began=time.time())
            with scratch(store, report) as prefix:
                size = parse_size(sample_size, "sample_size_bytes")
                made = _write_dataset(store, prefix, size, batch_size, Bound(seconds / 4, limit // 4), report)
                _load_all(made, wanted, batch_size, 0.75 * seconds, int(0.75 * limit), report, progress)
    report.advice = advise(report)
    return report


def _write_dataset(store: ObjectStore, prefix: str, size: int, batch_size: int, bound: Bound, report: BenchReport) -> Dataset:
    key = f"{prefix}manifest.jsonl"
    policy = ShardSizePolicy(max_bytes=max(16 * MIB, 4 * size))
    count = 0
    with ManifestWriter(
        store, key, mode="overwrite", shard_size=policy, shard_prefix=f"{prefix}shards", group="webdataset"
    ) as out:
        while bound.take(size) or count < batch_size:
            data = bytes(Generator(size, seed=1, index=count).whole())
            out.add_sample(f"{count:08d}", {"bin": data, "cls": str(count % 10).encode()})
            count += 1
    report.written += count * size
    report.notes.append(f"a dataset of {count:,} samples of {format_size(size)} was written for this")
    return open_dataset(key, store=store, group="webdataset")


def _load_all(
    dataset: Dataset,
    orders: list[str],
    batch_size: int,
    seconds: float,
    limit: int,
    report: BenchReport,
    progress: Progress | None,
) -> None:
    for done, order in enumerate(orders):
        with Watch(dataset.store, frozenset(["GET"])) as watch:
            row = _load(dataset, order, batch_size, Bound(seconds / len(orders), limit // len(orders)), watch)
        report.rows.append(row)
        report.read += row.more["bytes_fetched"]
        if progress is not None:
            progress(done + 1, len(orders))


def _load(dataset: Dataset, order: Any, batch_size: int, bound: Bound, watch: Watch) -> Row:
    ahead = max(1 * MIB, min(256 * MIB, bound.left // 4))  # what is fetched ahead is moved too
    loader = Loader(dataset, batch_size=batch_size, shuffle=order, tail="short", seed=0, prefetch=ahead)
    begin, cpu = time.perf_counter(), time.process_time()
    waits: list[float] = []
    fetched = 0
    amplification: float | None = None  # of whole epochs: where one is broken off, what was fetched ahead is not used
    while not waits or not bound.over:  # epoch after epoch
        batches = loader.iter_batches()
        last = time.perf_counter()
        for _ in batches:
            now = time.perf_counter()
            waits.append(now - last)
            bound.spend(loader.stats.bytes_fetched - fetched)
            fetched = loader.stats.bytes_fetched
            if bound.over:
                break
            last = time.perf_counter()
        else:
            amplification = loader.stats.amplification
        batches.close()
    seconds = time.perf_counter() - begin
    stats = loader.stats
    told = stats.as_dict()
    more = {name: told[name] for name in ("first_batch", "verdict", "bytes_fetched", "refetched", "hedged")}
    more["amplification"] = amplification
    more |= {"samples": stats.samples, "samples_s": stats.samples / seconds, "engine": stats.engine, "driver": stats.driver}
    return Row(
        f"load {order}",
        stats.bytes_used // max(1, stats.samples),
        batch_size,
        stats.requests,
        stats.bytes_used,
        seconds,
        repeated=watch.repeated,
        cpu=(time.process_time() - cpu) / seconds,
        latency=times_of(waits),
        first_byte=times_of(watch.first_bytes),
        more=more,
    )


@checked
def measure_ckpt(
    url: Location,
    *,
    size: int | str = "256MiB",
    seconds: float = 20.0,
    max_bytes: int | str = 2 * GIB,
    progress: Progress | None = None,
    **place: Unpack[StoreKeywords],
) -> BenchReport:
    """Save a state of random numbers below `url` and restore it, several times, and delete all of it.

    Args:
        url: A bucket or folder; all is written below a random name in it.
        size: Bytes of the state.
        seconds: All of it takes about so long; one save and one restore are always made.
        max_bytes: Most bytes that are moved; the state is at most half of it.
        progress: Is called with rounds done, of how many at most.
        place: Keywords of `open_store`.

    Raises:
        ConfigError, S3LoaderError: as of `measure_put`.
    """
    limit = parse_size(max_bytes, "max_bytes")
    each = parse_size(size, "size_bytes")
    if each < _TENSORS or each > limit // 2:
        raise ConfigError(
            f"a state of {format_size(each)} cannot be saved and restored within {format_size(limit)}",
            hint="a smaller size, or a larger max_bytes",
        )
    with opened(url, place) as store:
        report = BenchReport("ckpt", store.url, store.engine, began=time.time())
        bound = Bound(seconds, limit)
        one = each // _TENSORS
        state = {f"w{n}": np.frombuffer(bytes(Generator(one, seed=2, index=n).whole()), np.uint8) for n in range(_TENSORS)}
        target = {name: np.empty_like(value) for name, value in state.items()}
        saves: list[tuple[float, float]] = []
        loads: list[float] = []
        with scratch(store, report) as prefix:
            where = ObjectURL.parse(store.url).joined(prefix.rstrip("/"))
            with open_store(where, **place) as below, CheckpointManager(below, rank=0, world_size=1) as manager:
                for step in range(_ROUNDS):
                    if not bound.take(2 * each):
                        break
                    begin = time.perf_counter()
                    handle = manager.save(step, {"state": state})
                    blocked = time.perf_counter() - begin
                    handle.result()
                    saves.append((blocked, time.perf_counter() - begin))
                    begin = time.perf_counter()
                    manager.restore(step, {"state": target})
                    loads.append(time.perf_counter() - begin)
                    manager.delete(step)
                    if progress is not None:
                        progress(step + 1, _ROUNDS)
        moved = one * _TENSORS
        report.written, report.read = moved * len(saves), moved * len(loads)
        blocked = float(np.median([b for b, _ in saves]))
        whole = [seconds for _, seconds in saves]
        more = {"blocked": blocked, "whole": float(np.median(whole))}
        report.rows += [
            Row("save", moved, 1, len(saves), report.written, sum(whole), latency=times_of(whole), more=more),
            Row("restore", moved, 1, len(loads), report.read, sum(loads), latency=times_of(loads)),
        ]
    report.advice = advise(report)
    return report
