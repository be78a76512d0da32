"""Engines after fork: obstore is never touched in a child of a process that had it, connections are not shared.

(The conformance suite runs every engine in children of all three kinds; here is what lies below it.)
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable

import pytest
from forking import in_child

from s3loader.errors import UnsupportedOperationError
from s3loader.store import Backend, open_store
from s3loader.store.boto3.engine import Boto3Backend
from s3loader.store.engine_choice import open_backend
from s3loader.testing import FaultProxy, Server, ServerKind
from s3loader.types import ObjectURL


@pytest.fixture
def moto(servers: Callable[[ServerKind], Server]) -> Server:
    return servers("moto")


@pytest.fixture
def bucket(shared_bucket: Callable[[ServerKind], str]) -> str:
    return shared_bucket("moto")


def our_client(bucket: str, server: Server) -> Backend:
    return open_backend(ObjectURL.parse(f"s3://{bucket}"), server.settings)


def every_verb(store: Backend, key: str) -> None:
    store.put(key, b"hello", metadata={"m": "1"})
    assert bytes(store.get(key, 1, 3)[1]) == b"el"
    store.read_into(key, 0, memoryview(bytearray(5)))
    assert store.head(key).metadata == {"m": "1"}
    assert key in [entry.key for entry in store.list(key)]
    upload_id = store.create_multipart(key + "m")
    store.complete_multipart(key + "m", upload_id, [store.upload_part(key + "m", upload_id, 1, b"x")])
    store.copy(key, key + "c")
    store.delete(key + "c")
    assert store.delete_many([key + "m"]) == []


def test_used_before(moto: Server, bucket: str) -> None:
    store = our_client(bucket, moto)
    key = uuid.uuid4().hex
    every_verb(store, key)

    def work() -> None:
        every_verb(store, key + "/inherited")
        every_verb(our_client(bucket, moto), key + "/fresh")
        with open_store(f"s3://{bucket}", settings=moto.settings) as opened:
            assert opened.exists(key)
        in_child(lambda: every_verb(store, key + "/grandchild"))

    in_child(work)
    every_verb(store, key)
    store.close()


def test_gcs_and_azure_say_why_not() -> None:
    import obstore  # noqa: F401  loading it is use enough: who calls it cannot be known

    def work() -> None:
        with open_store("gs://some-bucket") as store, pytest.raises(UnsupportedOperationError, match="forked") as caught:
            store.get("k")
        assert "forkserver" in str(caught.value.hint)
        assert store.engine == "obstore"

    in_child(work)


def test_a_child_of_a_process_that_never_used_it() -> None:
    code = (
        "import os\nfrom s3loader.store.obstore import runtime as obstore_runtime\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    from obstore.store import MemoryStore\n"
        "    ok = obstore_runtime.usable() and MemoryStore().put('k', b'x') is not None\n"
        "    os._exit(0 if ok else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=600)


def test_connections_are_not_shared(moto: Server, bucket: str) -> None:
    """A child that wrote to a connection of its parent would give each the other's answers."""
    with FaultProxy(moto.endpoint_url) as proxy:
        settings = moto.settings.replace(endpoint_url=proxy.endpoint_url)
        client = settings.create_client()
        own = Boto3Backend(bucket, settings)
        users = Boto3Backend(bucket, settings, s3_client=client)
        for store in (own, users):
            store.put("fork", b"parent")

        def work() -> None:
            for store in (own, users):
                for number in range(20):
                    store.put(f"fork/{number}", b"c%d" % number)
                    assert bytes(store.get(f"fork/{number}")[1]) == b"c%d" % number

        context = multiprocessing.get_context("fork")
        children = [context.Process(target=work) for _ in range(2)]
        for child in children:
            child.start()
        for number in range(40):
            for store in (own, users):
                store.put(f"fork/p{number}", b"p%d" % number)
                assert bytes(store.get(f"fork/p{number}")[1]) == b"p%d" % number
        for child in children:
            child.join(600)
            assert child.exitcode == 0
            child.close()
        own.close()
        client.close()


@pytest.mark.parametrize("given", [False, True])
def test_fork_while_another_thread_makes_or_uses_the_client(moto: Server, bucket: str, given: bool) -> None:
    client = moto.settings.create_client() if given else None
    store = Boto3Backend(bucket, moto.settings, s3_client=client)
    store.put("busy", b"x" * 100_000)
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            store.get("busy")

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            in_child(lambda: store.get("busy") and None)
        with store._client._lock:
            in_child(lambda: store.get("busy") and None)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    store.close()
    if client is not None:
        client.close()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_pickled_into_another_process(moto: Server, bucket: str, method: str) -> None:
    context = multiprocessing.get_context(method)
    for store in (Boto3Backend(bucket, moto.settings), our_client(bucket, moto)):
        store.put("first", b"x")
        child = context.Process(target=every_verb, args=(store, uuid.uuid4().hex))
        child.start()
        child.join(600)
        assert child.exitcode == 0
        child.close()
        store.close()
