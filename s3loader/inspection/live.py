"""What the files say that the loaders of a running job write: by rank, and all together."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from s3loader.errors import SourceNotFoundError
from s3loader.loader.stats import EVERY, FORMAT

__all__ = ["JobView", "RankView", "read_job"]

_WORK: Final = ("wait_network", "wait_cache", "cut", "decode", "plan", "consumer")
_SILENT: Final = 5 * EVERY
_OLD: Final = 3600.0


@dataclass(frozen=True, slots=True)
class RankView:
    """The loaders of one rank."""

    rank: int
    processes: int
    """That deliver batches: the workers."""
    state: str
    """``running``, ``done``, ``stopped``, ``failed``; ``silent``: nothing was delivered for a while."""
    epoch: int
    delivered: int
    """Batches of this epoch."""
    steps: int
    """Batches of this epoch, all of them."""
    samples: int
    """Of this epoch."""
    samples_s: float
    """Now: over the last second or so; 0 where nothing is delivered any more."""
    mb_s: float
    """Used bytes."""
    fetched_mb_s: float
    network: float
    """Share of the time that was waited for the store."""
    decode: float
    """Share that went into decoding, checksums and slicing."""
    consumer: float
    """Share that went into the training step: data was ready."""
    repeated: int
    """Requests that were sent again."""
    errors: int
    """Requests that failed, also where a later try succeeded."""
    skipped: int
    """Samples that were left out or replaced."""
    age: float
    """Seconds since the last batch that was told of."""
    last_error: str | None


@dataclass(frozen=True, slots=True)
class JobView:
    """All ranks, and their sum."""

    folder: str
    dataset: str
    ranks: tuple[RankView, ...]
    samples: int
    samples_s: float
    mb_s: float
    repeated: int
    errors: int
    skipped: int
    unreadable: int
    """Files of the folder that are no counters."""

    @property
    def over(self) -> bool:
        """Whether every loader has ended."""
        return bool(self.ranks) and all(rank.state not in ("running", "silent") for rank in self.ranks)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "over": self.over}


def read_job(folder: str, *, now: float | None = None, old: float = _OLD) -> JobView:
    """What the loaders have written into `folder`.

    Args:
        folder: As ``S3LOADER_STATS_DIR`` says.
        now: Seconds since 1970; default: the clock's.
        old: Files that were not written for so many seconds are of another job.

    Raises:
        SourceNotFoundError: there is no such folder.
    """
    if not os.path.isdir(folder):
        raise SourceNotFoundError(
            "there is no such folder", op="read", url=folder, hint="start the job with S3LOADER_STATS_DIR set to a folder"
        )
    now = time.time() if now is None else now
    found: list[Mapping[str, Any]] = []
    unreadable = 0
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".json"):
            continue
        told = _told(os.path.join(folder, name))
        if told is None:
            unreadable += 1
        elif now - told["time"] <= old:
            found.append(told)
    worlds = {told["dataset"]: told["world_size"] for told in sorted(found, key=lambda told: float(told["time"]))}
    found = [told for told in found if told["world_size"] == worlds[told["dataset"]]]  # not of a job that was larger
    by_rank: dict[int, list[Mapping[str, Any]]] = {}
    for told in found:
        by_rank.setdefault(told["rank"], []).append(told)
    ranks = tuple(_rank(rank, some, now) for rank, some in sorted(by_rank.items()))
    datasets = sorted({str(told["dataset"]) for told in found})
    return JobView(
        folder,
        ", ".join(datasets[:3]) + (" ..." if len(datasets) > 3 else ""),
        ranks,
        sum(rank.samples for rank in ranks),
        sum(rank.samples_s for rank in ranks),
        sum(rank.mb_s for rank in ranks),
        sum(rank.repeated for rank in ranks),
        sum(rank.errors for rank in ranks),
        sum(rank.skipped for rank in ranks),
        unreadable,
    )


def _told(path: str) -> Mapping[str, Any] | None:
    """The counters in a file; None where it holds none."""
    try:
        with open(path, "rb") as file:
            told = json.load(file)
        if told["format"] != FORMAT or told["version"] != 1:
            return None
        kinds = {"rank": int, "epoch": int, "delivered": int, "steps": int, "repeated": int, "errors": int}
        kinds |= {"samples": int, "quarantined": int}
        right = all(type(told[name]) is kind for name, kind in kinds.items())
        right = right and isinstance(told["time"], (int, float)) and isinstance(told["world_size"], int)
        right = right and all(isinstance(told["rates"][name], (int, float)) for name in (*_WORK, "samples", "bytes_used"))
        return told if right and "bytes_fetched" in told["rates"] and isinstance(told["state"], str) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _rank(rank: int, some: Sequence[Mapping[str, Any]], now: float) -> RankView:
    last = max(told["time"] for told in some)
    newest = max(told["epoch"] for told in some)
    active = [told for told in some if told["state"] == "running"]
    current = [told for told in active if now - told["time"] <= _SILENT]
    # a loader that stays in one epoch behind the others of its rank belongs to the epoch before
    of_epoch = [told for told in some if told["epoch"] == newest]
    work = {name: sum(told["rates"][name] for told in current) for name in _WORK}
    total = sum(work.values()) or 1.0
    errors = [told.get("last_error") for told in some if told.get("last_error")]
    states = [told["state"] for told in some]
    if active:
        state = "running" if current else "silent"
    else:
        state = next((name for name in ("failed", "stopped") if name in states), "done")
    return RankView(
        rank,
        len(of_epoch),
        state,
        newest,
        sum(told["delivered"] for told in of_epoch),
        sum(told["steps"] for told in of_epoch),
        sum(told["samples"] for told in of_epoch),
        sum(told["rates"]["samples"] for told in current),
        sum(told["rates"]["bytes_used"] for told in current) / 1e6,
        sum(told["rates"]["bytes_fetched"] for told in current) / 1e6,
        work["wait_network"] / total,
        (work["cut"] + work["decode"] + work["plan"] + work["wait_cache"]) / total,
        work["consumer"] / total,
        sum(told["repeated"] for told in some),
        sum(told["errors"] for told in some),
        sum(told["quarantined"] for told in some),
        max(0.0, now - last),
        str(errors[-1])[:300] if errors else None,
    )
