"""What is made of an op-log: figures, a page, a replay; and the commands of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from s3loader import ConfigError, FormatError, StoreOptions, open_store
from s3loader.oplog import OpRecord, html_report, read_op_log, replay_op_log, summarize, write_op_log
from s3loader.testing import FaultProxy, Rule, server

MS = 1_000_000
BEGIN = 1_700_000_000_000 * MS


def record(op: str, start: float, ms: float, size: int = 0, *, error: str = "", first: float | None = None) -> OpRecord:
    """A row; times in milliseconds after the begin."""
    begin = BEGIN + int(start * MS)
    at = None if first is None else begin + int(first * MS)
    return OpRecord(op, f"b/{op}-{start:g}", begin, begin + int(ms * MS), at, size, error=error, client_id="c", process=1)


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "s3loader", "oplog", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ})


def some_records() -> list[OpRecord]:
    rng = np.random.default_rng(1)
    reads = [record("GET", number * 10, float(rng.uniform(1, 500)), 1000, first=0.5) for number in range(400)]
    failed = [record("GET", number * 100, 5, error="ThrottledError: slow <down>") for number in range(7)]
    return sorted([*reads, *failed, record("PUT", 1500, 3000, 9_000_000)], key=lambda r: r.start)


def test_the_figures() -> None:
    rows = some_records()
    found = summarize(rows)
    assert (found.requests, found.errors, found.bytes) == (408, 7, 9_400_000)
    assert [op.op for op in found.ops] == ["PUT", "GET"]
    put, get = found.ops
    good = [r for r in rows if r.op == "GET" and not r.error]
    took = np.array([(r.end - r.start) / MS for r in good])
    assert get.latency is not None
    assert get.first_byte is not None
    assert (get.requests, get.errors, get.objects, get.bytes) == (407, 7, 400, 400_000)
    assert (get.latency.p50, get.latency.p99) == pytest.approx(tuple(np.percentile(took, (50, 99))))
    assert (get.latency.max, get.latency.mean) == pytest.approx((took.max(), took.mean()))
    assert get.first_byte.p90 == pytest.approx(0.5)
    seconds = (max(r.end for r in rows if r.op == "GET") - BEGIN) / 1e9
    assert get.ops_per_second == pytest.approx(400 / seconds)
    assert get.bytes_per_second == pytest.approx(400_000 / seconds)
    brute = max(sum(r.start <= t.start < r.end for r in rows if r.op == "GET") for t in rows if t.op == "GET")
    assert get.concurrency == brute
    assert put.first_byte is None
    # the bytes of a request of three seconds lie where they moved
    assert put.series.bytes[:5] == pytest.approx([0, 1.5e6, 3e6, 3e6, 1.5e6])
    assert sum(get.series.ops) == 400
    assert sum(get.series.errors) == 7
    assert sum(get.series.bytes) == pytest.approx(400_000)
    assert found.slowest[0].op == "PUT"
    assert len(found.slowest) == 10
    assert found.error_kinds == [("GET", "ThrottledError: slow <down>", 7)]


def test_a_long_run_has_wider_intervals() -> None:
    found = summarize([record("GET", hour * 3_600_000, 1, 100) for hour in range(100)], intervals=500)
    series = found.ops[0].series
    assert len(series.ops) <= 500
    assert sum(series.ops) * series.step == pytest.approx(100)
    with pytest.raises(FormatError):
        summarize([])
    assert summarize([record("GET", 0, 0)]).ops[0].ops_per_second == 0


class Page(HTMLParser):
    """Collects what the page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.lines: list[tuple[str, list[tuple[float, float]]]] = []
        self.sources: list[str] = []
        self.cells: list[str] = []
        self.data = ""
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        told = dict(attrs)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "polyline":
            points = [tuple(map(float, point.split(","))) for point in (told["points"] or "").split()]
            self.lines.append((told["data-op"] or "", points))  # type: ignore[arg-type]

    def handle_data(self, data: str) -> None:
        if self._tag == "script":
            self.data += data
        elif self._tag == "td":
            self.cells.append(data)


def test_the_page_shows_the_data() -> None:
    found = summarize(some_records())
    text = html_report(found, "a <title> & more")
    page = Page(text)
    assert page.sources == []
    assert "http" not in re.sub(r"<script.*?</script>", "", text, flags=re.S).replace("http-equiv", "")
    told = json.loads(page.data)
    assert told["requests"] == 408
    assert told["ops"][1]["latency"]["p50"] == found.ops[1].latency.p50  # type: ignore[union-attr]
    assert [op for op, _ in page.lines] == ["PUT", "GET", "PUT", "GET", "GET", "PUT", "GET"]  # bytes, ops, errors, latency
    assert {"PUT", "GET", "407", "ThrottledError: slow <down>"} <= set(page.cells)
    # the curve of PUT's throughput is as high as the data: its top, 3 MB/s, on an axis up to 5
    _, points = page.lines[0]
    bottom, top = max(y for _, y in points), min(y for _, y in points)
    assert (bottom - top) / (240 - 34 - 12) == pytest.approx(3 / 5, abs=0.01)
    assert "a &lt;title&gt; &amp; more" in text


