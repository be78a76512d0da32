"""The conformance suite on every store we ship: memory, files, and three S3 servers through each engine."""

from __future__ import annotations

import socket
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from s3loader import events
from s3loader.store import ObjectStore, StoreOptions, open_store
from s3loader.testing import (
    Fault,
    FaultAction,
    FaultProxy,
    Rule,
    Server,
    ServerKind,
    StoreSuite,
    open_faulty_store,
)
from s3loader.testing.suite import BulkTests, ListTests, MultipartTests, ReadTests, WriteTests
from s3loader.types import Capabilities

EVERYTHING = Capabilities(
    create=True, update=True, multipart_create=True, multipart_update=True, get_if_match=True, upload_checksum=True
)
NOTHING = Capabilities(
    create=False, update=False, multipart_create=False, multipart_update=False, get_if_match=False, upload_checksum=False
)
MOTO = Capabilities(
    create=True, update=True, multipart_create=True, multipart_update=False, get_if_match=True, upload_checksum=False
)
SECRET = "loopback/only/never/a/real/secret/000001"
WRONG = "this/is/not/the/secret/of/the/server/002"


class TestMemory(StoreSuite):
    shared = False
    capabilities = EVERYTHING

    @pytest.fixture
    def store(self) -> Iterator[ObjectStore]:
        with open_store(f"memory://{uuid.uuid4().hex}/some/folder") as store:
            yield store


class TestFile(StoreSuite):
    capabilities = EVERYTHING

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[ObjectStore]:
        root = tmp_path / "ünï #root"
        root.mkdir()
        with open_store(f"file://{root}") as store:
            yield store
        left = [path for path in root.rglob(".s3loader*") if path.is_file()]
        assert left == [], "temporary files were left behind"

    @pytest.fixture
    def crowded(self, crowded_folder: Path) -> Iterator[ObjectStore]:
        with open_store(crowded_folder) as store:
            yield store


FAULTS = [
    Fault(kind, probability=0.015, times=None)
    for kind in ("unavailable", "throttled", "timeout", "reset", "drop_reply", "truncate")
]


