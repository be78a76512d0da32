"""One save: plan it, stage it in the caller's thread, commit it in the background."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from s3loader.checkpoint.error_context import add_context
from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import Chunk, Intent, Part
from s3loader.checkpoint.handle import Cleanup, Progress, SaveHandle, SaveResult
from s3loader.checkpoint.options import CheckpointOptions, OnExists
from s3loader.checkpoint.protocol.commit import (
    Attempt,
    expect_free,
    publish_alone,
    publish_or_wait,
    put_part,
    tell_failure,
)
from s3loader.checkpoint.protocol.roots import Root
from s3loader.checkpoint.state import tree
from s3loader.checkpoint.state.leaves import LeafAdapter
from s3loader.checkpoint.threads import Worker, at_once
from s3loader.checkpoint.writing.copying import Copier
from s3loader.checkpoint.writing.incremental import Base, References, owned, refer, replica
from s3loader.checkpoint.writing.staging import BufferPool, FilePlan, SavedPiece, part_size_of, plan_files, stage
from s3loader.checkpoint.writing.upload import Upload
from s3loader.errors import (
    CheckpointError,
    FencedError,
    IncompleteCheckpointError,
    S3LoaderError,
    StepExistsError,
    UnsupportedStateError,
)
from s3loader.progress import ShowProgress, showing
from s3loader.store.s3.in_flight import InFlight

_log = logging.getLogger("s3loader.checkpoint")

__all__ = ["SavePlan", "Saver", "plan_save"]


@dataclass(slots=True)
class SavePlan:
    """What this rank saves."""

    tree: Any
    files: list[FilePlan]
    bytes: int
    metrics: dict[str, Any]
    metadata: dict[str, Any]
    replicas: list[Chunk]
    """Tensors that other ranks write."""
    references: References | None
    """Tensors that an earlier step holds."""


def plan_save(
    attempt: Attempt,
    items: Mapping[str, Any],
    metrics: dict[str, Any],
    metadata: dict[str, Any],
    options: CheckpointOptions,
    base: Base | None = None,
) -> SavePlan:
    """Take the state apart: names, types, shapes, and where each byte will be. Copies nothing.

    Raises:
        UnsupportedStateError: something in it cannot be saved.
    """
    if not isinstance(items, Mapping) or not all(isinstance(key, str) and key for key in items):
        raise UnsupportedStateError(
            "items must be a dict with names as keys", path="", hint="save(step, {'model': model, ...})"
        )
    own: list[SavedPiece] = []
    shared: list[SavedPiece] = []

    def add(name: str, adapter: LeafAdapter, value: Any, per_rank: bool) -> None:
        source = adapter.source(value)
        pieces = [SavedPiece(name, source.dtype, source.shape, piece) for piece in source.pieces]
        (own if per_rank or source.sharded or attempt.world == 1 else shared).extend(pieces)

    nodes = tree.encode(dict(items), add, attempt.rank)
    mine, others = owned(shared, attempt.rank, attempt.world)
    replicas = [replica(piece) for piece in others] if options.check_replicas else []
    pieces = own + mine
    references = None
    if base is not None:
        references, pieces = refer(attempt, base, pieces)
    hashed = options.incremental or (options.check_replicas and attempt.world > 1)
    part_of = part_size_of(options, attempt.run.store)
    files = plan_files(pieces, attempt.rank, options.file_size, options.block, attempt.about, hashed=hashed, part_of=part_of)
    size = sum(p.end - p.begin for p in pieces) + sum(c.end - c.begin for c in (references.chunks if references else ()))
    return SavePlan(nodes, files, size, metrics, metadata, replicas, references)


class Saver:
    """A save under way.

    Args:
        attempt: Which.
        plan: What.
        pool: Staging buffers.
        options: Sizes, budgets and deadlines.
        on_exists: What to do where the step is committed already.
        after: The save before this one, which is committed first.
        committed: Called once it is committed.
        afterwards: Called when its handle has told of the commit; deletes old steps and returns them.
        ended: Called when it has ended, well or not.
        publishes: Whether the commit is this saver's work too; else it ends with the part manifest.
        began: When the caller was first kept, by the monotonic clock; None: now.
        pace: Of the uploads of the manager's saves.
        shown: Who is told how far the upload is.
    """

    def __init__(
        self,
        attempt: Attempt,
        plan: SavePlan,
        pool: BufferPool,
        options: CheckpointOptions,
        *,
        on_exists: OnExists,
        after: Saver | None,
        committed: Callable[[], None] | None = None,
        afterwards: Callable[[], list[int]] | None = None,
        ended: Callable[[], None] = lambda: None,
        publishes: bool = True,
        began: float | None = None,
        pace: InFlight | None = None,
        shown: ShowProgress = None,
    ) -> None:
        self._shown: ShowProgress = shown
        self._attempt, self._plan, self._pool, self._options = attempt, plan, pool, options
        self._on_exists, self._after, self._committed, self._publishes = on_exists, after, committed, publishes
        self._afterwards, self._tell_end = afterwards, ended
        self._cleanup = Cleanup()
        self._owner = threading.current_thread()
        self._begun = False
        self.part: Part | None = None
        self._began = time.monotonic() if began is None else began
        self._staged_s = 0.0
        self._abandoned = threading.Event()
        self._upload = upload = Upload(
            attempt.run.store,
            attempt.prefix,
            plan.files,
            pool,
            options.concurrency,
            pace=pace,
            create=lambda: attempt.run.conditional,
            leave_open=options.resume_uploads,
        )
        self.handle = SaveHandle(attempt.step, attempt.id, lambda: Progress(upload.sent, upload.total, upload.resumed))
        self._worker = Worker(self._work, f"s3loader-ckpt-{attempt.step}")

    def stage(self) -> None:
        """Begin the work in the background, and copy the state into staging buffers; returns when all of it was copied, or the
        save has failed.

        Raises:
            BaseException: what staging failed with, Ctrl-C included; nothing of the save goes on then.
        """
        upload = self._upload
        try:
            self._begun = True
            self._worker.start()
            with Copier() as copier:
                for file in self._plan.files:
                    if file.finished:
                        file.let_go()
                        continue
                    staged = stage(file, self._pool, lambda: upload.stopped, upload.hurry, copier=copier)
                    with contextlib.closing(staged) as parts:
                        for part in parts:
                            upload.put(part)
            self._staged_s = time.monotonic() - self._began
            self.handle._staged.open()
            upload.hurry()
        except BaseException as error:
            self.fail(error)
            raise

    @property
    def waits_for_this_thread(self) -> bool:
        """Whether it was made by the calling thread, which has not called `stage` yet."""
        return not self._begun and self._owner is threading.current_thread()

    def fail(self, error: BaseException) -> None:
        """End it with `error`, which the caller raises; returns when nothing of it goes on."""
        self._upload.fail(error)
        self.handle._staged.open()
        if self._worker.call_off():
            self._end(error)
        self.handle._finished.wait()
        self.handle.observed = True

    def abandon(self) -> None:
        """Give the save up: nothing more is uploaded or published."""
        self._abandoned.set()
        self._upload.fail(
            CheckpointError(
                f"step {self._attempt.step} was abandoned before it was committed",
                hint="finish(seconds) was not long enough for it; the step before is untouched",
            ),
            passing=True,
        )

    @property
    def left_open(self) -> list[tuple[str, str]]:
        """Key and id of uploads that it has left open."""
        return self._upload.left_open

    def join(self) -> None:
        """Wait until it has ended, and what follows a commit with it."""
        self._worker.join()

    @property
    def over(self) -> bool:
        """Whether it has ended, with all that follows, and nobody needs to hear of it any more."""
        return self.handle.over and (self.handle.error is not None or self._cleanup.is_over)

    def _work(self) -> None:
        failed: BaseException | None = None
        try:
            with showing(self._shown, f"save {self._attempt.step}", "bytes", first=self._attempt.rank == 0) as report:
                self.handle._result = self._commit(partial(self._upload.begin, report))
        except BaseException as error:  # noqa: BLE001 - raised by the handle, and by the manager's next call
            self._upload.fail(error)
            failed = self._ended(error)
            self._tell_others(failed)
            add_context(failed, "save", self._attempt.run.store.url)
        finally:
            self._end(failed)
        try:
            if failed is None:
                self._clean_up()
        finally:
            self._after = None
            self._cleanup.end()

    def _end(self, error: BaseException | None) -> None:
        self.handle._error = error
        self._tell_end()
        self.handle._finished.open()

    def _await_staging(self) -> None:
        """Return when sending is wanted, or all is in vain. A thread that ends without a word was interrupted twice."""
        while not self._upload.await_staging(1.0):
            if not self._owner.is_alive():
                self._upload.fail(
                    CheckpointError(
                        f"step {self._attempt.step}: the thread that called save() ended before its state was copied",
                        hint="save again; the step before is untouched",
                    )
                )

    def _ended(self, error: BaseException) -> BaseException:
        """Wait for the upload threads to end, so that nothing of a failed save goes on."""
        try:
            self._upload.wait()
        except BaseException as first:  # noqa: BLE001 - the upload's own error came first
            return first
        return error

    def _tell_others(self, error: BaseException) -> None:
        """Let the other ranks know at once, instead of at their deadline."""
        attempt = self._attempt
        if attempt.world == 1 or isinstance(error, IncompleteCheckpointError | FencedError | StepExistsError):
            return
        self._quietly(lambda: tell_failure(attempt, f"{type(error).__name__}: {error}"))

    @staticmethod
    def _quietly(action: Callable[[], None]) -> None:
        try:
            action()
        except S3LoaderError as error:
            _log.info("cleaning up after a save: %s", error)

    def _commit(self, start_threads: Callable[[], None]) -> SaveResult:
        """All of it. The requests that carry no data go out beside staging: they are few, and cost no time then."""
        attempt, plan = self._attempt, self._plan
        if not self._publishes:
            if not attempt.run.conditional and attempt.id in attempt.run.roots.read(attempt.step).history:
                raise CheckpointError(
                    f"step {attempt.step} is committed already, by this very attempt",
                    hint="a plan of an earlier save was used again; make a new writer for every save",
                )
            at_once(self._begin_attempt, start_threads)
            self._await_staging()
            return self._upload_part(None)
        try:
            expected, _ = at_once(
                partial(expect_free, attempt, replace=self._on_exists == "replace"),
                lambda: at_once(self._begin_attempt, attempt.run.prepare, self._upload.open, start_threads),
            )
        except StepExistsError as error:
            self._quietly(lambda: attempt.run.store.delete(self._intent_key))
            if self._on_exists != "skip":
                raise
            self._upload.cancel(error)
            return SaveResult(attempt.step, "", plan.bytes, 0, self._staged_s, time.monotonic() - self._began, skipped=True)
        self._await_staging()
        return self._upload_part(expected)

    @property
    def _intent_key(self) -> str:
        return layout.intent_key(self._attempt.step, self._attempt.id, self._attempt.rank)

    def _begin_attempt(self) -> None:
        """Write the intent: data follow, and garbage collection must know whose they are."""
        attempt, references = self._attempt, self._plan.references
        intent = Intent(
            format=records.FORMAT,
            step=attempt.step,
            attempt=attempt.id,
            rank=attempt.rank,
            world=attempt.world,
            time=time.time(),
            base=references.base if references is not None else None,
        )
        attempt.run.put(self._intent_key, records.encode(intent))

    def _upload_part(self, expected: Root | None) -> SaveResult:
        attempt = self._attempt
        self._upload.allow()
        self._upload.wait()
        part = self.part = self._part(expected)
        alone = expected is not None and attempt.world == 1
        if not alone:
            put_part(attempt, part)
        if self._after is not None:
            self._after.handle.wait()
        if expected is not None:
            (publish_alone if alone else publish_or_wait)(attempt, part, expected, self._abandoned.is_set)
        if self._committed is not None:
            self._committed()
        return SaveResult(
            attempt.step,
            attempt.id,
            self._plan.bytes,
            self._upload.total,
            self._staged_s,
            time.monotonic() - self._began,
            resumed=self._upload.resumed,
            _cleanup=self._cleanup,
        )

    def _clean_up(self) -> None:
        """After the commit, when its handle has told of it: what nobody needs any more goes, save by save."""
        attempt, after = self._attempt, self._after
        if after is not None:
            after.join()
        try:
            if self._plan.references is not None:
                self._quietly(lambda: attempt.run.store.delete(layout.pin_key(attempt.id, attempt.rank)))
            if self._afterwards is not None and self.part is not None:  # it was not skipped
                self._cleanup.retired = tuple(self._afterwards())
        except Exception as error:  # noqa: BLE001 - the step is committed; what retention met is part of the result
            _log.warning("step %d is saved, but old steps could not be deleted: %s", attempt.step, error)
            self._cleanup.error = error

    def _part(self, expected: Root | None) -> Part:
        attempt, plan = self._attempt, self._plan
        return Part(
            format=records.FORMAT,
            step=attempt.step,
            epoch=attempt.session.epoch,
            attempt=attempt.id,
            rank=attempt.rank,
            world=attempt.world,
            time=time.time(),
            block=self._options.block,
            files=[*(file.record() for file in plan.files), *(plan.references.files if plan.references else ())],
            chunks=[
                *(piece.chunk(file) for file in plan.files for piece in file.pieces),
                *(plan.references.chunks if plan.references else ()),
            ],
            tree=plan.tree,
            replicas=plan.replicas,
            metrics=plan.metrics,
            metadata=plan.metadata,
            expects=f"{expected.generation}:{expected.etag}" if expected is not None else "",
        )
