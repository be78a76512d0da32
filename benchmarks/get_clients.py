"""The clients of `get.py`, each run by `_child.serve` in its own process and interpreter.

A client answers two verbs: ``read(deadline, check)`` and ``write(deadline)``. Both move the items of
the workload with `connections` requests in flight, start no new one after `deadline`, and return
the bytes and items moved. ``check(i, data)`` is given only in the warm-up; it compares content.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from _child import here, serve, until
from get_base import Check, Client, Moved
from get_peers import Boto3, Obstore, S3dlio, S3TorchConnector


class S3Loader(Client):
    """Ours, through the public API: ``read_many`` and ``put_many`` unless the variant names another call."""

    modules = ("s3loader",)

    def connect(self) -> None:
        from s3loader.store import open_store

        settings: dict[str, Any] = {}
        if self.ca:
            settings["ca_bundle"] = self.ca
        self.store = open_store(
            f"s3://{self.bucket}",
            engine=self.spec["engine"],
            endpoint_url=self.endpoint,
            region="us-east-1",
            access_key_id="benchmark-key",
            secret_access_key="benchmark-secret",
            addressing_style="path",
            **settings,
        )
        self.driver: Any = "threads" if self.spec.get("busy") else "auto"
        if self.spec["variant"] == "own":
            self.driver = "pump"  # our own sockets: over TLS threads read by obstore's
        self.buffers: dict[int, memoryview] = {}
        self.requests()

    def requests(self) -> None:
        """What to ask for, made once: the keys and ranges are the workload, not the client."""
        from s3loader.types import ReadRequest

        if self.single:
            self.asked = [ReadRequest(self.keys[0], i * self.size, (i + 1) * self.size, tag=i) for i in range(self.count)]
        else:
            self.asked = [ReadRequest(key, tag=i) for i, key in enumerate(self.keys)]

    def results(self, deadline: float) -> Iterator[Any]:
        if self.variant == "bare":
            return self.engine().read_many(
                until(deadline, self.asked), max_bytes=64 << 20, concurrency=self.connections, driver=self.driver
            )
        if self.single or self.variant == "read_many":
            return self.store.read_many(until(deadline, self.asked), concurrency=self.connections, driver=self.driver)
        return self.store.get_many(until(deadline, self.keys), concurrency=self.connections, driver=self.driver)

    def read(self, deadline: float, check: Check) -> Moved:
        if self.variant == "read_into":
            return super().read(deadline, check)
        if self.variant == "get_ranges":
            return self.get_ranges(deadline, check)
        total = items = 0
        for result in self.results(deadline):
            if check:
                check(items, result.data)
            total += len(result.data)
            items += 1
        return {"bytes": total, "items": items}

    def engine(self) -> Any:
        """The engine below the pipeline, called as the public calls do it."""
        from s3loader.store.pipeline import innermost

        return innermost(self.store.backend)

    def get_ranges(self, deadline: float, check: Check) -> Moved:
        """Eight ranges a call, not merged into one."""
        moved = {"bytes": 0, "items": 0}
        for first in until(deadline, range(0, self.count, 8)):
            numbers = range(first, min(first + 8, self.count))
            wanted = [(i * self.size, (i + 1) * self.size) for i in numbers]
            for i, data in zip(
                numbers, self.store.get_ranges(self.keys[0], wanted, max_gap=0, max_size=self.size), strict=True
            ):
                if check:
                    check(i, data)
                moved["bytes"] += len(data)
                moved["items"] += 1
        return moved

    def get_range(self, key: str, start: int, length: int) -> Any:
        buffer = self.buffers.get(here.number)
        if buffer is None:
            buffer = self.buffers[here.number] = memoryview(bytearray(length))
        self.store.read_into(key, start, buffer)
        return buffer

    def get(self, key: str) -> Any:
        return self.get_range(key, 0, self.size)

    def write(self, deadline: float) -> Moved:
        if self.variant == "multipart":
            return super().write(deadline)
        from s3loader.types import PutRequest

        puts = (PutRequest(key, self.payload) for key in until(deadline, self.keys))
        if self.variant == "bare":
            done = self.engine().put_many(puts, max_bytes=64 << 20, concurrency=self.connections, driver=self.driver)
            items = sum(1 for _ in done)
            return {"bytes": items * self.size, "items": items}
        items = sum(1 for _ in self.store.put_many(puts, concurrency=self.connections, driver=self.driver))
        return {"bytes": items * self.size, "items": items}

    def multipart(self) -> None:
        with self.store.multipart(self.keys[0], part_size=self.size, max_in_flight=self.connections) as writer:
            for _ in range(self.count):
                writer.write(self.payload)


CLIENTS: dict[str, type[Client]] = {
    "obstore": Obstore,
    "boto3": Boto3,
    "s3torchconnector": S3TorchConnector,
    "s3dlio": S3dlio,
    "s3loader": S3Loader,
}


def prepare(spec: dict[str, Any]) -> Callable[[], Moved]:
    """Make the client, check what it delivers, warm its connections; returns one round."""
    client = CLIENTS[spec["client"]](spec)
    if spec["write"]:
        whole, client.count = client.count, min(client.count, 2 * client.connections)
        client.write(time.perf_counter() + 5)
        client.count = whole
        return lambda: client.write(time.perf_counter() + spec["budget"])

    expected: list[int] = spec["crc"]
    seen: list[int] = []

    def check(i: int, data: Any) -> None:
        if i < len(expected):
            assert len(data) == client.size, f"item {i}: {len(data)} bytes instead of {client.size}"
            assert zlib.crc32(data) == expected[i], f"item {i} has other content"
            seen.append(i)

    keys, whole = client.keys, client.count
    client.count = min(whole, max(len(expected), 2 * client.connections))
    client.keys = keys if client.single else keys[: client.count]
    if spec["client"] == "s3loader":
        client.requests()  # type: ignore[attr-defined]
    client.read(time.perf_counter() + 30, check)
    assert sorted(seen) == list(range(len(expected))), f"items {sorted(seen)} came instead of {len(expected)}"
    client.keys, client.count = keys, whole
    if spec["client"] == "s3loader":
        client.requests()  # type: ignore[attr-defined]
    return lambda: client.read(time.perf_counter() + spec["budget"], None)


if __name__ == "__main__":
    serve(prepare)
