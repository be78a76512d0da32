"""What every benchmark here shares: children, rounds, medians, tables, the page they end up on.

A *case* is one workload in one setting. Each *client* of a case is a process of its own that stays
alive for the case; round after round each of them runs once, in an order that moves by one place
per round, so that drift of the machine hits all alike. Figures are medians over the rounds; a ratio
is the median of the ratios *within* each round.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUT = HERE / "out"
DOCS = ROOT / "docs" / "benchmarks.md"

Round = dict[str, Any]
"""One measured round: wall, user, sys (seconds), bytes, items, peak, rss (bytes), requests."""


class ClientFailed(Exception):
    """A client could not run; the text says why, for the table."""


class Runner(Protocol):
    """One client of one case, ready to run rounds."""

    versions: dict[str, str]

    def run(self) -> Round: ...

    def close(self) -> None: ...


class Child:
    """A client in a process of its own that speaks the protocol of `_child.serve`."""

    def __init__(
        self,
        python: str | Path,
        script: str,
        spec: Mapping[str, Any],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> None:
        self.timeout = timeout
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [str(python), str(HERE / script), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **(env or {})},
        )
        self._rest = b""
        try:
            hello = self._answer()
        except ClientFailed:
            self.close()
            raise
        self.versions: dict[str, str] = hello["versions"]
        self.base: int = hello["base"]

    def run(self, *arguments: Any) -> Round:
        """One round; `arguments` go to the function that the client's `prepare` returned."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ClientFailed(self._why()) from None
        return {**self._answer(), "base": self.base}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + self.timeout
        fd = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise ClientFailed(f"no answer within {self.timeout:.0f} s")
            chunk = os.read(fd, 65536)
            if not chunk:
                self._process.wait()
                raise ClientFailed(self._why())
            self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        return dict(json.loads(line))

    def _why(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
        return (named or lines or [f"exit status {self._process.returncode}"])[-1][:300]

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class Command:
    """A client that is one command per round and prints its measurement as one line of JSON."""

    versions: dict[str, str] = {}  # noqa: RUF012 - never written

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = list(argv)

    def run(self) -> Round:
        """One round."""
        done = subprocess.run(self._argv, check=False, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise ClientFailed((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
        result = dict(json.loads(done.stdout))
        return {"rss": 0, "base": 0, "items": result["requests"], **result}

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class Row:
    """What one client did in one case."""

    client: str
    rounds: list[Round] = field(default_factory=list)
    reason: str | None = None
    """Why it did not run, where it did not."""

    def median(self, value: Callable[[Round], float]) -> float:
        return statistics.median(value(r) for r in self.rounds)

    def ratio(self, other: Row, value: Callable[[Round], float]) -> float:
        """Median over the rounds of our value over the other's."""
        return statistics.median(value(a) / max(value(b), 1e-12) for a, b in zip(self.rounds, other.rounds, strict=False))

    def spread(self, value: Callable[[Round], float]) -> float:
        """(largest - smallest) / median."""
        values = [value(r) for r in self.rounds]
        return (max(values) - min(values)) / (statistics.median(values) or 1e-12)


def rate(r: Round) -> float:
    """Bytes per second."""
    return float(r["bytes"] / r["wall"])


def cpu(r: Round) -> float:
    """CPU seconds (user + system) of the client."""
    return float(r["user"] + r["sys"])


def cpu_per_byte(r: Round) -> float:
    """CPU seconds per byte; CPU-s per GB is 1e9 times it."""
    return cpu(r) / max(r["bytes"], 1)


def run_case(
    makers: Mapping[str, Callable[[], Runner]],
    *,
    rounds: int,
    requests: Callable[[], int] | None = None,
    log: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> tuple[dict[str, Row], dict[str, str]]:
    """Start every client, run `rounds` rounds in turn; rows by client and the versions they told.

    `requests` tells how many requests the server has seen so far; the difference over a round is
    the round's own count, whatever the client believes.
    """
    rows = {name: Row(name) for name in makers}
    runners: dict[str, Runner] = {}
    versions: dict[str, str] = {}
    try:
        for name, make in makers.items():
            try:
                runners[name] = make()
                versions.update(runners[name].versions)
            except ClientFailed as error:
                rows[name].reason = str(error)
                log(f"    {name}: cannot run: {error}")
        order = list(runners)
        for turn in range(rounds):
            for name in order[turn % max(len(order), 1) :] + order[: turn % max(len(order), 1)]:
                if rows[name].reason:
                    continue
                before = requests() if requests else 0
                try:
                    result = runners[name].run()
                except (ClientFailed, subprocess.TimeoutExpired) as error:
                    rows[name].reason, rows[name].rounds = str(error), []
                    log(f"    {name}: failed: {error}")
                    continue
                if requests:
                    result["requests"] = requests() - before
                rows[name].rounds.append(result)
    finally:
        for runner in runners.values():
            runner.close()
    return rows, versions


@dataclass(frozen=True)
class Goal:
    """One figure that the project wants to reach, and what was measured."""

    text: str
    target: float
    measured: float | None
    at_least: bool
    """True: the measured ratio should be `target` or more; False: `target` or less."""
    floor: float | None = None
    """The same ratio for the C loop: what nobody can beat by much."""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "PASS" if (self.measured >= self.target if self.at_least else self.measured <= self.target) else "MISS"


def goals_table(goals: Sequence[Goal]) -> str:
    """A markdown table of goals and verdicts."""
    with_floor = any(g.floor is not None for g in goals)
    rows = []
    for g in goals:
        wanted = f"{'>=' if g.at_least else '<='} {g.target:g}x"
        row = [g.text, wanted, "-" if g.measured is None else f"{g.measured:.2f}x", g.verdict]
        rows.append([*row, "" if g.floor is None else f"{g.floor:.2f}x"] if with_floor else row)
    return markdown(["goal", "wanted", "measured", "", *(["the C loop itself"] if with_floor else [])], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table: first column left, the others right; also readable as plain text."""
    widths = [max(len(str(line[i])) for line in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *(line(r) for r in rows)])


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024  # type: ignore[index]
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": _commit(),
        "load_before": round(os.getloadavg()[0], 2),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:
        return "unknown"


def describe(where: Mapping[str, Any], versions: Mapping[str, str], command: str) -> str:
    """The paragraph above the tables: command, date, machine, versions."""
    names = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return (
        f"`{command}`, {where['date']}, commit {where['commit']}. {where['cores']} cores of {where['cpu']}, "
        f"{where['memory_gib']} GiB, {where['kernel']}, Python {where['python']}; "
        f"load average {where['load_before']} before the run. "
        f"Versions: {names}."
    )


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Keep the raw rounds as JSON beside the benchmarks (git-ignored)."""
    OUT.mkdir(exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    text = json.dumps(result, indent=1, default=asdict)
    (OUT / f"{name}-latest.json").write_text(text)
    path = OUT / f"{name}-{stamp}.json"
    path.write_text(text)
    return path


def publish(name: str, text: str, where: Path = DOCS) -> None:
    """Put `text` between this benchmark's markers in docs/benchmarks.md, or another page."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    page = where.read_text()
    if begin not in page or end not in page:
        page += f"\n{begin}\n{end}\n"
    head, rest = page.split(begin, 1)
    tail = rest.split(end, 1)[1]
    where.write_text(f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}")
