"""``ls-samples index manifest repack``: what they say is what is there, and what they write can be trained on."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from s3loader import Loader, open_dataset
from s3loader.testing import server

Command = Any


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def shard_of(numbers: range) -> dict[str, bytes]:
    return {f"{n:03}.{e}": (b"%03d" % n) * (50 if e == "jpg" else 1) for n in numbers for e in ("jpg", "cls")}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Three shards without indexes, 30 samples."""
    for number in range(3):
        tar(tmp_path / "foreign" / f"{number:03}.tar", shard_of(range(number * 10, number * 10 + 10)))
    return tmp_path / "foreign"


def contents(url: object) -> list[dict[str, bytes]]:
    dataset = open_dataset(str(url), group="webdataset")
    batches = list(Loader(dataset, batch_size=7, shuffle="none", tail="short"))
    return [{n: bytes(v) for n, v in sample.items() if n in ("jpg", "cls")} for batch in batches for sample in batch]


def test_index_makes_what_is_missing_or_outdated(command: Command, foreign: Path) -> None:
    assert [r["action"] for r in command.json("index", foreign, "--dry-run")] == ["missing"] * 3
    assert not list(foreign.glob("*.idx"))
    made = command.json("index", foreign)
    assert [(r["action"], r["members"], r["samples"]) for r in made] == [("built", 20, 10)] * 3
    assert [r["action"] for r in command.json("index", f"{foreign}/{{000..002}}.tar")] == ["kept"] * 3
    tar(foreign / "001.tar", shard_of(range(10, 19)))
    assert [r["action"] for r in command.json("index", foreign, "--dry-run")] == ["kept", "outdated", "kept"]
    assert [r["action"] for r in command.json("index", foreign)] == ["kept", "built", "kept"]
    assert [r["action"] for r in command.json("index", foreign, "--force")] == ["built"] * 3
    assert "3 of 3 indexes made" in (command("index", foreign, "--force"), command.err)[1]


def test_index_in_a_folder_of_its_own(command: Command, foreign: Path, tmp_path: Path) -> None:
    aside = tmp_path / "aside"
    assert [r["action"] for r in command.json("index", foreign, "--index-dir", aside, "--dry-run")] == ["missing"] * 3
    assert not aside.exists()
    assert [r["action"] for r in command.json("index", foreign, "--index-dir", aside)] == ["built"] * 3
    assert [r["action"] for r in command.json("index", foreign, "--index-dir", aside)] == ["kept"] * 3
    assert len(list(aside.iterdir())) == 3
    assert not list(foreign.glob("*.idx"))


def test_index_says_torn_samples_and_broken_shards(command: Command, foreign: Path) -> None:
    torn = {"a.jpg": b"1", "b.jpg": b"2", "a.cls": b"3"}
    tar(foreign / "001.tar", torn)
    out = command("index", foreign, code=6)
    assert "001.tar: 3 members, 3 samples, 1 TORN" in out
    (foreign / "002.tar").write_bytes(b"no tar at all" * 100)
    out = command("index", foreign, code=1)
    assert "1 of 3 shards cannot be indexed" in command.err
    assert "failed" in out
    command("index", foreign / "002.tar", code=1)
    assert "002.tar" in command.err


def test_ls_samples_says_what_is_there(command: Command, foreign: Path) -> None:
    rows = command.json("ls-samples", foreign)
    assert [(r["key"], r["shard"].rpartition("/")[2]) for r in rows] == [(f"{n:03}", f"{n // 10:03}.tar") for n in range(30)]
    assert all(r["members"] == {"jpg": 150, "cls": 3} and r["bytes"] == 153 for r in rows)
    archive = (foreign / "001.tar").read_bytes()
    assert archive[rows[13]["offset"] :].startswith(b"013" * 50)
    assert command.json("ls-samples", foreign, "-n", 12) == rows[:12]
    assert len(command("ls-samples", foreign, "--limit", 12).splitlines()) == 12
    assert "12 of 30 samples" in command.err
    assert command.json("ls-samples", foreign, "-n", 0) == []


