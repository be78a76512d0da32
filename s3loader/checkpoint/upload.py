"""Upload of staged parts by a few threads, which live as long as one save.

They are ordinary threads, started by `save` itself, so an interpreter that ends while a save
is under way waits for it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from s3loader.checkpoint.staging import BufferPool, FilePlan, StagedPart
from s3loader.errors import CheckpointError
from s3loader.store import ObjectStore
from s3loader.store.options import MAX_PARTS
from s3loader.types import PartResult

__all__ = ["Upload"]

_CONTENT = "application/octet-stream"


class _File:
    """Multipart state of one file."""

    def __init__(self, plan: FilePlan, key: str, parts: int) -> None:
        self.plan, self.key, self.parts = plan, key, parts
        self.lock = threading.Lock()
        self.upload_id: str | None = None
        self.done: list[PartResult] = []


class Upload:
    """Uploads the files of one save.

    Args:
        store: Where to.
        prefix: Folder of the attempt, with its slash.
        plans: The files.
        pool: Where buffers go back to.
        threads: How many upload at a time.
    """

    def __init__(self, store: ObjectStore, prefix: str, plans: Sequence[FilePlan], pool: BufferPool, threads: int) -> None:
        self._store, self._pool = store, pool
        self._files = {plan.id: _File(plan, prefix + plan.id, -(-plan.size // pool.size)) for plan in plans}
        self.total = sum(plan.size for plan in plans)
        self.sent = 0
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

    def fail(self, error: BaseException) -> None:
        """End the upload with `error` (the first one counts)."""
        with self._lock:
            if self._error is None and not self._finished.is_set():
                self._error = error
        self._finished.set()
        self._allowed.set()
        self._wanted.set()
        for _ in self._threads:
            self._queue.put(None)
        self._pool.wake()

    def wait(self) -> None:
        """Return when every file is complete; raise what went wrong, after open uploads were aborted."""
        self._finished.wait()
        for thread in self._threads:
            thread.join()
        with self._lock:
            self._drained = True
            while not self._queue.empty():
                part = self._queue.get()
                if part is not None:
                    self._pool.release(part.buffer)
        if self._error is None:
            return
        for file in self._files.values():
            if file.upload_id is not None:
                _quietly(lambda file=file: self._store.backend.abort_multipart(file.key, str(file.upload_id)))  # type: ignore[misc]
        raise self._error

    def _work(self) -> None:
        self._wanted.wait()
        self._allowed.wait()
        while (part := self._queue.get()) is not None:
            try:
                if not self.stopped:
                    self._send(part)
            except BaseException as error:  # noqa: BLE001 - a thread's error, whatever it is, is raised by `wait`
                self.fail(error)
            finally:
                self._pool.release(part.buffer)
            with self._lock:
                self.sent += len(part.data)
                self._left -= 1
                all_sent = self._left == 0
            if all_sent:
                self._finished.set()
                for _ in self._threads:
                    self._queue.put(None)

    def _send(self, part: StagedPart) -> None:
        part.checksum()
        file = self._files[part.file.id]
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
                    return
            parts = sorted(file.done, key=lambda p: p.number)
            result = self._store.backend.complete_multipart(file.key, file.upload_id, parts)
            file.upload_id = None
        if result.size not in (file.plan.size, 0):
            raise CheckpointError(f"{file.key} has {result.size} bytes after its upload, not {file.plan.size}")


def _quietly(action: Callable[[], None]) -> None:
    """Clean-up beside an error that is being raised: its own failure is left to garbage collection."""
    try:
        action()
    except Exception:  # noqa: BLE001 - the first error matters; gc aborts what stays open
        return
