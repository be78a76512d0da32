"""One incarnation of a job: its epoch (the writer fence), and how its ranks find each other through the store.

Rank 0 takes the next epoch number by creating its object; the nonce in it makes the attempt ids
that every rank derives by itself. A job that finds a higher epoch than its own has been superseded.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import EpochRecord
from s3loader.checkpoint.protocol.patience import Patience
from s3loader.checkpoint.protocol.run import Run
from s3loader.errors import ConfigError, FencedError, IncompleteCheckpointError

_log = logging.getLogger("s3loader.checkpoint")
_EPOCHS_KEPT = 16

__all__ = ["Identity", "Session", "identify", "open_session"]


@dataclass(frozen=True, slots=True)
class Identity:
    """Which process of which job this is."""

    rank: int = 0
    world: int = 1
    job: str = ""
    """The same on every rank of one incarnation, and never the same again; only needed where `world` > 1."""

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


def identify(environ: Mapping[str, str]) -> str:
    """A job's name from its launcher's variables: torchrun's run id, or Slurm's job and step; empty where there is none.

    The restart count is part of it: a restarted job is another incarnation.
    """
    run = environ.get("TORCHELASTIC_RUN_ID", "none")
    if run != "none":
        return f"torchelastic/{run}/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if "SLURM_JOB_ID" in environ:
        parts = (environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"))
        return "slurm/" + "/".join(parts)
    return ""


class Session:
    """What this process knows of its incarnation."""

    def __init__(self, run: Run, identity: Identity, record: EpochRecord) -> None:
        self.run, self.identity, self.record = run, identity, record
        self.epoch, self.nonce, self.resume_step = record.epoch, record.nonce, record.resume_step
        self.pid = os.getpid()
        self._saves = 0

    def next_attempt(self) -> str:
        """Id of the next save. Ranks that save in the same order get the same ids."""
        self._saves += 1
        return layout.attempt_id(self.epoch, self._saves, self.nonce)

    def check_fence(self) -> None:
        """Make sure that no newer incarnation has begun.

        Raises:
            FencedError: one has.
        """
        newest = self.run.newest_epoch(after=self.epoch)
        if newest > self.epoch:
            raise FencedError(
                f"a newer job (epoch {newest}) has taken over this run from epoch {self.epoch}",
                url=self.run.store.url,
                epoch=newest,
                hint="this process should end; restart it to continue from the newest checkpoint",
            )


def open_session(run: Run, identity: Identity, survey: Callable[[], tuple[int | None, list[int]]], deadline: float) -> Session:
    """Begin (rank 0) or join (others) the incarnation.

    Args:
        run: Where.
        identity: Who.
        survey: Asked by rank 0 for the step that all ranks resume from, and for newer ones that were begun and not committed.
        deadline: Seconds that other ranks wait for rank 0.

    Raises:
        ConfigError: several ranks, and no `Identity.job`.
        IncompleteCheckpointError: rank 0 did not begin it in time.
    """
    if identity.world > 1 and not identity.job:
        raise ConfigError(
            "several ranks, but no name for this incarnation of the job",
            hint="pass job=..., the same on all ranks and new at every start (torchrun --rdzv-id and Slurm give one)",
        )
    if identity.rank:
        return Session(run, identity, _join(run, identity, deadline))
    step, unfinished = survey()
    nonce = secrets.token_hex(4)
    while True:
        epoch = run.newest_epoch() + 1
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
            return Session(run, identity, record)


def _forget_old(run: Run, epoch: int) -> None:
    """Now and then, drop the objects of epochs long gone: only the newest one fences."""
    if epoch % _EPOCHS_KEPT:
        return
    old = [entry.key for entry in run.store.list(layout.CONTROL + "epoch-") if entry.key < layout.epoch_key(epoch)]
    for failure in run.store.delete_many(old):
        _log.info("an old epoch could not be deleted: %s", failure.error)


def _join(run: Run, identity: Identity, deadline: float) -> EpochRecord:
    patience = Patience(deadline, longest=1.0)
    seen: set[int] = set()
    while True:
        for entry in reversed(list(run.store.list(layout.CONTROL + "epoch-"))):
            epoch = layout.epoch_of(entry.key)
            if epoch is None or epoch in seen:
                continue
            found = run.get(entry.key)
            if found is None:
                continue
            record = records.decode(found[0], EpochRecord, entry.key)
            seen.add(epoch)
            if record.job == identity.job:
                if record.world != identity.world:
                    raise ConfigError(
                        f"rank {identity.rank} counts {identity.world} ranks, rank 0 {record.world}",
                        hint="give every rank the same world_size=",
                    )
                return record
        if patience.over:
            raise IncompleteCheckpointError(
                f"rank 0 of job {identity.job!r} did not begin within {deadline:.0f} s",
                url=run.store.url,
                missing=[0],
                hint="rank 0 must save or restore too, with the same job=; CheckpointOptions(deadline=...) if it is slow",
            )
        patience.pause()
