"""From a folder, a table or a function to a dataset: every sample once, whole, resumable, and never half there."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from s3loader import (
    ConfigError,
    FormatError,
    IntegrityError,
    Loader,
    ObjectExistsError,
    SourceNotFoundError,
    open_dataset,
    open_store,
)
from s3loader.checksum import crc32c
from s3loader.datagen import generate_parquet
from s3loader.packing import optimize, pack, plan_pack
from s3loader.testing import server


def samples(url: Any, **options: Any) -> dict[str, dict[str, bytes]]:
    dataset = open_dataset(f"{url}/manifest.jsonl", group="webdataset", **options)
    found = {}
    for batch in Loader(dataset, batch_size=16, shuffle="none", tail="short"):
        for sample in batch:
            found[sample["__key__"]] = {name: bytes(value) for name, value in sample.items() if not name.startswith("__")}
    assert len(found) == len(dataset)
    return found


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    names = [f"{label}/{number:03}.png" for label in ("cat", "dog", "eel") for number in range(40)]
    return write(tmp_path / "images", {name: name.encode() * 500 for name in names})


def expected(images: Path) -> dict[str, dict[str, bytes]]:
    numbers = {"cat": b"0", "dog": b"1", "eel": b"2"}
    found = {}
    for path in images.rglob("*.png"):
        key = path.relative_to(images).with_suffix("").as_posix()
        found[key] = {"png": path.read_bytes(), "cls": numbers[path.parent.name]}
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_by_class(images: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    told: list[tuple[int, int | None, int]] = []
    plan = plan_pack(images, str(out), shard_size="64KiB")
    assert (plan.samples, plan.classes) == (120, {"cat": 40, "dog": 40, "eel": 40})
    assert not out.exists()
    report = pack(
        images, str(out), shard_size="64KiB", workers=workers, verify="full", progress=lambda *some: told.append(some)
    )
    assert samples(out) == expected(images)
    assert (report.samples, report.unchanged, dict(report.classes)) == (120, False, {"cat": 0, "dog": 1, "eel": 2})
    assert report.shards > 1
    assert json.loads((out / "classes.json").read_text()) == {"cat": 0, "dog": 1, "eel": 2}
    assert told[-1][:2] == (120, 120)
    order = list(samples(out))
    assert order != sorted(order), "neighbours are of mixed classes"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert not (out / "_pack").exists() or not list((out / "_pack").iterdir())
    again = pack(images, str(out), shard_size="64KiB")
    assert again.unchanged
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_broken_off_pack_goes_on(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"shard_size": "64KiB"}

    class Stop(Exception):
        pass

    def stop(done: int, total: int | None, size: int) -> None:
        if done == 110:
            raise Stop

    with pytest.raises(Stop):
        pack(images, str(out), progress=stop, **options)
    assert not (out / "manifest.jsonl").exists(), "nobody sees half of it"
    parts = {path: path.stat().st_mtime_ns for path in (out / "_pack").glob("*.jsonl")}
    assert parts
    done = plan_pack(images, str(out), **options)
    assert 0 < done.done < done.parts
    report = pack(images, str(out), **options)
    assert report.resumed == len(parts)
    assert samples(out) == expected(images)
    shards = {path.name for path in out.rglob("*.tar")}
    listed = [json.loads(line)["archive_key"] for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert len(listed) == len(list(out.rglob("*.tar"))), "what the broken one had begun is gone"
    assert shards


def test_another_dataset_is_not_written_over(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(images, str(out))
    (images / "cat" / "new.png").write_bytes(b"new")
    for exists in ("resume", "error"):
        with pytest.raises(ObjectExistsError) as caught:
            pack(images, str(out), exists=exists)  # type: ignore[arg-type]
        assert "overwrite" in (caught.value.hint or "")
    old = set(out.rglob("*.tar"))
    assert pack(images, str(out), exists="replace").samples == 121
    assert not old & set(out.rglob("*.tar"))
    assert samples(out) == expected(images)
    other = tmp_path / "other"
    write(other, {"manifest.jsonl": b""})
    with pytest.raises(ObjectExistsError, match="not made by pack"):
        pack(images, str(other))


def test_what_makes_a_sample(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "in",
        {
            "a.JPG": b"1", "a.txt": b"one", "b.c.jpg": b"2", "b_c.jpg": b"3", "d.png": b"4", "d.jpg": b"5",
            "deep/a.jpg": b"6", "ünï code.jpg": b"7", ".hidden.jpg": b"", "README": b"", "__x__/y.jpg": b"8",
        },
    )  # fmt: skip
    report = pack(folder, str(tmp_path / "out"), shuffle=False)
    found = samples(tmp_path / "out")
    assert sorted(value for some in found.values() for value in some.values()) == sorted(
        [b"1", b"one", b"2", b"3", b"4", b"5", b"6", b"7", b"8"]
    )
    assert found["a"] == {"jpg": b"1", "txt": b"one"}
    assert {"d-png", "d-jpg", "deep/a", "ünï code"} <= set(found)
    assert report.left_out == {"hidden": [".hidden.jpg"], "without extension": ["README"]}
    assert not (tmp_path / "out" / "classes.json").exists()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "mapping"])
def test_labels_of_a_table(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {f"x{number}.jpg": b"%d" % number for number in range(4)})
    labels: Any = {"x0.jpg": "b", "x1.jpg": "a", "x2.jpg": "b"}
    if kind == "csv":
        text = "File,Label,Width\nx0.jpg,b,10\nx1.jpg,a,20\nx2.jpg,b,30\n"
        labels = str(write(tmp_path, {"labels.csv": text.encode()}) / "labels.csv")
    elif kind == "jsonl":
        text = "".join(json.dumps({"file_name": name, "label": label, "w": 1}) + "\n" for name, label in labels.items())
        labels = str(write(folder, {"labels.jsonl": text.encode()}) / "labels.jsonl")
    report = pack(folder, str(tmp_path / "out"), labels=labels)
    found = samples(tmp_path / "out")
    assert {key: some["cls"] for key, some in found.items()} == {"x0": b"1", "x1": b"0", "x2": b"1"}
    assert report.left_out == {"without label": ["x3.jpg"]}
    if kind == "csv":
        assert json.loads(found["x1"]["json"]) == {"Width": "20"}


def test_rows_of_tables(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    table = write(tmp_path / "p", {"a.parquet": bytes(generate_parquet(300, 20, row_group=100, seed=1))})
    report = pack(table, str(tmp_path / "out"))
    found = samples(tmp_path / "out")
    assert (report.samples, len(found)) == (300, 300)
    assert json.loads(found["000000123"]["json"]) == {"id": 123}
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    png = b"\x89PNG\r\n\x1a\n" + bytes(10)
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": png, "path": None}] * 5, "label": [0, 1, 1, 0, 1]}, features=features
    )
    report = pack(rows, str(tmp_path / "hf"))
    assert dict(report.classes) == {"no": 0, "yes": 1}
    assert samples(tmp_path / "hf")["000000001"] == {"png": png, "cls": b"1"}


def record(data: bytes) -> bytes:
    """A record of a TFRecord file."""
    masked = [
        ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF for crc in (crc32c(struct.pack("<Q", len(data))), crc32c(data))
    ]
    return struct.pack("<QI", len(data), masked[0]) + data + struct.pack("<I", masked[1])


@pytest.mark.parametrize("name", ["a.tfrecord", "a.tfrecord.gz", "a-00000-of-00001", "a.tfrec.zz"])
def test_records_compressed_or_not(name: str, tmp_path: Path) -> None:
    """What the loader cannot read at random is packed in order."""
    records = [bytes([i]) * size for i, size in enumerate((0, 1, 5000, 3 << 20, 70))]
    packed = b"".join(map(record, records))
    written = gzip.compress(packed) if name.endswith("gz") else zlib.compress(packed) if name.endswith("zz") else packed
    folder = write(tmp_path / "records", {name: written, "b" + name[1:]: written})
    for source, files in ((str(folder / name), 1), (f"{folder}/*{name[1:]}", 2), (str(folder), 2)):
        out = tmp_path / f"out-{len(source)}-{files}"
        assert pack(source, str(out)).samples == 5 * files
        found = samples(out)
        assert [sample["bin"] for sample in found.values()] == records * files
        assert list(found)[-1] == f"{files - 1:05d}-000000004"
        assert pack(source, str(out)).unchanged
    flipped = bytearray(packed)
    flipped[packed.index(b"\x02" * 5000) + 100] ^= 1
    for damaged, error in ((packed[:-3], FormatError), (bytes(flipped), IntegrityError), (b"hello" * 200, FormatError)):
        (folder / name).write_bytes(gzip.compress(damaged) if name.endswith("gz") else damaged)
        with pytest.raises(error):
            pack(str(folder / name), str(tmp_path / "damaged"))


def test_examples_are_called_so(tmp_path: Path) -> None:
    example = b"\x0a\x0b\x0a\x09\x0a\x01a\x12\x04\x1a\x02\x0a\x00"  # a is an empty list of integers
    folder = write(tmp_path / "e", {"a.tfrecord.gz": gzip.compress(record(example) * 3)})
    pack(folder, str(tmp_path / "out"))
    dataset = open_dataset(f"{tmp_path}/out/manifest.jsonl", group="webdataset")
    for decode in ("auto", "tf_example"):
        for sample in next(iter(Loader(dataset, batch_size=3, decode=decode))):
            assert sample["tfexample"]["a"].tolist() == []


def test_another_dataset_is_repacked(images: Path, tmp_path: Path) -> None:
    pack(images, str(tmp_path / "first"), shard_size="64KiB")
    shards = tmp_path / "first" / "shards"
    for source in (str(tmp_path / "first" / "manifest.jsonl"), str(shards)):
        out = tmp_path / f"out-{len(source)}"
        assert pack(source, str(out), compression="zstd").samples == 120
        assert samples(out) == expected(images)
    (shards / "more.png").write_bytes(b"1")
    with pytest.raises(ConfigError, match=r"tar shards .* and other files"):
        pack(shards, str(tmp_path / "both"))


def make(number: int) -> Any:
    if number % 10 == 3:
        return None
    if number % 10 == 4:
        return [{"txt": f"{number}a"}, {"txt": f"{number}b"}]
    return {"txt": str(number), "cls": number, "json": {"n": number}}


@pytest.mark.parametrize("workers", [0, 2])
def test_optimize(workers: int, tmp_path: Path) -> None:
    report = optimize(make, range(600), str(tmp_path), workers=workers)
    found = samples(tmp_path)
    assert report.samples == len(found) == 600
    assert [some["txt"] for some in found.values()] == [
        text.encode()
        for number in range(600)
        for text in ([] if number % 10 == 3 else [f"{number}a", f"{number}b"] if number % 10 == 4 else [str(number)])
    ]
    assert optimize(make, range(600), str(tmp_path)).unchanged
    with pytest.raises(ObjectExistsError):
        optimize(make, range(601), str(tmp_path))


class Twice:
    """Runs every task twice at the same time, as a cluster may that believes a node to be dead."""

    def size(self) -> int:
        return 1

    def run(self, task: Any, items: Any) -> Iterator[tuple[int, Any]]:
        for number, item in enumerate(items):
            with ThreadPoolExecutor(2) as pool:
                tries = [pool.submit(task, item) for _ in range(2)]
            first, second = (each.result() for each in tries)
            assert first == second
            yield number, first


def test_tasks_that_run_twice_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both write; the first one that puts the part's manifest is the part, and nothing of the other is left."""
    both = threading.Barrier(2)

    def together(number: int) -> Any:
        if number % 256 == 255:  # the last of a part: neither has put its manifest
            both.wait(300)
        return make(number)

    optimize(make, range(600), str(tmp_path / "once"), shard_size="64KiB")
    monkeypatch.setattr("s3loader.packing.run.executor_of", lambda keywords, workers: (Twice(), {}))
    report = optimize(together, range(600), str(tmp_path / "twice"), shard_size="64KiB")
    assert samples(tmp_path / "twice") == samples(tmp_path / "once")
    assert len([*(tmp_path / "twice").rglob("*.tar")]) == report.shards
    assert not [*(tmp_path / "twice").glob("_pack/*")]


