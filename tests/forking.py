"""Forked children: for tests of what survives a fork."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable

import pytest


def start_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child; its pid. It ends with 0 where `work` returns, and returns anything but False."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 2 if work() is False else 0
        except BaseException:  # noqa: BLE001 - the child must not go on with the tests; this is for the reader
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return pid


def in_child(work: Callable[[], object]) -> None:
    """`work` in a forked child, which must end well."""
    pid = start_child(work)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    pytest.fail("the forked child hangs")
