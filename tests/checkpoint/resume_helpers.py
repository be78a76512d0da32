"""Interrupted saves, and what the store holds of them: shared by the tests of resumed uploads.

How much must be sent is never taken from what the code says: it is counted in the store before the second save, and at the
engine during it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s3loader import events
from s3loader.checkpoint import CheckpointManager, CheckpointOptions, SaveResult
from s3loader.errors import UnavailableError
from s3loader.events import OpEvent
from s3loader.fetch.safetensors import parse_header
from s3loader.store import ObjectStore, StoreOptions
from s3loader.testing import FaultBackend, Moment, Seen, open_faulty_store
from s3loader.types import ObjectMeta

MIB = 1 << 20
OPTIONS = CheckpointOptions(part_size="4096B", file_size="20000B", concurrency=2, deadline=300)
ORDERLY = CheckpointOptions(part_size="4096B", file_size="20000B", concurrency=1)
"""Part after part, file after file."""
ONCE = StoreOptions(max_attempts=1)


def state(seed: int = 1) -> dict[str, Any]:
    """Three files of several parts and one of a single part."""
    rng = np.random.default_rng(seed)
    return {"model": {f"w{i}": rng.standard_normal(1200 + i) for i in range(6)}, "small": rng.integers(0, 9, 30, np.uint8)}


def equal(have: dict[str, Any], want: dict[str, Any]) -> bool:
    return np.array_equal(have["small"], want["small"]) and all(
        np.array_equal(have["model"][k], want["model"][k]) for k in want["model"]
    )


def holdings(store: ObjectStore, step: int = 1) -> dict[str, int]:
    """Bytes that the store has of each data file, finished or in the fullest of its open uploads; file id -> bytes."""
    held: dict[str, int] = {}
    for entry in store.list(f"ckpt/{step:012d}/"):
        if isinstance(entry, ObjectMeta) and entry.key.endswith(".safetensors"):
            held[entry.key.rpartition("/")[2]] = entry.size
    for key, upload_id, _ in list(store.backend.list_multipart("ckpt/")):
        name = key.rpartition("/")[2]
        size = sum(part.size for part in store.backend.list_parts(key, upload_id))
        held[name] = max(held.get(name, 0), size)
    return held


@contextlib.contextmanager
def sent() -> Iterator[list[OpEvent]]:
    """Requests that carried a checkpoint's data."""
    seen: list[OpEvent] = []

    def hook(event: OpEvent) -> None:
        if event.op in ("PUT", "PUTPART") and event.url.endswith(".safetensors") and event.error is None:
            seen.append(event)

    end = events.subscribe(hook)
    try:
        yield seen
    finally:
        end()


def save_again(manager: CheckpointManager, want: dict[str, Any], *, step: int = 1) -> SaveResult:
    """Save, and check that exactly what was missing was sent and that the checkpoint is right."""
    held = sum(holdings(manager.store, step).values())
    with sent() as seen:
        handle = manager.save(step, want)
        result = handle.result(600)
    assert result.resumed == held
    assert sum(event.bytes for event in seen) == result.written - held
    assert handle.progress == (result.written, result.written, held)
    check(manager, want, step=step)
    return result


def check(manager: CheckpointManager, want: dict[str, Any], *, step: int = 1) -> None:
    """The checkpoint is right, survives a collection, and no staging buffer is lost."""
    assert equal(manager.restore(step), want)
    assert manager.open(step).verify() == []
    for key in manager.open(step).files():
        if key.endswith(".safetensors"):  # the header names the attempt that the key names
            assert parse_header(bytes(manager.store.get(key)))[1]["s3loader_attempt"] == key.split("/")[2]
    dry = manager.gc(grace=0, dry_run=True)
    assert not set(manager.open(step).files()) & set(dry.keys)
    manager.gc(grace=0)
    assert manager.open(step).verify() == []
    again = manager.gc(grace=0)
    assert (again.keys, again.uploads, again.fenced) == ([], [], [])
    assert list(manager.store.backend.list_multipart("ckpt/")) == []
    assert sum(map(len, manager.pool._free)) == manager.pool.allocated


def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(tmp_path)
    with tempfile.TemporaryDirectory(dir=base) as name:
        yield Path(name)


def down(seen: Seen) -> UnavailableError:
    return UnavailableError("the store is down", op=seen.op, url=seen.key, status=503)


def outage(url: str, op: str, nth: int, options: CheckpointOptions = ORDERLY) -> tuple[CheckpointManager, FaultBackend]:
    """A manager whose save of step 1 has failed at the nth request of a kind and at all that came after it."""
    store, faults = open_faulty_store(url, options=ONCE)
    manager = CheckpointManager(store, options=options)
    manager.session()
    count = 0

    def hook(seen: Seen, moment: Moment) -> None:
        nonlocal count
        count += moment == "before" and seen.op == op and seen.key.endswith(".safetensors")
        if count >= nth and moment == "before":
            raise down(seen)

    faults.hook = hook
    with pytest.raises(UnavailableError):
        manager.save(1, state()).result(600)
    faults.hook = None
    return manager, faults


@contextlib.contextmanager
def outage_of(faults: FaultBackend, op: str, nth: int) -> Iterator[None]:
    """From the nth request of a kind on, all of that kind fail."""
    count = 0

    def hook(seen: Seen, moment: Moment) -> None:
        nonlocal count
        if seen.op == op and moment == "before":
            count += 1
            if count >= nth:
                raise down(seen)

    faults.hook = hook
    yield
    faults.hook = None
