"""Packing here, in processes of this machine, and on Ray: samples per second, and what a task costs.

python -m benchmarks.pack [--samples 20000] [--bytes 20000] [--rounds 5] [--seconds 240]

On one machine Ray can only lose: it has no more CPUs, and its own processes want some. What it costs is the point. The ways
take turns, one round each, starting one place further every time; a ratio is the median of the ratios within each round.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks._harness import describe, machine, markdown, publish, save
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=240, help="no round is begun after so many")
    parser.add_argument("--tasks", type=int, default=500, help="empty tasks, for the cost of one")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, one round; figures are not published")
    parser.add_argument("--no-publish", action="store_true", help="leave docs/benchmarks.md as it is")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.samples, chosen.tasks, chosen.rounds = chosen.samples // 10, chosen.tasks // 10, 1
    where, cpus = machine(), os.cpu_count() or 1
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, configure_logging=False)
    started = time.perf_counter() - begin
    ways: dict[str, dict[str, Any]] = {
        "this process": {},
        f"{cpus} processes": {"workers": cpus},
        f"Ray, {cpus} CPUs": {"engine": "ray"},
    }
    rounds: list[dict[str, tuple[float, float]]] = []
    for number in range(-1, chosen.rounds):  # the first one warms
        if number > 0 and time.perf_counter() - begin > chosen.seconds:
            break
        names = [*ways][max(0, number) % len(ways) :] + [*ways][: max(0, number) % len(ways)]
        took = {name: measured(chosen, dict(ways[name])) for name in names}
        if number >= 0:
            rounds.append(took)
    ray.shutdown()
    base = next(iter(ways))
    lines = []
    for name in ways:
        seconds = [one[name][0] for one in rounds]
        middle = statistics.median(seconds)
        ratio = statistics.median(one[base][0] / one[name][0] for one in rounds)
        lines.append(
            (name, f"{chosen.samples / middle:,.0f}", f"{chosen.samples * chosen.bytes / middle / 1e6:,.0f}", f"{ratio:.2f}x",
             f"{100 * (max(seconds) - min(seconds)) / middle:.0f} %",
             f"{statistics.median(one[name][1] for one in rounds) * 1e3:.2f}")
        )  # fmt: skip
    command = ("python -m benchmarks.pack " + shlex.join(sys.argv[1:])).strip()
    parts = [
        describe(where, {"ray": ray.__version__}, command),
        f"{chosen.samples:,} samples of {chosen.bytes:,} bytes into shards of 64 MiB in a local folder, medians of"
        f" {len(rounds)} rounds. Ray's cluster is this machine, of {cpus} CPUs; starting it took {started:.1f} s, which is not"
        " counted.",
        markdown(("where", "samples/s", "MB/s", "to this process", "spread", "ms of an empty task"), lines),
    ]
    print("\n\n".join(parts))
    save("pack", {"machine": where, "command": command, "rounds": rounds})
    if not chosen.quick and not chosen.no_publish:
        publish("bench-pack", "\n\n".join(parts))


def measured(chosen: argparse.Namespace, options: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a pack, and of an empty task."""
    with tempfile.TemporaryDirectory() as folder:
        work = partial(sample, chosen.bytes)
        took = timed(lambda: optimize(work, range(chosen.samples), folder, verify="none", **options))
    executor, _ = executor_of(options, options.pop("workers", 0))  # type: ignore[arg-type]
    if executor is None:
        return took, timed(lambda: list(map(nothing, range(chosen.tasks)))) / chosen.tasks
    return took, timed(lambda: list(executor.run(nothing, range(chosen.tasks)))) / chosen.tasks


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
