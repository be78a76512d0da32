"""The disk cache and hedged reads."""

import os
import subprocess
import sys
import textwrap

import pytest

from s3loader.errors import ConfigError
from s3loader.loader import Loader, from_manifest, from_prefix
from s3loader.store.open import open_store
from s3loader.testing import FaultProxy, Rule, server
from s3loader.testing.datasets import write_sharded_dataset
from s3loader.transfer.diskcache import DiskCache


def content(i):
    return f"{i:06d}-".encode() * (20 + i)


@pytest.fixture
def dataset(tmp_path):
    store = open_store((tmp_path / "data").as_uri())
    write_sharded_dataset(store, ((f"s{i:05d}.bin", content(i)) for i in range(100)), per_shard=25)
    return from_manifest("manifest.jsonl", store=store)


def numbers(loader):
    return [int(bytes(s[:6])) for batch in loader for s in batch]


def test_a_second_epoch_reads_nothing_from_the_store_and_is_the_same(dataset, tmp_path):
    options = {"batch_size": 8, "cache_dir": str(tmp_path / "cache"), "memory_limit": "1MiB"}
    plain = numbers(Loader(dataset, batch_size=8))
    cold, warm = Loader(dataset, **options), Loader(dataset, **options)
    assert numbers(cold) == numbers(warm) == plain
    assert cold.stats.cache_hits == 0
    assert warm.stats.cache_hits == warm.stats.requests == cold.stats.requests
    for i in range(4):
        os.remove(tmp_path / "data" / "shards" / f"shard-{i:06d}.tar")  # nobody asks for them
    assert numbers(Loader(dataset, **options)) == plain


def test_torn_and_rotten_entries_are_not_served(dataset, tmp_path):
    options = {"batch_size": 8, "cache_dir": str(tmp_path / "cache")}
    plain = numbers(Loader(dataset, **options))
    entries = sorted((tmp_path / "cache").rglob("*.range"))
    entries[0].write_bytes(entries[0].read_bytes()[:-1])
    for entry in entries[1:]:
        data = bytearray(entry.read_bytes())
        data[-1] ^= 1
        entry.write_bytes(data)
    again = Loader(dataset, **options)
    assert numbers(again) == plain
    assert again.stats.cache_hits == 0


def test_the_limit_is_kept_and_the_least_recently_used_goes_first(tmp_path):
    cache = DiskCache(str(tmp_path), 100_000)
    paths = [cache.path("u", "k", "e", i, i + 1) for i in range(40)]
    for i, path in enumerate(paths):
        cache.put(path, bytes(5_000))
        os.utime(path, (i + 1000, i + 1000)) if os.path.exists(path) else None
        if i == 12:
            assert cache.get(paths[0]) is not None  # used: now the newest of all
    total = sum(p.stat().st_size for p in tmp_path.rglob("*.range"))
    assert total <= 100_000 * 17 / 16
    assert os.path.exists(paths[0])
    assert not os.path.exists(paths[1])
    cache.put(paths[0], bytes(200_000))  # larger than everything
    assert cache.get(paths[0]) == bytes(5_000)


def test_a_full_disk_turns_the_cache_off_with_a_warning_and_loses_nothing(dataset, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("s3loader.transfer.diskcache.os.replace", full)
    loader = Loader(dataset, batch_size=8, cache_dir=str(tmp_path / "cache"))
    with pytest.warns(RuntimeWarning, match="is full"):
        got = numbers(loader)
    assert got == numbers(Loader(dataset, batch_size=8))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_cache_folder_that_cannot_be_made_is_said_at_once(dataset, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cache folder"):
        next(iter(Loader(dataset, batch_size=8, cache_dir=str(tmp_path / "file" / "cache"))))


def test_processes_share_a_cache_and_one_killed_while_writing_leaves_nothing_wrong(dataset, tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        from s3loader.transfer.diskcache import DiskCache
        cache = DiskCache(sys.argv[1], 1 << 30)
        replace = os.replace
        def die(source, target):
            os.kill(os.getpid(), signal.SIGKILL)
        for i in range(50):
            if i == 49:
                os.replace = die
            cache.put(cache.path("u", "k", "e", i, i + 1), b"%d" % i * 1000)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "c")], check=False, timeout=60)
    assert done.returncode == -9
    cache = DiskCache(str(tmp_path / "c"), 1 << 30)
    kept = [cache.get(cache.path("u", "k", "e", i, i + 1)) for i in range(50)]
    assert [k == b"%d" % i * 1000 for i, k in enumerate(kept)] == [True] * 49 + [False]


def test_a_straggler_is_asked_for_again_and_the_first_answer_counts():
    with server("moto") as s3:
        plain = s3.open_store(s3.bucket("hedge"))
        for i in range(10):
            plain.put(f"o/{i}.bin", content(i))
        plain.close()
        rule = Rule("hold", method="GET", path=r"o/4\.bin", nth=1)
        with FaultProxy(s3.endpoint_url, [rule]) as proxy, s3.open_store("hedge", endpoint_url=proxy.endpoint_url) as store:
            loader = Loader(from_prefix("o/", store=store), batch_size=3, shuffle="none", hedge_after="150ms")
            assert numbers(loader) == list(range(10))
            assert rule.fired == 1
            assert loader.stats.hedged >= 1
