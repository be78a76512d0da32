"""A run: the place in a store where the checkpoints of one training lie, and its atomic steps.

Everything here is one small object written under a condition, or the reading of one. What the
conditions are for is in docs/commit-protocol.md.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import Marker
from s3loader.checkpoint.protocol import root
from s3loader.checkpoint.protocol.compaction import Mark
from s3loader.checkpoint.protocol.root import Root
from s3loader.errors import (
    CheckpointError,
    CommitUnknownError,
    FencedError,
    ObjectExistsError,
    ObjectNotFoundError,
    OutcomeUnknownError,
    PreconditionFailedError,
    StepExistsError,
    StoreError,
)
from s3loader.exchange.lines import CONTENT_TYPE, encode_manifest
from s3loader.exchange.types import FileEntry
from s3loader.store import ObjectStore
from s3loader.types import CommonPrefix, ObjectMeta, PutMode, Update

__all__ = ["JSON", "Run", "Scan", "lost"]

_log = logging.getLogger("s3loader.checkpoint")
JSON: Final = "application/json"
_TRIES: Final = 6


class Scan(NamedTuple):
    """What lies under ``ckpt/``."""

    roots: dict[int, Root]
    attempts: dict[int, dict[str, list[ObjectMeta]]]
    """Step -> attempt -> its files."""
    objects: dict[int, dict[int, ObjectMeta]]
    """Step -> generation -> the object of its root, dead ones too."""

    def committed(self) -> list[Root]:
        """Committed roots, ascending."""
        return [self.roots[step] for step in sorted(self.roots) if self.roots[step].state == "committed"]

    def referenced(self) -> set[str]:
        """Every key that a committed root lists."""
        return {key for found in self.committed() for key, _ in found.keys.values()}


class Run:
    """The objects of one run.

    Args:
        store: Opened on the run's URL.
        settle: Seconds between the write and the read-back of a root on a store that ignores conditions.
    """

    def __init__(self, store: ObjectStore, *, settle: float = 0.5) -> None:
        self.store = store
        self.settle = settle
        self._conditional: bool | None = None
        self._id = ""
        self._roots: dict[int, Root] = {}
        self.mark = Mark(self)
        self._lock = threading.Lock()

    # the store's abilities

    @property
    def id(self) -> str:
        """Random id of the run; made at the first write."""
        self.prepare()
        return self._id

    @property
    def conditional(self) -> bool:
        """Whether the store honours conditional writes; found out at the first write, and remembered in the run."""
        self.prepare()
        return bool(self._conditional)

    def prepare(self) -> None:
        """Read the run's marker, or make it."""
        with self._lock:
            if self._conditional is not None:
                return
            found = self.get(layout.MARKER)
            marker = records.decode(found[0], Marker, layout.MARKER) if found else None
            if marker is None or marker.probed != self.store.url:
                able = self.store.conditional_writes()
                run = marker.run if marker is not None else secrets.token_hex(8)
                marker = Marker(format=records.FORMAT, run=run, conditional_writes=able, probed=self.store.url)
                marker = self._write_marker(marker, fresh=found is None)
            self._id, self._conditional = marker.run, marker.conditional_writes
        if not self._conditional:
            _log.warning(
                "%s ignores conditional writes: checkpoints are in single-writer mode, let one job at a time write to this run",
                self.store.url,
            )

    def _write_marker(self, marker: Marker, *, fresh: bool) -> Marker:
        mode: PutMode = "create" if fresh and marker.conditional_writes else "overwrite"
        try:
            self.store.put(layout.MARKER, records.encode(marker), mode=mode, content_type=JSON)
        except ObjectExistsError:
            found = self.get(layout.MARKER)
            if found is not None:
                return records.decode(found[0], Marker, layout.MARKER)
        if fresh:
            self.mark.begin(marker.conditional_writes)
        return marker

    # plain objects

    def get(self, key: str) -> tuple[bytes, str] | None:
        """Bytes and ETag of an object, None where there is none."""
        try:
            meta, data = self.store.backend.get(key)
        except ObjectNotFoundError:
            return None
        return bytes(data), meta.etag

    def put(self, key: str, data: bytes, *, content_type: str = JSON) -> None:
        """Write an object whose key is used once."""
        self.store.put(key, data, content_type=content_type)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object if its key is free; returns whether it is ours now."""
        try:
            self.store.put(key, data, mode="create" if self.conditional else "overwrite", content_type=JSON)
        except (ObjectExistsError, OutcomeUnknownError):
            found = self.get(key)
            return found is not None and found[0] == data
        return True

    # steps

    def listed_steps(self) -> list[int]:
        """Steps that have a folder, whatever is in it, ascending."""
        entries = list(self.store.list(layout.STEPS, delimiter="/"))
        self.mark.listed(next((e for e in entries if isinstance(e, ObjectMeta) and e.key == layout.COMPACTED), None))
        found = (layout.step_of(e.key) for e in entries if isinstance(e, CommonPrefix))
        return sorted(step for step in found if step is not None)

    def read_root(self, step: int) -> Root:
        """State of `step`'s root, of the generation that counts."""
        while True:
            found = self.root_at(step, self.mark.generation(step))
            if not self.is_dead(found):  # asked after the root was read: a dead one may have come back
                return found

    def root_at(self, step: int, generation: int) -> Root:
        """What lies under the key of one generation of `step`, dead or not."""
        found = self.get(layout.root_key(step, generation))
        if found is None:
            return Root(step, "absent", generation=generation)
        return root.parse(step, *found, generation)

    def is_dead(self, seen: Root) -> bool:
        """Whether the generation of `seen` is dead by now; asks the store."""
        self.mark.refresh()
        return seen.generation < self.mark.generation(seen.step)

    def newest_first(self) -> Iterator[Root]:
        """Roots that are committed or damaged, from the newest step down, read as they are asked for."""
        for step in reversed(self.listed_steps()):
            found = self.root_at(step, self.mark.generation(step))
            if found.state in ("committed", "damaged") and self.is_dead(found):
                found = self.read_root(step)
            if found.state in ("committed", "damaged"):
                yield found

    def survey(self) -> tuple[int | None, list[int]]:
        """The newest committed step, and the steps above it that have files and no root, newest first."""
        unfinished: list[int] = []
        for step in reversed(self.listed_steps()):
            found = self.root_at(step, self.mark.generation(step))
            if found.state == "committed" and self.is_dead(found):
                found = self.read_root(step)
            if found.state == "committed":
                return step, unfinished
            if found.state == "absent":
                unfinished.append(step)
        return None, unfinished

    def scan(self) -> Scan:
        """Everything under ``ckpt/``, by one listing; roots whose ETag is known are not read again."""
        scan = Scan({}, {}, {})
        mark: ObjectMeta | None = None
        for entry in self.store.list(layout.STEPS):
            key = layout.parse_key(entry.key)
            if not isinstance(entry, ObjectMeta):
                continue
            if entry.key == layout.COMPACTED:
                mark = entry
            elif key is not None and key.attempt:
                scan.attempts.setdefault(key.step, {}).setdefault(key.attempt, []).append(entry)
            elif key is not None:
                scan.objects.setdefault(key.step, {})[key.generation] = entry
        self.mark.listed(mark)  # it is listed after the roots, so a root that was listed and is not marked counted then
        changed: list[int] = []
        for step, objects in scan.objects.items():
            listed = objects.get(self.mark.generation(step))
            if listed is None:
                continue
            known = self._roots.get(step)
            if known is None or not listed.etag or (known.key, known.etag) != (listed.key, listed.etag):
                known = self.root_at(step, self.mark.generation(step))
                if not listed.etag or known.etag != listed.etag:
                    changed.append(step)
            scan.roots[step] = known
        if changed:  # written after they were listed: perhaps after their generation had died
            self.mark.refresh()
        for step in changed:
            if scan.roots[step].generation < self.mark.generation(step):
                scan.roots[step] = self.read_root(step)
        for step in [step for step, found in scan.roots.items() if found.state == "absent"]:
            del scan.roots[step]
        self._roots.update(scan.roots)
        return scan

    def newest_epoch(self, after: int = 0) -> int:
        """The highest epoch that was begun, `after` where none is higher."""
        start = layout.epoch_key(after) if after else ""
        epochs = (layout.epoch_of(entry.key) for entry in self.store.list(layout.CONTROL + "epoch-", start_after=start))
        return max((epoch for epoch in epochs if epoch is not None), default=after)

    # the commit point

    def publish(self, step: int, entries: Sequence[FileEntry], attempt: str, expected: Root) -> Root:
        """Make `attempt` the committed one of `step`: the one conditional write of a save.

        Args:
            entries: The root's lines.
            attempt: Its id, by which a lost answer is told from another's success.
            expected: The root as it was read before: absent, a tombstone, or what is to be replaced.

        Raises:
            StepExistsError: another attempt is committed.
            FencedError: the step was retired meanwhile.
            CommitUnknownError: whether it was written could not be found out.
        """
        try:
            done = self._write_root(entries, expected, lambda now: attempt in now.history)
        except (FencedError, StepExistsError) as error:
            self.expect_alive(expected, error)
            raise
        self.expect_alive(expected)
        return done

    def expect_alive(self, seen: Root, cause: Exception | None = None) -> None:
        """Make sure that what the root says, or does not say, of an attempt is all that ever happened.

        Raises:
            CommitUnknownError: the generation is dead: the attempt may have been committed and deleted, without a trace.
        """
        if self.is_dead(seen):
            raise CommitUnknownError(
                f"step {seen.step} was deleted while it was written, perhaps after it had been committed",
                url=f"{self.store.url}/{seen.key}",
                hint="nothing of it is left; save again",
            ) from cause

    def retire(self, seen: Root, epoch: int) -> Root:
        """Put a tombstone in the place of what was seen (a committed root, an older tombstone, or nothing).

        Raises:
            StepExistsError: the root is another one by now, so nothing was retired.
            CommitUnknownError: whether it was written could not be found out.
        """
        nonce = secrets.token_hex(8)
        facts = {
            "step": seen.step,
            "epoch": epoch,
            "attempt": seen.attempt,
            "was": seen.history[:-1],
            "nonce": nonce,
            "time": time.time(),
        }
        entries = root.tombstone_entries(facts, seen.key)
        return self._write_root(entries, seen, lambda now: now.facts.get("nonce") == nonce)

    def touch(self, seen: Root) -> Root:
        """Rewrite a committed root as it is, under a new ETag, so that nobody who saw the old one can replace it.

        Raises:
            StepExistsError, FencedError, CommitUnknownError: as `retire`.
        """
        found = self.get(seen.key)
        if found is None or found[1] != seen.etag:
            raise FencedError(
                f"the root of step {seen.step} changed",
                url=self.store.url,
                hint="another process works on this step; do it again",
            )
        nonce = secrets.token_hex(8)
        entries = root.touched_entries(found[0], nonce)
        return self._write_root(entries, seen, lambda now: now.facts.get("nonce") == nonce)

    def _write_root(self, entries: Sequence[FileEntry], expected: Root, ours: Any) -> Root:
        step = expected.step
        data = encode_manifest(entries)
        mode: PutMode = "overwrite"
        if self.conditional:
            mode = Update(expected.etag) if expected.etag else "create"
        last: Exception | None = None
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(min(2.0, 0.05 * 2**attempt) * random.uniform(0.5, 1.0))
            try:
                done = self.store.put(expected.key, data, mode=mode, content_type=CONTENT_TYPE)
                if self.conditional:
                    return root.parse(step, data, done.etag, expected.generation)
                time.sleep(self.settle)
            except (PreconditionFailedError, ObjectNotFoundError) as error:
                last = error
            except StoreError as error:
                if not (error.retryable or isinstance(error, OutcomeUnknownError)):
                    raise
                last = error
            try:
                now = self.root_at(step, expected.generation)
            except StoreError as error:
                last = error
                continue
            if ours(now):
                return now
            if _may_still_land(now, expected):
                continue
            raise lost(now, self.store.url)
        raise CommitUnknownError(
            f"whether the root of step {step} was written could not be found out: {last}",
            url=f"{self.store.url}/{expected.key}",
            attempts=_TRIES,
            hint="look with `s3loader ckpt latest`; nothing of it is deleted before garbage collection fences it",
        ) from last


def _may_still_land(now: Root, expected: Root) -> bool:
    """Whether nothing has happened yet, so that the same write may be sent again."""
    return (now.state, now.etag) == (expected.state, expected.etag)


def lost(now: Root, url: str) -> CheckpointError:
    """What is raised where a root is no more what a writer (or deleter) expected.

    Args:
        now: The root.
        url: Of the run.
    """
    url = f"{url}/{now.key}"
    if now.state in ("tombstone", "absent"):
        return FencedError(
            f"step {now.step} was retired while it was written",
            url=url,
            hint="it was deleted, or garbage collection took the save for abandoned; save it again",
        )
    return StepExistsError(
        f"step {now.step} is taken by attempt {now.attempt or '(damaged)'}",
        url=url,
        hint="another process saves to this run; give each job a run of its own, or save with on_exists='skip'",
    )
