"""S3 servers for the tests of the object layer: started when first asked for, once per session."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bad_network import DATA, ENGINES, Open
from rogue_server import DATA as ROGUE_DATA
from rogue_server import RogueServer

from s3loader.store import ObjectStore, StoreOptions, open_store
from s3loader.testing import FaultProxy, Rule, Server, ServerKind, StoreSuite, server


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[ServerKind], Server]]:
    """A running server of a kind."""
    running: dict[ServerKind, Server] = {}
    with contextlib.ExitStack() as stack:

        def get(kind: ServerKind) -> Server:
            if kind not in running:
                running[kind] = stack.enter_context(server(kind))
            return running[kind]

        yield get


@pytest.fixture(scope="session")
def shared_bucket(servers: Callable[[ServerKind], Server]) -> Callable[[ServerKind], str]:
    """A bucket in which every test has a folder of its own."""
    buckets: dict[ServerKind, str] = {}

    def get(kind: ServerKind) -> str:
        if kind not in buckets:
            buckets[kind] = servers(kind).bucket()
        return buckets[kind]

    return get


@pytest.fixture(scope="session")
def crowded_bucket(servers: Callable[[ServerKind], Server]) -> Callable[[ServerKind], str]:
    """A bucket with the objects of `StoreSuite.crowd`, for all engines to read."""
    buckets: dict[ServerKind, str] = {}

    def get(kind: ServerKind) -> str:
        if kind not in buckets:
            bucket = servers(kind).bucket()
            client = servers(kind).client()
            with ThreadPoolExecutor(4) as pool:
                for _ in pool.map(lambda key: client.put_object(Bucket=bucket, Key=key, Body=key.encode()), StoreSuite.crowd()):
                    pass
            client.close()
            buckets[kind] = bucket
        return buckets[kind]

    return get


@pytest.fixture(scope="session")
def crowded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same objects in a folder."""
    folder = tmp_path_factory.mktemp("crowded")
    with open_store(folder) as store:
        StoreSuite.fill(store)
    return folder


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long one waits between tries is tested elsewhere."""
    monkeypatch.setattr("s3loader.store.retry._BASE", 0.01)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    """Each of the S3 engines."""
    return request.param


@pytest.fixture
def through(servers: Callable[[ServerKind], Server], shared_bucket: Callable[[ServerKind], str], engine: Any) -> Iterator[Open]:
    """A store of `engine` behind a proxy with these rules, the proxy, and the same place without it."""
    with contextlib.ExitStack() as stack:

        def start(
            *rules: Rule, kind: ServerKind = "ministack", verify_checksums: bool = False, **options: Any
        ) -> tuple[ObjectStore, FaultProxy, ObjectStore]:
            running = servers(kind)
            root = f"{shared_bucket(kind)}/{uuid.uuid4().hex}"
            plain = stack.enter_context(running.open_store(root))
            plain.put("k", DATA)
            proxy = stack.enter_context(FaultProxy(running.endpoint_url, rules, verify_checksums=verify_checksums))
            given = StoreOptions(**{"max_attempts": 3, "read_timeout": 10, "retry_budget": 20, **options})
            store = running.open_store(root, engine=engine, endpoint_url=proxy.endpoint_url, options=given)
            stack.callback(store.close)
            return store, proxy, plain

        yield start


@pytest.fixture(name="server")
def rogue_server() -> Iterator[RogueServer]:
    """A server that misbehaves as told, with the object ``k``."""
    with RogueServer() as server:
        server.objects["k"] = ROGUE_DATA
        yield server
