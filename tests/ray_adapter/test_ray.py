"""Ray: jobs whose tasks die, run twice, or find no credentials; datasets read and written by tasks."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from s3loader import ConfigError, Loader, ObjectExistsError, S3LoaderError, open_dataset, open_store
from s3loader.packing import optimize, pack

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


def contents(url: Any) -> list[tuple[str, dict[str, bytes]]]:
    dataset = open_dataset(f"{url}/manifest.jsonl", group="webdataset")
    return [
        (sample["__key__"], {name: bytes(value) for name, value in sample.items() if not name.startswith("__")})
        for batch in Loader(dataset, batch_size=512, shuffle="none", tail="short")
        for sample in batch
    ]


def digest(url: Any) -> str:
    return hashlib.sha256(repr(contents(url)).encode()).hexdigest()


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def is_clean(folder: Path) -> bool:
    """Whether nothing lies there but what the manifest names."""
    named = {json.loads(line)["archive_key"] for line in (folder / "manifest.jsonl").read_text().splitlines()}
    kept = {"manifest.jsonl", "pack.json", "classes.json", *named, *(f"{key}.idx" for key in named)}
    return files(folder) <= kept


def ten(number: int) -> Iterator[dict[str, Any]]:
    for which in range(10):
        yield {"__key__": f"{number:05d}-{which}", "bin": bytes([which]) * 30 + b"\0", "cls": which}


class Deadly:
    """Makes ten samples of a number; the first process that comes to some number dies there."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at = folder, at

    def __call__(self, number: int) -> Iterator[dict[str, Any]]:
        for which, sample in enumerate(ten(number)):
            if number == self.at and which == 5:
                try:
                    os.close(os.open(self.folder / "died", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    pass
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
            yield sample


def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "deaths").mkdir()
    told: list[tuple[int, int | None, int]] = []
    made = optimize(
        Deadly(tmp_path / "deaths", 700),
        range(1000),
        str(tmp_path / "ray"),
        shard_size="256KiB",
        engine="ray",
        progress=lambda *now: told.append(now),
    )
    assert (tmp_path / "deaths" / "died").exists()
    optimize(ten, range(1000), str(tmp_path / "here"), shard_size="256KiB")
    assert made.samples == 10_000  # of two members each
    assert told[-1][0] == 10_000
    assert digest(tmp_path / "ray") == digest(tmp_path / "here")
    assert is_clean(tmp_path / "ray")


class Failing:
    """Makes ten samples of a number, but none of a certain one."""

    def __call__(self, number: int) -> Iterator[dict[str, Any]]:
        if number == 900 and not os.path.exists(self.gate):
            raise ValueError("no such picture")
        return ten(number)

    def __init__(self, gate: Path) -> None:
        self.gate = gate


def test_a_failure_publishes_nothing_and_a_rerun_does_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make = Failing(tmp_path / "gate")
    with pytest.raises(ValueError, match="no such picture"):
        optimize(make, range(1000), str(out), shard_size="256KiB", engine="ray", workers=1)
    assert not (out / "manifest.jsonl").exists()
    before = {name: (out / name).stat().st_mtime_ns for name in files(out) if name.endswith(".tar")}
    done = len([name for name in files(out) if name.startswith("_pack/")])
    assert done >= 2
    (tmp_path / "gate").touch()
    report = optimize(make, range(1000), str(out), shard_size="256KiB", engine="ray", workers=1)
    assert report.resumed == done
    kept = {name: at for name, at in before.items() if (out / name).exists()}
    assert kept
    assert all((out / name).stat().st_mtime_ns == at for name, at in kept.items())
    assert report.samples == 10_000
    assert is_clean(out)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(60):
        path = tmp_path / "images" / f"{number % 3}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * 20_000)
    return tmp_path / "images"


def test_a_folder_and_then_its_shards(images: Path, tmp_path: Path) -> None:
    pack(images, str(tmp_path / "here"), shard_size="32KiB")
    report = pack(images, str(tmp_path / "ray"), shard_size="32KiB", engine="ray")
    assert digest(tmp_path / "ray") == digest(tmp_path / "here")
    assert pack(images, str(tmp_path / "ray"), shard_size="32KiB").unchanged, "whoever wrote it"
    again = pack(report.manifest, str(tmp_path / "again"), shard_size="64KiB", engine="ray")
    assert again.samples == 60
    assert digest(tmp_path / "again") == digest(tmp_path / "here")


def test_what_cannot_be_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be sent"):
        pack(({"bin": b"1"} for _ in range(3)), str(tmp_path / "out"), engine="ray")
    with pytest.raises(ConfigError, match=r"connected to the Ray cluster at .*, not elsewhere:1"):
        pack([{"bin": b"1"}], str(tmp_path / "out"), engine="ray", address="elsewhere:1")
    with pytest.raises(ConfigError, match="address is that of a cluster"):
        pack([{"bin": b"1"}], str(tmp_path / "out"), address="127.0.0.1:1")
    with pytest.raises(ConfigError, match="engine"):
        pack([{"bin": b"1"}], str(tmp_path / "out"), engine="spark")  # type: ignore[arg-type]  # pyright: ignore


def test_manifests_are_read_by_tasks(tmp_path: Path) -> None:
    from s3loader.ray import read_manifest

    optimize(ten, range(100), str(tmp_path), shard_samples=90)
    expected = dict(contents(tmp_path))
    found = read_manifest(f"{tmp_path}/manifest.jsonl", override_num_blocks=4)
    assert found.count() == 1000
    rows = found.take_all()
    assert [(row["__key__"], {"bin": row["bin"], "cls": row["cls"]}) for row in rows] == contents(tmp_path)
    only = found.select_columns(["__key__", "cls"])
    assert set(only.columns() or ()) == {"__key__", "cls"}
    assert sorted(row["cls"] for row in only.take_all()) == sorted(values["cls"] for values in expected.values())
    decoded = read_manifest(f"{tmp_path}/manifest.jsonl", decode="auto", columns=["cls"])
    assert decoded.sum("cls") == 45 * 100


def test_rows_are_written_as_shards(tmp_path: Path) -> None:
    import ray.data

    from s3loader.ray import read_manifest, write_shards

    out = tmp_path / "out"
    rows = ray.data.range(500, override_num_blocks=5).map(
        lambda row: {"__key__": f"k{row['id']:04d}", "bin": b"\0" * 100 + bytes([row["id"] % 256]), "cls": row["id"] % 7}
    )
    manifest = write_shards(rows, str(out), shard_size="16KiB")
    assert manifest.endswith("/manifest.jsonl")
    found = dict(contents(out))
    assert len(found) == 500
    assert found["k0005"] == {"bin": b"\0" * 100 + b"\x05", "cls": b"5"}
    assert is_clean(out)
    with pytest.raises(ObjectExistsError):
        write_shards(rows, str(out))
    write_shards(read_manifest(manifest).limit(10), str(out), exists="replace")
    assert len(contents(out)) == 10
    assert is_clean(out)


def test_a_failing_row_leaves_nothing(tmp_path: Path) -> None:
    import ray.data

    from s3loader.ray import write_shards

    out = tmp_path / "out"
    rows = ray.data.range(200, override_num_blocks=8).map(
        lambda row: {"__key__": f"k{row['id']}", "bin": b"x" if row["id"] != 177 else object()}
    )
    with pytest.raises(Exception, match="object"):
        write_shards(rows, str(out))
    assert files(out) == set()


def test_a_part_that_is_written_twice_stands_there_once(tmp_path: Path) -> None:
    from types import SimpleNamespace

    import pandas as pd

    from s3loader import ShardSizePolicy
    from s3loader.ray import ShardDatasink

    sink = ShardDatasink(str(tmp_path), {"shard_size": ShardSizePolicy(max_samples=3), "group": "webdataset"}, place={})
    told = []
    for number in (1, 0, 1, 1):
        block = pd.DataFrame({"__key__": [f"{number}-{i}" for i in range(4)], "bin": [bytes([i]) for i in range(4)]})
        told.append(sink.write([block], SimpleNamespace(task_idx=number)))
    result: Any = SimpleNamespace(write_returns=told)
    sink.on_write_complete(result)
    assert [key for key, _ in contents(tmp_path)] == [f"{number}-{i}" for number in range(2) for i in range(4)]
    assert is_clean(tmp_path)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    optimize(ten, range(40), str(tmp_path / "shards"), shard_samples=50)
    return tmp_path / "shards"


def test_check_and_index(shards: Path) -> None:
    import s3loader
    from s3loader.inspection import index_archives

    url = f"{shards}/manifest.jsonl"
    assert s3loader.check_dataset(url, engine="ray") == s3loader.check_dataset(url)
    for path in shards.rglob("*.idx"):
        path.unlink()
    told: list[int] = []
    made = index_archives(url, engine="ray", progress=lambda done, total, result: told.append(done))
    assert {result.action for result in made} == {"built"}
    assert told == list(range(1, len(made) + 1))
    assert made == [type(one)(**{**vars_of(one), "action": "built"}) for one in index_archives(url)]
    victim = sorted(shards.rglob("*.tar"))[1]
    victim.write_bytes(victim.read_bytes()[:700])
    broken = s3loader.check_dataset(url, engine="ray")
    assert [*broken.errors] == [*s3loader.check_dataset(url).errors] == [victim.relative_to(shards).as_posix()]


def vars_of(one: Any) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__dataclass_fields__}


