"""The law of everything stored: it gives the right bytes, or an `S3LoaderError` that says where.

`run_fuzz` reads thousands of damaged objects of one format and fails with what broke the law, grouped by
where it broke. Case `i` of a name is always the same; ``FUZZ_ONLY=i`` runs it alone. ``make fuzz`` sets
``FUZZ_COUNT`` (cases of each format) and ``FUZZ_SECONDS`` (the most that one format may take).
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from mutating import Structure, mutate

from s3loader.errors import S3LoaderError

__all__ = ["run_fuzz"]

FAST = 250
"""Cases of each format in the suite."""
HANGS = 60
"""Seconds after which a case that takes milliseconds is one that a stored number has sent into a loop."""
MOST_MEMORY = 512 << 20
"""Bytes by which reading small objects may raise the process's peak."""
_SHOWN = 8


class _Hangs(BaseException):
    """Raised into a case that does not end."""


def run_fuzz(
    name: str,
    make_valid: Callable[[random.Random], bytes],
    read: Callable[[bytes], Any],
    compare: Callable[[Any, Any], bool] | None = None,
    count: int = FAST,
    *,
    structure: Structure | None = None,
    reseal: Callable[[bytes], bytes] | None = None,
    where: str = "",
) -> None:
    """Read `count` damaged objects.

    Args:
        name: Of the format; seeds the cases.
        make_valid: Makes a valid object.
        read: Reads one as a user would, to the last byte.
        compare: Whether what a damaged object gave (second) is right, where the valid one gave the first. None: a
            format that has no checksum, of which any value that is well formed may come.
        count: Cases, where the environment sets no FUZZ_COUNT.
        structure: Where the format's JSON stands.
        reseal: Puts right the checksum of a damaged object, so that what lies behind it is reached too; those
            objects may give any value.
        where: What the text of every error must name.
    """
    only = os.environ.get("FUZZ_ONLY")
    cases = [int(only)] if only else range(int(os.environ.get("FUZZ_COUNT", count)))
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "inf"))
    broken: dict[str, str] = {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        if time.monotonic() > end or len(broken) >= _SHOWN:
            break
        rng = random.Random(f"{name}/{case}")
        valid = make_valid(rng)
        damaged = mutate(rng, valid, make_valid(rng), structure)
        sealed = reseal is not None and rng.random() < 0.5
        if sealed and reseal is not None:
            with contextlib.suppress(Exception):  # too damaged to have a place for its checksum
                damaged = reseal(damaged)
        problem = _problem(read, valid, damaged, None if sealed else compare, where)
        if problem:
            place, text = problem
            broken.setdefault(place, f"case {case}: {text}\n  of {_short(damaged)}")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    if grown << 10 > MOST_MEMORY:
        broken["memory"] = f"the peak grew by {grown >> 10} MiB"
    if broken:
        found = "\n".join(f"- {text}" for text in broken.values())
        pytest.fail(
            f"{name}: stored data gave neither the right bytes nor an S3LoaderError with the place:\n{found}", pytrace=False
        )


def _problem(
    read: Callable[[bytes], Any], valid: bytes, damaged: bytes, compare: Callable[[Any, Any], bool] | None, where: str
) -> tuple[str, str] | None:
    try:
        with _watched():
            value = read(damaged)
    except S3LoaderError as error:
        if where not in str(error):
            return f"place {type(error)} {_at(error)}", f"{type(error).__name__} does not name {where!r}: {error}"
        return None
    except (_Hangs, Exception) as error:  # noqa: BLE001 - that none comes is what is tested
        return f"{type(error)} {_at(error)}", f"{type(error).__name__}: {str(error)[:200]} at {_at(error)}"
    if compare is not None and damaged != valid and not compare(read(valid), value):
        return "wrong", f"other values without a word: {str(value)[:300]}"
    return None


def _at(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/s3loader" in frame.filename]
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "the test itself"


def _short(data: bytes) -> str:
    text = repr(data)
    return text if len(text) < 600 else f"{text[:400]} ... {text[-150:]} ({len(data)} bytes)"


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise _Hangs(f"not done after {HANGS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
