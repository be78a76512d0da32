"""`CheckpointManager`: the checkpoints of one training run."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Unpack

from s3loader.arguments import checked
from s3loader.checkpoint.checkpoint import Checkpoint
from s3loader.checkpoint.error_context import error_context, with_error_context
from s3loader.checkpoint.handle import SaveHandle
from s3loader.checkpoint.options import CheckpointOptions, OnCorruption, OnExists
from s3loader.checkpoint.protocol import gc, retention
from s3loader.checkpoint.protocol.commit import Attempt
from s3loader.checkpoint.protocol.latest import expect_none, newest_committed
from s3loader.checkpoint.protocol.retention import KeepPolicy, LatestN
from s3loader.checkpoint.protocol.roots import Root
from s3loader.checkpoint.protocol.run import Run
from s3loader.checkpoint.protocol.session import (
    Identity,
    Session,
    agree,
    forget,
    identify,
    incarnation_of,
    open_session,
    under_way,
)
from s3loader.checkpoint.reading.share import NodeShare
from s3loader.checkpoint.writing.incremental import Base, find_base
from s3loader.checkpoint.writing.resuming import take_over
from s3loader.checkpoint.writing.saver import Saver, plan_save
from s3loader.checkpoint.writing.staging import BufferPool
from s3loader.checkpoint.writing.upload import upload_pace
from s3loader.errors import CheckpointError, CheckpointNotFoundError, ClosedError, FormatError, IntegrityError
from s3loader.progress import ShowProgress, check_progress
from s3loader.store import ObjectStore, StoreOptions, open_store
from s3loader.store.open import PlaceKeywords
from s3loader.types import Location

__all__ = ["CheckpointManager"]

_log = logging.getLogger("s3loader.checkpoint")


@checked
class CheckpointManager:
    """Saves and restores the checkpoints of one run, each of them whole or not there.

    Args:
        url: Folder of the run (``s3://bucket/run``, a path, ...), or an `ObjectStore` opened on it.
        keep: Which steps to keep: `LatestN`, `EveryNSteps`, `BestN`, or several joined by ``|``; a number means
            `LatestN`; None keeps all.
        rank: This process's rank, where several ranks save parts of one checkpoint. Default: found when it is first needed,
            as `S3DataLoader` finds it: of `torch.distributed`, `jax.distributed`, ``RANK`` and ``WORLD_SIZE``, a Slurm
            job step. Where only one of several processes saves, give it ``rank=0, world_size=1``.
        world_size: How many ranks; found like `rank`, and given with it or not at all.
        job: Name of this incarnation of the job, the same on all its ranks and new at every start. Default: rank 0 makes one up
            and tells the others through the store of `torch.distributed` or `jax.distributed`; else what torchrun or Slurm say.
        options: Sizes, budgets, deadlines and what else is rarely changed; default: `CheckpointOptions()`.
        store_options: Retries, timeouts, ... of the store: what `open_store` takes as `options`.
        store_keywords: Passed on to `open_store`: ``endpoint_url``, ``region``, ...

    Making one asks nothing of the store. It may be used as a context manager; leaving it waits for what is under way.
    """

    def __init__(
        self,
        url: Location | ObjectStore,
        *,
        keep: KeepPolicy | int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        job: str = "",
        options: CheckpointOptions | None = None,
        store_options: StoreOptions | None = None,
        **store_keywords: Unpack[PlaceKeywords],
    ) -> None:
        self.options = options or CheckpointOptions()
        self._own_store = not isinstance(url, ObjectStore)
        self.store = url if isinstance(url, ObjectStore) else open_store(url, options=store_options, **store_keywords)
        self.keep = LatestN(keep) if isinstance(keep, int) else keep
        self.run = Run(self.store, settle=self.options.settle)
        self._given = rank, world_size, job
        if self._given[:2] != (None, None):
            with error_context("save or restore", self._where):
                identify(*self._given)
        self.pool = BufferPool(self.options.staging_budget)
        self.pace = upload_pace(self.store, self.options.concurrency)
        self._session: Session | None = None
        self._who: Identity | None = None
        self._savers: list[Saver] = []
        self._base: Base | None = None
        self._unfinished: set[int] = set()
        """Steps that were begun and not committed, as far as is known without asking."""
        self._left_open: set[tuple[str, str]] = set()
        self._lock = threading.RLock()
        self._closed = False

    @property
    def _where(self) -> str:
        return self.store.url

    @property
    def _identity(self) -> Identity:
        """Who this process is; from the session's begin on it stays so, also where the process group is destroyed first."""
        if self._session is not None and self._session.pid == os.getpid() and self._who is not None:
            return self._who
        return identify(*self._given)

    # saving

    @with_error_context("save")
    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_exists: OnExists = "error",
        progress: ShowProgress = None,
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
            progress: True shows on stderr how far the upload is: a bar on a terminal, else a line a minute; of rank 0. A
                function is called, by the threads that upload, with bytes sent, of how many, and those that this save has sent
                itself.

        Raises:
            UnsupportedStateError: something in `items` cannot be saved; the message names its path.
            FencedError: a newer job has taken over the run.
            S3LoaderError: what an earlier save failed with, where nobody asked its handle for the result.
        """
        self._ready()
        check_progress(progress)
        if on_exists not in ("error", "replace", "skip"):
            raise CheckpointError(
                f"on_exists is 'error', 'replace' or 'skip', not {on_exists!r}",
                hint="save(..., on_exists='replace') puts a new one in its place, 'skip' leaves it",
            )
        saver: Saver | None = None
        try:
            with self._lock:
                saver = self._planned(step, items, metrics, metadata, on_exists, progress)
            saver.stage()
        except BaseException as error:
            self._failed(saver, error)
            raise
        return saver.handle

    def _planned(
        self,
        step: int,
        items: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
        metadata: Mapping[str, Any] | None,
        on_exists: OnExists,
        shown: ShowProgress,
    ) -> Saver:
        began = time.monotonic()
        session = self.session()
        number = session.next_attempt()  # before anything can fail on one rank: all count alike
        attempt = Attempt(self.run, session, step, number, self.options.deadline)
        running = [saver for saver in self._savers if not saver.handle.done]
        before = [saver for saver in self._savers if not saver.over]
        if running and self.options.overlap == "refuse":
            raise CheckpointError(f"step {running[0].handle.step} is still being saved", hint="wait(), or overlap='queue'")
        facts = _checked_metrics(metrics), _checked_metadata(metadata)
        if self.options.incremental:
            self._base = find_base(self.run, self.options.block, self._base)
        plan = plan_save(attempt, items, facts[0], facts[1], self.options, self._base)
        self._note_unfinished(self._savers)
        self._savers = [saver for saver in self._savers if not saver.over]
        if self.options.resume_uploads and step in self._unfinished:
            self._unfinished.discard(step)
            take_over(attempt, plan.files, self.pool, self.options.concurrency)
        busy = under_way(self.store.url)
        saver = Saver(
            attempt,
            plan,
            self.pool,
            self.options,
            on_exists=on_exists,
            after=before[-1] if before else None,
            committed=lambda: self._committed(session, step),
            afterwards=lambda: self._clean_up(step),
            ended=lambda: forget(busy, attempt.id),
            began=began,
            pace=self.pace,
            shown=shown,
        )
        self._savers.append(saver)
        busy[attempt.id] = step
        return saver

    def _failed(self, saver: Saver | None, error: BaseException) -> None:
        """After `save` has failed: nothing of it goes on. Ctrl-C may have struck before the saver was given to `save`."""
        mine = [saver] if saver is not None else [each for each in self._savers if each.waits_for_this_thread]
        for each in mine:
            each.fail(error)
        if not isinstance(error, Exception):
            self.pool = BufferPool(self.options.staging_budget)  # a buffer may be lost

    def wait(self) -> None:
        """Wait for every save under way, and for the deletion of old steps that follows.

        Raises:
            S3LoaderError: what one of them failed with, where nobody has seen it yet.
        """
        self._join()
        self._raise_failures()

    def _join(self) -> None:
        for saver in list(self._savers):
            saver.join()

    def _join_committed(self) -> None:
        """Wait for what follows the saves that are committed: nobody shall meet the deletion of what they delete."""
        for saver in list(self._savers):
            if saver.handle.done:
                saver.join()

    def finish(self, seconds: float) -> list[int]:
        """Wait up to `seconds` for the saves under way, then abandon those that are not committed; returns their steps.

        Raises nothing for them: their handles do.
        """
        end = time.monotonic() + seconds
        late: list[int] = []
        for saver in list(self._savers):
            if not saver.handle.wait(max(0.0, end - time.monotonic())):
                saver.abandon()
                late.append(saver.handle.step)
        return late

    @with_error_context("begin the session of")
    def session(self) -> Session:
        """This job's incarnation; begun at the first call (by `save`, or by `restore` where there are several ranks)."""
        with self._lock:
            if self._session is None or self._session.pid != os.getpid():
                self._who = identify(*self._given)
                self._session = open_session(self.run, self._who, self.run.survey, self.options.deadline)
                self._unfinished.update(self._session.unfinished)
            return self._session

    def _note_unfinished(self, savers: Sequence[Saver]) -> None:
        """Remember at which steps something may be left to go on with."""
        for saver in savers:
            if saver.handle.done and saver.handle.error is not None:
                self._unfinished.add(saver.handle.step)
                self._left_open.update(saver.left_open)

    @staticmethod
    def _committed(session: Session, step: int) -> None:
        session.incarnation.stands_at = step

    def _clean_up(self, step: int) -> list[int]:
        while self._left_open:  # nobody is going to go on with them
            key, upload_id = self._left_open.pop()
            self.store.backend.abort_multipart(key, upload_id)
        return self._retire(spare=(step,))

    @with_error_context("retire steps of")
    def retire(self) -> list[int]:
        """Delete the steps that `keep` does not keep; done after every save, by rank 0. Returns them.

        The step committed last is always kept. It is the newest one, unless the run went back to an earlier step.
        """
        self._join_committed()
        return self._retire()

    def _retire(self, spare: Sequence[int] = ()) -> list[int]:
        if self.keep is None or self._identity.rank:
            return []
        committed = self.run.scan().committed()
        behind = next((step for step in spare if step < max((root.step for root in committed), default=0)), None)
        if behind is not None:
            _log.warning(
                "step %d is saved, but latest() and restore() go on to take step %d of %s for the newest: to go back for good, "
                "restore(step, discard_later=True), or `s3loader ckpt rollback`",
                behind,
                committed[-1].step,
                self.store.url,
            )
        doomed = retention.to_retire(committed, self.keep, spare)
        return retention.retire_all(self.run, doomed, self._epoch()) if doomed else []

    # finding

    @with_error_context("list")
    def latest(self) -> int | None:
        """The newest committed step, found by listing; None where there is none.

        Raises:
            CheckpointError: there are steps, and all of them are damaged.
        """
        root = newest_committed(self.run)
        return root.step if root is not None else None

    def next_step(self) -> int:
        """The step after the newest, and after those that this process is saving; 0 where there is none.

        Raises: as `latest`.
        """
        latest = self.latest()
        return max((step + 1 for step in [*under_way(self.store.url).values(), latest] if step is not None), default=0)

    @with_error_context("list")
    def steps(self) -> list[int]:
        """All committed steps, ascending, when what this manager's last saves retire is gone."""
        self._join_committed()
        return [root.step for root in self.run.scan().committed()]

    @with_error_context("list")
    def roots(self) -> list[Root]:
        """Roots of all committed steps, ascending: facts, metrics, files; as `steps`."""
        self._join_committed()
        return self.run.scan().committed()

    @with_error_context("open")
    def open(self, step: int | None = None) -> Checkpoint:
        """A committed step (the newest where `step` is None), to be read lazily.

        Raises:
            CheckpointNotFoundError: there is none.
            CheckpointError: it is damaged or incomplete.
        """
        return self._opened(self.find(step))

    def _opened(self, root: Root, *, ahead: bool = False) -> Checkpoint:
        return Checkpoint(self.run, root, self._share(), ahead=ahead)

    def _share(self) -> NodeShare | None:
        options = self.options
        return NodeShare(options.node_cache, options.node_cache_size, self._identity.rank) if options.node_cache else None

    @with_error_context("open")
    def find(self, step: int | None = None) -> Root:
        """Root of `step`, or of the newest.

        Raises:
            CheckpointNotFoundError: there is none.
        """
        if step is not None:
            root = self.run.roots.read(step)
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

    @with_error_context("restore")
    def restore(
        self,
        step: int | None = None,
        target: Mapping[str, Any] | None = None,
        *,
        items: Sequence[str] | None = None,
        on_corruption: OnCorruption = "raise",
        verify: bool = True,
        strict: bool = True,
        assign: bool = False,
        strip: bool | str | Sequence[str] = False,
        convert: bool = False,
        discard_later: bool = False,
        progress: ShowProgress = None,
    ) -> dict[str, Any]:
        """Read a step back.

        Args:
            step: Default: the newest. Where there are several ranks: the one this job has saved (or gone back to) last, and
                before that the one that all ranks agreed on at its start.
            target: Items to restore into, by name: arrays are filled in place, objects with state get it loaded.
                Only the items it names are read. What is not in it is made anew, as the kind it was saved from.
            items: Read only these items.
            on_corruption: A damaged step: ``"raise"``, or go back to the ``"previous"`` good one (only where `step` is None).
            verify: Compare checksums of everything read.
            strict: Where False, what the target has and the checkpoint lacks stays as it is, and what a module lacks is not
                read. The result is a `Restored` then, which lists both.
            assign: Modules take the tensors read for their own, as ``load_state_dict(assign=True)``: also on the meta device,
                and with the types that were saved.
            strip: What a wrapper has put before the names in a module's state, on either side: ``"module."``, several, or True
                for those of DDP, ``torch.compile``, FSDP and activation checkpointing. Names that match as they are do.
            convert: Convert to the element type of a target's array or tensor (of any framework, abstract ones too), where that
                is of the same kind or a wider one (float64 to bfloat16, int to float; not float to int). Modules do so always.
            discard_later: Roll the run back to the restored step, as `rollback` does, once all of it was read.
            progress: True shows on stderr how far it is: a bar on a terminal, else a line a minute; of rank 0. A function is
                called with bytes read, of how many, and again bytes read.

        Returns:
            The items by name.

        Raises:
            CheckpointNotFoundError: there is no such step.
            CheckpointError: the target is not of the structure, shapes or types that were saved; the hint says what helps.
            IntegrityError: bytes are not what was saved; the target may be half written.
        """
        self._expect_open()
        if on_corruption not in ("raise", "previous"):
            raise CheckpointError(f"on_corruption is 'raise' or 'previous', not {on_corruption!r}")
        check_progress(progress)
        rank = self._identity.rank
        if step is None and self._identity.world > 1:
            step = self._agreed_step()
        read = partial(
            Checkpoint.restore,
            target=target,
            items=items,
            verify=verify,
            rank=rank,
            strict=strict,
            assign=assign,
            strip=strip,
            convert=convert,
            progress=progress,
        )
        found, restored = self._restored(step, read, on_corruption)
        if discard_later:
            self.rollback(found)
        return restored

    def _restored(
        self, step: int | None, read: Callable[[Checkpoint], dict[str, Any]], on_corruption: OnCorruption
    ) -> tuple[int, dict[str, Any]]:
        """Which step was restored, and its items."""
        if step is not None:
            return step, read(self._opened(self.find(step), ahead=True))
        damage: Exception | None = None
        for root in self.run.newest_first():
            try:
                return root.step, read(self._opened(root, ahead=True))
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

    def _agreed_step(self) -> int:
        """The step that all ranks restore: where the job stands, else the newest as rank 0 finds it. Nothing is written to the
        run where the ranks have a framework's store to agree in: a job that only reads takes over nothing."""
        self._join()  # or ranks would differ in what they have committed last
        identity, deadline = self._identity, self.options.deadline
        known = incarnation_of(self.run, identity)
        step = known.stands_at if known is not None else None
        if step is None:
            agreed, step = agree(self.run, identity, self.latest, deadline)
            step = step if agreed else self.session().resume_step
        if step is None:
            raise CheckpointNotFoundError(
                "there was no checkpoint when this job began",
                url=self.store.url,
                hint="save one first, or check the path: it is the folder of the run",
            )
        return step

    # going back

    @with_error_context("roll back")
    def rollback(self, step: int, *, dry_run: bool = False) -> list[int]:
        """Go back to `step` for good: delete every step after it, damaged ones too, the newest first.

        `latest()` is `step` afterwards, and the numbers after it can be saved again. A job that still saves to the run is
        fenced first. Where there are several ranks, all of them call it; rank 0 deletes, the others wait for that.

        Args:
            step: A committed step.
            dry_run: Only say which steps would go.

        Returns:
            The steps deleted, ascending (of other ranks than 0: none).

        Raises:
            CheckpointNotFoundError: `step` is not committed.
            CheckpointError: it is damaged; or another process goes on to save to this run.
            IncompleteCheckpointError: rank 0 did not delete them in time.
        """
        self._expect_open()
        root = self.find(step)
        if root.state != "committed":
            raise CheckpointError(
                root.problem, url=self.store.url, hint="roll back to a good step: `s3loader ckpt verify --all`"
            )
        if dry_run:
            return sorted(each.step for each in retention.later(self.run, step))
        self._join()
        session = self.session()
        if session.identity.rank:
            session.await_discarded(step, self.options.deadline)
            discarded = []
        else:
            discarded = retention.discard_later(self.run, step, session.epoch)
        session.incarnation.stands_at, self._base = step, None
        return discarded

    # deleting

    @with_error_context("delete")
    def delete(self, step: int) -> None:
        """Delete a committed step: un-publish it, then delete its files (but those other steps refer to).

        Raises:
            CheckpointNotFoundError: it is not committed.
        """
        self._ready()
        self._join_committed()
        root = self.run.roots.read(step)
        if root.state not in ("committed", "damaged"):
            raise CheckpointNotFoundError(
                f"step {step} is not committed", url=self.store.url, hint="`s3loader ckpt ls` lists what there is"
            )
        if not retention.retire_all(self.run, [root], self._epoch()):
            raise CheckpointError(
                f"step {step} was changed by another process", url=self.store.url, hint="look at it again, then delete it again"
            )

    @with_error_context("collect garbage of")
    def gc(self, *, dry_run: bool = False, grace: float | None = None) -> gc.GCReport:
        """Delete what no committed step needs: abandoned attempts, leftovers of deleted steps, open uploads.

        Args:
            dry_run: Only report.
            grace: Seconds that an attempt must have been left alone; default: `CheckpointOptions.grace`.
        """
        self._ready()
        self._join_committed()
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

    def _expect_open(self) -> None:
        if self._closed:
            raise ClosedError(
                "the checkpoint manager was closed", url=self.store.url, hint="make another CheckpointManager for the same URL"
            )

    def _ready(self) -> None:
        self._expect_open()
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
