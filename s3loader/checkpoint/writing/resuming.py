"""Resuming an interrupted upload: what an earlier attempt at the same step has sent is not sent again.

A file is taken over where its *content is proven* to be what would be written: a finished file by the MD5s in its ETag, or by
reading it where the ETag is not made of those; an open upload by the CRC32C (else the MD5 in the ETag) of every part that it
has. One part that differs, and nothing of the file is taken over. Bytes are the same although the header names the attempt: it
is planned with the id of the attempt that began the file.

Nothing is pinned. Files are taken over only at a step that has no root, and the commit is a create-only put of that root;
whoever deletes an attempt's files puts a root there first. So either the commit fails, or nobody has deleted anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from s3loader import events
from s3loader.checkpoint.format import layout
from s3loader.checkpoint.protocol.commit import Attempt
from s3loader.checkpoint.protocol.session import under_way
from s3loader.checkpoint.writing.staging import BufferPool, FilePlan, Kept, StagedPart, stage
from s3loader.checksum import crc32c_base64
from s3loader.errors import StoreError, UnsupportedOperationError
from s3loader.store.backend import Backend
from s3loader.store.parts import joined_etag, open_uploads
from s3loader.types import ObjectMeta, PartResult

__all__ = ["take_over"]

_log = logging.getLogger("s3loader.checkpoint")
_MD5 = re.compile(r"([0-9a-f]{32})(?:-(\d+))?")
_SAMPLE = 4096
_Check = Callable[[StagedPart], bool]


def take_over(attempt: Attempt, files: Sequence[FilePlan], pool: BufferPool, threads: int) -> int:
    """Find what earlier attempts have left of `files`, and set `FilePlan.kept` where it is proven to be the same.

    Costs the root, a listing, and where files are missing in it a listing of open uploads and one of each upload's parts;
    what is found is compared at the speed of a checksum, which takes the caller's time. Whatever fails here is no failure
    of the save: then the file is written anew.

    Args:
        attempt: The new one.
        files: What it is going to write.
        pool: Staging buffers, to compare with.
        threads: How many parts to compare at a time.

    Returns:
        The bytes taken over.
    """
    try:
        found = _look(attempt, files, pool)
    except StoreError as error:
        _log.info("what earlier attempts have left of step %d cannot be seen: %s", attempt.step, error)
        return 0
    total = 0
    with ThreadPoolExecutor(min(threads, os.cpu_count() or 1), "s3loader-ckpt-compare") as crew:
        for file in files:
            for kept in found.get(file.id, ()):
                start = events.now()
                file.adopt(kept, attempt.id)
                if _proven(attempt, file, kept, pool, crew):
                    total += _report(attempt, file, kept, start)
                    break
                file.adopt(None)
    return total


def _report(attempt: Attempt, file: FilePlan, kept: Kept, start: float) -> int:
    size = file.size if not kept.upload_id else sum(part.size for part in kept.parts.values())
    store = attempt.run.store
    _log.info("step %d: %d of %d bytes of %s are taken over", attempt.step, size, file.size, kept.key)
    if events.active():
        url = f"{store.url}/{kept.key}"
        events.emit(events.OpEvent("RESUME", url, size, start, events.now(), engine=store.backend.engine))
    return size


def _look(attempt: Attempt, files: Sequence[FilePlan], pool: BufferPool) -> dict[str, list[Kept]]:
    """What might be taken over, by the file's id, the best first."""
    run, prefix = attempt.run, layout.step_prefix(attempt.step)
    if not run.roots.read(attempt.step).never_written:
        return {}
    sizes = {file.id: file.size for file in files}
    found: dict[str, list[Kept]] = {}
    others = False
    busy = {"", attempt.id, *under_way(run.store.url)}  # this process's own saves are no dead ones
    for entry in run.store.list(prefix):
        key = layout.parse_key(entry.key)
        if key is None or key.attempt in busy or not isinstance(entry, ObjectMeta):
            continue
        others = True
        if sizes.get(key.file) == entry.size:
            found.setdefault(key.file, []).append(Kept(key.attempt, entry.key, etag=entry.etag))
    for finished in found.values():
        finished.sort(key=lambda kept: kept.attempt, reverse=True)
    # the parts of an open upload are held until it is complete, so that they can be sent elsewhere if it is lost
    missing = {f.id: f for f in files if f.id not in found and f.parts > 1 and pool.holds(f.parts, f.part)}
    if others and missing:
        for kept in _open_uploads(run.store.backend, prefix, busy, missing):
            found.setdefault(kept.key.rpartition("/")[2], []).append(kept)
    for name in missing:
        found.get(name, []).sort(key=lambda kept: len(kept.parts), reverse=True)
    return found


