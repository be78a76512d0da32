"""MDS folders: a damaged index.json or shard gives samples that parse, or an error that says where."""

from __future__ import annotations

import json
import random
import struct
import uuid
from typing import Any

from fuzzing import run_fuzz
from mutating import JSON

from s3loader import open_store
from s3loader.loader import Loader, open_dataset

COLUMNS = {"n": ("int", 8), "x": ("float32", 4), "text": ("str", None), "data": ("json", None), "a": ("ndarray", None)}
ROWS = 5


def _row(i: int) -> bytes:
    columns = {
        "n": struct.pack("<q", i),
        "x": struct.pack("<f", i / 2),
        "text": f"text {i}".encode(),
        "data": json.dumps({"label": i}).encode(),
        "a": struct.pack("<BBB2H", 17, 4, 2, i, i),
    }
    told = [len(columns[name]) for name, (_, size) in COLUMNS.items() if size is None]
    return struct.pack(f"<{len(told)}I", *told) + b"".join(columns[name] for name in COLUMNS)


def _shard() -> bytes:
    rows = [_row(i) for i in range(ROWS)]
    config = b'{"version":2}'
    at = 4 * (ROWS + 2) + len(config)
    offsets = [at + sum(map(len, rows[:i])) for i in range(ROWS + 1)]
    return struct.pack(f"<{ROWS + 2}I", ROWS, *offsets) + config + b"".join(rows)


def _index() -> bytes:
    shard = {
        "column_encodings": [encoding for encoding, _ in COLUMNS.values()],
        "column_names": list(COLUMNS),
        "column_sizes": [size for _, size in COLUMNS.values()],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "raw_data": {"basename": "shard.00000.mds", "bytes": len(_shard()), "hashes": {}},
        "samples": ROWS,
        "size_limit": 1 << 26,
        "version": 2,
        "zip_data": None,
    }
    return json.dumps({"shards": [shard], "version": 2}).encode()


def _read(index: bytes, shard: bytes) -> list[Any]:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.put("d/index.json", index)
    store.put("d/shard.00000.mds", shard)
    dataset = open_dataset("d/", store=store)
    if len(dataset) == 0:
        return []
    return [sample for batch in Loader(dataset, batch_size=2, shuffle="none") for sample in batch]


def test_the_folder_is_read() -> None:
    assert [(s["n"], s["text"], s["data"]["label"]) for s in _read(_index(), _shard())] == [
        (i, f"text {i}", i) for i in range(ROWS)
    ]


def test_index_json() -> None:
    """A damaged index is never taken for a sample, nor its shards, as long as one can see what it was."""

    def read(data: bytes) -> None:
        for sample in _read(data, _shard()):
            assert isinstance(sample, dict) or b'"column_encodings"' not in data

    run_fuzz("mds index", lambda _: _index(), read, structure=JSON)


def test_shards() -> None:
    run_fuzz("mds shard", lambda _: _shard(), lambda data: _read(_index(), data), where="d/shard.00000.mds")


def test_both() -> None:
    """One damaged byte in a field that the other side vouches for."""

    def make(rng: random.Random) -> bytes:
        return struct.pack("<I", len(_index())) + _index() + _shard()

    def read(data: bytes) -> None:
        cut = 4 + min(struct.unpack_from("<I", data.ljust(4, b"\0"))[0], len(data))
        _read(data[4:cut], data[cut:])

    run_fuzz("mds both", make, read)
