"""Commit of an attempt: from durable data to a published root, on one rank or many."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import Failure, Part
from s3loader.checkpoint.protocol.merge import Merged
from s3loader.checkpoint.protocol.objects import JSON
from s3loader.checkpoint.protocol.polling import Polling
from s3loader.checkpoint.protocol.roots import Root, lost
from s3loader.checkpoint.protocol.run import Run
from s3loader.checkpoint.protocol.session import Session
from s3loader.checkpoint.threads import at_once
from s3loader.errors import CheckpointError, FencedError, IncompleteCheckpointError, StepExistsError
from s3loader.types import ObjectMeta

__all__ = [
    "Attempt",
    "expect_free",
    "expect_no_failure",
    "files_of",
    "publish",
    "publish_alone",
    "publish_or_wait",
    "put_part",
    "tell_failure",
]

_log = logging.getLogger("s3loader.checkpoint")
_TAKE_OVER = 5.0  # seconds after which another rank publishes what the last arriver has not
_SAY_AFTER = 30.0  # seconds after which it is said which ranks are waited for


@dataclass(frozen=True, slots=True)
class Attempt:
    """One save on one rank."""

    run: Run
    session: Session
    step: int
    id: str
    deadline: float
    """Seconds to wait for other ranks."""

    @property
    def prefix(self) -> str:
        """Folder of its files, with the slash."""
        return f"{layout.step_prefix(self.step)}{self.id}/"

    @property
    def about(self) -> dict[str, str]:
        """Metadata of its data files."""
        return {"s3loader_step": str(self.step), "s3loader_attempt": self.id}

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.session.identity.rank

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.session.identity.world


def expect_free(attempt: Attempt, *, replace: bool) -> Root:
    """The step's root as it is before this attempt.

    Raises:
        StepExistsError: the step is committed, and `replace` was not asked for.
    """
    found = attempt.run.roots.ask(attempt.step)
    while found.state == "tombstone":  # nobody writes over it: the step goes on in its next generation
        attempt.run.tombstones.add({attempt.step: found.generation})
        found = attempt.run.roots.ask(attempt.step)
    if found.state in ("committed", "damaged") and not replace:
        raise StepExistsError(
            f"step {attempt.step} is committed already, by attempt {found.attempt or '(damaged)'}",
            url=f"{attempt.run.store.url}/{found.key}",
            hint="save(..., on_exists='replace') puts a new one in its place in one atomic write; 'skip' leaves it",
        )
    return found


def publish_or_wait(
    attempt: Attempt,
    own: Part,
    expected: Root,
    abandoned: Callable[[], bool],
    join: Callable[[list[Any]], Any] | None = None,
) -> Root:
    """Publish the root, or wait until another rank has.

    Raises:
        IncompleteCheckpointError: ranks did not finish their parts in time; `missing` names them.
        StepExistsError: another attempt is committed.
        FencedError: the step was retired meanwhile, or a newer job has begun.
        CommitUnknownError: whether it was committed could not be found out.
    """
    polling = Polling(attempt.deadline)
    complete_since: float | None = None
    first, warned = True, False
    while True:
        listed = _listing(attempt.run, attempt.prefix)
        missing = [r for r in range(attempt.world) if attempt.prefix + layout.part_id(r) not in listed]
        if not missing:
            now = time.monotonic()
            complete_since = complete_since or now
            if first or attempt.rank == 0 or now - complete_since > _TAKE_OVER:
                _expect_wanted(attempt, abandoned)
                return _publish(attempt, own, expected, listed, join)
        first = False
        expect_no_failure(attempt, listed)
        found = attempt.run.roots.at(attempt.step, expected.generation)
        if attempt.id in found.history:
            attempt.run.roots.expect_alive(found)
            return found
        if (found.state, found.etag) != (expected.state, expected.etag):
            attempt.run.roots.expect_alive(found)
            raise lost(found, attempt.run.store.url)
        if polling.over or abandoned():
            attempt.run.roots.expect_alive(found)
            attempt.session.check_fence()
            raise IncompleteCheckpointError(
                f"step {attempt.step} was not committed within {attempt.deadline:.0f} s: "
                + (f"ranks {missing} have not finished" if missing else "no rank published it"),
                url=attempt.run.store.url,
                missing=missing,
                hint="see what the ranks named raised; CheckpointOptions(deadline=...) where they are only slow"
                + attempt.session.identity.way_out,
            )
        if missing and not warned and polling.waited > _SAY_AFTER:
            warned = True
            _log.warning(
                "step %d waits for ranks %s, at most %.0f s%s",
                attempt.step,
                missing,
                attempt.deadline,
                attempt.session.identity.way_out,
            )
        polling.pause()


def _expect_wanted(attempt: Attempt, abandoned: Callable[[], bool]) -> None:
    if abandoned():
        raise CheckpointError(
            f"step {attempt.step} was abandoned before it was committed",
            hint="finish(seconds) was not long enough for it; the step before is untouched",
        )


def publish_alone(attempt: Attempt, own: Part, expected: Root, abandoned: Callable[[], bool]) -> Root:
    """Write the part of the only rank, and publish it: nobody needs to see the part before the rest.

    Raises: as `publish`, and CheckpointError where it was abandoned.
    """
    _expect_wanted(attempt, abandoned)
    return _publish(attempt, own, expected, None, tell=lambda: put_part(attempt, own))


def put_part(attempt: Attempt, own: Part) -> dict[str, tuple[int, str]]:
    """Write this rank's part, when its data is durable; returns its size and ETag by its key."""
    key = attempt.prefix + layout.part_id(own.rank)
    data = records.encode(own)
    done = attempt.run.store.put(key, data, content_type=JSON)
    return {key: (len(data), done.etag)}


