"""The op-log as it is written: warp can read it, every request stands in it once, and a killed process leaves it readable."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from s3loader import ConfigError, FormatError, PutRequest, S3LoaderError, SourceNotFoundError, open_store
from s3loader.oplog import (
    OpRecord,
    finalize_op_log,
    init_op_log,
    is_op_log_active,
    merge_op_logs,
    op_log_stats,
    read_op_log,
    write_op_log,
)
from s3loader.testing import FaultProxy, Rule, Server, server

SECOND = 1_000_000_000
BEGIN = 1_700_000_000 * SECOND


@pytest.fixture(autouse=True)
def _no_log_left() -> Iterator[None]:
    yield
    finalize_op_log()
    assert not is_op_log_active()
    assert not [name for name in os.environ if name.startswith("S3LOADER_OPLOG")]


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server() as running:
        yield running


def text_of(path: Path) -> str:
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as reader:
        return reader.read().decode()


def read_as_warp_does(text: str) -> list[dict[str, str]]:
    """The rules of warp's reader (pkg/bench/ops.go) and of Go's encoding/csv, stated again."""
    for line in text.splitlines():
        fields = re.split(r"\t(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", line)
        if not line.startswith("#"):
            assert all('"' not in f or (f[0] == f[-1] == '"' and '"' not in f[1:-1].replace('""', "")) for f in fields), line
    rows = [row for row in csv.reader(io.StringIO(text), delimiter="\t") if row and not row[0].startswith("#")]
    header, rows = rows[0], rows[1:]
    assert {"thread", "op", "n_objects", "bytes", "file", "error", "start", "first_byte", "end"} <= set(header)
    assert all(len(row) == len(header) for row in rows)
    time = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")
    found = [dict(zip(header, row, strict=True)) for row in rows]
    for row in found:
        assert 0 <= int(row["thread"]) < 1 << 16
        assert int(row["n_objects"]) >= 0
        assert int(row["bytes"]) >= 0
        assert int(row["cat"]) >= 0
        assert time.fullmatch(row["start"])
        assert time.fullmatch(row["end"])
        assert row["end"] >= row["start"]
        assert not row["first_byte"] or time.fullmatch(row["first_byte"])
    assert [row["start"] for row in found] == sorted(row["start"] for row in found)
    return found


GOLDEN = """\
idx\tthread\top\tclient_id\tn_objects\tbytes\tendpoint\tfile\terror\tstart\tfirst_byte\tlast_byte\tend\tduration_ns\tcat\
\tstatus\tattempt\toffset\tprocess
0\t0\tGET\trank-1\t1\t1024\thttp://h:9000\tb/k\t\t2023-11-14T22:13:20.000000000Z\
\t2023-11-14T22:13:20.000000007Z\t\t2023-11-14T22:13:22.000000000Z\t2000000000\t0\t206\t1\t512\t77
1\t1\tPUT\t\t1\t0\t\t"b/a ""quote""\tand tab"\tUnavailableError: slow down\t2023-11-14T22:13:21.500000000Z\t\
\t\t2023-11-14T22:13:23.000000000Z\t1500000000\t0\t503\t2\t\t
2\t0\tLIST\t\t3\t0\tfile://\tx/\t\t2023-11-14T22:13:22.000000000Z\t\t\t2023-11-14T22:13:22.000000001Z\t1\t0\t\t1\t\t
# run: 7
"""


def test_the_format(tmp_path: Path) -> None:
    records = [
        OpRecord(
            "GET", "b/k", BEGIN, BEGIN + 2 * SECOND, BEGIN + 7, 1024, 1, "", "http://h:9000", "rank-1", 0, 206, 1, 512, 77
        ),
        OpRecord(
            "PUT", 'b/a "quote"\tand tab', BEGIN + SECOND * 3 // 2, BEGIN + 3 * SECOND, error="UnavailableError: slow down",
            status=503, attempt=2,
        ),
        OpRecord("LIST", "x/", BEGIN + 2 * SECOND, BEGIN + 2 * SECOND + 1, objects=3, endpoint="file://"),
    ]  # fmt: skip
    path = tmp_path / "x.csv.zst"
    assert write_op_log(str(path), records, comments=["run: 7"]) == 3
    assert text_of(path) == GOLDEN
    read_as_warp_does(GOLDEN)
    back = list(read_op_log(str(path)))
    assert [(r.op, r.file, r.start, r.end, r.first_byte, r.bytes, r.error, r.status, r.attempt, r.offset) for r in back] == [
        (r.op, r.file, r.start, r.end, r.first_byte, r.bytes, r.error, r.status, r.attempt, r.offset) for r in records
    ]
    assert [r.thread for r in back] == [0, 1, 0]
    assert [r.url for r in back] == ["s3://b/k", 's3://b/a "quote"\tand tab', "file:///x/"]


def test_every_request_stands_in_it_once(s3: Server, tmp_path: Path) -> None:
    """Against what a proxy in front of the server has seen: method, key and status of each."""
    bucket = s3.bucket()
    path = tmp_path / "run.tsv.zst"
    with FaultProxy(s3.endpoint_url) as proxy, s3.open_store(f"{bucket}/p", endpoint_url=proxy.endpoint_url) as store:
        init_op_log(path, client_id="test")
        for number in range(20):
            store.put(f"k{number:02}", b"x" * 1000)
        list(store.put_many(PutRequest(f"m{number:02}", b"y" * 10) for number in range(30)))
        with store.multipart("big", part_size="5MiB") as out:
            out.write(bytes(11 << 20))
        assert len(list(store.get_many([f"m{number:02}" for number in range(30)]))) == 30
        store.get_range("k00", 100, 200)
        store.head("k01")
        with pytest.raises(S3LoaderError):
            store.get("missing")
        assert len(list(store.list())) == 51
        store.copy("k00", "k99")
        store.delete("k99")
        store.delete_many([f"k{number:02}" for number in range(20)])
        finalize_op_log()
        seen = Counter(request.method for request in proxy.requests)
    rows = read_as_warp_does(text_of(path))
    assert len(rows) == sum(seen.values())
    ops = Counter(row["op"] for row in rows)
    assert ops["PUT"] + ops["PUTPART"] + ops["COPY"] == seen["PUT"]
    assert ops["PUTPART"] == 3
    assert ops["STAT"] == seen["HEAD"]
    assert ops["GET"] == 32
    assert ops["DELETE"] == 2
    assert all(row["status"] and row["first_byte"] for row in rows)
    assert [row["status"] for row in rows if row["error"]] == ["404"]
    assert [row["n_objects"] for row in rows if row["op"] == "LIST"] == ["51"]
    assert [row["n_objects"] for row in rows if row["op"] == "DELETE"] == ["1", "20"]
    assert [(row["offset"], row["bytes"]) for row in rows if row["file"].endswith("k00") and row["op"] == "GET"] == [
        ("100", "100")
    ]
    assert {row["endpoint"] for row in rows} == {proxy.endpoint_url}
    assert {row["client_id"] for row in rows} == {"test"}
    assert [row["idx"] for row in rows] == [str(number) for number in range(len(rows))]
    text = text_of(path)
    assert s3.access_key_id not in text
    assert s3.secret_access_key not in text


def test_retries_are_requests(s3: Server, tmp_path: Path) -> None:
    path = tmp_path / "run.tsv.zst"
    bucket = s3.bucket()
    rule = Rule("error", status=503, method="GET", times=2)
    with FaultProxy(s3.endpoint_url, [rule]) as proxy, s3.open_store(bucket, endpoint_url=proxy.endpoint_url) as store:
        store.put("k", b"x")
        init_op_log(path)
        assert store.get("k") == b"x"
        finalize_op_log()
    rows = list(read_op_log(str(path)))
    assert [(row.status, row.attempt, bool(row.error)) for row in rows] == [(503, 1, True), (503, 2, True), (200, 3, False)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_log_too(method: str, numbers_url: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from s3loader.torch import S3IterableDataset

    path = tmp_path / "run.tsv.zst"
    init_op_log(path, lossless=True)
    dataset = S3IterableDataset.from_prefix(numbers_url, batch_size=5, shuffle=False)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=method)
    assert sum(1 for _ in loader) == 10
    del loader
    finalize_op_log()
    reads = [row for row in read_op_log(str(path)) if row.op == "GET"]
    assert sorted(row.file[-3:] for row in reads) == [f"{number:03}" for number in range(50)]
    assert {row.process for row in reads}.isdisjoint({os.getpid()})
    assert len({row.process for row in reads}) == 2
    read_as_warp_does(text_of(path))


CHILD = """
import os, sys, signal
import s3loader
from s3loader.oplog import init_op_log, op_log_stats
store = s3loader.open_store(sys.argv[1])
if len(sys.argv) > 2:
    init_op_log(sys.argv[2], lossless=True)
