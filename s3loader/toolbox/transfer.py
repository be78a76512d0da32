"""Files and objects from one place to another: streamed, whole or not at all, within a bound of memory."""

from __future__ import annotations

import contextlib
import glob as globbing
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypeVar, Unpack, get_args

from s3loader.arguments import checked, local_path
from s3loader.errors import (
    BucketNotFoundError,
    ConfigError,
    IntegrityError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    PartialFailureError,
    S3LoaderError,
    SourceNotFoundError,
)
from s3loader.progress import Report, ShowProgress, check_progress, showing
from s3loader.ranges import split
from s3loader.store.arguments import at_source, checked_attributes
from s3loader.store.backend import ReadResult, key_bytes
from s3loader.store.bulk import ReadFailure
from s3loader.store.local import files
from s3loader.store.lost_reply import WRITE_ID
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import JobKeywords, StoreKeywords
from s3loader.store.ordered import run_ordered
from s3loader.tasks import TaskExecutor, batches, executor_of
from s3loader.toolbox.selecting import Found, only_objects, select
from s3loader.toolbox.stores import configured, names_folder, object_at, root_of, url_in
from s3loader.types import CommonPrefix, Location, ObjectMeta, ObjectURL, PutResult, ReadRequest
from s3loader.units import MIB

__all__ = ["OnExists", "TransferReport", "copy", "download", "sync", "upload"]

OnExists: TypeAlias = Literal["overwrite", "skip", "error", "if_changed"]
"""What happens where the target is there already. ``"if_changed"`` leaves it alone if it has the same size and is not older."""

T = TypeVar("T")

_PIECE: Final = 16 * MIB
"""Bytes of one request."""
_IN_HAND: Final = 128 * MIB
_BYTES_OF_A_TASK: Final = 1024 * MIB
_OBJECTS_OF_A_TASK: Final = 1000
"""Of a task on a cluster."""


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What a transfer did."""

    objects: int = 0
    bytes: int = 0
    skipped: int = 0
    """Objects whose target was there (or, of a sync, already equal)."""
    deleted: int = 0
    """Objects of the target that a sync deleted."""
    failures: tuple[tuple[str, S3LoaderError], ...] = ()
    """``(url or path of the source, error)`` of what failed."""


@dataclass(slots=True)
class _Tally:
    """What is done so far, of what was found so far."""

    shown: Report | None
    report: TransferReport = field(default_factory=TransferReport)
    found: int = 0
    complete: bool = False
    """All was found that there is."""
    told: bool = False
    """Of how many was said."""

    def add(self, objects: int = 0, size: int = 0, skipped: int = 0, deleted: int = 0) -> None:
        was = self.report
        self.report = TransferReport(
            was.objects + objects, was.bytes + size, was.skipped + skipped, was.deleted + deleted, was.failures
        )
        self._show()

    def fail(self, source: str, error: S3LoaderError) -> None:
        was = self.report
        self.report = TransferReport(was.objects, was.bytes, was.skipped, was.deleted, (*was.failures, (source, error)))
        self._show()

    def _show(self) -> None:
        if self.shown is not None:
            now = self.report
            done = now.objects + now.skipped + now.deleted + len(now.failures)
            self.told = self.complete
            self.shown(done, self.found if self.complete else None, now.bytes)

    def look(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, counted as found."""
        for item in items:
            self.found += 1
            yield item
        self.complete = True

    def join(self, other: TransferReport) -> None:
        """What a task did."""
        was = self.report
        self.report = TransferReport(
            was.objects, was.bytes, was.skipped, was.deleted, (*was.failures, *other.failures)
        )  # fmt: skip
        self.add(other.objects, other.bytes, other.skipped, other.deleted)

    def done(self) -> TransferReport:
        """The report.

        Raises:
            S3LoaderError: what was the only one failed.
            PartialFailureError: some failed.
        """
        if self.found and not self.told:
            self.complete = True
            self._show()
        failures = self.report.failures
        if not failures:
            return self.report
        if len(failures) == 1 and not self.report.objects + self.report.skipped:
            raise failures[0][1]
        raise PartialFailureError(
            f"{len(failures)} of {self.report.objects + self.report.skipped + len(failures)} failed, first {failures[0][0]}: "
            f"{failures[0][1].message}",
            failures=failures,
            report=self.report,
            hint="what did not fail is done; run it again with what skips the targets that are there",
        ) from failures[0][1]


