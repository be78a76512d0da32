"""Saves and restores on a store that says "slow down", breaks connections or answers late: they get through, the bytes are
right, and the number of requests stays bounded."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import pytest

from s3loader import ObjectStore, open_store
from s3loader.checkpoint import CheckpointManager, CheckpointOptions
from s3loader.errors import IntegrityError, StoreConnectionError, ThrottledError
from s3loader.testing import Fault, FaultBackend, FaultProxy, Rule, server

MIB = 1 << 20
PARTS = 20


def state(size: int) -> dict[str, Any]:
    return {"w": np.random.default_rng(7).integers(0, 255, size, np.uint8)}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3loader.checkpoint.writing.upload._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("s3loader.checkpoint.writing.upload._LONGEST_PAUSE", 0.01)


def throttling(times: int | None) -> tuple[FaultBackend, ObjectStore]:
    inner = open_store(f"memory://{uuid.uuid4().hex}")
    backend = FaultBackend(inner.backend, [Fault("throttled", op="upload part", times=times)])
    return backend, ObjectStore(inner.url, backend, options=inner.options)


@pytest.mark.usefixtures("impatient")
def test_a_save_gets_through_a_store_that_throttles_for_a_while() -> None:
    backend, store = throttling(3 * PARTS)
    with CheckpointManager(store, options=CheckpointOptions(part_size="64KiB")) as manager:
        saved = state((PARTS << 16) - 4096)
        before = manager.pace.limit
        manager.save(1, saved).result(60)
        assert sum(seen.op == "upload part" for seen in backend.seen) == PARTS + 3 * PARTS  # each refusal is one request more
        assert manager.pace.limit < before
        assert manager.pace.throttled
        assert np.array_equal(manager.restore(1)["w"], saved["w"])


@pytest.mark.usefixtures("impatient")
def test_a_store_that_throttles_for_ever_fails_the_save_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3loader.checkpoint.writing.upload._PATIENCE", 0.0)
    backend, store = throttling(None)
    with CheckpointManager(store, options=CheckpointOptions(part_size="64KiB")) as manager:
        with pytest.raises(ThrottledError):
            manager.save(1, state(PARTS << 16)).result(60)
        assert sum(seen.op == "upload part" for seen in backend.seen) <= 3 * PARTS
        manager.save(2, {"w": np.arange(3)}).result(60)
        assert manager.steps() == [2]


def test_broken_connections_late_answers_and_refusals_cost_a_bounded_number_of_requests() -> None:
    saved = {name: state(10 * MIB)["w"] for name in "uvw"}
    rules = [
        Rule("error", "PUT", "partNumber", status=503, code="SlowDown", times=4),
        Rule("reset", "PUT", "partNumber", nth=6),
        Rule("error", "GET", "safetensors", status=503, code="SlowDown", times=2),
        Rule("reset", "GET", "safetensors", nth=2),
        Rule("delay", "GET", "safetensors", nth=3, seconds=0.5),
    ]
    with server("ministack") as s3, FaultProxy(s3.endpoint_url, rules) as proxy:
        store = s3.open_store(f"{s3.bucket()}/run", endpoint_url=proxy.endpoint_url)
        with CheckpointManager(store, options=CheckpointOptions(part_size=5 * MIB)) as manager:
            manager.save(1, saved).result(120)
            parts = sum("partNumber" in request.query for request in proxy.requests)
            assert parts <= 7 + 5  # seven parts with the header's, five faults
            restored = manager.restore()
            assert all(np.array_equal(restored[name], saved[name]) for name in saved)
            reads = sum(request.method == "GET" and "safetensors" in request.path for request in proxy.requests)
            assert reads <= 3 * 3 + 5  # a slow machine makes the store look distant: tensors come in three parts then
        assert [rule.fired for rule in rules] == [4, 1, 2, 1, 1]


def test_large_tensors_come_in_parts_from_a_distant_store_and_every_byte_is_checked() -> None:
    saved = state(24 * MIB)
    with server("ministack") as s3, FaultProxy(s3.endpoint_url, [Rule("delay", seconds=0.02)]) as proxy:
        store = s3.open_store(f"{s3.bucket()}/run", endpoint_url=proxy.endpoint_url)
        with CheckpointManager(store) as manager:
            manager.save(1, saved).result(120)
            target = {"w": np.zeros(24 * MIB, np.uint8)}
            before = len(proxy.requests)
            assert manager.restore(target=target)["w"] is target["w"]
            assert np.array_equal(target["w"], saved["w"])
            asked = [request.range for request in proxy.requests[before:] if "safetensors" in request.path]
            assert len(asked) >= 5
            flip = Rule("flip", "GET", "safetensors", nth=3)
            proxy.plan.rules.insert(0, flip)
            target["w"][:] = 0
            assert np.array_equal(manager.restore(target=target)["w"], saved["w"])  # what was wrong is fetched once more
            assert flip.fired
            always = Rule("flip", "GET", "safetensors", probability=1.0)
            proxy.plan.rules.insert(0, always)
            with pytest.raises(IntegrityError):
                manager.restore(target=target)


def test_a_resumed_upload_that_fails_again_leaves_no_buffer_to_two_parts() -> None:
    with server("ministack") as s3:
        inner = s3.open_store(f"{s3.bucket()}/run")
        backend = FaultBackend(inner.backend, [Fault("reset", op="upload part", nth=nth) for nth in (3, 5)])
        store = ObjectStore(inner.url, backend, options=inner.options)
        with CheckpointManager(store, options=CheckpointOptions(part_size=5 * MIB, concurrency=1)) as manager:
            for resumed in (0, 2 * 5 * MIB):
                handle = manager.save(1, state(25 * MIB))
                with pytest.raises(StoreConnectionError):
                    handle.result(60)
                assert handle.progress.resumed == resumed
            saved = state(40 * MIB)["w"]  # takes every buffer that there is
            manager.save(2, {"w": saved}).result(60)
            assert np.array_equal(manager.restore(2)["w"], saved)
