"""s3dlio's names over s3loader: what programs written for it call, and what they get."""

from __future__ import annotations

import asyncio
import inspect
import io
import operator
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s3loader import s3 as ours
from s3loader.compat import s3dlio as s3
from s3loader.datagen import generate_tfrecord
from s3loader.errors import StoreConnectionError
from s3loader.store import StoreOptions

SIGNATURES = {
    "put": "prefix num template max_in_flight size should_create_bucket object_type dedup_factor compress_factor "
    "data_gen_algorithm data_gen_mode chunk_size",
    "list": "uri recursive pattern",
    "list_objects": "bucket prefix recursive",
    "stat": "uri",
    "get": "uri",
    "get_range": "uri offset length",
    "get_many": "uris max_in_flight",
    "get_many_stats": "uris max_in_flight",
    "delete": "uri recursive",
    "upload": "src_patterns dest_prefix max_in_flight create_bucket",
    "download": "src_uri dest_dir max_in_flight recursive",
    "read_npz": "uri array_name",
    "mp_get": "uri procs jobs num template",
    "configure_s3": "endpoint_url region ca_bundle",
    "create_bucket": "bucket_name",
    "delete_bucket": "bucket_name",
    "put_many": "items max_in_flight",
    "get_into_async": "uri dst expected_len",
    "generate_data": "size dedup compress",
    "generate_data_with_threads": "size dedup compress threads",
    "generate_into_buffer": "buffer dedup compress threads",
    "generate_npz_bytes": "shape dtype num_samples",
    "Generator": "size dedup compress threads chunk_size seed",
    "PyVecDataset": "obj",
    "PyDataset": "uri opts",
    "PyDataset.from_uris": "uris opts",
    "PyDataset.get_item": "self index",
    "PyS3Dataset": "uri opts",
    "create_dataset": "uri opts",
    "PyAsyncDataLoader": "dataset opts",
    "PyBytesAsyncDataLoader": "dataset opts",
    "PyS3AsyncDataLoader": "uri opts",
    "create_async_loader": "uri opts",
    "PyCheckpointStore": "uri strategy multipart_threshold compression_level",
    "PyCheckpointStore.save": "self step epoch framework data user_meta",
    "PyCheckpointStore.load_latest": "self",
    "PyCheckpointStore.list_checkpoints": "self",
    "PyCheckpointStore.delete_checkpoint": "self step",
    "PyCheckpointStore.writer": "self world_size rank",
    "PyCheckpointStore.reader": "self",
    "PyCheckpointWriter.save_distributed_shard": "self step epoch framework data",
    "PyCheckpointWriter.get_distributed_shard_stream": "self step epoch framework",
    "PyCheckpointWriter.finalize_distributed_checkpoint": "self step epoch framework shard_metas user_meta",
    "PyCheckpointReader.load_latest_manifest": "self",
    "PyCheckpointReader.read_shard_by_rank": "self manifest rank",
    "save_checkpoint": "uri step epoch framework data user_meta",
    "load_checkpoint": "uri",
    "save_distributed_shard": "uri step epoch framework data world_size rank",
    "finalize_distributed_checkpoint": "uri step epoch framework shard_metas world_size rank user_meta",
    "load_checkpoint_with_validation": "uri validate_integrity",
    "PyWriterOptions": "",
    "PyWriterOptions.with_compression": "self compression_type level",
    "PyWriterOptions.with_buffer_size": "self size",
    "PyObjectWriter.write_chunk": "self data",
    "PyObjectWriter.write_owned_bytes": "self data copy",
    "create_s3_writer": "uri options",
    "object_capabilities": "uri",
    "create_multi_endpoint_store": "uris strategy",
    "get_by_key": "bucket key",
    "stat_key": "bucket key",
    "list_containers": "uri",
    "list_keys": "uri",
    "list_full_uris": "uri",
    "exists": "uri",
    "head_async": "uri",
    "put_bytes": "uri data",
    "put_bytes_async": "uri data borrow",
    "put_many_async": "items max_in_flight borrow",
    "stat_many_async": "uris",
    "mkdir": "uri",
    "create_tfrecord_index": "tfrecord_path index_path",
    "read_tfrecord_index": "index_path",
    "make_tf_dataset": "uri prefetch num_workers batch_size drop_last shuffle seed auto_tune map_fn writable "
    "suppress_nonwritable_warning",
}
"""Names and order of the arguments, as s3dlio 0.4.6 and 0.10 have them."""

