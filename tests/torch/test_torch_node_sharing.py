"""Workers of a DataLoader that read the same blocks, and share a cache folder: each range is fetched once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from torch.utils.data import DataLoader

from s3loader.store import StoreOptions
from s3loader.testing import FaultProxy, server, write_sharded_dataset
from s3loader.torch import S3IterableDataset

SAMPLES = 240


def test_workers_that_read_the_same_blocks_request_each_range_once(tmp_path: Path) -> None:
    with server("moto") as s3, FaultProxy(s3.endpoint_url) as proxy:
        name, options = s3.bucket("workers"), StoreOptions(hedge_reads=False)
        with s3.open_store(name, endpoint_url=proxy.endpoint_url, options=options) as store:
            write_sharded_dataset(store, ((f"{i:03d}.bin", i.to_bytes(4, "big") * 1024) for i in range(SAMPLES)), per_shard=40)
            dataset = S3IterableDataset.from_manifest(
                "manifest.jsonl",
                store=store,
                batch_size=4,
                order={"block": 16, "lanes": 1, "window": 2},  # one lane for two workers
                memory_limit="1MiB",
                cache_dir=tmp_path,
                return_type="bytes",
            )
            batches = [*DataLoader(dataset, batch_size=None, num_workers=2, timeout=300)]
        asked = Counter((r.path, r.range) for r in proxy.requests if r.method == "GET" and r.path.endswith(".tar"))
    assert sorted(int.from_bytes(sample[:4], "big") for batch in batches for sample in batch) == [*range(SAMPLES)]
    assert len(asked) >= SAMPLES // 16
    assert {*asked.values()} == {1}
