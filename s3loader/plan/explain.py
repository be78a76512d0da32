"""What an epoch costs, before any sample is read: the sum of what each process's planner would read."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from s3loader.plan.budget import Budget
from s3loader.plan.plan import Plan
from s3loader.plan.schedule import Schedule
from s3loader.units import format_size

__all__ = ["DryRun", "Explanation", "explain_runs"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What one epoch costs, over all ranks. Prints as a table."""

    order: str
    samples: int
    """Positions of the epoch."""
    bytes_used: int
    """Content of the samples."""
    bytes_fetched: int
    """As they are stored."""
    requests: int
    """GETs for samples; indexes come on top, one each."""
    steps: int
    """Batches per rank."""
    readers: float
    """Processes that read each block, on average; 1.0 where no blocks are kept."""
    resident: int
    """Most bytes that a process keeps between batches."""
    peak: int
    """With what is fetched ahead."""
    whole_blocks: bool
    """Whether blocks of the order are fetched whole and kept while their windows last."""
    price: float
    """Of the requests and bytes, in the unit of the prices given."""
    notes: tuple[str, ...]
    exact: bool = True
    """Whether all reads of the epoch were planned; else requests and bytes were extrapolated from some of them."""
    strategy: str = "blocks"
    """How samples are fetched: a `Strategy`."""
    memory_limit: int = 0
    """What a process may hold: its share of `LoaderOptions.memory_limit`."""

    @property
    def amplification(self) -> float:
        """Bytes fetched per byte used."""
        return self.bytes_fetched / self.bytes_used if self.bytes_used else 1.0

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line."""
        about = "" if self.exact else "about "
        return [
            ("order", self.order),
            ("samples", f"{self.samples:,}"),
            ("batches per rank", f"{self.steps:,}"),
            ("content", about + format_size(self.bytes_used)),
            ("fetched", f"{about}{format_size(self.bytes_fetched)} ({self.amplification:.2f}x)"),
            ("requests", f"{about}{self.requests:,} GET"),
            ("way", _WAYS[self.strategy]),
            ("readers per block", f"{self.readers:.2f}"),
            ("kept per process", format_size(self.resident)),
            ("peak per process", format_size(self.peak)),
            ("limit per process", format_size(self.memory_limit)),
            ("price of an epoch", f"{self.price:,.4f}"),
            *(("note", note) for note in self.notes),
        ]

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        return "\n".join(f"{label:<{width}}  {value}" for label, value in self.rows())

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>"
            for label, value in self.rows()
        )
        return f"<table>{cells}</table>"


_WAYS = {
    "whole": "all that is needed, once, in large ranges, kept until it was used",
    "blocks": "whole blocks, kept while open",
    "samples": "samples of a look-ahead, neighbours together",
}


@dataclass(slots=True, eq=False)
class DryRun:
    """What one process's planner would read."""

    budget: Budget
    open_bytes: int
    """Of the blocks that its order has open side by side."""
    samples: int
    """Its samples of the whole epoch."""
    planned: int = 0
    """Of them, those that were planned."""
    requests: float = 0
    bytes_fetched: float = 0
    bytes_used: int = 0
    blocks: set[tuple[int, int]] = field(default_factory=set)
    """Of the blocks it opened, first sample and the position until which it is open."""
    unreadable: set[int] = field(default_factory=set)
    """Shards whose index cannot be had."""


def explain_runs(
    plan: Plan,
    schedule: Schedule,
    runs: Sequence[DryRun],
    *,
    exact: bool,
    epoch_samples: int,
    price_per_1000_gets: float,
    price_per_gb: float,
) -> Explanation:
    """Sum up dry runs of all processes, or of some; what was not planned is extrapolated.

    Args:
        plan: The order.
        schedule: How the epoch is cut into batches.
        runs: One for each process that was looked at.
        exact: Every read of every process was planned, from the indexes of the shards.
        epoch_samples: Samples that all processes together take.
        price_per_1000_gets: Of the store.
        price_per_gb: Of traffic.
    """
    planned = sum(run.planned for run in runs)
    scale = 1.0 if exact else epoch_samples / max(1, planned)
    requests = round(scale * sum(run.requests for run in runs))
    fetched = round(scale * sum(run.bytes_fetched for run in runs))
    used = round(scale * sum(run.bytes_used for run in runs))
    distinct = len(set().union(*(run.blocks for run in runs))) if runs else 0
    readers = sum(len(run.blocks) for run in runs) / distinct if distinct else 1.0
    strategies = [run.budget.strategy for run in runs]
    strategy = max(set(strategies), key=strategies.count) if strategies else "samples"
    notes: list[str] = []
    if not exact:
        notes.append(
            f"extrapolated from {planned:,} of {epoch_samples:,} samples with average sizes: requests and bytes are estimates"
        )
    too_large = [run.open_bytes for run in runs if run.budget.strategy == "samples" and run.open_bytes > run.budget.resident]
    if too_large:
        notes.append(
            f"open blocks would fill {format_size(max(too_large))}: samples are fetched one by one; give a larger"
            " memory_limit, more workers, or fewer lanes"
        )
    if readers > 1.05:
        notes.append(
            f"each block is read by {readers:.1f} processes: they do not keep to whole lanes. A number of workers that"
            " divides the lanes per rank reads each block once"
        )
    if fetched > 2 * used > 0 and strategy == "samples":
        notes.append('small samples in random order cost many requests; shuffle="block" costs few')
    if schedule.tail == "drop" and schedule.steps() * schedule.stride < schedule.size:
        notes.append(f"{schedule.size - schedule.steps() * schedule.stride} samples of each epoch are dropped at its end")
    unreadable = len(set().union(*(run.unreadable for run in runs))) if runs else 0
    if unreadable:
        notes.append(f"{unreadable:,} shards have no index that can be used: their samples fail, and are not counted")
    return Explanation(
        order=_describe(plan.spec),
        samples=plan.size,
        bytes_used=used,
        bytes_fetched=fetched,
        requests=requests,
        steps=schedule.steps(),
        readers=readers,
        resident=max((run.budget.resident for run in runs), default=0),
        peak=max((run.budget.resident + run.budget.in_flight for run in runs), default=0),
        whole_blocks=strategy == "blocks",
        price=requests / 1000 * price_per_1000_gets + fetched / 1e9 * price_per_gb,
        notes=tuple(notes),
        exact=exact,
        strategy=strategy,
    )


def _describe(spec: Any) -> str:
    if "mix" in spec:
        return f"mixture {':'.join(map(str, spec['quotas']))} of " + ", ".join(_describe(one) for one in spec["mix"])
    if spec["shuffle"] != "block":
        return f"{spec['shuffle']}"
    return (
        f"block: blocks of {spec['block']:,}, windows of {spec['window']} blocks, {spec['lanes']:,} lanes,"
        f" {spec['chunk']:,} at a time"
    )