CHECKLIST = {
    "get": "get get_async get_range get_into_async get_object get_by_key",
    "many": "get_many get_many_async get_many_stats get_many_stats_async put_many put_many_async mp_get",
    "put": "put put_async put_bytes put_bytes_async",
    "look": "stat stat_async stat_many_async stat_key stat_object head_async exists exists_async",
    "list": "list list_objects list_keys list_keys_from_s3 list_uris list_full_uris list_containers",
    "delete": "delete create_bucket delete_bucket mkdir",
    "files": "upload download read_npz",
    "settings": "configure_s3 init_logging",
    "loaders": "ObjectStoreIterableDataset ObjectStoreMapDataset JaxIterable S3IterableDataset S3MapDataset S3JaxIterable "
    "make_tf_dataset",
    "datasets": "PyVecDataset PyS3Dataset PyDataset create_dataset PyAsyncDataLoader PyS3AsyncDataLoader create_async_loader",
    "writers": "MultipartUploadWriter PyWriterOptions create_s3_writer ReservedBuffer ExportStillReferencedError",
    "checkpoint": "PyCheckpointStore PyCheckpointInfo save_checkpoint load_checkpoint save_distributed_shard "
    "finalize_distributed_checkpoint load_checkpoint_with_validation",
    "typed": "object_capabilities ObjectMetadata LengthMismatchError ObjectNotFoundError UnsupportedOperationError",
    "observability": "init_op_log finalize_op_log is_op_log_active op_log_stats",
    "data": "generate_data generate_data_with_threads generate_into_buffer generate_npz_bytes Generator DEFAULT_OBJECT_SIZE",
    "net": "MultiEndpointStore create_multi_endpoint_store create_multi_endpoint_store_from_template",
}


@pytest.mark.parametrize("row", CHECKLIST)
def test_every_row_of_the_checklist_has_its_names(row: str) -> None:
    for name in CHECKLIST[row].split():
        assert name in s3.__all__
        if name != "make_tf_dataset":  # imports nothing of TensorFlow until it is called
            assert getattr(s3, name) is not None


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_have_their_names_and_order(name: str) -> None:
    assert " ".join(inspect.signature(operator.attrgetter(name)(s3)).parameters) == SIGNATURES[name]


def test_the_index_of_records() -> None:
    s3.put_bytes("memory://bk/r/x", generate_tfrecord(5, 100))
    assert s3.create_tfrecord_index("memory://bk/r/x", "memory://bk/r/x.index") == 5
    assert s3.read_tfrecord_index("memory://bk/r/x.index") == [(116 * i, 116) for i in range(5)]
    assert s3.get_tfrecord_index_entries(s3.get("memory://bk/r/x")) == [(116 * i, 116) for i in range(5)]
    assert s3.index_tfrecord_bytes(memoryview(s3.get("memory://bk/r/x"))) == s3.get("memory://bk/r/x.index").decode()
    assert s3.create_tfrecord_index("memory://bk/r/x") == 5
    assert s3.get("memory://bk/r/x.idx") == s3.get("memory://bk/r/x.index")


TENSORFLOW = """
import sys
from s3loader.compat import s3dlio as s3
from s3loader.datagen import generate_tfrecord
for i in range(9):
    s3.put_bytes(f"memory://bk/tf/{i}", bytes([i]) * (i + 1))
for options in ({}, {"batch_size": 4}, {"shuffle": True, "seed": 3, "prefetch": 2}):
    found = [bytes(each.numpy()) for each in s3.make_tf_dataset("memory://bk/tf/", **options)]
    assert sorted(found) == [bytes([i]) * (i + 1) for i in range(9)], (options, found)
    assert (found == sorted(found)) is ("shuffle" not in options)
dropped = s3.make_tf_dataset("memory://bk/tf/", batch_size=4, drop_last=True)
assert len(list(dropped)) == 8, len(list(dropped))
mapped = s3.make_tf_dataset("memory://bk/tf/", map_fn=lambda each: each[:1])
assert [int(each.numpy()[0]) for each in mapped] == list(range(9))
assert mapped.element_spec.dtype.name == "uint8"
"""


