"""`s3loader.s3` on every kind of store: what comes back, in which order, and what is refused."""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toolbox_places import every_place

import s3loader
from s3loader import events, open_store, s3
from s3loader.errors import (
    BucketNotFoundError,
    ConfigError,
    FormatError,
    ObjectExistsError,
    ObjectNotFoundError,
    RangeError,
    UnsupportedOperationError,
)

FIELDS = [
    "size", "last_modified", "etag", "content_type", "content_language", "content_encoding", "cache_control",
    "content_disposition", "expires", "storage_class", "server_side_encryption", "ssekms_key_id",
    "sse_customer_algorithm", "version_id", "replication_status", "metadata",
]  # fmt: skip
NAMES = [
    "put",
    "get",
    "get_many",
    "get_many_stats",
    "put_bytes",
    "put_many",
    "list",
    "stat",
    "stat_many",
    "exists",
    "delete",
    "upload",
    "download",
    "copy",
    "create_bucket",
    "delete_bucket",
    "list_buckets",
    "get_range",
    "get_into",
    "read_npz",
    "mp_get",
]


def test_every_function_has_an_async_twin_with_the_same_arguments() -> None:
    for name in NAMES:
        function, twin = getattr(s3, name), getattr(s3, f"{name}_async")
        assert inspect.iscoroutinefunction(twin)
        assert inspect.signature(function) == inspect.signature(twin)
        assert function.__doc__ == twin.__doc__


def test_the_facade_does_not_make_the_package_heavier() -> None:
    code = "import sys, s3loader; assert 's3loader.toolbox' not in sys.modules; from s3loader import s3; assert s3.get"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("place", ["memory", "moto"], indirect=True)
def test_every_write_says_what_it_is_told_to_say(place: str, tmp_path: Path) -> None:
    told: Any = {"attributes": {"cache_control": "max-age=5"}, "metadata": {"a": "b"}}
    if place.startswith("s3:"):
        told["tags"] = {"run": "7"}
    file = tmp_path / "f"
    file.write_bytes(b"x")
    s3.put(f"{place}/put", b"x", **told)
    s3.put_bytes(f"{place}/put_bytes", b"x", **told)
    s3.put_many([(f"{place}/put_many", b"x")], **told)
    s3.upload(file, f"{place}/upload", **told)
    with s3.MultipartUploadWriter.from_uri(f"{place}/small", **told) as writer:
        writer.write(b"x")
    with s3.MultipartUploadWriter.from_uri(f"{place}/parts", 5 << 20, **told) as writer:
        writer.write(bytes(6 << 20))
    with open_store(place) as store:
        for key in ("put", "put_bytes", "put_many", "upload", "small", "parts"):
            meta = store.head(key)
            assert (meta.attributes["cache_control"], meta.metadata["a"]) == ("max-age=5", "b"), key
            assert "tags" not in told or store.tags(key) == {"run": "7"}, key
    for call in (s3.put, s3.put_bytes, lambda url, data, **wrong: s3.put_many([(url, data)], **wrong)):
        with pytest.raises(ConfigError):
            call(f"{place}/k", b"x", attributes={"cache": "x"})
    with pytest.raises(ConfigError):
        s3.upload(file, f"{place}/k", attributes={"cache": "x"})
    with pytest.raises(ConfigError):
        s3.MultipartUploadWriter.from_uri(f"{place}/k", attributes={"cache": "x"})
    assert not s3.exists(f"{place}/k")


@every_place
def test_one_object(place: str) -> None:
    url = f"{place}/dir/a b+%C3ü.bin"
    assert not s3.exists(url)
    for call in (s3.get, s3.stat):
        with pytest.raises(ObjectNotFoundError):
            call(url)
    made = s3.put(url, b"0123456789", content_type="text/plain")
    assert made.size == 10
    assert s3.exists(url)
    assert s3.get(url) == b"0123456789"
    assert s3.get_range(url, 3) == b"3456789"
    assert s3.get_range(url, 3, 2) == b"34"
    assert s3.get_range(url, 8, 100) == b"89"
    assert s3.get_range(url, 3, 0) == b""
    assert s3.get_range(url, -4) == b"6789"
    assert s3.get_range(url, -4, 2) == b"67"
    assert s3.get_range(url, -100, 2) == b"01"
    with pytest.raises(RangeError):
        s3.get_range(url, 11)
    with pytest.raises(ConfigError):
        s3.get_range(url, 0, -1)
    buffer = np.zeros(4, np.uint8)
    assert s3.get_into(url, buffer, 2).size == 10
    assert buffer.tobytes() == b"2345"
    with pytest.raises(RangeError):
        s3.get_into(url, bytearray(11))
    with pytest.raises(ConfigError, match="read-only"):
        s3.get_into(url, b"1234")
    found = s3.stat(url)
    assert list(found) == FIELDS
    assert found["size"] == 10
    assert found["last_modified"].endswith("Z")
    assert '"' not in found["etag"]
    if not place.startswith("file"):
        assert found["content_type"] == "text/plain"
    assert s3.delete(url) == 1
    assert not s3.exists(url)


