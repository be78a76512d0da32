"""Saving and loading checkpoints against others: ``make bench-ckpt``.

One state of float32 tensors, 2 GiB, to and from the in-memory S3 server: saved, loaded into the
state's own tensors, and loaded into fresh memory. States of this size do not fit beside each other,
so a client comes for a visit (start, one save and one load unmeasured, then the measured ones, its
objects forgotten) and clients take turns visit by visit. Beside those who load into what they have stands
a C loop that receives the same object into memory of its own, unsigned and unverified.
"""

from __future__ import annotations

import argparse
import fnmatch
import shlex
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import _peers, _servers
from benchmarks._harness import (
    Child,
    ClientFailed,
    Command,
    Goal,
    Round,
    Row,
    cpu_per_byte,
    describe,
    goals_table,
    machine,
    markdown,
    publish,
    rate,
    save,
)
from benchmarks._servers import BUCKET, Unavailable

MIB = 1 << 20
OURS = "s3loader"
FLOOR = "C loop"
NAMES = {
    OURS: "s3loader",
    "s3torchconnector, torch.save": "s3torchconnector",
    "s3torchconnector, DCP": "dcp",
    "boto3, torch.save": "boto3",
    "boto3, safetensors": "safetensors",
    "s3dlio checkpoint store": "s3dlio",
}
PACKAGES = {"dcp": ["torch"], "safetensors": ["safetensors"]}
VERBS = {
    "save": "Save",
    "load_into": "Load into the state's own tensors",
    "load_fresh": "Load into fresh memory",
}


def visit(
    name: str, python: Path, limit: Path, port: int, args: argparse.Namespace, rows: dict[str, dict[str, Row]]
) -> dict[str, str]:
    """One client once through everything; its rounds are added to `rows`."""
    spec = {
        "client": NAMES[name],
        "endpoint": f"http://127.0.0.1:{port}",
        "bucket": BUCKET,
        "prefix": NAMES[name],
        "tensors": 32,
        "elements": (args.size * MIB) // 32 // 4,
        "threads": 2,
        "packages": PACKAGES.get(NAMES[name], [NAMES[name]]),
    }
    child = Child(python, "ckpt_clients.py", spec, timeout=300)
    n = 0

    def measure(verb: str) -> None:
        nonlocal n
        before = _servers.stats(port)["requests"]
        result = child.run(verb, n)
        n += verb in ("save", "stall")
        rows[verb][name].rounds.append({**result, "requests": _servers.stats(port)["requests"] - before})

    try:
        child.run("save", 0)
        n = 1
        for _ in range(args.repeat):
            measure("save")
        child.run("verify", 0)
        for verb in ("load_into", "load_fresh"):
            for _ in range(args.repeat):
                measure(verb)
        if name == OURS:
            for _ in range(2 * args.repeat + 1):
                measure("memcpy")
                measure("stall")
            key = child.run("largest", 0)["key"]
            child.close()
            rows["load_into"][FLOOR].rounds += floor(limit, port, key, args)
    finally:
        child.close()
        _servers.forget(port, f"{BUCKET}/{NAMES[name]}")
    return child.versions


