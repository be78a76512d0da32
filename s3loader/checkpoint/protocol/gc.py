"""Garbage collection: attempts that were never committed, leftovers of retired steps, open uploads.

A stalled writer may still publish an attempt that looks abandoned, so the step's root is rewritten
first (*fenced*): whatever that writer was about to send has a condition that no longer holds.
Tombstones are compacted last (tombstones.py): the generations that they end are marked as dead, then they are deleted.
Every step of a collection can be cut off and done again.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from dataclasses import dataclass, field

from s3loader.checkpoint.format import layout
from s3loader.checkpoint.protocol.retention import delete_keys, in_use
from s3loader.checkpoint.protocol.roots import Root
from s3loader.checkpoint.protocol.run import Run, Scan
from s3loader.checkpoint.protocol.tombstones import dead_keys
from s3loader.errors import AccessDeniedError, FencedError, ObjectNotFoundError, StepExistsError, UnsupportedOperationError
from s3loader.types import ObjectMeta

__all__ = ["GCReport", "collect"]

_log = logging.getLogger("s3loader.checkpoint")


@dataclass(slots=True)
class GCReport:
    """What a collection deleted, or, of a dry run, would delete."""

    dry_run: bool
    keys: list[str] = field(default_factory=list)
    bytes: int = 0
    attempts: int = 0
    uploads: list[str] = field(default_factory=list)
    """Keys of multipart uploads left open."""
    fenced: list[int] = field(default_factory=list)
    """Steps whose root was rewritten first."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Steps left alone, and why."""
    compacted: list[int] = field(default_factory=list)
    """Deleted steps whose tombstones are no longer needed, and gone."""


def collect(run: Run, *, epoch: int, grace: float, dry_run: bool = False) -> GCReport:
    """Delete what no committed step needs and nobody has touched for `grace` seconds.

    Args:
        run: Where.
        epoch: Of the job that collects, for the tombstones.
        grace: Seconds by the store's clock; an attempt that is younger may still be under way.
        dry_run: Only say what would go.
    """
    report = GCReport(dry_run)
    now = _store_time(run, dry_run)
    before = run.scan()
    doomed: dict[int, dict[str, list[ObjectMeta]]] = {}
    needed = before.referenced()
    alive: set[tuple[int, str]] = set()
    for step, attempts in before.attempts.items():
        found = before.roots.get(step, Root(step, "absent", generation=run.tombstones.generation(step)))
        old = {a: metas for a, metas in attempts.items() if _abandoned(found, a, metas, now - grace)}
        alive.update((step, attempt) for attempt in attempts.keys() - old.keys() - {found.attempt})
        old = {a: left for a, metas in old.items() if (left := [meta for meta in metas if meta.key not in needed])}
        if found.state == "damaged":
            report.skipped[step] = found.problem
        elif old and found.state != "tombstone" and any(at == step for at, _ in alive):
            report.skipped[step] = "a save is under way"  # it would be fenced too, and may go on with what the others left
            alive.update((step, attempt) for attempt in attempts)
        elif old and (dry_run or _fence(run, found, old, epoch, report)):
            doomed[step] = old
    _count(run, report, doomed)
    if not dry_run:
        delete_keys(run, report.keys)
        _drop_control(run, now - grace)
    _compact(run, report, before, now - grace)
    _abort_uploads(run, report, now - grace, alive)
    return report


def _abandoned(found: Root, attempt: str, metas: list[ObjectMeta], before: float) -> bool:
    if found.attempt == attempt:
        return found.state == "tombstone"  # retired for good: no need to wait
    return max((meta.last_modified or 0.0) for meta in metas) <= before


def _fence(run: Run, found: Root, old: dict[str, list[ObjectMeta]], epoch: int, report: GCReport) -> bool:
    """Make sure that none of the attempts `old` can be committed any more."""
    if found.state == "tombstone":
        return True  # nobody writes over one
    try:
        if found.state == "committed":
            run.roots.touch(found)
        else:
            run.roots.retire(found, epoch)
    except (StepExistsError, FencedError) as error:
        report.skipped[found.step] = str(error.message)
        return False
    report.fenced.append(found.step)
    return True


def _compact(run: Run, report: GCReport, scan: Scan, before: float) -> None:
    """Delete the tombstones of steps of which nothing else is left, after they were marked."""
    gone = set(report.keys)
    dead: dict[int, int] = {}
    for step, found in scan.roots.items():
        listed = scan.objects[step].get(found.generation)
        written = (listed.last_modified or 0.0) if listed is not None else math.inf
        files = (meta.key for metas in scan.attempts.get(step, {}).values() for meta in metas)
        if found.state == "tombstone" and written <= before and all(key in gone for key in files):
            dead[step] = found.generation
    report.compacted = sorted(dead)
    if not report.dry_run:
        if dead:
            run.tombstones.add(dead)
        delete_keys(run, dead_keys(scan.objects, run.tombstones))


def _count(run: Run, report: GCReport, doomed: dict[int, dict[str, list[ObjectMeta]]]) -> None:
    keep, _ = in_use(run)
    for attempts in doomed.values():
        for metas in attempts.values():
            gone = [meta for meta in metas if meta.key not in keep]
            report.keys += [meta.key for meta in gone]
            report.bytes += sum(meta.size for meta in gone)
            report.attempts += bool(gone)


def _store_time(run: Run, dry_run: bool) -> float:
    """Now by the store's clock, which dates the objects: read off an object written for it."""
    if dry_run:
        return time.time()
    key = f"{layout.CONTROL}clock-{secrets.token_hex(4)}"
    run.put(key, b"{}")
    try:
        # listed, since a HEAD answers in whole seconds where listings have fractions
        times = [meta.last_modified for meta in run.store.list(key) if isinstance(meta, ObjectMeta)]
        return max((at for at in times if at is not None), default=time.time())
    finally:
        run.store.delete(key)


def _drop_control(run: Run, before: float) -> None:
    """Pins and clocks that were left behind, and the fences of all epochs but the newest."""
    epochs: list[str] = []
    old: list[str] = []
    for entry in run.store.list(layout.CONTROL):
        if not isinstance(entry, ObjectMeta):
            continue
        if layout.epoch_of(entry.key) is not None:
            epochs.append(entry.key)
        elif (entry.last_modified or 0.0) <= before and entry.key.startswith(
            (layout.PINS, layout.SAVES, f"{layout.CONTROL}clock-")
        ):
            old.append(entry.key)
    delete_keys(run, [*sorted(epochs)[:-1], *old])


def _abort_uploads(run: Run, report: GCReport, before: float, alive: set[tuple[int, str]]) -> None:
    try:
        uploads = [u for u in run.store.backend.list_multipart(layout.STEPS) if (u[2] or 0.0) <= before]
        uploads = [u for u in uploads if (at := layout.parse_key(u[0])) is None or (at.step, at.attempt) not in alive]
    except (UnsupportedOperationError, AccessDeniedError, ObjectNotFoundError) as error:  # rclone answers 404
        _log.warning("open uploads cannot be listed, so none was aborted: %s", error)
        return
    for key, upload_id, _ in uploads:
        report.uploads.append(key)
        if not report.dry_run:
            run.store.backend.abort_multipart(key, upload_id)
