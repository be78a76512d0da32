"""Ctrl-C in `save`: whatever moment it strikes at, the process ends, and what is committed is whole."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s3loader.checkpoint import CheckpointManager, CheckpointOptions
from s3loader.checkpoint.threads import Gate, Worker

CHILD = """
import os, random, signal, sys, threading, time
import numpy as np
from s3loader.checkpoint import CheckpointManager, CheckpointOptions
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
folder, seed, lines, times = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
options = CheckpointOptions(part_size="1MiB", staging_budget="3MiB", file_size="4MiB", concurrency=3)
state = {"w": np.full(9 << 20, seed % 251, np.uint8), "s": [np.full(1000, i) for i in range(20)]}
manager = CheckpointManager(folder, options=options)
manager.save(1, state).result(600)
main = threading.get_ident()
left = lines

def trace(frame, event, argument):
    # a signal at the n-th line or call of ours, or of what we call
    global left
    if threading.get_ident() == main:
        left -= 1
        if left == 0 or (left < 0 and times > 1 and left > -40 and left % 13 == 0):
            os.kill(os.getpid(), signal.SIGINT)
    return trace

sys.settrace(trace)
try:
    handle = manager.save(2, state)
    sys.settrace(None)
    print("saved", flush=True)
except KeyboardInterrupt:
    sys.settrace(None)
    print("interrupted", flush=True)
if times == 1:
    manager.wait()
    assert [t.name for t in threading.enumerate() if t.name.startswith("s3loader-ckpt")] == []
    manager.save(3, state).result(600)  # in a notebook, life goes on
    assert manager.restore(3)["w"][-1] == seed % 251
    manager.close()
"""


def child(folder: Path, seed: int, lines: int, times: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", CHILD, str(folder), str(seed), str(lines), str(times)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("times", [1, 3])
def test_the_process_ends_whatever_moment_it_strikes_at(tmp_path: Path, times: int) -> None:
    """Once or, since people do, three times."""
    rng = np.random.default_rng(times)
    moments = sorted({int(n) for n in np.exp(rng.uniform(np.log(5), np.log(6000), 8 if times == 1 else 5))})
    said = []
    for number, lines in enumerate(moments):
        folder = tmp_path / str(number)
        process = child(folder, number, lines, times)
        out, error = process.communicate(timeout=600)  # it ends by itself
        if times == 1:
            assert process.returncode == 0, f"signal at line {lines}: {error}"
        said.append(out.strip())
        with CheckpointManager(folder) as manager:
            assert 1 in manager.steps()
            for step in manager.steps():
                assert manager.open(step).verify() == []
                assert (manager.restore(step)["w"] == number % 251).all()
    assert said.count("interrupted") >= 2, said


def test_an_error_in_staging_leaves_nothing_running(tmp_path: Path) -> None:
    class Broken:
        def state_dict(self) -> dict[str, Any]:
            raise KeyboardInterrupt

        def load_state_dict(self, state: Any) -> None: ...

    with CheckpointManager(tmp_path, options=CheckpointOptions(part_size="64KiB")) as manager:
        with pytest.raises(KeyboardInterrupt):
            manager.save(1, {"a": np.zeros(10_000), "b": Broken()})
        assert manager.steps() == []
        manager.save(1, {"a": np.zeros(10_000)}).result(600)
    assert [t.name for t in threading.enumerate() if t.name.startswith("s3loader-ckpt")] == []


def test_a_gate_lets_everybody_through() -> None:
    gate, passed = Gate(), []
    assert not gate.wait(0.01)
    threads = [threading.Thread(target=lambda: passed.append(gate.wait(600))) for _ in range(8)]
    for thread in threads:
        thread.start()
    gate.open()
    gate.open()
    for thread in threads:
        thread.join()
    assert passed == [True] * 8
    assert gate.is_open()
    assert gate.wait(0)


def test_a_worker_is_called_off_or_runs() -> None:
    ran = []
    early = Worker(lambda: ran.append("early"), "early")
    assert early.call_off()
    assert early.call_off()
    early.start()
    early.join()
    late = Worker(lambda: ran.append("late"), "late")
    late.start()
    late.join()
    assert not late.call_off()
    assert ran == ["late"]
