"""The measuring end of a benchmark: runs inside the client's own process and its own interpreter.

Standard library only, since the peers' environments have nothing of ours. The parent sends one
line per round; each is answered by one line of JSON. Imports, connections and the first requests
lie before the first round, so a round holds nothing but the work.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any


class Clock:
    """Wall time, CPU time and memory between its creation and `stop`."""

    def __init__(self) -> None:
        self.resets = _reset_peak()
        self.before_rss = _status("VmRSS")
        self.before = resource.getrusage(resource.RUSAGE_SELF)
        self.children_before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.main_before = resource.getrusage(resource.RUSAGE_THREAD)
        self.start = time.perf_counter()

    def stop(self, *, without_this_thread: bool = False) -> dict[str, float]:
        """Seconds and bytes; `without_this_thread` leaves out the CPU time of the calling thread."""
        wall = time.perf_counter() - self.start
        after = resource.getrusage(resource.RUSAGE_SELF)
        main = resource.getrusage(resource.RUSAGE_THREAD)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)  # those that have ended: workers, programs
        user = after.ru_utime - self.before.ru_utime + children.ru_utime - self.children_before.ru_utime
        system = after.ru_stime - self.before.ru_stime + children.ru_stime - self.children_before.ru_stime
        if without_this_thread:
            user -= main.ru_utime - self.main_before.ru_utime
            system -= main.ru_stime - self.main_before.ru_stime
        return {"wall": wall, "user": user, "sys": system, "peak": _status("VmHWM"), "rss": self.before_rss}


def resident() -> int:
    """Resident memory of this process now, in bytes."""
    return _status("VmRSS")


def _reset_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return True
    except OSError:
        return False


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def measured(work: Callable[[], dict[str, Any]], *, busy: bool = False) -> dict[str, Any]:
    """Run `work`, return what it returned and what it cost.

    With `busy` it runs in a second thread while this one executes Python bytecode without a
    pause, as an eager training loop does; that loop's own CPU time is left out.
    """
    if not busy:
        clock = Clock()
        result = work()
        return {**clock.stop(), **result}
    box: list[Any] = []

    def background() -> None:
        try:
            box.append(work())
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=background)
    clock = Clock()
    thread.start()
    x = 1
    while not box:
        for i in range(1000):
            x = (x * 1103515245 + i) & 0x7FFFFFFF
    cost = clock.stop(without_this_thread=True)
    thread.join()
    if isinstance(box[0], BaseException):
        raise box[0]
    return {**cost, **box[0]}


def serve(prepare: Callable[[dict[str, Any]], Callable[..., dict[str, Any]]]) -> None:
    """Answer the parent: `prepare(spec)` once (import, connect, warm up), then one round a line.

    What `prepare` returns is called once a round, with the round's arguments where the parent gives some.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a client prints is no answer
    spec = json.loads(sys.argv[1])
    spec["base"] = resident()
    work = prepare(spec)
    json.dump({"ready": True, "base": spec["base"], "versions": _versions(spec)}, answers)
    answers.write("\n")
    answers.flush()
    for line in sys.stdin:
        arguments = json.loads(line)
        json.dump(measured(lambda given=arguments: work(*given), busy=bool(spec.get("busy"))), answers)
        answers.write("\n")
        answers.flush()
    os._exit(0)  # nobody waits for a client's own threads


def _versions(spec: dict[str, Any]) -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in spec.get("packages", ()):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


class _Here(threading.local):
    number = 0


here = _Here()
"""``here.number``: which of the threads of `in_threads` this is, the same from round to round."""


def in_threads(connections: int, count: int, deadline: float, one: Callable[[int], int]) -> dict[str, Any]:
    """Call ``one(i)`` for i < `count` in `connections` threads that take the next number themselves.

    Stops starting new ones at `deadline` (`time.perf_counter`). `one` returns the bytes it moved.
    """
    numbers = itertools.count()
    moved = [0] * connections
    done = [0] * connections
    errors: list[BaseException] = []

    def loop(me: int) -> None:
        here.number = me
        try:
            for i in numbers:
                if i >= count or time.perf_counter() > deadline or errors:
                    return
                moved[me] += one(i)
                done[me] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(me,)) for me in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {"bytes": sum(moved), "items": sum(done)}


def until(deadline: float, items: Iterable[Any]) -> Iterable[Any]:
    """The items, until `deadline` (`time.perf_counter`) has passed."""
    for item in items:
        if time.perf_counter() > deadline:
            return
        yield item