def _open_uploads(backend: Backend, prefix: str, busy: set[str], files: Mapping[str, FilePlan]) -> Iterator[Kept]:
    def wanted(key: str) -> bool:
        about = layout.parse_key(key)
        return about is not None and about.attempt not in busy and about.file in files

    try:
        for upload in open_uploads(backend, prefix, wanted):
            about, parts = layout.parse_key(upload.key), upload.parts
            assert about is not None
            if parts and all(_fits(part, files[about.file]) for part in parts.values()):
                yield Kept(about.attempt, upload.key, upload_id=upload.upload_id, parts=parts)
    except UnsupportedOperationError as error:
        _log.info("open uploads cannot be taken over: %s", error)


def _fits(part: PartResult, file: FilePlan) -> bool:
    """Whether it is a part of the file as we would cut it, and its content can be proven."""
    left = file.size - (part.number - 1) * file.part
    provable = part.checksum or _MD5.fullmatch(part.etag)
    return part.number > 0 and left > 0 and part.size == min(file.part, left) and bool(provable)


def _proven(attempt: Attempt, file: FilePlan, kept: Kept, pool: BufferPool, crew: ThreadPoolExecutor) -> bool:
    """Whether what is kept is what would be written; a finished file's checksums are there afterwards."""
    backend = attempt.run.store.backend
    try:
        if kept.upload_id:
            return _all(file, lambda part: _same_part(part, kept), pool, crew)
        count = file.parts
        told = _MD5.fullmatch(kept.etag)
        if told is not None and int(told[2] or 1) == count:
            digests: dict[int, bytes] = {}
            if not _all(file, lambda part: _hashed(part, kept, backend, digests), pool, crew):
                return False
            if kept.etag in (joined_etag(digests[n] for n in sorted(digests)), digests[1].hex() if count == 1 else ""):
                return True
        # not made of the MD5s of such parts: the store encrypts with other keys, or cuts or counts otherwise
        return _all(file, lambda part: _same_bytes(part, kept, backend, len(part.data)), pool, crew)
    except StoreError as error:
        _log.info("%s cannot be compared, it is written anew: %s", kept.key, error)
        return False


def _same_part(part: StagedPart, kept: Kept) -> bool:
    have = kept.parts.get(part.number)
    if have is None:
        return True
    if have.checksum:
        return have.checksum == crc32c_base64(part.data)
    return have.etag == hashlib.md5(part.data, usedforsecurity=False).hexdigest()


def _same_bytes(part: StagedPart, kept: Kept, backend: Backend, count: int) -> bool:
    """Whether the last `count` bytes of the part are those of the object."""
    part.checksum()
    end = part.begin + len(part.data)
    _, data = backend.get(kept.key, end - count, end, if_match=kept.etag or None)
    return memoryview(data) == part.data[len(part.data) - count :]


def _hashed(part: StagedPart, kept: Kept, backend: Backend, digests: dict[int, bytes]) -> bool:
    if part.number == 1 and not _same_bytes(part, kept, backend, min(_SAMPLE, len(part.data))):
        return False  # another state, and no need to hash all of it
    part.checksum()
    digests[part.number] = hashlib.md5(part.data, usedforsecurity=False).digest()
    return True


def _staged(file: FilePlan, pool: BufferPool) -> Generator[StagedPart, None, None]:
    return stage(file, pool, lambda: False, lambda: None, again=True)


def _all(file: FilePlan, check: _Check, pool: BufferPool, crew: ThreadPoolExecutor) -> bool:
    """Whether `check` says yes to every part. The first one goes ahead: another state mostly shows there."""
    jobs: dict[Future[bool], StagedPart] = {}
    latest: deque[Future[bool]] = deque(maxlen=8)
    try:
        with contextlib.closing(_staged(file, pool)) as parts:
            for part in parts:
                job = crew.submit(_released, part, check, pool)
                jobs[job] = part
                latest.append(job)
                if len(jobs) == 1 and not job.result():
                    return False
                if any(job.done() and not job.result() for job in latest):
                    return False
        return all(job.result() for job in jobs)
    finally:
        for job, part in jobs.items():
            if job.cancel():  # the answer is known, or nobody waits for it any more
                pool.release(part.buffer)
        wait(jobs)  # none may write a checksum once the file is staged in earnest


def _released(part: StagedPart, check: _Check, pool: BufferPool) -> bool:
    try:
        return check(part)
    finally:
        pool.release(part.buffer)
