"""s3dlio's PyTorch datasets."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from s3loader import ranks
from s3loader.compat.s3dlio_loaders import Objects, check_meaningless
from s3loader.errors import ConfigError
from s3loader.toolbox import single

__all__ = ["BytesReader", "ObjectStoreIterableDataset", "ObjectStoreMapDataset", "S3IterableDataset", "S3MapDataset"]


class BytesReader(io.BytesIO):
    """An object as a file."""

    def readall(self) -> bytes:
        """What is left of it."""
        return self.read()

    read_all = readall

    def __len__(self) -> int:
        return self.getbuffer().nbytes


class _Shape:
    """What is made of the bytes of an object."""

    def __init__(self, return_type: str, writable: bool, quiet: bool) -> None:
        self.kind = str(return_type).lower()
        if self.kind not in ("tensor", "bytes", "reader"):
            raise ConfigError(
                "return_type must be 'tensor', 'bytes', or 'reader'", hint="tensor is 1-D uint8, reader a file object"
            )
        self._writable = writable
        self._quiet = quiet

    def __call__(self, data: memoryview | bytes) -> Any:
        if self.kind == "bytes":
            return bytes(data)
        if self.kind == "reader":
            return BytesReader(data)
        if not len(data):
            return torch.empty(0, dtype=torch.uint8)
        if self._writable:
            return torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with warnings.catch_warnings():
            if self._quiet:
                warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
            return torch.frombuffer(bytes(data), dtype=torch.uint8)


class S3IterableDataset(IterableDataset[Any]):
    """The objects below a URI, one by one: a 1-D uint8 tensor, bytes or a file of each.

    With `enable_sharding` each is given once over all ranks and workers; without it, once over the workers of a rank. `shuffle`
    and `seed` decide the order, another one each epoch. Batches are the DataLoader's business; `batch_size` and `drop_last` are
    its words, too.
    """

    def __init__(
        self,
        uri: str,
        *,
        loader_opts: dict[str, Any] | None = None,
        writable: bool = False,
        suppress_nonwritable_warning: bool = True,
        enable_sharding: bool = False,
        return_type: str = "tensor",
    ) -> None:
        options = dict(loader_opts or {})
        check_meaningless(options)
        self._objects = Objects(
            uri, shuffle=options.get("shuffle", False), seed=options.get("seed", 0), prefetch=options.get("prefetch", 8)
        )
        self._shape = _Shape(return_type, writable, suppress_nonwritable_warning)
        self._sharded = enable_sharding

    @classmethod
    def from_prefix(
        cls,
        uri: str,
        *,
        batch_size: int = 1,
        drop_last: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        prefetch: int = 8,
        auto_tune: bool = False,
        reader_mode: str = "sequential",
        part_size: int = 8 << 20,
        max_inflight_parts: int = 4,
        enable_sharding: bool = False,
        writable: bool = False,
        suppress_nonwritable_warning: bool = True,
        return_type: str = "tensor",
    ) -> S3IterableDataset:
        """The objects below `uri`."""
        if drop_last or batch_size != 1:
            warnings.warn(
                "s3dlio's batch_size and drop_last mean nothing to the dataset: give them to the DataLoader",
                UserWarning,
                stacklevel=2,
            )
        options = {
            "shuffle": shuffle,
            "seed": seed,
            "num_workers": num_workers,
            "prefetch": prefetch,
            "auto_tune": auto_tune,
            "reader_mode": reader_mode,
            "part_size": part_size,
            "max_inflight_parts": max_inflight_parts,
        }
        return cls(
            uri,
            loader_opts=options,
            writable=writable,
            suppress_nonwritable_warning=suppress_nonwritable_warning,
            enable_sharding=enable_sharding,
            return_type=return_type,
        )

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if self._sharded:
            found = ranks.find_ranks()
            rank, world = found.rank, found.world_size
            index, count = rank * count + index, world * count
        for data in self._objects.read(self._objects.of(index, count)):
            yield self._shape(data)


class S3MapDataset(Dataset[Any]):
    """The objects below a URI by their number, in order of their keys."""

    def __init__(
        self,
        uri: str,
        *,
        reader_mode: str = "sequential",
        part_size: int = 8 << 20,
        max_inflight_parts: int = 4,
        writable: bool = False,
        suppress_nonwritable_warning: bool = True,
        return_type: str = "tensor",
    ) -> None:
        check_meaningless({"reader_mode": reader_mode, "part_size": part_size, "max_inflight_parts": max_inflight_parts})
        self._objects = Objects(uri)
        self._shape = _Shape(return_type, writable, suppress_nonwritable_warning)

    @classmethod
    def from_prefix(cls, uri: str, **kwargs: Any) -> S3MapDataset:
        """The objects below `uri`."""
        return cls(uri, **kwargs)

    def __len__(self) -> int:
        return len(self._objects.urls)

    def __getitem__(self, index: int) -> Any:
        return self._shape(single.get(self._objects.urls[index]))


ObjectStoreIterableDataset = S3IterableDataset
ObjectStoreMapDataset = S3MapDataset
