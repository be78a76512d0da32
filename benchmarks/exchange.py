"""Manifests, shards and virtual keys: ``make bench-exchange``.

Three cases against the in-memory S3 server: members of 4 KiB packed into shards (against `tarfile`
and boto3), random members of 100 KiB out of large shards (bytes moved, against what whole-archive
reads would move), and a manifest of a million entries read entry by entry (against boto3 and `json`).
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import _servers
from benchmarks._harness import (
    Child,
    Goal,
    Row,
    Runner,
    cpu,
    describe,
    goals_table,
    machine,
    markdown,
    publish,
    rate,
    run_case,
    save,
)
from benchmarks._servers import BUCKET, Unavailable

KIB, MIB = 1 << 10, 1 << 20
OURS = "s3loader"


def child(port: int, client: str, packages: list[str], **spec: Any) -> Child:
    given = {"client": client, "endpoint": f"http://127.0.0.1:{port}", "bucket": BUCKET, "packages": packages, **spec}
    return Child(sys.executable, "exchange_clients.py", given, timeout=600)


class Forgetting:
    """A client whose objects the server forgets after each round, so that memory does not run out."""

    def __init__(self, inner: Child, port: int, prefix: str) -> None:
        self._inner, self._port, self._prefix, self._turn = inner, port, prefix, 0
        self.versions = inner.versions

    def run(self) -> dict[str, Any]:
        result = self._inner.run()
        _servers.forget(self._port, f"{BUCKET}/{self._prefix}{self._turn}")
        self._turn += 1
        return result

    def close(self) -> None:
        self._inner.close()


class Case:
    """One case: its rows, and what its table and goals say."""

    def __init__(self, title: str, rows: dict[str, Row]) -> None:
        self.title = title
        self.rows = rows

    def table(self, columns: Mapping[str, Callable[[Row], str]]) -> str:
        shown = [[row.client, *(column(row) for column in columns.values())] for row in self.rows.values() if row.rounds]
        absent = [f"{row.client}: {row.reason}" for row in self.rows.values() if row.reason]
        return markdown(["client", *columns], shown) + "".join(f"\n\nDid not run: {line}." for line in absent)


def per_item(row: Row) -> str:
    return f"{row.median(lambda r: cpu(r) / r['items']) * 1e6:.2f}"


def mib(row: Row) -> str:
    return f"{row.median(lambda r: r['peak'] - r['rss']) / MIB:,.0f}"


def pack(port: int, args: argparse.Namespace, versions: dict[str, str]) -> tuple[str, list[Goal], dict[str, Row]]:
    spec = {"count": args.members, "size": 4 * KIB, "shard": 64 * MIB}
    makers: dict[str, Callable[[], Runner]] = {
        OURS: lambda: Forgetting(child(port, "pack_ours", ["s3loader"], **spec), port, "ours"),
        "tarfile + boto3 upload_fileobj": lambda: Forgetting(child(port, "pack_tarfile", ["boto3"], **spec), port, "theirs"),
    }
    rows, found = run_case(makers, rounds=args.rounds)
    versions.update(found)
    case = Case(f"{args.members:,} members of 4 KiB into shards of 64 MiB", rows)
    text = case.table(
        {
            "members/s": lambda row: f"{row.median(lambda r: r['items'] / r['wall']):,.0f}",
            "MB/s": lambda row: f"{row.median(rate) / 1e6:,.0f}",
            "us CPU/member": per_item,
            "memory grew by MiB": mib,
        }
    )
    note = "s3loader also writes the index with CRC32C, the internal manifest and the manifest; the other only the tars."
    ours, theirs = list(rows.values())
    ratio = ours.ratio(theirs, rate) if ours.rounds and theirs.rounds else None
    return (
        f"### {case.title}\n\n{text}\n\n{note}",
        [Goal("packing 4 KiB members: against tarfile + boto3", 3, ratio, True)],
        rows,
    )


def random_reads(port: int, args: argparse.Namespace, versions: dict[str, str]) -> tuple[str, list[Goal], dict[str, Row]]:
    spec = {"size": 100 * KIB, "shard": args.shard * MIB, "shards": 10, "reads": args.reads}
    filler = child(port, "fill", [], **spec)
    archive = filler.run()["archive"]
    filler.close()
    rows: dict[str, Row] = {}
    moved: dict[str, float] = {}
    for name, details in ((f"{OURS}, full entries", True), (f"{OURS}, details=False", False)):
        runner = child(port, "random_ours", ["s3loader"], **spec, details=details)
        rows[name] = Row(name)
        sent = []
        for _ in range(args.rounds):
            before = _servers.stats(port)
            result = runner.run()
            after = _servers.stats(port)
            sent.append((after["bytes_out"] - before["bytes_out"]) / result["bytes"])
            rows[name].rounds.append({**result, "requests": after["requests"] - before["requests"]})
        versions.update(runner.versions)
        runner.close()
        moved[name] = statistics.median(sent)
    case = Case(f"{args.reads:,} random members of 100 KiB out of 10 shards of {args.shard} MiB", rows)
    text = case.table(
        {
            "bytes moved / asked": lambda row: f"{moved[row.client]:.3f}",
            "GETs": lambda row: f"{row.median(lambda r: r['requests']):,.0f}",
            "MB/s": lambda row: f"{row.median(rate) / 1e6:,.0f}",
            "first after ms": lambda row: f"{row.median(lambda r: r['first']) * 1e3:.0f}",
            "us CPU/member": per_item,
        }
    )
    whole = archive / (100 * KIB)
    grouped = 10 * archive / (args.reads * 100 * KIB)
    note = (
        "Computed, not measured, from the algorithm of s3exchange: `get_object` of a virtual key reads the whole archive, "
        f"so {args.reads:,} of them move {whole:,.0f} times the bytes asked for; its `iter_objects_from_keys`, which "
        f"reads each archive once, {grouped:,.1f} times."
    )
    goals = [Goal("random members: bytes moved against bytes asked for", 1.1, max(moved.values()), False)]
    return f"### {case.title}\n\n{text}\n\n{note}", goals, rows


def iterate(port: int, args: argparse.Namespace, versions: dict[str, str]) -> tuple[str, list[Goal], dict[str, Row]]:
    spec = {"count": args.entries}
    rows, found = run_case(
        {
            OURS: lambda: child(port, "iterate_ours", ["s3loader", "msgspec"], **spec),
            "boto3 iter_lines + json.loads": lambda: child(port, "iterate_json", ["boto3"], **spec),
        },
        rounds=args.rounds,
    )
    versions.update(found)
    case = Case(f"A manifest of {args.entries:,} entries, one by one", rows)
    text = case.table(
        {
            "entries/s": lambda row: f"{row.median(lambda r: r['items'] / r['wall']):,.0f}",
            "entries/CPU-s": lambda row: f"{row.median(lambda r: r['items'] / cpu(r)):,.0f}",
            "memory grew by MiB": mib,
        }
    )
    ours = rows[OURS]
    speed = ours.median(lambda r: r["items"] / cpu(r)) / 300_000 if ours.rounds else None
    grown = ours.median(lambda r: (r["peak"] - r["rss"]) / (64 * MIB)) if ours.rounds else None
    goals = [
        Goal("manifest entries per second and core, in units of 300,000", 1, speed, True),
        Goal("memory for iterating, in units of 64 MiB", 1, grown, False),
    ]
    return f"### {case.title}\n\n{text}", goals, rows


CASES = {"pack": pack, "random": random_reads, "iterate": iterate}


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exchange", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, one round; figures are not published")
    parser.add_argument("--case", choices=CASES, action="append", help="only this case; may be given several times")
    parser.add_argument("--rounds", type=int, help="measured rounds (default: 3)")
    parser.add_argument("--no-publish", action="store_true", help="leave docs/benchmarks.md as it is")
    args = parser.parse_args(argv)
    scale = 10 if args.quick else 1
    args.members, args.reads, args.entries = 100_000 // scale, 1000 // scale, 1_000_000 // scale
    args.shard = 256 // scale
    args.rounds = args.rounds or (1 if args.quick else 3)
    return args


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    where, began = machine(), time.monotonic()
    versions: dict[str, str] = {}
    texts: list[str] = []
    goals: list[Goal] = []
    results: dict[str, Any] = {}
    try:
        _servers.need("cc")
        with tempfile.TemporaryDirectory(prefix="s3loader-bench-") as folder:
            (program,) = _servers.build(Path(folder), "s3server")
            for name in args.case or CASES:
                print(f"[{time.monotonic() - began:4.0f} s] {name}", file=sys.stderr, flush=True)
                with _servers.started(program) as port:
                    text, found, results[name] = CASES[name](port, args, versions)
                texts.append(text)
                goals += found
    except Unavailable as error:
        print(f"bench-exchange skipped: {error}", file=sys.stderr)
        return 0
    command = ("python -m benchmarks.exchange " + shlex.join(argv if argv is not None else sys.argv[1:])).strip()
    where["seconds"] = round(time.monotonic() - began)
    text = "\n\n".join([describe(where, versions, command), "### Goals", goals_table(goals), *texts])
    print(text)
    save("exchange", {"machine": where, "versions": versions, "command": command, "results": results})
    if not args.quick and not args.case and not args.no_publish:
        publish("bench-exchange", text)
    print(f"{where['seconds']} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
