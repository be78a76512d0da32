"""s3dlio's datasets and loaders without a framework: objects by number, one by one, in batches, with or without asyncio.

Differences: `shuffle`, `seed`, `drop_last`, `shard_rank` and `shard_world_size` are honoured; objects come in order and never
out of it, so that a seed means one order; an error reaches whoever iterates; what comes is `bytes`.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from s3loader.compat.s3dlio_loaders import Objects, batches_of, check_meaningless
from s3loader.errors import ConfigError, ObjectNotFoundError, UnsupportedOperationError
from s3loader.loader.loader import in_threads
from s3loader.store.arguments import check_several
from s3loader.toolbox import single
from s3loader.toolbox.many import read_each
from s3loader.toolbox.stores import split_object, url_in
from s3loader.toolbox.twins import in_thread
from s3loader.types import ObjectURL

__all__ = [
    "PyAsyncDataLoader",
    "PyBytesAsyncDataLoader",
    "PyDataset",
    "PyObjectItem",
    "PyS3AsyncDataLoader",
    "PyS3Dataset",
    "PyVecDataset",
    "create_async_loader",
    "create_dataset",
]

T = TypeVar("T")

_DEFAULTS: Final[Mapping[str, Any]] = {
    "batch_size": 32,
    "drop_last": False,
    "shuffle": False,
    "seed": 0,
    "prefetch": 0,
    "shard_rank": 0,
    "shard_world_size": 1,
}
_MEANINGLESS: Final = (
    "auto_tune",
    "max_inflight_parts",
    "max_threads",
    "num_workers",
    "num_workers_pytorch",
    "part_size",
    "reader_mode",
    "skip_head",
    "worker_id",
)
_PREFETCH: Final = 8
"""Requests at a time where `prefetch` is 0."""


class _Options:
    """What a loader was told, as s3dlio names it."""

    def __init__(self, given: Mapping[str, Any] | None) -> None:
        told = dict(given or {})
        if str(told.get("format", "bytes")).lower() == "parquet":
            raise UnsupportedOperationError(
                "format='parquet' has no loader here", op="open", hint="s3loader.from_parquet gives rows, or row groups"
            )
        check_meaningless({name: value for name, value in told.items() if name in _MEANINGLESS})
        unknown = [name for name in told if name not in _DEFAULTS and name not in (*_MEANINGLESS, "format")]
        if unknown:
            warnings.warn(f"s3dlio has no option {unknown[0]!r}; it has {', '.join(_DEFAULTS)}", UserWarning, stacklevel=4)
        values = {**_DEFAULTS, **{name: value for name, value in told.items() if name in _DEFAULTS}}
        for name in ("batch_size", "seed", "prefetch", "shard_rank", "shard_world_size"):
            least = 1 if name in ("batch_size", "shard_world_size") else 0
            value = values[name]
            if isinstance(value, bool) or not isinstance(value, int) or (value < least and name != "seed"):
                raise ConfigError(f"{name} must be a whole number from {least}, not {value!r}", hint="leave it out")
        if values["shard_rank"] >= values["shard_world_size"]:
            raise ConfigError(f"shard_rank {values['shard_rank']} of {values['shard_world_size']}", hint="ranks begin at 0")
        self.batch_size: int = values["batch_size"]
        self.drop_last = bool(values["drop_last"])
        self.prefetch: int = values["prefetch"] or _PREFETCH
        self._shuffle = bool(values["shuffle"])
        self._seed: int = values["seed"]
        self._rank: int = values["shard_rank"]
        self._world: int = values["shard_world_size"]

    def share(self, items: Iterable[T], epoch: int) -> list[T]:
        """What this reader takes of `items` in an epoch, in order."""
        some = list(items)
        if self._shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(some)
        return some[self._rank :: self._world]


class PyVecDataset:
    """Numbers by their place."""

    def __init__(self, obj: Iterable[int]) -> None:
        self._values = list(obj)
        if not all(isinstance(value, int) for value in self._values):
            raise TypeError("PyVecDataset holds whole numbers")

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < len(self._values):
            raise IndexError(f"Index {index} out of range")
        return self._values[index]


class PyDataset:
    """The objects below a URI by their number, in order of their keys; listed once, when the dataset is made.

    Args:
        uri: A bucket or folder, or one object; of any scheme.
        opts: Of the loader, which is given them; means nothing here.

    Raises:
        ObjectNotFoundError: there is none.
    """

    def __init__(self, uri: str, opts: Mapping[str, Any] | None = None) -> None:
        del opts
        self._uris: Sequence[str] = Objects(uri).urls
        if not self._uris:
            raise ObjectNotFoundError("there is no object below it", op="list", url=uri)
        where = ObjectURL.parse(uri)
        folder = str(where).rstrip("/") + "/"
        alone = len(self._uris) == 1 and not self._uris[0].startswith(folder)
        self._keys = [url.rpartition("/")[2] if alone else url.removeprefix(folder) for url in self._uris]

    @staticmethod
    def from_uris(uris: Iterable[str], opts: Mapping[str, Any] | None = None) -> PyDataset:
        """These objects, in this order; nothing is listed."""
        del opts
        check_several(uris, "URI")
        made = PyDataset.__new__(PyDataset)
        made._uris = [url_in(*split_object(uri)) for uri in uris]
        made._keys = list(made._uris)
        if not made._uris:
            raise ConfigError("uris is empty", hint="name at least one object")
        return made

    def __len__(self) -> int:
        return len(self._uris)

    async def get_item(self, index: int) -> bytes:
        """The object with this number."""
        if not 0 <= index < len(self._uris):
            raise IndexError(f"Index {index} out of bounds (dataset has {len(self._uris)} files)")
        return await in_thread(single.get, self._uris[index])

    def keys(self) -> list[str]:
        """Names of the objects below the dataset's URI; their URIs, where it was made of those."""
        return list(self._keys)

    def uris(self) -> list[str]:
        """URIs of the objects, in the order of `keys`."""
        return list(self._uris)


