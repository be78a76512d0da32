"""Ranks that divide a save among them without a collective: they meet in the store.

Rank 0 says which step it is (``control/save-<attempt>.json``); every rank writes the boxes that it has (``plan-RRRRR.json`` in
the attempt's folder); rank 0 gives each box that several ranks have to one of them, the one with the least to write
(``plan.json``). Then each writes its part, and the commit is the usual one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import BeginRecord, PlanRecord, SharesRecord
from s3loader.checkpoint.manager import CheckpointManager
from s3loader.checkpoint.protocol.commit import Attempt, expect_free, expect_no_failure, files_of, tell_failure
from s3loader.checkpoint.protocol.objects import Record
from s3loader.checkpoint.protocol.polling import Polling
from s3loader.checkpoint.protocol.roots import Root
from s3loader.checkpoint.protocol.session import Identity, Session, open_session
from s3loader.errors import CheckpointError, FormatError, IncompleteCheckpointError, S3LoaderError

__all__ = ["Box", "Rendezvous", "meet", "shares"]


class Box(NamedTuple):
    """What a rank has: a box of a tensor, or a whole value."""

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    size: int
    """Bytes, as a measure of the work."""


class Rendezvous(NamedTuple):
    """What the ranks have agreed on."""

    attempt: Attempt
    expected: Root
    """The step's root before."""
    own: list[int]
    """Which of its boxes this rank writes."""


def meet(manager: CheckpointManager, identity: Identity, step: int | None, boxes: Sequence[Box]) -> Rendezvous:
    """Agree with the other ranks, which call this too, and as often.

    Args:
        manager: Of the run.
        identity: Which rank of which job this is.
        step: Which step; None: the one after the newest.
        boxes: What this rank has.

    Raises:
        ConfigError: several ranks, and no name for the job.
        StepExistsError: the step is committed already.
        IncompleteCheckpointError: a rank has failed, or did not come in time.
    """
    session = open_session(manager.run, identity, manager.run.survey, manager.options.deadline)
    attempt_id = session.next_attempt()
    if session.identity.rank:
        return _join(manager, session, attempt_id, boxes)
    key = layout.begin_key(attempt_id)
    try:
        step = manager.next_step() if step is None else step
        attempt = Attempt(manager.run, session, step, attempt_id, manager.options.deadline)
        expected = expect_free(attempt, replace=False)
    except S3LoaderError as error:
        why = f"{type(error).__name__}: {error.message}"
        manager.run.put(key, records.encode(BeginRecord(format=records.FORMAT, step=step or 0, generation=0, error=why)))
        raise
    begin = BeginRecord(format=records.FORMAT, step=step, generation=expected.generation)
    manager.run.put(key, records.encode(begin))
    try:
        own = _divide(attempt, boxes)
    except S3LoaderError as error:
        tell_failure(attempt, f"{type(error).__name__}: {error.message}")
        raise
    return Rendezvous(attempt, expected, own)


def _join(manager: CheckpointManager, session: Session, attempt_id: str, boxes: Sequence[Box]) -> Rendezvous:
    run, deadline = manager.run, manager.options.deadline
    key = layout.begin_key(attempt_id)
    polling = Polling(deadline)
    while (found := run.read(key, BeginRecord)) is None:
        if polling.over:
            session.check_fence()
            raise IncompleteCheckpointError(
                f"rank 0 did not begin its save within {deadline:.0f} s",
                url=f"{run.store.url}/{key}",
                missing=[0],
                hint="every rank must save, in the same order; world_size= tells how many they are" + session.identity.way_out,
            )
        polling.pause()
    begin = found[0]
    if begin.error:
        raise IncompleteCheckpointError(
            f"rank 0 could not begin the save: {begin.error}",
            url=run.store.url,
            missing=[0],
            hint="see the error that rank 0 raised",
        )
    attempt = Attempt(run, session, begin.step, attempt_id, deadline)
    _tell(attempt, boxes)
    _await(attempt, [attempt.prefix + layout.SHARES])
    told = _read(attempt, attempt.prefix + layout.SHARES, SharesRecord)
    own = told.ranks[attempt.rank] if attempt.rank < len(told.ranks) else [-1]
    if not all(0 <= place < len(boxes) for place in own):
        raise FormatError(
            f"{layout.SHARES} gives rank {attempt.rank} what it does not have",
            url=f"{run.store.url}/{attempt.prefix}{layout.SHARES}",
            hint="every rank must save the same items; save again",
        )
    expected = Root(begin.step, "absent", generation=begin.generation)
    return Rendezvous(attempt, expected, own)


