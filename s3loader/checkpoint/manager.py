"""`CheckpointManager`: the checkpoints of one training run."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from s3loader.checkpoint.checkpoint import Checkpoint
from s3loader.checkpoint.handle import SaveHandle
from s3loader.checkpoint.locating import locating, telling
from s3loader.checkpoint.options import CheckpointOptions, OnCorruption, OnExists
from s3loader.checkpoint.protocol import gc, retention
from s3loader.checkpoint.protocol.commit import Attempt
from s3loader.checkpoint.protocol.finding import expect_none, newest_committed
from s3loader.checkpoint.protocol.policy import KeepPolicy
from s3loader.checkpoint.protocol.root import Root
from s3loader.checkpoint.protocol.run import Run
from s3loader.checkpoint.protocol.session import Identity, Session, identify, open_session
from s3loader.checkpoint.reading.share import NodeShare
from s3loader.checkpoint.writing.incremental import Base, find_base
from s3loader.checkpoint.writing.resuming import take_over
from s3loader.checkpoint.writing.saver import Saver, plan_save
from s3loader.checkpoint.writing.staging import BufferPool
from s3loader.errors import CheckpointError, CheckpointNotFoundError, ClosedError, FormatError, IntegrityError
from s3loader.store import ObjectStore, open_store

__all__ = ["CheckpointManager"]


class CheckpointManager:
    """Saves and restores the checkpoints of one run, each of them whole or not there.

    Args:
        url: Folder of the run (``s3://bucket/run``, a path, ...), or an `ObjectStore` opened on it.
        keep: Which steps to keep: `LatestN`, `EveryNSteps`, `BestN`, or several joined by ``|``; None keeps all.
        rank: This process's rank, where several ranks save parts of one checkpoint.
        world_size: How many ranks.
        job: Name of this incarnation of the job, the same on all its ranks; default: what torchrun or Slurm say.
        options: See `CheckpointOptions`.
        store_options: Passed on to `open_store`: ``endpoint_url``, ``region``, ...

    Making one asks nothing of the store. It may be used as a context manager; leaving it waits for what is under way.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | ObjectStore,
        *,
        keep: KeepPolicy | None = None,
        rank: int = 0,
        world_size: int = 1,
        job: str = "",
        options: CheckpointOptions | None = None,
        **store_options: Any,
    ) -> None:
        self.options = options or CheckpointOptions()
        self._own_store = not isinstance(url, ObjectStore)
        self.store = url if isinstance(url, ObjectStore) else open_store(str(url), **store_options)
        self.keep = keep
        self.run = Run(self.store, settle=self.options.settle)
        self._rank, self._world, self._job = rank, world_size, job
        with locating("save or restore", self._where):
            Identity(rank, world_size, job)
        self.pool = BufferPool(self.options.staging_budget, self.options.part_size)
        self._session: Session | None = None
        self._savers: list[Saver] = []
        self._base: Base | None = None
        self._newest: int | None = None
        """The newest step that this session has committed."""
        self._unfinished: set[int] = set()
        """Steps that were begun and not committed, as far as is known without asking."""
        self._left_open: set[tuple[str, str]] = set()
        self._lock = threading.RLock()
        self._closed = False

    @property
    def _where(self) -> str:
        return self.store.url

    # saving

    @telling("save")
    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_exists: OnExists = "error",
    ) -> SaveHandle:
        """Save `items` as `step`. Returns as soon as they were copied; the upload goes on in the background.

        Args:
            step: A non-negative integer.
            items: What to save by name: arrays, tensors, numbers, strings, bytes, lists and dicts of these, and objects
                that have ``state_dict()``: models, optimizers, schedulers, loaders. Nothing is pickled.
            metrics: Numbers that a `BestN` policy may ask for.
            metadata: JSON to keep with the checkpoint.
            on_exists: Where the step is committed already: ``"error"``; ``"replace"`` it in one atomic write;
                ``"skip"`` this save.

        Raises:
            UnsupportedStateError: something in `items` cannot be saved; the message names its path.
            FencedError: a newer job has taken over the run.
            S3LoaderError: what an earlier save failed with, where nobody asked its handle for the result.
        """
        self._ready()
        if on_exists not in ("error", "replace", "skip"):
            raise CheckpointError(
                f"on_exists is 'error', 'replace' or 'skip', not {on_exists!r}",
                hint="save(..., on_exists='replace') puts a new one in its place, 'skip' leaves it",
            )
        with self._lock:
            running = [saver for saver in self._savers if not saver.handle.done]
            if running and self.options.overlap == "refuse":
                raise CheckpointError(f"step {running[0].handle.step} is still being saved", hint="wait(), or overlap='queue'")
            facts = _checked_metrics(metrics), _checked_metadata(metadata)
            session = self.session()
            attempt = Attempt(self.run, session, step, session.next_attempt(), self.options.deadline)
            if self.options.incremental:
                self._base = find_base(self.run, self.options.block, self._base)
            began = time.monotonic()
            plan = plan_save(attempt, items, facts[0], facts[1], self.options, self._base)
            before, self._savers = self._savers, [saver for saver in self._savers if not saver.handle.over]
            self._note_unfinished(before)
            if self.options.resume_uploads and step in self._unfinished:
                self._unfinished.discard(step)
                take_over(attempt, plan.files, self.pool, self.options.concurrency)
            saver = Saver(
                attempt,
                plan,
                self.pool,
                self.options,
                on_exists=on_exists,
                after=running[-1] if running else None,
                committed=lambda: self._committed(step),
                began=began,
            )
            self._savers.append(saver)
        saver.stage()
        return saver.handle

    def wait(self) -> None:
        """Wait for every save under way.

        Raises:
            S3LoaderError: what one of them failed with, where nobody has seen it yet.
        """
        for saver in list(self._savers):
            saver.join()
        self._raise_failures()

    def finish(self, seconds: float) -> list[int]:
        """Give the saves under way so many seconds, then abandon those that are not committed; returns their steps.

        Raises nothing for them: their handles do.
        """
        end = time.monotonic() + seconds
        late: list[int] = []
        for saver in list(self._savers):
            if not saver.handle.wait(max(0.0, end - time.monotonic())):
                saver.abandon()
                late.append(saver.handle.step)
        return late

    @telling("begin the session of")
    def session(self) -> Session:
        """This job's incarnation; begun at the first call (by `save`, or by `restore` where there are several ranks)."""
        with self._lock:
            if self._session is None or self._session.pid != os.getpid():
                job = self._job or identify(os.environ)
                identity = Identity(self._rank, self._world, job)
                self._session = open_session(self.run, identity, self.run.survey, self.options.deadline)
                self._unfinished.update(self._session.record.unfinished)
            return self._session

    def _note_unfinished(self, savers: Sequence[Saver]) -> None:
        """Remember at which steps something may be left to go on with."""
        for saver in savers:
            if saver.handle.done and saver.handle.error is not None:
                self._unfinished.add(saver.handle.step)
                self._left_open.update(saver.left_open)

    def _committed(self, step: int) -> list[int]:
        self._newest = step if self._newest is None else max(step, self._newest)
        while self._left_open:  # nobody is going to go on with them
            key, upload_id = self._left_open.pop()
            self.store.backend.abort_multipart(key, upload_id)
        return self.retire()

    @telling("retire steps of")
    def retire(self) -> list[int]:
        """Delete the steps that `keep` does not keep; done after every save, by rank 0. Returns them."""
        if self.keep is None or self._rank:
            return []
        doomed = retention.to_retire(self.run.scan().committed(), self.keep)
        return retention.retire_all(self.run, doomed, self._epoch()) if doomed else []

    # finding

    @telling("list")
    def latest(self) -> int | None:
        """The newest committed step, found by listing; None where there is none.

        Raises:
            CheckpointError: there are steps, and all of them are damaged.
        """
        root = newest_committed(self.run)
        return root.step if root is not None else None

    def next_step(self) -> int:
        """The step after the newest; 0 where there is none.

        Raises: as `latest`.
        """
        latest = self.latest()
        return 0 if latest is None else latest + 1

    @telling("list")
    def steps(self) -> list[int]:
        """All committed steps, ascending."""
        return [root.step for root in self.run.scan().committed()]

    @telling("list")
    def roots(self) -> list[Root]:
        """Roots of all committed steps, ascending: facts, metrics, files."""
        return self.run.scan().committed()

    @telling("open")
    def open(self, step: int | None = None) -> Checkpoint:
        """A committed step (the newest where `step` is None), to be read lazily.

        Raises:
            CheckpointNotFoundError: there is none.
            CheckpointError: it is damaged or incomplete.
        """
        return Checkpoint(self.run, self.find(step), self._share())

    def _share(self) -> NodeShare | None:
        options = self.options
        return NodeShare(options.node_cache, options.node_cache_size, self._rank) if options.node_cache else None

    @telling("open")
    def find(self, step: int | None = None) -> Root:
        """Root of `step`, or of the newest.

        Raises:
            CheckpointNotFoundError: there is none.
        """
        if step is not None:
            root = self.run.read_root(step)
            if root.state in ("absent", "tombstone"):
                why = "was deleted" if root.state == "tombstone" or root.generation else "is not committed"
                raise CheckpointNotFoundError(
                    f"step {step} {why}", url=self.store.url, hint="`s3loader ckpt ls` lists what there is"
                )
            return root
        for root in self.run.newest_first():
            return root
        raise self._no_checkpoint()

    def _no_checkpoint(self) -> CheckpointNotFoundError:
        expect_none(self.run)
        return CheckpointNotFoundError(
            "there is no checkpoint", url=self.store.url, hint="save one first, or check the path: it is the folder of the run"
        )

    @telling("restore")
    def restore(
        self,
        step: int | None = None,
        target: Mapping[str, Any] | None = None,
        *,
        items: Sequence[str] | None = None,
        on_corruption: OnCorruption = "raise",
        verify: bool = True,
    ) -> dict[str, Any]:
        """Read a step back.

        Args:
            step: Default: the newest. Where there are several ranks: the newest this job has saved, and before that the
                one that all ranks agreed on at its start.
            target: Items to restore into, by name: arrays are filled in place, objects with state get it loaded.
                Only the items it names are read. What is not in it is made anew, as the kind it was saved from.
            items: Read only these items.
            on_corruption: A damaged step: ``"raise"``, or go back to the ``"previous"`` good one (only where `step` is None).
            verify: Compare checksums of everything read.

        Returns:
            The items by name.

        Raises:
            CheckpointNotFoundError: there is no such step.
            IntegrityError: bytes are not what was saved; the target may be half written.
        """
        if self._closed:
            raise ClosedError(
                "the checkpoint manager was closed", url=self.store.url, hint="make another CheckpointManager for the same URL"
            )
        if on_corruption not in ("raise", "previous"):
            raise CheckpointError(f"on_corruption is 'raise' or 'previous', not {on_corruption!r}")
        if step is None and self._world > 1:
            step = self._newest if self._newest is not None else self.session().resume_step
            if step is None:
                raise CheckpointNotFoundError(
                    "there was no checkpoint when this job began",
                    url=self.store.url,
                    hint="save one first, or check the path: it is the folder of the run",
                )
        if step is not None:
            return self.open(step).restore(target, items=items, verify=verify, rank=self._rank)
        damage: Exception | None = None
        for root in self.run.newest_first():
            try:
                return Checkpoint(self.run, root, self._share()).restore(target, items=items, verify=verify, rank=self._rank)
            except (IntegrityError, FormatError, CheckpointError) as error:
                if on_corruption != "previous" and not isinstance(error, CheckpointNotFoundError):
                    raise
                damage = error
        if damage is not None:
            raise CheckpointError(
                f"no step could be restored; the last one tried: {damage}",
                url=self.store.url,
                hint="`s3loader ckpt verify --all` tells what is wrong with each",
            ) from damage
        raise self._no_checkpoint()

    # deleting

    @telling("delete")
    def delete(self, step: int) -> None:
        """Delete a committed step: un-publish it, then delete its files (but those other steps refer to).

        Raises:
            CheckpointNotFoundError: it is not committed.
        """
        self._ready()
        root = self.run.read_root(step)
        if root.state not in ("committed", "damaged"):
            raise CheckpointNotFoundError(
                f"step {step} is not committed", url=self.store.url, hint="`s3loader ckpt ls` lists what there is"
            )
        if not retention.retire_all(self.run, [root], self._epoch()):
            raise CheckpointError(
                f"step {step} was changed by another process", url=self.store.url, hint="look at it again, then delete it again"
            )

    @telling("collect garbage of")
    def gc(self, *, dry_run: bool = False, grace: float | None = None) -> gc.GCReport:
        """Delete what no committed step needs: abandoned attempts, leftovers of deleted steps, open uploads.

        Args:
            dry_run: Only report.
            grace: Seconds that an attempt must have been left alone; default: `CheckpointOptions.grace`.
        """
        self._ready()
        grace = self.options.grace if grace is None else grace
        return gc.collect(self.run, epoch=self._epoch(), grace=grace, dry_run=dry_run)

    def _epoch(self) -> int:
        return self._session.epoch if self._session is not None else self.run.newest_epoch()

    # the end

    def close(self) -> None:
        """Wait for what is under way and let go of everything; closing twice is fine.

        Raises:
            S3LoaderError: what a save failed with, where nobody has seen it yet.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            self.pool.clear()
            if self._own_store:
                self.store.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as second:  # noqa: BLE001 - the user's own exception is the one to raise
            error.add_note(f"and a checkpoint failed: {second}")

    def __repr__(self) -> str:
        return f"CheckpointManager({self.store.url!r})"

    def _ready(self) -> None:
        if self._closed:
            raise ClosedError(
                "the checkpoint manager was closed", url=self.store.url, hint="make another CheckpointManager for the same URL"
            )
        self._raise_failures()

    def _raise_failures(self) -> None:
        for saver in list(self._savers):
            error = saver.handle.failed()
            if error is not None:
                raise error


def _checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float | None]:
    """Metrics as JSON: what is not finite is None, since JSON has no NaN."""
    try:
        values = {str(name): float(value) for name, value in (metrics or {}).items()}
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise CheckpointError(f"metrics must be numbers by name: {error}") from error
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _checked_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        text = json.dumps(dict(metadata or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"metadata must be JSON: {error}",
            hint="convert it to numbers, strings, lists and dicts first; arrays belong into items",
        ) from error
    result: dict[str, Any] = json.loads(text)
    return result
