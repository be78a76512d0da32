"""Datasets from MDS folders, written here byte by byte from the facts of the format."""

import json
import os
import pickle
import struct
from decimal import Decimal

import numpy as np
import pytest

from s3loader import open_store
from s3loader.errors import (
    ConfigError,
    FormatError,
    IntegrityError,
    ObjectChangedError,
    ObjectNotFoundError,
    S3LoaderError,
    ShardReadError,
)
from s3loader.loader import Loader, SampleReader, from_mds, open_dataset

JPEG = b"\xff\xd8 not looked into \xff\xd9"


def ints(count):
    return np.arange(count, dtype="<i4").reshape(3, -1)


def with_shape(values):
    return bytes([1 << 2 | 1]) + struct.pack("<H", len(values)) + values.tobytes()


def scalar(dtype):
    return lambda value: np.array(value, np.dtype(dtype).newbyteorder("<")).tobytes()


def text(value):
    return str(value).encode()


COLUMNS = {  # name: (encoding, size, encode, value of sample i)
    "array": ("ndarray", None, lambda v: bytes([33, 2 << 2, *v.shape]) + v.tobytes(), lambda i: ints(3 * i + 3)),
    "blob": ("bytes", None, bytes, lambda i: bytes([i]) * i),
    "count": ("int", 8, lambda v: v.to_bytes(8, "little", signed=True), lambda i: i - 3),
    "exact": ("str_decimal", None, text, lambda i: Decimal(i) / 4),
    "fixed": ("ndarray:float32:2,3", 24, lambda v: v.tobytes(), lambda i: np.full((2, 3), i, "<f4")),
    "huge": ("str_int", None, text, lambda i: 10**30 + i),
    "image": ("jpeg", None, bytes, lambda i: JPEG),
    "meta": ("json", None, lambda v: json.dumps(v).encode(), lambda i: {"i": [i, None]}),
    "name": ("str", None, text, lambda i: f"é{i}"),
    "typed": ("ndarray:uint16", None, with_shape, lambda i: np.arange(300 + i, dtype="<u2")),
    "wide": ("str_float", None, text, lambda i: i / 3),
    **{
        f"s_{kind}": (kind, np.dtype(kind).itemsize, scalar(kind), lambda i, kind=kind: np.dtype(kind).type(i))
        for kind in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
    },
}  # fmt: skip


def encoded(i, columns):
    bodies = [encode(value(i)) for _, _, encode, value in columns.values()]
    sizes = [len(body) for body, (_, size, _, _) in zip(bodies, columns.values(), strict=True) if size is None]
    return struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(bodies)


def write_mds(folder, counts, columns=COLUMNS):
    """The folder of an MDS dataset with so many samples per shard."""
    folder.mkdir(exist_ok=True)
    shards, first = [], 0
    for number, count in enumerate(counts):
        samples = [encoded(i, columns) for i in range(first, first + count)]
        first += count
        config = json.dumps({"format": "mds"}).encode()
        begin = 4 * (count + 2) + len(config)
        offsets = np.cumsum([begin, *map(len, samples)])
        data = struct.pack(f"<{count + 2}I", count, *offsets) + config + b"".join(samples)
        name = f"shard.{number:05d}.mds"
        (folder / name).write_bytes(data)
        names, (encodings, sizes, *_) = list(columns), zip(*columns.values(), strict=True)
        shards.append(
            {"format": "mds", "samples": count, "column_names": names, "column_encodings": encodings, "column_sizes": sizes}
            | {"raw_data": {"basename": name, "bytes": len(data), "hashes": {}}, "zip_data": None, "compression": None}
        )
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    return folder


SMALL = {name: COLUMNS[name] for name in ("count", "name", "blob")}


@pytest.fixture
def folder(tmp_path):
    return write_mds(tmp_path / "mds", [5, 1, 6], SMALL)


def edit_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def damage(folder, at, new, name="shard.00000.mds"):
    data = bytearray((folder / name).read_bytes())
    data[at : at + len(new)] = new
    (folder / name).write_bytes(data)


def keys(batches):
    return [sample["__key__"] for batch in batches for sample in batch]


# -- what comes out -------------------------------------------------------------------------------


