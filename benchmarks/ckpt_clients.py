"""The clients of `ckpt.py`: each saves and loads one state of float32 tensors, in its own process.

A client answers ``save(n)``, ``load_into()`` (into the state's own tensors) and ``load_fresh()``
(returns new tensors). All run against the in-memory S3 server.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from _child import resident, serve

BASE = 1 << 20
"""Elements of the pattern that every tensor repeats, plus its own number."""


class Client:
    """A state of `tensors` tensors, and where it is saved."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.endpoint: str = spec["endpoint"]
        self.bucket: str = spec["bucket"]
        self.prefix: str = spec["prefix"]
        self.imports()
        spec["base"] = resident()
        generator = torch.Generator().manual_seed(1)
        self.pattern = torch.rand(BASE, generator=generator)
        self.state = {f"layer.{i:03d}.weight": torch.empty(spec["elements"]) for i in range(spec["tensors"])}
        self.fill()
        self.bytes = sum(t.nbytes for t in self.state.values())
        os.environ.update(AWS_ACCESS_KEY_ID="benchmark-key", AWS_SECRET_ACCESS_KEY="benchmark-secret", AWS_REGION="us-east-1")
        os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
        self.connect()

    def imports(self) -> None: ...

    def connect(self) -> None: ...

    def fill(self) -> None:
        for i, t in enumerate(self.state.values()):
            torch.add(self.pattern, float(i), out=t.view(-1, BASE)[0])
            t.view(-1, BASE)[1:] = t.view(-1, BASE)[0]

    def check(self, state: dict[str, Any]) -> None:
        assert list(state) == list(self.state), "other names came back"
        for i, t in enumerate(state.values()):
            assert torch.equal(t.view(-1, BASE)[-1], self.pattern + float(i)), f"tensor {i} came back changed"
            assert torch.equal(t.view(-1, BASE)[0], self.pattern + float(i)), f"tensor {i} came back changed"

    def save(self, n: int) -> None:
        raise NotImplementedError

    def load_fresh(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_into(self) -> None:
        """As a model does it where the library gives new tensors: load, then copy."""
        for name, value in self.load_fresh().items():
            self.state[name].copy_(value)

    # what the parent asks for

    def run(self, verb: str, n: int) -> dict[str, Any]:
        if verb == "save":
            self.save(n)
        elif verb == "load_into":
            self.load_into()
        elif verb == "load_fresh":
            loaded = self.load_fresh()
            assert len(loaded) == len(self.state)
        elif verb == "memcpy":
            return {"bytes": self.bytes, "items": 1, "seconds": self.memcpy()}
        elif verb == "stall":
            return {"bytes": self.bytes, "items": 1, "seconds": self.stall(n)}
        elif verb == "largest":
            return {"key": self.largest()}
        else:
            self.verify()
        return {"bytes": self.bytes, "items": len(self.state)}

    def verify(self) -> None:
        for t in self.state.values():
            t.zero_()
        self.load_into()
        self.check(self.state)
        self.check(self.load_fresh())

    def memcpy(self) -> float:
        """Seconds of one copy of the state into memory that was touched before."""
        target = {name: torch.zeros_like(t) for name, t in self.state.items()}
        best = 1e9
        for _ in range(3):
            start = time.perf_counter()
            for name, t in self.state.items():
                target[name].copy_(t)
            best = min(best, time.perf_counter() - start)
        return best

    def stall(self, n: int) -> float:
        raise NotImplementedError

    def largest(self) -> str:
        """Key of the largest object saved, below the prefix."""
        raise NotImplementedError


class S3TorchConnector(Client):
    """``torch.save`` into `S3Checkpoint.writer`, ``torch.load`` from its reader."""

    def imports(self) -> None:
        import s3torchconnector  # noqa: F401

    def connect(self) -> None:
        from s3torchconnector import S3Checkpoint, S3ClientConfig

        self.checkpoint = S3Checkpoint(
            "us-east-1", endpoint=self.endpoint, s3client_config=S3ClientConfig(force_path_style=True)
        )
        self.uri = f"s3://{self.bucket}/{self.prefix}/state.pt"

    def save(self, n: int) -> None:
        with self.checkpoint.writer(self.uri) as writer:
            torch.save(self.state, writer)

    def load_fresh(self) -> dict[str, Any]:
        with self.checkpoint.reader(self.uri) as reader:
            return dict(torch.load(reader, weights_only=True))


class Dcp(Client):
    """torch.distributed.checkpoint over s3torchconnector's writer and reader, which take no endpoint:
    the file system object in them is replaced by one that has it."""

    def imports(self) -> None:
        import s3torchconnector.dcp  # noqa: F401
        import torch.distributed.checkpoint  # noqa: F401

    def connect(self) -> None:
        import logging
        import warnings

        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)

    def _point(self, storage: Any) -> Any:
        from s3torchconnector import S3ClientConfig
        from s3torchconnector._s3client import S3Client

        storage.fs._client = S3Client(
            "us-east-1", endpoint=self.endpoint, s3client_config=S3ClientConfig(force_path_style=True)
        )
        return storage

    def save(self, n: int) -> None:
        from s3torchconnector.dcp import S3StorageWriter
        from torch.distributed import checkpoint

        path = f"s3://{self.bucket}/{self.prefix}/dcp"
        writer = self._point(S3StorageWriter("us-east-1", path, overwrite=True, thread_count=8))
        checkpoint.save(self.state, storage_writer=writer, no_dist=True)

    def _load(self, state: dict[str, Any]) -> None:
        from s3torchconnector.dcp import S3StorageReader
        from torch.distributed import checkpoint

        reader = self._point(S3StorageReader("us-east-1", f"s3://{self.bucket}/{self.prefix}/dcp"))
        checkpoint.load(state, storage_reader=reader, no_dist=True)

    def load_into(self) -> None:
        self._load(self.state)

    def load_fresh(self) -> dict[str, Any]:
        state = {name: torch.empty_like(t) for name, t in self.state.items()}
        self._load(state)
        return state


