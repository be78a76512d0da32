"""A run: the place in a store where the checkpoints of one training lie, and what is found there."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Final, NamedTuple

from s3loader.checkpoint.format import layout
from s3loader.checkpoint.protocol.objects import RunObjects
from s3loader.checkpoint.protocol.roots import Root, Roots
from s3loader.checkpoint.protocol.tombstones import Tombstones
from s3loader.checkpoint.threads import at_once
from s3loader.store import ObjectStore
from s3loader.types import CommonPrefix, ObjectMeta

__all__ = ["Run", "Scan"]

_log = logging.getLogger("s3loader.checkpoint")
_PAGE: Final = 1000
"""Objects that stores list by one request."""
_SOON: Final = 3
"""Requests that come together after the listing: a root and the mark; then an index, a listing, and data."""
_MOST_TOGETHER: Final = 16
"""Roots asked for together."""


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


class Run(RunObjects):
    """The objects of one run.

    Args:
        store: Opened on the run's URL.
        settle: Seconds between the write and the read-back of a root on a store that ignores conditions.
    """

    def __init__(self, store: ObjectStore, *, settle: float = 0.5) -> None:
        super().__init__(store, settle=settle)
        self.tombstones = Tombstones(self)
        self.roots = Roots(self, self.tombstones)
        self.latency = math.inf
        """Seconds that the quickest listing took, which moves few bytes; infinite: none was made."""
        self._scanned: dict[int, Root] = {}
        self._large = False
        """Whether it was more than a page of objects, once."""

    # steps

    def newest_first(self) -> Iterator[Root]:
        """Roots that are committed or damaged, from the newest step down, read as they are asked for."""
        return (found for found in self._downwards() if found.state in ("committed", "damaged"))

    def survey(self) -> tuple[int | None, list[int]]:
        """The newest committed step, and the steps above it that have files and no root, newest first."""
        unfinished: list[int] = []
        for found in self._downwards():
            if found.state == "committed":
                return found.step, unfinished
            if found.state == "absent":
                unfinished.append(found.step)
        return None, unfinished

    def _downwards(self) -> Iterator[Root]:
        """Roots of all steps that have a folder, from the newest down.

        A root and the mark are asked for together. That is enough where the root is the one that was listed: the mark was read
        later, so the root was alive when it was listed. Any other one may have come back from the dead between the two
        answers, and the mark is looked at once more.
        """
        listed, mark = self._listed()
        left = sorted(listed)
        look = partial(self.tombstones.listed, mark)
        batch = 1
        while left:
            steps = _next(left, listed, batch)
            generations = [max(listed[step], default=self.tombstones.generation(step)) for step in steps]
            reads = [partial(self.roots.at, *each) for each in zip(steps, generations, strict=True)]
            found, _ = at_once(lambda reads=reads: at_once(*reads), look)  # type: ignore[misc]
            for root in found:
                yield self._alive(root, listed[root.step])
            look = partial(self.tombstones.listed, None)
            batch = min(_MOST_TOGETHER, 2 * batch)

    def _alive(self, found: Root, listed: Mapping[int, ObjectMeta]) -> Root:
        """`found`, or what counts in its place."""
        if found.generation != self.tombstones.generation(found.step):
            return self.roots.read(found.step)
        told = listed.get(found.generation)
        proven = told is not None and told.etag and told.etag == found.etag
        if found.state in ("committed", "damaged") and not proven and self.roots.is_dead(found):
            return self.roots.read(found.step)
        return found

    def _listed(self) -> tuple[dict[int, dict[int, ObjectMeta]], ObjectMeta | None]:
        """Steps that have a folder, each with the objects of its roots by generation, and the object of the mark.

        A run of more than one page of objects is listed by its folders, which tells nothing of the roots.
        """
        steps: dict[int, dict[int, ObjectMeta]] = {}
        mark: ObjectMeta | None = None
        self.store.open_ahead(_SOON)
        began = time.monotonic()
        entries = [] if self._large else list(islice(self.store.list(layout.STEPS), _PAGE))
        if not self._large:
            self.latency = min(self.latency, time.monotonic() - began)
        if self._large or len(entries) == _PAGE:
            self._large = True
            entries = list(self.store.list(layout.STEPS, delimiter="/"))
        for entry in entries:
            if isinstance(entry, CommonPrefix):
                step = layout.step_of(entry.key)
                if step is not None:
                    steps[step] = {}
            elif entry.key == layout.COMPACTED:
                mark = entry
            elif (step := layout.step_of("/".join([*entry.key.split("/", 2)[:2], ""]))) is not None:
                roots, key = steps.setdefault(step, {}), layout.parse_key(entry.key)
                if key is not None and not key.attempt:
                    roots[key.generation] = entry
        return steps, mark

    def scan(self) -> Scan:
        """Everything under ``ckpt/``, by one listing; roots whose ETag is known are not read again."""
        scan = Scan({}, {}, {})
        listed_tombstones: ObjectMeta | None = None
        for entry in self.store.list(layout.STEPS):
            key = layout.parse_key(entry.key)
            if not isinstance(entry, ObjectMeta):
                continue
            if entry.key == layout.COMPACTED:
                listed_tombstones = entry
            elif key is not None and key.attempt:
                scan.attempts.setdefault(key.step, {}).setdefault(key.attempt, []).append(entry)
            elif key is not None:
                scan.objects.setdefault(key.step, {})[key.generation] = entry
        self.tombstones.listed(
            listed_tombstones
        )  # it is listed after the roots, so a root that was listed and is not marked counted then
        changed: list[int] = []
        unknown: dict[int, ObjectMeta] = {}
        for step, objects in scan.objects.items():
            listed = objects.get(self.tombstones.generation(step))
            if listed is None:
                continue
            known = self._scanned.get(step)
            if known is not None and listed.etag and (known.key, known.etag) == (listed.key, listed.etag):
                scan.roots[step] = known
            else:
                unknown[step] = listed
        reads = [partial(self.roots.at, step, self.tombstones.generation(step)) for step in unknown]
        for found in at_once(*reads):
            scan.roots[found.step] = found
            if not unknown[found.step].etag or found.etag != unknown[found.step].etag:
                changed.append(found.step)
        if changed:  # written after they were listed: perhaps after their generation had died
            self.tombstones.refresh()
        for step in changed:
            if scan.roots[step].generation < self.tombstones.generation(step):
                scan.roots[step] = self.roots.read(step)
        for step in [step for step, found in scan.roots.items() if found.state == "absent"]:
            del scan.roots[step]
        self._scanned.update(scan.roots)
        return scan

    def newest_epoch(self, after: int = 0) -> int:
        """The highest epoch that was begun, `after` where none is higher."""
        start = layout.epoch_key(after) if after else ""
        epochs = (layout.epoch_of(entry.key) for entry in self.store.list(layout.CONTROL + "epoch-", start_after=start))
        return max((epoch for epoch in epochs if epoch is not None), default=after)


def _next(left: list[int], listed: Mapping[int, Mapping[int, ObjectMeta]], most: int) -> list[int]:
    """Take the highest of the steps `left` (ascending): at most `most`, and those without a root on the way to the first of
    them that has one, as far as was listed."""
    told = any(listed.values())
    steps: list[int] = []
    while left and len(steps) < _MOST_TOGETHER:
        steps.append(left.pop())
        if len(steps) >= most and (not told or any(listed[step] for step in steps)):
            break
    return steps