# -- down -----------------------------------------------------------------------------------------


@checked
def download(
    url: Location,
    folder: str | os.PathLike[str],
    *,
    recursive: bool = True,
    glob: str | None = None,
    regex: str | None = None,
    flatten: bool = False,
    on_exists: OnExists = "overwrite",
    max_in_flight: int = 64,
    progress: ShowProgress = None,
    **place: Unpack[StoreKeywords],
) -> TransferReport:
    """Write objects as files in a local folder, under their names below `url`.

    Each file appears whole or not at all. A name that no file here can have, or that leads out of the folder, is a failure
    of its object. Empty objects whose key ends with a slash are not written: tools keep them for folders.

    Args:
        url: One object, a bucket or a folder.
        folder: Made where it is missing.
        recursive, glob, regex: Which objects, as `s3loader.s3.list` takes them.
        flatten: Only the last component of each name; that two are the same is an error.
        on_exists: What happens where a target is there: ``"overwrite"``, ``"skip"``, ``"error"``, or ``"if_changed"``, which
            skips what has the same size and is not older.
        max_in_flight: Requests at a time, of at most 128 MiB together.
        progress: True shows it on stderr; or a function of ``(done, total, bytes)`` that is called in the calling thread
            whenever an object is done: of how many (None while they are still being listed), and bytes moved so far.
        place: Keywords of `s3loader.open_store`: endpoint, credentials, options.

    Raises:
        ObjectNotFoundError: nothing was named.
        PartialFailureError: some objects failed; `.failures` says which, the others are there.
    """
    _check_policy(on_exists, max_in_flight, progress)
    target = os.fsencode(local_path(folder))
    single = not names_folder(url) and glob is None and regex is None
    found = only_objects(select(url, place, recursive=recursive, glob=glob, regex=regex, children=recursive))
    with showing(progress, "download") as shown:
        tally = _Tally(shown)
        plan = _files_of(found, target, flatten, on_exists, tally, empty_is_error=str(ObjectURL.parse(url)), single=single)
        first = next(plan, None)
        if first is not None:
            _fetch(first.found.store, itertools.chain((first,), plan), on_exists, max_in_flight, tally)
        return tally.done()


@dataclass(slots=True)
class _File:
    found: Found
    meta: ObjectMeta
    path: bytes
    pieces: int = 1
    temp: files.TempFile | None = None
    etag: str = ""
    failed: bool = False


def _files_of(
    found: Iterator[tuple[Found, ObjectMeta]],
    target: bytes,
    flatten: bool,
    on_exists: OnExists,
    tally: _Tally,
    *,
    empty_is_error: str,
    single: bool,
) -> Iterator[_File]:
    """What is to be written where; what needs no request is settled here."""
    names: set[str] = set()
    any_at_all = False
    for entry, meta in found:
        any_at_all = True
        if entry.key.endswith("/") and not meta.size:
            continue
        tally.found += 1
        name = entry.name.rpartition("/")[2] if flatten else entry.name
        try:
            if flatten:
                if name in names:
                    raise ConfigError(
                        f"two objects have the name {name!r}", url=entry.url, hint="leave flatten out, to keep their folders"
                    )
                names.add(name)
            path = os.path.join(target, files.relative_path(name))
            if os.path.lexists(path):
                if on_exists == "skip" or (on_exists == "if_changed" and _is_current(path, meta)):
                    tally.add(skipped=1)
                    continue
                if on_exists == "error":
                    raise _taken(path, entry.url)
            yield _File(entry, meta, path)
        except S3LoaderError as error:
            tally.fail(entry.url, error)
    tally.complete = True
    if not any_at_all:
        raise ObjectNotFoundError("there is nothing to download", op="get", url=empty_is_error)


