"""The model of the commit protocol is tied to the code: walks through the model are taken by the real `Run` as well.

A seeded random walk chooses one transition of the model after the other. Its actor does the same with the real objects: it runs
in a thread of its own, from one request that matters to the next, so that the actors' requests come in the walk's order. Root
writes meet the fate that the model says: applied and answered, applied and the answer lost, in flight while the sender goes on
or dies; those in flight arrive when the model lets them. After every step the store must say what the model says.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from test_ckpt_model import COMPACT, GENERATIONS, NAMES, START, State, Value, Variant, applied, was, writer
from test_ckpt_model import collector as model_collector
from test_ckpt_model import compaction as model_compaction
from test_ckpt_model import retention as model_retention

from s3loader import OutcomeUnknownError
from s3loader.checkpoint.format import layout
from s3loader.checkpoint.protocol import roots
from s3loader.checkpoint.protocol.commit import Attempt, expect_free
from s3loader.checkpoint.protocol.run import Run
from s3loader.exchange.lines import file_entry
from s3loader.store import Backend, ForwardingBackend, LocalBackend, MemoryBackend, ObjectStore
from s3loader.types import Buffer, PutMode, PutResult, Update

STEP = 7
VARIANT = Variant(compact=COMPACT, replace=True)
IDS = {name: layout.attempt_id(1, number, "00000000") for number, name in enumerate(NAMES, 1)}
ROOTS = {layout.root_key(STEP, generation) for generation in range(GENERATIONS + 1)}
OUTCOMES = {"told ok": "Root", "told failed": "failed", "told exists": "StepExistsError", "unknown": "CommitUnknownError"}


class Died(BaseException):
    """The process of an actor is gone."""


class Message(NamedTuple):
    """A root write, as it was sent."""

    key: str
    data: bytes
    mode: PutMode
    content_type: str | None
    metadata: Mapping[str, str] | None


Stop = Callable[[str, str], bool]
"""Of the verb and the key of a request: whether the actor waits before it."""


class Actor:
    """A function that runs in a thread, but only while `go` waits for it."""

    def __init__(self, work: Callable[[Actor], Any]) -> None:
        self.fate = "answered"
        self.first = ""
        self.next: Message | None = None
        """The root write that comes next."""
        self.sent: Message | None = None
        self.result = ""
        self.since: list[tuple[str, str]] = []
        self._work = work
        self._stop: Stop = lambda op, key: True
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run)
        self._killed = False
        ACTORS[self._thread] = self
        self._thread.start()

    def _run(self) -> None:
        self._turn.acquire()
        try:
            self.result = type(self._work(self)).__name__ if not self._killed else "Died"
        except Died:
            self.result = "Died"
        except Exception as error:  # noqa: BLE001  # how it ended is compared
            self.result = type(error).__name__
        self._back.release()

    def gate(self, op: str, key: str) -> None:
        """Called before every request."""
        if self._stop(op, key):
            self._back.release()
            self._turn.acquire()
            self.since.clear()
        if self._killed:
            raise Died
        self.since.append((op, key))

    def go(self, stop: Stop, fate: str = "answered") -> None:
        """Go on until a request that `stop` names, or to the end."""
        assert not self.result, "it has ended already"
        self._stop, self.fate = stop, fate
        self._turn.release()
        assert self._back.acquire(timeout=60)

    def kill(self) -> None:
        """End the thread."""
        if not self.result:
            self._killed = True
            self.go(lambda op, key: False)
        self._thread.join()
        del ACTORS[self._thread]


ACTORS: dict[threading.Thread, Actor] = {}


def in_some_order(*calls: Callable[[], Any]) -> tuple[Any, ...]:
    """What the code asks together is answered one after the other, in the order of the walk."""
    actor = ACTORS.get(threading.current_thread())
    if actor is not None:
        actor.gate("pause", "together")
    turned = actor is not None and actor.first == "mark"
    results = {number: calls[number]() for number in sorted(range(len(calls)), reverse=turned)}
    return tuple(results[number] for number in range(len(calls)))


class Gated(ForwardingBackend):
    """The store as one actor sees it."""

    actor: Actor | None = None

    def around(self, op: Any, key: str, size: int, run: Callable[[], Any]) -> Any:
        if self.actor is not None:
            self.actor.gate(op, key)
        return run()

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        actor = self.actor
        if actor is None or key not in ROOTS:
            return super().put(key, data, mode=mode, content_type=content_type, metadata=metadata)
        actor.next = Message(key, bytes(data), mode, content_type, metadata)
        actor.gate("put", key)
        actor.sent = actor.next
        if actor.fate == "dies":
            raise Died
        if actor.fate == "in flight":
            raise OutcomeUnknownError("no answer", op="put", url=key)
        done = self.inner.put(key, data, mode=mode, content_type=content_type, metadata=metadata)
        if actor.fate == "lost":
            raise OutcomeUnknownError("no answer", op="put", url=key)
        return done


def data_key(name: str) -> str:
    return f"{layout.step_prefix(STEP)}{IDS[name]}/{layout.INDEX}"


class World:
    """The real run, its actors, and the root writes in flight."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.store = ObjectStore("test://run", inner)
        Run(self.store).prepare()
        self.actors: dict[str, Actor] = {}
        self.messages: dict[Any, Message] = {}

    def begin(self, name: str, work: Callable[[Run, Actor], Any]) -> Actor:
        gated = Gated(self.inner)
        run = Run(ObjectStore("test://run", gated))
        run.prepare()
        actor = self.actors[name] = Actor(lambda actor: work(run, actor))
        gated.actor = actor
        if name in NAMES:
            actor.go(before_pause)  # where it asks for the root and the mark
        return actor

    def would_apply(self, message: Message) -> bool:
        """Whether the store takes a write now."""
        etag = self.store.head(message.key).etag if self.store.exists(message.key) else None
        return etag == (message.mode.etag if isinstance(message.mode, Update) else None)

    def close(self) -> None:
        for actor in self.actors.values():
            actor.kill()

    def expect(self, state: State) -> None:
        """What anybody finds in the store is what the model says."""
        run = Run(self.store)
        found = run.roots.read(STEP)
        root = state.root
        assert found.generation == state.mark
        assert found.state == ("absent" if root is None else {"C": "committed", "T": "tombstone"}[root[0]])
        assert {*found.history} == {IDS[name] for name in was(root)}
        if root is not None and root[0] == "C":
            assert found.attempt == IDS[root[1]]
        there = {entry.key for entry in self.store.list(layout.step_prefix(STEP))} - ROOTS
        assert there == {data_key(name) for name in state.data}


