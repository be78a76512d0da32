"""Compaction: tombstones go, and one small object remembers for ever which generations of which steps are dead.

A tombstone can't simply be deleted: a late root write of a stalled writer, whose condition is that nothing is there, would
then succeed and bring back a step whose files are gone. So ``ckpt/compacted.json`` (the *tombstones*) is updated first. Every
entry of it stays for ever; the entry "step 600: 1" says that generation 0 of step 600 is dead, whatever lies under its key.
Who saves step 600 again writes its generation 1, a root under another key; so the deletion of a dead root, which no store
makes conditional, can come as late as it likes. Only generations that have a tombstone are marked, and nobody writes over a
tombstone: between reading and marking one, nothing can be committed in its place.

Steps saved at regular intervals take a few bytes for all of them together, others some ten bytes each.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Final

from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import Compacted
from s3loader.checkpoint.protocol.objects import JSON, RunObjects
from s3loader.errors import (
    CheckpointError,
    FormatError,
    ObjectNotFoundError,
    OutcomeUnknownError,
    PreconditionFailedError,
    StoreError,
)
from s3loader.exchange.commit import put_settled
from s3loader.types import ObjectMeta, PutMode, PutResult, Update

__all__ = ["Tombstones", "dead_keys", "pack", "unpack"]

MOST: Final = 1 << 22
"""Deleted steps that a run can hold: what is stored in ten bytes must not fill the memory."""
_DEADLINE: Final = 60.0
"""Seconds for which an update goes on against other processes."""
_RUN: Final = 3
"""Steps at equal distances are written as a run from this number on."""


class Tombstones:
    """What this process knows of a run's tombstones. It only ever grows, so what was known stays true.

    Args:
        objects: Of the run.
    """

    def __init__(self, objects: RunObjects) -> None:
        self._objects = objects
        self._known: dict[int, int] = {}
        self._etag = ""
        self._lock = threading.Lock()

    def generation(self, step: int) -> int:
        """The generation of `step` that is not dead, as far as this process knows: 0 for nearly every step."""
        return self._known.get(step, 0)

    def refresh(self) -> None:
        """Look at the store again: one small request where nothing has changed."""
        etag = self._etag or self._objects.first_tombstones
        if etag:
            try:
                if self._objects.store.head(layout.COMPACTED).etag == etag:
                    return
            except ObjectNotFoundError:  # a run is being deleted; what is dead stays dead
                return
        self._read()

    def listed(self, entry: ObjectMeta | None) -> None:
        """Take note of what a listing of ``ckpt/`` said of the tombstones; read it only where it has changed."""
        if entry is not None and (not entry.etag or entry.etag != self._etag):
            self._read()

    def add(self, dead: Mapping[int, int]) -> None:
        """Mark generations as dead for ever; every one of them must have a tombstone.

        Args:
            dead: Step -> the generation that has a tombstone.

        Raises:
            CheckpointError: others change the tombstones all the time.
        """
        url = f"{self._objects.store.url}/{layout.COMPACTED}"

        def wanted() -> dict[int, int]:
            return {step: generation + 1 for step, generation in dead.items() if self.generation(step) <= generation}

        def put(etag: str) -> PutResult:
            missing = wanted()
            if len(self._known) + len(missing) > MOST:
                raise CheckpointError(
                    f"{MOST} steps of this run were deleted, and more cannot be marked",
                    url=url,
                    hint="go on in a run of its own (another folder); nothing else is wrong with this one",
                )
            mode: PutMode = "overwrite"
            if self._objects.conditional:
                mode = Update(etag) if etag else "create"
            data = records.encode(pack({**self._known, **missing}))
            return self._objects.store.put(layout.COMPACTED, data, mode=mode, content_type=JSON)

        etag = self._read()
        if not wanted():
            return
        try:
            done, _ = put_settled(
                put,
                self._read,
                lambda now, before, doubtful: not wanted(),
                etag,
                op="mark",
                url=url,
                conditional=self._objects.conditional,
                deadline=_DEADLINE,
            )
        except StoreError as error:
            if not (error.retryable or isinstance(error, (OutcomeUnknownError, PreconditionFailedError))):
                raise
            raise CheckpointError(
                f"the tombstones of deleted steps could not be updated: {error}",
                url=url,
                hint="other processes change it at the same time, or the store fails; do it again later",
            ) from error
        if done is not None:
            self._learn(wanted(), done.etag)

    def _read(self) -> str:
        found = self._objects.read(layout.COMPACTED, Compacted, strict=True)  # what is known is written back
        if found is None:
            return ""
        if found[1] != self._etag:
            self._learn(unpack(found[0]), found[1])
        return found[1]

    def _learn(self, read: Mapping[int, int], etag: str) -> None:
        with self._lock:  # an answer that was slow must not take back what is known since
            newer = {step: count for step, count in read.items() if count > self._known.get(step, 0)}
            self._known = {**self._known, **newer}
            self._etag = etag


def pack(generations: Mapping[int, int]) -> Compacted:
    """The record of tombstones, which is the same bytes for the same contents.

    Args:
        generations: Step -> how many of its generations are dead.
    """
    by_count: list[list[int]] = [[] for _ in range(max(generations.values(), default=0))]
    for step in sorted(generations):
        if generations[step]:
            by_count[generations[step] - 1].append(step)
    return Compacted(format=records.FORMAT, generations=[_runs(steps) for steps in by_count])


def unpack(record: Compacted) -> dict[int, int]:
    """Step -> how many of its generations are dead.

    Raises:
        FormatError: these are no steps, or more than `MOST`.
    """
    found: dict[int, int] = {}
    for count, runs in enumerate(record.generations, 1):
        for run in runs:
            first, stride, length = run if len(run) == _RUN else (*run[:1], 1, 1) if len(run) == 1 else (-1, 0, 0)
            last = first + stride * (length - 1)
            if first < 0 or stride < 1 or length < 1 or last > layout.MAX_STEP or len(found) + length > MOST:
                raise FormatError(
                    f"{layout.COMPACTED}: {run} are no deleted steps, or too many",
                    hint="it is damaged: restore it from a copy of the run",
                )
            found.update(dict.fromkeys(range(first, last + 1, stride), count))
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


def dead_keys(roots: Mapping[int, Iterable[int]], tombstones: Tombstones) -> list[str]:
    """Keys of roots that count no more.

    Args:
        roots: Step -> generations that have an object.
        tombstones: What is dead.
    """
    return [
        layout.root_key(step, generation)
        for step, found in sorted(roots.items())
        for generation in sorted(found)
        if generation < tombstones.generation(step)
    ]
