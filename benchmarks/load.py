"""Loading shuffled samples against others: ``make bench-load``.

The same samples lie on the in-memory S3 server as tars with an index, as loose objects, as LitData
chunks and as MDS shards. Everyone delivers batches of 32 byte strings in a shuffled order, in one
process and with two workers, from a cold start.
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import _peers, _servers
from benchmarks._harness import (
    Child,
    ClientFailed,
    Command,
    Goal,
    Round,
    Row,
    Runner,
    cpu,
    cpu_per_byte,
    describe,
    goals_table,
    machine,
    markdown,
    publish,
    rate,
    run_case,
    save,
)
from benchmarks._servers import BUCKET, Layout, Unavailable

KIB, MIB = 1 << 10, 1 << 20
OURS = "s3loader"
LOOP, LOOSE_LOOP = "C loop, whole tars", "C loop, loose objects"


@dataclass(frozen=True)
class Data:
    """One set of samples."""

    name: str
    count: int
    size: int
    tars: int

    @property
    def title(self) -> str:
        return f"{self.count:,} x {self.size // KIB} KiB in {self.tars} tars"

    @property
    def tar_size(self) -> int:
        """Bytes of each tar: a header and padded data per member, then zeros up to whole records."""
        members = self.count // self.tars * (512 + -(-self.size // 512) * 512)
        return -(-(members + 1024) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def tar_keys(self) -> list[str]:
        return [f"{self.name}/tar/part-{t:06d}.tar" for t in range(self.tars)]


@dataclass(frozen=True)
class Contender:
    """One row."""

    name: str
    client: str
    variant: str = ""
    workers: str = "0 2"
    peer: bool = True


CONTENDERS = (
    Contender(LOOP, "limit", workers="0", peer=False),
    Contender(LOOSE_LOOP, "limit", "loose", workers="0", peer=False),
    Contender(OURS, "s3loader", workers="0", peer=False),
    Contender("s3loader, not verified", "s3loader", "unverified", workers="0", peer=False),
    Contender("s3loader, loose objects", "s3loader", "loose", workers="0", peer=False),
    Contender("s3loader.torch", "s3loader.torch", peer=False),
    Contender("webdataset", "webdataset"),
    Contender("litdata, cold", "litdata"),
    Contender("litdata, warm cache", "litdata", "warm", workers="0"),
    Contender("mosaicml-streaming, cold", "mosaicml-streaming", workers="0"),
    Contender("s3torchconnector, loose objects", "s3torchconnector"),
    Contender("s3dlio, loose objects", "s3dlio", workers="0"),
)


class Floor(Command):
    """The raw bytes in C, thrown away: no order, no samples, no checks; eight tars, or sixteen objects, at a time."""

    def __init__(self, program: Path, data: Data, port: int, *, loose: bool) -> None:
        name = f"{data.name}/loose/%06u" if loose else f"{data.name}/tar/part-%06u.tar"
        what = [16, data.count, data.size] if loose else [min(8, data.tars), data.tars, data.tar_size]
        super().__init__([str(program), "get", "127.0.0.1", str(port), *map(str, what), f"/{BUCKET}/{name}"])
        self._data = data

    def run(self) -> Round:
        count = self._data.count // self._data.tars * self._data.tars
        return {**super().run(), "items": count, "bytes": count * self._data.size, "first": None}


class Loading:
    """A child whose rounds are one epoch from a cold start."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.versions = child.versions

    def run(self) -> Round:
        return self.child.run("epoch")

    def close(self) -> None:
        self.child.close()


class Resuming(Loading):
    """A child whose rounds are one resumption in the middle of an epoch."""

    def run(self) -> Round:
        return self.child.run("resume")


def upload(data: Data, port: int, peers: Path | None, folder: Path) -> None:
    """Put the samples on the server in every form."""
    from s3loader.shard.build import build_index
    from s3loader.store import open_store
    from s3loader.types import PutRequest

    options: dict[str, Any] = {
        "endpoint_url": f"http://127.0.0.1:{port}",
        "region": "us-east-1",
        "access_key_id": "benchmark-key",
        "secret_access_key": "benchmark-secret",
    }
    _servers.make_objects(folder, [Layout(data.name, data.count, data.size)])
    samples = folder / BUCKET / data.name
    with open_store(f"s3://{BUCKET}", **options) as store:
        loose = (PutRequest(f"{data.name}/loose/{i:06d}", (samples / f"{i:06d}").read_bytes()) for i in range(data.count))
        for _ in store.put_many(loose):
            pass
        per_tar = data.count // data.tars
        for t, key in enumerate(data.tar_keys()):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for i in range(t * per_tar, (t + 1) * per_tar):
                    info = tarfile.TarInfo(f"{i:06d}.bin")
                    info.size = data.size
                    tar.addfile(info, io.BytesIO((samples / f"{i:06d}").read_bytes()))
            store.put(key, buffer.getvalue())
        build_index(data.tar_keys(), store=store)
        if peers is None:
            return
        spec = {"client": "prepare", "out": str(folder / f"{data.name}-peers"), "samples": str(samples), "count": data.count}
        child = Child(peers, "load_clients.py", spec, timeout=300)
        try:
            child.run()
        finally:
            child.close()
        for path in sorted((folder / f"{data.name}-peers").rglob("*")):
            if path.is_file():
                store.put(f"{data.name}/{path.relative_to(folder / f'{data.name}-peers')}", path.read_bytes())


