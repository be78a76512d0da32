"""Which process of a node fetches what: claims on names, which the kernel lets go when a process dies.

A claim is a lock on one byte of a file that all of them see, at a place that follows from the name. So there is one descriptor
however many claims are held, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import struct
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

__all__ = ["Claims"]

T = TypeVar("T")

_FILE: Final = ".claims"
_OWN: Final = getattr(fcntl, "F_OFD_SETLK", None)
"""Locks of an open file, not of a process; where there are none, two loaders of one process do not see each other's claims."""
_RECORD: Final = "hhqqi0q"
_TAKEN: Final = (errno.EAGAIN, errno.EACCES)
_PAUSE: Final = 0.005
"""Seconds between two looks for what another process fetches."""
_PATIENCE: Final = 60.0
"""Seconds after which a process no longer waits for another's fetch: it may be stopped, or its network may hang."""


class Claims:
    """The claims of one user of a folder; it may use them from several threads. A forked child leaves them to its parent.

    Args:
        folder: Seen by all processes that share. Where it cannot hold locks, everybody gets every claim.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._fd: int | None = None
        self._held: set[str] = set()
        self._mutex = threading.Lock()
        self._pid = os.getpid()
        self._patience = _PATIENCE

    def take(self, name: str) -> bool:
        """Claim `name`, if nobody has: not another process, and not the caller either."""
        if os.getpid() != self._pid:
            return True
        with self._mutex:
            if name in self._held:
                return False
            if not self._lock(name, fcntl.F_WRLCK):
                return False
            self._held.add(name)
            return True

    def give(self, name: str) -> None:
        """Let go of `name`, if it is held."""
        if os.getpid() != self._pid:
            return
        with self._mutex:
            if name in self._held:
                self._held.discard(name)
                self._lock(name, fcntl.F_UNLCK)

    def wait(self, name: str, look: Callable[[], T | None]) -> T | None:
        """What `look` finds when whoever has claimed `name` is done with it.

        None: the caller is to fetch it, and holds the claim, or has waited too long. Who has waited in vain once waits no more.
        """
        end = time.monotonic() + self._patience
        while True:
            taken = self.take(name)
            found = look()
            if found is not None:
                if taken:
                    self.give(name)
                return found
            if taken:
                return None
            if time.monotonic() > end:
                self._patience = 0.0
                return None
            time.sleep(_PAUSE)

    def close(self) -> None:
        """Let go of all."""
        if os.getpid() != self._pid:
            return
        with self._mutex:
            self._held.clear()
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def _lock(self, name: str, kind: int) -> bool:
        """Whether the byte of `name` could be locked or unlocked, or nobody can lock here."""
        name = name.removeprefix(self._folder)  # which containers may see at different places
        at = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") >> 2
        try:
            if self._fd is None:
                self._fd = os.open(os.path.join(self._folder, _FILE), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            if _OWN is None:
                fcntl.lockf(self._fd, fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)
            else:
                fcntl.fcntl(self._fd, _OWN, struct.pack(_RECORD, kind, os.SEEK_SET, at, 1, 0))
        except OSError as error:
            return error.errno not in _TAKEN
        return True

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()