def _taken(path: bytes, url: str) -> ObjectExistsError:
    name = os.fsdecode(path)
    hint = 'choose another folder, or on_exists="overwrite", "skip" or "if_changed"'
    return ObjectExistsError(f"the file {name!r} is there already", op="download", url=url, hint=hint)


def _is_current(path: bytes, meta: ObjectMeta) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return status.st_size == meta.size and int(status.st_mtime) >= int(meta.last_modified or 0)


def _fetch(store: ObjectStore, objects: Iterator[_File], on_exists: OnExists, max_in_flight: int, tally: _Tally) -> None:
    """Read the pieces of all objects in one stream, which bounds what is in hand, and append each to its file."""
    current: _File | None = None

    def requests() -> Iterator[ReadRequest]:
        for each in objects:
            size = each.meta.size
            if size <= _PIECE:
                yield ReadRequest(each.found.key, tag=(each, True))  # whole, whatever its size is by now
                continue
            bounds = [*split(0, size, _PIECE)]
            each.pieces = len(bounds)
            for start, end in bounds:
                yield ReadRequest(each.found.key, start, end, tag=(each, end == size))

    answers = store.read_many(requests(), errors="return", max_bytes=_IN_HAND, concurrency=max_in_flight)
    try:
        for answer in answers:
            now: tuple[_File, bool] = answer.request.tag
            current, last = now
            if current.failed:
                continue
            try:
                if isinstance(answer, ReadFailure):
                    raise answer.error
                with files.Guard("download", current.found.url, os.path.dirname(current.path)):
                    _append(current, answer)
                    if last:
                        size = os.fstat(current.temp.fd).st_size if current.temp else 0
                        _place(current, on_exists)
                        tally.add(objects=1, size=size)
            except S3LoaderError as error:
                current.failed = True
                _drop(current)
                tally.fail(current.found.url, error)
    finally:
        if current is not None:
            _drop(current)
        answers.close()  # type: ignore[attr-defined]  # a generator: its connections are let go now


def _append(current: _File, answer: ReadResult) -> None:
    if current.temp is None:
        folder = os.path.dirname(current.path)
        os.makedirs(folder, exist_ok=True)
        current.temp = files.TempFile(folder)
        current.etag = answer.etag
    if answer.etag != current.etag or (current.pieces > 1 and answer.size != current.meta.size):
        raise ObjectChangedError("it was replaced while it was read", op="get", url=current.found.url)
    current.temp.write(answer.data)


def _place(current: _File, on_exists: OnExists) -> None:
    assert current.temp is not None
    current.temp.stamp()
    if on_exists == "error":
        try:
            current.temp.link(current.path)
        except FileExistsError:
            raise _taken(current.path, current.found.url) from None
    else:
        current.temp.replace(current.path)
    _drop(current)


def _drop(current: _File) -> None:
    if current.temp is not None:
        current.temp.close()
        current.temp = None


# -- up -------------------------------------------------------------------------------------------


