"""Roots, parts and control objects of a run: a bit that is wrong is fetched again, is told, and is never written back."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import numpy as np
import pytest

from s3loader.checkpoint import CheckpointManager
from s3loader.errors import CheckpointError, S3LoaderError
from s3loader.store import ObjectStore, open_store
from s3loader.testing import Fault, open_faulty_store
from s3loader.types import ObjectMeta

STATE = {"w": np.arange(8, dtype=np.int32), "n": 7}


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path}/run"


def _make(url: str) -> ObjectStore:
    with CheckpointManager(url) as manager:
        for step in (1, 2, 3):
            manager.save(step, STATE).result()
        manager.delete(1)
    return open_store(url)


def _work(store: ObjectStore) -> list[int]:
    """Everything that reads control objects, and writes some of them back."""
    with CheckpointManager(store) as manager:
        assert manager.latest() == 3
        found = manager.restore()
        assert (found["w"] == STATE["w"]).all()
        assert found["n"] == 7
        manager.save(4, STATE).result()
        manager.delete(2)
        manager.gc(grace=0)
        manager.save(1, STATE).result()
        return sorted(manager.steps())


KEYS = ["s3loader.json", "compacted.json", "root.jsonl", "root-0", "index.json.zst", "control/"]


@pytest.mark.parametrize("key", KEYS)
def test_a_bit_flipped_on_the_way_is_fetched_again(url: str, key: str) -> None:
    for nth in (1, 2, 4):
        place = f"{url}/{nth}" if url.startswith("file") else f"{url}{nth}"
        _make(place)
        faulty, _ = open_faulty_store(place, [Fault("flip", op="get", key=key, nth=nth)], seed=nth)
        assert _work(faulty) == [1, 3, 4]
        with CheckpointManager(place) as manager:
            assert sorted(manager.steps()) == [1, 3, 4]
            assert not [problem for step in manager.steps() for problem in manager.open(step).verify()]


def _flip(store: ObjectStore, key: str, at: int) -> None:
    meta, data = store.head(key), bytearray(store.get(key))
    data[at] ^= 1
    store.put(key, bytes(data), metadata=meta.metadata, content_type=meta.content_type)


def test_no_flipped_bit_of_a_root_is_believed(url: str) -> None:
    store = _make(url)
    key = "ckpt/000000000003/root.jsonl"
    valid, meta = bytes(store.get(key)), store.head(key)
    with CheckpointManager(store) as manager:
        found = manager.run.roots.at(3, 0)
        whole = (found.facts, found.keys)
    for at in range(0, len(valid), 11):
        for sealed in (True, False):
            if sealed:
                _flip(store, key, at)
            else:  # as a copy, which has lost the metadata
                store.put(key, valid[:at] + bytes([valid[at] ^ 1]) + valid[at + 1 :])
            with CheckpointManager(store) as manager:
                found = manager.run.roots.at(3, 0)
                assert found.state == "damaged" or not sealed
                if found.state != "damaged":
                    assert (found.facts, found.keys) == whole
                assert (manager.restore(on_corruption="previous")["w"] == STATE["w"]).all()
            store.put(key, valid, metadata=meta.metadata, content_type=meta.content_type)


def _change(manager: CheckpointManager) -> None:
    manager.delete(2)
    manager.gc(grace=0)


@pytest.mark.parametrize("key", ["s3loader.json", "ckpt/compacted.json"])
def test_no_flipped_bit_of_a_control_object_is_written_back(url: str, key: str) -> None:
    store = _make(url)
    with CheckpointManager(store) as manager:
        manager.gc(grace=0)
    valid = bytes(store.get(key))
    for at in range(0, len(valid), 5):
        damaged = valid[:at] + bytes([valid[at] ^ 4]) + valid[at + 1 :]
        store.put(key, damaged)
        with CheckpointManager(store) as manager, pytest.raises(S3LoaderError) as caught:
            _change(manager)
        assert key in str(caught.value)
        assert bytes(store.get(key)) == damaged
        store.put(key, valid)
        with CheckpointManager(store) as manager:
            if 2 not in manager.steps():
                manager.save(2, STATE).result()


def test_runs_of_older_releases_are_read_and_gone_on_with(url: str) -> None:
    store = _make(url)
    for entry in list(store.list("")):
        assert isinstance(entry, ObjectMeta)
        data = bytes(store.get(entry.key))
        if entry.key.endswith(".json"):
            data = b"{" + data[len('{"crc32c":"01234567",') :]
            assert json.loads(data)["format"] == 1
        if not entry.key.endswith(".zst"):
            store.put(entry.key, data)
    assert _work(store) == [1, 3, 4]


def test_deep_json_kills_neither_latest_nor_the_step_before(url: str) -> None:
    store = _make(url)
    for deep in (b"[" * 200_000, b'{"a":' * 200_000, b'{"kind":"file","meta":' + b"[" * 100_000 + b"]" * 100_000 + b"}"):
        store.put("ckpt/000000000003/root.jsonl", deep)
        with CheckpointManager(store) as manager:
            assert manager.latest() == 2
            assert manager.restore(on_corruption="previous")["n"] == 7
            with pytest.raises(CheckpointError):
                manager.restore(3)
