"""One incarnation of a job: its epoch (the writer fence), and how its ranks find each other through the store.

Rank 0 takes the next epoch number by creating its object; the nonce in it makes the attempt ids
that every rank derives by itself. A job that finds a higher epoch than its own has been superseded.

All managers of a process that write to one run are one incarnation, so they number their saves together and do not fence each
other. Where the job has several ranks it lasts as long as the process, since all ranks must count alike; a process that is
alone looks whether its epoch still is the newest, and begins another one where it is not.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import EpochRecord
from s3loader.checkpoint.protocol.polling import Polling
from s3loader.checkpoint.protocol.retention import later
from s3loader.checkpoint.protocol.run import Run
from s3loader.checkpoint.threads import at_once
from s3loader.errors import ConfigError, FencedError, IncompleteCheckpointError
from s3loader.ranks import Board, board, find_ranks, job_of

_log = logging.getLogger("s3loader.checkpoint")
_EPOCHS_KEPT = 16

__all__ = [
    "Identity",
    "Incarnation",
    "Session",
    "agree",
    "forget",
    "identify",
    "incarnation_of",
    "open_session",
    "under_way",
]


@dataclass(frozen=True, slots=True)
class Identity:
    """Which process of which job this is."""

    rank: int = 0
    world: int = 1
    job: str = ""
    """The same on every rank of one incarnation, and never the same again; only needed where `world` > 1."""
    source: str = ""
    """Where `rank` and `world` were found, if the user did not give them."""

    def __post_init__(self) -> None:
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise ConfigError(
                f"rank {self.rank} of {self.world} ranks", hint="rank= counts from 0, world_size= is the number of ranks"
            )
        if self.world > 99_999:
            raise ConfigError(
                f"{self.world} ranks are more than the key layout has room for",
                hint="at most 99,999 ranks save one checkpoint; let one rank of several save for them",
            )

    @property
    def way_out(self) -> str:
        """What to add to a hint where ranks are missing that were found, not given."""
        if not self.source:
            return ""
        return f"; {self.world} ranks were found in {self.source}: where this process saves alone, give rank=0, world_size=1"


def identify(rank: int | None = None, world: int | None = None, job: str = "") -> Identity:
    """Who this process is: what the user said, else what is found.

    The job's name is that of its launcher; or rank 0 makes one up when the session is opened.

    Raises:
        ConfigError: only one of `rank` and `world` was given, or they do not fit.
    """
    if (rank is None) != (world is None):
        raise ConfigError("rank= and world_size= belong together", hint="give both, or neither")
    if rank is not None and world is not None:
        return Identity(rank, world, job)
    return Identity(*find_ranks()[:2], job, find_ranks().source)


class Incarnation:
    """What all sessions of a process on one run share."""

    def __init__(self, record: EpochRecord) -> None:
        self.record = record
        self.saves = itertools.count(1)
        self.stands_at: int | None = None
        """The step that it has committed, or gone back to, last."""


_incarnations: Final[dict[tuple[int, str, int], Incarnation]] = {}
"""By process id, nonce and rank: a forked child is an incarnation of its own."""
_current: Final[dict[tuple[int, str, Identity], Incarnation]] = {}
"""The last one by process id, run and identity."""
_under_way: Final[dict[str, dict[str, int]]] = {}
"""Steps of this process's saves that have not ended, by run and attempt."""
_opening: Final[dict[tuple[int, str, Identity], threading.Lock]] = {}
_notes: Final[dict[int, itertools.count[int]]] = {}
"""How many notes the processes of a job have left each other, by process id: all count alike."""
_lock = threading.Lock()


def under_way(url: str) -> dict[str, int]:
    """The saves of this process on a run that have not ended: attempt -> step. Whoever begins one adds it."""
    return _under_way.setdefault(url, {})


def forget(saves: dict[str, int], attempt: str) -> None:
    """`attempt` has ended; `saves` is of `under_way`."""
    saves.pop(attempt, None)


def _shared(record: EpochRecord, rank: int) -> Incarnation:
    with _lock:
        return _incarnations.setdefault((os.getpid(), record.nonce, rank), Incarnation(record))


