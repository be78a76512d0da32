"""Both drivers of our S3 client: order, bounds, laziness, interruption."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rogue_server import Fault, Reply, Request, RogueServer, s3_backend

from s3loader.errors import ObjectNotFoundError, StoreConnectionError
from s3loader.store.s3.blocking import Threads
from s3loader.store.s3.connection import Connections
from s3loader.store.s3.jobs import Job
from s3loader.store.s3.pump import Pump
from s3loader.store.s3.reads import ReadJob
from s3loader.types import ReadRequest

MIB = 1 << 20
DRIVERS = [Pump, Threads]
Driver = type[Pump] | type[Threads]


@pytest.fixture
def server() -> Iterator[RogueServer]:
    with RogueServer() as server:
        for i in range(40):
            server.objects[f"k{i}"] = bytes([i]) * (1000 * (i + 1))
        yield server


def drive(server: RogueServer, driver: Driver, requests: Iterator[ReadRequest], **options: object) -> Iterator[Job]:
    backend = s3_backend(server)
    jobs = (ReadJob(backend._context, request) for request in requests)
    return driver(jobs, backend._connections, **options).run()  # type: ignore[arg-type]


class Gate:
    """A fault that holds back answers until they are let go, and counts those that wait."""

    def __init__(self) -> None:
        self.waiting = threading.Semaphore(0)
        self.open = threading.Event()

    def __call__(self, request: Request, reply: Reply, sock: socket.socket) -> bool:
        self.waiting.release()
        self.open.wait(600)
        sock.sendall(reply.raw())
        return True


@pytest.mark.parametrize("driver", DRIVERS)
def test_results_keep_the_order_of_requests_whatever_the_order_of_answers(server: RogueServer, driver: Driver) -> None:
    gate = Gate()
    others = threading.Semaphore(0)

    def first_last(request: Request) -> Fault | None:
        if request.key == "k0":
            return gate
        others.release()
        return None

    server.fault = first_last
    threading.Thread(target=lambda: [others.acquire(timeout=600) for _ in range(9)] and gate.open.set(), daemon=True).start()
    requests = [ReadRequest(f"k{i}", tag=i) for i in range(10)]
    jobs = list(drive(server, driver, iter(requests), max_bytes=64 * MIB, concurrency=3))
    assert [job.result.request.tag for job in jobs] == list(range(10))
    assert all(job.result.data == server.objects[job.result.request.key] for job in jobs)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("known", [True, False], ids=["size known", "size unknown"])
def test_no_more_bytes_than_the_bound_are_in_hand(server: RogueServer, driver: Driver, known: bool) -> None:
    size, bound = 300_000, 2 * MIB
    for i in range(30):
        server.objects[f"b{i}"] = bytes(size)
    drawn: list[int] = []

    def requests() -> Iterator[ReadRequest]:
        for i in range(30):
            drawn.append(i)
            yield ReadRequest(f"b{i}", 0, size if known else None)

    backend = s3_backend(server)
    jobs = (ReadJob(backend._context, request) for request in requests())
    machine = driver(jobs, backend._connections, max_bytes=bound, concurrency=8)
    for taken, job in enumerate(machine.run(), 1):
        assert len(job.result.data) == size
        assert machine._held <= bound
        if known:
            assert (len(drawn) - taken - 1) * size <= bound  # one was drawn but has no room
    assert taken == 30
    assert machine._held == 0
    backend.close()


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_object_larger_than_the_bound_goes_alone(server: RogueServer, driver: Driver) -> None:
    for i in range(3):
        server.objects[f"b{i}"] = bytes([i]) * 5 * MIB
    keys = ["k1", "b0", "k2", "b1", "b2", "k3"]
    requests = [ReadRequest(key) for key in keys] + [ReadRequest(key, 0, len(server.objects[key])) for key in keys]
    jobs = list(drive(server, driver, iter(requests), max_bytes=MIB, concurrency=4))
    assert all(job.result.data == server.objects[job.result.request.key] for job in jobs)
    assert len(jobs) == 12


@pytest.mark.parametrize("driver", DRIVERS)
def test_objects_that_turn_out_too_large_wait_for_their_turn(server: RogueServer, driver: Driver) -> None:
    """Sizes unknown: all are begun, most must not be received before there is room."""
    for i in range(12):
        server.objects[f"b{i}"] = bytes([i]) * 7 * MIB
    results = drive(server, driver, (ReadRequest(f"b{i}") for i in range(12)), max_bytes=8 * MIB, concurrency=6)
    for i, job in enumerate(results):
        assert job.error is None
        assert job.result.data == server.objects[f"b{i}"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_requests_are_drawn_as_they_are_needed(server: RogueServer, driver: Driver) -> None:
    drawn: list[int] = []

    def requests() -> Iterator[ReadRequest]:
        for i in range(40):
            drawn.append(i)
            assert threading.current_thread() is threading.main_thread()
            yield ReadRequest(f"k{i}", 0, 1000)

    results = drive(server, driver, requests(), max_bytes=5000, concurrency=4)
    assert not drawn
    assert next(results).result.request.key == "k0"
    assert len(drawn) <= 7
    results.close()  # type: ignore[attr-defined]
    assert len(drawn) <= 7


@pytest.mark.parametrize("driver", DRIVERS)
def test_connections_are_kept_and_shared(server: RogueServer, driver: Driver) -> None:
    backend = s3_backend(server)
    for _ in range(3):
        jobs = (ReadJob(backend._context, ReadRequest(f"k{i}")) for i in range(40))
        assert all(job.result for job in driver(jobs, backend._connections, max_bytes=MIB, concurrency=4).run())
    backend.get("k1")
    assert server.connections <= 4
    backend.close()


@pytest.mark.parametrize("driver", DRIVERS)
def test_errors_do_not_stop_the_others(server: RogueServer, driver: Driver) -> None:
    keys = ["k0", "gone", "k1", "gone", "k2"]
    jobs = list(drive(server, driver, (ReadRequest(key) for key in keys), max_bytes=MIB, concurrency=2))
    assert [type(job.error) for job in jobs] == [type(None), ObjectNotFoundError] * 2 + [type(None)]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("error", [ZeroDivisionError, OSError])
def test_an_error_of_the_requests_comes_after_the_answers_before_it(
    server: RogueServer, driver: Driver, error: type[Exception]
) -> None:
    def requests() -> Iterator[ReadRequest]:
        for i in range(9):
            yield ReadRequest(f"k{i}", 0, 1000)
        raise error

    results = drive(server, driver, requests(), max_bytes=MIB, concurrency=4)
    assert [next(results).result.request.key for _ in range(9)] == [f"k{i}" for i in range(9)]
    with pytest.raises(error):
        next(results)


def test_the_careful_path_gets_no_more_at_once_than_there_may_be_connections(server: RogueServer) -> None:
    backend = s3_backend(server)
    most = 0
    running: list[int] = []

    def chunked(request: Request, reply: Reply, sock: socket.socket) -> bool:
        nonlocal most
        running.append(1)
        most = max(most, len(running))
        body, reply.body = reply.body, b""
        head = reply.set("Content-Length", None).set("Transfer-Encoding", "chunked").raw()
        sock.sendall(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        running.pop()
        return True

    server.fault = lambda request: chunked
    requests = [ReadRequest(f"k{i % 40}", 0, 1000) for i in range(400)]
    results = list(backend.read_many(requests, max_bytes=MIB, concurrency=3))
    assert [result.request for result in results] == requests
    assert all(result.data == server.objects[result.request.key][:1000] for result in results)
    assert len(server.requests) < 420
    assert most <= 3
    backend.close()


def test_an_idle_connection_that_talks_is_dropped(server: RogueServer) -> None:
    backend = s3_backend(server)

    def chatty(request: Request, reply: Reply, sock: socket.socket) -> bool:
        unasked = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil" if request.key == "k0" else b""
        sock.sendall(reply.raw() + unasked)
        return True

    server.fault = lambda request: chatty
    for _ in range(3):
        for i in range(6):
            assert backend.get(f"k{i}")[1] == server.objects[f"k{i}"]
        results = backend.read_many((ReadRequest(f"k{i}") for i in range(6)), max_bytes=MIB, concurrency=2)
        assert [bytes(result.data) for result in results] == [server.objects[f"k{i}"] for i in range(6)]
    backend.close()


SCRIPT = """
import os, sys, threading, time
sys.path[:0] = {path!r}
from rogue_server import RogueServer, s3_backend
from s3loader.types import ReadRequest

