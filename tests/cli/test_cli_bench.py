"""``s3loader bench``: bounded, cleaned up, never beside its own prefix; advice that follows from the figures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from s3loader.bench import BenchReport, Row, Times, advise, bench_page, measure_get
from s3loader.errors import ObjectNotFoundError
from s3loader.store import ObjectStore, open_store
from s3loader.testing import Server, server

Command = Any
QUICK = ("--seconds", "0.6", "--max-bytes", "24MiB")


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server() as found:
        yield found


@pytest.fixture
def place(s3: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with one object that is not ours."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    bucket = s3.bucket()
    open_store(f"s3://{bucket}").put("bench/theirs", b"theirs")
    return f"s3://{bucket}/bench"


def keys(url: str) -> list[str]:
    return [entry.key for entry in open_store(url).list()]


@pytest.mark.parametrize(
    ("kind", "more", "rows"),
    [
        ("get", ("-s", "4KiB,256KiB", "-j", "1,4"), 4),
        ("put", ("-s", "4KiB,256KiB", "-j", "1,4"), 4),
        ("load", ("--order", "none", "--order", "block", "-b", "8", "--sample-size", "16KiB"), 2),
        ("ckpt", ("-s", "1MiB"), 2),
    ],
)
def test_measured_and_cleaned_up(command: Command, place: str, kind: str, more: tuple[str, ...], rows: int, s3: Server) -> None:
    found = command.json("bench", kind, place, *more, *QUICK)
    assert len(found["rows"]) == rows
    for row in found["rows"]:
        assert row["requests"] >= 1
        assert row["mb_s"] == pytest.approx(row["bytes"] / 1e6 / row["seconds"])
        assert row["latency"]["p50"] <= row["latency"]["p99"] <= row["latency"]["max"]
        if kind in ("get", "put"):
            assert row["bytes"] == row["requests"] * row["size"]
    if kind == "get":
        assert all(0 < row["first_byte"]["p50"] <= row["latency"]["max"] for row in found["rows"])
    assert found["advice"]
    assert found["deleted"] >= 1
    assert found["read"] + found["written"] <= 2 * (24 << 20)
    assert keys(place) == ["theirs"]
    assert open_store(place).get("theirs") == b"theirs"
    assert "Uploads" not in s3.client().list_multipart_uploads(Bucket=place.split("/")[2])


@pytest.mark.parametrize("kind", ["get", "put", "load", "ckpt"])
def test_a_folder_is_left_as_it_was(command: Command, tmp_path: Path, kind: str) -> None:
    (tmp_path / "theirs").write_bytes(b"theirs")
    more = {"ckpt": ("-s", "1MiB"), "load": ("-b", "8")}.get(kind, ("-s", "4KiB", "-j", "2"))
    command("bench", kind, tmp_path, *more, *QUICK)
    assert [path.name for path in tmp_path.rglob("*") if not path.name.startswith(".s3loader")] == ["theirs"]
    command("bench", kind, tmp_path / "typo", *more, *QUICK, code=4)
    assert not (tmp_path / "typo").exists()


def test_what_is_there_is_only_read(command: Command, place: str) -> None:
    before = keys(place)
    found = command.json("bench", "get", place, "--existing", "-j", "1,2", *QUICK)
    assert [(row["size"], row["concurrency"]) for row in found["rows"]] == [(6, 1), (6, 2)]
    assert (found["written"], found["deleted"]) == (0, 0)
    assert keys(place) == before
    with pytest.raises(ObjectNotFoundError):
        measure_get(f"{place}/nothing", existing=True)


def test_errors_end_it_and_leave_nothing(command: Command, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command("bench", "get", "s3://no-such-bucket-of-anyone/x", *QUICK, code=4)
    command("bench", "put", place, "-s", "1GiB", "-j", "8", *QUICK, code=3)
    command("bench", "ckpt", place, "-s", "20MiB", *QUICK, code=3)
    command("bench", "get", place, "-j", "0", code=2)
    command("bench", "get", place, "-s", "4KiB", "-j", "1", *QUICK, "--html", "/no/such/folder/x.html", code=1)
    assert keys(place) == ["theirs"]
    put, count = ObjectStore.put, [0]

    def fails(store: Any, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] > 5:
            raise ZeroDivisionError
        return put(store, *arguments, **options)

    monkeypatch.setattr(ObjectStore, "put", fails)
    command("bench", "put", place, "-s", "4KiB", "-j", "2", *QUICK, code=1)
    assert count[0] > 5
    assert keys(place) == ["theirs"]


def test_ctrl_c_cleans_up(place: str) -> None:
    code = (
        "import os, sys, s3loader.bench.requests as r\n"
        "from s3loader.store import ObjectStore\n"
        "put = ObjectStore.put\n"
        "def told(*a, **k):\n"
        "    done = put(*a, **k)\n"
        "    os.write(1, b'put\\n')\n"  # one call: two threads put
        "    return done\n"
        "ObjectStore.put = told\n"
        f"sys.argv = ['s3loader', 'bench', 'put', {place!r}, '-s', '4KiB', '-j', '2', '--seconds', '60', '--json']\n"
        "from s3loader.cli.main import main\n"
        "main()\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    assert running.stdout is not None
    for _ in range(5):
        assert running.stdout.readline() == "put\n"
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "Traceback" not in err
    assert keys(place) == ["theirs"]


def row(size: int, at_once: int, mb_s: float, **more: Any) -> Row:
    requests = 1000
    late = Times(*(1000 * at_once * size / 1e6 / mb_s,) * 4)
    return Row("get", size, at_once, requests, size * requests, size * requests / 1e6 / mb_s, **{"latency": late, **more})


def test_advice_follows_from_the_figures() -> None:
    def said(*rows: Row) -> str:
        return "\n".join(advise(BenchReport("get", "s3://b", rows=list(rows))))

    assert "8 at a time are enough (100 of 104 MB/s, 10.0 times what 1 moves)" in said(
        row(1 << 20, 1, 10), row(1 << 20, 8, 100), row(1 << 20, 32, 104)
    )
    assert "still growing at 32 at a time (50 to 100 MB/s): try more (-j 128)" in said(row(1, 8, 50), row(1, 32, 100))
    assert "move 5 % of the MB/s that 16.0 MiB move" in said(row(65536, 8, 50), row(16 << 20, 8, 1000))
    # 10 ms for each request and 100 MB/s then: 1 MB is what 10 ms could have moved
    text = said(row(100_000, 1, 0.1 / 0.011), row(10_000_000, 1, 10 / 0.11))
    assert "costs about 10.0 ms and then moves 100 MB/s: ranges below 976.6 KiB" in text
    assert 'takes 8.0 times the median (10.0 and 80.0 ms): hedge_after="80ms"' in said(
        row(1, 8, 50, first_byte=Times(10, 20, 80, 90))
    )
    assert "hedge_after" not in said(row(1, 8, 50, first_byte=Times(10, 20, 25, 90)))
    assert "0.9 cores busy: the CPU limits" in said(row(1, 8, 50, cpu=0.9))
    assert "30 of 1,030 requests failed" in said(row(1, 8, 50, errors=30))
    assert "20 of 1,000 requests were sent again" in said(row(1, 8, 50, repeated=20))
    assert advise(BenchReport("get", "s3://b", rows=[row(1, 8, 50)])) == ["nothing stands out"]


def test_the_page_escapes_what_it_shows() -> None:
    report = BenchReport("get", "s3://b/<script>alert(1)</script>", rows=[row(1, 8, 50)], errors={"<b>bad</b>": 3})
    report.advice = ["<i>advice</i>"]
    page = bench_page(report)
    assert "<script>alert" not in page
    assert "<b>bad" not in page
    assert "<i>" not in page
