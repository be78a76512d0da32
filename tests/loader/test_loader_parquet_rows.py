"""Rows of Parquet files as samples: each once, in an order that resumes anywhere, each row group fetched once."""

from __future__ import annotations

import datetime
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s3loader import (
    ConfigError,
    FormatError,
    IntegrityError,
    Loader,
    S3LoaderError,
    ShardReadError,
    from_parquet,
    mix_datasets,
    open_dataset,
    open_store,
)
from s3loader.events import OpEvent, subscribe
from s3loader.testing import server
from s3loader.torch import S3DataLoader, S3IterableDataset, S3MapDataset

pa: Any = pytest.importorskip("pyarrow")
pq: Any = pytest.importorskip("pyarrow.parquet")
ROWS = (105, 64, 131)
GROUP = 16
TOTAL = sum(ROWS)


def table(file: int) -> Any:
    first = sum(ROWS[:file])
    numbers = range(first, first + ROWS[file])
    return pa.table(
        {
            "n": pa.array(numbers, pa.int64()),
            "name": [f"row {n}" for n in numbers],
            "blob": [bytes([n % 251]) * (400 + n) for n in numbers],
            "tags": [[n, n + 1] for n in numbers],
            "maybe": pa.array([None if n % 3 else n for n in numbers], pa.int32()),
            "x": pa.array([n / 4 for n in numbers], pa.float32()),
            "when": [datetime.date(2020, 1, 1) + datetime.timedelta(days=n) for n in numbers],
            "deep": [{"a": n, "b": [str(n)]} for n in numbers],
            "kind": pa.array([str(n % 3) for n in numbers]).dictionary_encode(),
            "flag": [n % 2 == 0 for n in numbers],
        }
    )


def write(folder: Path) -> Path:
    for file in range(len(ROWS)):
        options: dict[str, Any] = {"compression": ["snappy", "zstd", "none"][file], "write_page_checksum": True}
        pq.write_table(table(file), folder / f"part-{file}.parquet", row_group_size=GROUP, **options)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path)


def numbers(batches: Any) -> list[int]:
    return [int(sample["n"]) for batch in batches for sample in batch]


@pytest.fixture
def events() -> Iterator[list[OpEvent]]:
    """Requests while the test runs."""
    seen: list[OpEvent] = []
    stop = subscribe(seen.append)
    yield seen
    stop()


def test_rows_are_what_was_written(folder: Path) -> None:
    dataset = from_parquet(f"{folder}/*.parquet")
    assert len(dataset) == TOTAL
    assert not list(folder.glob("*.idx"))
    found = [sample for batch in Loader(dataset, batch_size=7, shuffle="none", tail="short") for sample in batch]
    wanted = pa.concat_tables([table(file).cast(table(0).schema) for file in range(3)]).to_pylist()
    for n, (row, plain) in enumerate(zip(found, wanted, strict=True)):
        file = int(np.searchsorted(np.cumsum(ROWS), n, side="right"))
        assert row.pop("__key__") == f"{n - sum(ROWS[:file]):09d}"
        assert (row["n"].dtype, row["x"].dtype) == (np.dtype("int64"), np.dtype("float32"))
        assert isinstance(row["blob"], memoryview)
        assert row["tags"].dtype == np.int64
        assert row["maybe"] is None or row["maybe"].dtype == np.int32
        assert {**row, "blob": bytes(row["blob"]), "tags": row["tags"].tolist()} == plain


def test_batches_come_in_columns(folder: Path) -> None:
    dataset = from_parquet(f"{folder}/*.parquet", columns=["x", "tags", "name"])
    batch = next(iter(Loader(dataset, batch_size=8, shuffle="none", collate="fixed")))
    assert batch.keys() == {"__key__", "x", "tags", "name"}
    assert (batch["x"].dtype, batch["x"].shape, batch["tags"].shape) == (np.dtype("float32"), (8,), (8, 2))
    assert batch["x"].tolist() == [n / 4 for n in range(8)]
    assert list(batch["name"]) == [f"row {n}" for n in range(8)]
    decoded = Loader(from_parquet(f"{folder}/*.parquet", columns="blob"), batch_size=4, shuffle="none", decode={"blob": len})
    assert [sample["blob"] for sample in next(iter(decoded))] == [400, 401, 402, 403]


