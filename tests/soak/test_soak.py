"""`make soak`, in short: faults, kills, and at the end the count."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_what_was_acknowledged_is_there_and_what_was_planned_was_delivered(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.soak",
        "--brief",
        "--minutes",
        "0.15",
        "--seed",
        "5",
        "--folder",
        str(tmp_path),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "verdict.md").read_text().startswith("# Soak: all is well")
