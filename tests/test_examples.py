"""Each training example is run, killed, and run again: the weights are those of a run nobody killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"examples.{name}", "--url", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", ["train_torch", "train_tensorflow", "train_jax", "train_accelerate", "train_lightning"])
def test_killed_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    straight = run(name, tmp_path, "--run", "straight")
    assert straight.returncode == 0, straight.stderr
    killed = run(name, tmp_path, "--run", "killed", "--kill-at", "70")  # in the middle of epoch 1
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "weights" not in killed.stdout
    resumed = run(name, tmp_path, "--run", "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 60" in resumed.stdout
    assert resumed.stdout.splitlines()[-1] == straight.stdout.splitlines()[-1]