def tell_failure(attempt: Attempt, reason: str) -> None:
    """Let the other ranks know that this one cannot finish, at once and not at their deadline."""
    record = Failure(format=records.FORMAT, rank=attempt.rank, error=reason)
    attempt.run.put(attempt.prefix + layout.failure_id(attempt.rank), records.encode(record))


def expect_no_failure(attempt: Attempt, listed: Container[str]) -> None:
    """Go on unless ranks have said that they cannot finish.

    Args:
        attempt: Which.
        listed: Keys of its files.

    Raises:
        IncompleteCheckpointError: they have.
    """
    ranks = [rank for rank in range(attempt.world) if attempt.prefix + layout.failure_id(rank) in listed]
    if not ranks:
        return
    key = attempt.prefix + layout.failure_id(ranks[0])
    found = attempt.run.read(key, Failure)
    why = found[0].error if found is not None else "it failed"
    raise IncompleteCheckpointError(
        f"step {attempt.step} cannot be committed: rank {ranks[0]} failed: {why}",
        url=f"{attempt.run.store.url}/{key}",
        missing=ranks,
        hint=f"see what rank {ranks[0]} raised; the step before is untouched, save again",
    )


def files_of(attempt: Attempt) -> dict[str, tuple[int, str]]:
    """Size and ETag of every file of `attempt`, by its key."""
    return _listing(attempt.run, attempt.prefix)


def _listing(run: Run, folder: str) -> dict[str, tuple[int, str]]:
    entries = run.store.list(folder)
    return {entry.key: (entry.size, entry.etag) for entry in entries if isinstance(entry, ObjectMeta)}


def publish(attempt: Attempt, own: Part, expected: Root, join: Callable[[list[Any]], Any] | None = None) -> Root:
    """Publish an attempt whose parts are all there.

    Args:
        attempt: Which.
        own: This rank's part.
        expected: The root as `expect_free` has found it.
        join: Makes one tree of the ranks' trees; by default they must be equal, but for what is per rank.

    Raises:
        IncompleteCheckpointError: they are not.
        StepExistsError: another attempt is committed.
        FencedError: the step was retired meanwhile, or a newer job has begun.
        CommitUnknownError: whether it was committed could not be found out.
    """
    return _publish(attempt, own, expected, None, join)