def test_summarize_plot_and_merge(tmp_path: Path) -> None:
    rows = some_records()
    logs = [tmp_path / "a.tsv.zst", tmp_path / "b.tsv.zst"]
    for number, log in enumerate(logs):
        write_op_log(str(log), rows[number::2])
    shown = cli("summarize", *logs, "--series")
    assert shown.returncode == 0, shown.stderr
    assert "408 requests" in shown.stdout
    assert "errors/s" in shown.stdout
    assert json.loads(cli("summarize", *logs, "--json").stdout)["errors"] == 7
    assert json.loads(cli("summarize", *logs, "--op", "put", "--json").stdout)["requests"] == 1
    plotted = cli("plot", *logs)
    assert plotted.stdout.strip() == str(tmp_path / "a.html")
    assert len(Page((tmp_path / "a.html").read_text()).lines) == 7
    merged = tmp_path / "m.tsv.zst"
    assert cli("merge", *logs, "-o", merged).returncode == 0
    assert [r.start for r in read_op_log(str(merged))] == [r.start for r in rows]
    for arguments, code in (
        (("summarize", tmp_path / "missing"), 4),
        (("summarize",), 2),
        (("plot", logs[0], "-o", tmp_path / "no" / "x.html"), 1),
        (("replay", logs[0], "--op", "DELETE"), 3),
    ):
        done = cli(*arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert "Traceback" not in done.stderr


def test_replay(tmp_path: Path) -> None:
    log = tmp_path / "run.tsv.zst"
    rows = [
        record("PUT", 0, 10, 5000),
        record("PUTPART", 50, 10, 7000),
        OpRecord("GET", "b/k", BEGIN + 100 * MS, BEGIN + 110 * MS, None, 300, offset=1000),
        OpRecord("HEAD", "b/k", BEGIN + 150 * MS, BEGIN + 160 * MS),
        OpRecord("LIST", "b/", BEGIN + 200 * MS, BEGIN + 210 * MS, objects=2),
        OpRecord("GET", "b/bad", BEGIN + 200 * MS, BEGIN + 210 * MS, error="ThrottledError: x"),
        OpRecord("DELETE", "b/k", BEGIN + 300 * MS, BEGIN + 310 * MS),
        OpRecord("DELETE", "b/k", BEGIN + 300 * MS, BEGIN + 310 * MS, objects=100),
    ]
    write_op_log(str(log), rows)
    to = f"file://{tmp_path}/there"
    report = replay_op_log(str(log), to, prepare=True, speed=2)
    assert (report.sent, report.errors) == (5, 0)
    assert report.skipped == {"GET": 1, "DELETE": 2}
    assert report.seconds >= 0.1
    store = open_store(to)
    assert store.head("b/PUT-0").size == 5000
    assert store.head("b/k").size == 1300
    assert {op.op: op.bytes for op in report.summary.ops}["GET"] == 300  # type: ignore[union-attr]
    assert replay_op_log(str(log), to, ops=["delete"], speed=0).sent == 1
    assert not store.exists("b/k")
    failed = replay_op_log(str(log), to, ops=["GET", "HEAD"], speed=0, concurrency=1)
    assert (failed.sent, failed.errors) == (2, 2)
    done = cli("replay", log, "--to", to, "--op", "GET", "--speed", "0")
    assert done.returncode == 1
    assert "ObjectNotFoundError" in done.stdout
    assert "2 requests" not in cli("replay", log, "--dry-run").stdout
    assert json.loads(cli("replay", log, "--dry-run", "--json").stdout)["send"] == {
        "GET": [1, 300],
        "HEAD": [1, 0],
        "LIST": [1, 0],
    }


def test_an_interrupted_replay_does_not_wait_for_what_is_under_way(tmp_path: Path) -> None:
    log = tmp_path / "run.tsv.zst"
    write_op_log(str(log), [record("PUT", number, 10, 100) for number in range(8)])
    held = Rule("hold", "PUT", "PUT-0")
    patient = StoreOptions(read_timeout=3600, request_timeout=3600)

    def interrupt(_sent: int) -> None:
        assert held.reached.wait(300)
        raise KeyboardInterrupt

    def replay() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            replay_op_log(str(log), to, speed=0, concurrency=4, progress=interrupt, options=patient, **place)

    with server("moto") as s3, FaultProxy(s3.endpoint_url, [held]) as proxy:
        to = f"s3://{s3.bucket()}/there"
        place = {**s3._arguments(), "endpoint_url": proxy.endpoint_url}
        running = threading.Thread(target=replay, daemon=True)
        running.start()
        running.join(300)
        assert not running.is_alive()
        held.release.set()


def test_reads_go_where_they_went(tmp_path: Path) -> None:
    from s3loader.oplog import finalize_op_log, init_op_log

    store = open_store(str(tmp_path / "data"))
    store.put("k", bytes(5000))
    log = tmp_path / "run.tsv.zst"
    init_op_log(log)
    store.get_range("k", 10, 1000)
    list(store.list("k"))
    store.put("k2", b"x")
    finalize_op_log()
    store.delete("k2")
    report = replay_op_log(str(log))
    assert (report.sent, report.errors, report.skipped) == (2, 0, {"PUT": 1})
    assert not store.exists("k2")


@pytest.mark.parametrize(
    "options",
    [{"speed": -1}, {"speed": "fast"}, {"concurrency": 0}, {"ops": ["COPY"]}, {"ops": ["PUT"]}, {"prepare": True}],
)
def test_replay_refuses(options: dict[str, object], tmp_path: Path) -> None:
    log = tmp_path / "run.tsv.zst"
    write_op_log(str(log), [record("PUT", 0, 1)])
    with pytest.raises(ConfigError) as caught:
        replay_op_log(str(log), **options)  # type: ignore[arg-type]
    assert caught.value.hint