def save(name: str, *, replace: bool) -> Callable[[Run, Actor], Any]:
    def work(run: Run, actor: Actor) -> Any:
        session: Any = None  # the fence of epochs is no part of the model
        expected = expect_free(Attempt(run, session, STEP, IDS[name], 1.0), replace=replace)
        actor.gate("pause", "data")
        run.store.put(data_key(name), b"data")
        facts = {"step": STEP, "epoch": 1, "attempt": IDS[name], "was": expected.history, "index": "", "refs": []}
        entry = file_entry(data_key(name), layout.INDEX, None, "application/zstd", 4, None)
        return run.roots.publish(STEP, roots.committed_entries(facts, entry, []), IDS[name], expected)

    return work


def retire(run: Run, actor: Actor) -> None:
    seen = run.roots.read(STEP)
    run.roots.retire(seen, 1)
    actor.gate("pause", "delete")
    run.store.delete_many([key for key, _ in seen.keys.values()])


def collect(run: Run, actor: Actor) -> None:
    scan = run.scan()
    found = scan.roots.get(STEP) or roots.Root(STEP, "absent", generation=run.tombstones.generation(STEP))
    needed = scan.referenced()
    files = [meta.key for metas in scan.attempts.get(STEP, {}).values() for meta in metas if meta.key not in needed]
    if found.state == "committed":
        run.roots.touch(found)
    elif found.state == "absent":
        run.roots.retire(found, 1)
    actor.gate("pause", "delete")
    run.store.delete_many(files)


