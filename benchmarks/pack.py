"""Packing here, in processes of this machine, and on Ray: samples per second, and what a task costs.

python -m benchmarks.pack [--samples 20000] [--bytes 20000] [--rounds 3]

On one machine Ray can only lose: it has no more CPUs, and its own processes want some. What it costs is the point.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks._harness import markdown
from s3loader import optimize
from s3loader.tasks import executor_of


def sample(size: int, number: int) -> dict[str, Any]:
    return {"__key__": f"{number:08d}", "bin": number.to_bytes(8, "big") * (size // 8), "cls": number % 10}


def nothing(number: int) -> int:
    return number


def main() -> None:
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--bytes", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=500, help="empty tasks, for the cost of one")
    chosen = parser.parse_args()
    cpus = os.cpu_count() or 1
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, configure_logging=False)
    started = time.perf_counter() - begin
    clients: dict[str, dict[str, Any]] = {
        "this process": {},
        f"{cpus} processes": {"workers": cpus},
        f"Ray, {cpus} CPUs": {"engine": "ray"},
    }
    seconds: dict[str, list[float]] = {name: [] for name in clients}
    empty: dict[str, list[float]] = {name: [] for name in clients}
    for number in range(chosen.rounds + 1):  # the first one warms
        for name, options in clients.items():
            with tempfile.TemporaryDirectory() as folder:
                work = partial(sample, chosen.bytes)
                took = timed(lambda: optimize(work, range(chosen.samples), folder, verify="none", **options))  # noqa: B023
            given = dict(options)
            executor, _ = executor_of(given, given.pop("workers", 0))
            if executor is None:
                cost = timed(lambda: list(map(nothing, range(chosen.tasks))))
            else:
                cost = timed(lambda: list(executor.run(nothing, range(chosen.tasks))))  # noqa: B023
            if number:
                seconds[name].append(took)
                empty[name].append(cost / chosen.tasks)
    ray.shutdown()
    base = statistics.median(seconds["this process"])
    lines = []
    for name in clients:
        took = statistics.median(seconds[name])
        lines.append(
            (name, f"{chosen.samples / took:,.0f}", f"{chosen.samples * chosen.bytes / took / 1e6:,.0f}", f"{base / took:.2f}x",
             f"{statistics.median(empty[name]) * 1e3:.2f}")
        )  # fmt: skip
    print(f"{chosen.samples:,} samples of {chosen.bytes:,} bytes, medians of {chosen.rounds} rounds; {cpus} CPUs\n")
    print(markdown(("where", "samples/s", "MB/s", "to this process", "ms of an empty task"), lines))
    print(f"\nStarting Ray on this machine took {started:.1f} s (not counted).")


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
