"""The commands on objects as a person runs them: what they print, which code they end with, what they leave."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from s3loader import s3
from s3loader.cli.main import COMMANDS, main

WANTED = [
    "create-bucket",
    "delete-bucket",
    "list-buckets",
    "ls",
    "list",
    "stat",
    "rm",
    "delete",
    "get",
    "put",
    "upload",
    "download",
    "cp",
    "copy",
    "sync",
    "du",
    "mp-get",
]


class Run:
    """One run of the command in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capfd = capfd
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: str, code: int = 0, program: str = "s3loader") -> str:
        self._monkeypatch.setattr(sys, "argv", [program, *arguments])
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, self.err = self._capfd.readouterr()
        assert ended.value.code == code, (ended.value.code, out, self.err)
        assert "Traceback" not in self.err
        if code not in (0, 2):
            assert "\nhint: " in f"\n{self.err}"
        return out


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(capfd, monkeypatch)


def test_all_commands_of_the_document_are_there(run: Run) -> None:
    assert set(WANTED) <= set(COMMANDS)
    for name in WANTED:
        assert "Usage:" in run(name, "--help")


def test_the_documents_session(place: str, run: Run) -> None:
    """Put, list, get, stat and delete, as the document shows them."""
    new = f"{place}-new"
    bucket = new.removeprefix("s3://")
    out = run("put", "-c", "-n", "12", "-s", "1000", "-t", "russ-test3-{}.obj", f"{new}/")
    assert re.fullmatch(r"Uploaded 12 objects \(total 12000 bytes\) in [\d.]+s \([\d.]+ objects/s, [\d.]+ MB/s\)\n", out)
    out = run("list", f"{new}/")
    assert out.splitlines()[0] == "russ-test3-0.obj"
    assert out.splitlines()[-2:] == ["", "Total objects: 12"]
    run("get", "-j", "32", f"{new}/")
    assert re.fullmatch(r"Fetching 12 objects with 32 jobs…\ndownloaded 0.01 MB in [\d.]+s \([\d.]+ MB/s\)\n", run.err)
    out = run("stat", f"{new}/russ-test3-3.obj")
    assert out.splitlines()[0] == "Size            : 1000"
    assert out.splitlines()[1].startswith("LastModified    : 2")
    assert out.splitlines()[2].startswith("ETag            : ")
    assert run("list", "-c", f"{new}/*-1?.obj") == "Total objects: 2\n"
    run("delete", f"{new}/", "--dry-run")
    assert run.err == "Would delete 12 objects.\n"
    run("delete", f"{new}/")
    assert run.err == "Deleting 12 objects…\nDone.\n"
    assert run("list", f"{new}/") == "\nTotal objects: 0\n"
    run("delete", f"{new}/", code=4)
    assert run("create-bucket", bucket) == f"Successfully created or verified bucket '{bucket}'.\n"
    assert new in run("list-buckets").split()
    assert run("delete-bucket", bucket) == f"Successfully deleted bucket '{bucket}'.\n"
    run("delete-bucket", bucket, code=4)
    run("put", "-t", "object_{}_of_{}.dat", "-n", "5", "-s", "10", f"{place}/t/")
    assert run("ls", f"{place}/t/").splitlines()[0] == "t/object_0_of_5.dat"
    run("put", "-n", "2", "-t", "same", f"{place}/t/", code=3)
    run("put", "-o", "NOTHING", f"{place}/t/", code=3)
    run("put", "-o", "NPZ", "-s", "4096", f"{place}/npz", "-t", "a.npz")
    assert s3.exists(f"{place}/npz/a.npz")


