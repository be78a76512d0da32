"""``s3loader loader`` and ``top``: what they show is what is there, and keys are never read as HTML."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from s3loader import Loader, open_dataset, open_store
from s3loader.inspection import dataset_page, open_for_inspection, read_job, view_dataset
from s3loader.loader import mix_datasets
from s3loader.packing import pack

Command = Any
COLORS = {"red": (200, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 200)}


def picture(color: tuple[int, int, int], size: int = 32) -> bytes:
    image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    image.new("RGB", (size, size), color).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 pictures: 30 red, 20 green, 10 blue."""
    for color, count in (("red", 30), ("green", 20), ("blue", 10)):
        (tmp_path / "images" / color).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "images" / color / f"{number:02}.png").write_bytes(picture(COLORS[color]))
    return tmp_path / "images"


def test_a_packed_dataset(command: Command, folder: Path, tmp_path: Path) -> None:
    pack(folder, str(tmp_path / "train"), shard_size="64KiB", shard_samples=16)
    found = command.json("loader", tmp_path / "train" / "manifest.jsonl")
    assert (found["samples"], found["shards"], found["looked_at"]) == (60, 4, 60)
    assert found["classes"] == {"red": 30, "green": 20, "blue": 10}
    assert {name: kind["count"] for name, kind in found["members"].items()} == {"png": 60, "cls": 60}
    assert sum(count for *_, count in found["sizes"]) == 60
    size = len(picture(COLORS["red"])) + 1
    assert found["smallest"] <= size <= found["largest"]
    assert all(low <= found["median"] or count for low, _, count in found["sizes"])
    assert found["explain"]["samples"] == "60"
    shown = command("loader", tmp_path / "train" / "manifest.jsonl", "--labels", 12)
    assert "60 samples in 4 shards" in shown
    assert "of 12 labels that were read" in shown
    command("loader", tmp_path / "gone", code=4)


def test_a_folder_of_pictures(command: Command, folder: Path) -> None:
    found = command.json("loader", folder)
    assert (found["samples"], found["objects"]) == (60, 60)
    assert found["classes"] == {"red": 30, "green": 20, "blue": 10}


def test_the_page(command: Command, folder: Path, tmp_path: Path) -> None:
    evil = folder / "red" / "<img src=x onerror=alert(1)>.png"
    evil.write_bytes(picture(COLORS["red"], 2000))
    (folder / "red" / "zz.png").write_bytes(b"no picture")
    command("loader", folder, "--html", tmp_path / "page.html", "--pictures", 1000)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 61
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "1 pictures are not shown" in page
    assert "http" not in page
    assert len(page) < 400_000, "pictures are thumbnails"
    command("loader", folder, "--html", tmp_path / "no" / "page.html", code=1)


def test_without_pillow_small_originals_are_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "red" / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100_000))
    (folder / "red" / "script.png").write_bytes(b"<svg onload='alert(1)'/>")
    red = picture(COLORS["red"])
    monkeypatch.setitem(sys.modules, "PIL", None)
    view = view_dataset(open_for_inspection(str(folder)), pictures=100)
    assert len(view.pictures) == 60
    assert {picture.mime for picture in view.pictures} == {"image/png"}
    assert red in [shown.data for shown in view.pictures]
    assert "svg onload" not in dataset_page(view)


# -- top --------------------------------------------------------------------------------------------


@pytest.fixture
def stats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("S3LOADER_STATS_DIR", str(tmp_path / "stats"))
    return tmp_path / "stats"


def test_loaders_tell_what_they_do(command: Command, numbers_url: str, stats: Path) -> None:
    dataset = open_dataset(numbers_url)
    for rank in range(2):
        loader = Loader(dataset, batch_size=5, shuffle="none", rank=rank, world_size=2)
        for _ in range(2):
            assert len(list(loader)) == 5
    found = command.json("top", stats, "--once")
    assert (found["samples"], found["over"], found["errors"]) == (50, True, 0)
    ranks = [(r["rank"], r["state"], r["epoch"], r["delivered"], r["steps"]) for r in found["ranks"]]
    assert ranks == [(0, "done", 1, 5, 5), (1, "done", 1, 5, 5)]
    assert found["dataset"] == dataset.name
    assert "5/5" in command("top", stats, "--once")
    assert "50 samples" in command("top", stats)  # ends, because the job has
    assert len(list(stats.iterdir())) == 2


