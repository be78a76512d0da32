"""A sizing table by simulation: 10^6 to 10^10 samples, 1 to 16,384 ranks, without a cluster.

What stands under "measured" is run by the planner that training uses, on this machine. What stands under "computed" are
formulas over its plan, printed below the table; a real network decides them in the end.

Some cells become the sizing table of docs/beyond-one-machine.md.

python -m benchmarks.scale [--quick] [--sample-bytes 100000] [--rate 500]
"""

from __future__ import annotations

import argparse
import random
import time
import tracemalloc
from typing import Any

import numpy as np

from benchmarks._harness import DOCS, machine, markdown, publish
from s3loader.plan import Catalog, choose_spec, plan_for

SHARD = 1 << 30
BATCH = 32
SHOWN = ((6, 8), (8, 64), (8, 512), (9, 4096), (10, 16384))
"""Powers of ten of samples, and ranks, of the sizing table."""
LATENCY = 0.08
"""Seconds to the first byte, for the restart."""
REQUESTS = 5500
"""GETs per second that S3 says a prefix takes."""
TAIL = (0.01, 10.0)
"""One request in a hundred takes ten times as long (exponential around it), for stragglers."""


def row(samples: int, ranks: int, sample_bytes: int, rate: float) -> dict[str, Any]:
    shards = max(1, samples * sample_bytes // SHARD)
    edges = np.linspace(0, samples, shards + 1).astype(np.int64)
    catalog = Catalog(np.diff(edges), samples * sample_bytes, "simulated")
    tracemalloc.start()
    begin = time.perf_counter()
    spec = choose_spec(samples, catalog.total_bytes, batch_size=BATCH, world_size=ranks)
    plan = plan_for(catalog, spec)
    planned = time.perf_counter() - begin
    consumed = plan.size // 2 // (BATCH * ranks) * BATCH * ranks
    steps = 512
    begin = time.perf_counter()
    schedule = plan.schedule(0, batch_size=BATCH, world_size=ranks, consumed=consumed)
    rank = ranks // 2
    left = min(steps, schedule.steps(rank))
    positions, _ = schedule.positions(rank, range(left))
    numbers = plan.samples_at(positions, 0)
    parts, _ = plan.locate(numbers)
    resumed = time.perf_counter() - begin
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    blocks = len(np.unique(numbers // spec.block)) if left else 0
    gets = blocks / max(1, len(numbers)) * rate * ranks
    return {
        "samples": samples, "ranks": ranks, "plan": planned, "resume": resumed, "memory": memory,
        "shards": len(np.unique(parts)),
        "requests": gets, "prefixes": max(1, -(-int(gets) // REQUESTS)), "bytes": rate * ranks * sample_bytes,
        "restart": resumed + 4 * LATENCY, "straggler": straggler(ranks), "steps": left,
    }  # fmt: skip


def straggler(ranks: int) -> tuple[float, float]:
    """Median over steps of the slowest rank's request, in typical requests: alone, and with a second request after the 95th
    percentile (`hedge`)."""
    rng = random.Random(ranks)
    share, factor = TAIL

    def one() -> float:
        return rng.expovariate(1.0) * (factor if rng.random() < share else 1.0)

    after = 3.5
    many = min(ranks, 2048)
    alone, hedged = [], []
    for _ in range(20):
        times = [one() for _ in range(many)]
        alone.append(max(times))
        hedged.append(max(min(t, after + one()) if t > after else t for t in times))
    return sorted(alone)[10], sorted(hedged)[10]


def size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} EB"


def sizing(found: list[dict[str, Any]], sample_bytes: int, rate: float) -> str:
    """The table of the documentation."""
    where, lines = machine(), []
    for power, ranks in SHOWN:
        r = next(r for r in found if (r["samples"], r["ranks"]) == (10**power, ranks))
        lines.append(
            (f"10^{power}", f"{ranks:,}", f"{r['plan'] * 1e3:.1f} ms", f"{r['resume'] * 1e3:.0f} ms", size(r["memory"]),
             size(r["bytes"]), f"{r['requests']:,.0f}", str(r["prefixes"]))
        )  # fmt: skip
    head = ("samples", "ranks", "plan made", "resume planned", "planner's memory", "bytes/s", "GETs/s", "S3 prefixes")
    what = (
        f"{sample_bytes / 1000:g} kB a sample, {rate:g} samples/s and rank; timed on {where['cores']} cores of {where['cpu']}"
    )
    return f"{what}, load average {where['load_before']}, {where['date']}:\n\n{markdown(head, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cells only")
    parser.add_argument("--no-publish", action="store_true", help="leave docs/beyond-one-machine.md as it is")
    parser.add_argument("--sample-bytes", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=500.0, help="samples per second that one rank trains on")
    chosen = parser.parse_args()
    counts = (10**6, 10**8) if chosen.quick else (10**6, 10**7, 10**8, 10**9, 10**10)
    worlds = (1, 64) if chosen.quick else (1, 8, 64, 512, 4096, 16384)
    found = [row(n, r, chosen.sample_bytes, chosen.rate) for n in counts for r in worlds if n >= r * BATCH]
    print(f"## Measured: one rank of the real planner, {chosen.sample_bytes:,} bytes a sample, batches of {BATCH}\n")
    head = (
        "samples",
        "ranks",
        "plan made (ms)",
        "state loaded, 512 steps planned (ms)",
        "memory at most",
        "shards in 512 steps",
    )
    lines = [
        (f"{r['samples']:,}", f"{r['ranks']:,}", f"{r['plan'] * 1e3:.2f}",
         f"{r['resume'] * 1e3:.1f}", size(r["memory"]), str(r["shards"]))
        for r in found
    ]  # fmt: skip
    print(markdown(head, lines))
    print(f"\n## Computed: {chosen.rate:g} samples a second and rank\n")
    head = ("samples", "ranks", "bytes/s", "GETs/s", "prefixes", "restart (s)", "slowest rank", "hedged")
    lines = [
        (f"{r['samples']:,}", f"{r['ranks']:,}", size(r["bytes"]), f"{r['requests']:,.1f}", str(r["prefixes"]),
         f"{r['restart']:.2f}", f"{r['straggler'][0]:.1f}x", f"{r['straggler'][1]:.1f}x")
        for r in found
    ]  # fmt: skip
    print(markdown(head, lines))
    print(
        "\nGETs/s: blocks that the planned steps touch, over their samples, times the rate of all ranks."
        f"\nPrefixes: GETs/s over {REQUESTS:,}."
        f"\nRestart: loaded and planned (measured), and 4 requests in a row of {LATENCY * 1e3:.0f} ms (design note 016)."
        f"\nSlowest rank: of one request each, {TAIL[0]:.0%} of which take {TAIL[1]:g} times as long (at most 2,048 are drawn);"
        "\nhedged: asked a second time after 3.5 typical requests. Prefetch hides both as long as its budget lasts."
    )
    if not chosen.quick and not chosen.no_publish:
        publish("bench-scale", sizing(found, chosen.sample_bytes, chosen.rate), DOCS.with_name("beyond-one-machine.md"))


if __name__ == "__main__":
    main()
