"""The seed notebook, replayed against a real S3 server by the example that ships."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "exchange_notebook.py"


def test_every_cell_prints_what_the_notebook_shows() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), "ministack"], capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert run.stdout.endswith("every value is the notebook's\n")
