"""Upload of staged parts by a few threads, which live as long as one save.

They are ordinary threads, so an interpreter that ends while a save is under way waits for it. Nothing runs before `begin`.

Where a file goes on with the open upload of an earlier attempt (`resuming`), its parts stay in their buffers until
that upload is complete: if it is lost (aborted, completed, or a part of it overwritten by somebody who was thought dead), all
of them are sent again, under a key of our own.
"""

from __future__ import annotations

import logging
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Sequence

from s3loader.checkpoint.threads import Gate, at_once
from s3loader.checkpoint.writing.staging import BufferPool, FilePlan, Kept, StagedPart
from s3loader.errors import (
    CheckpointError,
    ObjectExistsError,
    S3LoaderError,
    StoreError,
    ThrottledError,
    UnsupportedOperationError,
)
from s3loader.progress import Report
from s3loader.store import ObjectStore
from s3loader.store.parts import PartUpload, joined_etag
from s3loader.store.s3.in_flight import InFlight
from s3loader.types import PartResult, PutMode

__all__ = ["Upload", "upload_pace"]

_log = logging.getLogger("s3loader.checkpoint")
_CONTENT = "application/octet-stream"
_GLANCE = 0.2
"""Seconds between two looks whether a thread is wanted by now."""
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 8.0
_PATIENCE = 120.0
"""Seconds for which a store may say "slow down" to everything."""
_ELSEWHERE = 8
"""Parts at a time to begin with, where it is not our own client that sends them to S3."""
_HEX = re.compile("[0-9a-f]{32}")
_UNKNOWN_CONDITION = (400, 405, 501)
"""What stores answer to a condition that they do not know."""


def upload_pace(store: ObjectStore, most: int) -> InFlight:
    """How many parts may be on their way to `store`: it begins with as many as may be, since what there is to send is known,
    and follows the rule of reads from then on."""
    return InFlight(start=most if store.backend.engine == "direct" else min(most, _ELSEWHERE))


class _File:
    """The upload of one file."""

    def __init__(self, plan: FilePlan, store: ObjectStore, key: str) -> None:
        self.plan, self.parts = plan, (parts := plan.parts)
        self.lock = threading.Lock()
        self.own = PartUpload(store.backend, key, count=parts, content_type=_CONTENT)
        self.upload = self.own
        if plan.kept is not None:
            kept = plan.kept
            self.upload = PartUpload(store.backend, kept.key, count=parts, upload_id=kept.upload_id, parts=kept.parts)
        self.held: list[StagedPart] = []
        """Parts of an upload that was taken over."""
        self.lost: StoreError | None = None
        """Why that upload is of no use."""


