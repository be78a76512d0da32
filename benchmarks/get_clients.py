"""The clients of `get.py`, each run by `_child.serve` in its own process and interpreter.

A client answers two verbs: ``read(deadline, check)`` and ``write(deadline)``. Both move the items of
the workload with `connections` requests in flight, start no new one after `deadline`, and return
the bytes and items moved. ``check(i, data)`` is given only in the warm-up; it compares content.
"""

from __future__ import annotations

import importlib
import io
import os
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from _child import here, in_threads, resident, serve, until

Check = Callable[[int, Any], None] | None
Moved = dict[str, Any]


class Client:
    """What all share: the workload, and the keys and ranges it consists of."""

    modules: tuple[str, ...] = ()
    """Imported before memory is counted: what a client is made of is not what it uses."""

    def __init__(self, spec: dict[str, Any]) -> None:
        for name in self.modules:
            importlib.import_module(name)
        spec["base"] = resident()
        self.spec = spec
        self.variant: str = spec["variant"]
        self.bucket: str = spec["bucket"]
        self.endpoint: str = spec["endpoint"]
        self.count: int = spec["count"]
        self.size: int = spec["size"]
        self.connections: int = spec["connections"]
        self.single: bool = spec["single"]
        self.ca: str | None = spec["ca"]
        self.keys: list[str] = [spec["key"]] if self.single else [spec["key"] % i for i in range(self.count)]
        self.payload = os.urandom(self.size) if spec["write"] else b""
        self.connect()

    def connect(self) -> None: ...

    def key(self, i: int) -> str:
        return self.keys[0] if self.single else self.keys[i]

    def read(self, deadline: float, check: Check) -> Moved:
        def one(i: int) -> int:
            data = self.get_range(self.key(i), i * self.size, self.size) if self.single else self.get(self.keys[i])
            if check:
                check(i, data)
            return len(data)

        return in_threads(self.connections, self.count, deadline, one)

    def write(self, deadline: float) -> Moved:
        if self.variant == "multipart":
            self.multipart()
            return {"bytes": self.count * self.size, "items": self.count}

        def one(i: int) -> int:
            self.put(self.keys[i])
            return self.size

        return in_threads(self.connections, self.count, deadline, one)

    def get(self, key: str) -> Any:
        raise NotImplementedError

    def get_range(self, key: str, start: int, length: int) -> Any:
        raise NotImplementedError

    def put(self, key: str) -> None:
        raise NotImplementedError

    def multipart(self) -> None:
        raise NotImplementedError


class Obstore(Client):
    """Synchronous calls in threads; in variant ``async`` coroutines in one event loop."""

    modules = ("obstore", "obstore.store")

    def connect(self) -> None:
        import obstore
        from obstore.store import S3Store

        options: dict[str, Any] = {"allow_http": True, "pool_max_idle_per_host": "256"}
        if self.ca:
            with open(self.ca) as file:
                options["root_certificate"] = file.read()
        config: dict[str, Any] = {}
        if self.variant in ("unsigned", "multipart"):
            config["unsigned_payload"] = True
        self.store = S3Store(
            self.bucket,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id="benchmark-key",
            secret_access_key="benchmark-secret",
            virtual_hosted_style_request=False,
            client_options=options,
            **config,
        )
        self.obstore = obstore

    def get(self, key: str) -> Any:
        return self.obstore.get(self.store, key).bytes()

    def get_range(self, key: str, start: int, length: int) -> Any:
        return self.obstore.get_range(self.store, key, start=start, length=length)

    def put(self, key: str) -> None:
        self.obstore.put(self.store, key, self.payload, use_multipart=False)

    def multipart(self) -> None:
        parts = (self.payload for _ in range(self.count))
        self.obstore.put(self.store, self.keys[0], parts, chunk_size=self.size, max_concurrency=self.connections)

    def read(self, deadline: float, check: Check) -> Moved:
        if self.variant != "async":
            return super().read(deadline, check)
        import asyncio

        moved = {"bytes": 0, "items": 0}
        numbers = iter(until(deadline, range(self.count)))

        async def loop() -> None:
            for i in numbers:
                if self.single:
                    data = await self.obstore.get_range_async(self.store, self.key(i), start=i * self.size, length=self.size)
                else:
                    data = await (await self.obstore.get_async(self.store, self.keys[i])).bytes_async()
                if check:
                    check(i, data)
                moved["bytes"] += len(data)
                moved["items"] += 1

        async def everything() -> None:
            await asyncio.gather(*(loop() for _ in range(self.connections)))

        asyncio.run(everything())
        return moved


class Repeated(io.RawIOBase):
    """A file that holds `payload` `times` times over."""

    def __init__(self, payload: bytes, times: int) -> None:
        self.payload = memoryview(payload)
        self.left = len(payload) * times

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = min(len(buffer), self.left, len(self.payload))
        buffer[:n] = self.payload[:n]
        self.left -= n
        return n


