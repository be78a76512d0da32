"""The clients of `load.py`: each delivers shuffled batches of 32 samples, in its own process.

``run("epoch")`` starts cold (a new dataset object, an empty cache folder), reads until the time is
up and tells when the first batch came; ``run("resume")`` tells how long the first batch takes after
the state of the middle of an epoch was loaded.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import os
import random
import shutil
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from _child import resident, serve

BATCH = 32


class Client:
    """The workload: `count` samples of `size` bytes; `urls` of tars, or a prefix."""

    resumable = False

    def __init__(self, spec: dict[str, Any]) -> None:
        warnings.simplefilter("ignore")
        self.spec = spec
        self.endpoint: str = spec["endpoint"]
        self.size: int = spec["size"]
        self.count: int = spec["count"]
        self.workers: int = spec["workers"]
        self.bucket: str = spec["bucket"]
        self.round = 0
        os.environ.update(
            AWS_ACCESS_KEY_ID="benchmark-key",
            AWS_SECRET_ACCESS_KEY="benchmark-secret",
            AWS_REGION="us-east-1",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_EC2_METADATA_DISABLED="true",
        )
        self.imports()
        spec["base"] = resident()
        self.folder = tempfile.mkdtemp(prefix="cache-", dir=spec["scratch"])

    def imports(self) -> None: ...

    def batches(self) -> Iterator[list[Any]]:
        """One epoch, from nothing."""
        raise NotImplementedError

    def halfway(self) -> Iterator[list[Any]]:
        """The rest of an epoch whose first half was consumed by somebody else."""
        raise NotImplementedError

    def fresh_folder(self) -> str:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        return self.folder

    def run(self, verb: str) -> dict[str, Any]:
        """One round."""
        self.round += 1
        start = time.perf_counter()
        deadline = start + self.spec["budget"]
        source = self.batches() if verb == "epoch" else self.halfway()
        first = 0.0
        items = moved = 0
        for batch in source:
            first = first or time.perf_counter() - start
            items += len(batch)
            moved += sum(map(len, batch))
            if verb == "resume" or time.perf_counter() > deadline:
                break
        close = getattr(source, "close", None)
        if close:
            close()
        assert moved == items * self.size, f"{items} samples have {moved} bytes"
        whole = verb == "epoch" and time.perf_counter() < deadline
        assert not whole or items == self.count, f"{items} samples instead of {self.count}"
        return {"bytes": moved, "items": items, "first": first}


class S3Loader(Client):
    """The core loader over tars with an index, every member verified; variant ``loose``: objects below a prefix."""

    resumable = True

    def imports(self) -> None:
        import s3loader.loader  # noqa: F401

    def loader(self) -> Any:
        from s3loader.loader import Loader, from_prefix, from_webdataset

        options = {
            "endpoint_url": self.endpoint,
            "region": "us-east-1",
            "access_key_id": "benchmark-key",
            "secret_access_key": "benchmark-secret",
        }
        if self.spec["variant"] == "loose":
            dataset = from_prefix(f"s3://{self.bucket}/{self.spec['prefix']}", **options)
        else:
            dataset = from_webdataset([f"s3://{self.bucket}/{key}" for key in self.spec["tars"]], group=None, **options)
        return Loader(dataset, batch_size=BATCH, shuffle="block", seed=self.round, verify=self.spec["variant"] != "unverified")

    def batches(self) -> Iterator[list[Any]]:
        yield from self.loader()

    def halfway(self) -> Iterator[list[Any]]:
        loader = self.loader()
        plan = loader.plan
        loader.load_state_dict(plan.state(0, plan.size // 2 // BATCH * BATCH).as_dict())
        yield from loader


class S3LoaderTorch(S3Loader):
    """``s3loader.torch`` under torch's DataLoader with worker processes."""

    resumable = False

    def imports(self) -> None:
        import s3loader.torch  # noqa: F401

    def batches(self) -> Iterator[list[Any]]:
        from torch.utils.data import DataLoader

        from s3loader.torch import S3IterableDataset

        dataset = S3IterableDataset.from_webdataset(
            [f"s3://{self.bucket}/{key}" for key in self.spec["tars"]],
            group=None,
            endpoint_url=self.endpoint,
            region="us-east-1",
            access_key_id="benchmark-key",
            secret_access_key="benchmark-secret",
            batch_size=BATCH,
            shuffle="block",
            seed=self.round,
        )
        yield from DataLoader(dataset, batch_size=None, num_workers=self.workers)


class WebDataset(Client):
    """WebDataset over HTTP (it starts curl), shards and a buffer of 1,000 shuffled, nothing verified."""

    def imports(self) -> None:
        import webdataset  # noqa: F401

    def batches(self) -> Iterator[list[Any]]:
        import webdataset as wds

        urls = [f"{self.endpoint}/{self.bucket}/{key}" for key in self.spec["tars"]]
        dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=self.round, workersplitter=wds.split_by_worker)
        pipeline = dataset.shuffle(1000).to_tuple("bin").batched(BATCH, collation_fn=lambda rows: [row[0] for row in rows])
        if self.workers:
            pipeline = wds.WebLoader(pipeline, batch_size=None, num_workers=self.workers)
        yield from pipeline