@every_place
def test_puts(place: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"from a file")
    s3.put(f"{place}/1", tmp_path / "f")
    s3.put(f"{place}/2", io.BytesIO(b"from a stream"))
    s3.put(f"{place}/3", memoryview(b"from a view"))
    assert s3.get(f"{place}/1") == b"from a file"
    assert s3.get(f"{place}/2") == b"from a stream"
    assert s3.get(f"{place}/3") == b"from a view"
    for wrong in (tmp_path / "f", io.BytesIO(b""), "text"):
        with pytest.raises(ConfigError):
            s3.put_bytes(f"{place}/4", wrong)
    s3.put_bytes(f"{place}/4", bytearray(b"x"))
    assert not s3.exists(f"{place}/5")


def test_a_condition_of_a_put() -> None:
    s3.put("memory://conditions/k", b"1", mode="create")
    with pytest.raises(ObjectExistsError):
        s3.put("memory://conditions/k", b"2", mode="create")


@every_place
def test_many_objects_keep_order_and_duplicates(place: str) -> None:
    items = [(f"{place}/d{i % 3}/{i:03d}", bytes([i]) * (i * 100)) for i in range(40)]
    assert [made.size for made in s3.put_many(item for item in items)] == [i * 100 for i in range(40)]
    urls = [url for url, _ in items]
    wanted = [urls[3], urls[1], urls[3], urls[39], urls[0], urls[1]]
    data = dict(items)
    assert s3.get_many(wanted) == [(url, data[url]) for url in wanted]
    assert s3.get_many_stats(wanted, 2) == (6, sum(len(data[url]) for url in wanted))
    assert [one["size"] for one in s3.stat_many(wanted)] == [len(data[url]) for url in wanted]
    assert s3.get_many([]) == []
    assert s3.get_many_stats([]) == (0, 0)
    with pytest.raises(ObjectNotFoundError, match="nothing-here"):
        s3.get_many([urls[0], f"{place}/nothing-here", urls[1]])
    with pytest.raises(ConfigError):
        s3.get_many(urls[0])
    with pytest.raises(ConfigError):
        s3.put_many([(urls[0], b"1", "more")])
    with pytest.raises(ConfigError):
        s3.get_many(urls, 0)


