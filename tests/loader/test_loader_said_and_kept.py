"""Every option of a loader has an effect, and every counter of its statistics is set."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from s3loader.errors import IntegrityError, PlanError, SampleError
from s3loader.fetch.diskcache import DiskCache
from s3loader.loader import Dataset, Loader, LoaderOptions, LoaderStats, from_manifest, from_objects, read_quarantine
from s3loader.store import ObjectStore, open_store
from s3loader.testing import write_sharded_dataset

SAMPLES = 60


def make(folder: Path, *, damaged: bool = False) -> Dataset:
    store = open_store(folder)
    write_sharded_dataset(store, ((f"s{i:03d}.bin", b"%04d" % i + bytes(96)) for i in range(SAMPLES)), per_shard=20)
    if damaged:
        (key,) = [meta.key for meta in store.list() if meta.key.endswith("1.tar")]  # type: ignore[union-attr]
        body = bytearray(store.get(key))
        body[body.index(b"0027")] ^= 1
        (folder / key).write_bytes(bytes(body))
    return from_manifest("manifest.jsonl", store=store)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make(tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make(tmp_path_factory.mktemp("damaged"), damaged=True)


def numbers(dataset: Dataset, **options: Any) -> list[list[int]]:
    loader = Loader(dataset, **{"batch_size": 8, "shuffle": "none", **options})
    return [[int(bytes(sample)[:4]) for sample in batch] for batch in loader]


def flat(dataset: Dataset, **options: Any) -> list[int]:
    return [number for batch in numbers(dataset, **options) for number in batch]


def fails_on(number: int) -> Callable[[Any], Any]:
    def transform(sample: Any) -> Any:
        if int(bytes(sample)[:4]) == number:
            raise ValueError("no")
        return sample

    return transform


def batch_size(dataset: Dataset, folder: Path) -> None:
    assert [len(batch) for batch in numbers(dataset, batch_size=25)] == [25, 25, 10]


def shuffle(dataset: Dataset, folder: Path) -> None:
    orders = {how: flat(dataset, shuffle=how) for how in ("none", "block", "full", "shard")}
    assert orders["none"] == sorted(orders["full"]) == sorted(orders["shard"]) == sorted(orders["block"])
    assert len(set(map(tuple, orders.values()))) == 4


def seed(dataset: Dataset, folder: Path) -> None:
    assert numbers(dataset, shuffle="full", seed=1) != numbers(dataset, shuffle="full", seed=2)


def order(dataset: Dataset, folder: Path) -> None:
    assert Loader(dataset, batch_size=8, order={"block": 5}).plan.spec["block"] == 5


def tail(dataset: Dataset, folder: Path) -> None:
    assert [sum(map(len, numbers(dataset, tail=how))) for how in ("drop", "short", "pad")] == [56, 60, 64]


def allow_empty(dataset: Dataset, folder: Path) -> None:
    empty = from_objects([], store=dataset.store)
    with pytest.raises(PlanError):
        list(Loader(empty, batch_size=8))
    assert list(Loader(empty, batch_size=8, allow_empty=True)) == []


def decode(dataset: Dataset, folder: Path) -> None:
    assert {type(sample) for batch in Loader(dataset, batch_size=8, decode="bytes") for sample in batch} == {bytes}


def transform(dataset: Dataset, folder: Path) -> None:
    assert next(iter(Loader(dataset, batch_size=2, transform=len))) == [100, 100]


def transform_key(dataset: Dataset, folder: Path) -> None:
    batch = next(iter(Loader(dataset, batch_size=1, shuffle="none", transform=lambda _, key: key, transform_key=True)))
    assert batch[0].endswith(".tar#s000.bin")


def collate(dataset: Dataset, folder: Path) -> None:
    assert list(Loader(dataset, batch_size=25, collate=len)) == [25, 25, 10]


def on_error(dataset: Dataset, folder: Path) -> None:
    with pytest.raises(SampleError):
        numbers(dataset, transform=fails_on(3))
    assert len(flat(dataset, transform=fails_on(3), on_error="skip")) == SAMPLES - 1
    assert len(flat(dataset, transform=fails_on(3), on_error="replace")) == SAMPLES


def on_break(dataset: Dataset, folder: Path) -> None:
    epochs = {}
    for how in ("next", "rest", "again"):
        loader = Loader(dataset, batch_size=8, shuffle="full", on_break=how)  # type: ignore[arg-type]
        batches = [batch for _ in range(2) for batch in itertools.islice(loader.iter_batches(), 1)]
        epochs[how] = [(batch.epoch, batch.consumed) for batch in batches]
    assert epochs == {"next": [(0, 8), (1, 8)], "rest": [(0, 8), (0, 16)], "again": [(0, 8), (0, 8)]}


def verify(dataset: Dataset, folder: Path) -> None:
    bad = make(folder, damaged=True)
    with pytest.raises((SampleError, IntegrityError)):
        list(Loader(bad, batch_size=8))
    assert sum(map(len, Loader(bad, batch_size=8, verify=False))) == SAMPLES


def memory_limit(dataset: Dataset, folder: Path) -> None:
    small, large = (Loader(dataset, batch_size=8, memory_limit=size)._memory_share(1) for size in ("1MiB", "8MiB"))
    assert (small, large) == (1 << 20, 8 << 20)


def prefetch(dataset: Dataset, folder: Path) -> None:
    small, large = (Loader(dataset, batch_size=8, prefetch=size).explain().peak for size in ("1MiB", "8MiB"))
    assert large - small == 7 << 20


def driver(dataset: Dataset, folder: Path) -> None:
    for how in ("pump", "threads"):
        loader = Loader(dataset, batch_size=8, driver=how)
        list(loader)
        assert loader.stats.driver == how


def concurrency(dataset: Dataset, folder: Path) -> None:
    loader = Loader(dataset, batch_size=8, driver="threads", concurrency=1)
    list(loader)
    assert loader.stats.driver == "pump"  # one request at a time needs no thread


def decode_threads(dataset: Dataset, folder: Path) -> None:
    seen = set()
    for threads in (0, 2):
        list(Loader(dataset, batch_size=8, decode_threads=threads, transform=lambda _: seen.add(threading.get_ident())))
        assert (seen == {threading.get_ident()}) == (threads == 0)


def cache_dir(dataset: Dataset, folder: Path) -> None:
    numbers(dataset, cache_dir=folder / "cache")
    assert [path for path in (folder / "cache").rglob("*") if path.is_file()]


def cache_limit(dataset: Dataset, folder: Path) -> None:
    for number, limit in enumerate(("300B", "1MiB")):
        numbers(dataset, cache_dir=folder / str(number), cache_limit=limit)
    sizes = [sum(p.stat().st_size for p in (folder / n).rglob("*.range")) for n in "01"]
    assert sizes[0] < sizes[1]


def cache_on_full(dataset: Dataset, folder: Path) -> None:
    code = """
    import resource, sys, warnings
    from s3loader.loader import Loader, from_manifest
    dataset = from_manifest(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
    warnings.simplefilter("ignore")
    for policy in ("warn", "raise"):
        try:
            print(sum(map(len, Loader(dataset, batch_size=8, cache_dir=sys.argv[2], cache_on_full=policy))))
        except Exception as error:
            print(type(error).__name__)
    """
    argv = [sys.executable, "-c", textwrap.dedent(code), dataset.name, str(folder)]
    assert subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split() == ["60", "CacheFullError"]


def hedge_after(dataset: Dataset, folder: Path) -> None:
    assert hedged(dataset).hedged > 0


def skip_steps(dataset: Dataset, folder: Path) -> None:
    assert numbers(dataset, skip_steps=[(1, 6)]) == [list(range(8)), list(range(48, 56)), list(range(56, 60))]


def exclude(dataset: Dataset, folder: Path) -> None:
    key = Loader(dataset, batch_size=8, shuffle="none").where(7).key
    assert flat(dataset, exclude=[key]) == [n for n in range(SAMPLES) if n != 7]


def quarantine(dataset: Dataset, folder: Path) -> None:
    numbers(dataset, transform=fails_on(3), on_error="skip", quarantine=folder)
    assert [entry.key.rpartition("#")[2] for entry in read_quarantine(folder)] == ["s003.bin"]


EFFECTS = {
    effect.__name__: effect
    for effect in (
        batch_size, shuffle, seed, order, tail, allow_empty, decode, transform, transform_key, collate, on_error, on_break,
        verify, memory_limit, prefetch, driver, concurrency, decode_threads, cache_dir, cache_limit, cache_on_full, hedge_after,
        skip_steps, exclude, quarantine,
    )
}  # fmt: skip


def test_the_table_holds_every_option() -> None:
    assert set(EFFECTS) == {field.name for field in fields(LoaderOptions)}


@pytest.mark.parametrize("option", [field.name for field in fields(LoaderOptions)])
def test_every_option_has_an_effect(option: str, dataset: Dataset, tmp_path: Path) -> None:
    EFFECTS[option](dataset, tmp_path)


class Gated:
    """A backend whose first read of a key waits until another has come back."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.again, self.seen, self.lock = inner, threading.Event(), 0, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get(self, *args: Any, **options: Any) -> Any:
        with self.lock:
            self.seen += 1
            first = self.seen == 1
        if first:
            assert self.again.wait(30)
        try:
            return self.inner.get(*args, **options)
        finally:
            if not first:
                self.again.set()


def hedged(dataset: Dataset) -> LoaderStats:
    store = ObjectStore(dataset.store.url, Gated(dataset.store.backend), options=dataset.store.options)
    names = [meta.key for meta in dataset.store.list() if meta.key.endswith(".tar")]  # type: ignore[union-attr]
    loader = Loader(from_objects(names[:1], store=store), batch_size=1, hedge_after="1ms")
    list(loader)
    return loader.stats


def shared(dataset: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch) -> LoaderStats:
    """Of a loader that finds its first range claimed by another process, and then kept by it."""
    list(other := Loader(dataset, batch_size=8, cache_dir=folder))
    kept, hidden = DiskCache.has, []

    def late(self: DiskCache, path: str) -> bool:
        if not hidden:
            hidden.append(path)
            return False
        return kept(self, path)

    monkeypatch.setattr(DiskCache, "has", late)
    loader = Loader(dataset, batch_size=8, cache_dir=folder)
    list(loader)
    assert loader.stats.cache_hits == loader.stats.requests == other.stats.requests
    return loader.stats


def test_every_counter_is_set(dataset: Dataset, damaged: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = LoaderStats()
    for data, options in (
        (dataset, {"cache_dir": tmp_path}),
        (dataset, {"cache_dir": tmp_path}),
        (damaged, {"on_error": "skip"}),
        (damaged, {"on_error": "replace"}),
    ):
        loader = Loader(data, batch_size=8, collate=len, **options)  # type: ignore[arg-type]
        assert (loader.stats.engine, loader.stats.driver, loader.stats.first_batch) == ("", "", None)
        list(loader)
        assert (loader.stats.engine, loader.stats.driver) == ("file", "pump")
        total.add(loader.stats)
    total.add(hedged(dataset))
    total.add(shared(dataset, tmp_path / "shared", monkeypatch))
    unset = [field.name for field in fields(LoaderStats) if not getattr(total, field.name)]
    assert set(unset) == {"connections", "first_byte"}  # of S3: tests/loader/test_loader_bad_network.py
    told = total.as_dict()
    assert {field.name for field in fields(LoaderStats)} - {"started"} <= told.keys()
    assert told["verdict"] == total.verdict != "nothing has run yet"
    assert f"{total.samples} samples" in str(total)
