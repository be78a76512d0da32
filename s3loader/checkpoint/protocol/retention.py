"""Deleting: un-publish first, delete after; and never what another step, or a save under way, needs.

Order matters. A save that references files of a base step writes its pin, *then* looks whether the
base is still committed; whoever deletes writes the base's tombstone, *then* reads the pins, *then*
the roots. Either the save sees the tombstone, or the deleter sees the pin or the root that followed it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import Pin
from s3loader.checkpoint.protocol.policy import KeepPolicy, StepInfo
from s3loader.checkpoint.protocol.root import Root
from s3loader.checkpoint.protocol.run import Run, Scan
from s3loader.errors import CheckpointError, FencedError, StepExistsError

__all__ = ["delete_keys", "in_use", "retire_all", "to_retire"]

_log = logging.getLogger("s3loader.checkpoint")


def to_retire(committed: Sequence[Root], policy: KeepPolicy) -> list[Root]:
    """Roots out of `committed` (ascending) that the policy does not keep; never the newest."""
    infos = [StepInfo(r.step, {k: v for k, v in (r.facts.get("metrics") or {}).items() if v is not None}) for r in committed]
    kept = policy.keep(infos)
    return [r for r in committed[:-1] if r.step not in kept]


def in_use(run: Run) -> tuple[set[str], Scan]:
    """Keys that must not be deleted: pinned by a save under way, or listed by a committed root."""
    pinned: set[str] = set()
    for entry in run.store.list(layout.PINS):
        found = run.get(entry.key)
        if found is not None:
            pinned.update(records.decode(found[0], Pin, entry.key).keys)
    scan = run.scan()
    return pinned | scan.referenced(), scan


def retire_all(run: Run, roots: Iterable[Root], epoch: int) -> list[int]:
    """Un-publish steps, then delete their files; returns the steps that this call un-published.

    Raises:
        CheckpointError: some files could not be deleted; garbage collection will find them.
    """
    retired: list[Root] = []
    for root in roots:
        try:
            run.retire(root, epoch)
        except (StepExistsError, FencedError):
            _log.info("step %d was replaced or retired by another process", root.step)
            continue
        retired.append(root)
    if retired:
        keep, scan = in_use(run)
        keys = {meta.key for r in retired for meta in scan.attempts.get(r.step, {}).get(r.attempt, ())}
        keys |= {key for r in retired for key, _ in r.keys.values()}  # files of steps that were retired before it, too
        delete_keys(run, sorted(keys - keep))
    return [r.step for r in retired]


def delete_keys(run: Run, keys: Iterable[str]) -> int:
    """Delete all of `keys`; returns how many.

    Raises:
        CheckpointError: some could not be.
    """
    doomed = list(keys)
    failures = run.store.delete_many(doomed)
    if failures:
        raise CheckpointError(
            f"{len(failures)} of {len(doomed)} files could not be deleted: {failures[0].error}",
            url=f"{run.store.url}/{failures[0].key}",
            hint="`s3loader ckpt gc` deletes what is left once the cause is gone",
        ) from failures[0].error
    return len(doomed)
