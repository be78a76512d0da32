"""The clients that `get.py` compares ours with."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any

from _child import here, until
from get_base import Check, Client, Moved


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
