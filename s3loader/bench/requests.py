"""Gets and puts of several sizes, so many at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final, Unpack

from s3loader.arguments import checked
from s3loader.bench.report import BenchReport, Row, advise, times_of
from s3loader.bench.scratch import Bound, Watch, opened, scratch
from s3loader.datagen import generate
from s3loader.errors import ConfigError, ObjectNotFoundError, S3LoaderError
from s3loader.store import ObjectStore
from s3loader.store.open import StoreKeywords
from s3loader.types import Location, ObjectMeta
from s3loader.units import GIB, MIB, format_size, parse_size

__all__ = ["measure_get", "measure_put"]

SIZES: Final = ("64KiB", "1MiB", "16MiB")
CONCURRENCY: Final = (1, 8, 32)
_MEMORY: Final = 1 * GIB
"""Bytes that may be held by requests at a time."""
_MOST: Final = 64
"""Objects of one size that are written to be read."""
_LISTED: Final = 1000
_BODIES: Final = 4
"""Different objects: some stores keep equal ones once."""

Progress = Callable[[int, int], None]


@checked
def measure_put(
    url: Location,
    *,
    sizes: Iterable[int | str] = SIZES,
    concurrency: Iterable[int] = CONCURRENCY,
    seconds: float = 20.0,
    max_bytes: int | str = 2 * GIB,
    progress: Progress | None = None,
    **place: Unpack[StoreKeywords],
) -> BenchReport:
    """Write objects below `url`, each size with each number at a time, and delete them.

    Args:
        url: A bucket or folder; all is written below a random name in it, and nothing else is touched.
        sizes: Bytes of the objects.
        concurrency: Requests at a time.
        seconds: All of it takes about so long.
        max_bytes: Most bytes that are moved.
        progress: Is called with settings done, of how many.
        place: Keywords of `open_store`.

    Raises:
        ConfigError: an argument is unusable.
        S3LoaderError: the store refuses what would not work better the next time (credentials, no such bucket, no rights).
    """
    cells = _cells(sizes, concurrency)
    with opened(url, place) as store:
        report = BenchReport("put", store.url, store.engine, began=time.time())
        share = _share(seconds, max_bytes, len(cells))
        with scratch(store, report) as prefix:
            for done, (size, at_once) in enumerate(cells):
                bodies = [generate(size, seed=number) for number in range(_BODIES if size * _BODIES <= 64 * MIB else 1)]
                names = iter(range(1 << 60))

                def put(size: int = size, bodies: Sequence[Any] = bodies, names: Any = names, done: int = done) -> int:
                    number = next(names)
                    store.put(f"{prefix}{done}/{number}", bodies[number % len(bodies)])
                    return size

                row = _measured(store, "put", size, at_once, put, Bound(*share), report)
                report.rows.append(row)
                report.written += row.bytes
                gone = [entry.key for entry in store.list(f"{prefix}{done}/")]
                report.deleted += len(gone) - len(list(store.delete_many(gone)))
                if progress is not None:
                    progress(done + 1, len(cells))
    report.advice = advise(report)
    return report


@checked
def measure_get(
    url: Location,
    *,
    sizes: Iterable[int | str] = SIZES,
    concurrency: Iterable[int] = CONCURRENCY,
    seconds: float = 20.0,
    max_bytes: int | str = 2 * GIB,
    existing: bool = False,
    progress: Progress | None = None,
    **place: Unpack[StoreKeywords],
) -> BenchReport:
    """Read objects, each size with each number at a time.

    Args:
        url, sizes, concurrency, seconds, max_bytes, progress, place: As of `measure_put`. A quarter of time and bytes is for
            writing what is read.
        existing: Read the objects that lie below `url` (the first 1,000), and write nothing; `sizes` mean nothing then.

    Raises:
        ObjectNotFoundError: with `existing`, there is none.
        ConfigError, S3LoaderError: as of `measure_put`.
    """
    cells = _cells(sizes, concurrency)
    with opened(url, place) as store:
        report = BenchReport("get", store.url, store.engine, began=time.time())
        if existing:
            found = _existing(store)
            size = sum(meta.size for meta in found) // len(found)
            cells = list(dict.fromkeys((size, at_once) for _, at_once in cells))
            share = _share(seconds, max_bytes, len(cells))
            for done, (_, at_once) in enumerate(cells):
                row = _read(store, [(m.key, m.size) for m in found], size, at_once, share, report)
                report.rows.append(row)
                if progress is not None:
                    progress(done + 1, len(cells))
        else:
            with scratch(store, report) as prefix:
                limit = parse_size(max_bytes, "max_bytes")
                share = _share(0.75 * seconds, int(0.75 * limit), len(cells))
                most = max(at_once for _, at_once in cells)
                per_size = _share(0.25 * seconds, limit // 4, len({size for size, _ in cells}))
                keys: dict[int, list[tuple[str, int]]] = {}
                for done, (size, at_once) in enumerate(cells):
                    if size not in keys:
                        keys[size] = _write(store, prefix, size, min(_MOST, 2 * most), Bound(*per_size), report)
                    report.rows.append(_read(store, keys[size], size, at_once, share, report))
                    if progress is not None:
                        progress(done + 1, len(cells))
    report.advice = advise(report)
    return report


def _cells(sizes: Iterable[int | str], concurrency: Iterable[int]) -> list[tuple[int, int]]:
    given = [parse_size(size, "size_bytes") for size in sizes]
    numbers = list(concurrency)
    if not given or not numbers or min(given) < 1 or min(numbers) < 1:
        raise ConfigError("sizes and numbers at a time must be at least 1", hint='sizes=["1MiB"], concurrency=[1, 8]')
    cells = [(size, number) for size in dict.fromkeys(given) for number in dict.fromkeys(numbers)]
    large = [cell for cell in cells if cell[0] * cell[1] > _MEMORY]
    if large:
        size, number = large[0]
        raise ConfigError(
            f"{number} at a time of {format_size(size)} would hold more than {format_size(_MEMORY)}",
            hint="smaller objects, or fewer at a time",
        )
    return cells


def _share(seconds: float, max_bytes: int | str, cells: int) -> tuple[float, int]:
    if not 0 < seconds < 86400:
        raise ConfigError(f"seconds cannot be {seconds!r}", hint="such as 20")
    return seconds / cells, parse_size(max_bytes, "max_bytes") // cells


def _existing(store: ObjectStore) -> list[ObjectMeta]:
    found: list[ObjectMeta] = []
    for entry in store.list():
        if isinstance(entry, ObjectMeta) and entry.size:
            found.append(entry)
            if len(found) == _LISTED:
                break
    if not found:
        raise ObjectNotFoundError(
            "there are no objects to read", op="list", url=store.url, hint="without --existing some are written"
        )
    return found


def _write(store: ObjectStore, prefix: str, size: int, count: int, bound: Bound, report: BenchReport) -> list[tuple[str, int]]:
    """Objects to read: as many as the bound allows, one at least."""
    keys: list[tuple[str, int]] = []
    body = generate(size, seed=size)
    for number in range(count):
        if not bound.take(size):
            break
        key = f"{prefix}{size}/{number}"
        store.put(key, body)
        keys.append((key, size))
    report.written += len(keys) * size
    if len(keys) < count:
        report.notes.append(
            f"{len(keys)} objects of {format_size(size)} are read over and over: time and bytes allowed no more"
        )
    return keys


def _read(
    store: ObjectStore, keys: Sequence[tuple[str, int]], size: int, at_once: int, share: tuple[float, int], report: BenchReport
) -> Row:
    names = iter(range(1 << 60))

    def get() -> int:
        key, _ = keys[next(names) % len(keys)]
        return len(store.get(key))

    row = _measured(store, "get", size, at_once, get, Bound(*share), report)
    report.read += row.bytes
    return row


def _measured(
    store: ObjectStore, what: str, size: int, at_once: int, one: Callable[[], int], bound: Bound, report: BenchReport
) -> Row:
    """Run `one` in so many threads until time or bytes are used up."""
    done: list[tuple[float, int]] = []
    failed: list[S3LoaderError] = []
    fatal: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set() and bound.take(size):
            begin = time.perf_counter()
            try:
                moved = one()
            except S3LoaderError as error:
                failed.append(error)
                if not error.retryable:
                    fatal.append(error)
                    stop.set()
                continue
            except BaseException as error:  # noqa: BLE001 - of a thread; raised below, where it was asked for
                fatal.append(error)
                stop.set()
                return
            done.append((time.perf_counter() - begin, moved))

    ops = frozenset(["GET"] if what == "get" else ["PUT", "PUTPART"])
    begin, cpu = time.perf_counter(), time.process_time()
    with Watch(store, ops) as watch:
        threads = [threading.Thread(target=work, name=f"s3loader-bench-{number}", daemon=True) for number in range(at_once)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        except BaseException:
            stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
    seconds = time.perf_counter() - begin
    busy = (time.process_time() - cpu) / seconds
    if fatal:
        raise fatal[0]
    if failed and not done:
        raise failed[0]
    for error in failed:
        name = f"{type(error).__name__}: {error.message}"
        report.errors[name] = report.errors.get(name, 0) + 1
    row = Row(what, size, at_once, len(done), sum(moved for _, moved in done), seconds, len(failed), watch.repeated, busy)
    return replace(row, latency=times_of([s for s, _ in done]), first_byte=times_of(watch.first_bytes))