def test_states(command: Command, numbers_url: str, stats: Path) -> None:
    dataset = open_dataset(numbers_url)
    running = iter(Loader(dataset, batch_size=5, rank=0, world_size=3))
    next(running)
    assert [(r.state, r.delivered) for r in read_job(str(stats)).ranks] == [("running", 1)]
    assert [r.state for r in read_job(str(stats), now=time.time() + 60).ranks] == ["silent"]
    assert read_job(str(stats), now=time.time() + 60).samples_s == 0
    assert read_job(str(stats), now=time.time() + 7200).ranks == ()
    running.close()  # type: ignore[attr-defined]
    fails = Loader(dataset, batch_size=5, rank=1, world_size=3, transform=lambda sample: 1 // 0)
    with pytest.raises(Exception, match="division"):
        list(fails)
    job = read_job(str(stats))
    assert [(r.rank, r.state) for r in job.ranks] == [(0, "stopped"), (1, "failed")]
    assert "ZeroDivisionError" in str(job.ranks[1].last_error)
    assert "ZeroDivisionError" in command("top", stats, "--once")


def test_workers_of_a_dataloader_are_summed_up(command: Command, numbers_url: str, stats: Path) -> None:
    pytest.importorskip("torch")
    from s3loader.torch import S3DataLoader, S3IterableDataset

    dataset = S3IterableDataset.from_prefix(numbers_url, batch_size=5, shuffle="none")
    for _ in range(2):
        assert len(list(S3DataLoader(dataset, num_workers=2))) == 10
    found = command.json("top", stats, "--once")
    (rank,) = found["ranks"]
    assert (rank["processes"], rank["delivered"], rank["steps"], rank["samples"]) == (2, 10, 10, 50)
    assert len(list(stats.iterdir())) == 2


def test_requests_that_fail_are_counted_in_a_mixture_too(tmp_path: Path, stats: Path) -> None:
    datasets = []
    for name in "ab":
        store = open_store(f"{tmp_path}/{name}")
        for number in range(20):
            store.put(f"{number:02}", b"x" * 8)
        datasets.append(open_dataset(f"{tmp_path}/{name}/"))
    (tmp_path / "a" / "03").unlink()
    list(Loader(mix_datasets(datasets), batch_size=4, on_error="skip"))
    (rank,) = read_job(str(stats)).ranks
    assert rank.errors >= 1
    assert rank.skipped >= 1


def test_files_that_are_no_counters(command: Command, numbers_url: str, stats: Path) -> None:
    list(Loader(open_dataset(numbers_url), batch_size=5))
    (good,) = stats.iterdir()
    told = json.loads(good.read_text())
    for number, wrong in enumerate(("", "{", "[]", '{"format": "s3loader-stats"}', json.dumps({**told, "rank": "x"}))):
        (stats / f"{number}.json").write_text(wrong)
    (stats / "notes.txt").write_text("x")
    found = command.json("top", stats, "--once")
    assert (found["unreadable"], found["samples"]) == (5, 50)
    command("top", stats / "gone", "--once", code=4)
    (stats / "empty").mkdir()
    command("top", stats / "empty", "--once", code=4)


def test_a_folder_that_cannot_be_written_to_stops_no_job(
    numbers_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("S3LOADER_STATS_DIR", str(tmp_path / "file" / "stats"))
    assert len(list(Loader(open_dataset(numbers_url), batch_size=5))) == 10
    assert caplog.text.count("cannot be written") == 1


def test_a_reader_that_goes_away(numbers_url: str, stats: Path) -> None:
    loader = iter(Loader(open_dataset(numbers_url), batch_size=5))
    next(loader)
    command = [sys.executable, "-m", "s3loader", "top", str(stats), "--interval", "0.1"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy())
    assert running.stdout is not None
    assert running.stdout.readline()
    running.stdout.close()
    assert running.wait(60) == 141
    assert running.stderr is not None
    assert running.stderr.read() == ""
    running.stderr.close()
