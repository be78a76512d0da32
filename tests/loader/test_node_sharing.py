"""Processes of one node with one cache folder: each range is fetched once, and nobody who dies or stops holds up the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from s3loader import ConfigError
from s3loader.fetch.claims import Claims
from s3loader.loader import Loader, LoaderOptions, from_manifest
from s3loader.store import StoreOptions, open_store
from s3loader.testing import FaultProxy, Rule, Server, server, write_sharded_dataset

SAMPLES, SIZE, SHARDS = 240, 4096, 6
TAR = r"\.tar(\?|$)"


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server("moto") as running:
        yield running


@pytest.fixture(scope="module")
def bucket(s3: Server) -> str:
    name = s3.bucket("node")
    with s3.open_store(name) as store:
        members = ((f"s{i:05d}.bin", i.to_bytes(4, "big") * (SIZE // 4)) for i in range(SAMPLES))
        write_sharded_dataset(store, members, per_shard=SAMPLES // SHARDS)
    return name


READER = textwrap.dedent(
    """
    import hashlib, json, sys
    from s3loader.loader import Loader, from_manifest
    from s3loader.store import StoreOptions, open_store

    url, endpoint, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    store = open_store(url, endpoint_url=endpoint, options=StoreOptions(hedge_reads=False))
    loader = Loader(from_manifest("manifest.jsonl", store=store), **options)
    print("ready", flush=True)
    sys.stdin.readline()
    seen = hashlib.sha256()
    for number, batch in enumerate(loader):
        for sample in batch:
            seen.update(sample)
        if not number:
            print("first", flush=True)
    print(json.dumps({"digest": seen.hexdigest(), **loader.stats.as_dict()}))
    """
)


class Reader:
    """A process that reads the dataset when it is told to begin."""

    def __init__(self, s3: Server, bucket: str, endpoint: str, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER, f"s3://{bucket}", endpoint, json.dumps(options)],
            env={**os.environ, **s3.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n"

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def told(self) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found


def ranges(proxy: FaultProxy) -> Counter[tuple[str, Any]]:
    return Counter((r.path, r.range) for r in proxy.requests if r.method == "GET" and r.path.endswith(".tar"))


ORDERS: dict[str, dict[str, Any]] = {
    "blocks": {"shuffle": "block", "order": {"block": 8}, "memory_limit": "512KiB"},
    "singly": {"shuffle": "full", "memory_limit": "256KiB", "driver": "threads"},
    "hedged": {"shuffle": "block", "order": {"block": 8}, "memory_limit": "512KiB", "hedge_after": "10m"},
}


@pytest.mark.parametrize("order", ORDERS)
def test_processes_that_read_the_same_request_each_range_once(s3: Server, bucket: str, tmp_path: Path, order: str) -> None:
    options = {"batch_size": 10, "cache_dir": str(tmp_path), **ORDERS[order]}
    with FaultProxy(s3.endpoint_url) as proxy:
        readers = [Reader(s3, bucket, proxy.endpoint_url, **options) for _ in range(3)]
        for reader in readers:
            reader.wait_for("ready")
        for reader in readers:
            reader.begin()
        told = [reader.told() for reader in readers]
        asked = ranges(proxy)
    assert len({one["digest"] for one in told}) == 1
    assert {*asked.values()} == {1}
    assert sum(one["requests"] - one["cache_hits"] for one in told) == len(asked) == told[0]["requests"] >= 20
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {".lock", ".claims"}, "nothing for each range"


def test_a_killed_process_does_not_hold_up_the_others(s3: Server, bucket: str, tmp_path: Path) -> None:
    options = {"batch_size": 10, "cache_dir": str(tmp_path), **ORDERS["blocks"]}
    held = Rule("hold", method="GET", path=TAR, times=1)
    with FaultProxy(s3.endpoint_url, [held]) as proxy:
        victim, other = (Reader(s3, bucket, proxy.endpoint_url, **options) for _ in range(2))
        victim.wait_for("ready")
        victim.begin()
        assert held.reached.wait(300)  # it has claimed a range, and waits for it
        other.wait_for("ready")
        other.begin()
        victim.process.send_signal(signal.SIGKILL)
        victim.process.communicate(timeout=300)
        told = other.told()
        assert told["samples"] == SAMPLES


def test_a_stopped_process_is_waited_for_in_vain_once(
    s3: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has claimed is read by the others in the end; they do not wait for each of its ranges anew."""
    options: dict[str, Any] = {"batch_size": 10, "cache_dir": str(tmp_path), **ORDERS["blocks"]}
    held = Rule("hold", method="GET", path=TAR, times=4)
    with FaultProxy(s3.endpoint_url, [held]) as proxy:
        victim = Reader(s3, bucket, proxy.endpoint_url, **options)
        victim.wait_for("ready")
        victim.begin()
        assert held.reached.wait(300)
        victim.process.send_signal(signal.SIGSTOP)
        held.release.set()
        naps: list[float] = []
        monkeypatch.setattr("s3loader.fetch.claims._PATIENCE", 0.05)
        monkeypatch.setattr("s3loader.fetch.claims.time.sleep", naps.append)
        with s3.open_store(bucket, endpoint_url=proxy.endpoint_url) as store:
            loader = Loader(from_manifest("manifest.jsonl", store=store), **options)
            assert sum(map(len, loader)) == SAMPLES
        assert naps
        victim.process.kill()
        victim.process.communicate(timeout=300)


