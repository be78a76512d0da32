"""A cluster that disappears: a complete dataset or none, and what was done is not done again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_cluster import CLUSTER, ROOT, environment

from s3loader import S3LoaderError
from s3loader.packing import optimize

SHARD = "64KiB"


class Waiting:
    """Makes ten samples of a number; whoever comes to a certain one waits until a file is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, number: int) -> Iterator[dict[str, Any]]:
        if number == 900 and not (self.folder / "go").exists():
            os.mkfifo(self.folder / "waits")
            (self.folder / "waits").read_bytes()  # until somebody writes there, or this process is killed
        for which in range(10):
            yield {"__key__": f"{number:05d}-{which}", "bin": bytes([which]) * 30}


def drive(folder: str) -> None:
    """In a process of its own: a cluster, and a job on it."""
    import ray

    ray.init(**CLUSTER)
    print("begun", flush=True)
    try:
        optimize(Waiting(Path(folder)), range(1000), f"{folder}/out", shard_size=SHARD, engine="ray")
    except S3LoaderError as error:
        print(type(error).__name__, error, flush=True)


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_that_disappears(tmp_path: Path) -> None:
    """Its head is killed in the middle of a job: Ray ends the driver; there is no dataset, and the job goes on without Ray."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 's3loader[ray]'")
    out = tmp_path / "out"
    code = f"import test_ray_lost; test_ray_lost.drive({str(tmp_path)!r})"
    environ = {**environment(), "RAY_gcs_rpc_server_reconnect_timeout_s": "3"}  # instead of a minute
    driver = subprocess.Popen([sys.executable, "-c", code], env=environ, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    cluster: list[psutil.Process] = []
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "begun\n"
        wait_until(lambda: (tmp_path / "waits").exists() and len(parts(out)) == 3, driver)
        cluster = psutil.Process(driver.pid).children(recursive=True)
        done, shards = parts(out), {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
        for process in cluster:
            if process.name() in ("gcs_server", "raylet"):
                process.send_signal(signal.SIGKILL)
        said, _ = driver.communicate(timeout=600)
        assert driver.returncode != 0 or "WorkerError" in said
        assert not (out / "manifest.jsonl").exists()
        assert parts(out) == done
    finally:
        driver.kill()
        driver.wait()
        for process in cluster:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    (tmp_path / "go").touch()
    report = optimize(Waiting(tmp_path), range(1000), str(out), shard_size=SHARD)
    assert (report.resumed, report.samples) == (3, 10_000)
    kept = {path: at for path, at in shards.items() if path.exists()}
    assert len(kept) >= 3
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())


def parts(out: Path) -> set[str]:
    """The manifests of parts that are done."""
    return {path.name for path in (out / "_pack").glob("*.jsonl")}


def wait_until(holds: Any, driver: subprocess.Popen[str]) -> None:
    while not holds():
        assert driver.poll() is None
        threading.Event().wait(0.02)