@checked
def upload(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    url: Location,
    *,
    on_exists: OnExists = "overwrite",
    content_type: str | None = None,
    metadata: Mapping[str, str] | None = None,
    attributes: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    create_bucket: bool = False,
    max_in_flight: int = 32,
    progress: ShowProgress = None,
    **place: Unpack[StoreKeywords],
) -> TransferReport:
    """Write local files as objects.

    Args:
        source: A file, a folder (all files below it, under their names in it), or a glob of Python's `glob` (``**`` too); or
            several of them. What exists under a name is meant by it, even if it looks like a glob.
        url: A bucket or folder, with a slash at its end; the object itself, if there is one file.
        on_exists: What happens where a target is there: ``"overwrite"``, ``"skip"``, ``"error"``, or ``"if_changed"``, which
            skips what has the same size and is not older.
        content_type, metadata, attributes, tags: Of all of them, as in `s3loader.s3.put`.
        create_bucket: Make the bucket where it is missing.
        max_in_flight: Files at a time.
        progress: True shows it on stderr; or a function of ``(done, total, bytes)`` that is called in the calling thread
            whenever an object is done: of how many (None while they are still being listed), and bytes moved so far.
        place: Keywords of `s3loader.open_store`: endpoint, credentials, options.

    Raises:
        SourceNotFoundError: nothing is there under a name.
        ConfigError: several files for the name of one object.
        PartialFailureError: some files failed; `.failures` says which, the others are stored.
    """
    from s3loader.toolbox import single

    _check_policy(on_exists, max_in_flight, progress)
    described: dict[str, Any] = {"content_type": content_type, "metadata": metadata}
    described["attributes"] = checked_attributes(attributes, tags)
    sources = [source] if isinstance(source, (str, os.PathLike)) else [*source]
    named = [*_local_files(sources)]
    target = ObjectURL.parse(url)
    into = names_folder(url)
    if not into and (len(named) > 1 or any(os.path.isdir(local_path(each)) for each in sources)):
        raise ConfigError(f"{len(named)} files cannot all become {target}", hint="end the URL with a slash, to name a folder")
    if create_bucket:
        single.create_bucket(target, **place)
    if target.scheme == "file":
        os.makedirs(target.key if into else os.path.dirname(target.key), exist_ok=True)

    def work(item: tuple[str, str]) -> int | None:
        path, name = item
        if target.scheme == "file" or not into:
            store, key = (root_of(target, place), name) if into else object_at(target, place)
        else:
            store, key = root_of(target, place), f"{target.key}{name}"
        return _upload_one(store, key, path, on_exists, described)

    part = 5 * 8 * MIB
    with showing(progress, "upload") as shown:
        tally = _Tally(shown)
        _run(tally.look(named), work, lambda item: item[0], max_in_flight, tally, lambda item: min(part, _size_of(item[0])))
        return tally.done()


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _local_files(sources: Iterable[str | os.PathLike[str]]) -> Iterator[tuple[str, str]]:
    """``(path, name)`` of each file, sorted within each source."""
    for source in sources:
        path = local_path(source)
        if os.path.isdir(path):
            yield from _below(path)
        elif os.path.lexists(path):
            yield path, os.path.basename(path)
        else:
            matches = sorted(globbing.glob(path, recursive=True)) if isinstance(source, str) else []
            base = _fixed_folder(path)
            plain = [match for match in matches if not os.path.isdir(match)]
            if not plain:
                raise SourceNotFoundError(f"there is no local file {path!r}", hint="check the path or pattern")
            for match in plain:
                yield match, os.path.relpath(match, base) if "**" in path else os.path.basename(match)


def _fixed_folder(pattern: str) -> str:
    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts) if globbing.has_magic(part)), len(parts) - 1)
    return "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else ".")


def _below(folder: str) -> Iterator[tuple[str, str]]:
    def fail(error: OSError) -> None:
        raise ConfigError(
            f"cannot read the folder {error.filename!r}: {error.strerror}", hint="check its permissions"
        ) from error

    for here, folders, names in os.walk(folder, onerror=fail):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(here, name)
            yield path, os.path.relpath(path, folder)


def _upload_one(store: ObjectStore, key: str, path: str, on_exists: OnExists, described: Mapping[str, Any]) -> int | None:
    """Bytes written; None: what is there was left alone."""
    import pathlib

    if on_exists in ("skip", "if_changed"):
        there = _head(store, key)
        if there is not None:
            status = at_source(path, lambda: os.stat(path))
            same = there.size == status.st_size and int(there.last_modified or 0) >= int(status.st_mtime)
            if on_exists == "skip" or same:
                return None
    mode: Literal["create", "overwrite"] = "create" if on_exists == "error" else "overwrite"
    if not os.path.isfile(path) and os.path.exists(path):
        raise ConfigError(f"{path!r} is no plain file", hint="pipes, sockets and devices cannot be uploaded")
    return store.put(key, pathlib.Path(path), mode=mode, **described).size


