"""What is particular to the stores in memory and in files; what all stores share is in the conformance suite."""

from __future__ import annotations

import io
import os
import pickle
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s3loader import store as store_package
from s3loader.errors import (
    ConfigError,
    ObjectChangedError,
    ObjectNotFoundError,
    RangeError,
)
from s3loader.exchange import S3ExchangeStore
from s3loader.store import MemoryBackend, ObjectStore, StoreOptions, open_store
from s3loader.types import Update


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in (tmp_path, str(tmp_path), f"file://{tmp_path}", f"file://localhost{tmp_path}/", "."):
        assert open_store(url).url == f"file://{tmp_path}"
    assert open_store("memory://n/a/b").url == "memory://n/a/b"
    assert open_store("memory://n/a/b/").url == "memory://n/a/b"
    for root in ("file:///", "memory://"):  # nothing but slashes behind the scheme, which are no end to cut off
        store = open_store(root)
        assert store.url == root.replace("///", "//")
        assert open_store(store.url).url == store.url
        with pytest.raises(ObjectNotFoundError) as caught:
            store.get("no/such")
        assert caught.value.url == f"{store.url}/no/such"
        with pytest.raises(ObjectNotFoundError) as missing:
            next(S3ExchangeStore(store.url, base_prefix="no", prefix_all=True).objects.get_many(["such"]))
        assert missing.value.url == f"{store.url}/no/such"
    for bad in ("", "ftp://x/y", "s3://", "s3:///key"):
        with pytest.raises(ConfigError):
            open_store(bad)
    with pytest.raises(ConfigError, match="engine"):
        open_store(tmp_path, engine="fast")  # type: ignore[arg-type]


def test_options_are_checked() -> None:
    options = StoreOptions(retry_budget="1m30s", part_size="16MiB", read_timeout=2)
    assert (options.retry_budget, options.part_size, options.read_timeout) == (90.0, 16 << 20, 2.0)
    bad: list[dict[str, Any]] = [
        {"max_attempts": 0},
        {"max_attempts": 1.5},
        {"concurrency": True},
        {"part_size": 0},
        {"part_size": "big"},
        {"read_timeout": "0s"},
        {"retry_budget": -1},
        {"max_requests_per_second": 0},
        {"max_requests_per_second": -3.0},
    ]
    for arguments in bad:
        with pytest.raises(ConfigError):
            StoreOptions(**arguments)


def test_the_package_says_what_is_public() -> None:
    assert sorted(store_package.__all__) == store_package.__all__


def test_a_prefix_is_literal() -> None:
    name = uuid.uuid4().hex
    root = open_store(f"memory://{name}")
    for key in ("a/x", "ab/x", "a", "a//x"):
        root.put(key, key.encode())
    assert [entry.key for entry in open_store(f"memory://{name}/a").list()] == ["/x", "x"]
    assert open_store(f"memory://{name}/a/").get("x") == b"a/x"
    assert open_store(f"memory://{name}/a//").get("x") == b"a//x"
    root.put("m/", b"the marker of a folder, as some tools make")
    root.put("m/k", b"")
    assert [entry.key for entry in open_store(f"memory://{name}/m").list()] == ["k"]


def test_stores_of_a_name_share() -> None:
    name = uuid.uuid4().hex
    one, two = open_store(f"memory://{name}"), open_store(f"memory://{name}")
    one.put("k", b"x")
    assert two.get("k") == b"x"
    one.close()
    assert two.get("k") == b"x"
    assert not open_store(f"memory://{name}2").exists("k")


def test_a_view_of_memory_is_of_that_version() -> None:
    backend = MemoryBackend(uuid.uuid4().hex)
    data = bytearray(b"first")
    backend.put("k", data)
    data[:] = b"XXXXX"
    _, view = backend.get("k", 1, 3)
    backend.put("k", b"other")
    assert bytes(view) == b"ir"
    assert memoryview(view).readonly


def test_an_empty_store_elsewhere_explains_itself() -> None:
    with pytest.raises(ObjectNotFoundError, match="one process"):
        open_store(f"memory://{uuid.uuid4().hex}").get("k")


def test_arguments_are_named_before_a_request(tmp_path: Path) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.put("k", b"0123456789")
    calls: list[Callable[[], Any]] = [
        lambda: store.get(""),
        lambda: store.get(None),  # type: ignore[arg-type]
        lambda: store.put("k", "text"),
        lambda: store.put("k", 5),
        lambda: store.put("k", b"", mode="append"),  # type: ignore[arg-type]
        lambda: store.put("k", io.StringIO("text")),
        lambda: store.put("k", memoryview(b"0123")[::2]),
        lambda: store.read_into("k", 0, b"readonly"),
        lambda: store.read_into("k", -1, bytearray(1)),
        lambda: store.get_range("k", 5, 4),
        lambda: store.get_ranges("k", [(5, 4)]),
        lambda: store.get_ranges("k", [(0, 1)], max_gap="wide"),
        lambda: list(store.read_many(["k"])),  # type: ignore[list-item]
        lambda: list(store.get_many([""])),
        lambda: store.multipart("k", part_size=0),
        lambda: store.multipart("k", max_in_flight=0),
        lambda: store.put("k", b"", mode=Update("")),
    ]
    for call in calls:
        with pytest.raises(ConfigError):
            call()
    assert store.get("k") == b"0123456789"