class Session:
    """What this process knows of its incarnation.

    Args:
        run: Where.
        identity: Who.
        record: Of its epoch.
        unfinished: Steps that were begun and not committed; default: as the record says.
    """

    def __init__(self, run: Run, identity: Identity, record: EpochRecord, unfinished: list[int] | None = None) -> None:
        self.run, self.identity, self.record = run, identity, record
        self.epoch, self.nonce, self.resume_step = record.epoch, record.nonce, record.resume_step
        self.unfinished = record.unfinished if unfinished is None else unfinished
        self.pid = os.getpid()
        self.incarnation = _shared(record, identity.rank)

    def next_attempt(self) -> str:
        """Id of the next save. Ranks that save in the same order get the same ids."""
        return layout.attempt_id(self.epoch, next(self.incarnation.saves), self.nonce)

    def check_fence(self) -> None:
        """Make sure that no newer incarnation has begun.

        Raises:
            FencedError: one has.
        """
        newest = self.run.newest_epoch(after=self.epoch)
        if newest <= self.epoch:
            return
        found = self.run.read(layout.epoch_key(newest), EpochRecord)
        other = found[0] if found is not None else None
        who = f", begun by process {other.pid} on {other.host}" if other is not None else ""
        hint = "this process should end; restart it to continue from the newest checkpoint"
        if other is not None and other.job and other.job == self.identity.job:
            hint = f"both call themselves job {other.job!r}: job= must be another one at every start of the job"
        elif self.identity.world == 1:
            hint += "; if both are ranks of one job, tell each: CheckpointManager(..., rank=, world_size=, job=)"
        raise FencedError(
            f"a newer job (epoch {newest}{who}) has taken over this run from epoch {self.epoch}",
            url=self.run.store.url,
            epoch=newest,
            hint=hint,
        )

    def await_discarded(self, step: int, deadline: float) -> None:
        """Return when rank 0 has deleted every step after `step`: none is committed anew without this rank.

        Raises:
            IncompleteCheckpointError: it did not in time.
        """
        polling = Polling(deadline, longest=1.0)
        while left := later(self.run, step):
            if polling.over:
                raise IncompleteCheckpointError(
                    f"rank 0 did not roll back to step {step} within {deadline:.0f} s: step {left[0].step} is still there",
                    url=self.run.store.url,
                    missing=[0],
                    hint=f"every rank must call it, with the same step; see what rank 0 raised{self.identity.way_out}",
                )
            polling.pause()


def open_session(run: Run, identity: Identity, survey: Callable[[], tuple[int | None, list[int]]], deadline: float) -> Session:
    """Begin the incarnation (rank 0), join it (others), or go on with this process's.

    Args:
        run: Where.
        identity: Who; where several ranks have no name for the job, they agree on one through their framework's store.
        survey: Asked by rank 0 for the step that all ranks resume from, and for newer ones that were begun and not committed.
        deadline: Seconds that other ranks wait for rank 0.

    Raises:
        ConfigError: several ranks, and no way to a name of the job.
        IncompleteCheckpointError: rank 0 did not begin it in time.
    """
    key = os.getpid(), run.store.url, identity
    with _lock:
        opening = _opening.setdefault(key, threading.Lock())
    with opening:
        session = _opened(run, identity, _current.get(key), survey, deadline)
        _current[key] = session.incarnation
    return session


def _opened(
    run: Run,
    identity: Identity,
    known: Incarnation | None,
    survey: Callable[[], tuple[int | None, list[int]]],
    deadline: float,
) -> Session:
    if known is not None and identity.world > 1:
        return Session(run, replace(identity, job=known.record.job), known.record)
    named = _named(identity, deadline)
    if named.rank:
        return Session(run, named, _join(run, named, deadline))
    (step, unfinished), newest = at_once(survey, run.newest_epoch)
    if known is not None and newest == known.record.epoch and _is_still(run, known.record):
        return Session(run, named, known.record, unfinished)
    return Session(run, named, _begin(run, named, step, unfinished, newest))


def incarnation_of(run: Run, identity: Identity) -> Incarnation | None:
    """The one that this process has begun or joined, None before that."""
    return _current.get((os.getpid(), run.store.url, identity))


def _is_still(run: Run, record: EpochRecord) -> bool:
    found = run.read(layout.epoch_key(record.epoch), EpochRecord)
    return found is not None and found[0].nonce == record.nonce


