"""s3dlio's datasets, loaders and writers without a framework: every object once, in the order asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from typing import Any

import pytest
import zstandard

from s3loader.checksum import crc32c
from s3loader.compat import s3dlio as s3
from s3loader.errors import ConfigError, IntegrityError, ObjectNotFoundError, S3LoaderError, UnsupportedOperationError

PLACES = pytest.mark.parametrize("place", ["memory", "file", "moto"], indirect=True)
OBJECTS = {f"f{i}": bytes([i]) * (10 + i) for i in range(7)} | {"sub/g": b"g"}


def filled(place: str) -> str:
    folder = f"{place}/ds/"
    s3.put_many([(folder + key, data) for key, data in OBJECTS.items()])
    return folder


def gathered(loader: AsyncIterable[Any]) -> list[Any]:
    async def gather() -> list[Any]:
        return [batch async for batch in loader]

    return asyncio.run(gather())


@PLACES
def test_a_dataset(place: str) -> None:
    folder = filled(place)
    dataset = s3.create_dataset(folder)
    assert len(dataset) == len(OBJECTS)
    assert dataset.keys() == list(OBJECTS)
    assert dataset.uris() == [folder + key for key in OBJECTS]
    assert s3.PyS3Dataset(folder.removesuffix("/")).uris() == dataset.uris()
    assert [asyncio.run(dataset.get_item(i)) for i in range(len(dataset))] == list(OBJECTS.values())
    with pytest.raises(IndexError):
        asyncio.run(dataset.get_item(len(dataset)))
    one = s3.create_dataset(f"{folder}f3")
    assert (one.keys(), one.uris()) == (["f3"], [f"{folder}f3"])
    some = s3.PyDataset.from_uris([f"{folder}f5", f"{folder}f1", f"{folder}f5"])
    assert some.keys() == some.uris() == [f"{folder}f5", f"{folder}f1", f"{folder}f5"]
    assert list(s3.PyBytesAsyncDataLoader(some)) == [OBJECTS["f5"], OBJECTS["f1"], OBJECTS["f5"]]
    with pytest.raises(ObjectNotFoundError):
        s3.create_dataset(f"{place}/none/")
    with pytest.raises(ConfigError):
        s3.PyDataset.from_uris([])


@PLACES
def test_a_loader_gives_each_object_once(place: str) -> None:
    folder = filled(place)
    data = list(OBJECTS.values())
    assert gathered(s3.create_async_loader(folder)) == [[one] for one in data]
    assert list(s3.create_async_loader(folder, {"prefetch": 3})) == data
    assert gathered(s3.PyS3AsyncDataLoader(folder)) == [data]
    loader = s3.create_async_loader(folder, {"batch_size": 3, "drop_last": True})
    assert gathered(loader) == [data[:3], data[3:6]]
    assert [len(batch) for batch in gathered(s3.create_async_loader(folder, {"batch_size": 3}))] == [3, 3, 2]
    items = s3.create_async_loader(folder).items()
    first = items.collect_batch(3)
    assert [(item.uri, bytes(item), item.byte_count, len(item)) for item in first] == [
        (folder + key, OBJECTS[key], len(OBJECTS[key]), len(OBJECTS[key])) for key in list(OBJECTS)[:3]
    ]
    assert items.collect_batch(0) == []
    assert [item.data for item in items] == data[3:]
    assert items.collect_batch(2) == []


def test_order_and_shares(place: str) -> None:
    folder = filled(place)
    options = {"batch_size": 2, "shuffle": True, "seed": 4}
    loader = s3.create_async_loader(folder, options)
    epochs = [[one for batch in gathered(loader) for one in batch] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(OBJECTS.values())
    assert epochs[0] != epochs[1]
    assert list(s3.create_async_loader(folder, options)) == epochs[0]
    shares = [list(s3.create_async_loader(folder, {**options, "shard_rank": rank, "shard_world_size": 3})) for rank in range(3)]
    assert sorted(one for share in shares for one in share) == sorted(OBJECTS.values())
    numbers = s3.PyVecDataset([5, 6, 7, 8, 9])
    assert (len(numbers), numbers[2], list(numbers)) == (5, 7, [5, 6, 7, 8, 9])
    assert gathered(s3.PyAsyncDataLoader(numbers, {"batch_size": 2})) == [[5, 6], [7, 8], [9]]
    assert gathered(s3.PyAsyncDataLoader(numbers, {"batch_size": 2, "drop_last": True})) == [[5, 6], [7, 8]]
    assert sorted(n for batch in gathered(s3.PyAsyncDataLoader(numbers, options)) for n in batch) == [5, 6, 7, 8, 9]


def test_mistakes_and_errors(place: str) -> None:
    folder = filled(place)
    for options in ({"batch_size": 0}, {"batch_size": "x"}, {"prefetch": -1}, {"shard_rank": 2, "shard_world_size": 2}):
        with pytest.raises(ConfigError):
            s3.create_async_loader(folder, options)
    with pytest.raises(UnsupportedOperationError, match="parquet"):
        s3.create_async_loader(folder, {"format": "parquet"})
    with pytest.warns(UserWarning, match="nope"):
        s3.create_async_loader(folder, {"nope": 1})
    with pytest.warns(UserWarning, match="means nothing here"):
        s3.create_async_loader(folder, {"num_workers": 4})
    with pytest.raises(TypeError):
        s3.PyVecDataset(["a"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="PyBytesAsyncDataLoader"):
        s3.PyAsyncDataLoader(s3.create_dataset(folder))
    loader = s3.create_async_loader(folder)
    s3.delete(f"{folder}f4")
    with pytest.raises(FileNotFoundError):
        gathered(loader)
    with pytest.raises(FileNotFoundError):
        list(loader)


def test_leaving_early_leaves_nothing(place: str) -> None:
    folder = filled(place)

    async def some() -> list[bytes]:
        found = []
        async for batch in s3.create_async_loader(folder, {"batch_size": 2}):
            found.append(batch)
            if len(found) == 2:
                break
        return [one for batch in found for one in batch]

    assert asyncio.run(some()) == list(OBJECTS.values())[:4]


@PLACES
def test_a_writer(place: str) -> None:
    uri = f"{place}/w/object"
    writer = s3.create_s3_writer(uri)
    piece = bytearray(b"hello")
    writer.write_chunk(piece)
    piece[:] = b"later"  # it was taken when write_chunk returned
    writer.write_owned_bytes(memoryview(b" and on"), copy=True)
    assert not s3.exists(uri)
    assert (writer.bytes_written(), writer.compressed_bytes()) == (12, 0)
    assert writer.finalize() == (12, 0)
    assert s3.get(uri) == b"hello and on"
    assert writer.checksum() == f"crc32c:{crc32c(b'hello and on'):08x}"
    with pytest.raises(S3LoaderError):
        writer.write_chunk(b"more")
    options = s3.PyWriterOptions()
    options.with_compression("zstd", 5)
    options.with_buffer_size(1 << 20)
    packed = s3.create_s3_writer(f"{uri}.zst", options)
    for _ in range(20):
        packed.write_chunk(b"x" * 50_000)
    written, stored = packed.finalize()
    assert (written, stored) == (1_000_000, len(s3.get(f"{uri}.zst")))
    with zstandard.ZstdDecompressor().stream_reader(s3.get(f"{uri}.zst"), read_across_frames=True) as reader:
        assert reader.read() == b"x" * 1_000_000
    assert packed.checksum() == f"crc32c:{crc32c(b'x' * 1_000_000):08x}"
    options.with_compression("none")
    assert options.compression is None
    with pytest.raises(ConfigError):
        options.with_compression("gzip")
    del packed
    lost = s3.create_s3_writer(f"{uri}.lost")
    del lost
    assert not s3.exists(f"{uri}.lost")


def test_the_rest_of_the_names() -> None:
    assert s3.object_capabilities("s3://b/k") == {"provider": "s3", "get_into": True, "head": True}
    assert s3.object_capabilities("az://account/box/k")["provider"] == "az"
    assert s3.object_capabilities("/data/x")["provider"] == "file"
    assert s3.object_capabilities("http://b/x") == {"provider": "unknown", "get_into": False, "head": False}
    for malformed in ("s3://", "s3://b"):
        with pytest.raises(ValueError):
            s3.object_capabilities(malformed)
    s3.put_bytes("memory://bk/length", b"12345")
    with pytest.raises(s3.LengthMismatchError) as caught:
        asyncio.run(s3.get_into_async("memory://bk/length", bytearray(4), expected_len=4))
    assert (caught.value.expected, caught.value.actual) == (4, 5)
    assert isinstance(caught.value, (ValueError, IntegrityError))
    with s3.MultipartUploadWriter.from_uri("memory://bk/reserved") as writer:
        lent = writer.reserve(5)
        assert isinstance(lent.obj, s3.ReservedBuffer)
        lent[:] = b"abcde"
        writer.commit(5)
    assert s3.get("memory://bk/reserved") == b"abcde"
    assert issubclass(s3.ExportStillReferencedError, RuntimeError)
