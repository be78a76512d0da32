"""One commit for manifests and checkpoints: whatever becomes of a conditional put's answer, the outcome is known, or said to be
unknown, and nothing is there twice.

The law: a put that was refused or whose answer was lost ends in success exactly where what is there is ours, in the error for
another's where it is not, and in `OutcomeUnknownError` where it cannot be read back.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from exchange_helpers import files, watched

from s3loader.checkpoint import CheckpointManager, CheckpointOptions
from s3loader.errors import (
    CommitUnknownError,
    ConflictError,
    ObjectChangedError,
    ObjectExistsError,
    OutcomeUnknownError,
    S3LoaderError,
    StoreError,
    StoreTimeoutError,
)
from s3loader.exchange import ManifestWriter, S3ExchangeStore, ShardSizePolicy, commit
from s3loader.store import ObjectStore, open_store

OPTIONS = CheckpointOptions(settle=0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_LONGEST_RECOVERY", 0.001)
    monkeypatch.setattr(commit, "_LONGEST_PAUSE", 0.001)


def spoiled(pattern: str, how: str, times: int = 1, *, conditions: bool = True) -> tuple[ObjectStore, list[str]]:
    """A store that spoils the answers of the first puts of keys that match; and the keys of those puts."""
    store, backend = watched(open_store(f"memory://{uuid.uuid4().hex}"))
    real = backend.put
    struck: list[str] = []

    def put(key: str, data: Any, *, mode: Any = "overwrite", **options: Any) -> Any:
        asked = mode
        if not conditions:
            mode = "overwrite"
        if len(struck) >= times or not re.search(pattern, key):
            return real(key, data, mode=mode, **options)
        if how == "refused, though carried out":
            real(key, data, mode=mode, **options)
            struck.append(key)
            raise (ObjectExistsError if asked == "create" else ObjectChangedError)("refused", op="put", url=store.url)
        if how == "carried out, answer lost":
            real(key, data, mode=mode, **options)
        struck.append(key)
        if how == "in the way":
            raise ConflictError("409", op="put", url=store.url)
        if how == "timed out":
            raise StoreTimeoutError("too slow", op="put", url=store.url)
        raise OutcomeUnknownError("the answer was lost", op="put", url=store.url)

    backend.put = put  # type: ignore[method-assign]
    if not conditions:
        store.conditional_writes = lambda: False  # type: ignore[method-assign]
        commit._warned.add(store.url)
    return store, struck


def keys(store: ObjectStore, manifest: str) -> list[str]:
    return [entry["key"] for entry in S3ExchangeStore(store).iter_manifest_entries(manifest)]  # type: ignore[typeddict-item]


def create(store: ObjectStore) -> None:
    with ManifestWriter(store, "m.jsonl", mode="create") as writer:
        writer.add_file("a")
        writer.add_file("b")
    assert writer.published is not None
    assert writer.published.etag == store.head("m.jsonl").etag
    assert keys(store, "m.jsonl") == ["a", "b"]


def append(store: ObjectStore) -> None:
    exchange = S3ExchangeStore(store)
    for name in "ab":
        exchange.write_manifest("m.jsonl", files(name), mode="append_parts")
    assert keys(store, "m.jsonl") == ["a", "b"]


def claim(store: ObjectStore) -> None:
    with ManifestWriter(store, "m.jsonl", shard_size=ShardSizePolicy(max_entries=1)) as writer:
        writer.add_to_shard("x", b"1")
        writer.add_to_shard("y", b"2")
    exchange = S3ExchangeStore(store)
    assert [body.read() for body, _ in exchange.iter_objects("m.jsonl")] == [b"1", b"2"]
    assert len(list(exchange.list_keys("shards/"))) == 2


def saved(store: ObjectStore, *steps: int) -> CheckpointManager:
    manager = CheckpointManager(store, options=OPTIONS)
    for step in steps:
        manager.save(step, {"w": np.arange(step)}).result(600)
    assert manager.steps() == sorted(steps)
    return manager


def publish(store: ObjectStore) -> None:
    with saved(store, 1, 2) as manager:
        assert np.array_equal(manager.restore()["w"], np.arange(2))
        assert manager.gc(grace=0).keys == []


def retire(store: ObjectStore) -> None:
    with saved(store, 1, 2) as manager:
        manager.delete(1)
        assert manager.steps() == [2]


def touch(store: ObjectStore) -> None:
    with saved(store, 1) as manager:
        before = store.head("ckpt/000000000001/root.jsonl").etag
        store.put("ckpt/000000000001/00000001-000009-00000000/d-00000-000.safetensors", b"abandoned")
        assert manager.gc(grace=0).attempts == 1
        assert store.head("ckpt/000000000001/root.jsonl").etag != before
        assert np.array_equal(manager.restore()["w"], np.arange(1))


def compact(store: ObjectStore) -> None:
    with saved(store, 1, 2) as manager:
        manager.delete(1)
        assert manager.gc(grace=0).compacted == [1]
        assert manager.steps() == [2]
        manager.save(1, {"w": np.arange(9)}).result(600)
        assert np.array_equal(manager.restore(1)["w"], np.arange(9))


def begin(store: ObjectStore) -> None:
    with saved(store, 1):
        assert len(list(store.list("control/epoch-"))) == 1


PLACES: dict[str, tuple[Callable[[ObjectStore], None], str]] = {
    "a manifest that is created": (create, r"m\.jsonl$"),
    "the root of an append": (append, r"m\.jsonl$"),
    "the name of a shard": (claim, r"\.idx$"),
    "the root of a checkpoint": (publish, r"root\.jsonl$"),
    "a tombstone": (retire, r"0001/root\.jsonl$"),
    "a root that is touched": (touch, r"root\.jsonl$"),
    "the record of tombstones": (compact, r"compacted\.json$"),
    "an epoch": (begin, r"control/epoch-"),
    "the marker of a run": (begin, r"s3loader\.json$"),
}
ANSWERS = ["carried out, answer lost", "lost on the way", "refused, though carried out", "in the way"]


@pytest.mark.parametrize("conditions", [True, False], ids=["conditions", "no conditions"])
@pytest.mark.parametrize("how", ANSWERS)
@pytest.mark.parametrize("place", PLACES)
def test_what_becomes_of_the_answer_makes_no_difference(place: str, how: str, conditions: bool) -> None:
    work, pattern = PLACES[place]
    store, struck = spoiled(pattern, how, conditions=conditions)
    work(store)
    assert struck


@pytest.mark.parametrize("place", ["a manifest that is created", "the root of an append", "the root of a checkpoint"])
def test_an_outcome_that_stays_unknown_is_said(place: str) -> None:
    work, pattern = PLACES[place]
    store, struck = spoiled(pattern, "lost on the way", times=1000)
    with pytest.raises((OutcomeUnknownError, CommitUnknownError)):
        work(store)
    assert len(struck) == commit.TRIES


def test_lines_are_published_exactly_once() -> None:
    store = S3ExchangeStore(f"memory://{uuid.uuid4().hex}")
    store.write_manifest("m.jsonl", files("a"), mode="create")
    etag = store.objects.head("m.jsonl").etag
    store.write_manifest("m.jsonl", files("a"), mode="create")  # again, as after a crash
    assert store.objects.head("m.jsonl").etag == etag
    for other in ([], files("b"), files("a", "b")):
        with pytest.raises(ObjectExistsError, match="another manifest is there already"):
            store.write_manifest("m.jsonl", other, mode="create")
    assert keys(store.objects, "m.jsonl") == ["a"]
    with store.open_manifest_writer("empty.jsonl", mode="create") as writer:
        assert writer.flush_part() is None
    assert keys(store.objects, "empty.jsonl") == []


def test_lines_beyond_the_memory_limit_are_published_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "IN_MEMORY", 100)
    store, struck = spoiled(r"m\.jsonl$", "carried out, answer lost")
    for _ in range(2):
        with ManifestWriter(store, "m.jsonl", mode="create") as writer:
            for i in range(50):
                writer.add_file(f"object-{i}")
    assert struck
    assert len(keys(store, "m.jsonl")) == 50


def test_a_run_copied_without_its_marker_keeps_its_tombstones() -> None:
    store, _ = spoiled("nothing", "", conditions=False)
    compact(store)
    before = store.get("ckpt/compacted.json")
    store.delete("s3loader.json")
    with CheckpointManager(store, options=OPTIONS) as manager:
        manager.save(3, {"w": np.arange(3)}).result(600)
        assert manager.steps() == [1, 2, 3]
    assert store.get("ckpt/compacted.json") == before


def test_another_step_stays_what_it_is() -> None:
    """Another attempt is committed while ours is refused: `StepExistsError`, and the other one is whole."""
    store, backend = watched(open_store(f"memory://{uuid.uuid4().hex}"))

    def first(key: str, data: Any, mode: Any) -> None:
        if key.endswith("root.jsonl"):
            backend.on_put = None
            with CheckpointManager(open_store(store.url), options=OPTIONS, rank=0, world_size=1, job="other") as other:
                other.save(1, {"w": np.arange(7)}).result(600)

    backend.on_put = first
    with CheckpointManager(store, options=OPTIONS) as manager:
        with pytest.raises(S3LoaderError, match=r"is taken by attempt|newer job"):
            manager.save(1, {"w": np.arange(3)}).result(600)
        assert np.array_equal(manager.restore(1)["w"], np.arange(7))


def test_a_put_that_cannot_succeed_is_no_riddle() -> None:
    """What was surely not carried out is raised as it is."""
    seen: list[int] = []

    def refuse(_: None) -> Any:
        seen.append(1)
        raise StoreError("denied", op="put", url="memory://x")

    with pytest.raises(StoreError, match="denied") as raised:
        commit.put_settled(refuse, lambda: None, lambda now, before, doubtful: False, None, url="memory://x/k")
    assert not isinstance(raised.value, OutcomeUnknownError)
    assert len(seen) == 1
