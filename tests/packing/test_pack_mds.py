"""MDS folders that MosaicML Streaming's own writer has written (`mds/README.md`), packed: every column comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s3loader import ShardReadError, open_dataset, pack
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


def test_compressed_shards_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ShardReadError, match="compressed") as caught:
        pack(HERE / "gz", str(tmp_path / "out"))
    assert "compression=None" in str(caught.value.hint)
    assert not list(tmp_path.rglob("*.tar"))


def test_an_array_under_a_name_that_is_no_array(tmp_path: Path) -> None:
    """Numbers of numpy are numbers; an array needs a name that says so."""
    report = pack([{"x": np.float32(0.5), "y": np.int16(3)}], str(tmp_path / "out"))
    (batch,) = Loader(open_dataset(report.manifest, group="webdataset"), batch_size=1)
    assert (bytes(batch[0]["x"]), bytes(batch[0]["y"])) == (b"0.5", b"3")
    with pytest.raises(Exception, match="cannot be ndarray"):
        pack([{"x": np.arange(3)}], str(tmp_path / "other"))
