"""What a run did and where its time went; and what the loaders of a running job tell of it, in files that `s3loader top` reads:
one per dataset, rank and worker, replaced once a second, and by the next epoch's.

With ``S3LOADER_STATS_DIR=/shared/folder`` in the environment every iteration of a `Loader`, in every process and worker, writes
its counters there when it delivers a batch. Without it an iteration pays one look at the environment.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Sized
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from s3loader import events
from s3loader.loader.dataset import Dataset
from s3loader.plan import Topology
from s3loader.units import format_duration, format_rate, format_size

__all__ = ["EVERY", "FORMAT", "VARIABLE", "LiveStats", "LoaderStats", "live_stats"]


@dataclass(slots=True)
class LoaderStats:
    """Counters of one loader in one process. Times in seconds, sizes in bytes.

    Time between two batches is shared out: `wait_network` (no bytes yet), `wait_cache` (reading and
    writing the disk cache), `cut` (checksums, slicing,
    decompression), `decode` (decoders, transform, collate), `plan` (order and index lookups), `consumer` (your code).
    """

    samples: int = 0
    batches: int = 0
    bytes_used: int = 0
    """Content of delivered members."""
    bytes_fetched: int = 0
    requests: int = 0
    refetched: int = 0
    """Ranges fetched a second time because a checksum did not fit."""
    hedged: int = 0
    """Ranges asked for a second time because they took long."""
    connections: int = 0
    """Requests that may be under way at a time, as measured last; 0: not measured."""
    first_byte: float = 0.0
    """Seconds to the first byte of an answer where nothing is in the way; 0: not measured."""
    cache_hits: int = 0
    """Ranges that came from the disk cache."""
    shared: int = 0
    """Of these, ranges that another process of the node fetched at the same moment."""
    memory_limit: int = 0
    """Bytes of samples that this process may hold: its share of `LoaderOptions.memory_limit`; 0 before the first iteration."""
    skipped: int = 0
    replaced: int = 0
    wait_network: float = 0.0
    wait_cache: float = 0.0
    cut: float = 0.0
    decode: float = 0.0
    plan: float = 0.0
    consumer: float = 0.0
    first_batch: float | None = None
    """Seconds from the start of the iteration to its first batch."""
    engine: str = ""
    """What fetches: `ObjectStore.engine`; empty before the first iteration."""
    driver: str = ""
    """How: ``"pump"`` (while you wait) or ``"threads"`` (beside your code)."""
    started: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def amplification(self) -> float:
        """Bytes fetched per byte used."""
        return self.bytes_fetched / self.bytes_used if self.bytes_used else 0.0

    @property
    def verdict(self) -> str:
        """One line: what the run waited for most."""
        shares = {
            "network-bound: it waits for the store": self.wait_network,
            "disk-bound: it reads and writes the cache": self.wait_cache,
            "CPU-bound: it decodes": self.decode,
            "CPU-bound: it verifies and cuts samples": self.cut,
            "CPU-bound: it plans and looks up indexes": self.plan,
            "consumer-bound: data was ready before you asked": self.consumer,
        }
        total = sum(shares.values())
        if not total:
            return "nothing has run yet"
        name, most = max(shares.items(), key=lambda item: item[1])
        return f"{name} ({100 * most / total:.0f} % of {format_duration(total)})"

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, and the verdict."""
        values = asdict(self)
        del values["started"]
        return {**values, "amplification": round(self.amplification, 3), "verdict": self.verdict}

    def add(self, other: LoaderStats) -> None:
        """Add another process's counters."""
        for name in self.__slots__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name in ("engine", "driver"):
                setattr(self, name, mine or theirs)
            elif name in ("connections", "first_byte"):
                setattr(self, name, max(mine, theirs))
            elif name == "first_batch":
                self.first_batch = theirs if mine is None else mine if theirs is None else min(mine, theirs)
            elif name != "started":
                setattr(self, name, mine + theirs)

    def __str__(self) -> str:
        rate = self.bytes_used / max(
            1e-9, self.wait_network + self.wait_cache + self.cut + self.decode + self.plan + self.consumer
        )
        return (
            f"{self.samples} samples, {format_size(self.bytes_used)} used of {format_size(self.bytes_fetched)} fetched"
            f" in {self.requests} requests, {format_rate(rate)}; {self.verdict}"
        )


# -- what a running loader tells -------------------------------------------------------------------