@pytest.mark.parametrize("shuffle", ["block", "shard", "none", "full"])
def test_every_row_once_on_any_topology_and_resumed_anywhere(folder: Path, shuffle: Any) -> None:
    dataset = from_parquet(f"{folder}/*.parquet", columns=["n"])
    options: dict[str, Any] = {"shuffle": shuffle, "seed": 5, "tail": "short", "order": None}
    alone = numbers(Loader(dataset, batch_size=4, **options))
    assert sorted(alone) == list(range(TOTAL))
    assert (alone == sorted(alone)) is (shuffle == "none")
    if shuffle == "block":
        options["order"] = {"lanes": 8, "chunk": 4, "window": 2}
        alone = numbers(Loader(dataset, batch_size=4, **options))
    second = Loader(dataset, batch_size=4, epoch=1, **options)
    assert shuffle == "none" or numbers(second) != alone
    ranks = [numbers(Loader(dataset, batch_size=4, rank=rank, world_size=2, **options)) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == list(range(TOTAL))
    assert ranks[0][:4] + ranks[1][:4] == alone[:8]
    for stop in (1, 9, 40, 74):
        first = Loader(dataset, batch_size=4, **options)
        batches = iter(first)
        head = numbers(next(batches) for _ in range(stop))
        state = first.state_dict()
        after = Loader(from_parquet(f"{folder}/*.parquet", columns=["n"]), batch_size=3, **options)
        after.load_state_dict(state)
        assert head + numbers(after) == alone


def test_requests(folder: Path, events: list[OpEvent]) -> None:
    """A cold file: its footer with one request, each row group with one, whichever rows come when."""
    store = open_store(folder)
    groups = sum(-(-rows // GROUP) for rows in ROWS)

    def reads() -> Counter[str]:
        found = Counter(event.url.rpartition("/")[2] for event in events if event.op.lower().startswith(("get", "read")))
        events.clear()
        return found

    dataset = from_parquet("*.parquet", store=store)
    assert reads() == {f"part-{file}.parquet": 1 for file in range(3)}
    for shuffle in ("none", "block", "shard"):
        loader = Loader(dataset, batch_size=4, shuffle=shuffle, seed=1)
        assert sorted(numbers(loader)) == list(range(TOTAL))
        assert loader.stats.requests == groups  # and no footer again
        assert sum(reads().values()) == groups
        assert loader.explain().requests == groups
        assert loader.explain().amplification < 1.3
    twin = pickle.loads(pickle.dumps(dataset))  # as a worker process has it
    again = Loader(twin, batch_size=4, seed=1)
    assert len(numbers(again)) == TOTAL
    assert again.stats.requests == groups
    assert sum(reads().values()) == groups + 3  # each footer once more, of which the first process's order needs none
    assert len(numbers(again)) == TOTAL
    assert sum(reads().values()) == groups


def test_only_the_columns_wanted_are_fetched(folder: Path) -> None:
    dataset = open_dataset(f"{folder}/*.parquet", kind="parquet", columns=["n", "tags"])
    loader = Loader(dataset, batch_size=8, tail="short")
    samples = [sample for batch in loader for sample in batch]
    assert all(sample.keys() == {"__key__", "n", "tags"} for sample in samples)
    stored = sum(path.stat().st_size for path in folder.glob("*.parquet"))
    assert loader.stats.bytes_used < stored / 4
    path = from_parquet(f"{folder}/*.parquet", columns="tags.list.element")
    assert next(iter(Loader(path, batch_size=1, shuffle="none")))[0]["tags"].tolist() == [0, 1]
    for wrong in (["price"], []):
        with pytest.raises(ConfigError):
            from_parquet(f"{folder}/*.parquet", columns=wrong)
    with pytest.raises(ConfigError, match="columns="):
        open_dataset(f"{folder}/*.parquet", kind="parquet", members=["n"])
    with pytest.raises(ConfigError, match="parquet"):
        open_dataset(folder, columns=["n"])


def test_in_workers_by_number_in_slices_and_mixed(folder: Path) -> None:
    url = f"{folder}/*.parquet"
    torch = S3IterableDataset.from_parquet(url, columns=["n"], batch_size=5, seed=2, tail="short", return_type="bytes")
    assert sorted(numbers(S3DataLoader(torch, num_workers=2))) == list(range(TOTAL))
    by_number = S3MapDataset.from_parquet(url, columns=["n"], return_type="bytes")
    assert [int(by_number[n]["n"]) for n in (0, 104, 105, TOTAL - 1, -1)] == [0, 104, 105, TOTAL - 1, TOTAL - 1]
    dataset = from_parquet(url, columns=["n"])
    part = dataset.slice(20, 180)
    assert numbers(Loader(part, batch_size=4, shuffle="none", tail="short")) == list(range(20, 180))
    assert sorted(numbers(Loader(part, batch_size=4, seed=3, tail="short"))) == list(range(20, 180))
    assert part.find(f"{part.parts[0].key}#{25:09d}") == 5
    assert dataset.find(f"{dataset.parts[1].key}#{3:09d}") == 108
    mixed = mix_datasets([dataset.of_parts(0, 1), dataset.of_parts(1, 3)], weights=[0.5, 0.5])
    some = numbers(Loader(mixed, batch_size=4, seed=1))
    assert len([n for n in some[:40] if n < 105]) == 20
    loader = Loader(dataset, batch_size=4, seed=3)
    batch = next(loader.iter_batches())
    for sample, place in zip(batch.data, batch.places(), strict=True):
        file = int(np.searchsorted(np.cumsum(ROWS), int(sample["n"]), side="right"))
        assert place.key == f"{dataset.parts[file].key}#{int(sample['n']) - sum(ROWS[:file]):09d}"
        assert place.sample == sample["n"]
        assert 0 < place.offset < place.offset + place.length <= (folder / f"part-{file}.parquet").stat().st_size
        assert loader.where(place.position).key == place.key


def test_larger_than_the_memory_is_read_again_and_still_right(folder: Path) -> None:
    dataset = from_parquet(f"{folder}/*.parquet")
    for shuffle in ("block", "full"):
        options: dict[str, Any] = {"shuffle": shuffle, "seed": 2, "tail": "short"}
        loader = Loader(dataset, batch_size=8, memory_limit="64KiB", prefetch="32KiB", **options)
        assert numbers(loader) == numbers(Loader(dataset, batch_size=8, **options))
        assert sorted(numbers(loader)) == list(range(TOTAL))


def test_damage_is_noticed(folder: Path) -> None:
    path = folder / "part-2.parquet"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(bytes([200]) * 500) + 9] ^= 1
    path.write_bytes(flipped)
    url = f"{folder}/*.parquet"
    with pytest.raises(FormatError, match=r"row group.*part-2\.parquet"):
        list(Loader(from_parquet(url, columns=["blob"]), batch_size=2, shuffle="none"))
    skipping = Loader(from_parquet(url), batch_size=2, shuffle="none", on_error="skip", tail="short")
    assert len(numbers(skipping)) == TOTAL - GROUP
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:-100] + whole[-90:], b""):
        path.write_bytes(damaged)
        with pytest.raises(ShardReadError, match=r"part-2\.parquet"):
            from_parquet(url)
    path.write_bytes(whole)
    dataset = pickle.loads(pickle.dumps(from_parquet(url)))
    pq.write_table(table(2), path, row_group_size=GROUP + 1)  # replaced meanwhile
    with pytest.raises(S3LoaderError):
        list(Loader(dataset, batch_size=2, shuffle="none"))
    assert issubclass(IntegrityError, S3LoaderError)


