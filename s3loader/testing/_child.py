"""Runs one server and outlives nobody: ``python _child.py PARENT_PID FOLDER COMMAND...``.

It ends the server and removes `FOLDER` when its standard input is closed or the parent process
is gone, even by SIGKILL. A script of its own, because ``PR_SET_PDEATHSIG`` set by the parent
would fire when the parent's *thread* ends, and a pipe alone stays open in forked children.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1


def _die_with_launcher() -> None:
    """In the server's process, before exec: SIGKILL it when this launcher is killed."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_for_an_end(parent: int, server: subprocess.Popen[bytes]) -> bool:
    """Until the server has ended by itself (False), or is to end: by request, or the parent is gone."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
    for pid in (parent, server.pid):
        with contextlib.suppress(AttributeError, OSError):  # no pidfd here: the timeout below does it
            poll.register(os.pidfd_open(pid), select.POLLIN)
    while server.poll() is None and os.getppid() == parent:  # polled too: a pidfd is Linux only
        if any(fd == sys.stdin.fileno() for fd, _ in poll.poll(500)):
            return True
    return os.getppid() != parent


def main(argv: list[str]) -> int:
    """Run the server in `argv` until something ends it; returns its exit status."""
    parent, folder, command = int(argv[1]), argv[2], argv[3:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C in a terminal goes to the whole group
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=_die_with_launcher,  # noqa: PLW1509  (this process has one thread)
        start_new_session=True,
    )
    wanted = True
    try:
        wanted = _wait_for_an_end(parent, server)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        status = server.wait()
        if wanted:  # else the parent wants to read the log
            shutil.rmtree(folder, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
