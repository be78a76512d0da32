"""Shards of ours in the hands of others: WebDataset, Hugging Face datasets, and the rules of Energon and litdata."""

from __future__ import annotations

import gc
import re
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import webdataset

from s3loader import open_store
from s3loader.errors import ConfigError
from s3loader.exchange import S3ExchangeStore, Shard, ShardSizePolicy
from s3loader.loader import open_dataset
from s3loader.shard import WEBDATASET_MANIFEST, build_index

SAMPLES = [(f"train/{i:03d}", {"txt": b"text %d" % i, "cls": b"%d" % (i % 10), "seg.bin": b"x" * i}) for i in range(20)]


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    store = S3ExchangeStore(open_store(f"file://{tmp_path}"))
    with store.open_manifest_writer(
        "m.jsonl", mode="overwrite", shard_size=ShardSizePolicy(max_samples=8), group="webdataset"
    ) as writer:
        for key, values in SAMPLES:
            writer.add_sample(key, values, meta={"key": key})
    return [str(path) for path in sorted((tmp_path / "shards").glob("*.tar"))]


def test_webdataset_reads_just_the_samples(shards: list[str]) -> None:
    assert len(shards) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        found = [
            (sample["__key__"], {name: value for name, value in sample.items() if name[:2] != "__"})
            for sample in webdataset.WebDataset(shards, shardshuffle=False)
        ]
        gc.collect()
    assert found == SAMPLES


def test_hugging_face_datasets_reads_just_the_samples(shards: list[str], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": shards}, split="train", streaming=True, cache_dir=str(tmp_path / "cache")
    )
    rows: list[Any] = [dict(row) for row in loaded]
    assert [row["__key__"] for row in rows] == [key for key, _ in SAMPLES]
    assert all({"txt", "cls", "seg.bin"} <= row.keys() for row in rows)


def test_the_rules_of_energon_and_litdata_give_just_the_samples(shards: list[str]) -> None:
    """Energon leaves out what matches one pattern and splits names by another; litdata's reader of raw files takes those with
    the extensions it is told."""
    skipped, split = re.compile(r"__[^/]*__($|/)"), re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
    energon: dict[str, list[str]] = {}
    litdata: list[str] = []
    for shard in shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                match = split.match(member.name)
                if member.isreg() and not skipped.match(member.name) and match is not None:
                    energon.setdefault(match.group(1), []).append(match.group(2))
                if member.isreg() and Path(member.name).suffix.lower() in (".txt", ".cls", ".bin"):
                    litdata.append(member.name)
    assert energon == {key: list(values) for key, values in SAMPLES}
    assert litdata == [f"{key}.{extension}" for key, values in SAMPLES for extension in values]


def test_we_read_them_too_with_and_without_their_manifest_and_index(shards: list[str], tmp_path: Path) -> None:
    assert len(open_dataset(f"file://{tmp_path}/m.jsonl", group="webdataset")) == 20
    assert len(open_dataset(f"file://{tmp_path}/m.jsonl")) == 60
    assert len(open_dataset(f"file://{tmp_path}/m.jsonl", where=lambda entry: entry["meta"]["key"] < "train/005")) == 15
    store = S3ExchangeStore(open_store(f"file://{tmp_path}"))
    (first, *_) = store.iter_manifest_entries("m.jsonl")
    assert first["internal_manifest_path"] == WEBDATASET_MANIFEST  # type: ignore[typeddict-item]
    assert [entry["id"] for _, entry in Shard.from_key(store, "shards/shard-000001.tar").iter_objects()] == [None] * 24
    for shard in shards:
        Path(f"{shard}.idx").unlink()
    assert [report.members for report in build_index(f"file://{tmp_path}/shards/")] == [24, 24, 12]
    assert len(open_dataset(f"file://{tmp_path}/shards/shard-00000{{1..3}}.tar")) == 60


def test_such_a_writer_refuses_what_would_be_torn(tmp_path: Path) -> None:
    store = S3ExchangeStore(open_store(f"file://{tmp_path}"))
    policy = ShardSizePolicy(max_samples=8)
    writer = store.open_manifest_writer("m.jsonl", shard_size=policy, group="webdataset")
    for name in ("a.jpg", "a.cls", "b.jpg"):
        writer.add_to_shard(name, b"x")
    for name in ("a.txt", "b.jpg"):
        with pytest.raises(ConfigError):
            writer.add_to_shard(name, b"x")
    writer.close()
    with pytest.raises(ConfigError, match="would be a sample"):
        store.open_manifest_writer("m.jsonl", group="webdataset", internal_manifest_path="manifest.jsonl")
    with pytest.raises(ConfigError, match="group"):
        store.open_manifest_writer("m.jsonl", group="wds")  # type: ignore[arg-type]