@pytest.mark.parametrize("driver", ["auto", "pump"])
def test_who_does_not_ask_for_the_next_batch_holds_up_nobody(
    s3: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Any
) -> None:
    """Ranks in step: one that has prefetched and waits for the other must have given it all that it has claimed."""
    monkeypatch.setattr("s3loader.fetch.claims._PATIENCE", 1e9)
    with s3.open_store(bucket, options=StoreOptions(hedge_reads=False)) as store:
        dataset = from_manifest("manifest.jsonl", store=store)
        first, second = (
            Loader(dataset, batch_size=10, cache_dir=tmp_path, driver=driver, **ORDERS["blocks"]) for _ in range(2)
        )
        begun = iter(first)
        next(begun)
        assert sum(map(len, second)) == SAMPLES
        assert sum(map(len, begun)) == SAMPLES - 10
        assert first.stats.driver == second.stats.driver == ("pump" if driver == "pump" else "threads")


def test_a_request_that_fails_lets_go_of_its_claim(s3: Server, bucket: str, tmp_path: Path) -> None:
    broken = Rule("error", method="GET", path=TAR, status=500, times=2)
    with (
        FaultProxy(s3.endpoint_url, [broken]) as proxy,
        s3.open_store(bucket, endpoint_url=proxy.endpoint_url) as store,
    ):
        loader = Loader(from_manifest("manifest.jsonl", store=store), batch_size=10, cache_dir=tmp_path, **ORDERS["blocks"])
        assert sum(map(len, loader)) == SAMPLES
        again = Loader(from_manifest("manifest.jsonl", store=store), batch_size=10, cache_dir=tmp_path, **ORDERS["blocks"])
        assert sum(map(len, again)) == SAMPLES
        assert again.stats.cache_hits == again.stats.requests
    assert broken.fired == 2


def test_claims(tmp_path: Path) -> None:
    mine, other = Claims(str(tmp_path)), Claims(str(tmp_path))
    assert mine.take("a")
    assert not mine.take("a")
    assert not other.take("a")
    assert other.take("b")
    mine.give("b")  # not its own
    assert not mine.take("b")
    mine.give("a")
    assert other.wait("a", lambda: None) is None
    assert not mine.take("a")
    assert other.wait("c", lambda: "there") == "there"
    other.close()
    assert mine.take("a")
    assert mine.take("c")
    if (child := os.fork()) == 0:
        mine.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert not other.take("a"), "a forked child leaves its parent's claims alone"
    nowhere = [Claims(str(tmp_path / "nowhere")) for _ in range(2)]
    assert all(claims.take("a") for claims in nowhere), "then everybody reads"


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({"LOCAL_WORLD_SIZE": "4", "RANK": "9", "WORLD_SIZE": "16"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),8", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "14"}, 8),
        ({}, 1),
        ({"RANK": "1", "WORLD_SIZE": "2"}, None),
        ({"LOCAL_WORLD_SIZE": "many"}, None),
    ],
)
def test_a_memory_limit_of_a_node_is_shared_by_its_ranks_and_their_workers(
    environ: dict[str, str], ranks: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, ((f"{i:03d}.bin", bytes(100)) for i in range(64)), per_shard=32)
    dataset = from_manifest("manifest.jsonl", store=store)
    loader = Loader(dataset, batch_size=1, world_size=16, worker=1, workers=2, memory_limit="64MiB/node")
    if ranks is None:
        with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE"):
            loader.explain()
        with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE"):
            list(loader)
        return
    list(loader)
    assert loader.stats.memory_limit == (64 << 20) // ranks // 2
    found = loader.explain(workers=4)
    assert found.memory_limit == (64 << 20) // ranks // 4
    assert f"64.0 MiB of a node, shared by {ranks} ranks of 4 workers" in str(found)
    assert found.peak <= found.memory_limit


@pytest.mark.parametrize("limit", ["1GiB/rank", "/node", "8/node", "GiB/node", "-1GiB/node"])
def test_what_is_no_memory_limit(limit: str) -> None:
    with pytest.raises(ConfigError):
        LoaderOptions(batch_size=1, memory_limit=limit)