class Faulty(StoreSuite):
    """Every tenth request fails in some way, and nobody notices."""

    steady = False
    start_methods = ("fork",)

    seed: int

    @pytest.fixture(autouse=True)
    def _seed(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("s3loader.store.retry._BASE", 0.01)
        self.seed = zlib.crc32(request.node.name.encode())  # each test has faults of its own, every time the same

    def open(self, url: str) -> ObjectStore:
        store, _ = open_faulty_store(url, FAULTS, seed=self.seed, options=StoreOptions(max_attempts=9))
        return store

    def reopen(self, store: ObjectStore) -> ObjectStore:
        return self.open(store.url)


class TestMemoryWithFaults(Faulty):
    shared = False
    capabilities = EVERYTHING

    @pytest.fixture
    def store(self, _seed: None) -> Iterator[ObjectStore]:
        with self.open(f"memory://{uuid.uuid4().hex}/folder") as store:
            yield store

    @pytest.fixture
    def crowded(self, _seed: None) -> Iterator[ObjectStore]:
        with open_store("memory://crowded-for-faults") as plain, self.open(plain.url) as store:
            if not plain.exists(self.crowd()[-1]):
                self.fill(plain)
            yield store


class TestFileWithFaults(Faulty):
    capabilities = EVERYTHING

    @pytest.fixture
    def store(self, _seed: None, tmp_path: Path) -> Iterator[ObjectStore]:
        with self.open(f"file://{tmp_path}") as store:
            yield store

    @pytest.fixture
    def crowded(self, _seed: None, crowded_folder: Path) -> Iterator[ObjectStore]:
        with self.open(f"file://{crowded_folder}") as store:
            yield store


class S3Suite(StoreSuite):
    """An S3 server through one engine."""

    kind: ClassVar[ServerKind]
    engine: ClassVar[Any]
    secrets = (SECRET, WRONG)
    server: Server
    bucket: str

    @pytest.fixture(autouse=True)
    def _server(self, servers: Callable[[ServerKind], Server], shared_bucket: Callable[[ServerKind], str]) -> None:
        self.server = servers(self.kind)
        self.bucket = shared_bucket(self.kind)

    @pytest.fixture
    def store(self, _server: None) -> Iterator[ObjectStore]:
        with self.server.open_store(f"{self.bucket}/{uuid.uuid4().hex}", engine=self.engine) as store:
            yield store

    @pytest.fixture
    def crowded(self, crowded_bucket: Callable[[ServerKind], str]) -> Iterator[ObjectStore]:
        with self.server.open_store(crowded_bucket(self.kind), engine=self.engine) as store:
            yield store

    def test_the_engine_that_was_asked_for_does_the_work(self, store: ObjectStore) -> None:
        assert store.engine == self.engine
        seen: list[events.OpEvent] = []
        unsubscribe = events.subscribe(seen.append)
        try:
            store.put("k", b"x" * 10)
            store.get("k")
            store.get_range("k", 1, 3)
            list(store.get_many(["k"] * 3, driver="pump"))
            list(store.get_many(["k"] * 3, driver="threads"))
        finally:
            unsubscribe()
        used = {(event.op, event.engine) for event in seen if event.error is None}
        assert ("GET", self.engine) in used
        assert {engine for op, engine in used if op == "GET"} == {self.engine}
        if self.kind != "ministack":  # which refuses CRC32C, so that another engine has to write
            assert {engine for op, engine in used if op == "PUT"} == {self.engine}

    def broken(self, store: ObjectStore, how: Literal["bucket", "credentials", "endpoint"]) -> ObjectStore | None:
        options: dict[str, Any] = {
            "engine": self.engine,
            "options": StoreOptions(max_attempts=2, connect_timeout=300, read_timeout=300, retry_budget=300),
        }
        if how == "bucket":
            return self.server.open_store("there-is-no-such-bucket", **options)
        if how == "credentials":
            if self.kind != "rclone":
                return None  # the others take any signature
            return self.server.open_store(self.bucket, secret_access_key=WRONG, **options)
        with socket.create_server(("127.0.0.1", 0)) as gone:
            url = f"http://127.0.0.1:{gone.getsockname()[1]}"
        return self.server.open_store(self.bucket, endpoint_url=url, **options)


class MiniStack(S3Suite):
    kind = "ministack"
    capabilities = EVERYTHING  # its upload checksum is a Content-MD5: it refuses every CRC32C, right or wrong


class Moto(S3Suite):
    kind = "moto"
    test_updates_lose_nothing: Any = None  # moto looks and writes in two steps: two puts with one If-Match can both win
    start_methods = ("fork",)  # the others do not depend on the server
    capabilities = MOTO


class RClone(S3Suite):
    kind = "rclone"
    start_methods = ("fork",)
    capabilities = NOTHING
    # A folder; file names that are too long; and paths that it refuses, but two seconds late.
    mangled_keys = frozenset(
        {"trail/", "n" * 1024, "n" * 1025, "a//b", "/lead", "a/../b", "../a", "..", ".", "./a", "a/.", "a/./b"}
    )
    delimiters = ("/",)


class TestMiniStackDirect(MiniStack):
    engine = "direct"


class TestMiniStackBoto3(MiniStack):
    engine = "boto3"


class TestMotoDirect(Moto):
    engine = "direct"


class TestMotoBoto3(Moto):
    engine = "boto3"


class TestRCloneDirect(RClone):
    engine = "direct"


class TestRCloneBoto3(RClone):
    engine = "boto3"


NETWORK: tuple[FaultAction, ...] = ("refuse", "drop_reply", "truncate", "reset")
ANSWERS = {500: "InternalError", 503: "SlowDown"}


class TestDirectThroughABadNetwork(ReadTests, WriteTests, MultipartTests, BulkTests, ListTests):
    """Faults below the engine, where its own parsing and its connections are."""

    capabilities = MOTO
    steady = False
    test_abandoned_iterators_leave_nothing: Any = None  # the proxy has threads and sockets in this process, too
    test_updates_lose_nothing: Any = None  # as of `Moto`

    @pytest.fixture
    def proxy(
        self, request: pytest.FixtureRequest, servers: Callable[[ServerKind], Server], monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[FaultProxy]:
        monkeypatch.setattr("s3loader.store.retry._BASE", 0.01)
        rules = [Rule(action, probability=0.01) for action in NETWORK]
        rules += [Rule("error", status=status, code=code, probability=0.01) for status, code in ANSWERS.items()]
        with FaultProxy(servers("moto").endpoint_url, rules, seed=zlib.crc32(request.node.name.encode())) as proxy:
            yield proxy

    @pytest.fixture
    def store(
        self,
        proxy: FaultProxy,
        servers: Callable[[ServerKind], Server],
        shared_bucket: Callable[[ServerKind], str],
    ) -> Iterator[ObjectStore]:
        with self._open(servers("moto"), f"{shared_bucket('moto')}/{uuid.uuid4().hex}", proxy) as store:
            yield store

    @pytest.fixture
    def crowded(
        self,
        proxy: FaultProxy,
        servers: Callable[[ServerKind], Server],
        crowded_bucket: Callable[[ServerKind], str],
    ) -> Iterator[ObjectStore]:
        with self._open(servers("moto"), crowded_bucket("moto"), proxy) as store:
            yield store

    @staticmethod
    def _open(running: Server, bucket: str, proxy: FaultProxy) -> ObjectStore:
        options = StoreOptions(max_attempts=9)
        return running.open_store(bucket, engine="direct", endpoint_url=proxy.endpoint_url, options=options)