def test_a_copy_goes_on_with_the_state(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("copy")
    for path in folder.glob("*.parquet"):
        (copy / path.name).write_bytes(path.read_bytes())
    here, there = (from_parquet("*.parquet", store=open_store(place)) for place in (folder, copy))
    first = Loader(here, batch_size=4, seed=1)
    batches = iter(first)
    head = numbers(next(batches) for _ in range(5))
    after = Loader(there, batch_size=4, seed=1)
    after.load_state_dict(first.state_dict())
    assert head + numbers(after) == numbers(Loader(here, batch_size=4, seed=1))


@pytest.mark.parametrize("kind", ["moto", "ministack"])
def test_a_cold_file_costs_a_tail_and_its_ranges(kind: Any, events: list[OpEvent]) -> None:
    with server(kind) as running, running.open_store(running.bucket("rows")) as store:
        sinks = [pa.BufferOutputStream() for _ in ROWS]
        for file, sink in enumerate(sinks):
            pq.write_table(table(file), sink, row_group_size=1000)  # one row group
            store.put(f"t/part-{file}.parquet", sink.getvalue().to_pybytes())
        events.clear()
        dataset = from_parquet("t/*.parquet", store=store, columns=["n", "name"])
        assert sorted(numbers(Loader(dataset, batch_size=8, seed=1, tail="short"))) == list(range(TOTAL))
        asked = Counter(event.url.rpartition("/")[2] for event in events if event.op != "LIST")
        assert asked == {f"part-{file}.parquet": 2 for file in range(3)}


def test_a_footer_larger_than_the_first_look(tmp_path: Path) -> None:
    wide = pa.table({f"a rather long name of a column, number {n}": [n, n + 1] for n in range(1500)})
    pq.write_table(wide, tmp_path / "wide.parquet")
    dataset = from_parquet(tmp_path / "wide.parquet")
    assert dataset.parts[0].footer > 64 << 10
    ((first, second),) = Loader(dataset, batch_size=2, shuffle="none")
    assert [first.pop("__key__"), second.pop("__key__")] == ["000000000", "000000001"]
    assert list(first.values()) == list(range(1500))
    assert len(second) == 1500


def test_files_without_rows(tmp_path: Path) -> None:
    for name, count in (("a", 0), ("b", 5), ("c", 0)):
        pq.write_table(pa.table({"n": pa.array(range(count), pa.int64())}), tmp_path / f"{name}.parquet")
    for shuffle in ("none", "block"):
        loader = Loader(from_parquet(f"{tmp_path}/*.parquet"), batch_size=2, shuffle=shuffle, tail="short")
        assert sorted(numbers(loader)) == list(range(5))
    assert len(from_parquet(tmp_path / "a.parquet")) == 0
