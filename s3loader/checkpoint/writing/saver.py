"""One save: plan it, stage it in the caller's thread, commit it in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import Chunk, Intent, Part
from s3loader.checkpoint.handle import Progress, SaveHandle, SaveResult
from s3loader.checkpoint.locating import tell
from s3loader.checkpoint.options import CheckpointOptions, OnExists
from s3loader.checkpoint.protocol.commit import Attempt, expect_free, publish_or_wait, tell_failure
from s3loader.checkpoint.protocol.root import Root
from s3loader.checkpoint.state import tree
from s3loader.checkpoint.state.leaves import LeafAdapter
from s3loader.checkpoint.writing.copying import Copier
from s3loader.checkpoint.writing.incremental import Base, References, refer
from s3loader.checkpoint.writing.replicas import owned, replica
from s3loader.checkpoint.writing.staging import BufferPool, FilePlan, SavedPiece, plan_files, stage
from s3loader.checkpoint.writing.upload import Upload
from s3loader.errors import (
    CheckpointError,
    FencedError,
    IncompleteCheckpointError,
    S3LoaderError,
    StepExistsError,
    UnsupportedStateError,
)

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
    files = plan_files(pieces, attempt.rank, options.file_size, options.block, attempt.about, hashed=hashed)
    size = sum(p.end - p.begin for p in pieces) + sum(c.end - c.begin for c in (references.chunks if references else ()))
    return SavePlan(nodes, files, size, metrics, metadata, replicas, references)


class Saver:
    """A save under way.

    Args:
        attempt: Which.
        plan: What.
        pool: Staging buffers.
        options: See `CheckpointOptions`.
        on_exists: What to do where the step is committed already.
        after: The save before this one, which is committed first.
        committed: Called afterwards; deletes old steps and returns them.
        publishes: Whether the commit is this saver's work too; else it ends with the part manifest.
        began: When the caller was first kept, by the monotonic clock; None: now.
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
        committed: Callable[[], list[int]] | None,
        publishes: bool = True,
        began: float | None = None,
    ) -> None:
        self._attempt, self._plan, self._pool, self._options = attempt, plan, pool, options
        self._on_exists, self._after, self._committed, self._publishes = on_exists, after, committed, publishes
        self.part: Part | None = None
        self._began = time.monotonic() if began is None else began
        self._staged_s = 0.0
        self._abandoned = threading.Event()
        self._upload = upload = Upload(
            attempt.run.store, attempt.prefix, plan.files, pool, options.concurrency, leave_open=options.resume_uploads
        )
        self.handle = SaveHandle(attempt.step, attempt.id, lambda: Progress(upload.sent, upload.total, upload.resumed))
        self._thread = threading.Thread(target=self._work, name=f"s3loader-ckpt-{attempt.step}")
        self._thread.start()

    def stage(self) -> None:
        """Copy the state into staging buffers; returns when all of it was copied, or the save has failed."""
        try:
            with Copier() as copier:
                for file in self._plan.files:
                    if file.finished:
                        file.let_go()
                        continue
                    for part in stage(file, self._pool, lambda: self._upload.stopped, self._upload.hurry, copier=copier):
                        self._upload.put(part)
        except BaseException as error:
            self._upload.fail(error)
            self._thread.join()
            self.handle.observed = True  # it is raised here
            raise
        finally:
            self._upload.hurry()
            self._staged_s = time.monotonic() - self._began
            self.handle._staged.set()

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
        """Wait until it has ended."""
        self._thread.join()

    def _work(self) -> None:
        handle = self.handle
        try:
            handle._result = self._commit()
        except BaseException as error:  # noqa: BLE001 - raised by the handle, and by the manager's next call
            self._upload.fail(error)
            handle._error = self._ended(error)
            self._tell_others(handle._error)
            tell(handle._error, "save", self._attempt.run.store.url)
        finally:
            self._after = None
            handle._finished.set()

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

    def _commit(self) -> SaveResult:
        attempt, plan = self._attempt, self._plan
        self._upload.await_staging()
        if not self._publishes:
            return self._upload_part(None)
        try:
            expected = expect_free(attempt, replace=self._on_exists == "replace")
        except StepExistsError as error:
            if self._on_exists != "skip":
                raise
            self._upload.cancel(error)
            return SaveResult(attempt.step, "", plan.bytes, 0, self._staged_s, time.monotonic() - self._began, skipped=True)
        return self._upload_part(expected)

    def _upload_part(self, expected: Root | None) -> SaveResult:
        attempt, run, plan = self._attempt, self._attempt.run, self._plan
        references = plan.references
        intent = Intent(
            format=records.FORMAT,
            step=attempt.step,
            attempt=attempt.id,
            rank=attempt.rank,
            world=attempt.world,
            time=time.time(),
            base=references.base if references is not None else None,
        )
        run.put(layout.intent_key(attempt.step, attempt.id, attempt.rank), records.encode(intent))
        self._upload.allow()
        self._upload.wait()
        part = self.part = self._part(expected)
        run.put(attempt.prefix + layout.part_id(attempt.rank), records.encode(part))
        if self._after is not None:
            self._after.join()
        if expected is not None:
            publish_or_wait(attempt, part, expected, self._abandoned.is_set)
        if references is not None:
            self._quietly(lambda: run.store.delete(layout.pin_key(attempt.id, attempt.rank)))
        seconds = time.monotonic() - self._began
        retired, problem = self._clean_up()
        upload = self._upload
        return SaveResult(
            attempt.step,
            attempt.id,
            plan.bytes,
            upload.total,
            self._staged_s,
            seconds,
            retired=tuple(retired),
            cleanup_error=problem,
            resumed=upload.resumed,
        )

    def _clean_up(self) -> tuple[list[int], Exception | None]:
        try:
            return self._committed() if self._committed is not None else [], None
        except Exception as error:  # noqa: BLE001 - the step is committed; what retention met is part of the result
            _log.warning("step %d is saved, but old steps could not be deleted: %s", self._attempt.step, error)
            return [], error

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
                *(piece.chunk(file.name, self._options.block) for file in plan.files for piece in file.pieces),
                *(plan.references.chunks if plan.references else ()),
            ],
            tree=plan.tree,
            replicas=plan.replicas,
            metrics=plan.metrics,
            metadata=plan.metadata,
            expects=f"{expected.generation}:{expected.etag}" if expected is not None else "",
        )