def floor(limit: Path, port: int, key: str, args: argparse.Namespace) -> list[Round]:
    """What the C loop does with the bytes of the object `key`, in ranges as large as ours."""
    argv = [
        str(limit),
        "load",
        "127.0.0.1",
        str(port),
        "8",
        str(args.size // 16),
        str(16 * MIB),
        f"/{BUCKET}/{NAMES[OURS]}/{key}",
    ]
    rounds = []
    for _ in range(args.repeat):
        found = Command(argv).run()
        rounds.append({**found, "rss": found["peak"]})  # all its memory was there before
    return rounds


def table(rows: dict[str, Row], ours: Row) -> str:
    """One verb as a markdown table."""
    lines, absent = [], []
    for row in rows.values():
        if not row.rounds:
            if row.reason:
                absent.append(f"{row.client}: {row.reason}")
            continue
        lines.append(
            [
                row.client,
                f"{row.median(rate) / 1e6:,.0f}",
                f"{100 * row.spread(rate):.0f} %",
                f"{row.median(cpu_per_byte) * 1e9:.2f}",
                f"{row.median(lambda r: r['peak'] - r['rss']) / MIB:,.0f}",
                f"{row.median(lambda r: r['requests']):,.0f}",
                f"{ours.ratio(row, rate):.2f}" if ours.rounds else "-",
            ]
        )
    text = markdown(["client", "MB/s", "spread", "CPU-s/GB", "memory grew by MiB", "requests", "s3loader / it"], lines)
    return text + "".join(f"\n\nDid not run: {line}." for line in absent)


def goals(rows: dict[str, dict[str, Row]], size: int) -> list[Goal]:
    """The figures the project set itself, beside what came out."""

    def against_best(verb: str, name: str = OURS) -> float | None:
        who = rows[verb][name]
        others = [r for n, r in rows[verb].items() if n not in (OURS, FLOOR) and r.rounds]
        return min(who.ratio(r, rate) for r in others) if who.rounds and others else None

    found = [
        Goal("save, with checksums: MB/s against the best of the others", 2.5, against_best("save"), True),
        Goal(
            "load into the state's own tensors, verified: MB/s against the best",
            5.0,
            against_best("load_into"),
            True,
            against_best("load_into", FLOOR),
        ),
        Goal("load into fresh memory, verified: MB/s against the best", 2.0, against_best("load_fresh"), True),
    ]
    loads, stalls, copies = rows["load_into"][OURS], rows["stall"][OURS], rows["memcpy"][OURS]
    grown = loads.median(lambda r: (r["peak"] - r["rss"]) / (64 * MIB)) if loads.rounds else None
    found.append(Goal("load in place: memory beyond the state, in units of 64 MiB", 1.0, grown, False))
    stall = budget = None
    if stalls.rounds:
        stall = stalls.ratio(copies, lambda r: r["seconds"])
        budget = stalls.median(lambda r: (r["peak"] - r["base"] - r["bytes"]) / (4 << 30))
    text = "asynchronous save: stall of the training thread against one memcpy of the state (by all cores, into warm memory)"
    found.append(Goal(text, 1.3, stall, False))
    found.append(Goal("asynchronous save: memory beyond the state, in units of the staging budget, 4 GiB", 1.0, budget, False))
    return found


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ckpt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="256 MiB and one visit; figures are not published")
    parser.add_argument("--size", type=int, help="MiB of tensors (default: 2048)")
    parser.add_argument("--clients", default="*", help="patterns joined by ';', such as 's3loader;boto3*' (default: all)")
    parser.add_argument("--visits", type=int, help="visits per client (default: 2)")
    parser.add_argument("--repeat", type=int, default=2, help="measured saves and loads per visit (default: 2)")
    parser.add_argument("--no-publish", action="store_true", help="leave docs/benchmarks.md as it is")
    args = parser.parse_args(argv)
    args.size = args.size or (256 if args.quick else 2048)
    args.visits = args.visits or (1 if args.quick else 2)
    return args


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    where, began, versions = machine(), time.monotonic(), {}
    chosen = [name for name in NAMES if any(fnmatch.fnmatch(name, p.strip()) for p in args.clients.split(";"))]
    rows = {verb: {name: Row(name) for name in chosen} for verb in (*VERBS, "memcpy", "stall")}
    for verb in rows:
        rows[verb].setdefault(OURS, Row(OURS))
    rows["load_into"][FLOOR] = Row(FLOOR)
    try:
        _servers.need("cc")
        peers, why = _peers.python(_peers.GET)
        with tempfile.TemporaryDirectory(prefix="s3loader-bench-") as folder:
            program, limit = _servers.build(Path(folder), "s3server", "limit")
            with _servers.started(program, reserve_mib=args.size * 5 // 2) as port:
                for turn in range(args.visits):
                    for name in chosen[turn % len(chosen) :] + chosen[: turn % len(chosen)]:
                        print(f"[{time.monotonic() - began:4.0f} s] {name}", file=sys.stderr, flush=True)
                        python = Path(sys.executable) if name == OURS else peers
                        try:
                            if python is None:
                                raise ClientFailed(why)
                            versions.update(visit(name, python, limit, port, args, rows))
                        except ClientFailed as error:
                            print(f"    failed: {error}", file=sys.stderr, flush=True)
                            for verb in VERBS:
                                rows[verb][name].reason = str(error)
    except Unavailable as error:
        print(f"bench-ckpt skipped: {error}", file=sys.stderr)
        return 0
    command = ("python -m benchmarks.ckpt " + shlex.join(argv if argv is not None else sys.argv[1:])).strip()
    where["seconds"] = round(time.monotonic() - began)
    parts = [describe(where, versions, command), "### Goals", goals_table(goals(rows, args.size))]
    for verb, title in VERBS.items():
        parts += [f"### {title}, {args.size} MiB in 32 tensors", table(rows[verb], rows[verb][OURS])]
    text = "\n\n".join(parts)
    print(text)
    save("ckpt", {"machine": where, "versions": versions, "command": command, "results": rows})
    if not args.quick and args.clients == "*" and not args.no_publish:
        publish("bench-ckpt", text)
    print(f"{where['seconds']} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
