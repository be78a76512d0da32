"""Our S3 client in children of a process that used it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterator

import pytest
from forking import in_child
from rogue_server import RogueServer, s3_backend

from s3loader.errors import ClosedError
from s3loader.store.s3 import S3Backend
from s3loader.types import PutRequest, ReadRequest

MIB = 1 << 20


@pytest.fixture
def server() -> Iterator[RogueServer]:
    with RogueServer() as server:
        for i in range(10):
            server.objects[f"k{i}"] = bytes([i]) * 50_000
        yield server


def use(backend: S3Backend, objects: dict[str, bytes]) -> None:
    keys = sorted(key for key in objects if key.startswith("k"))
    for driver in ("pump", "threads"):
        results = list(backend.read_many([ReadRequest(key) for key in keys], max_bytes=MIB, concurrency=4, driver=driver))
        assert [bytes(result.data) for result in results] == [objects[key] for key in keys]
        list(backend.put_many([PutRequest(f"p{os.getpid()}", b"x" * 9)], max_bytes=MIB, concurrency=1, driver=driver))
    assert backend.get("k3")[1] == objects["k3"]


def test_parent_and_child_go_on_side_by_side(server: RogueServer) -> None:
    backend = s3_backend(server)
    use(backend, server.objects)
    before = server.connections
    in_child(lambda: use(backend, server.objects))
    assert server.connections > before  # the child opened its own
    mine = {request.connection for request in server.requests if request.connection < before}
    seen = len(server.requests)
    use(backend, server.objects)
    assert {request.connection for request in server.requests[seen:]} <= mine  # the parent's still work
    backend.close()


def test_fork_in_the_middle_of_a_bulk_read(server: RogueServer) -> None:
    backend = s3_backend(server)
    for driver in ("pump", "threads"):
        requests = [ReadRequest(f"k{i % 10}") for i in range(60)]
        results = backend.read_many(iter(requests), max_bytes=300_000, concurrency=4, driver=driver)  # type: ignore[arg-type]
        got = [bytes(next(results).data)]
        held = next(results)
        got.append(bytes(held.data))

        def child(results: object = results, held: object = held) -> None:
            assert bytes(held.data) == server.objects["k1"]  # type: ignore[attr-defined]
            with pytest.raises(ClosedError):
                next(results)  # type: ignore[call-overload]
            use(backend, server.objects)

        in_child(child)
        got += [bytes(result.data) for result in results]
        assert got == [server.objects[request.key] for request in requests]
    backend.close()


def test_fork_while_other_threads_are_at_work(server: RogueServer) -> None:
    backend = s3_backend(server)
    stop = threading.Event()
    failed: list[BaseException] = []

    def hammer() -> None:
        try:
            while not stop.is_set():
                use(backend, server.objects)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=hammer) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        in_child(lambda: use(backend, server.objects))
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed
    backend.close()


def _spawned(pickled: bytes, objects: dict[str, bytes]) -> None:
    use(pickle.loads(pickled), objects)


def test_spawned_child(server: RogueServer) -> None:
    backend = s3_backend(server)
    use(backend, server.objects)
    child = multiprocessing.get_context("spawn").Process(target=_spawned, args=(pickle.dumps(backend), dict(server.objects)))
    child.start()
    child.join(600)
    assert child.exitcode == 0
    backend.close()