def _tell(attempt: Attempt, boxes: Sequence[Box]) -> None:
    rows = [(box.name, list(box.offset), list(box.shape), box.size) for box in boxes]
    record = PlanRecord(format=records.FORMAT, rank=attempt.rank, boxes=rows)
    attempt.run.put(attempt.prefix + layout.plan_id(attempt.rank), records.encode(record))


def _divide(attempt: Attempt, boxes: Sequence[Box]) -> list[int]:
    keys = [attempt.prefix + layout.plan_id(rank) for rank in range(1, attempt.world)]
    _await(attempt, keys)
    plans = [list(boxes)]
    for key in keys:
        told = _read(attempt, key, PlanRecord)
        plans.append([Box(name, tuple(offset), tuple(shape), size) for name, offset, shape, size in told.boxes])
    divided = shares(plans)
    record = SharesRecord(format=records.FORMAT, ranks=divided)
    attempt.run.put(attempt.prefix + layout.SHARES, records.encode(record))
    return divided[0]


def shares(plans: Sequence[Sequence[Box]]) -> list[list[int]]:
    """Who writes what, so that everything is written once: of each rank the places in its list.

    What one rank has alone is its own; then the rest, the largest first, each to the rank with the least to write.

    Args:
        plans: What each rank has.
    """
    holders: dict[tuple[str, tuple[int, ...], tuple[int, ...]], dict[int, int]] = {}
    sizes: dict[tuple[str, tuple[int, ...], tuple[int, ...]], int] = {}
    for rank, plan in enumerate(plans):
        for place, box in enumerate(plan):
            holders.setdefault(box[:3], {}).setdefault(rank, place)
            sizes[box[:3]] = box.size
    loads = [0] * len(plans)
    result: list[list[int]] = [[] for _ in plans]
    for what in sorted(holders, key=lambda what: (len(holders[what]) > 1, -sizes[what], what)):
        rank = min(holders[what], key=lambda rank: (loads[rank], rank))
        loads[rank] += sizes[what] + 1
        result[rank].append(holders[what][rank])
    return [sorted(places) for places in result]


def _await(attempt: Attempt, keys: Sequence[str]) -> None:
    polling = Polling(attempt.deadline)
    while True:
        listed = files_of(attempt)
        missing = [key for key in keys if key not in listed]
        if not missing:
            return
        expect_no_failure(attempt, listed)
        if polling.over:
            attempt.session.check_fence()
            ranks = [0] if attempt.rank else [keys.index(key) + 1 for key in missing]
            raise IncompleteCheckpointError(
                f"step {attempt.step}: ranks {ranks} did not say what they have within {attempt.deadline:.0f} s",
                url=f"{attempt.run.store.url}/{missing[0]}",
                missing=ranks,
                hint="every rank must save, in the same order; world_size= tells how many they are"
                + attempt.session.identity.way_out,
            )
        polling.pause()


def _read(attempt: Attempt, key: str, kind: type[Record]) -> Record:
    found = attempt.run.read(key, kind)
    if found is None:
        raise CheckpointError(
            f"{key} was there and is gone",
            url=f"{attempt.run.store.url}/{key}",
            hint="another process deletes in this run while it is saved to",
        )
    return found[0]