def test_ls_samples_of_loose_files(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "loose"
    folder.mkdir()
    for name in ("a.jpg", "a.txt", "b.jpg"):
        (folder / name).write_bytes(name.encode())
    rows = command.json("ls-samples", f"{folder}/")
    assert [(r["key"], list(r["members"]), r["shard"]) for r in rows] == [("a", ["jpg", "txt"], None), ("b", ["jpg"], None)]


@pytest.mark.parametrize("workers", [0, 2])
def test_repack_keeps_every_sample(command: Command, foreign: Path, tmp_path: Path, workers: int) -> None:
    (foreign / "classes.json").write_text('{"cat": 0, "dog": 1}')
    before, listing = contents(f"{foreign}/*.tar"), sorted(foreign.iterdir())
    assert command.json("repack", f"{foreign}/*.tar", tmp_path / "new", "--dry-run")["samples"] == 30
    assert not (tmp_path / "new").exists()
    done = command.json("repack", f"{foreign}/*.tar", tmp_path / "new", "--shard-samples", 4, "-j", workers, "--verify", "full")
    assert done["samples"] == 30
    assert done["shards"] >= 8
    assert contents(tmp_path / "new" / "manifest.jsonl") == before
    assert sorted(foreign.iterdir()) == listing
    assert json.loads((tmp_path / "new" / "classes.json").read_text()) == {"cat": 0, "dog": 1}
    assert command.json("repack", f"{foreign}/*.tar", tmp_path / "new", "--shard-samples", 4)["unchanged"]
    command("repack", f"{foreign}/*.tar", tmp_path / "new", "--shard-samples", 5, code=1)
    assert "there is a dataset already" in command.err
    command("repack", tmp_path / "new" / "manifest.jsonl", tmp_path / "again", "--shard-size", "64KiB")
    assert contents(tmp_path / "again" / "manifest.jsonl") == before


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_and_again(command: Command, tmp_path: Path, workers: int) -> None:
    for number in range(4):
        tar(tmp_path / "many" / f"{number}.tar", {f"{number}-{n:04}.bin": bytes(9_000) for n in range(400)})
    source = f"{tmp_path}/many/*.tar"
    command("index", tmp_path / "many")
    arguments = ("repack", source, str(tmp_path / "new"), "--shard-size", "128KiB", "-j", str(workers))
    running = subprocess.Popen(
        [sys.executable, "-m", "s3loader", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while not list((tmp_path / "new").rglob("*.tar")) and running.poll() is None:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, err = running.communicate(timeout=60)
    assert "Traceback" not in err
    assert running.returncode in (0, 130), err
    assert running.returncode == 0 or not (tmp_path / "new" / "manifest.jsonl").exists()
    command(*arguments, "--verify", "full")
    rows = command.json("ls-samples", tmp_path / "new" / "manifest.jsonl")
    assert [row["key"] for row in rows] == [f"{number}-{n:04}" for number in range(4) for n in range(400)]


def test_repack_keeps_keys_apart_that_come_twice(command: Command, foreign: Path, tmp_path: Path) -> None:
    tar(foreign / "001.tar", shard_of(range(10)))
    before = contents(f"{foreign}/*.tar")
    command("repack", f"{foreign}/*.tar", tmp_path / "new")
    assert contents(tmp_path / "new" / "manifest.jsonl") == before
    keys = [row["key"] for row in command.json("ls-samples", tmp_path / "new" / "manifest.jsonl")]
    assert len(set(keys)) == 30
    assert keys[10] == "001/000"


def test_repack_refuses_torn_samples_and_folders_of_files(command: Command, foreign: Path, tmp_path: Path) -> None:
    tar(foreign / "001.tar", {"a.jpg": b"1", "b.jpg": b"2", "a.cls": b"3"})
    command("repack", f"{foreign}/*.tar", tmp_path / "new", code=1)
    assert "torn" in command.err
    command("repack", f"{foreign}/*.tar", tmp_path / "new", "--on-torn", "split")
    assert len(contents(tmp_path / "new" / "manifest.jsonl")) == 23


@pytest.fixture(params=["file", "s3"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Makes URLs of names, on a folder and on a server."""
    if request.param == "file":
        (tmp_path / "b").mkdir()
        yield lambda name: f"{tmp_path}/b/{name}"
        return
    with server() as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        place = s3.bucket()
        yield lambda name: f"s3://{place}/{name}"


def test_manifests(command: Command, foreign: Path, bucket: Callable[[str], str]) -> None:
    for half, shards in (("train", ["000.tar", "001.tar"]), ("val", ["002.tar"])):
        for shard in shards:
            command("upload", foreign / shard, bucket(f"{half}/"))
    made = command.json("manifest", "from-prefix", bucket("train/"), bucket("train/manifest.jsonl"))
    assert (made["entries"], made["shards"]) == (2, 2)
    command("manifest", "from-prefix", bucket("train/"), bucket("train/manifest.jsonl"), code=1)
    command("index", bucket("val/"))
    command("manifest", "from-prefix", bucket("val/*.tar"), bucket("val.jsonl"))
    entries = command.json("manifest", "show", bucket("val.jsonl"))
    assert [(e["kind"], e["archive_key"], e["count"]) for e in entries] == [("shard", "val/002.tar", 20)]
    assert len(contents(bucket("train/manifest.jsonl"))) == 20

    sources = [bucket("train/manifest.jsonl"), bucket("val.jsonl")]
    assert command.json("manifest", "merge", *sources, bucket("all.jsonl"))["entries"] == 3
    assert contents(bucket("all.jsonl")) == contents(f"{foreign}/*.tar")
    merged = command.json("manifest", "merge", *sources, sources[0], bucket("all.jsonl"), "--overwrite")
    assert (merged["entries"], merged["repeated"]) == (3, 2)

    appended = command.json("manifest", "append", bucket("grown.jsonl"), bucket("train/000.tar"))
    assert appended["entries"] == 1
    again = command.json("manifest", "append", bucket("grown.jsonl"), bucket("train/*.tar"), bucket("val/"))
    assert (again["entries"], again["repeated"]) == (2, 1)
    assert contents(bucket("grown.jsonl")) == contents(bucket("all.jsonl"))
    assert [e["kind"] for e in command.json("manifest", "show", bucket("grown.jsonl"), "--refs")].count("manifest_ref") >= 1
    members = command.json("manifest", "show", bucket("grown.jsonl"), "--members", "-n", 3)
    assert [e["member_path"] for e in members] == ["000.jpg", "000.cls", "001.jpg"]

    planned = command.json("manifest", "compact", bucket("grown.jsonl"), "--delete-parts", "--dry-run")
    assert planned["total_entries"] == 3
    assert planned["delete"]
    assert command.json("manifest", "compact", bucket("grown.jsonl"), "--delete-parts")["deleted"] == planned["delete"]
    assert [e["kind"] for e in command.json("manifest", "show", bucket("grown.jsonl"), "--refs")] == ["shard"] * 3
    assert contents(bucket("grown.jsonl")) == contents(bucket("all.jsonl"))
    assert "3 shards" in (command("manifest", "show", bucket("grown.jsonl")), command.err)[1]


def all_of(command: Command, url: str) -> set[str]:
    return {row["url"].removeprefix("file://") for row in command.json("ls", "-r", url)}


def test_a_manifest_is_deleted_with_what_it_lists_and_nothing_else(
    command: Command, foreign: Path, bucket: Callable[[str], str]
) -> None:
    for shard in ("000.tar", "001.tar", "002.tar"):
        command("upload", foreign / shard, bucket("train/"))
    command("index", bucket("train/"))
    command("upload", foreign / "002.tar", bucket("val/"))
    command("manifest", "append", bucket("m.jsonl"), bucket("train/000.tar"))
    command("manifest", "append", bucket("m.jsonl"), bucket("train/001.tar"))
    before = all_of(command, bucket(""))
    out = command("manifest", "delete", bucket("m.jsonl"), "--dry-run")
    shards = {bucket("train/000.tar"), bucket("train/001.tar")}
    named = [line.removeprefix("would delete ").removeprefix("file://") for line in out.splitlines()]
    assert set(named) >= shards
    assert named[-1] == bucket("m.jsonl"), "itself last"
    assert "2 shards" in command.err
    assert all_of(command, bucket("")) == before
    done = command.json("manifest", "delete", bucket("m.jsonl"))
    assert [url.removeprefix("file://") for url in done["urls"]] == named
    assert (done["deleted_archive_count"], done["errors"], done["dry_run"]) == (2, {}, False)
    gone = before - all_of(command, bucket(""))
    assert gone == {*named, *(f"{shard}.idx" for shard in shards)}
    command("manifest", "delete", bucket("m.jsonl"), code=4)


def test_a_deletion_never_guesses_what_the_keys_are_relative_to(
    command: Command, foreign: Path, bucket: Callable[[str], str]
) -> None:
    others = {bucket("000.tar"), bucket("001.tar")}
    for name, shard in (("a/000.tar", "000.tar"), ("a/001.tar", "001.tar"), ("000.tar", "002.tar"), ("001.tar", "000.tar")):
        command("cp", foreign / shard, bucket(name))
    command("manifest", "from-prefix", bucket("a/"), bucket("a/m.jsonl"))
    command("rm", bucket("a/000.tar"))
    command("manifest", "delete", bucket("a/m.jsonl"), code=3)  # its name is that of another object above
    assert "--root" in command.err
    assert all_of(command, bucket("")) == {*others, bucket("a/001.tar"), bucket("a/m.jsonl")}
    command("manifest", "delete", bucket("a/m.jsonl"), "--root", bucket("a/"))
    assert all_of(command, bucket("")) == others

    command("manifest", "from-prefix", bucket(""), bucket("b/c/m.jsonl"))  # keys relative to a folder above, and certain
    command("rm", bucket("000.tar"))
    command("manifest", "delete", bucket("b/c/m.jsonl"), code=1)  # now it is where it was, nowhere
    assert "--root" in command.err
    command("cp", foreign / "002.tar", bucket("000.tar"))
    command("manifest", "from-prefix", bucket(""), bucket("b/c/m.jsonl"), "--overwrite")
    command("manifest", "delete", bucket("b/c/m.jsonl"))
    assert all_of(command, bucket("")) == set()


def test_a_manifest_with_a_missing_part_stays(command: Command, foreign: Path, bucket: Callable[[str], str]) -> None:
    command("upload", foreign / "000.tar", foreign / "001.tar", bucket("t/"))
    command("manifest", "append", bucket("m.jsonl"), bucket("t/000.tar"))
    command("manifest", "append", bucket("m.jsonl"), bucket("t/001.tar"))
    (part, *_) = [
        e["key"] for e in command.json("manifest", "show", bucket("m.jsonl"), "--refs") if e["kind"] == "manifest_ref"
    ]
    command("rm", bucket(part))
    command("manifest", "delete", bucket("m.jsonl"), code=1)
    assert part in command.err
    assert bucket("m.jsonl") in all_of(command, bucket(""))


def test_manifests_that_cannot_be(command: Command, tmp_path: Path) -> None:
    for name in ("show", "compact"):
        command("manifest", name, tmp_path / "no.jsonl", code=4)
    command("manifest", "merge", tmp_path / "no.jsonl", tmp_path / "new.jsonl", code=4)
    (tmp_path / "folder").mkdir()
    command("manifest", "from-prefix", f"{tmp_path}/folder/", tmp_path / "folder.jsonl", code=4)
    command("manifest", "append", tmp_path / "new.jsonl", tmp_path / "gone.tar", code=4)
    assert not (tmp_path / "new.jsonl").exists()
    (tmp_path / "bad.jsonl").write_text("{}\n")
    command("manifest", "show", tmp_path / "bad.jsonl", code=1)


@pytest.mark.parametrize("arguments", [("ls-samples",), ("index",), ("repack",)])
def test_what_is_not_there(command: Command, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    more = [tmp_path / "new"] if arguments == ("repack",) else []
    command(*arguments, tmp_path / "gone", *more, code=4)
    assert not (tmp_path / "gone").exists()
    command(*arguments, "nope://x/y", *more, code=3)
