"""Compaction: tombstones go, and one small object remembers for ever which generations of which steps are dead.

A tombstone can't simply be deleted: a late root write of a stalled writer, whose condition is that nothing is there, would
then succeed and bring back a step whose files are gone. So ``ckpt/compacted.json`` (the *mark*) is updated first. Every
entry of it stays for ever; the entry "step 600: 1" says that generation 0 of step 600 is dead, whatever lies under its key.
Who saves step 600 again writes its generation 1, a root under another key; so the deletion of a dead root, which no store
makes conditional, can come as late as it likes. Only generations that have a tombstone are marked, and nobody writes over a
tombstone: between reading and marking one, nothing can be committed in its place.

Steps saved at regular intervals take a few bytes for all of them together, others some ten bytes each.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import Compacted
from s3loader.errors import CheckpointError, ObjectNotFoundError, OutcomeUnknownError, PreconditionFailedError, StoreError
from s3loader.types import ObjectMeta, PutMode, Update

if TYPE_CHECKING:
    from s3loader.checkpoint.protocol.run import Run

__all__ = ["Mark", "dead_keys", "pack", "unpack"]

_TRIES: Final = 20
_RUN: Final = 3
"""Steps at equal distances are written as a run from this number on."""


class Mark:
    """What this process knows of a run's mark. It only ever grows, so what was known stays true.

    Args:
        run: Whose.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._known: dict[int, int] = {}
        self._etag = ""
        self._lock = threading.Lock()

    def generation(self, step: int) -> int:
        """The generation of `step` that is not dead, as far as this process knows: 0 for nearly every step."""
        return self._known.get(step, 0)

    def begin(self, conditional: bool) -> None:
        """Write an empty mark at the begin of a run: asking for what is not there is the more expensive question.

        Args:
            conditional: Whether the store honours conditional writes.
        """
        mode: PutMode = "create" if conditional else "overwrite"
        with contextlib.suppress(StoreError):  # nothing depends on it
            data = records.encode(pack({}))
            self._etag = self._run.store.put(layout.COMPACTED, data, mode=mode, content_type="application/json").etag

    def refresh(self) -> None:
        """Look at the store again: one small request where nothing has changed."""
        if self._etag:
            try:
                if self._run.store.head(layout.COMPACTED).etag == self._etag:
                    return
            except ObjectNotFoundError:  # a run is being deleted; what is dead stays dead
                return
        self._read()

    def listed(self, entry: ObjectMeta | None) -> None:
        """Take note of what a listing of ``ckpt/`` said of the mark; read it only where it has changed."""
        if entry is not None and (not entry.etag or entry.etag != self._etag):
            self._read()

    def add(self, dead: Mapping[int, int]) -> None:
        """Mark generations as dead for ever; every one of them must have a tombstone.

        Args:
            dead: Step -> the generation that has a tombstone.

        Raises:
            CheckpointError: others change the mark all the time.
        """
        last: StoreError | None = None
        for _ in range(_TRIES):
            etag = self._read()
            wanted = {step: generation + 1 for step, generation in dead.items() if self.generation(step) <= generation}
            if not wanted:
                return
            data = records.encode(pack({**self._known, **wanted}))
            mode: PutMode = "overwrite"
            if self._run.conditional:
                mode = Update(etag) if etag else "create"
            try:
                done = self._run.store.put(layout.COMPACTED, data, mode=mode, content_type="application/json")
                self._learn(wanted, done.etag)
                return
            except (PreconditionFailedError, OutcomeUnknownError) as error:
                last = error
            except StoreError as error:
                if not error.retryable:
                    raise
                last = error
        raise CheckpointError(
            f"the mark of deleted steps could not be updated in {_TRIES} tries: {last}",
            url=f"{self._run.store.url}/{layout.COMPACTED}",
            hint="other processes change it at the same time, or the store fails; do it again later",
        ) from last

    def _read(self) -> str:
        found = self._run.get(layout.COMPACTED)
        if found is None:
            return ""
        if found[1] != self._etag:
            self._learn(unpack(records.decode(found[0], Compacted, layout.COMPACTED)), found[1])
        return found[1]

    def _learn(self, read: Mapping[int, int], etag: str) -> None:
        with self._lock:  # an answer that was slow must not take back what is known since
            newer = {step: count for step, count in read.items() if count > self._known.get(step, 0)}
            self._known = {**self._known, **newer}
            self._etag = etag


def pack(generations: Mapping[int, int]) -> Compacted:
    """The record of a mark, which is the same bytes for the same contents.

    Args:
        generations: Step -> how many of its generations are dead.
    """
    by_count: list[list[int]] = [[] for _ in range(max(generations.values(), default=0))]
    for step in sorted(generations):
        if generations[step]:
            by_count[generations[step] - 1].append(step)
    return Compacted(format=records.FORMAT, generations=[_runs(steps) for steps in by_count])


def unpack(record: Compacted) -> dict[int, int]:
    """Step -> how many of its generations are dead."""
    found: dict[int, int] = {}
    for count, runs in enumerate(record.generations, 1):
        for run in runs:
            first, stride, length = run if len(run) == _RUN else (run[0], 1, 1)
            found.update(dict.fromkeys(range(first, first + stride * length, stride), count))
    return found


def _runs(steps: list[int]) -> list[list[int]]:
    """`steps` (ascending) as ``[first, stride, length]``, and ``[step]`` where they are not at equal distances."""
    runs: list[list[int]] = []
    at = 0
    while at < len(steps):
        end = at + 1
        stride = steps[end] - steps[at] if end < len(steps) else 0
        while end < len(steps) and steps[end] - steps[end - 1] == stride:
            end += 1
        if end - at >= _RUN:
            runs.append([steps[at], stride, end - at])
            at = end
        else:
            runs.append([steps[at]])
            at += 1
    return runs


def dead_keys(roots: Mapping[int, Iterable[int]], mark: Mark) -> list[str]:
    """Keys of roots that count no more.

    Args:
        roots: Step -> generations that have an object.
        mark: What is dead.
    """
    return [
        layout.root_key(step, generation)
        for step, found in sorted(roots.items())
        for generation in sorted(found)
        if generation < mark.generation(step)
    ]
