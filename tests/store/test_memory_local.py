"""What is particular to the stores in memory and in files; what all stores share is in the conformance suite."""

from __future__ import annotations

import io
import os
import pickle
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader import store as store_package
from s3loader.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ConfigError,
    ObjectChangedError,
    ObjectNotFoundError,
    RangeError,
    S3LoaderError,
    TruncatedError,
    UnsupportedOperationError,
)
from s3loader.store import ObjectStore, StoreOptions, _files, open_store
from s3loader.store.local import LocalBackend
from s3loader.store.memory import MemoryBackend
from s3loader.types import CommonPrefix, ObjectMeta, Update

# -- opening ------------------------------------------------------------------------------------


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in (tmp_path, str(tmp_path), f"file://{tmp_path}", f"file://localhost{tmp_path}/", "."):
        assert open_store(url).url == f"file://{tmp_path}"
    assert open_store("memory://n/a/b").url == "memory://n/a/b"
    assert open_store("memory://n/a/b/").url == "memory://n/a/b"
    for bad in ("", "ftp://x/y", "s3://", "s3:///key"):
        with pytest.raises(ConfigError):
            open_store(bad)
    with pytest.raises(ConfigError, match="unknown engine"):
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


# -- memory -------------------------------------------------------------------------------------


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


# -- files: names -------------------------------------------------------------------------------

BAD_KEYS = (
    "/a", "a//b", "a/", ".", "..", "../a", "a/../b", "a/./b", "a\0b", "x" * 256, ".s3loader-x/y", "a/.s3loader-tmp", "\ud800",
)  # fmt: skip


@pytest.mark.parametrize("key", BAD_KEYS)
def test_keys_stay_inside(tmp_path: Path, key: str) -> None:
    root = tmp_path / "root"
    store = open_store(root)
    store.put("a/b", b"x")
    calls: list[Callable[[], Any]] = [
        lambda: store.get(key),
        lambda: store.put(key, b"y"),
        lambda: store.head(key),
        lambda: store.delete(key),
        lambda: store.copy("a/b", key),
        lambda: store.copy(key, "c"),
        lambda: store.read_into(key, 0, bytearray(1)),
        lambda: store.backend.create_multipart(key),
    ]
    for call in calls:
        with pytest.raises(ConfigError):
            call()
    assert len(store.delete_many([key, "nothing"])) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert [entry.key for entry in store.list()] == ["a/b"]


def test_links_lead_nowhere_else(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (root / "inside").write_bytes(b"inside")
    (root / "dir").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "good").symlink_to(root / "inside")
    (root / "gone").symlink_to(root / "nothing")
    store = open_store(root)
    for key in ("dir/secret", "file"):
        for call in (lambda key=key: store.get(key), lambda key=key: store.head(key)):
            with pytest.raises(AccessDeniedError, match="link") as caught:
                call()
            assert caught.value.hint
    for write in (
        lambda: store.put("dir/new", b"x"),
        lambda: store.put("dir/sub/new", b"x"),
        lambda: store.delete("dir/secret"),
        lambda: store.copy("inside", "dir/x"),
    ):
        with pytest.raises(AccessDeniedError):
            write()
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert store.get("good") == b"inside"
    assert not store.exists("gone")
    assert [entry.key for entry in store.list()] == ["good", "inside"]
    assert list(store.list("dir/")) == []
    store.put("file", b"mine")  # takes the link's place, leaves its target alone
    assert store.get("file") == b"mine"
    assert (outside / "secret").read_bytes() == b"secret"