VARIABLE: Final = "S3LOADER_STATS_DIR"
FORMAT: Final = "s3loader-stats"
EVERY: Final = 1.0
"""Seconds between two writes."""
_WAITS: Final = ("wait_network", "wait_cache", "cut", "decode", "plan", "consumer")

_log = logging.getLogger("s3loader.loader")


def live_stats(
    dataset: Dataset, topology: Topology, stats: LoaderStats, quarantine: Sized, *, epoch: int, steps: int
) -> LiveStats | None:
    """What writes the counters of an iteration that begins; None where nobody asked for it.

    Args:
        dataset, topology, stats, quarantine: Of the loader.
        epoch: The epoch that is delivered.
        steps: Batches that this process will deliver of it.
    """
    folder = os.environ.get(VARIABLE)
    return LiveStats(folder, dataset, topology, stats, quarantine, epoch, steps) if folder else None


class LiveStats:
    """The counters of one iteration, in a file below `folder`, which is made where it is missing."""

    def __init__(
        self,
        folder: str,
        dataset: Dataset,
        topology: Topology,
        stats: LoaderStats,
        quarantine: Sized,
        epoch: int,
        steps: int,
    ) -> None:
        self._stats = stats
        host = socket.gethostname()
        digest = hashlib.sha256(dataset.name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        name = f"{host}-{digest}-rank{topology.rank}-worker{topology.worker}"
        self._path: str | None = os.path.join(folder, re.sub(r"[^\w.-]", "_", name) + ".json")
        self._facts: dict[str, Any] = {
            "format": FORMAT,
            "version": 1,
            "host": host,
            "pid": os.getpid(),
            "rank": topology.rank,
            "world_size": topology.world_size,
            "worker": topology.worker,
            "workers": topology.workers,
            "dataset": dataset.name,
            "epoch": epoch,
            "steps": steps,
            "began": time.time(),
        }
        self._delivered = 0
        self._before = self._stats.samples
        self._repeated = self._errors = 0
        self._last_error: str | None = None
        self._seen = self._figures()
        self._seen_at = self._written = time.perf_counter()
        self._rates: dict[str, float] = {}
        self._quarantined = quarantine
        self._urls = dataset.store_urls
        self._unsubscribe = events.subscribe(self._hook)
        self._write("running")

    def batch(self) -> None:
        """A batch is delivered."""
        self._delivered += 1
        if self._delivered == 1 or time.perf_counter() - self._written >= EVERY:
            self._write("running")

    def close(self, error: BaseException | None, *, whole: bool) -> None:
        """The iteration has ended: all of it was delivered, an error was raised, or nobody wanted more."""
        self._unsubscribe()
        failed = error is not None and not isinstance(error, GeneratorExit)
        if failed:
            self._last_error = f"{type(error).__name__}: {getattr(error, 'message', error)}"
        self._write("failed" if failed else "done" if whole else "stopped")

    def _hook(self, event: events.OpEvent) -> None:
        if event.url.startswith(self._urls):
            self._repeated += event.attempt > 1
            if event.error is not None:
                self._errors += 1
                self._last_error = event.error

    def _figures(self) -> dict[str, float]:
        stats = self._stats
        found = {name: getattr(stats, name) for name in _WAITS}
        return {"samples": stats.samples, "bytes_used": stats.bytes_used, "bytes_fetched": stats.bytes_fetched, **found}

    def _write(self, state: str) -> None:
        if self._path is None:
            return
        now = time.perf_counter()
        if now - self._seen_at >= 0.5 * EVERY or not self._rates:
            figures = self._figures()
            span = max(1e-9, now - self._seen_at)
            self._rates = {name: (value - self._seen[name]) / span for name, value in figures.items()}
            self._seen, self._seen_at = figures, now
        self._written = now
        told = {
            **self._facts,
            "time": time.time(),
            "state": state,
            "delivered": self._delivered,
            "samples": self._stats.samples - self._before,
            "stats": self._stats.as_dict(),
            "rates": self._rates,
            "repeated": self._repeated,
            "errors": self._errors,
            "last_error": self._last_error,
            "quarantined": len(self._quarantined),
        }
        temporary = f"{self._path}.tmp"
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(told, file)
            os.replace(temporary, self._path)
        except OSError as error:  # an observer must not break what it observes
            _log.warning("%s: the loader's counters cannot be written, and are not any more: %s", self._path, error)
            self._path = None
