"""Object layer against its peers and a raw C loop: ``make bench-get``.

Reads from nginx and writes to a C sink, four sizes, over HTTP, over TLS and beside a busy main
thread. ``python -m benchmarks.get --help`` lists the filters; docs/benchmarks.md says how to read
the tables, which it also holds.
"""

from __future__ import annotations

import argparse
import fnmatch
import shlex
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import _peers, _servers
from benchmarks._harness import (
    Child,
    ClientFailed,
    Command,
    Goal,
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
from benchmarks._servers import BUCKET, Layout, Nginx, Unavailable

KIB, MIB = 1 << 10, 1 << 20
LAYOUTS = (
    Layout("8m", 128, 8 * MIB, single=True),
    Layout("1m", 2000, MIB, distinct=256),
    Layout("100k", 20_000, 100 * KIB, distinct=2048),
    Layout("4k", 50_000, 4 * KIB, distinct=16_384),
)
TITLES = {
    "8m": "1 GiB in 8 MiB ranges",
    "1m": "2,000 x 1 MiB",
    "100k": "20,000 x 100 KiB",
    "4k": "50,000 x 4 KiB",
    "multipart": "1 GiB as one multipart upload, parts of 8 MiB",
}
WRITE_TITLES = {**TITLES, "8m": "128 x 8 MiB"}
CONNECTIONS = {"8m": 8, "1m": 16, "100k": 16, "4k": 16, "multipart": 8}
SETTINGS = {
    "http": "HTTP",
    "tls": "TLS 1.3",
    "busy": "HTTP, main thread busy in Python",
    "tls-busy": "TLS 1.3, main thread busy in Python",
}


@dataclass(frozen=True)
class Contender:
    """One row of a table: a client, how it is used, and in which cases."""

    name: str
    client: str
    engine: str = ""
    variant: str = ""
    reads: str = ""
    """Settings of the read cases it runs in, separated by spaces."""
    writes: str = ""
    layouts: str = "8m 1m 100k 4k"


LOOP, DIRECT, AUTO, OWN = "C loop", "s3loader direct", "s3loader auto", "s3loader, own sockets"
OBSTORE, CONNECTOR = "obstore", "s3torchconnector"
CONTENDERS = (
    Contender(LOOP, "limit", reads="http", writes="http"),
    Contender(AUTO, "s3loader", "auto", reads="tls busy tls-busy", writes="tls"),
    Contender(DIRECT, "s3loader", "direct", reads="http tls busy", writes="http tls"),
    Contender(OWN, "s3loader", "direct", "own", reads="tls-busy"),
    Contender(f"{DIRECT}, read_into", "s3loader", "direct", "read_into", reads="http busy"),
    Contender(f"{DIRECT}, get_ranges", "s3loader", "direct", "get_ranges", reads="http", layouts="8m"),
    Contender("direct engine, bare", "s3loader", "direct", "bare", reads="http", writes="http"),
    Contender("s3loader boto3", "s3loader", "boto3", reads="http", writes="http"),
    Contender(OBSTORE, "obstore", variant="unsigned", reads="http tls busy tls-busy", writes="http tls"),
    Contender("obstore, async", "obstore", variant="async", reads="http"),
    Contender("obstore, signed payload", "obstore", variant="signed", writes="http"),
    Contender(CONNECTOR, "s3torchconnector", reads="http tls busy tls-busy", writes="http tls"),
    Contender("s3dlio", "s3dlio", reads="http tls busy", writes="http tls"),
    Contender("boto3", "boto3", reads="http", writes="http"),
    Contender(f"{DIRECT}", "s3loader", "direct", "multipart", writes="http", layouts="multipart"),
    Contender(OBSTORE, "obstore", variant="multipart", writes="http", layouts="multipart"),
    Contender(CONNECTOR, "s3torchconnector", variant="multipart", writes="http", layouts="multipart"),
    Contender("s3dlio", "s3dlio", variant="multipart", writes="http", layouts="multipart"),
    Contender("boto3", "boto3", variant="multipart", writes="http", layouts="multipart"),
)


@dataclass(frozen=True)
class Case:
    """One workload in one setting; `name` is what ``--cases`` matches."""

    verb: str
    setting: str
    layout: Layout

    @property
    def name(self) -> str:
        return f"{self.verb}-{self.setting}-{self.layout.name}"

    @property
    def title(self) -> str:
        titles = TITLES if self.verb == "read" else WRITE_TITLES
        name = self.layout.name
        return f"{self.verb.capitalize()} {titles[name]}, {SETTINGS[self.setting]}, {CONNECTIONS[name]} connections"

    def contenders(self, pattern: str) -> list[Contender]:
        chosen = []
        for c in CONTENDERS:
            settings = c.reads if self.verb == "read" else c.writes
            fits = self.setting in settings.split() and self.layout.name in c.layouts.split()
            if fits and any(fnmatch.fnmatch(c.name, p.strip()) for p in pattern.split(";")):
                chosen.append(c)
        return chosen


def cases(quick: bool) -> list[Case]:
    """All of them, in the order of the page."""
    layouts = [replace(la, count=max(32, la.count // 8)) for la in LAYOUTS] if quick else list(LAYOUTS)
    found = [
        Case("read", setting, la)
        for setting in SETTINGS
        for la in layouts
        if setting != "tls-busy" or la.name in ("1m", "100k")
    ]
    puts = [replace(la, single=False) for la in layouts]
    found += [Case("write", "http", la) for la in puts]
    found.append(Case("write", "http", replace(layouts[0], name="multipart", single=False)))
    found += [Case("write", "tls", la) for la in puts if la.name in ("8m", "100k")]
    return found


@dataclass(frozen=True)
class World:
    """What the clients need to know of where they run."""

    limit: Path
    nginx: Nginx
    sink: int
    peers: Path | None
    peers_missing: str
    data: Path
    budget: float


def maker(case: Case, who: Contender, world: World) -> Callable[[], Runner]:
    """A function that starts `who` for `case`."""
    la = case.layout
    port = {"read": world.nginx.http, "write": world.sink}[case.verb]
    if case.setting.startswith("tls"):
        port = {"read": world.nginx.tls, "write": world.nginx.tls_sink}[case.verb]
    if who.client == "limit":
        path = f"/{BUCKET}/{la.name}.bin" if la.single else f"/{BUCKET}/{la.name}/%06u"
        verb = {"read": "get", "write": "put"}[case.verb]
        argv = [str(world.limit), verb, "127.0.0.1", str(port), str(CONNECTIONS[la.name]), str(la.count), str(la.size), path]
        return lambda: Command(argv)
    python: Path | None = Path(sys.executable)
    if who.client != "s3loader":
        python = world.peers
    if python is None:

        def missing() -> Runner:
            raise ClientFailed(world.peers_missing)

        return missing
    spec = {
        "client": who.client,
        "engine": who.engine,
        "variant": who.variant,
        "write": case.verb == "write",
        "busy": case.setting.endswith("busy"),
        "endpoint": f"{'https' if case.setting.startswith('tls') else 'http'}://127.0.0.1:{port}",
        "ca": str(world.nginx.ca) if case.setting.startswith("tls") else None,
        "bucket": BUCKET,
        "single": la.single,
        "key": f"{la.name}.bin" if la.single else f"{la.name}/%06d",
        "count": la.count,
        "size": la.size,
        "connections": CONNECTIONS[la.name],
        "budget": world.budget,
        "crc": checksums(world.data, la) if case.verb == "read" else [],
        "packages": [who.client],
    }
    return lambda: Child(python, "get_clients.py", spec)


def checksums(data: Path, layout: Layout, n: int = 16) -> list[int]:
    """CRC-32 of the first items, which every client's answers are compared with."""
    found = []
    for i in range(min(n, layout.count)):
        with open(data / BUCKET / layout.key(i), "rb") as file:
            if layout.single:
                file.seek(i * layout.size)
            found.append(zlib.crc32(file.read(layout.size)))
    return found


def table(rows: dict[str, Row]) -> str:
    """One case as a markdown table."""
    loop, obstore = rows.get(LOOP), rows.get(OBSTORE)
    lines, absent = [], []
    for row in rows.values():
        if not row.rounds:
            absent.append(f"{row.client}: {row.reason}")
            continue
        items = row.median(lambda r: r["items"])
        lines.append(
            [
                row.client,
                f"{row.median(rate) / 1e6:,.0f}",
                f"{100 * row.spread(rate):.0f} %",
                f"{row.median(cpu_per_byte) * 1e9:.3f}",
                f"{row.median(lambda r: cpu(r) / r['items'] * 1e6):,.1f}",
                f"{row.median(lambda r: r['peak'] - r['base']) / MIB:,.0f}",
                f"{row.median(lambda r: r['requests']):,.0f}",
                f"{row.median(lambda r: r['requests']) / items:.2f}",
                f"{row.ratio(loop, cpu_per_byte):.2f}" if loop and loop.rounds else "-",
                f"{row.ratio(obstore, rate):.2f}" if obstore and obstore.rounds else "-",
            ]
        )
    head = [
        "client",
        "MB/s",
        "spread",
        "CPU-s/GB",
        "us CPU/item",
        "peak MiB",
        "requests",
        "per item",
        "CPU / C loop",
        "MB/s / obstore",
    ]
    text = markdown(head, lines)
    return text + "".join(f"\n\nDid not run: {line}." for line in absent)


def goals(results: dict[str, dict[str, Row]]) -> list[Goal]:
    """The figures the project set itself, beside what came out."""

    def ratio(case: str, ours: str, theirs: str, value: Callable[[dict[str, Any]], float]) -> float | None:
        rows = results.get(case, {})
        a, b = rows.get(ours), rows.get(theirs)
        return a.ratio(b, value) if a and b and a.rounds and b.rounds else None

    sizes = ("8m", "1m", "100k", "4k")
    found = []
    for size, target in zip(sizes, (1.3, 1.3, 1.6, 2.0), strict=True):
        value = ratio(f"read-http-{size}", DIRECT, LOOP, cpu_per_byte)
        found.append(Goal(f"read {size}, HTTP: CPU-s/GB against the C loop", target, value, False))
    for setting, ours, theirs, targets in (
        ("http", DIRECT, OBSTORE, (2.0, 2.0, 2.0, 1.5)),
        ("http", DIRECT, CONNECTOR, (3.0, 3.0, 3.0)),
        ("tls", AUTO, OBSTORE, (1.2, 1.2, 1.2, 1.2)),
        ("busy", AUTO, OBSTORE, (0.95, 0.95, 0.95, 0.95)),
    ):
        for size, target in zip(sizes, targets, strict=False):
            value, floor = (ratio(f"read-{setting}-{size}", who, theirs, rate) for who in (ours, LOOP))
            found.append(Goal(f"read {size}, {SETTINGS[setting]}: MB/s against {theirs}", target, value, True, floor))
    for size in ("8m", "multipart", "1m", "100k", "4k"):
        value = ratio(f"write-http-{size}", DIRECT, OBSTORE, cpu_per_byte)
        found.append(Goal(f"write {size}, HTTP, with CRC32C: CPU-s/GB against obstore without a checksum", 1.3, value, False))
    return found


def page(results: dict[str, dict[str, Row]], chosen: Iterable[Case], header: str) -> str:
    """All tables as markdown."""
    parts = [header, "### Goals", goals_table(goals(results))]
    for case in chosen:
        parts += [f"### {case.title}", table(results[case.name])]
    return "\n\n".join(parts)


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.get", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="an eighth of the data and 0.4 s a round; figures are not published"
    )
    parser.add_argument("--cases", default="*", help="patterns joined by ';', such as 'read-http-*;write-*-8m' (default: all)")
    parser.add_argument(
        "--clients", default="*", help="patterns joined by ';', such as 'C loop;s3loader direct*;obstore' (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds per case (default: 3)")
    parser.add_argument("--budget", type=float, help="seconds after which a round starts no further request (default: 1.2)")
    parser.add_argument("--workers", type=int, default=2, help="nginx worker processes (default: 2)")
    parser.add_argument("--no-publish", action="store_true", help="leave docs/benchmarks.md as it is")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    chosen = [c for c in cases(args.quick) if any(fnmatch.fnmatch(c.name, p.strip()) for p in args.cases.split(";"))]
    budget = args.budget or (0.4 if args.quick else 1.2)
    where, began = machine(), time.monotonic()
    results: dict[str, dict[str, Row]] = {}
    try:
        _servers.need("nginx", "cc")
        peers, why = _peers.python(_peers.GET)
        with tempfile.TemporaryDirectory(prefix="s3loader-bench-") as name:
            folder = Path(name)
            limit, sink = _servers.build(folder, "limit", "sink")
            used = {c.layout.name for c in chosen if c.verb == "read"}
            _servers.make_objects(
                folder / "data",
                [c.layout for c in cases(args.quick) if c.name.startswith("read-http-") and c.layout.name in used],
            )
            with (
                _servers.started(sink) as port,
                _servers.nginx(folder / "nginx", folder / "data", sink_port=port, workers=args.workers) as web,
            ):
                world = World(limit, web, port, peers, why, folder / "data", budget)
                versions = {"nginx": _servers.nginx_version()}
                for case in chosen:
                    print(f"[{time.monotonic() - began:4.0f} s] {case.name}", file=sys.stderr, flush=True)
                    makers = {c.name: maker(case, c, world) for c in case.contenders(args.clients)}
                    seen = web.requests if case.verb == "read" else lambda: _servers.stats(port)["requests"]
                    results[case.name], found = run_case(makers, rounds=args.rounds, requests=seen)
                    versions.update(found)
                    print(f"\n{case.title}\n{table(results[case.name])}\n", flush=True)
    except Unavailable as error:
        print(f"bench-get skipped: {error}", file=sys.stderr)
        return 0
    command = "python -m benchmarks.get " + shlex.join(argv if argv is not None else sys.argv[1:])
    where["seconds"] = round(time.monotonic() - began)
    text = page(results, chosen, describe(where, versions, command.strip()))
    print(goals_table(goals(results)))
    save("get", {"machine": where, "versions": versions, "command": command, "results": results})
    whole = not args.quick and args.cases == "*" and args.clients == "*"
    if whole and not args.no_publish:
        publish("bench-get", text)
    print(f"{where['seconds']} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
