"""What an epoch of a plan costs, before anything is read: an estimate from averages, by arithmetic alone."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from s3loader.plan.budget import Budget
from s3loader.plan.mixture import MixtureOrder
from s3loader.plan.order import BlockOrder, Order
from s3loader.plan.plan import Plan
from s3loader.plan.schedule import Tail
from s3loader.units import KIB, format_size

__all__ = ["Explanation", "explain_plan"]

_LOOK: Final = 1_000_000
"""Steps of all ranks looked at to see who reads which lane."""
_GAP: Final = 256 * KIB


@dataclass(frozen=True, slots=True)
class Explanation:
    """What one epoch costs, over all ranks. Prints as a table."""

    order: str
    samples: int
    bytes_used: int
    """Content of the samples."""
    bytes_fetched: int
    requests: int
    """GETs for samples; indexes come on top, one each."""
    steps: int
    """Batches per rank."""
    readers: float
    """Processes that read each block, on average."""
    resident: int
    """Bytes each process keeps in open blocks (or in a look-ahead)."""
    peak: int
    """With what is fetched ahead."""
    whole_blocks: bool
    """Whether blocks are fetched whole and kept, or samples one by one."""
    price: float
    """Of the requests and bytes, in the unit of the prices given."""
    notes: tuple[str, ...]

    @property
    def amplification(self) -> float:
        """Bytes fetched per byte used."""
        return self.bytes_fetched / self.bytes_used if self.bytes_used else 1.0

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line."""
        return [
            ("order", self.order),
            ("samples", f"{self.samples:,}"),
            ("batches per rank", f"{self.steps:,}"),
            ("content", format_size(self.bytes_used)),
            ("fetched", f"{format_size(self.bytes_fetched)} ({self.amplification:.2f}x)"),
            ("requests", f"{self.requests:,} GET"),
            ("way", "whole blocks, kept while open" if self.whole_blocks else "samples of a look-ahead, neighbours together"),
            ("readers per block", f"{self.readers:.2f}"),
            ("kept per process", format_size(self.resident)),
            ("peak per process", format_size(self.peak)),
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


def lane_readers(order: BlockOrder, batch_size: int, world_size: int, workers: int) -> float:
    """How many processes take from each lane, on average."""
    spec = order.spec
    around = math.lcm(spec.lanes * spec.chunk, batch_size * world_size) // (batch_size * world_size)
    steps = max(1, min(math.lcm(around, workers), _LOOK // world_size))
    k, r = np.divmod(np.arange(steps * world_size, dtype=np.int64), world_size)
    first = (k * world_size + r) * batch_size
    reader = r * workers + k % workers
    pairs = []
    for offset in sorted({*range(0, batch_size, spec.chunk), batch_size - 1}):
        lane = (first + offset) // spec.chunk % spec.lanes
        pairs.append(np.unique(lane * (world_size * workers) + reader))
    both = np.unique(np.concatenate(pairs))
    return len(both) / max(1, len(np.unique(both // (world_size * workers))))


def _random_reads(samples: float, ahead: float, average: float, total: float) -> tuple[float, float]:
    """(requests, bytes) for `samples` read in random order, `ahead` at a time, joined over gaps.

    Gaps between `ahead` random samples in `total` bytes are about exponential with mean ``total / ahead``.
    """
    gap = max(0.0, total / max(1.0, ahead) - average)
    if gap == 0:
        return max(1.0, samples * average / (8 << 20)), samples * average
    alone = math.exp(-_GAP / gap)
    bridged = gap - alone * (_GAP + gap)
    return samples * alone + samples / max(1.0, ahead), samples * (average + bridged)


def explain_plan(
    plan: Plan,
    *,
    batch_size: int,
    world_size: int = 1,
    workers: int = 1,
    tail: Tail = "short",
    memory_limit: int,
    prefetch: int,
    price_per_1000_gets: float = 0.0004,
    price_per_gb: float = 0.0,
    shares: tuple[float, float, float] = (1.0, 1.0, 0.0),
) -> Explanation:
    """Estimate an epoch's requests, bytes, memory and price from average sample sizes.

    Args:
        plan: The plan.
        batch_size: Samples per batch and rank.
        world_size: Ranks.
        workers: Processes per rank.
        tail: See `Schedule`.
        memory_limit: Bytes per process.
        prefetch: Bytes fetched ahead.
        price_per_1000_gets: Of the store (the default is S3 Standard's in us-east-1, in dollars).
        price_per_gb: Of traffic.
        shares: Of a dataset's bytes: those used, those fetched with them; and further ranges per sample.
    """
    used_share, fetched_share, splits = shares
    schedule = plan.schedule(0, batch_size, world_size=world_size, tail=tail)
    whole_average = plan.total_bytes / max(1, plan.samples)
    average, total = whole_average * fetched_share, round(plan.total_bytes * fetched_share)
    notes: list[str] = []
    resident, readers = _resident(plan.order, average, batch_size, world_size, workers)
    budget = Budget.divide(memory_limit, prefetch, open_bytes=resident, total_bytes=total)
    whole = budget.whole_blocks
    ahead = budget.look_ahead / max(1.0, average)
    if whole:
        requests, fetched = _block_reads(plan.order, average, len(plan.counts), readers, world_size * workers)
    else:
        if resident > budget.resident:
            notes.append(
                f"open blocks would fill {format_size(resident)}: samples are fetched one by one; give a larger"
                " memory_limit, more workers, or fewer lanes"
            )
        readers, resident = 1.0, min(budget.resident, total)
        shuffled = plan.spec.get("shuffle", "block") in ("full", "block")
        if shuffled:
            requests, fetched = _random_reads(plan.size, ahead, average, total)
        else:
            runs = plan.size / batch_size if world_size * workers > 1 else total / (8 << 20) + len(plan.counts)
            requests, fetched = runs, plan.size * average
    requests += splits * plan.size * (readers if whole else 1.0)
    used = round(plan.size * whole_average * used_share)
    if whole and readers > 1.05:
        notes.append(
            f"each block is read by {readers:.1f} processes: they do not keep to whole lanes. A number of workers that"
            " divides the lanes per rank reads each block once"
        )
    if fetched > 2 * used > 0 and not whole:
        notes.append('small samples in random order cost many requests; shuffle="block" costs few')
    if tail == "drop" and schedule.steps() * schedule.stride < schedule.size:
        notes.append(f"{schedule.size - schedule.steps() * schedule.stride} samples of each epoch are dropped at its end")
    return Explanation(
        order=_describe(plan.spec),
        samples=plan.size,
        bytes_used=used,
        bytes_fetched=max(used, round(fetched)),
        requests=max(1, round(requests)) if plan.size else 0,
        steps=schedule.steps(),
        readers=readers,
        resident=resident,
        peak=resident + budget.in_flight,
        whole_blocks=whole,
        price=requests / 1000 * price_per_1000_gets + fetched / 1e9 * price_per_gb,
        notes=tuple(notes),
    )


def _blocks_of(order: Order) -> list[BlockOrder]:
    if isinstance(order, MixtureOrder):
        return [part for part in order.orders if isinstance(part, BlockOrder)]
    return [order] if isinstance(order, BlockOrder) else []


def _resident(order: Order, average: float, batch_size: int, world_size: int, workers: int) -> tuple[int, float]:
    """(bytes of the blocks that one process has open, processes per block)."""
    blocks = _blocks_of(order)
    if not blocks:
        return 0, 1.0
    total, weighted = 0.0, 0.0
    for block in blocks:
        mixed = isinstance(order, MixtureOrder)  # its lanes move against those who read them
        readers = float(world_size * workers) if mixed else lane_readers(block, batch_size, world_size, workers)
        lanes = min(block.spec.lanes, math.ceil(block.spec.lanes * readers / (world_size * workers)))
        total += lanes * block.spec.window * block.spec.block * average
        weighted += readers * block.size
    return round(total), weighted / max(1, sum(block.size for block in blocks))


def _block_reads(order: Order, average: float, shards: int, readers: float, processes: int) -> tuple[float, float]:
    requests = fetched = 0.0
    for block in _blocks_of(order):
        spec = block.spec
        in_lanes = block.lane_blocks * spec.lanes
        straddling = min(shards, in_lanes)
        requests += (in_lanes * max(1.0, spec.block * average / (8 << 20)) + straddling) * readers
        # At the end of the epoch a process has the last blocks of its own lanes still open.
        left_in_lanes = in_lanes * spec.block - block.lane_samples
        alone = block.size - in_lanes * spec.block + left_in_lanes * max(0.0, 1 - readers / processes)
        requests += alone / spec.run
        fetched += (in_lanes * spec.block * readers + alone) * average
    return requests, fetched


def _describe(spec: Any) -> str:
    if "mix" in spec:
        return f"mixture {':'.join(map(str, spec['quotas']))} of " + ", ".join(_describe(one) for one in spec["mix"])
    if spec["shuffle"] != "block":
        return f"{spec['shuffle']}"
    return (
        f"block: blocks of {spec['block']:,}, windows of {spec['window']} blocks, {spec['lanes']:,} lanes,"
        f" {spec['chunk']:,} at a time"
    )