def compact(run: Run, actor: Actor) -> None:
    seen = run.roots.read(STEP)
    actor.gate("pause", "mark")
    run.tombstones.add({STEP: seen.generation})
    actor.gate("pause", "delete")
    run.store.delete(seen.key)


WORK = {
    "A": save("A", replace=False),
    "B": save("B", replace=True),
    "retention": retire,
    "gc": collect,
    "compaction": compact,
}


class Move(NamedTuple):
    """One transition of the model, and what its actor does."""

    who: str
    after: State
    stop: Stop = lambda op, key: False
    fate: str = "answered"
    message: Any = None
    """Which write was sent, or arrives."""
    end: str = ""
    """How the actor ends."""
    first: str = ""
    """Of what is asked together: what is answered first."""


def before_root_put(op: str, key: str) -> bool:
    return op == "put" and key in ROOTS


def before_pause(op: str, key: str) -> bool:
    return op == "pause"


def before_root_read(op: str, key: str) -> bool:
    return op == "get" and key in ROOTS


def before_look(op: str, key: str) -> bool:
    return key == layout.COMPACTED


def never(op: str, key: str) -> bool:
    return False


def sends(before: State, after: State) -> Any:
    """The write that was sent between two states; one that was sent before is sent again."""
    new = after.sent - before.sent
    return next(iter(new)) if new else None


def writer_moves(s: State, i: int, world: World) -> Iterator[Move]:
    name, (phase, generation, expected, _) = NAMES[i], s.writers[i]
    for after in writer(s, i, name, VARIANT):
        next_phase = after.writers[i][0]
        end = OUTCOMES.get(next_phase, "")
        if phase == "start":
            first, stop = ("root", before_look) if next_phase == "has root" else ("mark", before_root_read)
            yield Move(name, after, before_pause if next_phase == "start" else stop, first=first)
        elif phase in ("has root", "has mark", "confirm"):
            if next_phase != "refused":  # else the model has no more generations, the code has
                yield Move(name, after, before_look if next_phase == "confirm" else before_pause, end=end)
        elif phase == "data":
            yield Move(name, after, before_root_put)
        elif phase == "send":
            value: Value = ("C", name, "", was(expected), frozenset((name,)))
            message = (generation, expected, value)
            if after.roots != s.roots:
                fate = "lost" if next_phase == "settle" else "answered"
            else:
                fate = "in flight" if applied(s, *message, VARIANT) is not None else "answered"
            yield Move(name, after, before_root_read if next_phase == "settle" else before_look, fate, message)
        elif phase == "look":
            yield Move(name, after, end=end)
        elif generation < s.mark and expected is not None and s.roots[generation] == expected:
            continue  # a dead root that came back: to the model the one from before, in the store it has another ETag
        elif next_phase in ("send", "look"):
            yield Move(name, after, before_root_put if next_phase == "send" else before_look)
        else:
            yield Move(name, after, end=end)


def other_moves(s: State, who: str, phase: str, afters: Iterator[State], phase_of: Callable[[State], str]) -> Iterator[Move]:
    """Of retention and garbage collection."""
    for after in afters:
        if phase in ("retire", "fence"):
            message = sends(s, after) or next(m for m in s.sent if m[1] == (s.retention if who == "retention" else s.gc)[-1])
            if phase_of(after) == "delete":
                yield Move(who, after, before_pause, message=message)
            elif applied(s, *message, VARIANT) is not None:
                yield Move(who, after, fate="dies", message=message, end="Died")
            else:
                yield Move(who, after, message=message, end="failed")
        elif phase == "delete":
            yield Move(who, after, end="NoneType")
        else:
            yield Move(who, after, before_root_put if phase_of(after) in ("retire", "fence") else before_pause)