def test_copy_and_sync(shards: Path, tmp_path: Path) -> None:
    from s3loader.s3 import copy, sync

    told: list[int] = []
    report = copy(f"{shards}/", f"{tmp_path}/copy/", recursive=True, engine="ray", progress=lambda done, *_: told.append(done))
    assert files(tmp_path / "copy") == files(shards)
    assert report.objects == told[-1] == len(files(shards))
    (tmp_path / "copy" / "pack.json").unlink()
    (tmp_path / "copy" / "more").write_bytes(b"x")
    again = sync(str(shards), str(tmp_path / "copy"), delete=True, engine="ray")
    assert (again.objects, again.deleted) == (1, 1)
    assert digest(tmp_path / "copy") == digest(shards)


def test_replay(shards: Path, tmp_path: Path) -> None:
    from s3loader.oplog import finalize_op_log, init_op_log, replay_op_log

    log = str(tmp_path / "ops.tsv.zst")
    init_op_log(log)
    contents(shards)
    finalize_op_log()
    here = replay_op_log(log, speed=0)
    there = replay_op_log(log, speed=0, engine="ray")
    assert (there.sent, there.errors, there.skipped) == (here.sent, here.errors, here.skipped)
    assert there.sent
    assert here.summary is not None
    assert there.summary is not None
    assert [(op.op, op.requests, op.bytes) for op in there.summary.ops] == [
        (op.op, op.requests, op.bytes) for op in here.summary.ops
    ]


def test_a_node_without_credentials(monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    """The caller has credentials in its environment, the nodes have none: nothing is published, and the error says where."""
    from s3loader.s3 import create_bucket
    from s3loader.testing import server

    with server("rclone") as running:  # it checks signatures
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        create_bucket("s3://packed")
        with pytest.raises(S3LoaderError) as caught:
            pack(images, "s3://packed/out", engine="ray")
        assert "in a Ray task on node" in "".join(caught.value.__notes__)
        assert not open_store("s3://packed/out").exists("manifest.jsonl")
        assert pack(images, "s3://packed/out").samples == 60