def spec_of(who: Contender, data: Data, workers: int, port: int, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    return {
        "client": who.client,
        "variant": who.variant,
        "workers": workers,
        "endpoint": f"http://127.0.0.1:{port}",
        "bucket": BUCKET,
        "count": data.count // data.tars * data.tars if "loose" not in who.name else data.count,
        "size": data.size,
        "tars": data.tar_keys(),
        "prefix": f"{data.name}/loose/",
        "litdata": f"{data.name}/litdata",
        "mds": f"{data.name}/mds",
        "scratch": str(scratch),
        "budget": args.budget,
        "packages": [who.client.split(".")[0]],
    }


def first(r: Round) -> float:
    return float(r["first"])


def first_of(row: Row) -> str:
    return "-" if row.rounds[0]["first"] is None else f"{row.median(first) * 1e3:,.0f}"


def samples_rate(r: Round) -> float:
    return float(r["items"] / r["wall"])


def table(rows: Mapping[str, Row]) -> str:
    """One case as a markdown table."""
    ours = rows.get(OURS) or rows.get("s3loader.torch")
    lines, absent = [], []
    for row in rows.values():
        if not row.rounds:
            absent.append(f"{row.client}: {row.reason}")
            continue
        lines.append(
            [
                row.client,
                f"{row.median(samples_rate):,.0f}",
                f"{100 * row.spread(samples_rate):.0f} %",
                f"{row.median(rate) / 1e6:,.0f}",
                f"{row.median(lambda r: cpu(r) / r['items'] * 1e6):,.1f}",
                f"{row.median(cpu_per_byte) * 1e9:.2f}",
                f"{row.median(lambda r: r['peak'] - r['base']) / MIB:,.0f}",
                f"{row.median(lambda r: r['requests']):,.0f}",
                f"{row.median(lambda r: r['server_bytes'] / r['bytes']):.2f}",
                first_of(row),
                f"{ours.ratio(row, samples_rate):.2f}" if ours and ours.rounds else "-",
            ]
        )
    head = [
        "client",
        "samples/s",
        "spread",
        "MB/s",
        "us CPU/sample",
        "CPU-s/GB",
        "peak MiB",
        "GETs",
        "read / used",
        "first batch ms",
    ]
    text = markdown([*head, "s3loader / it"], lines)
    return text + "".join(f"\n\nDid not run: {line}." for line in absent)


class Counting:
    """A runner that adds what the server sent to each round."""

    def __init__(self, inner: Runner, port: int) -> None:
        self.inner = inner
        self.versions = inner.versions
        self.port = port

    def run(self) -> Round:
        before = _servers.stats(self.port)
        result = self.inner.run()
        after = _servers.stats(self.port)
        return {
            **result,
            "requests": after["requests"] - before["requests"],
            "server_bytes": after["bytes_out"] - before["bytes_out"],
        }

    def close(self) -> None:
        self.inner.close()


def goals(results: Mapping[str, Mapping[str, Row]]) -> list[Goal]:
    """The figures the project set itself, beside what came out."""

    def against(case: str, other: str, ours: str = OURS) -> float | None:
        a, b = results.get(case, {}).get(ours), results.get(case, {}).get(other)
        return a.ratio(b, samples_rate) if a and b and a.rounds and b.rounds else None

    def own(case: str, value: Callable[[Round], float], who: str = OURS) -> float | None:
        row = results.get(case, {}).get(who)
        return row.median(value) if row and row.rounds else None

    found = []
    for size, other, target in (
        ("4k", "webdataset", 6.0),
        ("4k", "litdata, cold", 4.0),
        ("100k", "webdataset", 4.0),
        ("100k", "litdata, cold", 5.0),
        ("100k", "litdata, warm cache", 1.0),
        ("4k", "mosaicml-streaming, cold", 10.0),
        ("100k", "mosaicml-streaming, cold", 10.0),
    ):
        value, floor = (against(f"load-{size}-0", other, who) for who in (OURS, LOOP))
        found.append(Goal(f"{size}, one process: samples/s against {other}", target, value, True, floor))
    for size in ("4k", "100k"):
        for other in ("s3torchconnector, loose objects", "s3dlio, loose objects"):
            value, floor = (against(f"load-{size}-0", other, who) for who in ("s3loader, loose objects", LOOSE_LOOP))
            text = f"{size}, loose objects on both sides: samples/s against {other.split(',')[0]}"
            found.append(Goal(text, 3.0, value, True, floor))
    speed = own("load-4k-0", samples_rate)
    found.append(Goal("4k: samples/s, in units of 200,000", 1.0, speed and speed / 200_000, True))
    for size in ("4k", "100k"):
        cold, resumed = own(f"load-{size}-0", first), own(f"resume-{size}", first)
        found.append(Goal(f"{size}: first batch from a cold start, in units of 150 ms", 1.0, cold and cold / 0.15, False))
        ratio = resumed / cold if cold and resumed else None
        found.append(Goal(f"{size}: first batch after resuming at 50 % against a cold start", 1.1, ratio, False))
        peak = own(f"load-{size}-0", lambda r: (r["peak"] - r["base"]) / (512 * MIB))
        found.append(Goal(f"{size}: peak memory, in units of the 512 MiB given", 1.0, peak, False))
    return found


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a fifth of the data and 2 s a round; figures are not published")
    parser.add_argument("--cases", default="*", help="patterns joined by ';', such as 'load-4k-0;resume-*' (default: all)")
    parser.add_argument("--clients", default="*", help="patterns joined by ';', such as 's3loader*;webdataset' (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per case (default: 3)")
    parser.add_argument("--budget", type=float, help="seconds after which a round ends (default: 8)")
    parser.add_argument("--no-publish", action="store_true", help="leave docs/benchmarks.md as it is")
    args = parser.parse_args(argv)
    args.budget = args.budget or (2.0 if args.quick else 8.0)
    return args


def matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern.strip()) for pattern in patterns.split(";"))


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    shrink = 5 if args.quick else 1
    sets = [Data("4k", 50_000 // shrink, 4 * KIB, 10), Data("100k", 2000 // shrink, 100 * KIB, 8)]
    where, began, versions = machine(), time.monotonic(), {}
    results: dict[str, dict[str, Row]] = {}
    titles: dict[str, str] = {}
    try:
        _servers.need("cc")
        peers, why = _peers.python(_peers.LOAD)
        with tempfile.TemporaryDirectory(prefix="s3loader-bench-") as name:
            folder = Path(name)
            program, limit = _servers.build(folder, "s3server", "limit")
            with _servers.started(program, reserve_mib=2048) as port:
                for data in sets:
                    wanted = [
                        c
                        for c in (f"load-{data.name}-0", f"load-{data.name}-2", f"resume-{data.name}")
                        if matches(c, args.cases)
                    ]
                    if not wanted:
                        continue
                    print(f"[{time.monotonic() - began:4.0f} s] preparing {data.title}", file=sys.stderr, flush=True)
                    upload(data, port, peers, folder)
                    for case in wanted:
                        print(f"[{time.monotonic() - began:4.0f} s] {case}", file=sys.stderr, flush=True)
                        workers = 2 if case.endswith("-2") else 0
                        makers: dict[str, Callable[[], Runner]] = {}
                        for who in CONTENDERS:
                            resumes = who.name in (OURS, "litdata, cold")
                            if not (case.startswith("load") or resumes):
                                continue
                            if str(workers) in who.workers.split() and matches(who.name, args.clients):
                                spec = spec_of(who, data, workers, port, args, folder)
                                kind = Loading if case.startswith("load") else Resuming
                                makers[who.name] = _maker(who, spec, peers, why, kind, port, limit, data)
                        results[case], found = run_case(makers, rounds=args.rounds)
                        versions.update(found)
                        how = "one process" if not workers else "two worker processes"
                        titles[case] = f"{data.title}, {how}" if case.startswith("load") else f"{data.title}, resuming at 50 %"
                        print(f"\n{titles[case]}\n{table(results[case])}\n", flush=True)
    except Unavailable as error:
        print(f"bench-load skipped: {error}", file=sys.stderr)
        return 0
    command = ("python -m benchmarks.load " + shlex.join(argv if argv is not None else sys.argv[1:])).strip()
    where["seconds"] = round(time.monotonic() - began)
    parts = [describe(where, versions, command), "### Goals", goals_table(goals(results))]
    for case, rows in results.items():
        parts += [f"### {titles[case]}", table(rows)]
    print(goals_table(goals(results)))
    save("load", {"machine": where, "versions": versions, "command": command, "results": results})
    if not args.quick and args.cases == args.clients == "*" and not args.no_publish:
        publish("bench-load", "\n\n".join(parts))
    print(f"{where['seconds']} s", file=sys.stderr)
    return 0


def _maker(
    who: Contender,
    spec: dict[str, Any],
    peers: Path | None,
    why: str,
    kind: type[Loading],
    port: int,
    limit: Path,
    data: Data,
) -> Callable[[], Runner]:
    def make() -> Runner:
        if who.client == "limit":
            return Counting(Floor(limit, data, port, loose=who.variant == "loose"), port)
        if who.peer and peers is None:
            raise ClientFailed(why)
        python = peers if who.peer and peers else Path(sys.executable)
        return Counting(kind(Child(python, "load_clients.py", spec)), port)

    return make


if __name__ == "__main__":
    sys.exit(main())