def test_the_root_may_be_a_link_or_missing(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    store = open_store(tmp_path / "link")
    store.put("a/b", b"x")
    assert (tmp_path / "real/a/b").read_bytes() == b"x"
    assert [entry.key for entry in store.list("a/")] == ["a/b"]
    missing = open_store(tmp_path / "no/such/folder")
    with pytest.raises(BucketNotFoundError, match="no folder") as caught:
        missing.get("k")
    assert caught.value.hint
    assert not missing.exists("k")
    assert list(missing.list()) == []
    missing.delete("k")
    missing.put("k", b"now it is")
    assert missing.get("k") == b"now it is"


def test_only_plain_files_are_objects(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path has to be short
        listener.bind("socket")
        os.chdir(here)
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").write_bytes(b"x")
        store = open_store(tmp_path)
        assert [entry.key for entry in store.list()] == ["file"]
        assert list(store.list(delimiter="/")) == list(store.list())
        for key in ("pipe", "socket", "folder"):
            with pytest.raises(S3LoaderError):
                store.get(key)
        assert not store.exists("folder")


@pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b"), ("a/b", "a/b/c/d")])
def test_a_key_below_a_key_is_refused(tmp_path: Path, first: str, second: str) -> None:
    store = open_store(tmp_path)
    store.put(first, b"first")
    for mode in ("overwrite", "create"):
        with pytest.raises(UnsupportedOperationError) as caught:
            store.put(second, b"second", mode=mode)  # type: ignore[arg-type]
        assert "'a/b'" in (caught.value.hint or "")
    assert store.get(first) == b"first"
    assert not store.exists(second)
    store.delete(second)
    assert [entry.key for entry in store.list()] == [first]


def test_empty_folders_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "e/f/g").mkdir(parents=True)
    store = open_store(tmp_path)
    assert list(store.list()) == list(store.list(delimiter="/")) == []
    store.put("e", b"a file where the folder was")
    (tmp_path / "c/d").mkdir(parents=True)
    store.put("c", b"x", mode="create")
    store.put("x/y/z", b"")
    store.put("x/w", b"")
    store.delete("x/y/z")
    assert not (tmp_path / "x/y").exists(), "a folder left empty goes"
    assert (tmp_path / "x").exists()
    store.delete("x/w")
    assert not (tmp_path / "x").exists()
    assert tmp_path.exists()


def test_foreign_names_are_keys(tmp_path: Path) -> None:
    """File names are bytes; those that are no UTF-8 go through as Python has them."""
    raw = os.fsencode(tmp_path) + b"/n\xff"
    try:
        with open(raw, "wb") as file:
            file.write(b"odd")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    store = open_store(tmp_path)
    [entry] = store.list()
    assert store.get(entry.key) == b"odd"


# -- files: listing -----------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "a-", "a.", "a0", "é", "z\U0001f600", "～"])


@settings(max_examples=50, deadline=None)
@given(
    keys=st.sets(st.lists(names, min_size=1, max_size=3).map("/".join), max_size=12),
    prefix=st.sampled_from(["", "a", "a/", "a-", "b/a", "é", "../", "/", "a//", "x"]),
    delimiter=st.sampled_from(["", "/", "-", "a/"]),
    start_after=st.sampled_from(["", "a", "a/", "a/b", "a-", "b", "é/a", "￿"]),
)
def test_files_list_as_memory_does(
    tmp_path_factory: pytest.TempPathFactory, keys: set[str], prefix: str, delimiter: str, start_after: str
) -> None:
    root = tmp_path_factory.mktemp("list")
    files, memory = open_store(root), open_store(f"memory://{root.name}")
    for key in list(keys):
        if any(other.startswith(key + "/") for other in keys):
            keys.discard(key)  # files cannot hold both
    for key in keys:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(key.encode())
        memory.put(key, key.encode())

    def shown(store: ObjectStore) -> list[tuple[str, int | None]]:
        entries = store.list(prefix, delimiter=delimiter, start_after=start_after)
        return [(entry.key, entry.size if isinstance(entry, ObjectMeta) else None) for entry in entries]

    expected = shown(memory)
    assert shown(files) == expected
    found = [key for key, size in expected if size is not None]
    assert found == sorted(found, key=lambda key: key.encode())
    for key in list(keys):
        memory.delete(key)


def test_listing_is_lazy(tmp_path: Path) -> None:
    """The first entries of a deep tree come before the rest of it is looked at."""
    store = open_store(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "k").write_bytes(b"")
    entries = store.list()
    assert next(entries).key == "a/k"
    (tmp_path / "b/k").unlink()
    (tmp_path / "b/l").write_bytes(b"")
    assert [entry.key for entry in entries] == ["b/l"]
    assert [entry for entry in store.list(delimiter="/") if isinstance(entry, CommonPrefix)] == [
        CommonPrefix("a/"),
        CommonPrefix("b/"),
    ]


def test_a_denied_folder_is_not_passed_over(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root is denied nothing")
    (tmp_path / "shut").mkdir(mode=0)
    try:
        with pytest.raises(AccessDeniedError):
            list(open_store(tmp_path).list())
    finally:
        (tmp_path / "shut").chmod(0o700)


# -- files: content -----------------------------------------------------------------------------


def test_each_replacement_has_its_own_etag(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    etags = [store.put("k", b"same").etag for _ in range(50)]
    assert len(set(etags)) == 50
    assert store.head("k").etag == etags[-1]
    assert next(store.list()).etag == etags[-1]  # type: ignore[union-attr]


def test_a_file_written_to_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by us, who replace; by somebody with an editor."""
    backend = LocalBackend(str(tmp_path))
    path = tmp_path / "k"
    path.write_bytes(bytes(200_000))
    pread, preadv = os.pread, os.preadv

    def meddle(change: Callable[[], Any]) -> None:
        def wrapped(fd: int, buffers: Any, offset: int) -> int:
            count = preadv(fd, buffers, offset)
            change()
            return count

        monkeypatch.setattr(os, "preadv", wrapped)
        monkeypatch.setattr(os, "pread", lambda fd, n, at: (pread(fd, n, at), change())[0])

    def append() -> None:
        with open(path, "ab") as file:
            file.write(b"more")

    meddle(append)
    with pytest.raises(ObjectChangedError):
        backend.get("k")
    with pytest.raises(ObjectChangedError):
        backend.get("k", 5, 10)
    with pytest.raises(ObjectChangedError):
        backend.read_into("k", 0, memoryview(bytearray(10)))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [b[:100] for b in buffers], at) if at == 0 else 0)
    with pytest.raises(TruncatedError):
        backend.get("k")


def test_metadata_in_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.put("k", b"x", content_type="image/png", metadata={"Label": "seven é"})
    meta = store.head("k")
    assert (meta.content_type, dict(meta.metadata)) == ("image/png", {"label": "seven é"})
    store.copy("k", "copy")
    assert store.head("copy").metadata == meta.metadata

    def no_attributes(*_: Any) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "setxattr", no_attributes)
    with pytest.raises(UnsupportedOperationError) as caught:
        store.put("k", b"y", metadata={"a": "b"})
    assert caught.value.hint
    assert store.get("k") == b"x", "nothing was half done"
    store.put("k", b"z", content_type="text/plain")  # a type is a comfort, not data
    store.put("new", b"z", mode="create")  # nor is our own write id
    with store.multipart("parts", part_size=10) as writer:
        writer.write(bytes(25))
    assert not open_store(tmp_path / "sub").capabilities().metadata


def test_parts_must_be_the_ones_uploaded(tmp_path: Path) -> None:
    for backend in (LocalBackend(str(tmp_path)), MemoryBackend(uuid.uuid4().hex)):
        upload_id = backend.create_multipart("k")
        one, two = (backend.upload_part("k", upload_id, n, b"part %d" % n) for n in (1, 2))
        again = backend.upload_part("k", upload_id, 1, b"new 1")
        for parts in ([one, two], [two, again], [again, again]):
            with pytest.raises(S3LoaderError, match="part"):
                backend.complete_multipart("k", upload_id, parts)
        assert list(backend.list()) == []
        with pytest.raises(ObjectNotFoundError):
            backend.upload_part("other", upload_id, 1, b"")
        with pytest.raises(ObjectNotFoundError):
            backend.upload_part("k", "../../etc", 1, b"")
        assert [(key, id_) for key, id_, _ in backend.list_multipart()] == [("k", upload_id)]
        assert backend.complete_multipart("k", upload_id, [again, two]).size == 11
        assert bytes(backend.get("k")[1]) == b"new 1part 2"
        with pytest.raises(ObjectNotFoundError):
            backend.complete_multipart("k", upload_id, [again, two])
        backend.abort_multipart("k", upload_id)
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


def test_versions_are_refused(tmp_path: Path) -> None:
    for store in (open_store(tmp_path), open_store(f"memory://{uuid.uuid4().hex}")):
        store.put("k", b"x")
        for call in (lambda s=store: s.get("k", version_id="1"), lambda s=store: s.head("k", version_id="1")):
            with pytest.raises(UnsupportedOperationError):
                call()


# -- the facade ---------------------------------------------------------------------------------


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
    store = open_store(tmp_path / "store", options=StoreOptions(part_size=1000))
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


def test_relative_path_is_a_law() -> None:
    assert _files.relative_path("a/ b/ç") == os.fsencode("a/ b/ç")
