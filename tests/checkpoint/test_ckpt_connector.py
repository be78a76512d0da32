"""s3torchconnector's keywords (and DCP's, and Lightning's): each works, or is refused in the constructor with a hint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException

from s3loader.checkpoint import CheckpointManager, CheckpointOptions, load
from s3loader.errors import ConfigError
from s3loader.testing import Server, server
from s3loader.torch import S3Checkpoint, S3StorageReader, S3StorageWriter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server("ministack") as running:
        yield running


CONFIG = SimpleNamespace(
    throughput_target_gbps=10.0, part_size=8 << 20, unsigned=False, force_path_style=True, max_attempts=3, profile=None,
    requester_pays=False,
)  # fmt: skip
"""What an `S3ClientConfig` of s3torchconnector has."""

STORE: dict[str, Any] = {"region": "us-east-1", "endpoint": "http://x:1", "s3client_config": CONFIG}
WORK: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "S3Checkpoint": (S3Checkpoint, {**STORE, "reader_constructor": object()}),
    "S3StorageWriter": (S3StorageWriter, {**STORE, "path": "s3://b/k", "overwrite": True, "thread_count": 2}),
    "S3StorageReader": (S3StorageReader, {**STORE, "path": "s3://b/k", "reader_constructor": object()}),
}
REFUSED = {
    "prefix_strategy": "never used again",
    "single_file_per_rank": "file_size",
    "sync_files": "durable",
    "per_thread_copy_ahead": "staging_budget",
    "cache_staged_state_dict": "staging memory",
    "serialization_format": "safetensors",
    "_extensions": "as they are",
    "endpoint_ulr": "endpoint_url",
    "max_to_keep": "keep",
}


@pytest.mark.parametrize("name", WORK)
def test_each_keyword_works_or_is_refused_at_once(name: str) -> None:
    make, words = WORK[name]
    for word, value in words.items():
        make(**{word: value})
    made = make(**words)
    options = made._options if name == "S3Checkpoint" else made._store_options
    assert options["endpoint_url"] == "http://x:1"
    assert options["region"] == "us-east-1"
    assert options["addressing_style"] == "path"
    assert options["options" if name == "S3Checkpoint" else "store_options"].max_attempts == 3
    for word in {*REFUSED} - ({"max_to_keep"} if name != "S3StorageWriter" else set()):
        with pytest.raises(ConfigError, match=word) as caught:
            make(**{word: 1})
        assert REFUSED[word] in str(caught.value.hint), word


def test_dcp_takes_all_parameters_of_its_own_writer_or_says_why_not() -> None:
    """Also those that a later torch adds: none may end in an error when the save has begun."""
    refused = []
    for word in inspect.signature(torch_dcp.FileSystemWriter).parameters:
        try:
            S3StorageWriter(**{word: {"path": "memory://words", "overwrite": True}.get(word, 1)})
        except ConfigError as error:
            refused.append((word, error.hint))
    assert all(hint for _, hint in refused), refused
    assert {word for word, _ in refused} >= {"single_file_per_rank", "sync_files"}
    assert not {word for word, _ in refused} & {"path", "thread_count", "overwrite"}


def test_keywords_have_their_effect(s3: Server) -> None:
    url = f"s3://{s3.bucket()}/one"
    where: dict[str, Any] = {"region": "us-east-1", "endpoint": s3.endpoint_url, "s3client_config": CONFIG}
    where |= {"access_key_id": s3.access_key_id, "secret_access_key": s3.secret_access_key}
    state = {"w": torch.arange(4)}
    writer = S3StorageWriter(path=url, thread_count=3, **where)
    torch_dcp.save(state, storage_writer=writer, no_dist=True)
    assert writer._options is not None
    assert writer._options.concurrency == 3
    both = S3StorageWriter(path=url, options=CheckpointOptions(file_size="1MiB", concurrency=7), thread_count=2)
    assert both._options is not None
    assert (both._options.file_size, both._options.concurrency) == (1 << 20, 2)
    with pytest.raises(ConfigError):
        S3StorageWriter(path=url, thread_count=0)
    again = {"w": torch.zeros(4, dtype=torch.int64)}
    torch_dcp.load(again, storage_reader=S3StorageReader(path=url, **where), no_dist=True)
    assert again["w"].tolist() == [0, 1, 2, 3]
    checkpoint = S3Checkpoint(**where)
    with checkpoint.writer(url + "/file.ckpt") as file:
        torch.save(state, file)
    with checkpoint.reader(url + "/file.ckpt") as found:
        assert torch.load(found, weights_only=True)["w"].tolist() == [0, 1, 2, 3]


def test_overwriting(tmp_path: Path) -> None:
    def save(value: int, where: str, **words: Any) -> None:
        torch_dcp.save({"w": torch.full((2,), value)}, storage_writer=S3StorageWriter(tmp_path / where, **words), no_dist=True)

    save(1, "path", overwrite=False)
    with pytest.raises(CheckpointException, match="there is a checkpoint already"):
        save(2, "path", overwrite=False)
    assert load(tmp_path / "path")["w"].tolist() == [1, 1]
    save(3, "path", overwrite=True)
    save(4, "path")
    assert load(tmp_path / "path")["w"].tolist() == [4, 4]
    save(1, "run", step=7)
    for words in ({}, {"overwrite": False}):
        with pytest.raises(CheckpointException, match="step 7 is committed already"):
            save(2, "run", step=7, **words)
    save(3, "run", step=7, overwrite=True)
    assert load(tmp_path / "run")["w"].tolist() == [3, 3]
    with CheckpointManager(tmp_path / "run") as manager:
        assert manager.steps() == [7]
