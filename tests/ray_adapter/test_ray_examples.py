"""The examples on Ray run; Ray Train's worker is killed, and the weights are those of a run nobody killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(name: str, *arguments: str) -> list[str]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 's3loader[ray]'")
    environ = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300"}
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_pack(tmp_path: Path) -> None:
    packed, counted, wrote = (line.split() for line in run("ray_pack", "--url", str(tmp_path))[-3:])
    assert packed[1] == counted[1] == wrote[1] == "1797"


def test_train_killed_and_resumed(tmp_path: Path) -> None:
    weights = {}
    for name, kill in (("straight", "0"), ("killed", "8")):
        told = run("train_ray", "--url", str(tmp_path), "--run", name, "--steps", "12", "--every", "5", "--kill-at", kill)
        weights[name] = next(line for line in told if line.startswith("weights"))
        assert ("resumed at step 5" in told) == (name == "killed")
    assert weights["killed"] == weights["straight"]
