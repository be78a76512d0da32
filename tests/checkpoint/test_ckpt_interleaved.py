"""Law: what was acknowledged stays, and what is found is whole, whenever other writers come.

Each act is done once for every one of its requests, and there, before the request is carried out, or after it was carried out
with its answer lost, another writer comes: another job, or another manager of the same process.
"""

from __future__ import annotations

import functools
import itertools
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from s3loader import ObjectStore, open_store
from s3loader.checkpoint import CheckpointManager, CheckpointOptions
from s3loader.errors import S3LoaderError
from s3loader.testing import Fault, FaultBackend, Seen

OPTIONS = CheckpointOptions(part_size="2048B", deadline=5.0)
KEPT = {1, 2}
"""Steps that are committed before."""


def state(step: int, who: str) -> dict[str, Any]:
    return {"w": np.arange(600) + 1000 * step, "who": who}


@dataclass
class Act:
    """What somebody does, with the steps that it saves and those that it may delete."""

    do: Callable[[CheckpointManager, str], Any]
    saves: frozenset[int] = frozenset()
    deletes: frozenset[int] = frozenset()
    keep: int | None = None
    done: bool = field(default=False, init=False)
    result: Any = field(default=None, init=False)

    def manager(self, store: ObjectStore, job: str) -> CheckpointManager:
        """What it is done with."""
        return CheckpointManager(store, keep=self.keep, options=OPTIONS, rank=0, world_size=1, job=job)

    def run(self, manager: CheckpointManager, who: str) -> None:
        """Do it, and note whether it was acknowledged."""
        try:
            with manager:
                self.result = self.do(manager, who)
                self.done = True
        except S3LoaderError:
            return


def save(step: int, keep: int | None = None) -> Callable[[], Act]:
    deletes = frozenset[int]() if keep is None else frozenset(KEPT | {4})  # 4 only where it was committed before
    return lambda: Act(lambda m, who: m.save(step, state(step, who)).result(60), frozenset({step}), deletes, keep)


def delete(step: int, collect: bool = False) -> Callable[[], Act]:
    def do(manager: CheckpointManager, who: str) -> None:
        manager.delete(step)
        if collect:
            manager.gc(grace=0)

    return lambda: Act(do, deletes=frozenset({step}))


def collect() -> Act:
    return Act(lambda m, who: m.gc(grace=0))


def rollback() -> Act:
    return Act(lambda m, who: m.rollback(1), deletes=frozenset({2, 3, 4}))


def latest() -> Act:
    return Act(lambda m, who: m.latest())


def restore() -> Act:
    return Act(lambda m, who: m.restore()["w"][0] // 1000)


OURS: dict[str, Callable[[], Act]] = {
    "save": save(3),
    "save and retire": save(3, keep=1),
    "delete": delete(1),
    "gc": collect,
    "rollback": rollback,
    "latest": latest,
    "restore": restore,
}
THEIRS: dict[str, Callable[[], Act]] = {
    "saves the same step": save(3),
    "saves the next step": save(4),
    "deletes and collects": delete(2, collect=True),
    "collects": collect,
    "rolls back": rollback,
}


class Comes:
    """Acts at the `number`-th request, once."""

    def __init__(self, number: int, moment: str, act: Callable[[], None]) -> None:
        self.number, self.moment, self.act = number, moment, act
        self.came = False

    def __call__(self, seen: Seen, moment: str) -> None:
        if (seen.number, moment) == (self.number, self.moment):
            self.came = True
            self.act()


def expect(store: ObjectStore, ours: Act, theirs: Act) -> None:
    """What must hold after both."""
    with CheckpointManager(store, options=OPTIONS) as manager:
        steps = set(manager.steps())
        found = {step: manager.restore(step) for step in steps}
        assert manager.latest() == max(steps, default=None)
    for step, items in found.items():
        assert np.array_equal(items["w"], state(step, "")["w"]), step
    must = KEPT.union(*(act.saves for act in (ours, theirs) if act.done)) - ours.deletes - theirs.deletes
    assert must <= steps <= KEPT | ours.saves | theirs.saves
    for act, who in ((ours, "ours"), (theirs, "theirs")):
        if act.done:
            assert not act.deletes & KEPT & steps or act.keep
            assert {found[step]["who"] for step in act.saves & steps} <= {who}
    if isinstance(ours.result, (int, np.integer)):
        assert ours.result in KEPT | theirs.saves
        assert ours.result >= max(must & KEPT)


@pytest.fixture(scope="module")
def begun() -> ObjectStore:
    """A run with the steps that are committed before."""
    store = open_store(f"memory://{uuid.uuid4().hex}")
    with CheckpointManager(store, options=OPTIONS, rank=0, world_size=1) as manager:
        for step in sorted(KEPT):
            manager.save(step, state(step, "")).result(60)
    return store


def copied(store: ObjectStore) -> ObjectStore:
    """Another run with the same objects."""
    copy = open_store(f"memory://{uuid.uuid4().hex}")
    for entry in store.list():
        meta, data = store.backend.get(entry.key)
        copy.put(entry.key, bytes(data), content_type=meta.content_type, metadata=meta.metadata)
    return copy


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3loader.exchange.commit.time", SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("moment", "same"),
    [("before", False), ("before", True), ("lost", False)],
    ids=["before, another job", "before, the same job", "lost answer, another job"],
)
@pytest.mark.parametrize("their", THEIRS)
@pytest.mark.parametrize("our", OURS)
def test_what_was_acknowledged_stays_whenever_another_writer_comes(
    our: str, their: str, moment: Literal["before", "lost"], same: bool, begun: ObjectStore
) -> None:
    number = 0
    for number in itertools.count(1):
        direct = copied(begun)
        ours, theirs = OURS[our](), THEIRS[their]()
        other = theirs.manager(direct, "" if same else "other")
        if same:
            other.session()
        act = functools.partial(theirs.run, other, "theirs")
        come = Comes(number, "before" if moment == "before" else "after", act)
        faults = [Fault("drop_reply", nth=number)] if moment == "lost" else []
        store = ObjectStore(direct.url, FaultBackend(direct.backend, faults, hook=come), options=direct.options)
        ours.run(ours.manager(store, ""), "ours")
        if not come.came:
            break  # it has no such request
        try:
            expect(direct, ours, theirs)
        except AssertionError as error:
            raise AssertionError(f"request {number}: {error}") from error
    assert number >= 2
