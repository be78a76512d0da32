"""The commit protocol as a small model, searched exhaustively (breadth first).

One step of a run; writers, retention and garbage collection act on its root. A root write is a message that the
store may apply at once, much later (even after its sender died), or twice; its reply may be lost. Any actor may stop
for ever at any point (it is simply not scheduled again). Deleting needs nobody's consent, so it is what must be ordered.

Checked in every state:

- INV1: a committed root's data is there;
- INV2: who was told "committed" was committed;
- INV3: who was told "failed" was never committed.

The proposed protocol has no violation. Each of the known-bad variants must have one, or the model has gone blind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

Value = tuple[Any, ...] | None
"""A root: None, ``("C", attempt, touched by, earlier attempts)`` or ``("T", by, earlier attempts)``. Unique, as an ETag is."""

SENDS = 2  # a writer sends its root at most so often


class Variant(NamedTuple):
    """The protocol, and what is left out of it."""

    replace: bool = False  # the second writer may replace a committed root
    fence: bool = True  # gc writes a tombstone before it deletes
    touch: bool = True  # gc rewrites a committed root before it deletes other attempts
    read_back: bool = True  # 412 is settled by reading the root
    history: bool = True  # the root tells which attempts were committed before
    tombstones_expire: bool = False
    conditions: bool = True  # the store honours them


class State(NamedTuple):
    root: Value
    data: frozenset[str]
    sent: frozenset[
        tuple[Value, Value]
    ]  # (condition, value) of every root write ever sent: it may be applied (again) at any time
    ever: frozenset[str]
    writers: tuple[tuple[str, Value, int], ...]  # (phase, expected root, times sent)
    retention: tuple[str, Value]
    gc: tuple[str, frozenset[str], Value]


NAMES = ("A", "B")
START = State(
    None, frozenset(), frozenset(), frozenset(), (("start", None, 0),) * 2, ("start", None), ("start", frozenset(), None)
)


def was(root: Value) -> frozenset[str]:
    """Attempts that were committed at this step, as far as the root tells."""
    if root is None:
        return frozenset()
    return root[3] | {root[1]} if root[0] == "C" else root[2]


def applied(state: State, condition: Value, value: Value, v: Variant) -> State | None:
    """The state after the store has applied a write; None where its condition fails."""
    if v.conditions and state.root != condition:
        return None
    ever = state.ever | {value[1]} if value is not None and value[0] == "C" else state.ever
    return state._replace(root=value, ever=ever)


def steps(s: State, v: Variant) -> Iterator[State]:
    """Every state that may come next."""
    for condition, value in s.sent:  # a delayed or repeated message arrives
        after = applied(s, condition, value, v)
        if after is not None and after.root != s.root:
            yield after
    if v.tombstones_expire and s.root is not None and s.root[0] == "T":
        yield s._replace(root=None)
    for i, name in enumerate(NAMES):
        yield from writer(s, i, name, v)
    yield from retention(s, v)
    yield from collector(s, v)


def writer(s: State, i: int, name: str, v: Variant) -> Iterator[State]:
    phase, expected, sends = s.writers[i]

    def to(phase: str, expected: Value = expected, sends: int = sends, state: State = s) -> State:
        return state._replace(writers=(*state.writers[:i], (phase, expected, sends), *state.writers[i + 1 :]))

    if phase == "start":
        committed = s.root is not None and s.root[0] == "C"
        yield to("refused") if committed and not (v.replace and i == 1) else to("data", s.root)
    elif phase == "data":
        yield to("send")._replace(data=s.data | {name})
    elif phase == "send":
        value: Value = ("C", name, "", was(expected) if v.history else frozenset())
        message = s._replace(sent=s.sent | {(expected, value)})
        after = applied(message, expected, value, v)
        if after is not None:
            yield to("told ok", sends=sends + 1, state=after)  # applied, answered
            yield to("settle", sends=sends + 1, state=after)  # applied, the answer is lost
        else:
            yield to("settle" if v.read_back else "told failed", sends=sends + 1, state=message)
        yield to("settle", sends=sends + 1, state=message)  # delayed
    elif phase == "settle":
        if not v.read_back:
            yield to("send") if sends < SENDS else to("unknown")
        elif s.root is not None and ((s.root[1] == name and s.root[0] == "C") or (v.history and name in was(s.root))):
            yield to("told ok")
        elif s.root == expected:
            yield to("send") if sends < SENDS else to("unknown")
        else:
            yield to("told failed")


def retention(s: State, v: Variant) -> Iterator[State]:
    phase, seen = s.retention
    if phase == "start" and s.root is not None and s.root[0] == "C":
        yield s._replace(retention=("retire", s.root))
    elif phase == "retire" and seen is not None:
        value: Value = ("T", "retention", was(seen) if v.history else frozenset())
        message = s._replace(sent=s.sent | {(seen, value)}, retention=("done", None))
        yield message  # delayed or lost: retention gives up
        after = applied(message, seen, value, v)
        if after is not None:
            yield after._replace(retention=("delete", seen))
    elif phase == "delete" and seen is not None:
        yield s._replace(data=s.data - {seen[1]}, retention=("done", None))


def collector(s: State, v: Variant) -> Iterator[State]:
    phase, listed, seen = s.gc
    if phase == "start" and s.data:
        yield s._replace(gc=("read", s.data, None))
    elif phase == "read":
        committed = s.root is not None and s.root[0] == "C"
        doomed = listed - {s.root[1]} if committed and s.root is not None else listed
        if doomed:
            fenced = v.touch if committed else v.fence
            yield s._replace(gc=("fence" if fenced else "delete", doomed, s.root))
    elif phase == "fence":
        if seen is not None and seen[0] == "C":
            value: Value = ("C", seen[1], "gc", seen[3])
        else:
            value = ("T", "gc", was(seen))
        message = s._replace(sent=s.sent | {(seen, value)}, gc=("done", frozenset(), None))
        yield message
        after = applied(message, seen, value, v)
        if after is not None:
            yield after._replace(gc=("delete", listed, None))
    elif phase == "delete":
        for name in listed:
            rest = listed - {name}
            yield s._replace(data=s.data - {name}, gc=("delete" if rest else "done", rest, None))


def violation(s: State) -> str | None:
    if s.root is not None and s.root[0] == "C" and s.root[1] not in s.data:
        return "INV1: the root is committed, its data is gone"
    for name, (phase, _, _) in zip(NAMES, s.writers, strict=True):
        if phase == "told ok" and name not in s.ever:
            return "INV2: told committed, but it never was"
        if phase == "told failed" and name in s.ever:
            return "INV3: told failed, but it was committed"
    return None


def search(v: Variant, limit: int = 400_000) -> tuple[int, str | None, list[State]]:
    """Every reachable state; the first violation with the way to it, if there is one."""
    before: dict[State, State | None] = {START: None}
    frontier = [START]
    while frontier:
        following: list[State] = []
        for state in frontier:
            problem = violation(state)
            if problem is not None:
                path = [state]
                while (earlier := before[path[-1]]) is not None:
                    path.append(earlier)
                return len(before), problem, path[::-1]
            for after in steps(state, v):
                if after not in before:
                    before[after] = state
                    following.append(after)
        frontier = following
        assert len(before) < limit, "the model has grown beyond what a test may take"
    return len(before), None, []


@pytest.mark.parametrize("replace", [False, True])
def test_the_protocol_has_no_violation(replace: bool) -> None:
    states, problem, path = search(Variant(replace=replace))
    assert problem is None, "\n".join(map(str, path))
    assert states > 5_000


@pytest.mark.parametrize(
    ("variant", "invariant"),
    [
        (Variant(fence=False), "INV1"),
        (Variant(read_back=False), "INV3"),
        (Variant(tombstones_expire=True), "INV1"),
        (Variant(conditions=False), "INV1"),
        (Variant(replace=True, touch=False), "INV1"),
        (Variant(history=False), "INV3"),
    ],
    ids=[
        "gc does not fence",
        "412 is failure",
        "tombstones expire",
        "store ignores conditions",
        "gc does not touch",
        "no history",
    ],
)
def test_what_is_known_to_be_wrong_is_found(variant: Variant, invariant: str) -> None:
    _, problem, path = search(variant)
    assert problem is not None
    assert problem.startswith(invariant), "\n".join(map(str, path))


class Pinning(NamedTuple):
    """A save that refers to a base step, and somebody who deletes that step: in which order each does its work."""

    saver: tuple[str, ...] = ("pin", "look", "publish", "unpin")
    deleter: tuple[str, ...] = ("bury", "pins", "roots", "delete")


class PinState(NamedTuple):
    base_committed: bool
    base_data: bool
    pinned: bool
    published: bool
    saver: int
    gave_up: bool
    deleter: int
    keep: bool  # the deleter has seen a pin or a root that needs the data


def pin_steps(s: PinState, v: Pinning) -> Iterator[PinState]:
    if s.saver < len(v.saver) and not s.gave_up:
        after = s._replace(saver=s.saver + 1)
        match v.saver[s.saver]:
            case "pin":
                yield after._replace(pinned=True)
            case "look":
                yield after if s.base_committed else after._replace(gave_up=True)
            case "publish":
                yield after._replace(published=True)
            case "unpin":
                yield after._replace(pinned=False)
    if s.deleter < len(v.deleter):
        after = s._replace(deleter=s.deleter + 1)
        match v.deleter[s.deleter]:
            case "bury":
                yield after._replace(base_committed=False)
            case "pins":
                yield after._replace(keep=s.keep or s.pinned)
            case "roots":
                yield after._replace(keep=s.keep or s.published)
            case "delete":
                yield after if s.keep else after._replace(base_data=False)


def pin_violation(v: Pinning) -> PinState | None:
    seen = {PinState(True, True, False, False, 0, False, 0, False)}
    queue = list(seen)
    while queue:
        state = queue.pop()
        if state.published and not state.base_data:
            return state
        for after in pin_steps(state, v):
            if after not in seen:
                seen.add(after)
                queue.append(after)
    return None


def test_references_and_deletion_do_not_cross() -> None:
    assert pin_violation(Pinning()) is None
    assert pin_violation(Pinning(saver=("look", "pin", "publish", "unpin"))) is not None
    assert pin_violation(Pinning(saver=("pin", "look", "unpin", "publish"))) is not None
    assert pin_violation(Pinning(deleter=("bury", "roots", "pins", "delete"))) is not None
    assert pin_violation(Pinning(deleter=("pins", "roots", "bury", "delete"))) is not None
