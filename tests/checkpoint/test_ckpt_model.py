"""The commit protocol as a small model, searched exhaustively (breadth first).

One step of a run; writers, retention, garbage collection and compaction act on its root. A root write is a message that
the store may apply at once, much later (even after its sender died), or twice; its reply may be lost. Any actor may stop
for ever at any point (it is simply not scheduled again). Deleting needs nobody's consent, so it is what must be ordered.

Checked in every state:

- INV1: a committed root's data is there;
- INV2: who was told "committed" was committed;
- INV3: who was told "failed" was never committed;
- INV4: what a reader found was committed;
- INV5: a committed root goes by being replaced or retired, and in no other way;
- INV6: who was told "the step is committed already" was told of an attempt that was committed.

Requests that are asked together have no order: a writer's look at the root and at the mark before it begins, and the same two
of a reader, who has listed the roots before. Each order is walked, and anything may happen between the two answers.

The proposed protocol has no violation. Each of the known-bad variants must have one, or the model has gone blind.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

Value = tuple[Any, ...] | None
"""A root: None, ``("C", attempt, touched by, earlier attempts, attempts whose data it lists)`` or
``("T", by, earlier attempts)``. Unique, as an ETag is."""

GENERATIONS = 2  # a step is compacted once at most (and then goes on in its second generation)


class Variant(NamedTuple):
    """The protocol, and what is left out of it."""

    sends: int = 2  # a writer sends its root at most so often
    replace: bool = False  # the second writer may replace a committed root
    fence: bool = True  # gc writes a tombstone before it deletes
    touch: bool = True  # gc rewrites a committed root before it deletes other attempts
    read_back: bool = True  # 412 is settled by reading the root
    history: bool = True  # the root tells which attempts were committed before
    tombstones_expire: bool = False
    conditions: bool = True  # the store honours them
    compact: tuple[str, ...] = ()  # what compaction does, in its order: ("mark", "delete")
    buried: bool = True  # compaction takes generations that have a tombstone, no others
    terminal: bool = True  # nobody commits over a tombstone: a step goes on in its next generation
    generations: bool = True  # a generation has a key of its own
    look: bool = True  # a writer looks at the mark after its write
    unknown: bool = True  # a writer that finds its generation marked cannot know, and says so
    resume: bool = False  # the second writer may go on with data of the first...
    checked: bool = True  # ...which its publisher lets pass only at a step that has never had a root
    reader: bool = False  # a reader is in it...
    reader_looks: bool = True  # ...and looks at the mark, together with the root...
    reader_compares: bool = True  # ...which suffices where the root is the one that was listed; else it looks once more
    orders: bool = True  # a writer's root and mark come one after the other, in either order
    confirm: bool = True  # a writer that finds a root, asked together with the mark, looks at the mark once more


class State(NamedTuple):
    roots: tuple[Value, ...]  # by generation
    mark: int  # generations below it are dead
    data: frozenset[str]
    sent: frozenset[
        tuple[int, Value, Value]
    ]  # (generation, condition, value) of every root write ever sent: it may be applied (again) at any time
    ever: frozenset[str]
    writers: tuple[tuple[str, int, Value, int], ...]  # (phase, generation, expected root, times sent)
    taken: bool  # the second writer goes on with the data of the first
    retention: tuple[str, int, Value]
    gc: tuple[str, frozenset[str], int, Value]
    compaction: tuple[int, int]  # (steps done, generation)
    reader: tuple[str, int, Value, str]  # (phase, generation, root listed, attempt seen)

    @property
    def root(self) -> Value:
        """The root that counts."""
        return self.roots[self.mark]

    def put(self, generation: int, value: Value) -> State:
        return self._replace(roots=(*self.roots[:generation], value, *self.roots[generation + 1 :]))


NAMES = ("A", "B")
START = State(
    (None,) * GENERATIONS,
    0,
    frozenset(),
    frozenset(),
    frozenset(),
    (("start", 0, None, 0),) * 2,
    False,
    ("start", 0, None),
    ("start", frozenset(), 0, None),
    (0, 0),
    ("start", 0, None, ""),
)


def was(root: Value) -> frozenset[str]:
    """Attempts that were committed at this step, as far as the root tells."""
    if root is None:
        return frozenset()
    return root[3] | {root[1]} if root[0] == "C" else root[2]


def needs(root: Value) -> frozenset[str]:
    """Whose data a committed root lists."""
    return frozenset(root[4]) if root is not None and root[0] == "C" else frozenset()


def applied(state: State, generation: int, condition: Value, value: Value, v: Variant) -> State | None:
    """The state after the store has applied a write; None where its condition fails."""
    if v.conditions and state.roots[generation] != condition:
        return None
    live = value is not None and value[0] == "C" and generation == state.mark
    ever = state.ever | {value[1]} if live and value is not None else state.ever
    return state.put(generation, value)._replace(ever=ever)


def steps(s: State, v: Variant) -> Iterator[State]:
    """Every state that may come next."""
    for generation, condition, value in s.sent:  # a delayed or repeated message arrives
        after = applied(s, generation, condition, value, v)
        if after is not None and after.roots != s.roots:
            yield after
    if v.tombstones_expire and s.root is not None and s.root[0] == "T":
        yield s.put(s.mark, None)
    for i, name in enumerate(NAMES):
        yield from writer(s, i, name, v)
    yield from retention(s, v)
    yield from collector(s, v)
    yield from compaction(s, v)
    yield from reader(s, v)


def writer(s: State, i: int, name: str, v: Variant) -> Iterator[State]:
    phase, generation, expected, sends = s.writers[i]

    def to(phase: str, expected: Value = expected, sends: int = sends, state: State = s, at: int = generation) -> State:
        return state._replace(writers=(*state.writers[:i], (phase, at, expected, sends), *state.writers[i + 1 :]))

    dead = generation < s.mark

    def knows(seen: Value, sure: bool) -> State:
        """It has the root, and the mark, which says that the generation is alive: `sure` where the mark came after."""
        if s.taken and i == 1 and v.checked and (generation or seen is not None):
            return to("fenced")
        if seen is not None and seen[0] == "C":
            if v.confirm and not sure:
                return to("confirm", seen)
            return to("data", seen) if v.replace and i == 1 else to("told exists", seen)
        if seen is not None and v.terminal:
            if "mark" in v.compact and generation + 1 < GENERATIONS:  # helps: marks it, and looks again
                return to("start", None, at=generation + 1)._replace(mark=max(s.mark, generation + 1))
            return to("refused")
        return to("data", seen)

    if phase == "start":  # asks for the root of the generation that it knows, and for the mark
        if v.resume and i == 1 and not s.taken and "A" in s.data and s.roots[0] is None and not s.mark:
            yield s._replace(taken=True)  # its rank has looked; its publisher looks at the root later
        if not v.compact or not v.orders:
            yield knows(s.root, True) if not dead else to("start", None, at=s.mark)
        else:
            yield to("has root", s.roots[generation])
            yield to("start", None, at=s.mark) if dead else to("has mark")
    elif phase in ("has root", "confirm"):
        yield to("start", None, at=s.mark) if dead else knows(expected, True)
    elif phase == "has mark":
        yield knows(s.roots[generation], False)
    elif phase == "data":
        yield to("send")._replace(data=s.data | {name})
    elif phase == "send":
        uses = frozenset(NAMES if s.taken and i == 1 else (name,))
        value: Value = ("C", name, "", was(expected) if v.history else frozenset(), uses)
        message = s._replace(sent=s.sent | {(generation, expected, value)})
        after = applied(message, generation, expected, value, v)
        if after is not None:
            yield to("look" if v.look and v.compact else "told ok", sends=sends + 1, state=after)  # applied, answered
            yield to("settle", sends=sends + 1, state=after)  # applied, the answer is lost
        else:
            yield to("settle" if v.read_back else "told failed", sends=sends + 1, state=message)
        yield to("settle", sends=sends + 1, state=message)  # delayed
    elif phase == "look":
        yield to("told ok" if not dead else "unknown" if v.unknown else "told failed")
    elif phase == "settle":
        root = s.roots[generation]
        if not v.read_back:
            yield to("send") if sends < v.sends else to("unknown")
        elif root is not None and ((root[1] == name and root[0] == "C") or (v.history and name in was(root))):
            yield to("look" if v.look and v.compact else "told ok")
        elif root == expected:
            yield to("send") if sends < v.sends else to("unknown")
        elif v.compact and v.unknown and dead:
            yield to("unknown")
        else:
            yield to("told failed")


def retention(s: State, v: Variant) -> Iterator[State]:
    phase, generation, seen = s.retention
    if phase == "start" and s.root is not None and s.root[0] == "C":
        yield s._replace(retention=("retire", s.mark, s.root))
    elif phase == "retire" and seen is not None:
        value: Value = ("T", "retention", was(seen) if v.history else frozenset())
        message = s._replace(sent=s.sent | {(generation, seen, value)}, retention=("done", 0, None))
        yield message  # delayed or lost: retention gives up
        after = applied(message, generation, seen, value, v)
        if after is not None:
            yield after._replace(retention=("delete", generation, seen))
    elif phase == "delete" and seen is not None:
        yield s._replace(data=s.data - needs(seen), retention=("done", 0, None))


def collector(s: State, v: Variant) -> Iterator[State]:
    phase, listed, generation, seen = s.gc
    if phase == "start" and s.data:
        yield s._replace(gc=("read", s.data, 0, None))
    elif phase == "read":
        committed = s.root is not None and s.root[0] == "C"
        doomed = listed - needs(s.root)
        if doomed:
            fenced = v.touch if committed else v.fence and not (v.terminal and s.root is not None)
            yield s._replace(gc=("fence" if fenced else "delete", doomed, s.mark, s.root))
    elif phase == "fence":
        if seen is not None and seen[0] == "C":
            value: Value = ("C", seen[1], "gc", seen[3], seen[4])
        else:
            value = ("T", "gc", was(seen))
        message = s._replace(sent=s.sent | {(generation, seen, value)}, gc=("done", frozenset(), 0, None))
        yield message
        after = applied(message, generation, seen, value, v)
        if after is not None:
            yield after._replace(gc=("delete", listed, 0, None))
    elif phase == "delete":
        for name in listed:
            rest = listed - {name}
            yield s._replace(data=s.data - {name}, gc=("delete" if rest else "done", rest, 0, None))


def compaction(s: State, v: Variant) -> Iterator[State]:
    """Looks for a tombstone; marks its generation dead; deletes it, by a plain delete that may come very late."""
    done, generation = s.compaction
    if done == 0 and v.compact:
        buried = s.root is not None and s.root[0] == "T"
        if (buried or not v.buried) and s.mark + 1 < GENERATIONS:
            yield s._replace(compaction=(1, s.mark))
    elif 0 < done <= len(v.compact):
        after = s._replace(compaction=(done + 1, generation))
        if v.compact[done - 1] == "mark":
            mark = max(s.mark, generation + 1)
            # where a generation has no key of its own, the next one begins with what lies under the old key
            yield after._replace(mark=mark)
        else:
            after = after.put(generation, None)
            yield after if v.generations else after.put(s.mark, None)


def reader(s: State, v: Variant) -> Iterator[State]:
    phase, generation = s.reader[:2]
    if not v.reader:
        return
    listed, attempt = s.reader[2:]

    def to(phase: str, listed: Value = listed, attempt: str = attempt) -> State:
        return s._replace(reader=(phase, generation, listed, attempt))

    def knows(seen: Value, marked: int) -> State:
        """The root, and the mark as it was at some time after the listing."""
        if marked != generation or seen is None or seen[0] != "C":
            return s._replace(reader=("start", 0, None, ""))
        return to("found" if seen == listed or not v.reader_compares else "look", None, seen[1])

    if phase == "start":
        there = [at for at, root in enumerate(s.roots) if root is not None]
        if there:
            yield s._replace(reader=("listed", there[-1], s.roots[there[-1]], ""))
    elif phase == "listed":  # the root and the mark are asked together
        root = s.roots[generation]
        if not v.reader_looks:
            yield knows(root, generation)
        else:
            if root is not None and root[0] == "C":
                yield to("has same" if root == listed else "has other", None, root[1])
            if s.mark == generation:
                yield to("has mark")
    elif phase == "has mark":
        yield knows(s.roots[generation], generation)
    elif phase in ("has same", "has other", "look"):
        yield to("found", None) if s.mark == generation else s._replace(reader=("start", 0, None, ""))


def violation(s: State) -> str | None:
    if not needs(s.root) <= s.data:
        return "INV1: the root is committed, its data is gone"
    for name, (phase, _, expected, _) in zip(NAMES, s.writers, strict=True):
        if phase == "told ok" and name not in s.ever:
            return "INV2: told committed, but it never was"
        if phase == "told failed" and name in s.ever:
            return "INV3: told failed, but it was committed"
        if phase == "told exists" and expected is not None and expected[1] not in s.ever:
            return "INV6: told that another is committed, which never was"
    if s.reader[0] == "found" and s.reader[3] not in s.ever:
        return "INV4: found by a reader, but it never was committed"
    return None


def lost(before: State, after: State) -> bool:
    """Whether a committed root has gone without having been retired or replaced."""
    if before.root is None or before.root[0] != "C":
        return False
    return after.root is None or before.root[1] not in was(after.root)


def way_to(state: State, before: dict[State, State | None]) -> list[State]:
    """The states from the start to `state`."""
    path = [state]
    while (earlier := before[path[-1]]) is not None:
        path.append(earlier)
    return path[::-1]


def search(v: Variant, limit: int = 900_000) -> tuple[int, str | None, list[State]]:
    """Every reachable state; the first violation with the way to it, if there is one."""
    gc.disable()  # states hold no cycles, and looking for some takes as long as the search
    try:
        return _search(v, limit)
    finally:
        gc.enable()


def _search(v: Variant, limit: int) -> tuple[int, str | None, list[State]]:
    before: dict[State, State | None] = {START: None}
    frontier = [START]
    while frontier:
        following: list[State] = []
        for state in frontier:
            problem = violation(state)
            if problem is not None:
                return len(before), problem, way_to(state, before)
            for after in steps(state, v):
                if v.compact and lost(state, after):
                    return len(before), "INV5: a committed step was lost", [*way_to(state, before), after]
                known = len(before)
                before.setdefault(after, state)  # hashes it once
                if len(before) > known:
                    following.append(after)
        frontier = following
        assert len(before) < limit, "the model has grown beyond what a test may take"
    return len(before), None, []


COMPACT = ("mark", "delete")


@pytest.mark.parametrize(
    "variant",
    [
        Variant(),
        Variant(replace=True),
        Variant(compact=COMPACT, replace=True),
        Variant(compact=COMPACT, reader=True, sends=1, orders=False),
        Variant(resume=True, replace=True),
        Variant(resume=True, compact=COMPACT, sends=1),
    ],
    ids=["plain", "replace", "compaction", "reader", "resume", "resume and compaction"],
)
def test_the_protocol_has_no_violation(variant: Variant) -> None:
    states, problem, path = search(variant)
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
        (Variant(compact=("delete",)), "INV1"),
        (Variant(compact=("delete", "mark")), "INV5"),
        (Variant(compact=COMPACT, buried=False), "INV5"),
        (Variant(compact=COMPACT, terminal=False), "INV5"),
        (Variant(compact=COMPACT, look=False), "INV2"),
        (Variant(compact=COMPACT, unknown=False), "INV3"),
        (Variant(compact=COMPACT, generations=False), "INV5"),
        (Variant(compact=COMPACT, reader=True, reader_looks=False), "INV4"),
        (Variant(compact=COMPACT, reader=True, reader_compares=False), "INV4"),
        (Variant(compact=COMPACT, confirm=False), "INV6"),
        (Variant(resume=True, fence=False), "INV1"),
        (Variant(resume=True, checked=False, compact=COMPACT), "INV1"),
        (Variant(resume=True, checked=False, terminal=False), "INV1"),
        (Variant(resume=True, conditions=False), "INV1"),
    ],
    ids=[
        "gc does not fence",
        "412 is failure",
        "tombstones expire",
        "store ignores conditions",
        "gc does not touch",
        "no history",
        "tombstones are deleted, no mark",
        "tombstones are deleted before the mark",
        "the mark covers what has no tombstone",
        "commits over a tombstone",
        "the writer does not look at the mark",
        "the writer takes the mark for a failure",
        "a step goes on under its old key",
        "the reader does not look at the mark",
        "the reader takes any root that came with the mark",
        "the writer takes any root that came with the mark",
        "resume: gc does not fence",
        "resume: at a step that goes on in its second generation",
        "resume: over a tombstone",
        "resume: store ignores conditions",
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


class Taking(NamedTuple):
    """A job that was thought dead, and the one that goes on with its uploads: in which order each does its work."""

    old: tuple[str, ...] = ("complete", "look", "publish")
    new: tuple[str, ...] = ("epoch", "touch")


class TakeState(NamedTuple):
    epoch: bool
    touched: bool
    others: bool  # what the old one has completed holds parts of the new one
    old: int
    new: int
    fenced: bool


def take_steps(s: TakeState, v: Taking) -> Iterator[TakeState]:
    if s.old < len(v.old) and not s.fenced:
        after = s._replace(old=s.old + 1)
        match v.old[s.old]:
            case "complete":
                yield after._replace(others=s.touched)
            case "look":
                yield after._replace(fenced=s.epoch)
            case _:
                yield after
    if s.new < len(v.new):
        after = s._replace(new=s.new + 1)
        yield after._replace(epoch=True) if v.new[s.new] == "epoch" else after._replace(touched=True)


def take_violation(v: Taking) -> TakeState | None:
    seen = {TakeState(False, False, False, 0, 0, False)}
    queue = list(seen)
    while queue:
        state = queue.pop()
        if state.old == len(v.old) and not state.fenced and state.others:
            return state
        for after in take_steps(state, v):
            if after not in seen:
                seen.add(after)
                queue.append(after)
    return None


def test_the_look_for_a_newer_epoch_may_be_early_but_not_before_the_data_are_complete() -> None:
    assert take_violation(Taking()) is None
    assert take_violation(Taking(old=("look", "complete", "publish"))) is not None
    assert take_violation(Taking(new=("touch", "epoch"))) is not None
