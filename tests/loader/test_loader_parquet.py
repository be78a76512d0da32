"""Parquet files as datasets of row groups: only the columns wanted are fetched, in a plan that resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from s3loader import Loader, decode_row_group, from_parquet, open_dataset
from s3loader.errors import ConfigError, FormatError, ShardReadError
from s3loader.torch import S3DataLoader, S3IterableDataset

pa: Any = pytest.importorskip("pyarrow")
pq: Any = pytest.importorskip("pyarrow.parquet")
ROWS, GROUP, FILES = 100, 10, 3


def table(file: int) -> Any:
    numbers = range(file * ROWS, (file + 1) * ROWS)
    return pa.table(
        {
            "n": pa.array(numbers, pa.int64()),
            "name": [f"row {n % 7}" for n in numbers],
            "blob": [bytes([n % 251]) * 60_000 for n in numbers],
            "tags": [[n, n + 1] for n in numbers],
            "maybe": [None if n % 3 else n for n in numbers],
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in range(FILES):
        options: dict[str, Any] = {"compression": ["snappy", "zstd", "none"][file], "write_page_checksum": True}
        pq.write_table(table(file), tmp_path / f"part-{file}.parquet", row_group_size=GROUP, **options)
    return tmp_path


def rows(loader: Any, column: str = "n") -> list[Any]:
    return [value for batch in loader for group in batch for value in group[column].to_pylist()]


def test_row_groups_are_what_was_written(folder: Path) -> None:
    for _ in range(2):  # once an index is made, then it is found
        dataset = from_parquet(f"{folder}/*.parquet", sample="row_group")
        assert len(dataset) == FILES * ROWS // GROUP
        loader = Loader(dataset, batch_size=3, shuffle="none", tail="short", transform=decode_row_group)
        groups = [group for batch in loader for group in batch]
        assert pa.concat_tables(groups).equals(pa.concat_tables([table(file) for file in range(FILES)]))


def test_only_the_columns_wanted_are_fetched(folder: Path) -> None:
    dataset = open_dataset(f"{folder}/*.parquet", kind="parquet", sample="row_group", columns=["n", "tags.list.element"])
    loader = Loader(dataset, batch_size=2, shuffle="none", tail="short", transform=decode_row_group)
    groups = [group for batch in loader for group in batch]
    assert {tuple(group.column_names) for group in groups} == {("n", "tags")}
    assert pa.concat_tables(groups).equals(pa.concat_tables([table(file) for file in range(FILES)]).select(["n", "tags"]))
    stored = (folder / "part-2.parquet").stat().st_size  # of which the blobs are nearly all, uncompressed
    assert loader.stats.bytes_used < stored / 10
    assert loader.stats.bytes_fetched < sum(path.stat().st_size for path in folder.glob("*.parquet"))
    with pytest.raises(ConfigError, match="price"):
        from_parquet(f"{folder}/*.parquet", columns=["price"], sample="row_group")


def test_shuffled_sharded_and_resumed(folder: Path) -> None:
    url, wanted = f"{folder}/*.parquet", list(range(FILES * ROWS))
    options: dict[str, Any] = {"transform": decode_row_group, "seed": 5, "tail": "short"}
    dataset = from_parquet(url, columns=["n"], sample="row_group")
    ranks = [rows(Loader(dataset, batch_size=2, rank=rank, world_size=2, **options)) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == wanted
    assert ranks[0] != sorted(ranks[0])
    first = Loader(dataset, batch_size=2, **options)
    batches = iter(first)
    head = rows([next(batches) for _ in range(4)])
    second = Loader(dataset, batch_size=3, **options)
    second.load_state_dict(first.state_dict())
    assert sorted(head + rows(second)) == wanted
    torch = S3IterableDataset.from_parquet(url, columns=["n"], sample="row_group", batch_size=2, return_type="bytes", **options)
    assert sorted(rows(S3DataLoader(torch, num_workers=2))) == wanted


def test_damage_is_noticed(folder: Path) -> None:
    path = folder / "part-2.parquet"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(bytes([200]) * 5000) + 9] ^= 1
    path.write_bytes(flipped)
    dataset = from_parquet(f"{folder}/*.parquet", columns=["blob"], sample="row_group")
    with pytest.raises(FormatError, match="row group"):
        list(Loader(dataset, batch_size=2, shuffle="none", transform=decode_row_group))
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:-100] + whole[-90:]):
        path.write_bytes(damaged)
        with pytest.raises(ShardReadError):
            from_parquet(f"{folder}/*.parquet", sample="row_group")
    with pytest.raises(ConfigError, match="group"):
        open_dataset(f"{folder}/*.parquet", kind="parquet", group="webdataset")