class Boto3(Client):
    """One client shared by the threads; transfer manager for the multipart upload."""

    modules = ("boto3",)

    def connect(self) -> None:
        import boto3
        from botocore.config import Config

        os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
        self.client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="benchmark-key",
            aws_secret_access_key="benchmark-secret",
            verify=self.ca,
            config=Config(max_pool_connections=self.connections + 4, s3={"addressing_style": "path"}),
        )

    def get(self, key: str) -> Any:
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def get_range(self, key: str, start: int, length: int) -> Any:
        return self.client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-{start + length - 1}")["Body"].read()

    def put(self, key: str) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=self.payload)

    def multipart(self) -> None:
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_chunksize=self.size, max_concurrency=self.connections)
        self.client.upload_fileobj(
            io.BufferedReader(Repeated(self.payload, self.count), self.size), self.bucket, self.keys[0], Config=config
        )


class S3TorchConnector(Client):
    """Its `S3Client`, as its datasets use it: sequential readers; range readers for ranges."""

    modules = ("s3torchconnector",)

    def connect(self) -> None:
        from s3torchconnector import S3ReaderConstructor
        from s3torchconnector._s3client import S3Client, S3ClientConfig
        from s3torchconnectorclient._mountpoint_s3_client import ObjectInfo

        os.environ.update(AWS_ACCESS_KEY_ID="benchmark-key", AWS_SECRET_ACCESS_KEY="benchmark-secret")
        if self.ca:
            raise RuntimeError("its CRT client takes no CA bundle, only the system's store of certificates")
        self.client = S3Client("us-east-1", endpoint=self.endpoint, s3client_config=S3ClientConfig(force_path_style=True))
        self.ranged = S3ReaderConstructor.range_based(buffer_size=0)
        self.info = ObjectInfo(self.keys[0], '"e"', self.size * (self.count if self.single else 1), 0, None, None)
        self.buffers: dict[int, tuple[Any, bytearray]] = {}

    def get(self, key: str) -> Any:
        return self.client.get_object(self.bucket, key, object_info=self.info).read()

    def get_range(self, key: str, start: int, length: int) -> Any:
        if here.number not in self.buffers:
            reader = self.client.get_object(self.bucket, key, object_info=self.info, reader_constructor=self.ranged)
            self.buffers[here.number] = reader, bytearray(length)
        reader, buffer = self.buffers[here.number]
        reader.seek(start)
        return memoryview(buffer)[: reader.readinto(buffer)]

    def put(self, key: str) -> None:
        with self.client.put_object(self.bucket, key) as writer:
            writer.write(self.payload)

    def multipart(self) -> None:
        with self.client.put_object(self.bucket, self.keys[0]) as writer:
            for _ in range(self.count):
                writer.write(self.payload)


class S3dlio(Client):
    """`get_many` in batches that hold 64 MiB, threads for ranges; `put_many`, `MultipartUploadWriter`."""

    modules = ("s3dlio",)

    def __init__(self, spec: dict[str, Any]) -> None:
        os.environ.update(
            AWS_ENDPOINT_URL=spec["endpoint"],
            AWS_REGION="us-east-1",
            AWS_ACCESS_KEY_ID="benchmark-key",
            AWS_SECRET_ACCESS_KEY="benchmark-secret",
            S3DLIO_H2C="0",
            S3DLIO_POOL_MAX_IDLE_PER_HOST="256",
        )
        if spec["ca"]:
            os.environ["AWS_CA_BUNDLE"] = os.environ["AWS_CA_BUNDLE_PATH"] = spec["ca"]
        super().__init__(spec)

    def connect(self) -> None:
        import s3dlio

        self.s3dlio = s3dlio
        self.root = f"s3://{self.bucket}/"
        self.batch = max(2 * self.connections, min(1000, (64 << 20) // self.size))

    def get_range(self, key: str, start: int, length: int) -> Any:
        return memoryview(self.s3dlio.get_range(self.root + key, start, length))

    def batches(self, deadline: float) -> Iterator[range]:
        for start in until(deadline, range(0, self.count, self.batch)):
            yield range(start, min(start + self.batch, self.count))

    def read(self, deadline: float, check: Check) -> Moved:
        if self.single:
            return super().read(deadline, check)
        moved = {"bytes": 0, "items": 0}
        for batch in self.batches(deadline):
            for uri, data in self.s3dlio.get_many([self.root + self.keys[i] for i in batch], self.connections):
                if check:
                    check(int(uri.rsplit("/", 1)[1]), memoryview(data))
                moved["bytes"] += len(data)
                moved["items"] += 1
        return moved

    def write(self, deadline: float) -> Moved:
        if self.variant == "multipart":
            return super().write(deadline)
        moved = {"bytes": 0, "items": 0}
        for batch in self.batches(deadline):
            self.s3dlio.put_many([(self.root + self.keys[i], self.payload) for i in batch], self.connections)
            moved["bytes"] += len(batch) * self.size
            moved["items"] += len(batch)
        return moved

    def multipart(self) -> None:
        writer = self.s3dlio.MultipartUploadWriter(
            self.bucket, self.keys[0], part_size=self.size, max_in_flight=self.connections, abort_on_drop=True
        )
        for _ in range(self.count):
            writer.write(self.payload)
        writer.close()


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
        """The engine below all wrappers, called as the public calls do it."""
        from s3loader.store.wrapper import innermost

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
