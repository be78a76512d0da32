"""Many objects at once: results in the order asked for, duplicates kept, a bounded number of bytes in hand."""

from __future__ import annotations

import builtins
import itertools
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeVar, Unpack, cast

from s3loader.arguments import checked
from s3loader.errors import ConfigError, ObjectNotFoundError, S3LoaderError, UnsupportedOperationError, WorkerError
from s3loader.store import bulk
from s3loader.store.arguments import check_attributes, check_several, checked_attributes, readable
from s3loader.store.backend import Backend, ReadResult
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import StoreKeywords
from s3loader.store.ordered import run_ordered
from s3loader.toolbox.selecting import only_objects, select
from s3loader.toolbox.single import stat
from s3loader.toolbox.stores import configured, object_at, root_of, split_object
from s3loader.types import Buffer, Location, ObjectMeta, ObjectURL, PutMode, PutRequest, PutResult, ReadRequest
from s3loader.units import MIB

__all__ = [
    "ProcessStats",
    "delete",
    "delete_exactly",
    "get_many",
    "get_many_stats",
    "in_parallel",
    "list",
    "mp_get",
    "put_many",
    "read_each",
    "stat_many",
]

T = TypeVar("T")
R = TypeVar("R")

_IN_HAND: Final = 128 * MIB
"""Bytes of a bulk call that are on their way."""
_BATCH: Final = 1000


@checked
def list(  # noqa: A001 - the field's word
    url: Location,
    recursive: bool = False,
    *,
    glob: str | None = None,
    regex: str | None = None,
    **place: Unpack[StoreKeywords],
) -> builtins.list[str]:
    """URLs of what is in a bucket or folder, in order of the UTF-8 bytes of their keys.

    Args:
        url: A bucket or folder; of one object, itself and what is below it as a folder. Nothing in it is a pattern.
        recursive: All objects below; else what is directly there, folders with a slash at their end.
        glob: Only names that match: ``*`` and ``?`` stop at a slash, ``**`` does not. Without a slash it is held against the
            last component, with one against the whole name below `url`.
        regex: Only names below `url` in which this is found (`re.search`).
        place: Keywords of `s3loader.open_store`: endpoint, credentials, options.

    Raises:
        BucketNotFoundError: there is no such bucket.
        ConfigError: a pattern that is none, or two.
    """
    return [found.url for found in select(url, place, recursive=recursive, glob=glob, regex=regex)]


@checked
def get_many(
    urls: Iterable[Location], max_in_flight: int = 64, **place: Unpack[StoreKeywords]
) -> builtins.list[tuple[str, bytes]]:
    """``(url, bytes)`` of many objects, in the order of `urls`, as often as each is there.

    Args:
        urls: Of one store or several, of any schemes.
        max_in_flight: Requests at a time.
        place: Keywords of `s3loader.open_store`: endpoint, credentials, options.

    Raises:
        S3LoaderError: the first that failed, in the order of `urls`.
    """
    return [(url, bytes(result.data)) for url, result in read_each(urls, max_in_flight, place)]


@checked
def get_many_stats(urls: Iterable[Location], max_in_flight: int = 64, **place: Unpack[StoreKeywords]) -> tuple[int, int]:
    """Read many objects and keep none: how many, and how many bytes. Arguments and errors as `get_many`.

    At most 128 MiB are held at a time (one object may be larger).
    """
    count = total = 0
    for _, result in read_each(urls, max_in_flight, place):
        count += 1
        total += len(result.data)
    return count, total


def read_each(urls: Iterable[Location], max_in_flight: int, place: Mapping[str, Any]) -> Iterator[tuple[str, ReadResult]]:
    """Whole objects, as they are taken, in order."""
    check_several(urls, "URL")
    _check_in_flight(max_in_flight)
    for backend, run in _by_store(urls, lambda url: url, place):
        requests = (ReadRequest(key, tag=str(url)) for key, url in run)
        results = bulk.read_many(
            backend, requests, max_bytes=_IN_HAND, concurrency=max_in_flight, driver="auto", errors="raise"
        )
        for result in results:
            assert isinstance(result, ReadResult)
            yield result.request.tag, result


