"""Processes of one node that read the same samples: bytes downloaded and CPU seconds, with and without one cache folder.

python -m benchmarks.node [--samples 2000] [--bytes 50000] [--ranks 1 2 4]

Counts and CPU seconds, no times: a busy machine does not change them much. All processes read the same sequence at once, as
tensor-parallel ranks or the runs of a search do.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks._harness import markdown
from s3loader import Loader, from_manifest, open_store
from s3loader.testing import FaultProxy, server, write_sharded_dataset

WAYS: dict[str, dict[str, Any] | None] = {
    "no cache": None,
    "a cache, each downloads": {"driver": "pump"},
    "a cache, one downloads": {},
}


def child(url: str, endpoint: str, options: dict[str, Any]) -> None:
    with open_store(url, endpoint_url=endpoint) as store:
        loader = Loader(from_manifest("manifest.jsonl", store=store), batch_size=32, memory_limit="96MiB", **options)
        print("ready", flush=True)
        sys.stdin.readline()
        begun = resource.getrusage(resource.RUSAGE_SELF)
        samples = sum(map(len, loader))
        used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime - begun.ru_utime - begun.ru_stime
    print(json.dumps({"cpu": cpu, "samples": samples, "used": loader.stats.bytes_used}))


def measure(endpoint: str, environment: dict[str, str], ranks: int, way: dict[str, Any] | None) -> tuple[int, int, float]:
    """(content bytes, bytes downloaded, CPU seconds of all processes)."""
    with FaultProxy(endpoint) as proxy, tempfile.TemporaryDirectory() as folder:
        options = {} if way is None else {"cache_dir": folder, **way}
        command = [sys.executable, "-m", "benchmarks.node", "--child", "s3://bench", proxy.endpoint_url, json.dumps(options)]
        processes = [
            subprocess.Popen(
                command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(ranks)
        ]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        told = []
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        told = [json.loads(process.communicate()[0]) for process in processes]
        received = sum(r.received for r in proxy.requests if r.method == "GET" and r.path.endswith(".tar"))
    return told[0]["used"], received, sum(one["cpu"] for one in told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--bytes", type=int, default=50_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        child(chosen.child[0], chosen.child[1], json.loads(chosen.child[2]))
        return
    lines = []
    with server("ministack") as s3:
        s3.bucket("bench")
        with s3.open_store("bench") as store:
            members = ((f"{i:06d}.bin", i.to_bytes(8, "big") * (chosen.bytes // 8)) for i in range(chosen.samples))
            write_sharded_dataset(store, members, per_shard=max(1, chosen.samples // 8))
        for ranks in chosen.ranks:
            for name, way in WAYS.items():
                content, received, cpu = measure(s3.endpoint_url, s3.environment, ranks, way)
                lines.append(
                    (str(ranks), name, f"{received / 1e6:,.0f} MB", f"{received / content:.2f}x", f"{cpu:.2f}",
                     f"{cpu / ranks / content * 1e9:.2f}")
                )  # fmt: skip
    print(f"{chosen.samples:,} samples of {chosen.bytes:,} bytes\n")
    head = ("processes", "way", "downloaded", "to the content", "CPU seconds, all", "CPU seconds a GB and process")
    print(markdown(head, lines))


if __name__ == "__main__":
    main()