with RogueServer() as server:
    server.objects["k"] = bytes(100_000)
    backend = s3_backend(server)
    hold = threading.Event()
    server.fault = lambda request: (lambda *a: hold.wait(600)) if len(server.requests) > 20 else None
    threading.Thread(target=lambda: (sys.stdin.readline(), os.kill(os.getpid(), 2)), daemon=True).start()
    try:
        requests = [ReadRequest("k")] * 100
        for i, result in enumerate(backend.read_many(requests, max_bytes=1 << 20, concurrency=4, driver={driver!r})):
            if i == 5:
                print("go", flush=True)
        print("no interrupt")
    except KeyboardInterrupt:
        backend.close()
        left = [t.name for t in threading.enumerate() if t.name.startswith("s3loader-s3")]
        print("interrupted", left, flush=True)
    hold.set()
"""


@pytest.mark.parametrize("driver", ["pump", "threads"])
def test_ctrl_c_ends_it(driver: str) -> None:
    script = SCRIPT.format(path=[str(Path(__file__).parent)], driver=driver)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "go\n"
        out, _ = child.communicate("\n", timeout=600)
    assert out == "interrupted []\n"
    assert child.returncode == 0


def test_ctrl_c_between_two_results(server: RogueServer) -> None:
    """SIGINT between two results: the iterator ends, its connections in use are closed, the others kept."""
    backend = s3_backend(server)
    results = backend.read_many((ReadRequest(f"k{i}") for i in range(40)), max_bytes=MIB, concurrency=4)
    next(results)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - whichever of the two it hits
        os.kill(os.getpid(), signal.SIGINT)
        list(results)
    assert backend.get("k3")[1] == server.objects["k3"]
    backend.close()


def test_threads_end_with_the_iterator(server: RogueServer) -> None:
    gate = Gate()
    server.fault = lambda request: gate if request.key != "k0" else None
    backend = s3_backend(server)
    requests = (ReadRequest(f"k{i}", 0, 1000) for i in range(40))
    results = backend.read_many(requests, max_bytes=MIB, concurrency=4, driver="threads")
    next(results)
    assert all(gate.waiting.acquire(timeout=600) for _ in range(3))
    results.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("s3loader-s3")]
    gate.open.set()
    backend.close()


def test_forgotten_backends_close_their_sockets(server: RogueServer) -> None:
    backend = s3_backend(server)
    backend.get("k1")
    connections = backend._connections
    assert isinstance(connections, Connections)
    [idle] = connections._idle
    del backend, connections
    gc.collect()
    assert idle.sock.fileno() == -1


@pytest.mark.parametrize(("driver", "left"), [("pump", 0), ("pump", 1), ("pump", 3), ("threads", 0)])
def test_no_descriptor_left_is_a_typed_error(server: RogueServer, driver: str, left: int) -> None:
    backend = s3_backend(server)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        gc.collect()
        for _ in range(5):  # what earlier tests left is given back by threads that are still ending
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            time.sleep(0.05)
        for _ in range(left):
            os.close(taken.pop())
        with pytest.raises(StoreConnectionError, match="no file descriptor") as caught:
            list(backend.read_many([ReadRequest("k1")], max_bytes=MIB, concurrency=1, driver=driver))  # type: ignore[arg-type]
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "ulimit" in str(caught.value.hint)
    assert caught.value.details["sent"] is False
    [result] = backend.read_many([ReadRequest("k1")], max_bytes=MIB, concurrency=1)
    assert bytes(result.data) == server.objects["k1"]
    backend.close()