def test_every_encoding_comes_back(tmp_path):
    dataset = from_mds(str(write_mds(tmp_path / "mds", [4, 3])))
    samples = [sample for batch in Loader(dataset, batch_size=3, shuffle="none") for sample in batch]
    assert [sample.pop("__key__") for sample in samples] == [str(i) for i in range(7)]
    for i, sample in enumerate(samples):
        assert list(sample) == list(COLUMNS)
        for name, (encoding, _, _, value) in COLUMNS.items():
            expected, found = value(i), sample[name]
            if encoding in ("bytes", "jpeg"):
                assert type(found) is memoryview
                assert found == expected
            elif isinstance(expected, np.ndarray):
                assert found.dtype == expected.dtype
                assert np.array_equal(found, expected)
            else:
                assert type(found) is type(expected)
                assert found == expected


def test_decode_sees_only_what_is_still_encoded(folder):
    reader = SampleReader(from_mds(str(folder)), decode={"blob": bytes, "name": "int"})
    reader = pickle.loads(pickle.dumps(reader))
    assert reader[7] == {"__key__": "7", "count": 4, "name": "é7", "blob": b"\x07" * 7}
    assert type(reader[7]["blob"]) is bytes


def test_the_url_may_name_the_index_or_a_prefix_of_an_open_store(folder):
    dataset = from_mds("mds/", store=open_store(folder.parent.as_uri()))
    assert len(dataset) == len(from_mds(str(folder / "index.json"))) == 12
    assert dataset.keys(np.array([0, 5, 11])) == [f"mds/shard.0000{s}.mds#{n}" for s, n in ((0, 0), (1, 5), (2, 11))]
    assert dataset.find("mds/shard.00002.mds#11") == 11


@pytest.mark.parametrize("end", ["", "/", "/index.json"])
def test_open_dataset_sees_what_it_is(folder, end):
    for found in (
        open_dataset(f"{folder}{end}"),
        open_dataset(folder.as_uri() + end),
        open_dataset(folder.name + end, store=open_store(folder.parent.as_uri())),
    ):
        assert len(found) == len(from_mds(str(folder)))
        assert set(next(iter(Loader(found, batch_size=1)))[0]) == {"__key__", *SMALL}
    with pytest.raises(ConfigError, match="MDS shards"):
        open_dataset(f"{folder}{end}", group="webdataset")


@pytest.mark.parametrize(
    "text", ["{}", "[]", "3", "not json", '{"version": 2, "chunks": []}', '{"version": 2, "shards": [{}]}']
)
def test_a_folder_with_another_index_is_loose_objects(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    (tmp_path / "a.bin").write_bytes(b"x")
    assert len(open_dataset(str(tmp_path))) == 2


def test_a_run_is_resumed_exactly_on_other_ranks(folder):
    dataset = from_mds(str(folder))
    whole = keys(Loader(dataset, batch_size=2, seed=5))
    assert sorted(whole, key=int) == [str(i) for i in range(12)]
    assert whole != sorted(whole, key=int)
    loader = Loader(dataset, batch_size=2, seed=5)
    batches = iter(loader)
    begun = keys([next(batches), next(batches)])
    ranks = [Loader(from_mds(str(folder)), batch_size=2, seed=5, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(loader.state_dict())
    rest = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert begun + keys(rest) == whole


def test_an_empty_dataset_is_empty(tmp_path):
    assert len(from_mds(str(write_mds(tmp_path / "mds", [])))) == 0


# -- what is refused ------------------------------------------------------------------------------


def test_pickled_columns_are_refused_by_name(tmp_path):
    columns = {**SMALL, "evil": ("pkl", None, pickle.dumps, lambda i: i)}
    with pytest.raises(ShardReadError, match="'evil' is pickled") as caught:
        from_mds(str(write_mds(tmp_path / "mds", [1], columns)))
    assert caught.value.column == "evil"
    assert "json" in caught.value.hint


def test_compressed_shards_are_refused(folder):
    zipped = {"compression": "zstd:3", "zip_data": {"basename": "shard.00000.mds.zstd", "bytes": 9, "hashes": {}}}
    edit_index(folder, lambda index: index["shards"][0].update(zipped))
    with pytest.raises(ShardReadError, match="compressed") as caught:
        from_mds(str(folder))
    assert "compression=None" in caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(version=3),
        lambda index: index.update(shards=None),
        lambda index: index.pop("shards"),
        lambda index: index["shards"].append("shard"),
        lambda index: index["shards"][1].update(format="jsonl"),
        lambda index: index["shards"][1].update(raw_data=None),
        lambda index: index["shards"][1].update(samples="1"),
        lambda index: index["shards"][1].update(samples=10**6),
        lambda index: index["shards"][1].update(column_sizes=[8, None]),
        lambda index: index["shards"][1].update(column_sizes=[4, None, None]),
        lambda index: index["shards"][1].update(column_names=["a", "a", "b"]),
        lambda index: index["shards"][1].update(column_encodings=["int", "str", "ndarray:object"]),
        lambda index: index["shards"][1].update(column_encodings=["int", "str", "ndarray:int8:x"]),
    ],
)
def test_an_index_that_is_not_understood_is_a_typed_error(folder, change):
    edit_index(folder, change)
    with pytest.raises(ShardReadError) as caught:
        from_mds(str(folder))
    assert caught.value.url.startswith("file://")


def test_missing_and_truncated_files_are_found_before_the_first_sample(folder):
    path = folder / "shard.00001.mds"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"shard\.00001\.mds: it has \d+ bytes, the dataset's index says"):
        from_mds(str(folder))
    path.unlink()
    with pytest.raises(ObjectNotFoundError, match=r"shard\.00001\.mds"):
        from_mds(str(folder))
    (folder / "index.json").write_text("{")
    with pytest.raises(ShardReadError, match="not the index"):
        from_mds(str(folder))
    (folder / "index.json").unlink()
    with pytest.raises(ObjectNotFoundError):
        from_mds(str(folder))


