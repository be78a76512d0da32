"""S3 servers for the tests of the object layer: started when first asked for, once per session."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from s3loader.store import open_store
from s3loader.testing import Server, ServerKind, StoreSuite, server


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