def test_tensorflow_reads_the_objects() -> None:
    pytest.importorskip("tensorflow")
    subprocess.run([sys.executable, "-c", TENSORFLOW], check=True, timeout=300)


def test_names_are_sorted() -> None:
    assert s3.__all__ == sorted(s3.__all__)


def test_the_functions() -> None:
    base = "memory://bk/t/"
    s3.put(base, num=5, template="object_{}_of_{}.dat", size=600)
    assert s3.list(base) == [f"t/object_{i}_of_5.dat" for i in range(5)], s3.list(base)
    assert s3.list("memory://bk/t/object_[12]_") == ["t/object_1_of_5.dat", "t/object_2_of_5.dat"]
    u = ours.list(base)
    assert len({b for _, b in s3.get_many(u)}) == 5
    st = s3.stat(u[0])
    assert st["etag"].startswith('"')
    assert st["size"] == 600
    s3.put_bytes("memory://bk/a/dummy1.txt", b"1")
    s3.put_bytes("memory://bk/a/data/dummy2.txt", b"2")
    s3.put_bytes("memory://bk/a/data/logs/dummy3.txt", b"3")
    assert s3.list("memory://bk/a/", False) == ["a/data/", "a/dummy1.txt"]
    assert s3.list("memory://bk/a/", True) == ["a/data/dummy2.txt", "a/data/logs/dummy3.txt", "a/dummy1.txt"]
    for rec, names in ((False, ["dummy1.txt"]), (True, ["dummy1.txt", "dummy2.txt", "dummy3.txt"])):
        d = tempfile.mkdtemp()
        s3.download("memory://bk/a/", d, recursive=rec)
        assert sorted(os.listdir(d)) == names, (rec, os.listdir(d))
    s3.delete("memory://bk/a/", recursive=True)
    assert s3.list("memory://bk/a/", True) == []
    s3.delete("memory://bk/none")

    async def go():
        assert (await s3.head_async("memory://bk/none")) is None
        b = bytearray(600)
        assert await s3.get_into_async(u[0], b, expected_len=600) == 600
        assert len(await s3.stat_many_async(u)) == 5

    asyncio.run(go())
    assert len(s3.generate_data(1000)) == 1000
    b = bytearray(4096)
    assert s3.generate_into_buffer(b) == 4096, b
    g = s3.Generator(3000, seed=1)
    c = bytearray(2000)
    assert [g.fill_chunk(c), g.fill_chunk(c), g.fill_chunk(c)] == [2000, 1000, 0]
    assert np.load(io.BytesIO(s3.generate_npz_bytes((3, 4))))["x"].shape == (3, 4)
    m = s3.create_multi_endpoint_store(["memory://e1/x", "memory://e2/x"])
    m.put_all_endpoints("k", b"12")
    assert m.get("memory://e1/x/k") == b"12" == m.get("k")
    assert m.get_total_stats()["bytes_read"] == 4
    assert m.list_all_endpoints("", True) == [["memory://e1/x/k"], ["memory://e2/x/k"]], m.list_all_endpoints("", True)
    assert s3.create_multi_endpoint_store_from_template("s3://h{01...03}:9000/b/")._endpoints[2].place == {
        "endpoint_url": "http://h03:9000"
    }


