"""What a run did and where its time went."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from s3loader.units import format_duration, format_rate, format_size

__all__ = ["LoaderStats"]


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
