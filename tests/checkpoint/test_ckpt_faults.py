"""Checkpoints over S3 servers that behave differently, and over a wire that loses, delays, repeats and garbles."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from s3loader.checkpoint import CheckpointManager, CheckpointOptions, LatestN
from s3loader.errors import CommitUnknownError, FencedError, IntegrityError, S3LoaderError, StepExistsError
from s3loader.store import StoreOptions
from s3loader.testing import FaultAction, FaultProxy, Rule, Server, server

MIB = 1 << 20
OPTIONS = CheckpointOptions(part_size=5 * MIB, settle=0)
QUICK = StoreOptions(max_attempts=3, retry_budget=600, read_timeout=300)


@pytest.fixture(scope="module", params=["ministack", "moto", "rclone"])
def any_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with server(request.param) as running:
        yield running


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server("ministack") as running:
        yield running


def state(step: int, size: int = 6 * MIB) -> dict[str, Any]:
    return {"model": {"w": np.random.default_rng(step).integers(0, 255, size, np.uint8), "b": np.arange(step)}, "step": step}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["step"] == b["step"] and all(np.array_equal(a["model"][k], b["model"][k]) for k in b["model"])


def test_every_server(any_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "s3loader.checkpoint")
    store = any_server.open_store(any_server.bucket() + "/run")
    with CheckpointManager(store, keep=LatestN(2), options=OPTIONS) as manager:
        for step in (1, 2, 3):
            assert manager.save(step, state(step)).result(600).cleanup_error is None
        assert manager.steps() == [2, 3]
        assert equal(manager.restore(), state(3))
        target = {"model": {"w": np.zeros(6 * MIB, np.uint8)}}
        assert manager.restore(2, target)["model"]["w"] is target["model"]["w"]
        assert np.array_equal(target["model"]["w"], state(2)["model"]["w"])
        with pytest.raises(StepExistsError):
            manager.save(3, state(3)).result(600)
        store.put("ckpt/000000000003/00000001-000009-00000000/d-00000-000.safetensors", b"abandoned")
        assert manager.gc(grace=0).attempts == 1
        assert manager.gc(grace=0, dry_run=True).keys == []
        assert manager.open(3).verify() == []
        manager.delete(3)
        assert manager.latest() == 2
    said = [record.message for record in caplog.records if "single-writer" in record.message]
    assert len(said) == (1 if any_server.kind == "rclone" else 0)
    store.close()


def saved_through(s3: Server, rule: Rule, size: int = 6 * MIB) -> tuple[S3LoaderError | None, CheckpointManager]:
    """Save step 2 after step 1 with `rule` in the way; the error, and a manager with a clear view."""
    bucket = s3.bucket()
    clear = CheckpointManager(s3.open_store(bucket), options=OPTIONS)
    clear.save(1, state(1, size)).result(600)
    problem: S3LoaderError | None = None
    with FaultProxy(s3.endpoint_url, [rule]) as proxy:
        store = s3.open_store(bucket, endpoint_url=proxy.endpoint_url, options=QUICK)
        manager = CheckpointManager(store, options=OPTIONS)
        try:
            manager.save(2, state(2, size)).result(600)
        except S3LoaderError as error:
            problem = error
        finally:
            rule.release.set()
            manager.close()
            store.close()
    assert rule.fired
    return problem, clear


ROOT = "root.jsonl$"
DATA = "safetensors"
SURVIVED: list[tuple[str, Rule]] = [
    ("the commit's answer is lost", Rule("drop_reply", "PUT", ROOT, nth=1)),
    ("the commit arrives twice", Rule("duplicate", "PUT", ROOT, nth=1)),
    ("the commit meets a conflict", Rule("error", "PUT", ROOT, nth=1, status=409, code="ConditionalRequestConflict")),
    ("the commit is applied, and answered 500", Rule("error", "PUT", ROOT, nth=1, status=500, forward=True)),
    ("slow down", Rule("error", "", "", status=503, code="SlowDown", times=2)),
    ("a part's answer is lost", Rule("drop_reply", "PUT", "partNumber=1", nth=1)),
    ("completing answers 200 with an error", Rule("error", "POST", r"uploadId=", nth=1, status=200)),
    ("completing is applied, its answer lost", Rule("drop_reply", "POST", r"uploadId=", nth=1)),
    ("the index's answer is cut", Rule("reset", "PUT", "index.json.zst", nth=1, at=0)),
]


@pytest.mark.parametrize(("name", "rule"), SURVIVED, ids=[name for name, _ in SURVIVED])
def test_what_a_save_survives(s3: Server, name: str, rule: Rule) -> None:
    problem, clear = saved_through(s3, rule)
    assert problem is None
    assert clear.latest() == 2
    assert equal(clear.restore(), state(2))
    clear.close()


def test_a_commit_that_never_arrives_is_unknown_and_harmless(s3: Server) -> None:
    problem, clear = saved_through(s3, Rule("refuse", "PUT", ROOT), size=1000)
    assert isinstance(problem, CommitUnknownError)
    assert clear.latest() == 1
    assert equal(clear.restore(), state(1, 1000))
    assert clear.gc(grace=0).attempts == 1
    clear.save(2, state(2, 1000)).result(600)  # savers of one process do not fence each other
    assert equal(clear.restore(), state(2, 1000))
    clear.close()


def test_a_commit_that_arrives_after_the_collection_has_no_effect(s3: Server) -> None:
    bucket = s3.bucket()
    rule = Rule("hold", "PUT", ROOT, nth=1)
    clear = CheckpointManager(s3.open_store(bucket), options=OPTIONS)
    with FaultProxy(s3.endpoint_url, [rule]) as proxy:
        manager = CheckpointManager(s3.open_store(bucket, endpoint_url=proxy.endpoint_url), options=OPTIONS)
        handle = manager.save(2, state(2, 1000))
        assert rule.reached.wait(600)
        assert clear.gc(grace=0).attempts == 1
        rule.release.set()
        with pytest.raises(FencedError, match="step 2 was retired while it was written"):
            handle.result(600)
        manager.close()
    assert clear.latest() is None
    clear.close()


READS: list[tuple[FaultAction, dict[str, Any]]] = [
    ("flip", {"nth": 1}),
    ("truncate", {"nth": 1}),
    ("reset", {"nth": 2}),
    ("error", {"status": 503, "code": "SlowDown", "times": 1}),
]


@pytest.mark.parametrize(("action", "options"), READS, ids=[action for action, _ in READS])
def test_what_a_restore_survives(s3: Server, action: FaultAction, options: dict[str, Any]) -> None:
    bucket = s3.bucket()
    with CheckpointManager(s3.open_store(bucket), options=OPTIONS) as manager:
        manager.save(1, state(1)).result(600)
    with FaultProxy(s3.endpoint_url, [Rule(action, "GET", DATA, **options)], seed=3) as proxy:
        store = s3.open_store(bucket, endpoint_url=proxy.endpoint_url, options=QUICK)
        with CheckpointManager(store) as manager:
            assert equal(manager.restore(), state(1))
            target = {"model": {"w": np.zeros(6 * MIB, np.uint8)}}
            manager.restore(1, target)
            assert np.array_equal(target["model"]["w"], state(1)["model"]["w"])
        store.close()


def test_bytes_that_stay_wrong_are_an_error(s3: Server) -> None:
    bucket = s3.bucket()
    with CheckpointManager(s3.open_store(bucket), options=OPTIONS) as manager:
        manager.save(1, state(1)).result(600)
    with FaultProxy(s3.endpoint_url, [Rule("flip", "GET", DATA)], seed=1) as proxy:
        store = s3.open_store(bucket, endpoint_url=proxy.endpoint_url, options=QUICK)
        with CheckpointManager(store) as manager, pytest.raises(IntegrityError, match="are not what was saved"):
            manager.restore()
        store.close()


def test_bits_that_flip_on_the_way_up_are_noticed(s3: Server) -> None:
    problem, clear = saved_through(s3, Rule("flip_request", "PUT", "partNumber=1", nth=1))
    if problem is None:  # refused by the store's checksum and sent again, or stored wrong and found now
        assert equal(clear.restore(), state(2))
    assert clear.latest() in (1, 2)
    clear.close()