class LitData(Client):
    """LitData's own chunks from S3 through its cache folder; cold unless the variant is ``warm``.

    Its S3 client refuses plain HTTP and has no option for it; its table of client options is given one.
    """

    resumable = True

    def imports(self) -> None:
        from litdata.streaming import downloader

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True

    def loader(self) -> Any:
        from litdata import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(
            f"s3://{self.bucket}/{self.spec['litdata']}",
            cache_dir=self.folder if self.spec["variant"] == "warm" else self.fresh_folder(),
            shuffle=True,
            seed=1,  # its state is refused under another one
            drop_last=False,
            storage_options={"endpoint_url": self.endpoint},
        )
        return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=self.workers, collate_fn=list)

    def batches(self) -> Iterator[list[Any]]:
        yield from self.loader()

    def halfway(self) -> Iterator[list[Any]]:
        if not hasattr(self, "state"):
            loader = self.loader()
            for _ in itertools.islice(loader, self.count // 2 // BATCH):
                pass
            self.state = loader.state_dict()
        loader = self.loader()
        loader.load_state_dict(self.state)
        yield from loader


def stub_torchvision() -> None:
    """Streaming imports torchvision for its vision datasets, not used here; where the one installed was
    built for another torch, empty classes stand in for what it asks for."""
    try:
        import torchvision  # noqa: F401

        return
    except (ImportError, RuntimeError):
        pass
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]


class Mosaic(Client):
    """MosaicML Streaming's MDS shards from S3 through a cold local folder."""

    def imports(self) -> None:
        os.environ["S3_ENDPOINT_URL"] = self.endpoint
        stub_torchvision()
        import streaming  # noqa: F401

    def batches(self) -> Iterator[list[Any]]:
        from streaming import StreamingDataset
        from torch.utils.data import DataLoader

        dataset = StreamingDataset(
            remote=f"s3://{self.bucket}/{self.spec['mds']}",
            local=self.fresh_folder(),
            shuffle=True,
            batch_size=BATCH,
            shuffle_seed=self.round,
        )
        yield from DataLoader(
            dataset, batch_size=BATCH, num_workers=self.workers, collate_fn=lambda rows: [row["data"] for row in rows]
        )


class S3TorchConnector(Client):
    """`S3IterableDataset.from_objects` over the loose objects in a shuffled order."""

    def imports(self) -> None:
        import s3torchconnector  # noqa: F401

    def batches(self) -> Iterator[list[Any]]:
        from s3torchconnector import S3ClientConfig, S3IterableDataset
        from torch.utils.data import DataLoader

        names = [f"s3://{self.bucket}/{self.spec['prefix']}{i:06d}" for i in range(self.count)]
        random.Random(self.round).shuffle(names)
        dataset = S3IterableDataset.from_objects(
            names,
            region="us-east-1",
            endpoint=self.endpoint,
            transform=_read,
            s3client_config=S3ClientConfig(force_path_style=True),
            enable_sharding=True,
        )
        yield from DataLoader(dataset, batch_size=BATCH, num_workers=self.workers, collate_fn=list)


def _read(reader: Any) -> bytes:
    return bytes(reader.read())


class S3dlio(Client):
    """`ObjectStoreIterableDataset.from_prefix` over the loose objects, shuffled by it."""

    def imports(self) -> None:
        os.environ.update(AWS_ENDPOINT_URL=self.endpoint, S3DLIO_H2C="0")
        import s3dlio.torch  # noqa: F401

    def batches(self) -> Iterator[list[Any]]:
        from s3dlio.torch import ObjectStoreIterableDataset
        from torch.utils.data import DataLoader

        dataset = ObjectStoreIterableDataset.from_prefix(
            f"s3://{self.bucket}/{self.spec['prefix']}",
            shuffle=True,
            seed=self.round,
            num_workers=8,
            prefetch=64,
            batch_size=BATCH,
            return_type="bytes",
        )
        yield from DataLoader(dataset, batch_size=BATCH, num_workers=0, collate_fn=list)


CLIENTS: dict[str, type[Client]] = {
    "s3loader": S3Loader,
    "s3loader.torch": S3LoaderTorch,
    "webdataset": WebDataset,
    "litdata": LitData,
    "mosaicml-streaming": Mosaic,
    "s3torchconnector": S3TorchConnector,
    "s3dlio": S3dlio,
}


def prepare_peer_data(spec: dict[str, Any]) -> dict[str, Any]:
    """Write the same samples as LitData chunks and MDS shards below ``spec["out"]``."""
    stub_torchvision()
    from litdata.streaming.writer import BinaryWriter
    from streaming import MDSWriter

    lit, mds = spec["out"] + "/litdata", spec["out"] + "/mds"
    os.makedirs(lit)
    writer = BinaryWriter(lit, chunk_bytes=64 << 20)
    with MDSWriter(out=mds, columns={"data": "bytes"}, size_limit=64 << 20) as other:
        for i in range(spec["count"]):
            with open(f"{spec['samples']}/{i:06d}", "rb") as file:
                data = file.read()
            writer[i] = data
            other.write({"data": data})
    writer.done()
    writer.merge(1)
    return {"bytes": 0, "items": 0}


def prepare(spec: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Make the client; one epoch unmeasured, which also fills the cache of the warm ones."""
    if spec["client"] == "prepare":
        return lambda: prepare_peer_data(spec)
    client = CLIENTS[spec["client"]](spec)
    budget, spec["budget"] = spec["budget"], spec["budget"] if spec["variant"] != "warm" else 60
    client.run("epoch")
    spec["budget"] = budget
    return client.run


if __name__ == "__main__":
    serve(prepare)
