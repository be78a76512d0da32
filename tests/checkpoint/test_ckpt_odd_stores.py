"""Stores that deny, lack or lie: what checkpoints say then, and that they never say "none" for "I could not see"."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint

from s3loader.checkpoint import CheckpointManager, LatestN
from s3loader.errors import CheckpointError, CheckpointNotFoundError, S3LoaderError
from s3loader.testing import FaultProxy, Rule, Server, server
from s3loader.torch import S3StorageReader, S3StorageWriter

STATE = {"x": np.arange(6)}
dcp: Any = torch.distributed.checkpoint
PAGE = b"<html>please log in</html>"


@pytest.fixture(scope="module")
def moto() -> Iterator[Server]:
    with server("moto") as running:
        yield running


def denied(method: str, path: str = "") -> Rule:
    return Rule("error", method, path, status=403, code="AccessDenied")


@pytest.mark.parametrize("path", ["", "list-type", "root.jsonl"])
def test_a_login_page_is_not_an_empty_run(moto: Server, path: str) -> None:
    bucket = moto.bucket()
    with CheckpointManager(moto.open_store(f"{bucket}/run")) as manager:
        assert manager.latest() is None
        manager.save(1, STATE).result(600)
    with FaultProxy(moto.endpoint_url, [Rule("error", "GET", path, status=200, body=PAGE)]) as proxy:
        store = moto.open_store(f"{bucket}/run", endpoint_url=proxy.endpoint_url)
        with CheckpointManager(store) as manager:
            with pytest.raises(S3LoaderError) as latest:
                manager.latest()
            with pytest.raises(S3LoaderError) as restored:
                manager.restore()
    assert not isinstance(latest.value, CheckpointNotFoundError)
    assert not isinstance(restored.value, CheckpointNotFoundError)


def test_latest_goes_past_a_damaged_step_but_never_to_none(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, STATE).result(600)
        for step, expected in ((2, 1), (1, None)):
            root = tmp_path / f"ckpt/{step:012d}/root.jsonl"
            root.write_bytes(root.read_bytes()[:-9])
            if expected is None:
                with pytest.raises(CheckpointError, match="root of step 2 is damaged"):
                    manager.latest()
            else:
                assert manager.latest() == expected


def test_retention_that_may_not_delete_is_heard_of(moto: Server, caplog: pytest.LogCaptureFixture) -> None:
    bucket = moto.bucket()
    with FaultProxy(moto.endpoint_url, [denied("DELETE"), denied("POST", "delete")]) as proxy:
        store = moto.open_store(bucket, endpoint_url=proxy.endpoint_url)
        with CheckpointManager(store, keep=LatestN(1)) as manager, caplog.at_level(logging.WARNING, "s3loader.checkpoint"):
            results = [manager.save(step, STATE).result(600) for step in (1, 2)]
            assert manager.steps() == [2]
    assert results[1].cleanup_error is not None
    assert "step 2 is saved, but old steps could not be deleted" in caplog.text


@pytest.mark.parametrize("answer", [denied("GET", "uploads"), Rule("error", "GET", "uploads", status=404, code="NoSuchUpload")])
def test_garbage_is_collected_where_uploads_cannot_be_listed(moto: Server, answer: Rule) -> None:
    bucket = moto.bucket()
    with FaultProxy(moto.endpoint_url, [answer]) as proxy:
        store = moto.open_store(bucket, endpoint_url=proxy.endpoint_url)
        with CheckpointManager(store) as manager:
            manager.save(1, STATE).result(600)
            store.put("ckpt/000000000002/00000001-000002-deadbeef/intent-00000.json", b"{}")
            assert len(manager.gc(grace=0).keys) == 1
            assert manager.steps() == [1]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_dcp_gets_bytes_back(tmp_path: Path) -> None:
    state: dict[str, Any] = {"b": b"abc", "mixed": [1, b"x"], "pair": (b"y", 2), "w": torch.ones(2)}
    dcp.save(state, storage_writer=S3StorageWriter(tmp_path), no_dist=True)
    back: dict[str, Any] = {"b": b"", "mixed": [0, b""], "pair": (b"", 0), "w": torch.zeros(2)}
    dcp.load(back, storage_reader=S3StorageReader(tmp_path), no_dist=True)
    assert torch.equal(back.pop("w"), state.pop("w"))
    assert back == state
