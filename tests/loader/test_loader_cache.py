"""The disk cache and hedged reads."""

import os
import subprocess
import sys
import textwrap
from collections import deque

import pytest

from s3loader import ReadResult, open_store
from s3loader.errors import ConfigError
from s3loader.fetch.cached import CachedReads
from s3loader.fetch.diskcache import DiskCache
from s3loader.loader import Loader, from_manifest, from_prefix
from s3loader.testing import FaultProxy, Rule, server, write_sharded_dataset
from s3loader.types import ReadRequest


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

    monkeypatch.setattr("s3loader.fetch.diskcache.os.replace", full)
    loader = Loader(dataset, batch_size=8, cache_dir=str(tmp_path / "cache"))
    with pytest.warns(RuntimeWarning, match="is full"):
        got = numbers(loader)
    assert got == numbers(Loader(dataset, batch_size=8))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


LIMITED = textwrap.dedent(
    """
    import resource, sys, warnings
    from s3loader import CacheFullError
    from s3loader.loader import Loader, from_manifest

    dataset = from_manifest(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))  # no file may be longer, as on a disk that is full
    loader = Loader(dataset, batch_size=8, cache_dir=sys.argv[2], cache_on_full=sys.argv[3])
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            print(sum(map(len, loader)), [str(w.message).count("is full") for w in seen])
    except CacheFullError as error:
        print(type(error).__name__, error.bytes > 50, error.path.startswith(sys.argv[2]), str(error).count(error.path))
    """
)


@pytest.mark.parametrize(("policy", "said"), [("warn", "100 [1]"), ("raise", "CacheFullError True True 1")])
def test_a_disk_that_is_full_warns_once_or_raises_as_told(dataset, tmp_path, policy, said):
    argv = [sys.executable, "-c", LIMITED, (tmp_path / "data" / "manifest.jsonl").as_uri(), str(tmp_path / "cache"), policy]
    done = subprocess.run(argv, check=False, timeout=600, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (said, "")
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    assert not list((tmp_path / "cache").rglob("*.range"))


def test_what_is_missing_is_on_its_way_while_the_rest_comes_from_the_disk(tmp_path):
    cache = DiskCache(str(tmp_path), 1 << 20)
    requests = [ReadRequest("k", i * 100, i * 100 + 100, "etag") for i in range(400)]
    streams, drawn = [], []

    def read(source):
        """One request ahead, as a bulk read with a small budget goes."""
        streams.append(len(drawn))
        ahead = deque()
        for request in source:
            drawn.append(request)
            ahead.append(request)
            if len(ahead) > 1:
                yield answer(ahead.popleft())
        yield from map(answer, ahead)

    def answer(request):
        return ReadResult(request, memoryview(b"%03d" % (request.start // 100) + bytes(97)), "etag", 40_000)

    def contents(wanted):
        streams.clear()
        drawn.clear()
        reads = CachedReads(cache, "u", read, 1000)
        got = [int(bytes(result.data[:3])) for result in reads.run(iter(wanted))]
        assert got == [request.start // 100 for request in wanted]
        return reads

    contents(requests[::3])
    assert len(streams) == 1
    mixed = contents(requests)
    assert (mixed.hits, drawn) == (134, [request for i, request in enumerate(requests) if i % 3])
    assert len(streams) == 1  # one stream through all of it
    assert contents(requests).hits == 400
    assert not streams
    lost = [requests[5], requests[200], requests[399]]  # further apart than is looked ahead
    for request in lost:
        os.remove(mixed.path(request))
    assert contents(requests).hits == 397
    assert drawn == lost
    for _ in range(2):  # what has no ETag is not kept
        assert contents([*requests, ReadRequest("k", 0, 100)]).hits == 400


def test_an_entry_that_is_evicted_after_it_was_seen_is_read_from_the_store(dataset, tmp_path, monkeypatch):
    options = {"batch_size": 8, "cache_dir": str(tmp_path / "cache"), "memory_limit": "16KiB"}
    plain = numbers(Loader(dataset, **options))
    get, gone = DiskCache.get, []

    def evicted(self, path):
        if len(gone) < 5:
            gone.append(path)
            os.remove(path)
        return get(self, path)

    monkeypatch.setattr(DiskCache, "get", evicted)
    loader = Loader(dataset, **options)
    assert numbers(loader) == plain
    assert loader.stats.cache_hits == loader.stats.requests - 5
    assert all(map(os.path.exists, gone))  # and kept again


def test_a_cache_folder_that_cannot_be_made_is_said_at_once(dataset, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cache folder"):
        next(iter(Loader(dataset, batch_size=8, cache_dir=str(tmp_path / "file" / "cache"))))


def test_processes_share_a_cache_and_one_killed_while_writing_leaves_nothing_wrong(dataset, tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        from s3loader.fetch.diskcache import DiskCache
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
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "c")], check=False, timeout=600)
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
