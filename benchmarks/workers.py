"""Worker processes or none: samples per second against what decoding one costs. ``make bench-workers``.

Samples come from the in-memory S3 server. The transform keeps a core, and the GIL, busy for so many microseconds of CPU time.
Workers are started before the first round and live on. On two cores, of which the server has a share, two workers are the most
that can help.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import _servers
from benchmarks._harness import describe, machine, markdown, publish, save
from s3loader import from_manifest, open_store
from s3loader.testing import write_sharded_dataset
from s3loader.torch import S3DataLoader, S3IterableDataset

COSTS_US = (0, 20, 50, 100, 200, 500)
WORKERS = (0, 1, 2)
SIZES = {"4 KiB": (4096, 40_000), "100 KiB": (102_400, 4000)}


class Busy:
    """A transform that costs `us` microseconds of CPU time."""

    def __init__(self, us: int) -> None:
        self.us = us

    def __call__(self, sample: Any) -> Any:
        end = time.thread_time() + self.us * 1e-6
        while time.thread_time() < end:
            pass
        return sample


def endless(loader: S3DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def speed(batches: Iterator[Any], seconds: float) -> float:
    """Samples per second, after a first few."""
    for _ in range(20):
        next(batches)
    begun, count = time.perf_counter(), 0
    while (now := time.perf_counter()) - begun < seconds:
        count += len(next(batches))
    return count / (now - begun)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round (default: 1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-publish", action="store_true", help="leave docs/benchmarks.md as it is")
    chosen = parser.parse_args(argv)
    where = machine()
    lines: list[list[str]] = []
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="s3loader-bench-") as name:
        (program,) = _servers.build(Path(name), "s3server")
        with _servers.started(program, reserve_mib=1024) as port:
            keys = {"access_key_id": "benchmark-key", "secret_access_key": "benchmark-secret", "region": "us-east-1"}
            for title, (size, count) in SIZES.items():
                with open_store(f"s3://bench/{size}", endpoint_url=f"http://127.0.0.1:{port}", **keys) as store:  # type: ignore[arg-type]
                    members = ((f"{i:06d}.bin", i.to_bytes(4, "big") * (size // 4)) for i in range(count))
                    write_sharded_dataset(store, members, per_shard=count // 8)
                    for us in COSTS_US:
                        lines.append(row(store, title, us, chosen, results))
                        print(" | ".join(lines[-1]), file=sys.stderr, flush=True)
    table = markdown(["sample", "decoding, us", *(f"{n} workers: samples/s" for n in WORKERS), "2 workers / none"], lines)
    print(table)
    save("workers", {"machine": where, "results": results})
    if not chosen.no_publish:
        import torch

        publish("bench-workers", describe(where, {"torch": torch.__version__}, "python -m benchmarks.workers") + "\n\n" + table)
    return 0


def row(store: Any, title: str, us: int, chosen: argparse.Namespace, results: dict[str, list[float]]) -> list[str]:
    """One line of the table: the ways take turns."""
    loaders = []
    for workers in WORKERS:
        source = from_manifest("manifest.jsonl", store=store)
        dataset = S3IterableDataset(source, batch_size=32, shuffle="block", seed=1, transform=Busy(us), return_type="bytes")
        loaders.append(S3DataLoader(dataset, num_workers=workers))
    batches = [endless(loader) for loader in loaders]
    found: list[list[float]] = [[] for _ in WORKERS]
    for _ in range(chosen.rounds):
        for at, those in enumerate(batches):
            found[at].append(speed(those, chosen.seconds))
    for those in batches:
        those.close()  # type: ignore[attr-defined]
    for workers, rates in zip(WORKERS, found, strict=True):
        results[f"{title}, {us} us, {workers} workers"] = rates
    medians = [statistics.median(rates) for rates in found]
    ratio = statistics.median(b / a for a, b in zip(found[0], found[-1], strict=True))
    return [title, str(us), *(f"{rate:,.0f}" for rate in medians), f"{ratio:.2f}x"]


if __name__ == "__main__":
    sys.exit(main())