number = 0
while op_log_stats()["rows"] < 20:
    store.put(f"k{number}", b"x")
    number += 1
if len(sys.argv) > 2:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(code: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=300)


def test_a_killed_process_leaves_a_file_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv.zst"
    assert run(CHILD, tmp_path / "data", path).returncode == -signal.SIGKILL
    rows = list(read_op_log(str(path)))
    assert len(rows) >= 20
    assert text_of(path).count("\n") == len(rows) + 1, "whole frames, for every zstd tool"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])  # killed in the middle of a write
    some = list(read_op_log(str(path)))
    assert some == rows[: len(some)]
    store = open_store(str(tmp_path / "more"))
    init_op_log(path, append=True)  # and others go on behind it
    store.put("k", b"")
    finalize_op_log()
    after = list(read_op_log(str(path)))
    assert len(after) == len(some) + 1
    assert merge_op_logs([str(path)], str(path)) == len(after)
    read_as_warp_does(text_of(path))


def test_the_environment_alone_logs_a_program(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv.zst"
    for _ in range(2):  # the second one adds to the file
        done = run(CHILD, tmp_path / "data", S3LOADER_OPLOG=str(path))
        assert done.returncode == 0, done.stderr
    rows = read_as_warp_does(text_of(path))
    assert len({row["process"] for row in rows}) == 2
    done = run("import s3loader", S3LOADER_OPLOG=str(tmp_path / "no" / "folder.tsv.zst"))
    assert done.returncode == 0
    assert "no op-log is written" in done.stderr


def test_lossless_waits_and_lossy_counts(tmp_path: Path) -> None:
    store = open_store(f"memory://oplog-{os.getpid()}")
    for lossless in (True, False):
        path = tmp_path / f"{lossless}.tsv.zst"
        init_op_log(path, lossless=lossless, buffer=4)
        threads = [threading.Thread(target=lambda: [store.put("k", b"") for _ in range(500)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        finalize_op_log()
        stats = op_log_stats()
        assert stats["rows"] == len(list(read_op_log(str(path))))
        assert stats["rows"] + stats["dropped"] == 2000
        assert (stats["dropped"] == 0) is lossless
        assert stats["active"] is False


def test_variables_of_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BUF": "8192", "WBUFCAP": "1048576", "LEVEL": "3", "LOSSLESS": "true"}.items():
        monkeypatch.setenv(f"S3DLIO_OPLOG_{name}", value)
    init_op_log(tmp_path / "a.tsv.zst")
    assert op_log_stats()["lossless"] is True
    finalize_op_log()
    monkeypatch.setenv("S3LOADER_OPLOG_LOSSLESS", "0")  # ours goes first
    init_op_log(tmp_path / "b.tsv.zst")
    assert op_log_stats()["lossless"] is False
    finalize_op_log()
    monkeypatch.delenv("S3LOADER_OPLOG_LOSSLESS")
    for name, value in {"BUF": "many", "LEVEL": "99", "LOSSLESS": "perhaps"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(f"S3DLIO_OPLOG_{name}", value)
            with pytest.raises(ConfigError, match=name):
                init_op_log(tmp_path / "c.tsv.zst")
    assert not (tmp_path / "c.tsv.zst").exists()


def test_beginning_and_ending(tmp_path: Path) -> None:
    finalize_op_log()
    path = tmp_path / "{rank}.tsv.zst"
    init_op_log(path)
    init_op_log(path)  # the same one: nothing happens
    with pytest.raises(ConfigError, match="active already"):
        init_op_log(tmp_path / "other.tsv.zst")
    assert is_op_log_active()
    assert not (tmp_path / "other.tsv.zst").exists()
    finalize_op_log()
    finalize_op_log()
    assert text_of(tmp_path / "0.tsv.zst").count("\n") == 2
    init_op_log(tmp_path / "other.tsv.zst")


def test_what_cannot_be_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(S3LoaderError, match="No such file"):
        init_op_log(tmp_path / "no" / "folder.tsv.zst")
    with pytest.raises(ConfigError):
        init_op_log("s3://bucket/log.tsv.zst")
    precious = tmp_path / "precious.txt"
    precious.write_text("not a log")
    with pytest.raises(FormatError, match="left alone"):
        init_op_log(precious, append=True)
    assert precious.read_text() == "not a log"
    with pytest.raises(FormatError, match="no header"):
        list(read_op_log(str(precious)))
    with pytest.raises(SourceNotFoundError):
        list(read_op_log(str(tmp_path / "missing")))
    precious.write_text("op\tstart\tend\tfile\nGET\tyesterday\ttoday\tx\n")
    with pytest.raises(FormatError, match="row 2"):
        list(read_op_log(str(precious)))
    precious.write_text(json.dumps({"total": {}}))
    with pytest.raises(FormatError, match="aggregated"):
        list(read_op_log(str(precious)))


S3DLIO = """\
idx\tthread\top\tclient_id\tn_objects\tbytes\tendpoint\tfile\terror\tstart\tfirst_byte\tend\tduration_ns
0\t12345678901234567890\tPUT\tc\t1\t10\ts3://b\tb/k\t\t2025-07-16T22:53:33.000000001Z\
\t2025-07-16T22:53:33.000000001Z\t2025-07-16T22:53:34.000000001Z\t1000000000
1\t12345678901234567890\tHEAD\tc\t1\t0\ts3://b\tb/k\tService "error"\t2025-07-16T22:53:35.5Z\t\
\t2025-07-16T22:53:35.500000001Z\t1
"""


def test_logs_of_others(tmp_path: Path) -> None:
    path = tmp_path / "s3dlio.tsv.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(S3DLIO.encode()))
    rows = list(read_op_log(str(path)))
    assert [(row.op, row.url, row.bytes, row.error) for row in rows] == [
        ("PUT", "s3://b/k", 10, ""),
        ("HEAD", "s3://b/k", 0, 'Service "error"'),
    ]
    assert rows[1].start - rows[0].end == SECOND * 3 // 2 - 1
    plain = tmp_path / "warp.csv"
    plain.write_text(
        "# a comment\nop\tfile\tstart\tend\tthread\terror\tbytes\tn_objects\tfirst_byte\n"
        'GET\tk\t2026-11-23T23:19:06.21+02:00\t2026-11-23T23:19:07.21+02:00\t3\t"a ""b"""\t5\t1\t\n\n# end\n'
    )
    (row,) = read_op_log(str(plain))
    assert (row.error, row.thread, row.end - row.start) == ('a "b"', 3, SECOND)
    merged = tmp_path / "merged.csv.zst"
    assert merge_op_logs([str(plain), str(path)], str(merged)) == 3
    assert [row["op"] for row in read_as_warp_does(text_of(merged))] == ["PUT", "HEAD", "GET"]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    path = tmp_path / "run.tsv.zst"
    init_op_log(path)
    names = ['q"uote', "tab\there", "new\nline", "# hash", "ünïcode"]
    for name in names:
        store.put(name, b"")
    (tmp_path / os.fsdecode(b"bytes-\xff")).write_bytes(b"1")
    store.get(os.fsdecode(b"bytes-\xff"))
    finalize_op_log()
    assert [row.file.rpartition("/")[2] for row in read_op_log(str(path))] == [*names, os.fsdecode(b"bytes-\xff")]


def test_nobody_pays_who_does_not_log(tmp_path: Path) -> None:
    code = "import sys, s3loader; print(*[m for m in sys.modules if m.startswith('s3loader.oplog') or m == 'zstandard'])"
    assert run(code).stdout.split() == []
