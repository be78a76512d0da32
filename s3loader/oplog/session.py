"""The op-log of this process: a subscriber of the event stream whose rows a thread writes away."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from s3loader import events
from s3loader.arguments import local_path
from s3loader.errors import ConfigError, NoSpaceError, S3LoaderError, StoreError
from s3loader.events import OpEvent
from s3loader.oplog.columns import Slots, encode_rows, is_request, record_of
from s3loader.oplog.files import OpLogFile
from s3loader.ranks import find_ranks

__all__ = ["finalize_op_log", "init_op_log", "is_op_log_active", "join_op_log", "op_log_stats"]

_JOIN: Final = "S3LOADER_OPLOG_JOIN"
"""Variable by which a process tells those it starts of its op-log."""
_PATH: Final = "S3LOADER_OPLOG"
_PAUSE: Final = 0.25
"""Seconds in which rows gather before they are written."""
_log = logging.getLogger("s3loader.oplog")


@dataclass(frozen=True)
class Options:
    """How one op-log is written; the same in all processes that write to it."""

    path: str
    buffer: int
    write_buffer: int
    level: int
    lossless: bool
    client_id: str | None
    anchor: int
    """Nanoseconds since 1970 at which `time.perf_counter` was zero."""


class _OpLog:
    """One process's part in an op-log."""

    def __init__(self, options: Options, file: OpLogFile, owner: bool) -> None:
        self.options = options
        self.owner = owner
        self.file = file
        self.rows = self.dropped = self.bytes = 0
        self.error: str | None = None
        self._pending: deque[OpEvent] = deque()
        self._slots = Slots()
        self._begin()
        self.unsubscribe = events.subscribe(self.take)

    def _begin(self) -> None:
        """Of a new process: nothing of another one's is left."""
        self._writing = threading.Lock()
        self._something = threading.Event()
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._closing = False
        self._at_exit: Any = None

    def after_fork(self) -> None:
        """In the child: rows that were pending are the parent's to write."""
        self.owner = False
        self.rows = self.dropped = self.bytes = 0
        self._pending.clear()
        self._begin()

    def take(self, event: OpEvent) -> None:
        """Keep one event for the writer."""
        if not is_request(event):
            return
        if len(self._pending) >= self.options.buffer:
            if not self.options.lossless:
                self.dropped += 1
                return
            self.flush()
        self._pending.append(event)
        if self._thread is None:
            self._start()
        if not self._something.is_set():
            self._something.set()
        elif len(self._pending) > self.options.buffer >> 1:
            self._hurry.set()

    def _start(self) -> None:
        with self._starting:
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._work, name="s3loader-oplog", daemon=True)
            self._thread.start()
        from multiprocessing import util

        # a child of multiprocessing leaves without `atexit`, but runs these
        self._at_exit = util.Finalize(self, _OpLog.flush, args=(self,), exitpriority=0)

    def _work(self) -> None:
        while not self._closing:
            self._something.wait()
            self._hurry.wait(_PAUSE)
            self._hurry.clear()
            self._something.clear()
            self.flush()

    def flush(self) -> None:
        """Write what is pending; never raises."""
        with self._writing:
            while self._pending:
                self._write()

    def _write(self) -> None:
        o, pid = self.options, os.getpid()
        records = []
        client = o.client_id or _client()
        size = 0
        while self._pending and size < o.write_buffer:
            records.append(record_of(self._pending.popleft(), o.anchor, client, pid))
            size += 160 + len(records[-1].file) + len(records[-1].error)
        records.sort(key=lambda r: r.start)
        try:
            self.bytes += self.file.append(encode_rows(records, self.rows, self._slots))
            self.rows += len(records)
        except (OSError, S3LoaderError) as error:
            self.dropped += len(records)
            if self.error is None:
                _log.error("the op-log %s cannot be written: %s", o.path, error)
            self.error = str(error)

    def stop(self) -> None:
        """Take no more events and write what is left."""
        self.unsubscribe()
        self._closing = True
        self._something.set()
        self._hurry.set()
        if self._at_exit is not None:
            self._at_exit.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5)
        self.flush()

    def hold(self) -> None:
        """Before a fork: nothing is being written, so that the child inherits no lock on the file."""
        self._writing.acquire()

    def let_go(self) -> None:
        """In the parent, after a fork."""
        self._writing.release()

    def stats(self) -> dict[str, Any]:
        """``path active rows pending dropped bytes lossless error`` of this process."""
        return {
            "path": self.options.path,
            "active": True,
            "rows": self.rows,
            "pending": len(self._pending),
            "dropped": self.dropped,
            "bytes": self.bytes,
            "lossless": self.options.lossless,
            "error": self.error,
        }


_current: _OpLog | None = None
_held: _OpLog | None = None
"""The one that a fork under way holds still."""
_last: dict[str, Any] = {}