class PyS3Dataset(PyDataset):
    """As `PyDataset`, under the name of s3dlio 0.4.6."""


def create_dataset(uri: str, opts: Mapping[str, Any] | None = None) -> PyDataset:
    """The objects below `uri`."""
    return PyDataset(uri, opts)


class PyAsyncDataLoader(Generic[T]):
    """``async for batch in loader``: lists of the items of a `PyVecDataset`, or of whatever has a length and items."""

    def __init__(self, dataset: Any, opts: Mapping[str, Any] | None = None) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError("dataset has no items by number: of a PyDataset, PyBytesAsyncDataLoader gives batches")
        self._dataset = dataset
        self._options = _Options(opts)
        self._epoch = 0

    async def __aiter__(self) -> AsyncIterator[list[T]]:
        options = self._options
        numbers = options.share(range(len(self._dataset)), self._next_epoch())
        items = (self._dataset[number] for number in numbers)
        for batch in batches_of(items, options.batch_size, options.drop_last):
            yield batch

    def _next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch - 1


class PyObjectItem:
    """An object and where it is from."""

    __slots__ = ("data", "uri")

    def __init__(self, uri: str, data: bytes) -> None:
        self.uri = uri
        self.data = data

    @property
    def byte_count(self) -> int:
        """Its size."""
        return len(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __bytes__(self) -> bytes:
        return self.data

    def __repr__(self) -> str:
        return f"PyObjectItem(uri={self.uri!r}, byte_count={len(self.data)})"


class _Items:
    """Objects one by one, or several at a time."""

    def __init__(self, found: Iterator[PyObjectItem]) -> None:
        self._found = found

    def __iter__(self) -> _Items:
        return self

    def __next__(self) -> PyObjectItem:
        return next(self._found)

    def collect_batch(self, n: int) -> list[PyObjectItem]:
        """The next `n`; fewer at the end, none behind it."""
        return list(islice(self._found, n))


class PyBytesAsyncDataLoader:
    """The objects of a `PyDataset`: ``for data in loader`` one by one, ``async for batch in loader`` in lists of `batch_size`,
    `items` with their URIs.

    Args:
        dataset: Whose objects.
        opts: ``batch_size drop_last shuffle seed prefetch shard_rank shard_world_size``; each iteration is an epoch, with
            another order where they are shuffled. The rest of s3dlio's options mean nothing, and a warning says why.
    """

    def __init__(self, dataset: PyDataset, opts: Mapping[str, Any] | None = None) -> None:
        self._dataset = dataset
        self._options = _Options(opts)
        self._epoch = 0

    def _read(self) -> Iterator[PyObjectItem]:
        uris = self._options.share(self._dataset._uris, self._epoch)
        self._epoch += 1
        for uri, result in read_each(uris, self._options.prefetch, {}):
            yield PyObjectItem(uri, bytes(result.data))

    def __iter__(self) -> Iterator[bytes]:
        return (item.data for item in self._read())

    def items(self) -> _Items:
        """The objects with their URIs; in their order, not in that of their arrival."""
        return _Items(self._read())

    def __aiter__(self) -> AsyncIterator[list[bytes]]:
        options = self._options
        data = (item.data for item in self._read())
        return in_threads(batches_of(data, options.batch_size, options.drop_last))


class PyS3AsyncDataLoader(PyBytesAsyncDataLoader):
    """As `create_async_loader`, under the name of s3dlio 0.4.6."""

    def __init__(self, uri: str, opts: Mapping[str, Any] | None = None) -> None:
        super().__init__(PyDataset(uri), opts)


def create_async_loader(uri: str, opts: Mapping[str, Any] | None = None) -> PyBytesAsyncDataLoader:
    """The objects below `uri`; batches of one object unless `opts` says otherwise."""
    return PyBytesAsyncDataLoader(PyDataset(uri), {"batch_size": 1, **(opts or {})})
