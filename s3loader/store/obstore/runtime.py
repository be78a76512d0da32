"""Where obstore may be called, and how a call of it can be interrupted.

obstore runs on one Tokio runtime per process, which does not survive fork: in a child of a process
that used it every call hangs for ever, new stores included. And its sync calls do not see a Ctrl-C
before they end. Both are solved here, for all stores of the process.
"""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

from s3loader.errors import UnsupportedOperationError

__all__ = ["FORKED", "call", "usable"]

T = TypeVar("T")

FORKED = "obstore was used before this process was forked, and cannot be used here any more"


def _loaded() -> bool:
    return "obstore._obstore" in sys.modules


# The module being loaded counts as use: who else in the parent called it cannot be known. A worker
# that finds it loaded before us cannot tell fork from spawn, and is careful.
_tainted = _loaded() and multiprocessing.parent_process() is not None
_loop: tuple[int, asyncio.AbstractEventLoop] | None = None


def _in_child() -> None:
    global _tainted
    _tainted = _tainted or _loaded()


os.register_at_fork(after_in_child=_in_child)


def usable() -> bool:
    """Whether obstore works in this process: it was not forked from one that had obstore loaded."""
    return not _tainted


def call(sync: Callable[[], T], begin: Callable[[], Awaitable[T]]) -> T:
    """One obstore call: `sync`, or in the main thread `begin`, which a Ctrl-C can cancel.

    Raises:
        UnsupportedOperationError: obstore is not usable in this process.
    """
    if _tainted:
        raise UnsupportedOperationError(
            FORKED, hint='start workers by spawn or forkserver: DataLoader(multiprocessing_context="forkserver")'
        )
    if threading.current_thread() is not threading.main_thread() or _in_running_loop():
        return sync()

    async def run() -> T:
        return await begin()  # obstore wants to be called inside the loop

    loop = _own_loop()
    task = loop.create_task(run())
    try:
        return loop.run_until_complete(task)
    except KeyboardInterrupt:
        task.cancel()
        loop.run_until_complete(asyncio.wait([task]))
        raise


def _in_running_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _own_loop() -> asyncio.AbstractEventLoop:
    global _loop
    if _loop is None or _loop[0] != os.getpid():
        _loop = (os.getpid(), asyncio.new_event_loop())
        atexit.register(_close_loop)
    return _loop[1]


def _close_loop() -> None:
    if _loop is not None and _loop[0] == os.getpid():
        _loop[1].close()