def _head(store: ObjectStore, key: str) -> ObjectMeta | None:
    try:
        return store.head(key)
    except ObjectNotFoundError:
        return None


# -- across ---------------------------------------------------------------------------------------


@checked
def copy(
    source: Location,
    target: Location,
    *,
    recursive: bool = False,
    glob: str | None = None,
    regex: str | None = None,
    on_exists: OnExists = "overwrite",
    max_in_flight: int = 16,
    progress: ShowProgress = None,
    target_place: Mapping[str, Any] | None = None,
    **job: Unpack[JobKeywords],
) -> TransferReport:
    """Copy objects, between any two stores and schemes.

    Inside one bucket the store copies by itself, with all that describes the object. Across, the bytes go through this
    process (16 MiB at a time, verified as they are written) with content type and user metadata.

    Args:
        source: One object; with `recursive` or a pattern a bucket or folder.
        target: One object; or, with a slash at its end, the folder in which the names are kept.
        recursive, glob, regex: Which objects, as `s3loader.s3.list` takes them.
        on_exists: What happens where a target is there: ``"overwrite"``, ``"skip"``, ``"error"``, or ``"if_changed"``, which
            skips what has the same size and is not older.
        max_in_flight: Objects at a time.
        progress: True shows it on stderr; or a function of ``(done, total, bytes)`` that is called in the calling thread
            whenever an object is done: of how many (None while they are still being listed), and bytes moved so far.
        target_place: Keywords of `open_store` for the target, where they differ from `place`.
        job: Keywords of `s3loader.open_store`: endpoint, credentials, options; and ``engine="ray"`` with ``address``: tasks of
            a Ray cluster copy some objects each.

    Raises:
        ObjectNotFoundError: there is nothing to copy.
        ConfigError: a folder without `recursive`, or several objects for the name of one.
        PartialFailureError: some failed; `.failures` says which.
    """
    _check_policy(on_exists, max_in_flight, progress)
    executor, place = executor_of(job)
    place = place if executor is None else configured(place)  # tasks know nothing of what this process was told
    there = {**place, **(target_place or {})}
    into = names_folder(target)
    where = ObjectURL.parse(target)
    several = recursive or glob is not None or regex is not None
    if not several:
        store, key = object_at(source, place)
        to_store, to_key = (_within(where, there, key.rpartition("/")[2])) if into else object_at(target, there)
        with showing(progress, "copy") as shown:
            tally = _Tally(shown, found=1, complete=True)
            size = _copy_one(store, key, to_store, to_key, on_exists, same=_same(source, target, place, there))
            tally.add(skipped=1) if size is None else tally.add(objects=1, size=size)
            return tally.done()
    if not into and not names_folder(ObjectURL(where.scheme, where.bucket, f"{where.key}/")):
        raise ConfigError(f"{where} is no folder", hint="end the target with a slash")
    found = only_objects(select(source, place, recursive=recursive, glob=glob, regex=regex))
    _check_apart(source, target, place, there)
    same = _same(source, target, place, there)
    folders = _Folders(str(ObjectURL.parse(source)), where, place, there, on_exists, same, max_in_flight)
    copies = ((_Copy(entry.key, entry.name, entry.url), meta.size) for entry, meta in found)
    with showing(progress, "copy") as shown:
        tally = _Tally(shown)
        _copy_all(executor, folders, tally.look(copies), tally)
        if not tally.report.objects + tally.report.skipped + len(tally.report.failures):
            raise ObjectNotFoundError("there is nothing to copy", op="copy", url=str(ObjectURL.parse(source)))
        return tally.done()


def _within(folder: ObjectURL, place: Mapping[str, Any], name: str) -> tuple[ObjectStore, str]:
    if folder.scheme == "file":
        os.makedirs(folder.key, exist_ok=True)
        return root_of(folder, place), name
    key = folder.key if not folder.key or folder.key.endswith("/") else f"{folder.key}/"
    return root_of(folder, place), f"{key}{name}"


