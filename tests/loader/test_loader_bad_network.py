"""Networks that throttle, drip, answer late or not at all: the same samples in the same order, and no storm of requests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from s3loader import Loader, S3ExchangeStore, ShardSizePolicy, StoreOptions, open_dataset
from s3loader.testing import FaultProxy, Rule, Server, server

SAMPLES, SIZE = 800, 10_000
TAR = r"\.tar$"


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server("ministack") as running:
        yield running


@pytest.fixture(scope="module")
def bucket(s3: Server) -> str:
    name = s3.bucket()
    with s3.open_store(name) as store:
        policy = ShardSizePolicy(max_entries=40)
        with S3ExchangeStore(store).open_manifest_writer("m.jsonl", shard_size=policy, mode="overwrite") as writer:
            for i in range(SAMPLES):
                writer.add_to_shard(f"{i:04d}.bin", i.to_bytes(4, "big") * (SIZE // 4))
    return name


def read(s3: Server, bucket: str, rules: list[Rule], memory_limit: str = "8MiB") -> tuple[list[int], int]:
    """The numbers of all samples as they came, and how many reads of shards the server saw."""
    options = StoreOptions(read_timeout=10.0)
    with (
        FaultProxy(s3.endpoint_url, rules, seed=1) as proxy,
        s3.open_store(bucket, endpoint_url=proxy.endpoint_url, options=options) as store,
    ):
        dataset = open_dataset("m.jsonl", store=store)
        loader = Loader(dataset, batch_size=20, shuffle="block", seed=3, memory_limit=memory_limit)
        numbers = []
        for batch in loader:
            for sample in batch:
                number = int.from_bytes(bytes(sample[:4]), "big")
                assert bytes(sample) == number.to_bytes(4, "big") * (SIZE // 4)
                numbers.append(number)
        assert 1 <= loader.stats.connections <= 64
        return numbers, proxy.count("GET", ".tar") - proxy.count("GET", ".tar.idx")


NETWORKS: dict[str, tuple[list[Rule], float]] = {
    "throttled for a while": ([Rule("error", method="GET", path=TAR, status=503, code="SlowDown", times=12)], 3.0),
    "one read in eight is never answered": ([Rule("hold", method="GET", path=TAR, probability=0.125)], 1.6),
    "late": ([Rule("delay", method="GET", path=TAR, seconds=0.3)], 1.3),
    "slow": ([Rule("rate", method="GET", path=TAR, bytes_per_second=2_000_000)], 1.3),
    "one answer in ten is cut off": ([Rule("truncate", method="GET", path=TAR, probability=0.1)], 1.6),
}
"""What is done to reads of shards, and how many times as many there may be at most (and 10 more)."""


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_samples_in_the_same_order_and_no_storm(s3: Server, bucket: str, name: str) -> None:
    wanted, usual = read(s3, bucket, [])
    assert sorted(wanted) == list(range(SAMPLES))
    rules, most = NETWORKS[name]
    found, requests = read(s3, bucket, rules)
    assert rules[0].fired > 0
    assert found == wanted
    assert requests <= most * usual + 10, (usual, requests)


def test_memory_for_less_than_one_range(s3: Server, bucket: str) -> None:
    wanted, _ = read(s3, bucket, [])
    found, _ = read(s3, bucket, [], memory_limit="30KiB")
    assert found == wanted