def test_regular_expressions_under_the_documents_name(place: str, run: Run) -> None:
    for key in ("d/a1", "d/a10", "d/ba1", "d/x.csv"):
        s3.put(f"{place}/{key}", b"1")
    assert run("list", f"{place}/d/.*\\.csv", program="/usr/bin/s3-cli").splitlines()[0] == "d/x.csv"
    assert run("list", f"{place}/d/a1$", program="s3-cli").splitlines()[:2] == ["d/a1", "d/ba1"]
    run("delete", f"{place}/d/a1", program="s3-cli")  # a plain name is exact
    assert run("ls", f"{place}/d/", "--regex", "a1").splitlines()[:2] == ["d/a10", "d/ba1"]


def test_nothing_but_what_was_named_is_deleted(place: str, run: Run) -> None:
    keys = ["a1", "a10", "ba1", "a*", "a1/x", "sub/y", "sub/z.txt"]
    for key in keys:
        s3.put(f"{place}/{key}", b"1")
    assert json.loads(run("rm", f"{place}/a1", "--dry-run", "--json")) == {"dry_run": True, "urls": [f"{place}/a1"]}
    run("rm", f"{place}/a1")
    run("rm", "--literal", f"{place}/a*")
    run("rm", f"{place}/none", code=4)
    run("rm", f"{place}/*.none", code=4)
    run("rm", f"{place}/s*/y", code=3)
    assert s3.list(place, True) == [f"{place}/{key}" for key in ("a1/x", "a10", "ba1", "sub/y", "sub/z.txt")]
    run("rm", f"{place}/sub/*.txt", f"{place}/ba1")
    run("rm", "-r", f"{place}/a1")
    assert s3.list(place, True) == [f"{place}/a10", f"{place}/sub/y"]