def _same(source: Location, target: Location, place: Mapping[str, Any], there: Mapping[str, Any]) -> bool:
    """Whether one store holds both, so that it can copy by itself."""
    one, other = ObjectURL.parse(source), ObjectURL.parse(target)
    return (one.scheme, one.bucket) == (other.scheme, other.bucket) and one.scheme != "file" and dict(place) == dict(there)


def _check_apart(source: Location, target: Location, place: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Refuse folders of which one lies in the other: what is copied would be found, and copied again."""
    one, other = ObjectURL.parse(source), ObjectURL.parse(target)
    if (one.scheme, one.bucket) != (other.scheme, other.bucket) or dict(place) != dict(there):
        return
    a, b = (key if not key or key.endswith("/") else f"{key}/" for key in (one.key, other.key))
    if a.startswith(b) or b.startswith(a):
        what = "are the same folder" if a == b else "lie in one another"
        raise ConfigError(f"source and target {what}", url=str(one), hint="give a target beside the source")


class _Copy(NamedTuple):
    """An object to be copied."""

    key: str
    """In the store of the source."""
    name: str
    """Below the target."""
    url: str


class _Folders(NamedTuple):
    """From where to where, and how."""

    source: str
    target: ObjectURL
    place: Mapping[str, Any]
    there: Mapping[str, Any]
    on_exists: OnExists
    same: bool
    max_in_flight: int


def _copy_all(executor: TaskExecutor | None, folders: _Folders, copies: Iterator[tuple[_Copy, int]], tally: _Tally) -> None:
    """Copy what comes; by tasks, where there is who runs them."""
    if executor is None:
        _copy_these(folders, (one for one, _ in copies), tally)
        return
    tasks = batches(copies, lambda item: item[1], _BYTES_OF_A_TASK, _OBJECTS_OF_A_TASK)
    for _, report in executor.run(partial(_copy_there, folders), tasks):
        tally.join(report)


def _copy_there(folders: _Folders, copies: list[tuple[_Copy, int]]) -> TransferReport:
    """A task. What is copied twice is the same."""
    tally = _Tally(None)
    _copy_these(folders, (one for one, _ in copies), tally)
    return tally.report


def _copy_these(folders: _Folders, copies: Iterable[_Copy], tally: _Tally) -> None:
    store = root_of(ObjectURL.parse(folders.source), folders.place)

    def work(one: _Copy) -> int | None:
        to_store, to_key = _within(folders.target, folders.there, one.name)
        return _copy_one(store, one.key, to_store, to_key, folders.on_exists, same=folders.same)

    _run(copies, work, lambda one: one.url, folders.max_in_flight, tally)


def _run(
    items: Iterable[Any],
    work: Callable[[Any], int | None],
    name_of: Callable[[Any], str],
    concurrency: int,
    tally: _Tally,
    size_of: Callable[[Any], int] | None = None,
) -> None:
    """Do the work of each by threads, and count. `size_of`: bytes in hand meanwhile, where they are bounded."""
    slots = run_ordered(
        items,
        lambda slot, budget: work(slot.item),
        (lambda item: 1) if size_of is None else (lambda item: max(1, size_of(item))),
        max_bytes=4 * concurrency if size_of is None else 2 * _IN_HAND,
        concurrency=concurrency,
        name="s3loader-box",
    )
    try:
        for slot in slots:
            if isinstance(slot.error, S3LoaderError):
                tally.fail(name_of(slot.item), slot.error)
            elif slot.error is not None:
                raise slot.error
            elif slot.result is None:
                tally.add(skipped=1)
            else:
                tally.add(objects=1, size=slot.result)
    finally:
        slots.close()  # type: ignore[attr-defined]  # a generator: its threads end now


def _copy_one(
    store: ObjectStore, key: str, to_store: ObjectStore, to_key: str, on_exists: OnExists, *, same: bool
) -> int | None:
    """Bytes copied; None: what is there was left alone."""
    if same and key == to_key:
        raise ConfigError("source and target are the same object", url=f"{store.url}/{key}", hint="give another target")
    mode: Literal["create", "overwrite"] = "create" if on_exists == "error" else "overwrite"
    if on_exists in ("skip", "if_changed"):
        there = _head(to_store, to_key)
        if there is not None and (on_exists == "skip" or _is_newer(there, store.head(key))):
            return None
    if same:
        return store.copy(key, to_key, mode=mode).size
    return _stream(store, key, to_store, to_key, mode).size


def _is_newer(target: ObjectMeta, source: ObjectMeta) -> bool:
    """Whether the target can stand for the source: stores tell time in whole seconds."""
    return target.size == source.size and int(target.last_modified or 0) >= int(source.last_modified or 0)


def _stream(
    store: ObjectStore, key: str, to_store: ObjectStore, to_key: str, mode: Literal["create", "overwrite"]
) -> PutResult:
    """Copy by way of this process: one read and one put while it fits a piece."""
    from s3loader.errors import RangeError

    try:
        meta, head = store.backend.get(key, 0, _PIECE)
    except RangeError:  # it is empty
        meta, head = store.backend.get(key)
    metadata = {name: value for name, value in meta.metadata.items() if name != WRITE_ID}
    if meta.size <= len(head):
        return to_store.put(to_key, head, mode=mode, content_type=meta.content_type, metadata=metadata)
    pieces = split(len(head), meta.size, _PIECE)
    requests = (ReadRequest(key, start, end, if_match=meta.etag or None) for start, end in pieces)
    with to_store.multipart(to_key, mode=mode, content_type=meta.content_type, metadata=metadata) as writer:
        writer.write(head)
        del head
        for piece in store.read_many(requests, max_bytes=4 * _PIECE, concurrency=4):
            writer.write(piece.data)
        if writer.tell() != meta.size:
            raise IntegrityError(
                f"{writer.tell()} bytes were read of {meta.size}", op="copy", url=f"{store.url}/{key}", hint="copy it again"
            )
    assert writer.result is not None
    return writer.result


# -- the same there as here -----------------------------------------------------------------------


@checked
def sync(
    source: Location,
    target: Location,
    *,
    delete: bool = False,
    dry_run: bool = False,
    max_in_flight: int = 16,
    progress: ShowProgress = None,
    planned: Callable[[str, str], None] | None = None,
    target_place: Mapping[str, Any] | None = None,
    **job: Unpack[JobKeywords],
) -> TransferReport:
    """Make the folder `target` hold what the folder `source` holds; either may be local, or in any store.

    An object is copied unless the target has one of the same size that is not older (in whole seconds). Running it again copies
    nothing. Both listings are gone through side by side; what is held of them are the keys that will be deleted.

    Args:
        source: A bucket or folder.
        target: A bucket or folder.
        delete: Also delete what only the target has. Never happens where something failed before.
        dry_run: Do nothing; the report tells what would be done.
        max_in_flight: Objects at a time.
        progress: True shows it on stderr; or a function of ``(done, total, bytes)`` that is called in the calling thread
            whenever an object is done: of how many (None while they are still being listed), and bytes moved so far.
        planned: Called with each ``("copy" or "delete", url of the target)`` before it is done, or in its place.
        target_place: Keywords of `open_store` for the target, where they differ from `place`.
        job: Keywords of `s3loader.open_store`: endpoint, credentials, options; and ``engine="ray"`` with ``address``: tasks of
            a Ray cluster copy some objects each.

    Raises:
        BucketNotFoundError: there is no such bucket or local folder as `source`.
        ObjectNotFoundError: `delete`, and the source is empty: a mistyped one would empty the target.
        PartialFailureError: some failed; `.failures` says which, and nothing was deleted then.
    """
    _check_policy("overwrite", max_in_flight, progress)
    executor, place = executor_of(job)
    place = place if executor is None else configured(place)  # tasks know nothing of what this process was told
    there = {**place, **(target_place or {})}
    (store, prefix, _), (to_store, to_prefix, to_url) = _folder(source, place), _folder(target, there)
    _check_apart(source, target, place, there)
    same = _same(source, target, place, there)
    if store.engine == "file" and not os.path.isdir(ObjectURL.parse(source).key):
        raise BucketNotFoundError("there is no such folder", op="sync", url=store.url)
    with showing(progress, "sync") as shown:
        tally = _Tally(shown)
        extra: list[str] = []
        seen = False

        def wanted() -> Iterator[tuple[_Copy, int]]:
            nonlocal seen
            for name, mine, other in _side_by_side(_names(store, prefix), _names(to_store, to_prefix, missing_ok=True)):
                seen = seen or mine is not None
                tally.found += mine is not None or delete
                if mine is None:
                    if delete:
                        extra.append(to_prefix + name)
                elif other is not None and _is_newer(other, mine):
                    tally.add(skipped=1)
                else:
                    if planned is not None:
                        planned("copy", url_in(to_url, to_prefix + name))
                    yield _Copy(prefix + name, name, f"{store.url}/{prefix}{name}"), mine.size
            tally.complete = True

        if dry_run:
            for _, size in wanted():
                tally.add(objects=1, size=size)
        else:
            folders = _Folders(str(ObjectURL.parse(source)), to_url, place, there, "overwrite", same, max_in_flight)
            _copy_all(executor, folders, wanted(), tally)
        if extra and not seen:
            raise ObjectNotFoundError(
                "the source is empty, so all of the target would be deleted: nothing was",
                op="sync",
                url=str(ObjectURL.parse(source)),
                hint="check the source; `s3loader rm -r` empties a folder on purpose",
            )
        if extra and not tally.report.failures:
            for key in extra:
                if planned is not None:
                    planned("delete", url_in(to_url, key))
            failures = [] if dry_run else to_store.delete_many(extra)
            tally.add(deleted=len(extra) - len(failures))
            for failure in failures:
                error = failure.error
                tally.fail(
                    url_in(to_url, failure.key), error if isinstance(error, S3LoaderError) else S3LoaderError(str(error))
                )
        return tally.done()


def _folder(url: Location, place: Mapping[str, Any]) -> tuple[ObjectStore, str, ObjectURL]:
    where = ObjectURL.parse(url)
    store = root_of(where, place)
    if where.scheme == "file":
        return store, "", where
    return store, where.key if not where.key or where.key.endswith("/") else f"{where.key}/", where


def _names(store: ObjectStore, prefix: str, *, missing_ok: bool = False) -> Iterator[tuple[str, ObjectMeta]]:
    """Objects below, without the empty ones that stand for folders."""
    missing = ObjectNotFoundError if missing_ok and store.engine == "file" else ()
    with contextlib.suppress(missing):  # type: ignore[arg-type]  # an empty tuple: none
        for entry in store.list(prefix):
            if not isinstance(entry, CommonPrefix) and not (entry.key.endswith("/") and not entry.size):
                yield entry.key[len(prefix) :], entry


def _side_by_side(
    one: Iterator[tuple[str, ObjectMeta]], other: Iterator[tuple[str, ObjectMeta]]
) -> Iterator[tuple[str, ObjectMeta | None, ObjectMeta | None]]:
    """Two listings in order of their keys' bytes, as one."""
    left, right = next(one, None), next(other, None)
    while left is not None or right is not None:
        if right is None or (left is not None and key_bytes(left[0]) < key_bytes(right[0])):
            assert left is not None
            yield left[0], left[1], None
            left = next(one, None)
        elif left is None or key_bytes(left[0]) > key_bytes(right[0]):
            yield right[0], None, right[1]
            right = next(other, None)
        else:
            yield left[0], left[1], right[1]
            left, right = next(one, None), next(other, None)


def _check_policy(on_exists: OnExists, max_in_flight: int, progress: ShowProgress) -> None:
    check_progress(progress)
    if on_exists not in get_args(OnExists):
        raise ConfigError(f"on_exists cannot be {on_exists!r}", hint=f"use one of {', '.join(get_args(OnExists))}")
    if max_in_flight < 1:
        raise ConfigError(f"max_in_flight cannot be {max_in_flight}", hint="give 1 or more")
