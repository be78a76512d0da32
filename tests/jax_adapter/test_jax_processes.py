"""The example of several processes: one mesh over all of them; another number of processes and devices restores it exactly."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from examples._digits import parser_of, prepare
from s3loader import CheckpointManager

ROOT = Path(__file__).resolve().parent.parent.parent


def run(folder: Path, processes: int, devices: int) -> list[list[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "examples.train_jax_processes", "--url", str(folder), "--steps", "6", "--every", "3"]
    command += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes)]
    children = [
        subprocess.Popen([*command, "--process", str(number)], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        for number in range(processes)
    ]
    try:
        return [child.communicate(timeout=300)[0].splitlines() for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_two_processes_save_and_one_restores(tmp_path: Path) -> None:
    prepare(parser_of("").parse_args(["--url", str(tmp_path)]))
    zero, one = run(tmp_path, processes=2, devices=1)
    assert zero[-1].startswith("weights")
    assert one[-1] == zero[-1]
    with CheckpointManager(f"{tmp_path}/runs/run") as manager:
        assert manager.restore()["loader"]["consumed"] == 6 * 24
        assert {root.facts["world"] for root in manager.roots()} == {2}
    (alone,) = run(tmp_path, processes=1, devices=4)
    assert alone == ["resumed at step 6 on 1 processes", zero[-1]]