@checked
def put_many(
    items: Iterable[Any],
    max_in_flight: int = 64,
    *,
    mode: PutMode = "overwrite",
    content_type: str | None = None,
    metadata: Mapping[str, str] | None = None,
    attributes: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    **place: Unpack[StoreKeywords],
) -> builtins.list[PutResult]:
    """Write many objects; what became of each, in the order of `items`.

    Args:
        items: ``(url, data)`` pairs, data with the buffer protocol; may be a generator, which is drawn from as there is room.
        max_in_flight: Requests at a time, of at most 128 MiB.
        mode: As in `s3loader.s3.put`.
        content_type, metadata, attributes, tags: Of all of them, as in `s3loader.s3.put`.
        place: Keywords of `s3loader.open_store`: endpoint, credentials, options.

    Raises:
        S3LoaderError: the first that failed, in the order of `items`; what was written before stays.
    """
    check_several(items, "(url, data) pair")
    _check_in_flight(max_in_flight)
    said = checked_attributes(attributes, tags)
    made: builtins.list[PutResult] = []
    for backend, run in _by_store(items, _first, place):
        check_attributes(content_type, metadata, headers=backend.engine not in ("file", "memory"))
        requests = (
            PutRequest(key, _bytes_of(item), mode, content_type, metadata=metadata, attributes=said) for key, item in run
        )
        results = bulk.put_many(backend, requests, max_bytes=_IN_HAND, concurrency=max_in_flight, driver="auto", errors="raise")
        made += cast("Iterator[PutResult]", results)
    return made


def _first(item: Any) -> Any:
    if not isinstance(item, tuple) or len(item) != 2:
        raise ConfigError(f"not a (url, data) pair: {item!r:.100}", hint='put_many([("s3://bucket/key", b"data"), ...])')
    return item[0]


def _bytes_of(item: Any) -> Buffer:
    return item[1] if isinstance(item[1], bytes) else readable(item[1])


@checked
def stat_many(
    urls: Iterable[Location], max_in_flight: int = 64, **place: Unpack[StoreKeywords]
) -> builtins.list[dict[str, Any]]:
    """What `s3loader.s3.stat` tells of each, in order. Raises the first that failed."""
    check_several(urls, "URL")
    _check_in_flight(max_in_flight)
    return [*in_parallel(urls, lambda url: stat(url, **place), max_in_flight)]


@checked
def delete(
    url: Location | Iterable[Location],
    recursive: bool = False,
    *,
    glob: str | None = None,
    regex: str | None = None,
    missing_ok: bool = False,
    **place: Unpack[StoreKeywords],
) -> int:
    """Delete what `url` names, and nothing else; how many objects that were.

    Args:
        url: One object; with `recursive` or a pattern, a bucket or folder. ``s3://b/a1`` is that object, and with `recursive`
            what is below it as a folder: never ``a10``. Or several URLs, each of one object.
        recursive: All that is below it.
        glob, regex: Only what matches, as `list` takes them.
        missing_ok: Nothing there is no error; a single object is not looked for then, and counts as one.
        place: Keywords of `s3loader.open_store`: endpoint, credentials, options.

    Raises:
        ObjectNotFoundError: there is nothing of what was named.
        ConfigError: a bucket or folder, without `recursive` or a pattern.
        S3LoaderError: the first that could not be deleted; the others are.
    """
    if not isinstance(url, (str, os.PathLike, ObjectURL)):
        several = [*url]
        return sum(in_parallel(several, lambda one: delete(one, missing_ok=missing_ok, **place), 64))
    if not recursive and glob is None and regex is None:
        store, key = object_at(url, place)
        if not missing_ok:
            try:
                store.head(key)
            except ObjectNotFoundError as error:
                if key.endswith("/"):
                    error.hint = "recursive=True deletes all that is below"
                raise
        store.delete(key)
        return 1
    count = 0
    failed: S3LoaderError | None = None
    for found in _markers_too(url, place, recursive, glob, regex):
        keys, store = found
        failures = store.delete_many(keys)
        count += len(keys) - len(failures)
        if failures and failed is None:
            first = failures[0].error
            failed = first if isinstance(first, S3LoaderError) else S3LoaderError(str(first))
    if failed is not None:
        raise failed
    if not count and not missing_ok:
        hint = "`s3loader.s3.list(url, recursive=True)` shows what there is; nothing was deleted"
        what = f" that matches {glob or regex!r}" if glob or regex else ""
        raise ObjectNotFoundError(f"there is nothing{what} to delete", op="delete", url=str(ObjectURL.parse(url)), hint=hint)
    return count