class Boto3(Client):
    """``torch.save`` to memory, then the transfer manager; the same way back."""

    def imports(self) -> None:
        import boto3  # noqa: F401

    def connect(self) -> None:
        import boto3
        from botocore.config import Config

        self.client = boto3.client(
            "s3", endpoint_url=self.endpoint, config=Config(max_pool_connections=20, s3={"addressing_style": "path"})
        )
        self.key = f"{self.prefix}/state"

    def save(self, n: int) -> None:
        buffer = io.BytesIO()
        torch.save(self.state, buffer)
        buffer.seek(0)
        self.client.upload_fileobj(buffer, self.bucket, self.key)

    def load_fresh(self) -> dict[str, Any]:
        buffer = io.BytesIO()
        self.client.download_fileobj(self.bucket, self.key, buffer)
        buffer.seek(0)
        return dict(torch.load(buffer, weights_only=True))


class Safetensors(Boto3):
    """safetensors to memory, then boto3's transfer manager; the same way back."""

    def save(self, n: int) -> None:
        from safetensors.torch import save

        self.client.upload_fileobj(io.BytesIO(save(self.state)), self.bucket, self.key)

    def load_fresh(self) -> dict[str, Any]:
        from safetensors.torch import load

        buffer = io.BytesIO()
        self.client.download_fileobj(self.bucket, self.key, buffer)
        return dict(sorted(load(buffer.getvalue()).items()))


class S3dlio(Client):
    """Its checkpoint store, which takes and gives bytes: ``torch.save`` to memory around it."""

    def imports(self) -> None:
        os.environ.update(
            AWS_ENDPOINT_URL=self.endpoint,
            AWS_REGION="us-east-1",
            AWS_ACCESS_KEY_ID="benchmark-key",
            AWS_SECRET_ACCESS_KEY="benchmark-secret",
            S3DLIO_H2C="0",
        )
        import s3dlio  # noqa: F401

    def connect(self) -> None:
        import s3dlio

        self.store = s3dlio.PyCheckpointStore(f"s3://{self.bucket}/{self.prefix}")

    def save(self, n: int) -> None:
        buffer = io.BytesIO()
        torch.save(self.state, buffer)
        self.store.save(n, 0, "pytorch", buffer.getvalue())
        if n:
            self.store.delete_checkpoint(n - 1)

    def load_fresh(self) -> dict[str, Any]:
        return dict(torch.load(io.BytesIO(self.store.load_latest()), weights_only=True))


class S3Loader(Client):
    """`CheckpointManager`: a commit per save, checksums made while staging and verified while loading."""

    def imports(self) -> None:
        import s3loader.checkpoint  # noqa: F401

    def connect(self) -> None:
        from s3loader.checkpoint import CheckpointManager, LatestN

        self.manager = CheckpointManager(
            f"s3://{self.bucket}/{self.prefix}",
            keep=LatestN(1),
            endpoint_url=self.endpoint,
            region="us-east-1",
            access_key_id="benchmark-key",
            secret_access_key="benchmark-secret",
        )

    def save(self, n: int) -> None:
        self.manager.save(n, {"model": self.state}).result()

    def load_into(self) -> None:
        self.manager.restore(target={"model": self.state})

    def load_fresh(self) -> dict[str, Any]:
        return dict(self.manager.restore()["model"])

    def stall(self, n: int) -> float:
        start = time.perf_counter()
        handle = self.manager.save(n, {"model": self.state})
        stalled = time.perf_counter() - start
        handle.result()
        return stalled

    def largest(self) -> str:
        files = self.manager.open().files()
        return max(files, key=files.__getitem__)


CLIENTS: dict[str, type[Client]] = {
    "s3loader": S3Loader,
    "s3torchconnector": S3TorchConnector,
    "dcp": Dcp,
    "boto3": Boto3,
    "safetensors": Safetensors,
    "s3dlio": S3dlio,
}


def prepare(spec: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Make the client and its state; the parent says what to do with it."""
    torch.set_num_threads(spec["threads"])
    return CLIENTS[spec["client"]](spec).run


if __name__ == "__main__":
    serve(prepare)
