"""What a run stores: any bytes give what was saved, or an error that names the object; and the step before is there."""

from __future__ import annotations

import hashlib
import json
import random
import uuid
from typing import Any

import numpy as np
import pytest
import zstandard
from fuzzing import run_fuzz
from mutating import JSON, JSON_LINES, SAFETENSORS, Structure

from s3loader.checkpoint import CheckpointManager
from s3loader.checkpoint.format import records
from s3loader.checkpoint.format.records import (
    BeginRecord,
    EpochRecord,
    Failure,
    Intent,
    Part,
    Pin,
    PlanRecord,
    SharesRecord,
)
from s3loader.checkpoint.protocol.merge import Merged
from s3loader.checksum import seal_json
from s3loader.errors import FormatError
from s3loader.fetch.safetensors import encode_header, parse_header
from s3loader.store import ObjectStore, open_store
from s3loader.types import ObjectMeta

STATE = {
    "model": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0, np.int64), "n": 3, "name": "x"},
    "opt": [np.ones(4, np.uint8), (1, 2.5, None), {"lr": 0.1, 3: "three"}],
}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and (one.dtype, one.shape) == (other.dtype, other.shape) and (one == other).all()
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _run(url: str) -> None:
    with CheckpointManager(url) as manager:
        for step in (1, 2):
            manager.save(step, STATE)


@pytest.fixture
def run() -> tuple[str, ObjectStore]:
    url = f"memory://{uuid.uuid4().hex}"
    _run(url)
    return url, open_store(url)


def _key(store: ObjectStore, end: str) -> str:
    return max(entry.key for entry in store.list("") if isinstance(entry, ObjectMeta) and entry.key.endswith(end))


def _restore(url: str) -> Any:
    with CheckpointManager(url) as manager:
        return manager.restore(2)


def _reseal(data: bytes) -> bytes:
    """A record's checksum, put right."""
    start = b'{"crc32c":"01234567",'
    return seal_json(b"{" + data[len(start) :])


def _reseal_root(data: bytes) -> bytes:
    lines = [json.loads(line) for line in data.splitlines() if line.strip()]
    facts = lines[0]["meta"]["s3loader"]
    plain = {name: value for name, value in facts.items() if name != "digest"}
    text = json.dumps([plain, [[e.get("id"), e.get("size_bytes")] for e in lines]], sort_keys=True, separators=(",", ":"))
    facts["digest"] = hashlib.sha256(text.encode()).hexdigest()
    return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)


def test_roots(run: tuple[str, ObjectStore]) -> None:
    url, store = run
    key = "ckpt/000000000002/root.jsonl"
    valid = bytes(store.get(key))

    def read(data: bytes) -> Any:
        store.put(key, data)
        with CheckpointManager(url) as manager:
            assert manager.latest() in (1, 2)
            assert _same(manager.restore(on_corruption="previous"), STATE)
            manager.gc(dry_run=True)
            return manager.restore(2)

    run_fuzz("checkpoint root", lambda _: valid, read, _same, structure=JSON_LINES, reseal=_reseal_root, where=url)


def test_roots_of_which_all_are_damaged(run: tuple[str, ObjectStore]) -> None:
    url, store = run
    valid = bytes(store.get("ckpt/000000000002/root.jsonl"))

    def read(data: bytes) -> Any:
        for step in (1, 2):
            store.put(f"ckpt/00000000000{step}/root.jsonl", data)
        with CheckpointManager(url) as manager:
            manager.latest()
            manager.steps()
            return manager.restore()

    run_fuzz("checkpoint roots", lambda _: valid, read, structure=JSON_LINES, reseal=_reseal_root, where=url, count=100)


INDEX = Structure(
    lambda data: [json.loads(zstandard.ZstdDecompressor().decompress(data))],
    lambda _, documents: zstandard.ZstdCompressor().compress(documents[0]),
)


