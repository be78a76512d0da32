"""What a writer has put into a store, so that it can be named and removed when it comes to nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Literal, TypeAlias

from s3loader.exchange.commit import new_spool

__all__ = ["Journal", "Written"]

Written: TypeAlias = Literal["object", "archive", "index", "manifest"]


class Journal:
    """An append-only list of ``(what, key)``, on disk once it is long; safe to write from several threads."""

    def __init__(self) -> None:
        self._file = new_spool()
        self._lock = threading.Lock()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def note(self, what: Written, key: str) -> None:
        """`key` is about to be written."""
        line = json.dumps([what, key]).encode("ascii") + b"\n"
        with self._lock:
            self._file.seek(0, 2)
            self._file.write(line)
            self._count += 1

    def __iter__(self) -> Iterator[tuple[Written, str]]:
        with self._lock:
            self._file.seek(0)
            at = 0
        while True:
            with self._lock:
                self._file.seek(at)
                lines = self._file.readlines(1 << 16)
                at = self._file.tell()
            if not lines:
                return
            for line in lines:
                what, key = json.loads(line)
                yield what, key

    def summary(self, shown: int = 10) -> str:
        """The first keys, for a note on an exception."""
        keys = [key for _, (what, key) in zip(range(4 * shown), self, strict=False) if what != "index"][:shown]
        more = f", ... ({self._count} writes in all)" if self._count > len(keys) else ""
        return ", ".join(keys) + more

    def forget(self, what: Written) -> None:
        """Take out the keys of one kind: they were removed."""
        kept = Journal()
        for kind, key in self:
            if kind != what:
                kept.note(kind, key)
        with self._lock:
            self._file.close()
            self._file, self._count = kept._file, kept._count

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._file.seek(0)
            self._file.truncate()
            self._count = 0

    def close(self) -> None:
        """Drop the file; nothing is listed any more."""
        self._file.close()
        self._count = 0