def moves(s: State, world: World) -> Iterator[Move]:
    for message in sorted(s.sent, key=repr):
        after = applied(s, *message, VARIANT)
        if after is not None and after.roots != s.roots:
            yield Move("", after, message=message)
    for i in range(len(NAMES)):
        yield from writer_moves(s, i, world)
    yield from other_moves(s, "retention", s.retention[0], model_retention(s, VARIANT), lambda after: after.retention[0])
    yield from other_moves(s, "gc", s.gc[0], whole_collections(s), lambda after: after.gc[0])
    for after in model_compaction(s, VARIANT):
        yield Move("compaction", after, before_pause, end="NoneType" if s.compaction[0] == 2 else "")


def whole_collections(s: State) -> Iterator[State]:
    """The collector's transitions. A listing gives files and roots at once, a deletion takes all files at once."""
    for after in model_collector(s, VARIANT):
        if s.gc[0] == "start":
            yield from model_collector(after, VARIANT)
        elif s.gc[0] == "delete":
            while after.gc[0] == "delete":
                after = next(model_collector(after, VARIANT))
            yield after
        else:
            yield after


def is_told_apart(move: Move, before: State, world: World) -> bool:
    """Whether the store and the model agree on the condition of a write. Where a generation is dead and gone, a write that
    comes late may bring back what was there before: to the model it is the same root, in the store it has another ETag."""
    if move.message is None:
        return True
    generation = move.message[0]
    sent = world.messages[move.message] if not move.who else world.actors[move.who].next
    assert sent is not None
    agree = world.would_apply(sent) == (applied(before, *move.message, VARIANT) is not None)
    assert agree or generation < before.mark, "model and store differ in a condition"
    return agree


def take(move: Move, world: World) -> None:
    if not move.who:
        sent = world.messages[move.message]
        world.inner.put(sent.key, sent.data, mode=sent.mode, content_type=sent.content_type, metadata=sent.metadata)
        return
    actor = world.actors[move.who]
    actor.first = move.first
    actor.go(move.stop, move.fate)
    if move.message is not None:
        assert actor.sent is not None
        world.messages[move.message] = actor.sent
    failed = actor.result in ("FencedError", "StepExistsError")
    assert actor.result == move.end or (move.end == "failed" and failed), f"{actor.result} instead of {move.end}"


def walk(world: World, chance: random.Random) -> tuple[State, list[str]]:
    """One walk from the start to where nothing more can happen; the last state, and what every actor was told."""
    for name, work in WORK.items():
        world.begin(name, work)
    state, told = START, []
    for _ in range(60):
        choices = [move for move in moves(state, world) if is_told_apart(move, state, world)]
        if not choices:
            break
        move = chance.choice(choices)
        take(move, world)
        state = move.after
        world.expect(state)
        told += [move.end] if move.end else []
    return state, told


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tries as the model has, without pauses between them, and one answer after the other."""
    monkeypatch.setattr("s3loader.checkpoint.protocol.roots.at_once", in_some_order)
    monkeypatch.setattr("s3loader.exchange.commit.TRIES", VARIANT.sends)
    monkeypatch.setattr("s3loader.exchange.commit.time", SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("engine", "walks"), [("memory", 200), ("file", 15)])
def test_the_code_takes_every_walk_of_the_model(engine: str, walks: int, tmp_path: Path) -> None:
    seen: set[str] = set()
    for seed in range(walks):
        world = World(MemoryBackend(f"replay-{seed}") if engine == "memory" else LocalBackend(str(tmp_path / str(seed))))
        try:
            state, told = walk(world, random.Random(seed))
        except AssertionError as error:
            raise AssertionError(f"walk {seed}: {error}") from error
        finally:
            world.close()
        seen |= {*told, "absent" if state.root is None else state.root[0]}
        if state.root is not None:  # and what is damaged is neither committed nor free
            key = layout.root_key(STEP, state.mark)
            world.store.put(key, world.store.get(key)[:-9])
            assert Run(world.store).roots.read(STEP).state == "damaged"
    assert seen >= {"Root", "CommitUnknownError", "StepExistsError", "failed", "Died", "absent", "C", "T"}