@pytest.mark.parametrize(
    ("at", "new"),
    [
        (0, struct.pack("<I", 4)),  # number of samples
        (4, struct.pack("<I", 3)),  # an offset inside the offsets
        (12, struct.pack("<I", 1 << 31)),  # beyond the file
        (24, struct.pack("<I", 60)),  # the end
    ],
)
def test_bad_offsets_fail_their_own_shard_only(folder, at, new):
    damage(folder, at, new)
    dataset = from_mds(str(folder))
    with pytest.raises(ShardReadError, match=r"shard\.00000\.mds"):
        list(Loader(dataset, batch_size=4, shuffle="none"))
    lenient = Loader(dataset, batch_size=4, shuffle="none", on_error="skip")
    assert keys(lenient) == [str(i) for i in range(5, 12)]


def test_a_damaged_sample_is_named_and_the_others_come(folder):
    offset = struct.unpack_from("<I", (folder / "shard.00000.mds").read_bytes(), 4 + 4 * 2)[0]
    damage(folder, offset, struct.pack("<I", 99))  # the size of its name
    last = struct.unpack_from("<I", (folder / "shard.00000.mds").read_bytes(), 4 + 4 * 4)[0]
    damage(folder, last + 16, b"\xff")  # no UTF-8
    dataset = from_mds(str(folder))
    with pytest.raises(IntegrityError, match="its columns take") as caught:
        list(Loader(dataset, batch_size=4, shuffle="none"))
    assert caught.value.member == "2"
    assert caught.value.shard == "shard.00000.mds"
    lenient = Loader(dataset, batch_size=4, shuffle="none", on_error="skip")
    assert keys(lenient) == [str(i) for i in range(12) if i not in (2, 4)]
    assert [entry.sample for entry in lenient.quarantine] == [2, 4]
    with pytest.raises(FormatError, match="'name' does not follow its encoding") as second:
        SampleReader(dataset)[4]
    assert second.value.column == "name"


def test_a_shard_that_is_replaced_meanwhile_is_never_mixed(folder):
    dataset = from_mds(str(folder))
    path = folder / "shard.00001.mds"
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)
    with pytest.raises(ObjectChangedError):
        SampleReader(dataset)[5]
    assert SampleReader(dataset)[6]["count"] == 3


@pytest.mark.parametrize("body", [b"", b"\x07", b"\x21", b"\x21\x05\x02\x00", b"\x21\x04\x02\x00"])
def test_arrays_that_do_not_fit_are_errors_not_crashes(tmp_path, body):
    columns = {"array": ("ndarray", None, lambda _: body, lambda i: i)}
    dataset = from_mds(str(write_mds(tmp_path / "mds", [1], columns)))
    with pytest.raises(S3LoaderError, match="'array' does not follow"):
        SampleReader(dataset)[0]