def test_transfers(place: str, run: Run, tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    (here / "a.txt").write_bytes(b"aa")
    (here / "sub" / "b.txt").write_bytes(b"b")
    run("upload", str(here), f"{place}/up/")
    assert "Uploaded 2 objects (3 bytes)" in run.err
    run("upload", str(here), f"{place}/up/", "--skip-existing")
    assert "skipped 2" in run.err
    run("upload", str(here / "a.txt"), str(here / "none"), f"{place}/up/", code=4)
    there = tmp_path / "there"
    run("download", f"{place}/up/", str(there))
    assert sorted(os.listdir(there)) == ["a.txt"]
    run("download", "-r", f"{place}/up/", str(there), "--no-clobber", code=1)
    assert "cannot download" in run.err
    assert (there / "sub" / "b.txt").read_bytes() == b"b"
    run("download", f"{place}/none/", str(there), code=4)
    assert json.loads(run("cp", f"{place}/up/a.txt", f"{place}/c.txt", "--json"))["objects"] == 1
    run("cp", f"{place}/c.txt", str(tmp_path / "c.txt"))
    assert (tmp_path / "c.txt").read_bytes() == b"aa"
    run("cp", str(tmp_path / "c.txt"), f"{place}/d.txt")
    run("cp", str(here), f"{place}/e/", code=2)
    run("cp", "-r", str(here), f"{place}/e/")
    assert s3.list(f"{place}/e/", True) == [f"{place}/e/a.txt", f"{place}/e/sub/b.txt"]
    run("cp", f"{place}/none", f"{place}/x", code=4)
    plan = json.loads(run("sync", str(here), f"{place}/s/", "--dry-run", "--json"))
    assert [what for what, _ in plan["planned"]] == ["copy", "copy"]
    assert s3.list(f"{place}/s/", True) == []
    run("sync", str(here), f"{place}/s/")
    run("sync", str(here), f"{place}/s/")
    assert "Copied 0 objects (0 bytes), skipped 2" in run.err
    (here / "a.txt").unlink()
    run("sync", str(here), f"{place}/s/")
    assert s3.exists(f"{place}/s/a.txt")
    assert "would delete" in run("sync", str(here), f"{place}/s/", "--delete", "--dry-run")
    run("sync", str(here), f"{place}/s/", "--delete")
    assert not s3.exists(f"{place}/s/a.txt")
    assert json.loads(run("du", f"{place}/e", "--json"))["bytes"] == 3
    assert "total" in run("du", f"{place}/")


def test_reading_one_object(place: str, run: Run, tmp_path: Path) -> None:
    s3.put(f"{place}/k", b"0123456789")
    assert run("get", f"{place}/k", "-o", "-") == "0123456789"
    assert run("get", f"{place}/k", "-o", "-", "--offset", "-3") == "789"
    assert run("get", f"{place}/k", "-o", "-", "--offset", "2", "--length", "3") == "234"
    run("get", f"{place}/k", "-o", str(tmp_path / "k"))
    assert (tmp_path / "k").read_bytes() == b"0123456789"
    (tmp_path / "keys").write_text(f"k\n{place}/k\n\n")
    assert json.loads(run("get", place, "--keylist", str(tmp_path / "keys"), "--json"))["bytes"] == 20
    run("get", code=2)
    run("get", f"{place}/none", code=4)
    assert json.loads(run("stat", f"{place}/k", "--json"))["size"] == 10
    assert json.loads(run("ls", place, "--json"))[0]["url"] == f"{place}/k"
    assert run("ls", "-l", place).splitlines()[0].endswith("  k")
    assert "1 objects" in run("mp-get", f"{place}/", "-p", "1")


def test_reading_from_several_endpoints(run: Run, tmp_path: Path) -> None:
    for root in (1, 2):
        s3.put_many((f"{tmp_path}/{root}/d/{i}", bytes(10)) for i in range(6))
    s3.put(f"{tmp_path}/1/d/below/k", b"12345")
    s3.put(f"{tmp_path}/2/d/below/k", b"12345")
    roots = f"{tmp_path}/{{1...2}}"
    first = tmp_path / "1"

    def size_of(*arguments: str) -> list[int]:
        found = json.loads(run("get", "--endpoints", roots, "--json", *arguments))
        return [found["objects"], found["bytes"]]

    assert size_of(f"{first}/d/") == [6, 60]
    assert size_of(f"{first}/d/", "-r") == [7, 65]
    assert size_of(f"{first}/d/below/k") == [1, 5]
    (tmp_path / "keys").write_text("d/0\nd/1\n")
    assert size_of(str(tmp_path / "2"), "--keylist", str(tmp_path / "keys")) == [2, 20]
    run("get", "--endpoints", roots, f"{first}/d/none", code=4)
    run("get", "--endpoints", roots, "s3://elsewhere/d/0", code=3)
    run("get", "--endpoints", f"{tmp_path}/{{2...1}}", f"{first}/d/0", code=3)
    run("get", "--endpoints", roots, f"{first}/d/0", "--offset", "1", code=2)
    run("get", "--endpoints", roots, f"{first}/d/", "--regex", "0", code=2)


def test_bad_surroundings(place: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put(f"{place}/k", b"1")
    for arguments in (
        ("ls", f"{place}-none/"),
        ("get", f"{place}-none/k"),
        ("rm", f"{place}-none/k"),
        ("du", f"{place}-none/"),
    ):
        run(*arguments, code=4)
    run("ls", "ftp://x/y", code=3)
    run("stat", place, code=3)
    run("no-such-command", code=2)
    run("--endpoint-url", "not a url", "ls", place, code=3)
    monkeypatch.undo()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    Run(run._capfd, monkeypatch)("--endpoint-url", "http://127.0.0.1:9", "ls", place, code=3)  # no credentials


def test_an_op_log(place: str, run: Run, tmp_path: Path) -> None:
    from s3loader.oplog import read_op_log

    s3.put(f"{place}/k", b"1")
    run("--op-log", str(tmp_path / "log.tsv.zst"), "get", f"{place}/k")
    assert [record.op for record in read_op_log(str(tmp_path / "log.tsv.zst"))] == ["GET"]


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    for i in range(3000):
        (tmp_path / f"{i:060d}").touch()
    command = f"{sys.executable} -m s3loader ls {tmp_path}/ | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1] == "141"
