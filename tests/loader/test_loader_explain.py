"""`explain` is a dry run of the planner: its requests and bytes are those that a run then counts, whatever the dataset and the
number of processes; and a small dataset is read in a few large ranges."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from s3loader import open_store
from s3loader.exchange import publish_manifest
from s3loader.loader import Dataset, Loader, LoaderStats, from_manifest, from_prefix, from_webdataset, mix_datasets
from s3loader.plan import OrderSpec
from s3loader.testing import write_shard, write_sharded_dataset

SHUFFLES = ("block", "full", "shard", "none")


def one_of_each_kind(folder: Path, kind: str, dice: random.Random) -> Dataset:
    store = open_store(folder.as_uri())
    count = dice.randint(1, 150)
    sizes = [dice.choice((0, 1, 700, 5_000, 60_000)) if dice.random() < 0.5 else 3_000 for _ in range(count)]
    members = [(f"{i:05d}.bin", dice.randbytes(size)) for i, size in enumerate(sizes)]
    per_shard = dice.randint(1, 60)
    if kind == "loose":
        for name, data in members:
            store.put(f"loose/{name}", data)
        return from_prefix("loose/", store=store)
    if kind == "grouped":
        names = [f"{i:05d}.{extension}" for i in range(count) for extension in ("jpg", "cls")]
        pairs = [(name, dice.randbytes(dice.choice((0, 10, 9_000)))) for name in names]
        for number, low in enumerate(range(0, len(pairs), 2 * per_shard)):
            write_shard(store, f"{number:03d}.tar", pairs[low : low + 2 * per_shard])
        names = [f"{number:03d}.tar" for number in range(-(-count // per_shard))]
        dataset = from_webdataset(names, store=store, group="webdataset")
        return dataset.only(dice.choice((None, "cls", ["cls", "jpg"])))
    if kind == "without index":
        for number, low in enumerate(range(0, count, per_shard)):
            write_shard(store, f"{number:03d}.tar", members[low : low + per_shard], index=False)
        return from_webdataset(f"{{000..{-(-count // per_shard) - 1:03d}}}.tar", store=store)
    if kind == "mixed":
        entries: list[object] = [write_shard(store, "a.tar", members)]
        store.put("b.bin", b"loose")
        entries.append({"kind": "file", "key": "b.bin"})  # of unknown size
        publish_manifest(store, "manifest.jsonl", entries)  # type: ignore[arg-type]
        return from_manifest("manifest.jsonl", store=store)
    write_sharded_dataset(store, members, per_shard=per_shard, compression="zstd" if kind == "zstd" else None)
    dataset = from_manifest("manifest.jsonl", store=store)
    return mix_datasets([dataset, dataset], weights=[1, 2]) if kind == "mixture" else dataset


def run_all(dataset: Dataset, *, world_size: int, workers: int, **options: object) -> tuple[LoaderStats, list[list[int]]]:
    """(counters of all processes, samples of each rank in the order of steps)."""
    total, ranks = LoaderStats(), []
    for rank in range(world_size):
        steps: dict[int, list[int]] = {}
        for worker in range(workers):
            where = {"rank": rank, "world_size": world_size, "worker": worker, "workers": workers}
            loader = Loader(dataset, **where, allow_empty=True, **options)  # type: ignore[arg-type]
            steps |= {batch.step: batch.samples.tolist() for batch in loader.iter_batches()}
            total.add(loader.stats)
        ranks.append([sample for step in sorted(steps) for sample in steps[step]])
    return total, ranks


@pytest.mark.parametrize("kind", ["tar", "zstd", "grouped", "loose", "without index", "mixed", "mixture"])
@pytest.mark.parametrize("seed", range(3))
def test_explain_is_what_stats_count_afterwards(tmp_path: Path, kind: str, seed: int) -> None:
    dice = random.Random(f"{kind}{seed}")
    dataset = one_of_each_kind(tmp_path, kind, dice)
    for shuffle in SHUFFLES:
        world_size, workers = dice.randint(1, 3), dice.randint(1, 3)
        options = {
            "batch_size": dice.choice((1, 3, 4, 16, 200)),
            "shuffle": shuffle,
            "seed": seed,
            "tail": dice.choice(("short", "pad", "drop")),
            "memory_limit": dice.choice(("100KiB", "2MiB", "512MiB")),
            "prefetch": dice.choice(("10KiB", "64MiB")),
        }
        case = f"{kind} {seed} {world_size} x {workers} {options}"
        told = Loader(dataset, world_size=world_size, **options).explain(workers=workers)  # type: ignore[arg-type]
        stats, _ = run_all(dataset, world_size=world_size, workers=workers, **options)
        counted = (stats.requests, stats.bytes_fetched, stats.bytes_used)
        assert (told.requests, told.bytes_fetched, told.bytes_used) == counted, case
        assert told.exact, case


def test_explain_is_of_the_current_epoch_and_leaves_out_what_is_left_out(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, [(f"{i:04d}", bytes(9_000)) for i in range(300)], per_shard=70)
    dataset = from_manifest("manifest.jsonl", store=store)
    order = OrderSpec("block", seed=3, block=7, lanes=4, chunk=8, window=2, run=3)
    loader = Loader(dataset, batch_size=8, order=order, memory_limit="1MiB", skip_steps=[(3, 9)], exclude=[])
    for _ in range(3):
        told, before = loader.explain(), replace(loader.stats)
        list(loader)
        assert (told.requests, told.bytes_fetched) == (
            loader.stats.requests - before.requests,
            loader.stats.bytes_fetched - before.bytes_fetched,
        )


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("count", [396, 400, 1600])
def test_a_small_dataset_is_read_in_a_few_large_ranges(tmp_path: Path, shuffle: str, count: int) -> None:
    """8 MiB, a little more, and 32 MiB in 20 kB samples: never one request each, and nothing is fetched twice."""
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, [(f"{i:05d}", bytes(20_000)) for i in range(count)], per_shard=400)
    dataset = from_manifest("manifest.jsonl", store=store)
    stored = sum(part.size for part in dataset.parts)  # type: ignore[union-attr]
    stats, (got,) = run_all(dataset, world_size=1, workers=1, batch_size=4, shuffle=shuffle)
    assert sorted(got) == list(range(count))
    assert stats.requests <= 20
    assert stats.bytes_fetched <= stored + (1 << 18)
    for world_size, workers in ((2, 1), (2, 2)):
        stats, ranks = run_all(dataset, world_size=world_size, workers=workers, batch_size=4, shuffle=shuffle)
        assert sorted(sample for rank in ranks for sample in rank) == list(range(count))
        assert stats.requests <= 40 * world_size * workers
        assert stats.bytes_fetched <= world_size * workers * (stored + (1 << 18))


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_huge_epoch_is_extrapolated_and_says_so(tmp_path: Path, shuffle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, [(f"{i:05d}", bytes(2_000)) for i in range(6000)], per_shard=1000)
    dataset = from_manifest("manifest.jsonl", store=store)
    order = {"block": 100, "window": 2} if shuffle == "block" else None
    loader = Loader(dataset, batch_size=10, shuffle=shuffle, order=order, memory_limit="6MiB")  # type: ignore[arg-type]
    whole = loader.explain(workers=2)
    assert whole.exact
    monkeypatch.setattr("s3loader.loader.loader._DRY_SAMPLES", 2_000)
    some = loader.explain(workers=2)
    assert not some.exact
    assert "extrapolated" in str(some)
    assert "about" in str(some)
    assert some.requests == pytest.approx(whole.requests, rel=0.5)
    assert some.bytes_fetched == pytest.approx(whole.bytes_fetched, rel=0.5)
    assert some.bytes_used == pytest.approx(whole.bytes_used, rel=0.5)  # of averages, which hold the headers of members