def test_ranges_are_coalesced_and_exact() -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    data = bytes(range(256)) * 100
    store.put("k", data)
    wanted = [(500, 510), (0, 10), (20_000, 20_100), (10, 10), (505, 520), (5, 7)]
    found = store.get_ranges("k", wanted, max_gap=0)
    assert [bytes(view) for view in found] == [data[a:b] for a, b in wanted]
    assert store.get_ranges("k", []) == []
    assert [bytes(v) for v in store.get_ranges("k", [(3, 3)])] == [b""]
    with pytest.raises(RangeError):
        store.get_ranges("k", [(0, 1), (25_599, 25_601)])
    with pytest.raises(RangeError):
        store.get_ranges("k", [(25_601, 25_601)])
    with pytest.raises(ObjectNotFoundError):
        store.get_ranges("none", [])


def test_files_of_all_kinds_are_put(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", options=StoreOptions(part_size="1000B"))
    data = os.urandom(5500)
    source = tmp_path / "source"
    source.write_bytes(data)
    assert store.put("path", source).size == 5500
    with open(source, "rb") as file:
        file.seek(100)
        store.put("rest", file)
    store.put("stream", io.BytesIO(data))

    class Reader:
        def __init__(self) -> None:
            self.inner = io.BytesIO(data)

        def read(self, size: int) -> bytes:
            return self.inner.read(min(size, 77))

    store.put("reader", Reader())
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    with open(read, "rb", buffering=0) as pipe:
        store.put("pipe", pipe)
    store.put("empty", io.BytesIO())
    assert store.get("path") == store.get("stream") == store.get("reader") == store.get("pipe") == data
    assert store.get("rest") == data[100:]
    assert store.get("empty") == b""

    class Broken:
        count = 0

        def read(self, size: int) -> bytes:
            self.count += 1
            if self.count > 3:
                raise OSError("the disk is gone")
            return bytes(size)

    with pytest.raises(OSError, match="disk is gone"):
        store.put("broken", Broken())
    with pytest.raises(FileNotFoundError):
        store.put("missing", tmp_path / "missing")
    assert not store.exists("broken")
    assert list(store.backend.list_multipart()) == []


def test_open_is_a_file(tmp_path: Path) -> None:
    for store in (open_store(tmp_path), open_store(f"memory://{uuid.uuid4().hex}")):
        store.put("k", b"line 1\nline 2\n" * 1000)
        with store.open("k") as file:
            assert file.readline() == b"line 1\n"
            assert file.seek(-7, os.SEEK_END) == 13_993
            assert file.read() == b"line 2\n"
            assert file.read() == b""
            assert file.seek(20_000) == 20_000
            assert file.read(1) == b""
            assert file.raw.size == 14_000  # type: ignore[attr-defined]
            with pytest.raises(OSError):
                file.write(b"x")
            with pytest.raises(ValueError):
                file.seek(-1)
        with pytest.raises(ValueError):
            file.read()
        assert io.TextIOWrapper(store.open("k")).readline() == "line 1\n"
        with pytest.raises(ObjectNotFoundError):
            store.open("none")
        with store.open("k") as file:
            file.raw.read(5)
            store.put("k", b"another one" * 1000)
            with pytest.raises(ObjectChangedError):
                file.raw.read(5)


def test_pickles_keep_the_options(tmp_path: Path) -> None:
    options = StoreOptions(max_attempts=2, concurrency=3, max_requests_per_second=1e6)
    for url in (str(tmp_path), f"memory://{uuid.uuid4().hex}/x"):
        store = open_store(url, options=options)
        store.put("k", b"x")
        clone = pickle.loads(pickle.dumps(store))
        assert (clone.url, clone.options, clone.get("k")) == (store.url, options, b"x")
    wrapped = ObjectStore("memory://w", MemoryBackend(uuid.uuid4().hex))
    wrapped.put("k", b"x")
    assert pickle.loads(pickle.dumps(wrapped)).get("k") == b"x"


def test_a_client_of_your_own_stays_in_its_process() -> None:
    store = ObjectStore("memory://w", MemoryBackend("w"), bound="it uses your own boto3 client")
    with pytest.raises(ConfigError, match="own boto3 client") as caught:
        pickle.dumps(store)
    assert caught.value.hint