def _markers_too(
    url: Location, place: Mapping[str, Any], recursive: bool, glob: str | None, regex: str | None
) -> Iterator[tuple[builtins.list[str], ObjectStore]]:
    """Keys to delete, a thousand at a time."""
    found = (entry for entry, _ in only_objects(select(url, place, recursive=recursive, glob=glob, regex=regex)))
    for _, run in itertools.groupby(found, key=lambda entry: id(entry.store)):
        while batch := [*itertools.islice(run, _BATCH)]:
            yield [entry.key for entry in batch], batch[0].store
    where = ObjectURL.parse(url)
    if glob is None and regex is None and where.scheme != "file" and where.key:
        # the empty object that some tools keep for the folder itself has no name below the folder
        folder = where.key if where.key.endswith("/") else f"{where.key}/"
        store, key = object_at(ObjectURL(where.scheme, where.bucket, folder), place)
        first = next(iter(store.list(key)), None)
        if isinstance(first, ObjectMeta) and first.key == key:
            yield [key], store


def delete_exactly(urls: Iterable[Location], **place: Unpack[StoreKeywords]) -> None:
    """Delete these objects, a thousand a request; those that are gone by now are no error.

    Raises:
        S3LoaderError: the first that could not be deleted; the others are.
    """
    failed: Exception | None = None
    for root, run in itertools.groupby(map(split_object, urls), key=lambda each: each[0]):
        for failure in root_of(root, place).delete_many(key for _, key in run):
            failed = failed or failure.error
    if failed is not None:
        raise failed


class ProcessStats(NamedTuple):
    """What `mp_get` read."""

    objects: int
    bytes: int
    seconds: float
    """From the first process's start to the last one's end, starting included."""
    processes: builtins.list[tuple[int, int, float]]
    """Objects, bytes and seconds of reading of each process."""