class Upload:
    """Uploads the files of one save.

    Args:
        store: Where to.
        prefix: Folder of the attempt, with its slash.
        plans: The files.
        pool: Where buffers go back to.
        threads: Most that upload at a time.
        pace: How many of them do; it is kept from save to save.
        create: Asked, once sending begins, whether the store can refuse to overwrite; then no file is ever written twice.
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
        pace: InFlight | None = None,
        create: Callable[[], bool] = lambda: False,
        leave_open: bool = False,
    ) -> None:
        self._store, self._pool, self._may_leave, self._create = store, pool, leave_open, create
        self._parts_too = True
        """Whether the store also knows the condition where an upload is completed, as far as is known."""
        left = [plan for plan in plans if not plan.finished]
        self._files = {plan.id: _File(plan, store, prefix + plan.id) for plan in left}
        self.total = sum(plan.size for plan in plans)
        self.sent = self.total - sum(plan.size for plan in left)
        self.resumed = self.sent + sum(_size(plan.kept) for plan in left)
        """Bytes that an earlier attempt had sent."""
        self.left_open: list[tuple[str, str]] = []
        """Key and id of the uploads that stay open."""
        self._left = sum(file.parts for file in self._files.values())
        self._queue: queue.SimpleQueue[StagedPart | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._report: Report | None = None
        self._telling = threading.Lock()
        self._finished = Gate()
        self._allowed = Gate()
        self._wanted = Gate()
        self._error: BaseException | None = None
        self._drained = False
        if not self._left:
            self._finished.open()
        count = min(threads, self._left)
        self._pace = pace or upload_pace(store, threads)
        self._last = self._accepted = 0.0
        self._pause = 0.0
        self._retrying = threading.Lock()
        self._threads = [threading.Thread(target=self._work, args=(i,), name=f"s3loader-ckpt-upload-{i}") for i in range(count)]

    def open(self) -> None:
        """Begin the uploads of files of several parts, all at once: nothing of them is data yet."""
        at_once(*(file.own.begin for file in self._files.values() if file.parts > 1 and file.plan.kept is None))

    def begin(self, report: Report | None = None) -> None:
        """Start its threads, in a thread that gets no signals; `report` is told of each part that was sent, one at a time.

        The connections that they will need are opened meanwhile, while nothing is staged yet.
        """
        self._report = report
        self._tell()
        if len(self._threads) > 1:
            self._store.open_ahead(min(len(self._threads), self._pace.limit))
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
        self._allowed.open()

    def hurry(self) -> None:
        """Sending is wanted from now on: everything is staged, or the staging memory is used up. Before, it would only
        keep the caller's thread from its copying."""
        self._wanted.open()

    def await_staging(self, timeout: float) -> bool:
        """Whether sending is wanted, or all is in vain; waits up to `timeout` seconds for it."""
        return self._wanted.wait(timeout)

    def cancel(self, reason: BaseException) -> None:
        """End the upload; whatever was sent is left to garbage collection."""
        self.fail(reason)
        _quietly(self.wait)

    def fail(self, error: BaseException, *, passing: bool = False) -> None:
        """End the upload with `error` (the first one counts), which may be `passing`: then it may be resumed."""
        with self._lock:
            if self._error is None and not self._finished.is_open():
                self._error = error
                passing = passing or (isinstance(error, S3LoaderError) and error.retryable)
                self._may_leave = self._may_leave and passing
        self._finished.open()
        self._allowed.open()
        self._wanted.open()
        for _ in self._threads:
            self._queue.put(None)
        self._pool.wake()

    def wait(self) -> None:
        """Return when every file is complete; raise what went wrong, after open uploads were aborted or left."""
        self._finished.wait()
        for thread in self._threads:
            if thread.ident is not None:
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
            own = file.own
            if own.upload_id and self._may_leave:
                self.left_open.append((own.key, own.upload_id))
            elif own.upload_id:
                _quietly(own.abort)
        raise self._error

    def _work(self, number: int) -> None:
        self._wanted.wait()
        self._allowed.wait()
        self._accepted = self._accepted or time.monotonic()
        while (part := self._next(number)) is not None:
            held = False
            try:
                if not self.stopped:
                    held = self._send_patiently(part)
            except BaseException as error:  # noqa: BLE001 - a thread's error, whatever it is, is raised by `wait`
                self.fail(error)
            finally:
                if not held:
                    self._pool.release(part.buffer)
            with self._lock:
                self.sent += len(part.data)
                self._left -= 1
                all_sent = self._left == 0
            self._tell()
            if all_sent:
                self._finished.open()
                for _ in self._threads:
                    self._queue.put(None)

    def _tell(self) -> None:
        with self._telling:
            report = self._report
            if report is None:
                return
            try:
                report(self.sent, self.total, self.sent - self.resumed)
            except Exception as error:  # noqa: BLE001 - whoever looks on must not cost the checkpoint
                self._report = None
                _log.warning("progress= failed, and is not called again: %s: %s", type(error).__name__, error)

    def _next(self, number: int) -> StagedPart | None:
        """The next part for thread `number`, None at the end; it waits while fewer threads than that are to send."""
        while number >= self._pace.limit and not self._finished.wait(_GLANCE):
            pass
        return self._queue.get()

    def _send_patiently(self, part: StagedPart) -> bool:
        """As `_send`; where the store goes on saying "slow down", one thread at a time tries again, less and less often, until
        nothing at all has got through for two minutes."""
        try:
            held = self._send(part)
        except ThrottledError:
            self._pace.rejected()
            with self._retrying:
                held = self._try_again(part)
        self._pause = 0.0
        now = self._accepted = time.monotonic()
        with self._lock:
            since, self._last = self._last, now
        behind = not self._queue.empty()
        if since and behind:  # all parts are staged, so whoever saves waits for the network alone
            self._pace.waited(now - since)
        self._pace.completed(len(part.data), full=behind, most=len(self._threads))
        return held

    def _try_again(self, part: StagedPart) -> bool:
        while True:
            self._pause = min(_LONGEST_PAUSE, 2 * self._pause or _FIRST_PAUSE)
            if self._finished.wait(self._pause * random.uniform(0.5, 1.0)) and self._error is not None:
                return False
            try:
                return self._send(part)
            except ThrottledError:
                if time.monotonic() - self._accepted > _PATIENCE:
                    raise

    def _send(self, part: StagedPart) -> bool:
        """Send a part, and complete its file after the last one; returns whether its buffer is still needed."""
        file = self._files[part.file.id]
        if file.parts > 1 and file.plan.kept is None:
            stored = file.own.store(part.number, part.data)
            # our own client has sent it with this checksum; what others tell comes from the store
            part.checksum(file.own.parts[part.number].checksum if self._store.engine == "direct" else None)
            if stored == file.parts:
                self._complete(file)
            return False
        part.checksum()
        if file.plan.kept is not None:
            self._resume(file, file.plan.kept, part)
            return True
        mode: PutMode = "create" if self._create() else "overwrite"
        try:
            result = self._store.backend.put(file.own.key, part.data, mode=mode, content_type=_CONTENT)
        except ObjectExistsError as error:
            raise _taken(file, error) from error
        if result.size not in (file.plan.size, 0):
            raise CheckpointError(
                f"{file.own.key} has {result.size} bytes after its upload, not {file.plan.size}",
                hint="the store or a proxy changed it; save again",
            )
        return False

    def _complete(self, file: _File) -> None:
        """Complete an upload where there is nothing yet; without the condition, where the store does not know it here."""
        if self._parts_too and self._create():
            try:
                file.own.complete(file.plan.size, "create")
                return
            except ObjectExistsError as error:
                raise _taken(file, error) from error
            except StoreError as error:
                if not isinstance(error, UnsupportedOperationError) and error.status not in _UNKNOWN_CONDITION:
                    raise
                self._parts_too = False
        file.own.complete(file.plan.size)

    def _resume(self, file: _File, kept: Kept, part: StagedPart) -> None:
        """Send a part of an upload that was taken over, if it is missing there; the last one that comes by completes it."""
        try:
            if part.number not in kept.parts and file.lost is None:
                file.upload.store(part.number, part.data)
        except StoreError as error:
            if error.retryable:
                raise  # the part is not held yet: whoever has it gives its buffer back
            file.lost = error
        with file.lock:
            file.held.append(part)
            if len(file.held) < file.parts:
                return
        try:
            completed = self._completed(file, kept)
        except BaseException as error:  # noqa: BLE001 - raised by `wait`, which gives back what is held
            self.fail(error)
            return
        if completed:
            self._release(file)
        else:
            self._anew(file, kept)

    def _completed(self, file: _File, kept: Kept) -> bool:
        """Whether the upload could be completed with these very parts: a part overwritten meanwhile has another ETag."""
        if file.lost is not None:
            return False
        try:
            result = file.upload.complete(file.plan.size)
        except StoreError as error:
            if error.retryable:
                raise
            file.lost = error
            return False
        if _is_joined(result.etag, [file.upload.parts[number] for number in sorted(file.upload.parts)]):
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
        held, file.held = file.held, []
        file.upload = file.own
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


def _taken(file: _File, error: ObjectExistsError) -> CheckpointError:
    return CheckpointError(
        f"{file.own.key} is there already, and files of an attempt are never overwritten",
        url=error.url,
        hint="save again: every save has files of its own; if it stays so, a plan of an earlier save is used again",
    )


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
