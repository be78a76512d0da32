"""Progress of whatever takes long: a bar where a person watches, one line a minute where a log is written, or your function."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

from s3loader.errors import ConfigError
from s3loader.units import format_duration, format_rate, format_size

__all__ = ["Report", "ShowProgress", "check_progress", "showing"]

Report: TypeAlias = Callable[[int, int | None, int], None]
"""Called with how many are done, of how many (None: nobody knows yet), and bytes moved so far."""
ShowProgress: TypeAlias = bool | Report | None
"""True: shown on stderr, in the main process only: a bar on a terminal (where `rich` is installed), else one line a minute. A
function: it is called whenever something is done, in every process that does. None, False: nothing."""

_EVERY: Final = 60.0
_REDRAWN: Final = 0.1
"""Seconds between two updates of a bar."""


def check_progress(option: ShowProgress) -> None:
    """See to it that `option` is one.

    Raises:
        ConfigError: it is not.
    """
    if option is not None and not isinstance(option, bool) and not callable(option):
        raise ConfigError(
            f"progress cannot be {option!r}", hint="True, or a function of (done, total, bytes); leave it out for none"
        )


@contextlib.contextmanager
def showing(
    option: ShowProgress, what: str, unit: str = "objects", *, first: bool = True, every: float = _EVERY
) -> Iterator[Report | None]:
    """Gives a function to call with ``(done, total, bytes)``; None where nobody wants to know.

    Several may be open at a time, in any threads: on a terminal each has a line of its own.

    Args:
        option: What the caller was told.
        what: Before the bar.
        unit: What is counted; ``"bytes"`` are written as sizes.
        first: Whether this is the rank that shows; functions are called on all.
        every: Seconds between two lines of a log.
    """
    if option is None or option is False:
        yield None
    elif option is not True:
        yield option
    elif not first or _in_a_child():
        yield None
    elif (bars := _shared_bars()) is None:
        yield _lines(what, unit, every)
    else:
        task = bars.add(what)
        try:
            yield _updates(bars, task, unit)
        finally:
            bars.remove(task)


def _in_a_child() -> bool:
    """Whether `multiprocessing` has started this process, of which the import is dear."""
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None


def _count(done: int, total: int | None, unit: str, of: str) -> str:
    if unit == "bytes":
        return format_size(done) + (f"{of}{format_size(total)}" if total is not None else "")
    return f"{done:,}" + (f"{of}{total:,}" if total is not None else "") + f" {unit}"


def _rate(done: int, size: int, unit: str, seconds: float) -> str:
    if size:
        return format_rate(size / max(1e-3, seconds))
    return f"{done / max(1e-3, seconds):,.1f} {unit}/s" if done else ""


def _lines(what: str, unit: str, every: float) -> Report:
    begin = last = time.monotonic()
    lock = threading.Lock()

    def show(done: int, total: int | None = None, size: int = 0) -> None:
        nonlocal last
        now = time.monotonic()
        with lock:
            if now - last < every:
                return
            last = now
        rate = _rate(done, size, unit, now - begin)
        left = f", {format_duration((now - begin) / done * (total - done))} left" if total and done else ""
        sys.stderr.write(f"{what}: {_count(done, total, unit, ' of ')}{', ' if rate else ''}{rate}{left}\n")
        sys.stderr.flush()

    return show


# -- bars --------------------------------------------------------------------------------------------


class _Bars:
    """The bars of this process: `rich` shows only one live display at a time, so they share it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}")]
        columns += [TextColumn("{task.fields[rate]}"), TimeRemainingColumn()]
        self.pid = os.getpid()
        self.shown = Progress(*columns, console=Console(stderr=True), transient=True)
        self._open = 0
        self._lock = threading.Lock()

    def add(self, what: str) -> Any:
        with self._lock:
            self._open += 1
            if self._open == 1:
                self.shown.start()
        return self.shown.add_task(what, total=None, count="", rate="")

    def remove(self, task: Any) -> None:
        with self._lock:
            self.shown.remove_task(task)
            self._open -= 1
            if not self._open:
                self.shown.stop()


_bars: _Bars | None = None


def _shared_bars() -> _Bars | None:
    """None where there is no terminal, or no `rich`."""
    global _bars
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    if _bars is None or _bars.pid != os.getpid():
        try:
            _bars = _Bars()
        except ImportError:
            return None
    return _bars


def _updates(bars: _Bars, task: Any, unit: str) -> Report:
    begin = time.monotonic()
    last = 0.0

    def show(done: int, total: int | None = None, size: int = 0) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _REDRAWN and done != total:
            return
        last = now
        told: dict[str, Any] = {"count": _count(done, total, unit, "/"), "rate": _rate(done, size, unit, now - begin)}
        bars.shown.update(task, completed=done, total=total, refresh=done == total, **told)

    return show
