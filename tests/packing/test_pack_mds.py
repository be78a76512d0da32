"""MDS folders that MosaicML Streaming's own writer has written (`mds/README.md`), packed: every column comes back."""

from __future__ import annotations

import bz2
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from s3loader import ShardReadError, open_dataset, pack
from s3loader.errors import IntegrityError, ObjectNotFoundError
from s3loader.loader import Loader, from_mds

HERE = Path(__file__).with_name("mds")


def test_the_real_writer_is_read() -> None:
    samples = [
        sample for batch in Loader(from_mds(HERE / "plain"), batch_size=5, shuffle="none", tail="short") for sample in batch
    ]
    assert len(samples) == 12
    for i, sample in enumerate(samples):
        assert (sample["id"], sample["cls"], sample["score"], sample["text"]) == (i - 3, i % 3, i / 7, f"é {i}")
        assert (sample["meta"], sample["huge"], bytes(sample["blob"])) == ({"i": [i, None]}, 10**30 + i, bytes([i]) * i)
        np.testing.assert_array_equal(sample["vector"], np.full(4, i, np.float32))
        np.testing.assert_array_equal(sample["matrix"], np.arange(2 * i + 2, dtype=np.int16).reshape(2, -1))
        np.testing.assert_array_equal(sample["any"], np.arange(3 * i + 3, dtype=np.int32).reshape(3, -1))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_every_column_is_packed(tmp_path: Path, compression: Any) -> None:
    report = pack(HERE / "plain", str(tmp_path / "out"), shuffle=False, verify="full", compression=compression)
    assert report.samples == 12
    dataset = open_dataset(report.manifest, group="webdataset")
    samples = [
        sample for batch in Loader(dataset, batch_size=5, shuffle="none", tail="short", decode="auto") for sample in batch
    ]
    for i, sample in enumerate(samples):
        assert int(sample["cls"]) == i % 3
        assert (sample["id"], float(bytes(sample["score"]))) == (i - 3, i / 7)
        assert (bytes(sample["blob"]), int(bytes(sample["huge"]))) == (bytes([i]) * i, 10**30 + i)
        assert sample["meta.json"] == {"i": [i, None]}
        np.testing.assert_array_equal(sample["vector.npy"], np.full(4, i, np.float32))
        np.testing.assert_array_equal(sample["matrix.npy"], np.arange(2 * i + 2, dtype=np.int16).reshape(2, -1))
        assert sample["any.npy"].dtype == np.int32


def test_compressed_shards_are_packed_like_plain_ones(tmp_path: Path) -> None:
    """They cannot be read at random, which the loader says, and where to go."""
    with pytest.raises(ShardReadError, match="compressed") as caught:
        open_dataset(HERE / "gz")
    assert "s3loader pack" in str(caught.value.hint)
    found = []
    for name in ("plain", "gz"):
        report = pack(str(HERE / name), str(tmp_path / name), shuffle=False, verify="full")
        assert report.samples == 12
        dataset = open_dataset(report.manifest, group="webdataset")
        batches = Loader(dataset, batch_size=5, shuffle="none", tail="short")
        found.append(
            [{name: bytes(value) for name, value in s.items() if name != "__key__"} for batch in batches for s in batch]
        )
    assert found[0] == found[1]
    again = pack(str(HERE / "gz"), str(tmp_path / "gz"), shuffle=False)
    assert again.samples == 12


@pytest.mark.parametrize("name", ["zstd:3", "bz2"])
def test_other_compressions_of_theirs(tmp_path: Path, name: str) -> None:
    squeeze = {"zstd:3": zstandard.compress, "bz2": bz2.compress}[name]
    index = json.loads((HERE / "gz/index.json").read_text())
    for shard in index["shards"]:
        plain = (HERE / "plain" / shard["raw_data"]["basename"]).read_bytes()
        data = squeeze(plain)
        shard["compression"] = name
        shard["zip_data"] = {"basename": shard["raw_data"]["basename"] + ".z", "bytes": len(data), "hashes": {}}
        (tmp_path / shard["zip_data"]["basename"]).write_bytes(data)
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert pack(str(tmp_path), str(tmp_path / "out")).samples == 12


def _damage(folder: Path, how: str) -> None:
    path = folder / "shard.00000.mds.gz"
    data, index = path.read_bytes(), json.loads((folder / "index.json").read_text())
    entry = index["shards"][0]
    if how == "cut off":
        path.write_bytes(data[:-20])
    elif how == "cut off, and the index says so":
        path.write_bytes(data[:-20])
        entry["zip_data"]["bytes"] -= 20
    elif how == "another size inside":
        entry["raw_data"]["bytes"] += 1
    elif how == "missing":
        path.unlink()
    elif how == "unknown compression":
        entry["compression"] = "snappy"
    elif how == "half compressed":
        del entry["zip_data"], entry["compression"]
    elif how == "nonsense":
        entry["zip_data"] = {"basename": 3}
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("cut off", IntegrityError),
        ("cut off, and the index says so", ShardReadError),
        ("another size inside", IntegrityError),
        ("missing", ObjectNotFoundError),
        ("unknown compression", ShardReadError),
        ("half compressed", ShardReadError),
        ("nonsense", ShardReadError),
    ],
)
def test_a_compressed_folder_that_is_damaged(tmp_path: Path, how: str, error: type[Exception]) -> None:
    """A typed error, and nothing is published."""
    folder = tmp_path / "mds"
    shutil.copytree(HERE / "gz", folder)
    _damage(folder, how)
    with pytest.raises(error):
        pack(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out/manifest.jsonl").exists()


def test_an_array_under_a_name_that_is_no_array(tmp_path: Path) -> None:
    """Numbers of numpy are numbers; an array needs a name that says so."""
    report = pack([{"x": np.float32(0.5), "y": np.int16(3)}], str(tmp_path / "out"))
    (batch,) = Loader(open_dataset(report.manifest, group="webdataset"), batch_size=1)
    assert (bytes(batch[0]["x"]), bytes(batch[0]["y"])) == (b"0.5", b"3")
    with pytest.raises(Exception, match="cannot be ndarray"):
        pack([{"x": np.arange(3)}], str(tmp_path / "other"))