def test_iterables(tmp_path: Path) -> None:
    def numbers() -> Iterator[Any]:
        for number in range(10):
            yield {"__key__": f"n{number}", "txt": f"{number}"}

    assert pack(numbers(), str(tmp_path / "a")).samples == 10
    assert pack(numbers, str(tmp_path / "b")).samples == 10
    assert samples(tmp_path / "a") == samples(tmp_path / "b") == {f"n{n}": {"txt": str(n).encode()} for n in range(10)}


def test_what_cannot_be_packed(images: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    splits = write(tmp_path / "splits", {"train/cat/1.jpg": b"", "val/cat/1.jpg": b""})
    calls: list[tuple[type[Exception], Any, dict[str, Any]]] = [
        (SourceNotFoundError, tmp_path / "missing", {}),
        (SourceNotFoundError, images, {"labels": str(tmp_path / "missing.csv")}),
        (SourceNotFoundError, images, {"labels": {"nope.png": "x"}}),
        (ConfigError, empty, {}),
        (ConfigError, splits, {}),
        (ConfigError, images / "cat", {"labels": "folders"}),
        (ConfigError, {"a": 1}, {}),
        (ConfigError, iter([]), {}),
        (ConfigError, iter([object()]), {}),
        (ConfigError, images, {"exists": "perhaps"}),
        (ConfigError, images, {"verify": "perhaps"}),
        (ConfigError, images, {"workers": -1}),
        (ConfigError, images, {"labels": {"cat/000.png": "x", "dog/000.png": 1}}),
        (FormatError, write(tmp_path / "p", {"bad.parquet": b"no"}), {}),
        (FormatError, images, {"labels": str(write(tmp_path, {"bad.csv": b"a,b\n1,2\n"}) / "bad.csv")}),
    ]
    for kind, source, options in calls:
        with pytest.raises(kind) as caught:
            pack(source, out, **options)
        assert getattr(caught.value, "hint", None), (source, options)
        assert not (tmp_path / "out" / "manifest.jsonl").exists()


def test_from_the_shell_to_training_on_s3(images: Path) -> None:
    """What a person does in the first hour; the lines it prints run as they stand."""
    pytest.importorskip("torch")
    with server() as s3:
        url = f"s3://{s3.bucket()}/train"
        env = {**os.environ, **s3.environment}

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=300)

        dry = run("-m", "s3loader", "pack", str(images), url, "--dry-run")
        assert "cat: 40" in dry.stdout, dry.stderr
        done = run("-m", "s3loader", "pack", str(images), url)
        assert done.returncode == 0, done.stderr
        assert "120 samples" in done.stdout
        lines = done.stdout[done.stdout.index("from s3loader") :].replace('decode="auto"', "decode=None")
        ran = run("-c", lines.replace("...", "print(len(batch), sorted(batch[0]))"))
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.startswith("64 ['__key__'")
        again = run("-m", "s3loader", "pack", str(images), url, "--json")
        assert json.loads(again.stdout)["unchanged"] is True
        (images / "cat" / "000.png").write_bytes(b"changed")
        refused = run("-m", "s3loader", "pack", str(images), url)
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[1].startswith("hint: ")
        assert run("-m", "s3loader", "pack", str(images / "none"), url).returncode == 4


def test_gen_from_the_shell(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "s3loader", "gen", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    for folder in ("a", "b"):
        done = run(str(tmp_path / folder), "-n", "3", "-s", "100KB", "-o", "NPZ", "-t", "x-{}.npz", "--seed", "1")
        assert done.returncode == 0, done.stderr
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / folder).glob("*.npz")} for folder in ("a", "b"))
    assert first == second
    assert {len(data) for data in first.values()} == {100_000}
    assert len(set(first.values())) == 3
    assert run(str(tmp_path), "-n", "3", "-t", "same").returncode == 2
    assert open_store(str(tmp_path / "a")).exists("x-0.npz")
