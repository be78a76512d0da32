"""Progress of loading, saving, restoring and packing: what is reported, and how it is shown."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s3loader import CheckpointManager, CheckpointOptions, Loader, PartialFailureError, open_dataset, pack, s3
from s3loader.checkpoint import load, save
from s3loader.errors import ConfigError
from s3loader.progress import showing
from s3loader.torch import S3DataLoader

Seen = list[tuple[int, int | None, int]]


def seen() -> tuple[Seen, Any]:
    calls: Seen = []
    return calls, lambda done, total, size: calls.append((done, total, size))


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    calls, report = seen()
    samples = [{"__key__": f"{i:03d}", "bin": bytes(100)} for i in range(50)]
    manifest = pack(lambda: iter(samples), str(tmp_path / "data"), progress=report).manifest
    assert [done for done, _, _ in calls] == list(range(1, 51))
    assert calls[-1][2] == 5000
    return manifest


def rises_to(calls: Seen, total: int, size: int | None = None) -> None:
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert done[-1] == total
    assert {call[1] for call in calls} == {total}
    assert size is None or calls[-1][2] == size


def test_a_loader_counts_the_batches_of_its_rank(manifest: str) -> None:
    dataset = open_dataset(manifest, group="webdataset")
    calls, report = seen()
    loader = Loader(dataset, batch_size=4, tail="short", progress=report)
    for _ in range(2):  # each epoch is counted anew
        calls.clear()
        assert len(list(loader)) == 13
        rises_to(calls, 13, 5000)
    state_at_3 = Loader(dataset, batch_size=4, tail="short")
    batches = iter(state_at_3)
    for _ in range(3):
        next(batches)
    loader.load_state_dict(state_at_3.state_dict())
    calls.clear()
    list(loader)
    rises_to(calls, 10, 5000 - 1200)  # what is left
    calls.clear()
    list(Loader(dataset, batch_size=4, rank=1, world_size=2, worker=1, workers=2, progress=report))
    rises_to(calls, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_come_from_workers(manifest: str, workers: int) -> None:
    calls, report = seen()
    loader = S3DataLoader(manifest, group="webdataset", batch_size=8, tail="short", num_workers=workers, progress=report)
    for _ in range(2):
        calls.clear()
        list(loader)
        rises_to(calls, 7, 5000)


def test_saving_and_restoring_count_bytes(tmp_path: Path) -> None:
    state = {"a": np.arange(100_000.0), "b": [np.ones(1000, np.int8), 3], "step": 7}
    calls, report = seen()
    options = CheckpointOptions(part_size="64KiB", concurrency=4)
    with CheckpointManager(str(tmp_path / "run"), options=options) as manager:
        result = manager.save(1, state, progress=report).result()
        rises_to(calls, result.written, result.written)
        assert len(calls) > 10
        for target in (None, {"a": np.zeros(100_000)}):
            calls.clear()
            restored = manager.restore(target=target, progress=report)
            assert (restored["a"] == state["a"]).all()
            rises_to(calls, calls[-1][0])
            assert 800_000 <= calls[-1][0] <= result.written
    calls.clear()
    save(str(tmp_path / "one"), state, progress=report)
    rises_to(calls, calls[-1][0])
    calls.clear()
    load(str(tmp_path / "one"), progress=report)
    rises_to(calls, calls[-1][0])


TRANSFERS: dict[str, Callable[[str, str, Any], Any]] = {
    "upload": lambda source, target, progress: s3.upload(source, f"{target}/", progress=progress),
    "download": lambda source, target, progress: s3.download(f"{source}/", target, progress=progress),
    "copy": lambda source, target, progress: s3.copy(f"{source}/", f"{target}/", recursive=True, progress=progress),
    "copy one": lambda source, target, progress: s3.copy(f"{source}/0", f"{target}/0", progress=progress),
    "sync": lambda source, target, progress: s3.sync(f"{source}/", f"{target}/", progress=progress, delete=True),
}


@pytest.mark.parametrize("how", TRANSFERS)
def test_a_transfer_counts_its_objects(tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in range(20):
        (source / str(name)).write_bytes(bytes(100))
    count = 1 if how == "copy one" else 20
    if how == "sync":
        target.mkdir()
        (target / "more").write_bytes(b"")  # deleted
        count += 1
    calls, report = seen()
    TRANSFERS[how](str(source), str(target), report)
    assert [*dict.fromkeys(done for done, _, _ in calls)] == list(range(1, count + 1))
    assert calls[-1][1:] == (count, 100 if how == "copy one" else 2000)
    assert {total for _, total, _ in calls} <= {None, count}
    if how in ("upload", "download"):
        (source / "3").unlink()
        (source / "3").symlink_to("nothing")
        calls.clear()
        if how == "upload":  # what failed is done with, too
            with pytest.raises(PartialFailureError):
                TRANSFERS[how](str(source), str(target), report)
            assert calls[-1][:2] == (20, 20)
    with pytest.raises(ZeroDivisionError):
        TRANSFERS[how](str(source), str(tmp_path / "again"), lambda *some: 1 // 0)
    with pytest.raises(ConfigError, match="progress"):
        TRANSFERS[how](str(source), str(target), 7)
    (source / "3").unlink()
    TRANSFERS[how](str(source), str(tmp_path / "shown"), True)  # too short for a line
    assert capsys.readouterr().err == ""


def test_a_function_that_fails(tmp_path: Path, manifest: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(Loader(open_dataset(manifest), batch_size=4, progress=fail))
    with CheckpointManager(str(tmp_path / "run")) as manager:
        manager.save(1, {"a": np.ones(10)}, progress=fail).result()  # whoever looks on must not cost the checkpoint
        assert caplog.text.count("ZeroDivisionError") == 1
        with pytest.raises(ZeroDivisionError):
            manager.restore(progress=fail)
        assert manager.latest() == 1


def test_what_is_no_progress_is_refused(tmp_path: Path, manifest: str) -> None:
    wrong: Any = 7
    with pytest.raises(ConfigError, match="progress"):
        Loader(open_dataset(manifest), batch_size=4, progress=wrong)
    with pytest.raises(ConfigError, match="progress"):
        S3DataLoader(manifest, batch_size=4, progress=wrong)
    with pytest.raises(ConfigError, match="progress"):
        pack([{"txt": b""}], str(tmp_path / "x"), progress=wrong)
    with CheckpointManager(str(tmp_path / "run")) as manager:
        with pytest.raises(ConfigError, match="progress"):
            manager.save(1, {}, progress=wrong)
        with pytest.raises(ConfigError, match="progress"):
            manager.restore(progress=wrong)


def test_a_log_gets_lines_and_the_first_rank_alone_shows(capsys: pytest.CaptureFixture[str]) -> None:
    with showing(True, "epoch 3", "batches", every=0) as report:
        assert report is not None
        report(3, 10, 3 << 20)
        report(4, None, 0)
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"epoch 3: 3 of 10 batches, \S+ [KMG]?i?B/s, .* left", first), first
    assert re.fullmatch(r"epoch 3: 4 batches, [\d.,]+ batches/s", second), second
    with showing(True, "save", "bytes", every=3600) as report:
        assert report is not None
        report(1, 2, 1)
    with showing(True, "save", "bytes", first=False) as report:
        assert report is None
    with showing(None, "save") as report:
        assert report is None
    assert capsys.readouterr().err == ""


ON_A_TERMINAL = """
import sys, threading
from s3loader.progress import showing
with showing(True, "epoch 0", "batches") as loading:
    with showing(True, "save 5", "bytes") as saving:
        loading(1, 4, 1 << 20)
        saving(2 << 20, 4 << 20, 2 << 20)
        saving(4 << 20, 4 << 20, 4 << 20)
    loading(4, 4, 4 << 20)
print("done", file=sys.stderr)
"""


def test_a_terminal_gets_a_bar_for_each() -> None:
    pytest.importorskip("rich")
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    got = bytearray()

    def collect() -> None:
        try:
            while piece := os.read(ours, 65_536):
                got.extend(piece)
        except OSError:  # the other end is closed
            pass

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        run = subprocess.run([sys.executable, "-c", ON_A_TERMINAL], stderr=theirs, stdout=subprocess.PIPE, env=env, timeout=120)
    finally:
        os.close(theirs)
        thread.join()
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", got.decode())
    assert (run.returncode, run.stdout) == (0, b""), text
    assert all(words in text for words in ("epoch 0", "4/4 batches", "save 5", "4.0 MiB/4.0 MiB")), text
    assert text.rstrip().endswith("done")