def _named(identity: Identity, deadline: float) -> Identity:
    """`identity` with a name for the job that no other start of it has."""
    if identity.world == 1 or identity.job:
        return identity
    launched = job_of(os.environ)
    notes = board(identity.rank, identity.world)
    if notes is not None:  # torchrun's agents may have counted different numbers of restarts: rank 0's name is that of all
        return replace(identity, job=_told(notes, identity, lambda: f"{launched or 'job'}/{secrets.token_hex(8)}", deadline))
    if not launched:
        raise ConfigError(
            "several ranks, but no name for this incarnation of the job",
            hint="pass job=..., the same on all ranks and new at every start; or initialize torch.distributed or "
            "jax.distributed first (torchrun --rdzv-id and Slurm give one, too)" + identity.way_out,
        )
    return replace(identity, job=launched)


def agree(run: Run, identity: Identity, choose: Callable[[], int | None], deadline: float) -> tuple[bool, int | None]:
    """Let rank 0 choose a step for all ranks through their framework's store, without writing anything to the run.

    Returns:
        Whether there is such a store, and the step.

    Raises:
        IncompleteCheckpointError: rank 0 did not choose in time.
    """
    notes = board(identity.rank, identity.world)
    if notes is None:
        return False, None
    step: int | None = _told(notes, identity, choose, deadline)
    return True, step


def _told(notes: Board, identity: Identity, choose: Callable[[], Any], deadline: float) -> Any:
    """What rank 0 chose (JSON), on every rank."""
    with _lock:
        number = next(_notes.setdefault(os.getpid(), itertools.count(1)))
    name = f"s3loader/checkpoint/{number}"
    if identity.rank == 0:
        try:
            value = choose()
        except BaseException as error:
            notes.put(name, json.dumps({"error": f"{type(error).__name__}: {error}"}))
            raise
        notes.put(name, json.dumps({"value": value}))
        return value
    found = notes.get(name, deadline)
    told = json.loads(found) if found is not None else {}
    if "error" in told:
        raise IncompleteCheckpointError(f"rank 0 failed: {told['error']}", missing=[0], hint="see the error that rank 0 raised")
    if found is None:
        raise IncompleteCheckpointError(
            f"rank 0 did not begin to save or restore within {deadline:.0f} s",
            missing=[0],
            hint=f"every rank must, in the same order; CheckpointOptions(deadline=...) if rank 0 is slow{identity.way_out}",
        )
    return told["value"]


def _begin(run: Run, identity: Identity, step: int | None, unfinished: list[int], newest: int) -> EpochRecord:
    nonce = secrets.token_hex(4)
    while True:
        if not newest and step is not None:  # ckpt/ was copied without control/; retention goes by the order of epochs
            newest = max(int(root.facts["epoch"]) for root in run.scan().committed())
        epoch = newest + 1
        record = EpochRecord(
            format=records.FORMAT,
            epoch=epoch,
            nonce=nonce,
            job=identity.job,
            world=identity.world,
            resume_step=step,
            time=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
            unfinished=unfinished,
        )
        if run.create(layout.epoch_key(epoch), records.encode(record)):
            _forget_old(run, epoch)
            return record
        newest = run.newest_epoch()


def _forget_old(run: Run, epoch: int) -> None:
    """Now and then, drop the objects of epochs long gone: only the newest one fences."""
    if epoch % _EPOCHS_KEPT:
        return
    old = [entry.key for entry in run.store.list(layout.CONTROL + "epoch-") if entry.key < layout.epoch_key(epoch)]
    for failure in run.store.delete_many(old):
        _log.info("an old epoch could not be deleted: %s", failure.error)


def _join(run: Run, identity: Identity, deadline: float) -> EpochRecord:
    polling = Polling(deadline, longest=1.0)
    seen: set[int] = set()
    while True:
        for entry in reversed(list(run.store.list(layout.CONTROL + "epoch-"))):
            epoch = layout.epoch_of(entry.key)
            if epoch is None or epoch in seen:
                continue
            found = run.read(entry.key, EpochRecord)
            if found is None:
                continue
            record = found[0]
            seen.add(epoch)
            if record.job == identity.job:
                if record.world != identity.world:
                    raise ConfigError(
                        f"rank {identity.rank} counts {identity.world} ranks, rank 0 {record.world}",
                        hint="give every rank the same world_size=",
                    )
                return record
        if polling.over:
            raise IncompleteCheckpointError(
                f"rank 0 of job {identity.job!r} did not begin within {deadline:.0f} s",
                url=run.store.url,
                missing=[0],
                hint="rank 0 must save or restore too, with the same job=; CheckpointOptions(deadline=...) if it is slow"
                + identity.way_out,
            )
        polling.pause()
