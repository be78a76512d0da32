"""Distant stores: ``make bench-far``.

The in-memory S3 server answers as a store in the same region, or far from it, does: a time to the
first byte (one request in a hundred takes ten times as long), and a bandwidth of each connection.
Everyone runs with default options. The limit is a C client with 64 connections. One case is read over
TLS 1.3, for which OpenSSL's headers must be there (libssl-dev).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import _peers, _servers, load
from benchmarks._harness import (
    DOCS,
    Child,
    ClientFailed,
    Command,
    Goal,
    Round,
    Row,
    Runner,
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
from benchmarks.load import KIB, MIB, Contender, Counting, Data, Loading, first, matches, samples_rate, spec_of, upload

OURS, LIMIT = "s3loader", "C client, 64 connections"
FIRST_BYTE_MS = (2, 25, 80)
RATE = 90_000_000
"""Bytes per second of one connection."""
LOADERS = (
    Contender(LIMIT, "limit", peer=False),
    Contender(OURS, "s3loader", workers="0", peer=False),
    Contender("s3loader.torch", "s3loader.torch", peer=False),
    Contender("webdataset", "webdataset"),
    Contender("litdata, cold", "litdata", workers="0"),
    Contender("mosaicml-streaming, cold", "mosaicml-streaming", workers="0"),
)
GETTERS = {
    LIMIT: "limit",
    OURS: "s3loader",
    "obstore": "obstore",
    "s3torchconnector": "s3torchconnector",
    "s3dlio": "s3dlio",
    "boto3": "boto3",
}
TLS_GETTERS = ("s3loader", "obstore", "s3torchconnector", "s3dlio")
"""Who reads over TLS, too: the same as in `get.py`, which has the C client speak plain HTTP only."""
SAVERS = {
    OURS: "s3loader",
    "s3torchconnector, DCP": "dcp",
    "s3torchconnector, torch.save": "s3torchconnector",
    "s3dlio checkpoint store": "s3dlio",
}


def go_far(port: int, **settings: int) -> None:
    """Make the server answer so; without `settings` as fast as it can."""
    query = "&".join(f"{name}={value}" for name, value in settings.items())
    request = urllib.request.Request(f"http://127.0.0.1:{port}/__far?{query}", method="PUT")
    urllib.request.urlopen(request, timeout=30).close()


def put(port: int, key: str, body: bytes) -> None:
    """Put an object on the server."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}/{key}", data=body, method="PUT")
    urllib.request.urlopen(request, timeout=60).close()


def distance(first_byte_ms: int) -> dict[str, int]:
    """What the server is told to be `first_byte_ms` away; 0: as near as loopback is."""
    if not first_byte_ms:
        return {}
    first_us = first_byte_ms * 1000
    return {"first_us": first_us, "tail_ppm": 10_000, "tail_us": 10 * first_us, "rate": RATE, "connect_us": first_us}


@contextmanager
def at_a_distance(port: int, settings: Mapping[str, int]) -> Iterator[None]:
    """The server is far meanwhile, then near again."""
    go_far(port, **settings)
    try:
        yield
    finally:
        go_far(port)


class Far:
    """A runner whose rounds begin with the server at a distance, and end with it near."""

    def __init__(self, inner: Runner, port: int, settings: Mapping[str, int]) -> None:
        self.inner, self.port, self.settings = inner, port, settings
        self.versions = inner.versions

    def run(self) -> Round:
        with at_a_distance(self.port, self.settings):
            return self.inner.run()

    def close(self) -> None:
        self.inner.close()


class Verb:
    """One verb of a child that knows several."""

    def __init__(self, child: Child, *arguments: Any) -> None:
        self.child, self.arguments, self.versions = child, arguments, child.versions

    def run(self) -> Round:
        return self.child.run(*self.arguments)

    def close(self) -> None:
        self.child.close()


class Numbered(Verb):
    """A save: each round has a number of its own."""

    count = 0

    def run(self) -> Round:
        Numbered.count += 1
        return self.child.run(*self.arguments, Numbered.count)