@pytest.mark.parametrize("committed", [True, False], ids=["with the root's consent", "alone"])
def test_indexes(run: tuple[str, ObjectStore], committed: bool) -> None:
    """With the root's consent: whoever wrote it signed it, too, so only its own checks are left."""
    url, store = run
    key, root = _key(store, "index.json.zst"), bytes(store.get("ckpt/000000000002/root.jsonl"))
    valid = bytes(store.get(key))

    def read(data: bytes) -> Any:
        store.put(key, data)
        if committed:
            lines = [json.loads(line) for line in root.splitlines()]
            lines[0]["meta"]["s3loader"]["index"] = hashlib.sha256(data).hexdigest()
            lines[0]["size_bytes"] = len(data)
            text = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
            store.put("ckpt/000000000002/root.jsonl", _reseal_root(text))
        with CheckpointManager(url) as manager:
            step = manager.open(2)
            assert step.verify() is not None
            return step.restore()

    def reseal(data: bytes) -> bytes:
        return zstandard.ZstdCompressor().compress(_reseal(zstandard.ZstdDecompressor().decompress(data)))

    run_fuzz(
        f"index {committed}", lambda _: valid, read, _same, structure=INDEX, reseal=reseal if committed else None, where=url
    )


@pytest.mark.parametrize("key", ["s3loader.json", "ckpt/compacted.json"])
def test_control_objects(run: tuple[str, ObjectStore], key: str) -> None:
    url, store = run
    with CheckpointManager(url) as manager:
        manager.save(3, {"x": 1}).result()
        manager.delete(3)
        manager.gc(grace=0)
    valid = bytes(store.get(key))

    def read(data: bytes) -> Any:
        store.put(key, data)
        with CheckpointManager(url) as manager:
            manager.latest()
            manager.steps()
            found = manager.restore(2)
            with CheckpointManager(url) as other:
                other.gc(grace=0)
        return found

    run_fuzz(f"record {key}", lambda _: valid, read, _same, count=80, structure=JSON, reseal=_reseal, where=url)


RECORDS = [
    EpochRecord(format=1, epoch=3, nonce="ab", job="j", world=2, resume_step=1, time=1.5, host="h", pid=1, unfinished=[4]),
    Intent(format=1, step=1, attempt="a", rank=0, world=1, time=1.5, base=3),
    Failure(format=1, rank=1, error="x"),
    BeginRecord(format=1, step=1, generation=0),
    PlanRecord(format=1, rank=1, boxes=[("a", [0], [3], 12)]),
    SharesRecord(format=1, ranks=[[0, 1], [2]]),
    Pin(format=1, step=1, attempt="a", keys=["k"]),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records(record: Any) -> None:
    run_fuzz(
        f"record {type(record).__name__}",
        lambda _: records.encode(record),
        lambda data: (records.decode(data, type(record), "control/x"), records.is_sealed(data)),
        lambda one, other: one == other or not other[1],  # no checksum at all: as older releases wrote it
        structure=JSON,
        reseal=_reseal,
        where="control/x",
    )


def test_parts_of_another_rank() -> None:
    """What a publisher merges was written by others."""
    url = f"memory://{uuid.uuid4().hex}"
    _run(url)
    store = open_store(url)
    valid = bytes(store.get(_key(store, "part-00000.json")))

    def read(data: bytes) -> Any:
        part = records.decode(data, Part, "ckpt/part-00000.json")
        merged = Merged([part])
        return json.loads(records.encode(merged.index))

    run_fuzz("part", lambda _: valid, read, structure=JSON, reseal=_reseal)


def test_safetensors_headers() -> None:
    def make(rng: random.Random) -> bytes:
        tensors = [(f"t{i}", "F32", [rng.randrange(4), 2]) for i in range(rng.randrange(1, 4))]
        return encode_header(tensors, {"format": "pt"})[0]

    def read(data: bytes) -> Any:
        entries, metadata = parse_header(data)
        for entry in entries:
            if not isinstance(entry.name, str) or not all(type(size) is int and size >= 0 for size in entry.shape):
                raise AssertionError(f"not checked: {entry}")
            assert 0 <= entry.begin <= entry.end
        return entries, metadata

    run_fuzz("safetensors header", make, read, structure=SAFETENSORS)
    with pytest.raises(FormatError):
        parse_header(b"\xff" * 16)