def test_many_stores_at_once(place: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    urls = [
        f"{root}/k{i}" for i in range(20) for root in (place, "memory://many", f"file://{tmp_path}", f"file://{tmp_path}/sub")
    ]
    s3.put_many([(url, url.encode()) for url in urls])
    assert s3.get_many(urls[::-1]) == [(url, url.encode()) for url in urls[::-1]]
    assert s3.get_many(iter(urls)) == [(url, url.encode()) for url in urls]


@every_place
def test_names_are_exact(place: str, request: pytest.FixtureRequest) -> None:
    local = request.node.callspec.params["place"] in ("file", "rclone")  # cannot hold both a1 and a1/x
    for key in ("a1", "a10", "a1/x", "a1/sub/y", "ba1", "a*", "b/1.csv", "b/2.txt", "b/c/3.csv"):
        if local and key in ("a1", "a*"):
            continue
        s3.put(f"{place}/{key}", b"1")

    def names(url: str, recursive: bool = False, **options: Any) -> list[str]:
        found = s3.list(url, recursive, **options)
        assert all(one.startswith(f"{place}/") for one in found)
        return [one[len(place) + 1 :] for one in found]

    top = ["a1/", "a10", "b/", "ba1"] if local else ["a*", "a1", "a1/", "a10", "b/", "ba1"]
    assert names(place) == names(f"{place}/") == top
    assert names(f"{place}/b/") == names(f"{place}/b") == ["b/1.csv", "b/2.txt", "b/c/"]
    assert names(f"{place}/b/", True) == ["b/1.csv", "b/2.txt", "b/c/3.csv"]
    assert names(f"{place}/a1", True) == (["a1/sub/y", "a1/x"] if local else ["a1", "a1/sub/y", "a1/x"])
    assert names(f"{place}/a*") == ([] if local else ["a*"])
    assert names(f"{place}/b/", glob="*.csv") == ["b/1.csv"]
    assert names(f"{place}/b/", True, glob="*.csv") == ["b/1.csv", "b/c/3.csv"]
    assert names(f"{place}/", glob="**/*.csv") == ["b/1.csv", "b/c/3.csv"]
    assert names(f"{place}/", glob="b/?.*") == ["b/1.csv", "b/2.txt"]
    assert names(f"{place}/b", glob="[!1].*") == ["b/2.txt"]
    assert names(f"{place}/", regex="a1") == [name for name in top if "a1" in name]
    assert names(f"{place}/", True, regex=r"^b/.*\.csv$") == ["b/1.csv", "b/c/3.csv"]
    assert names(f"{place}/none") == []
    for bad in ({"regex": "("}, {"glob": ""}, {"glob": "a", "regex": "a"}):
        with pytest.raises(ConfigError):
            s3.list(place, **bad)  # type: ignore[arg-type]

    with pytest.raises(ObjectNotFoundError):
        s3.delete(f"{place}/none")
    with pytest.raises(ObjectNotFoundError, match="nothing"):
        s3.delete(f"{place}/none", recursive=True)
    with pytest.raises(ObjectNotFoundError, match="nothing"):
        s3.delete(f"{place}/b/", glob="*.tar")
    with pytest.raises((ConfigError, ObjectNotFoundError)):
        s3.delete(f"{place}/b/")
    with pytest.raises((ConfigError, ObjectNotFoundError)):
        s3.delete(place)
    assert s3.delete(f"{place}/b/", glob="*.tar", missing_ok=True) == 0
    assert s3.delete(f"{place}/b/", glob="*.csv") == 1
    assert s3.delete(f"{place}/a1", recursive=True) == (2 if local else 3)
    assert names(place, True) == (
        ["a10", "b/2.txt", "b/c/3.csv", "ba1"] if local else ["a*", "a10", "b/2.txt", "b/c/3.csv", "ba1"]
    )
    assert s3.delete([f"{place}/a10", f"{place}/ba1"]) == 2
    s3.delete(f"{place}/", recursive=True)
    assert names(place, True) == []


def test_a_folders_own_object_goes_with_it(place: str) -> None:
    s3.put(f"{place}/dir/", b"")
    s3.put(f"{place}/dir/x", b"1")
    assert s3.list(f"{place}/dir/") == [f"{place}/dir/x"]
    assert s3.delete(f"{place}/dir/", recursive=True) == 2
    assert s3.list(place, True) == []


def test_a_call_costs_one_request(place: str) -> None:
    url = f"{place}/k"
    s3.put(url, b"12345")
    seen: list[str] = []
    stop = events.subscribe(lambda event: seen.append(event.op))
    try:
        for call, ops in (
            (lambda: s3.get(url), ["GET"]),
            (lambda: s3.put(url, b"12345"), ["PUT"]),
            (lambda: s3.get_range(url, 1), ["GET"]),
            (lambda: s3.get_range(url, 1, 2), ["GET"]),
            (lambda: s3.get_into(url, bytearray(3)), ["GET"]),
            (lambda: s3.stat(url), ["HEAD"]),
            (lambda: s3.exists(url), ["HEAD"]),
            (lambda: s3.get_many([url, url]), ["GET", "GET"]),
            (lambda: s3.list(place), ["LIST"]),
            (lambda: s3.delete(url, missing_ok=True), ["DELETE"]),
        ):
            seen.clear()
            call()
            assert seen == ops
    finally:
        stop()


def test_a_changed_environment_is_seen(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put(f"{place}/k", b"1")
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(s3loader.StoreConnectionError):
        s3.get(f"{place}/k", options=s3loader.StoreOptions(max_attempts=1))
    monkeypatch.undo()


def test_configure_and_close(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put(f"{place}/k", b"1")
    endpoint = os.environ["S3_ENDPOINT_URL"]
    monkeypatch.delenv("S3_ENDPOINT_URL")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    s3.configure(endpoint_url=endpoint)
    try:
        assert s3.get(f"{place}/k") == b"1"
        assert place in s3.list_buckets()
    finally:
        s3.configure(endpoint_url=None)
        s3.close()
    assert s3.get(f"{place}/k", endpoint_url=endpoint) == b"1"
    with pytest.raises(ConfigError, match="endpoint"):
        s3.configure(endpont_url="x")  # type: ignore[call-arg]


def test_a_forked_child_works_on(place: str) -> None:
    s3.put(f"{place}/k", b"1" * 100)
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if s3.get_many([f"{place}/k"] * 20) == [(f"{place}/k", b"1" * 100)] * 20 else 2
        finally:
            os._exit(code)
    assert s3.get(f"{place}/k") == b"1" * 100
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@every_place
def test_async_twins(place: str) -> None:
    async def run() -> None:
        url = f"{place}/k"
        await s3.put_async(url, b"123")
        assert await s3.get_async(url) == b"123"
        await asyncio.gather(*(s3.put_async(f"{place}/{i}", b"%d" % i) for i in range(30)))
        assert [data for _, data in await s3.get_many_async([f"{place}/{i}" for i in range(30)])] == [
            b"%d" % i for i in range(30)
        ]
        assert len(await s3.list_async(place)) == 31
        assert (await s3.stat_async(url))["size"] == 3
        assert [one["size"] for one in await s3.stat_many_async([url, url])] == [3, 3]
        assert await s3.exists_async(url)
        assert await s3.get_range_async(url, 1) == b"23"
        assert await s3.get_many_stats_async([url, f"{place}/7", url]) == (3, 7)
        assert [made.size for made in await s3.put_many_async([(url, b"1234")])] == [4]
        assert (await s3.get_into_async(url, filled := bytearray(4))).size == 4
        assert filled == b"1234"
        with pytest.raises(ObjectNotFoundError):
            await s3.get_async(f"{place}/none")
        assert await s3.delete_async(f"{place}/", recursive=True) == 31

    asyncio.run(run())


@every_place
def test_npz(place: str) -> None:
    packed = io.BytesIO()
    np.savez(packed, x=np.arange(6, dtype=np.float32).reshape(2, 3), y=np.array([1, 2]))
    s3.put(f"{place}/a.npz", packed.getvalue())
    found = s3.read_npz(f"{place}/a.npz")
    assert isinstance(found, dict)
    assert sorted(found) == ["x", "y"]
    one = s3.read_npz(f"{place}/a.npz", "x")
    assert isinstance(one, np.ndarray)
    assert one.tolist() == [[0, 1, 2], [3, 4, 5]]
    plain = io.BytesIO()
    np.save(plain, np.arange(3))
    s3.put(f"{place}/a.npy", plain.getvalue())
    assert np.asarray(s3.read_npz(f"{place}/a.npy")).tolist() == [0, 1, 2]
    evil = io.BytesIO()
    np.save(evil, np.array([object()], dtype=object), allow_pickle=True)
    s3.put(f"{place}/evil.npy", evil.getvalue())
    s3.put(f"{place}/text", b"no array")
    for name, array in (("a.npz", "z"), ("a.npy", "x"), ("evil.npy", None), ("text", None)):
        with pytest.raises(FormatError):
            s3.read_npz(f"{place}/{name}", array)


@pytest.mark.parametrize("place", ["file", "moto"], indirect=True)
def test_reading_in_several_processes(place: str) -> None:
    s3.put_many([(f"{place}/d/{i}", b"x" * i) for i in range(10)])
    found = s3.mp_get(f"{place}/d/", procs=2)
    assert (found.objects, found.bytes, len(found.processes)) == (10, 45, 2)
    with pytest.raises(ObjectNotFoundError):
        s3.mp_get([f"{place}/d/0", f"{place}/none"], procs=2)
    with pytest.raises(ObjectNotFoundError):
        s3.mp_get(f"{place}/none/")


def test_memory_is_of_one_process() -> None:
    s3.put("memory://mp/x", b"1")
    with pytest.raises(UnsupportedOperationError):
        s3.mp_get("memory://mp/")


def test_what_names_no_object_is_refused(tmp_path: Path) -> None:
    for url in ("memory://b", "memory://b/", f"file://{tmp_path}/", "s3://bucket", "", "ftp://x/y", 7):
        for call in (s3.get, s3.stat, s3.exists, lambda u: s3.put(u, b"")):
            with pytest.raises(ConfigError):
                call(url)  # type: ignore[arg-type]


def test_a_missing_bucket_is_said(place: str) -> None:
    with pytest.raises(BucketNotFoundError):
        s3.get(f"{place}-none/k")
    with pytest.raises(BucketNotFoundError):
        s3.list(f"{place}-none/")
    with pytest.raises(BucketNotFoundError):
        s3.delete_bucket(f"{place}-none")