class Limit(Command):
    """The raw bytes of all tars in C, in ranges of 1 MiB over 64 connections: no order, no samples, no checks."""

    def __init__(self, program: Path, data: Data, port: int) -> None:
        size = min(MIB, data.tar_size)
        self._data = data
        path = f"/{BUCKET}/{data.name}/whole"
        super().__init__(
            [str(program), "get", "127.0.0.1", str(port), "64", str(data.tars * data.tar_size // size), str(size), path]
        )

    def run(self) -> Round:
        found = super().run()
        return {
            **found,
            "items": round(found["bytes"] / self._data.tar_size * self._data.count / self._data.tars),
            "first": None,
        }


def bytes_table(rows: Mapping[str, Row]) -> str:
    """Reading, saving or restoring as a markdown table."""
    lines, absent = [], []
    for row in rows.values():
        if not row.rounds:
            absent.append(f"{row.client}: {row.reason}")
            continue
        ours = rows[OURS]
        lines.append(
            [
                row.client,
                f"{row.median(rate) / 1e6:,.0f}",
                f"{100 * row.spread(rate):.0f} %",
                f"{row.median(cpu_per_byte) * 1e9:.2f}",
                f"{row.median(lambda r: r['requests']):,.0f}",
                f"{ours.ratio(row, rate):.2f}" if ours.rounds else "-",
            ]
        )
    text = markdown(["client", "MB/s", "spread", "CPU-s/GB", "requests", "s3loader / it"], lines)
    return text + "".join(f"\n\nDid not run: {line}." for line in absent)


def steady(r: Round) -> float:
    """Samples per second from the first batch on; of the limit, which has no batches, from its start."""
    begun = r["first"] or 0.0
    return float((r["items"] - (32 if begun else 0)) / max(1e-9, r["wall"] - begun))


def counted(runner: Runner, port: int, settings: Mapping[str, int]) -> Runner:
    return Counting(Far(runner, port, settings), port)


def python_of(peer: bool, peers: tuple[Path | None, str]) -> Path:
    """The interpreter of a client.

    Raises:
        ClientFailed: the peers' environment could not be made.
    """
    if not peer:
        return Path(sys.executable)
    if peers[0] is None:
        raise ClientFailed(peers[1])
    return peers[0]


def goals(results: Mapping[str, Mapping[str, Row]]) -> list[Goal]:
    """The figures the project set itself at 25 ms, beside what came out."""

    def against(case: str, other: str, ours: str = OURS, value: Callable[[Round], float] = steady) -> float | None:
        a, b = results.get(case, {}).get(ours), results.get(case, {}).get(other)
        return a.ratio(b, value) if a and b and a.rounds and b.rounds else None

    def reached(size: str, workers: int, ours: str) -> float | None:
        """Of the C client's rate, or of our own on loopback, whichever is less."""
        case = f"load-{size}-{workers}-25ms"
        mine, near = results.get(case, {}).get(ours), results.get(f"load-{size}-{workers}-0ms", {}).get(ours)
        ratios = [against(case, LIMIT, ours)]
        if mine and near and mine.rounds and near.rounds:
            ratios.append(mine.median(steady) / near.median(steady))
        return max((ratio for ratio in ratios if ratio is not None), default=None)

    found = []
    for size in ("4k", "100k"):
        case = f"load-{size}-0-25ms"
        row = results.get(case, {}).get(OURS)
        begun = row.median(first) / 0.025 if row and row.rounds else None
        found += [
            Goal(f"{size}: first batch from a cold start, in first-byte times", 6, begun, False),
            Goal(
                f"{size}, one process: steady samples/s against the C client or our own on loopback, the lower of them",
                0.8,
                reached(size, 0, OURS),
                True,
            ),
            Goal(
                f"{size}, two workers: steady samples/s against the C client or our own on loopback, the lower of them",
                0.8,
                reached(size, 2, "s3loader.torch"),
                True,
            ),
            Goal(f"{size}, one process: samples/s against webdataset", 10, against(case, "webdataset"), True),
            Goal(  # with the time until the first batch, in which it fetches whole chunks ahead
                f"{size}, one process: samples/s from a cold start against litdata, cold",
                3,
                against(case, "litdata, cold", value=samples_rate),
                True,
            ),
        ]
    for verb in ("save", "load_into"):
        found.append(Goal(f"{verb}: MB/s against the C client", 0.8, against(f"ckpt-{verb}-25ms", LIMIT, value=rate), True))
    return found


def plot(results: Mapping[str, Mapping[str, Row]], path: Path) -> None:
    """Samples per second against the time to the first byte, one line per client."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "s3loader"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for axis, size in zip(axes, ("4k", "100k"), strict=True):
        for who in LOADERS:
            found = [(ms, results.get(f"load-{size}-0-{ms}ms", {}).get(who.name)) for ms in FIRST_BYTE_MS]
            points = [(ms, row.median(samples_rate)) for ms, row in found if row is not None and row.rounds]
            if points:
                style = {OURS: {"linewidth": 2.5}, LIMIT: {"linestyle": ":", "color": "grey"}}.get(who.name, {})
                axis.plot(*zip(*points, strict=True), marker="o", label=who.name, **style)  # type: ignore[arg-type]
        axis.set(
            xscale="log", yscale="log", xlabel="first byte after, ms", title=f"samples of {size[:-1]} KiB", xticks=FIRST_BYTE_MS
        )
        axis.set_xticklabels([str(ms) for ms in FIRST_BYTE_MS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("samples per second")
    axes[1].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.far", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="25 ms only, a fifth of the data; figures are not published")
    parser.add_argument("--cases", default="*", help="patterns joined by ';', such as 'load-4k-*;ckpt-*' (default: all)")
    parser.add_argument("--clients", default="*", help="patterns joined by ';', such as 's3loader*;C client*' (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per case (default: 3)")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds after which a round of loading ends (default: 3)")
    parser.add_argument("--no-publish", action="store_true", help="leave docs/benchmarks.md as it is")
    return parser.parse_args(argv)


class Bench:
    """All cases against one server."""

    def __init__(self, args: argparse.Namespace, folder: Path, port: int, limit: Path, ca: Path | str) -> None:
        self.args, self.folder, self.port, self.limit = args, folder, port, limit
        self.ca = ca
        """Whom to trust over TLS; a text: why the server speaks none."""
        self.results: dict[str, dict[str, Row]] = {}
        self.titles: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.began = time.monotonic()
        self.load_peers = _peers.python(_peers.LOAD)
        self.get_peers = _peers.python(_peers.GET)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {text}", file=sys.stderr, flush=True)

    def run(
        self, case: str, title: str, makers: dict[str, Callable[[], Runner]], table: Callable[[Mapping[str, Row]], str]
    ) -> None:
        """One case, printed when it is done."""
        makers = {name: make for name, make in makers.items() if matches(name, self.args.clients)}
        if not makers or not matches(case, self.args.cases):
            return
        self.say(case)
        rows, versions = run_case(makers, rounds=self.args.rounds)
        self.results[case], self.titles[case] = rows, title
        self.versions.update(versions)
        print(f"\n{title}\n{table(rows)}\n", flush=True)

    def loading(self, data: Data) -> None:
        """Shuffled batches of 32, from a cold start."""
        self.say(f"preparing {data.title}")
        upload(data, self.port, self.load_peers[0], self.folder)
        put(self.port, f"{data.name}/whole", bytes(data.tars * data.tar_size))  # for the limit
        for ms in (0, 25) if self.args.quick else (0, *FIRST_BYTE_MS):
            for workers in (0, 2) if ms in (0, 25) else (0,):
                makers = {
                    who.name: self._loader(who, data, workers, ms)
                    for who in LOADERS
                    if str(workers) in who.workers.split() and (ms or not who.peer)
                }
                how = "one process" if not workers else "two workers"
                where = f"first byte after {ms} ms" if ms else "loopback"
                self.run(f"load-{data.name}-{workers}-{ms}ms", f"{data.title}, {where}, {how}", makers, load.table)

    def _loader(self, who: Contender, data: Data, workers: int, ms: int) -> Callable[[], Runner]:
        def make() -> Runner:
            if who.client == "limit":
                return counted(Limit(self.limit, data, self.port), self.port, distance(ms))
            python = python_of(who.peer, self.load_peers)
            spec = spec_of(who, data, workers, self.port, self.args, self.folder)
            return counted(Loading(Child(python, "load_clients.py", spec)), self.port, distance(ms))

        return make

    def reading(self) -> None:
        """Whole objects of 100 KiB, 64 at a time where the client takes a number."""
        layout = Layout("get-100k", 400 if self.args.quick else 2000, 100 * KIB)
        _servers.make_objects(self.folder, [layout])
        for i in range(layout.count):
            put(self.port, layout.key(i), (self.folder / BUCKET / layout.key(i)).read_bytes())
        for ms in (25,) if self.args.quick else FIRST_BYTE_MS:
            makers = {name: self._getter(name, client, layout, ms) for name, client in GETTERS.items()}
            title = f"{layout.count:,} whole objects of 100 KiB, first byte after {ms} ms, 64 in flight"
            self.run(f"get-{ms}ms", title, makers, bytes_table)
        makers = {client: self._getter(client, client, layout, 25, tls=True) for client in TLS_GETTERS}
        title = f"{layout.count:,} whole objects of 100 KiB over TLS 1.3, first byte after 25 ms, 64 in flight"
        self.run("get-tls-25ms", title, makers, bytes_table)

    def _getter(self, name: str, client: str, layout: Layout, ms: int, *, tls: bool = False) -> Callable[[], Runner]:
        spec = {
            "client": client,
            "engine": "auto",
            "variant": "",
            "write": False,
            "busy": False,
            "endpoint": f"{'https' if tls else 'http'}://127.0.0.1:{self.port}",
            "ca": str(self.ca) if tls else None,
            "bucket": BUCKET,
            "single": False,
            "key": f"{layout.name}/%06d",
            "count": layout.count,
            "size": layout.size,
            "connections": 64,
            "budget": self.args.budget,
            "crc": [],
            "packages": [client],
        }
        path = f"/{BUCKET}/{layout.name}/%06u"

        def make() -> Runner:
            inner: Runner
            if tls and isinstance(self.ca, str):
                raise ClientFailed(self.ca)
            if client == "limit":
                what = ["get", "127.0.0.1", str(self.port), "64", str(layout.count), str(layout.size), path]
                inner = Command([str(self.limit), *what])
            else:
                with at_a_distance(self.port, distance(ms)):  # who measures its store shall not have known it as a near one
                    inner = Verb(Child(python_of(name != OURS, self.get_peers), "get_clients.py", spec))
            return counted(inner, self.port, distance(ms))

        return make

    def checkpoints(self) -> None:
        """One state saved, and loaded into its own tensors."""
        size = 128 if self.args.quick else 1024
        for verb, title in (("save", "save"), ("load_into", "load into the state's own tensors")):
            makers = {name: self._saver(name, client, size, verb) for name, client in SAVERS.items()}
            what = {"save": "put", "load_into": "load"}[verb]
            makers = {LIMIT: self._mover(size, what), **makers}
            self.run(f"ckpt-{verb}-25ms", f"{size} MiB in 32 tensors, first byte after 25 ms: {title}", makers, bytes_table)

    def _mover(self, size: int, what: str) -> Callable[[], Runner]:
        count = 64
        put(self.port, "whole", bytes(size * MIB))
        path = f"/{BUCKET}/moved/%06u" if what == "put" else f"/{BUCKET}/whole"
        argv = [str(self.limit), what, "127.0.0.1", str(self.port), "64", str(count), str(size * MIB // count), path]
        return lambda: counted(Command(argv), self.port, distance(25))

    def _saver(self, name: str, client: str, size: int, verb: str) -> Callable[[], Runner]:
        spec = {
            "client": client,
            "endpoint": f"http://127.0.0.1:{self.port}",
            "bucket": BUCKET,
            "prefix": client,
            "tensors": 32,
            "elements": size * MIB // 32 // 4,
            "threads": 2,
            "packages": {"dcp": ["torch"]}.get(client, [client]),
        }

        def make() -> Runner:
            child = Child(python_of(name != OURS, self.get_peers), "ckpt_clients.py", spec, timeout=300)
            try:
                with at_a_distance(self.port, distance(25)):
                    child.run("save", 0)
            except ClientFailed:
                child.close()
                raise
            runner = Numbered(child, "save") if verb == "save" else Verb(child, verb, 0)
            return counted(runner, self.port, distance(25))

        return make


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    shrink = 5 if args.quick else 1
    sets = [Data("4k", 50_000 // shrink, 4 * KIB, 10), Data("100k", 4000 // shrink, 100 * KIB, 8)]
    where = machine()
    try:
        _servers.need("cc")
        with tempfile.TemporaryDirectory(prefix="s3loader-bench-") as name:
            folder = Path(name)
            (limit,) = _servers.build(folder, "limit")
            ca: Path | str
            try:
                (program,) = _servers.build(folder, "s3server", tls=True)
                ca = _servers.certificate(folder / "tls", "127.0.0.1")
            except Unavailable as error:
                (program,) = _servers.build(folder, "s3server")
                ca = str(error)
            with _servers.started(program, reserve_mib=2048, tls=ca.parent if isinstance(ca, Path) else None) as port:
                bench = Bench(args, folder, port, limit, ca)
                for data in sets:
                    if matches(f"load-{data.name}-0-25ms", args.cases) or f"-{data.name}-" in args.cases:
                        bench.loading(data)
                        _servers.forget(port, f"{BUCKET}/{data.name}")
                if "get" in args.cases or args.cases == "*":
                    bench.reading()
            if "ckpt" in args.cases or args.cases == "*":
                with _servers.started(program, reserve_mib=1024 if args.quick else 7168) as bench.port:
                    bench.checkpoints()
    except Unavailable as error:
        print(f"bench-far skipped: {error}", file=sys.stderr)
        return 0
    command = ("python -m benchmarks.far " + shlex.join(argv if argv is not None else sys.argv[1:])).strip()
    where["seconds"] = round(time.monotonic() - bench.began)
    parts = [describe(where, bench.versions, command), "### Goals", goals_table(goals(bench.results))]
    for case, rows in bench.results.items():
        parts += [f"### {bench.titles[case]}", (load.table if case.startswith("load") else bytes_table)(rows)]
    print(goals_table(goals(bench.results)))
    save("far", {"machine": where, "versions": bench.versions, "command": command, "results": bench.results})
    if not args.quick and args.cases == args.clients == "*" and not args.no_publish:
        picture = DOCS.parent / "far.svg"
        plot(bench.results, picture)
        parts.insert(1, f"![Samples per second against the time to the first byte, ours and the peers']({picture.name})")
        publish("bench-far", "\n\n".join(parts))
    print(f"{where['seconds']} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