def test_the_loaders() -> None:
    place = "memory://loaders/t/"
    s3.put(place, num=5, size=600)
    shuffled = s3.S3IterableDataset.from_prefix(place, shuffle=True, seed=1, return_type="bytes")
    first, second = list(shuffled), list(shuffled)
    assert sorted(first) == sorted(second)
    assert first != second
    assert list(s3.S3IterableDataset.from_prefix(place, shuffle=True, seed=1, return_type="bytes")) == first
    assert [tensor.shape[0] for tensor in s3.S3IterableDataset.from_prefix(place)] == [600] * 5
    by_number = s3.S3MapDataset.from_prefix(place, return_type="reader")
    assert len(by_number) == 5
    assert len(by_number[4].read()) == 600
    assert len(list(s3.S3JaxIterable.from_prefix(place, batch_size=2, drop_last=True))) == 4
    with pytest.raises(ValueError):
        s3.S3MapDataset(place, return_type="list")
    with pytest.warns(UserWarning, match="means nothing here"):
        s3.S3IterableDataset.from_prefix(place, auto_tune=True)
    with pytest.warns(UserWarning, match="DataLoader"):
        s3.S3IterableDataset.from_prefix(place, batch_size=32)


def test_sharding_gives_each_object_once(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "memory://loaders/sharded/"
    s3.put(place, num=7, size=600)
    seen = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        seen += list(s3.S3IterableDataset.from_prefix(place, enable_sharding=True, return_type="bytes"))
    assert sorted(seen) == sorted(data for _, data in s3.get_many(ours.list(place)))


def test_an_error_reaches_the_consumer() -> None:
    place = "memory://loaders/broken/"
    s3.put(place, num=3, size=600)
    dataset = s3.S3IterableDataset.from_prefix(place, return_type="bytes")
    assert len(dataset._objects.urls) == 3
    s3.delete(ours.list(place)[1])
    with pytest.raises(FileNotFoundError):
        list(dataset)


@pytest.mark.parametrize("place", ["moto"], indirect=True)
@pytest.mark.parametrize("strategy", ["round_robin", "least_connections"])
def test_reads_go_on_to_an_endpoint_that_answers(place: str, strategy: str, nowhere: str) -> None:
    ours.put(f"{place}/k", b"12345")
    ours.configure(options=StoreOptions(max_attempts=1))
    try:
        store = s3.create_multi_endpoint_store([f"s3://{nowhere}/bucket/", place], strategy)
        for _ in range(4):
            assert store.get("k") == b"12345"
            assert store.get_range("k", 1, 2) == b"23"
            assert store.list("", True) == [f"{place}/k"]
        dead, alive = store.get_endpoint_stats()
        assert (dead["requests"], dead["errors"]) == (1, 1)  # and was then left alone
        assert (alive["requests"], alive["errors"], alive["bytes_read"]) == (12, 0, 4 * 7)
        with pytest.raises(FileNotFoundError):
            store.get("none")  # an answer, which no other endpoint is asked for
        assert store.get_endpoint_stats()[0]["requests"] == 1
        with pytest.raises(StoreConnectionError):
            store.get_from_endpoint(0, "k")
        with pytest.raises(StoreConnectionError):
            s3.create_multi_endpoint_store([f"s3://{nowhere}/bucket/"]).get("k")
    finally:
        ours.close()
        ours.configure()


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address where nothing listens, and nothing will."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def test_how_put_makes_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data_gen_mode` and `chunk_size` are honoured; what means nothing is said."""
    asked: list[tuple[Any, int]] = []
    make = s3.put_generated

    def noted(*args: Any, **options: Any) -> Any:
        asked.append((options["mode"], options["chunk_size"]))
        return make(*args, **options)

    monkeypatch.setattr(s3, "put_generated", noted)
    put = partial(s3.put, f"file://{tmp_path}/", 1, "o", size=1000)
    put()
    put(data_gen_mode="streaming", chunk_size=4096)
    for whole in ("single-pass", "Single_Pass", "singlepass"):
        put(data_gen_mode=whole, chunk_size=4096)
    with pytest.warns(UserWarning, match="taken for 'streaming'"):
        put(data_gen_mode="other", chunk_size=0)
    with pytest.warns(UserWarning, match="data_gen_algorithm='prand' means nothing here"):
        put(data_gen_algorithm="prand")
    default = 8 << 20
    assert asked == [(None, default), ("streaming", 4096), *[("single-pass", 4096)] * 3, (None, default), (None, default)]
    assert (tmp_path / "o").stat().st_size == 1000
