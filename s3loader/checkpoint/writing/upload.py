"""Upload of staged parts by a few threads, which live as long as one save.

They are ordinary threads, started by `save` itself, so an interpreter that ends while a save
is under way waits for it.

Where a file goes on with the open upload of an earlier attempt (`resuming`), its parts stay in their buffers until
that upload is complete: if it is lost (aborted, completed, or a part of it overwritten by somebody who was thought dead), all
of them are sent again, under a key of our own.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Callable, Sequence

from s3loader.checkpoint.writing.resuming import joined_etag
from s3loader.checkpoint.writing.staging import BufferPool, FilePlan, Kept, StagedPart
from s3loader.errors import CheckpointError, S3LoaderError, StoreError
from s3loader.store import ObjectStore
from s3loader.store.options import MAX_PARTS
from s3loader.types import PartResult

__all__ = ["Upload"]

_log = logging.getLogger("s3loader.checkpoint")
_CONTENT = "application/octet-stream"
_HEX = re.compile("[0-9a-f]{32}")


class _File:
    """Multipart state of one file."""

    def __init__(self, plan: FilePlan, key: str, parts: int) -> None:
        self.plan, self.own_key, self.parts = plan, key, parts
        self.lock = threading.Lock()
        self.upload_id: str | None = None
        self.done: list[PartResult] = []
        self.held: list[StagedPart] = []
        """Parts of an upload that was taken over."""
        self.lost: StoreError | None = None
        """Why that upload is of no use."""

    @property
    def key(self) -> str:
        return self.plan.kept.key if self.plan.kept is not None else self.own_key


class Upload:
    """Uploads the files of one save.

    Args:
        store: Where to.
        prefix: Folder of the attempt, with its slash.
        plans: The files.
        pool: Where buffers go back to.
        threads: How many upload at a time.
        leave_open: Whether uploads stay open where it fails for a reason that may pass.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        plans: Sequence[FilePlan],
        pool: BufferPool,
        threads: int,
        *,
        leave_open: bool = False,
    ) -> None:
        self._store, self._pool, self._may_leave = store, pool, leave_open
        left = [plan for plan in plans if not plan.finished]
        self._files = {plan.id: _File(plan, prefix + plan.id, -(-plan.size // pool.size)) for plan in left}
        self.total = sum(plan.size for plan in plans)
        self.sent = self.total - sum(plan.size for plan in left)
        self.resumed = self.sent + sum(_size(plan.kept) for plan in left)
        """Bytes that an earlier attempt had sent."""
        self.left_open: list[tuple[str, str]] = []
        """Key and id of the uploads that stay open."""
        self._left = sum(file.parts for file in self._files.values())
        self._queue: queue.SimpleQueue[StagedPart | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._allowed = threading.Event()
        self._wanted = threading.Event()
        self._error: BaseException | None = None
        self._drained = False
        if not self._left:
            self._finished.set()
        for file in self._files.values():
            if file.parts > MAX_PARTS:
                raise CheckpointError(
                    f"{file.key} would need {file.parts} parts, a store takes {MAX_PARTS}", hint="choose a larger part_size"
                )
        count = min(threads, self._left)
        self._threads = [threading.Thread(target=self._work, name=f"s3loader-ckpt-upload-{i}") for i in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def stopped(self) -> bool:
        """Whether something failed, so that staging more is in vain."""
        return self._error is not None

    def put(self, part: StagedPart) -> None:
        """Hand over a staged part; its buffer goes back to the pool by itself."""
        with self._lock:
            if not self._drained:
                self._queue.put(part)
                return
        self._pool.release(part.buffer)

    def allow(self) -> None:
        """Sending is allowed from now on: the intent is written."""
        self._allowed.set()

    def hurry(self) -> None:
        """Sending is wanted from now on: everything is staged, or the staging memory is used up. Before, it would only
        keep the caller's thread from its copying."""
        self._wanted.set()

    def await_staging(self) -> None:
        """Return when sending is wanted, or all is in vain."""
        self._wanted.wait()

    def cancel(self, reason: BaseException) -> None:
        """End the upload; whatever was sent is left to garbage collection."""
        self.fail(reason)
        _quietly(self.wait)

    def fail(self, error: BaseException, *, passing: bool = False) -> None:
        """End the upload with `error` (the first one counts), which may be `passing`: then it may be resumed."""
        with self._lock:
            if self._error is None and not self._finished.is_set():
                self._error = error
                passing = passing or (isinstance(error, S3LoaderError) and error.retryable)
                self._may_leave = self._may_leave and passing
        self._finished.set()
        self._allowed.set()
        self._wanted.set()
        for _ in self._threads:
            self._queue.put(None)
        self._pool.wake()

    def wait(self) -> None:
        """Return when every file is complete; raise what went wrong, after open uploads were aborted or left."""
        self._finished.wait()
        for thread in self._threads:
            thread.join()
        with self._lock:
            self._drained = True
            while not self._queue.empty():
                part = self._queue.get()
                if part is not None:
                    self._pool.release(part.buffer)
        for file in self._files.values():
            self._release(file)
        if self._error is None:
            return
        for file in self._files.values():
            if file.upload_id is not None and self._may_leave:
                self.left_open.append((file.key, file.upload_id))
            elif file.upload_id is not None:
                _quietly(lambda file=file: self._store.backend.abort_multipart(file.key, str(file.upload_id)))  # type: ignore[misc]
        raise self._error

    def _work(self) -> None:
        self._wanted.wait()
        self._allowed.wait()
        while (part := self._queue.get()) is not None:
            held = False
            try:
                if not self.stopped:
                    held = self._send(part)
            except BaseException as error:  # noqa: BLE001 - a thread's error, whatever it is, is raised by `wait`
                self.fail(error)
            finally:
                if not held:
                    self._pool.release(part.buffer)
            with self._lock:
                self.sent += len(part.data)
                self._left -= 1
                all_sent = self._left == 0
            if all_sent:
                self._finished.set()
                for _ in self._threads:
                    self._queue.put(None)

    def _send(self, part: StagedPart) -> bool:
        """Send a part, and complete its file after the last one; returns whether its buffer is still needed."""
        part.checksum()
        file = self._files[part.file.id]
        if file.plan.kept is not None:
            self._resume(file, file.plan.kept, part)
            return True
        if file.parts == 1:
            result = self._store.backend.put(file.key, part.data, content_type=_CONTENT)
        else:
            with file.lock:
                if file.upload_id is None:
                    file.upload_id = self._store.backend.create_multipart(file.key, content_type=_CONTENT)
            sent = self._store.backend.upload_part(file.key, file.upload_id, part.number, part.data)
            with file.lock:
                file.done.append(sent)
                if len(file.done) < file.parts:
                    return False
            parts = sorted(file.done, key=lambda p: p.number)
            result = self._store.backend.complete_multipart(file.key, file.upload_id, parts)
            file.upload_id = None
        if result.size not in (file.plan.size, 0):
            raise CheckpointError(
                f"{file.key} has {result.size} bytes after its upload, not {file.plan.size}",
                hint="the store or a proxy changed it; save again",
            )
        return False

    def _resume(self, file: _File, kept: Kept, part: StagedPart) -> None:
        """Send a part of an upload that was taken over, if it is missing there; the last one that comes by completes it."""
        sent = kept.parts.get(part.number)
        try:
            if sent is None and file.lost is None:
                sent = self._store.backend.upload_part(kept.key, kept.upload_id, part.number, part.data)
        except StoreError as error:
            if error.retryable:
                self._pool.release(part.buffer)
                raise
            file.lost = error
        with file.lock:
            file.held.append(part)
            if sent is not None:
                file.done.append(sent)
            if len(file.held) < file.parts:
                return
        if self._completed(file, kept):
            self._release(file)
        else:
            self._anew(file, kept)

    def _completed(self, file: _File, kept: Kept) -> bool:
        """Whether the upload could be completed with these very parts: a part overwritten meanwhile has another ETag."""
        if file.lost is not None:
            return False
        parts = sorted(file.done, key=lambda part: part.number)
        try:
            result = self._store.backend.complete_multipart(kept.key, kept.upload_id, parts)
        except StoreError as error:
            if error.retryable:
                raise
            file.lost = error
            return False
        if result.size in (file.plan.size, 0) and _is_joined(result.etag, parts):
            return True
        file.lost = StoreError(
            f"it became another object, {result.etag}",
            op="complete upload",
            url=kept.key,
            hint="another process writes to this run; give each job a run of its own",
        )
        return False

    def _anew(self, file: _File, kept: Kept) -> None:
        """Send all parts of a file again, under our own key."""
        _log.info("the upload of %s that was taken over is lost, the file is sent anew: %s", kept.key, file.lost)
        file.plan.adopt(None)
        held, file.held, file.done = file.held, [], []
        with self._lock:
            self._left += len(held)
            self.sent -= file.plan.size
            self.resumed -= _size(kept)
        for part in held:
            part.head()
            self._queue.put(part)

    def _release(self, file: _File) -> None:
        held, file.held = file.held, []
        for part in held:
            self._pool.release(part.buffer)


def _size(kept: Kept | None) -> int:
    return sum(part.size for part in kept.parts.values()) if kept is not None else 0


def _is_joined(etag: str, parts: Sequence[PartResult]) -> bool:
    """Whether an object can be the one that these parts make; where ETags are not made of MD5s, it can."""
    told = {part.etag for part in parts} | {etag.partition("-")[0]}
    if not etag.endswith(f"-{len(parts)}") or not all(_HEX.fullmatch(tag) for tag in told):
        return True
    return etag == joined_etag(bytes.fromhex(part.etag) for part in parts)


def _quietly(action: Callable[[], None]) -> None:
    """Clean-up beside an error that is being raised: its own failure is left to garbage collection."""
    try:
        action()
    except Exception:  # noqa: BLE001 - the first error matters; gc aborts what stays open
        return
