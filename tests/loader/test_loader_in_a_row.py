"""Requests in a row from nothing to the first batch: what a distant store makes a run wait for. The numbers may only fall."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s3loader import Loader, S3ExchangeStore, ShardSizePolicy, open_dataset
from s3loader.testing import FaultProxy, Rule, Server, in_a_row, recorded, server


def test_requests_in_a_row_to_the_first_batch() -> None:
    found: dict[str, list[str]] = {}
    with server("moto") as s3, FaultProxy(s3.endpoint_url, [Rule("delay", seconds=0.2)]) as proxy:
        bucket = s3.bucket()
        with s3.open_store(bucket) as near:
            policy = ShardSizePolicy(max_entries=50)
            with S3ExchangeStore(near).open_manifest_writer("data/m.jsonl", shard_size=policy) as writer:
                for i in range(500):
                    writer.add_to_shard(f"{i:04d}.bin", bytes(1000))
            tars = [entry.key for entry in near.list("data/") if entry.key.endswith(".tar")]
        assert len(tars) == 10

        def counted(name: str, locations: Callable[[], Any]) -> None:
            with recorded() as requests:
                dataset = open_dataset(locations(), endpoint_url=proxy.endpoint_url, **s3_options(s3))
                next(iter(Loader(dataset, batch_size=32, shuffle="block", seed=1)))
            found[name] = [f"{event.op} {event.url.rpartition('/')[2]}" for event in in_a_row(requests)]

        counted("tars", lambda: [f"s3://{bucket}/{key}" for key in tars])
        counted("manifest", lambda: f"s3://{bucket}/data/m.jsonl")
    limits = {"tars": 2, "manifest": 5}  # and one more to connect; the manifest has a part
    assert {name for name, chain in found.items() if len(chain) > limits[name]} == set(), found


def test_indexes_of_thousands_of_samples_are_asked_for_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the first batch alone, and all others meanwhile: the second batch does not wait for a third answer."""
    with S3ExchangeStore(tmp_path).open_manifest_writer("m.jsonl", shard_size=ShardSizePolicy(max_entries=100)) as writer:
        for i in range(3000):
            writer.add_to_shard(f"{i:04d}.bin", bytes(40_000))
    dataset = open_dataset(tmp_path / "m.jsonl")
    asked: list[list[int]] = []
    load = type(dataset).load_layouts

    def noted(self: Any, numbers: Any) -> Any:
        asked.append(list(numbers))
        return load(self, numbers)

    monkeypatch.setattr(type(dataset), "load_layouts", noted)
    batches = Loader(dataset, batch_size=8, shuffle="block", seed=1, memory_limit="100MiB").iter_batches()
    count = sum(1 for _ in batches)
    assert count == 375
    assert sorted(number for numbers in asked for number in numbers) == list(range(30)), "each is read once"
    assert len(asked) <= 2


def s3_options(s3: Server) -> dict[str, Any]:
    return {name: getattr(s3, name) for name in ("access_key_id", "secret_access_key", "region")}