def init_op_log(
    path: str | os.PathLike[str],
    *,
    client_id: str | None = None,
    lossless: bool | None = None,
    buffer: int | None = None,
    write_buffer: int | None = None,
    level: int | None = None,
    append: bool = False,
) -> None:
    """Log every request of this process, and of the processes it starts, to a file of warp's format.

    What is not given comes from ``S3LOADER_OPLOG_LOSSLESS``, ``_BUF``, ``_WBUFCAP`` and ``_LEVEL``, then from the same
    variables of s3dlio (``S3DLIO_OPLOG_...``), then is the default. Forked and spawned workers log to the same file. Until
    `finalize_op_log` the rows stand in the order in which requests ended, written four times a second.

    Args:
        path: Of the file, by custom ``NAME.tsv.zst`` or ``NAME.csv.zst``. ``{rank}`` and ``{pid}`` are replaced.
        client_id: The column `client_id`; default ``rank-K`` in a job of several processes, else the host's name. Never
            a key id.
        lossless: Whether a full buffer makes requests wait until it is written; else (the default) rows are dropped, and
            counted.
        buffer: Requests that may wait to be written; default 8192.
        write_buffer: Bytes of text written at once, about; default 256 KiB.
        level: Of zstd, 1 (the default) to 19.
        append: Add to the file that is there; False: replace it.

    Raises:
        ConfigError: another op-log is active, or an argument or variable is unusable.
        FormatError: the file that is there is no op-log.
        StoreError: the file cannot be made.
    """
    global _current
    found = Options(
        _named(local_path(path, "path")),
        _number("BUF", "buffer", buffer, 8192, 1, 1 << 24),
        _number("WBUFCAP", "write_buffer", write_buffer, 256 << 10, 1, 1 << 30),
        _number("LEVEL", "level", level, 1, 1, 19),
        _flag("LOSSLESS", lossless),
        client_id,
        time.time_ns() - time.perf_counter_ns(),
    )
    if _current is not None:
        if _current.options.path == found.path:
            return
        raise ConfigError(f"an op-log is active already: {_current.options.path}", hint="call finalize_op_log() first")
    try:
        file = OpLogFile(found.path, found.level, fresh=not append)
    except OSError as error:
        raise StoreError(error.strerror or str(error), op="write", url=found.path) from error
    _current = _OpLog(found, file, owner=True)
    os.environ[_JOIN] = json.dumps(asdict(found))


def finalize_op_log() -> None:
    """End the op-log: write what is left, sort the rows by their starts, and number them. Without one it does nothing.

    In a worker process of the one that began the log, only write what is left.

    Raises:
        NoSpaceError: the disk is full: rows may be missing.
        StoreError: the file cannot be written.
    """
    global _current
    log, _current = _current, None
    if log is None:
        return
    log.stop()
    if log.owner:
        os.environ.pop(_JOIN, None)
        o = log.options
        log.file.sort([f"written by: s3loader; lossless: {str(o.lossless).lower()}; dropped by this process: {log.dropped}"])
    _last.clear()
    _last.update(log.stats(), active=False)
    if log.error is not None:
        raise NoSpaceError(f"{log.dropped} rows could not be written: {log.error}", op="write", url=log.options.path)


def is_op_log_active() -> bool:
    """Whether requests of this process are logged."""
    return _current is not None


def op_log_stats() -> dict[str, Any]:
    """What became of the rows of this process: of the active op-log, or of the last one; empty where there was none.

    Keys: `path`, `active`, `rows` (written), `pending` (in the buffer), `dropped`, `bytes` (of the file, compressed),
    `lossless`, `error` (the last one of writing, or None).
    """
    return dict(_last) if _current is None else _current.stats()


def join_op_log() -> None:
    """Begin the op-log that the environment asks for: that of the process which started this one, or ``S3LOADER_OPLOG=PATH``,
    which adds to a file that is there. What is wrong is a warning, for a program must not fail by being watched."""
    global _current
    if _current is not None:
        return
    try:
        if (told := os.environ.get(_JOIN)) is not None:
            options = Options(**json.loads(told))
            _current = _OpLog(options, OpLogFile(options.path, options.level), owner=False)
        elif path := os.environ.get(_PATH):
            init_op_log(path, append=True)
    except (S3LoaderError, OSError, ValueError, TypeError) as error:
        _log.warning("no op-log is written: %s", error)


def _at_exit() -> None:
    try:
        finalize_op_log()
    except S3LoaderError as error:
        _log.error("%s", error)


def _before_fork() -> None:
    global _held
    if (log := _current) is not None:
        log.hold()
    _held = log


def _in_parent() -> None:
    if _held is not None:
        _held.let_go()


def _in_child() -> None:
    if _held is not None:
        _held.after_fork()


def _named(path: str) -> str:
    if "{rank}" in path:
        path = path.replace("{rank}", str(find_ranks().rank))
    return os.path.abspath(path.replace("{pid}", str(os.getpid())))


def _client() -> str:
    with contextlib.suppress(ConfigError):
        found = find_ranks()
        if found.world_size > 1:
            return f"rank-{found.rank}"
    return socket.gethostname()


def _variable(name: str, read: Callable[[str], Any]) -> Any:
    for full in (f"S3LOADER_OPLOG_{name}", f"S3DLIO_OPLOG_{name}"):
        text = os.environ.get(full, "").strip()
        if text:
            try:
                return read(text)
            except (ValueError, KeyError):
                raise ConfigError(f"{full}={text!r} is unusable", hint="unset it, or correct it") from None
    return None


def _number(variable: str, name: str, value: int | None, default: int, least: int, most: int) -> int:
    if value is None:
        value = _variable(variable, int)
        if value is None:
            return default
        name = f"the variable {variable}"
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{name} cannot be {value!r}", hint=f"a whole number from {least} to {most}")
    return value


_WORDS: Final = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _flag(variable: str, value: bool | None) -> bool:
    if value is not None:
        return bool(value)
    return bool(_variable(variable, lambda text: _WORDS[text.lower()]))


atexit.register(_at_exit)
os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