def _publish(
    attempt: Attempt,
    own: Part,
    expected: Root,
    listed: Mapping[str, tuple[int, str]] | None,
    join: Callable[[list[Any]], Any] | None = None,
    tell: Callable[[], Mapping[str, tuple[int, str]]] = dict,
) -> Root:
    """What does not depend on each other is asked at once: the index is made of the parts, the look for a newer epoch needs
    the data to be complete, and the listings and looks at files tell what the root says of them."""
    run = attempt.run
    others = [rank for rank in range(attempt.world) if rank != own.rank]
    parts = dict(zip(others, at_once(*(partial(_part, attempt, rank) for rank in others)), strict=True))
    merged = Merged([parts.get(rank, own) for rank in range(attempt.world)], join)
    taken = _taken_over(attempt, merged, expected)
    folders = {key.rpartition("/")[0] + "/" for key in taken} | ({attempt.prefix} if listed is None else set())
    sizes, told = dict(listed or {}), dict[str, tuple[int, str]]()
    referred = [f.id for f in merged.index.files if "/" in f.id and f.id not in sizes and f.id not in taken]
    at_once(
        attempt.session.check_fence,
        lambda: run.put(attempt.prefix + layout.INDEX, merged.packed, content_type="application/zstd"),
        lambda: told.update(tell()),
        *(lambda folder=folder: sizes.update(_listing(run, folder)) for folder in sorted(folders)),
        *(lambda key=key: sizes.update({key: _looked_at(run, key)}) for key in referred),
    )
    sizes.update(told)
    if taken - sizes.keys():
        raise _collected(attempt)
    for file in merged.index.files:
        key = file.id if "/" in file.id else attempt.prefix + file.id
        if key not in sizes or sizes[key][0] != file.size:
            there = f"has {sizes[key][0]} bytes" if key in sizes else "is not there"
            raise CheckpointError(
                f"{key} {there}, {file.size} bytes were written",
                url=f"{run.store.url}/{key}",
                hint="another process deletes or writes in this run while it is saved to; save again",
            )
    entries = merged.entries(run.id, sizes, expected.history, taken)
    return run.roots.publish(attempt.step, entries, attempt.id, expected, lambda: _expect_newest(attempt))


def _looked_at(run: Run, key: str) -> tuple[int, str]:
    meta = run.store.head(key)
    return meta.size, meta.etag


def _expect_newest(attempt: Attempt) -> None:
    """After the commit: whether this job still is the newest."""
    try:
        attempt.session.check_fence()
    except FencedError as error:
        raise FencedError(
            f"step {attempt.step} is committed and whole, but {error.message}", url=error.url, committed=True, hint=error.hint
        ) from None


def _taken_over(attempt: Attempt, merged: Merged, expected: Root) -> set[str]:
    """Files that earlier attempts at this step have left, and that the merged parts go on with.

    Raises:
        FencedError: the step has had a root since they were looked at, so they may be deleted at any time: whoever
            deletes writes a root first, and only where there never was one is it certain that nobody has.
    """
    own, listed = layout.step_prefix(attempt.step), {key for key, _ in expected.keys.values()}
    taken = {file.id for file in merged.index.files if file.id.startswith(own)} - listed
    if taken and not expected.never_written:
        raise _collected(attempt)
    return taken


def _collected(attempt: Attempt) -> FencedError:
    return FencedError(
        f"garbage collection has taken what the save of step {attempt.step} went on with",
        url=attempt.run.store.url,
        hint="save it again",
    )


def _part(attempt: Attempt, rank: int) -> Part:
    key = attempt.prefix + layout.part_id(rank)
    found = attempt.run.read(key, Part)
    if found is None:
        raise IncompleteCheckpointError(
            f"{key} is missing",
            url=attempt.run.store.url,
            missing=[rank],
            hint="another process deletes in this run while it is saved to; save again",
        )
    return found[0]