@checked
def mp_get(
    url: Location | Iterable[Location],
    procs: int = 4,
    max_in_flight: int = 64,
    *,
    recursive: bool = True,
    glob: str | None = None,
    regex: str | None = None,
    **place: Unpack[StoreKeywords],
) -> ProcessStats:
    """Read many objects in several processes and keep none: for what one process cannot saturate.

    Args:
        url: A bucket or folder, or several URLs of objects.
        procs: Processes, at most one per object.
        max_in_flight: Requests at a time of each.
        recursive, glob, regex: Which of the objects, as `list` takes them.
        place: Keywords of `s3loader.open_store`; they must pickle.

    Raises:
        ObjectNotFoundError: there is nothing to read.
        UnsupportedOperationError: ``memory://``, which lives in one process.
        S3LoaderError: what the first process that failed says.
    """
    if procs < 1:
        raise ConfigError(f"{procs} processes", hint="give 1 or more")
    _check_in_flight(max_in_flight)
    if isinstance(url, (str, os.PathLike, ObjectURL)):
        urls = [found.url for found, _ in only_objects(select(url, place, recursive=recursive, glob=glob, regex=regex))]
        where = str(ObjectURL.parse(url))
    else:
        urls = [str(ObjectURL.parse(one)) for one in url]
        where = urls[0] if urls else ""
    if not urls:
        raise ObjectNotFoundError("there is nothing to read", op="get", url=where or None)
    if any(one.startswith("memory://") for one in urls):
        raise UnsupportedOperationError(
            "a store in memory lives in one process", op="get", url=where, hint="use get_many_stats"
        )
    shares = [share for i in range(min(procs, len(urls))) if (share := urls[i::procs])]
    start = time.perf_counter()
    running = [_start_reader(share, max_in_flight, configured(place)) for share in shares]
    try:
        answers = [_answer_of(process) for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
    found = [answer for answer in answers if isinstance(answer, tuple)]
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return ProcessStats(sum(a[0] for a in found), sum(a[1] for a in found), time.perf_counter() - start, found)


_READER: Final = "from s3loader.toolbox.many import read_share; read_share()"


def _start_reader(urls: builtins.list[str], max_in_flight: int, place: StoreKeywords) -> subprocess.Popen[bytes]:
    """A process that reads `urls`; what it needs goes through its pipe, where nobody else sees it."""
    work = pickle.dumps((urls, max_in_flight, place))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    process = subprocess.Popen([sys.executable, "-c", _READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdin is not None
    try:
        process.stdin.write(work)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died: its answer, or the lack of one, says so
    return process


def _answer_of(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    said = process.stdout.read()
    code = process.wait()
    if not said:
        return WorkerError(f"a reading process ended with code {code}", hint="what it wrote to stderr says why")
    return pickle.loads(said)  # noqa: S301 - of our own child


def read_share() -> None:
    """The whole of a process of `mp_get`."""
    urls, max_in_flight, place = pickle.load(sys.stdin.buffer)  # noqa: S301 - of our own parent
    start = time.perf_counter()
    answer: Any
    try:
        count, total = get_many_stats(urls, max_in_flight, **place)
        answer = count, total, time.perf_counter() - start
    except S3LoaderError as error:
        answer = error
    sys.stdout.buffer.write(pickle.dumps(answer))


def in_parallel(items: Iterable[T], work: Callable[[T], R], concurrency: int) -> Iterator[R]:
    """What `work` makes of each, in order, by threads; the first error is raised at its place."""
    slots = run_ordered(
        items,
        lambda slot, budget: work(slot.item),
        lambda item: 1,
        max_bytes=4 * concurrency,
        concurrency=concurrency,
        name="s3loader-box",
    )
    try:
        for slot in slots:
            if slot.error is not None:
                raise slot.error
            yield slot.result
    finally:
        slots.close()  # type: ignore[attr-defined]  # a generator: its threads end now


def _check_in_flight(max_in_flight: int) -> None:
    if max_in_flight < 1:
        raise ConfigError(f"max_in_flight cannot be {max_in_flight}", hint="give 1 or more")


def _by_store(
    items: Iterable[Any], url_of: Callable[[Any], Location], place: Mapping[str, Any]
) -> Iterator[tuple[Backend, Iterator[tuple[str, Any]]]]:
    """`items` in runs of one backend, each with its key in it.

    Neighbours in one bucket share its own bulk path. A list that mixes several stores goes, as a whole, through a backend whose
    keys are URLs, so that all of it runs at once.
    """
    if isinstance(items, (builtins.list, tuple)) and len({split_object(url_of(item))[0] for item in items}) > 1:
        yield cast("Backend", _ByURL(place)), ((str(ObjectURL.parse(url_of(item))), item) for item in items)
        return
    split = ((*split_object(url_of(item)), item) for item in items)
    for root, run in itertools.groupby(split, key=lambda each: each[0]):
        yield root_of(root, place).backend, ((key, item) for _, key, item in run)


class _ByURL:
    """A backend whose keys are URLs."""

    engine = "several"
    bulk = None
    url = "(several stores)"

    def __init__(self, place: Mapping[str, Any]) -> None:
        self._place = place
        self._stores: dict[ObjectURL, ObjectStore] = {}

    def _at(self, url: str) -> tuple[Backend, str]:
        root, key = split_object(url)
        store = self._stores.get(root)
        if store is None:
            store = self._stores.setdefault(root, root_of(root, self._place))
        return store.backend, key

    def get(self, key: str, start: int = 0, end: int | None = None, **options: Any) -> tuple[ObjectMeta, Buffer]:
        backend, name = self._at(key)
        return backend.get(name, start, end, **options)

    def read_into(self, key: str, start: int, buffer: memoryview, **options: Any) -> ObjectMeta:
        backend, name = self._at(key)
        return backend.read_into(name, start, buffer, **options)

    def put(self, key: str, data: Buffer, **options: Any) -> PutResult:
        backend, name = self._at(key)
        return backend.put(name, data, **options)
