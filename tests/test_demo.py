"""The demo's own proof, as `make demo` runs it, on local files and on an S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from s3loader.testing import server

ROOT = Path(__file__).resolve().parent.parent


def run_demo(out: Path, *arguments: str, env: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-m", "examples.demo", "--out", str(out), *arguments]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("kind", ["file", "moto"])
def test_demo_proves_exact_resume(kind: str, tmp_path: Path) -> None:
    if kind == "file":
        output = run_demo(tmp_path / "out")
    else:
        with server(kind) as s3:
            output = run_demo(tmp_path / "out", "--url", f"s3://{s3.bucket()}/demo", env=s3.environment)
    assert output.count("sample sequence identical") == 2
    assert output.count("final weights identical") == 1
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_with_too_few_images_is_said_to_be(tmp_path: Path) -> None:
    for number in range(40):
        path = tmp_path / "images" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(path)
    command = [sys.executable, "-m", "examples.demo", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "images")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 1
    assert "has 40 images, too few" in run.stderr
    assert "384 images are enough" in run.stderr
    assert "Traceback" not in run.stderr
