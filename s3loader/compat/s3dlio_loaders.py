"""s3dlio's loaders: objects below a URI, one by one, in order or shuffled, each exactly once over ranks and workers."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

from s3loader import ranks
from s3loader.errors import ConfigError
from s3loader.toolbox.many import read_each
from s3loader.toolbox.selecting import only_objects, select

__all__ = ["JaxIterable", "Objects", "S3JaxIterable", "batches_of", "check_meaningless", "make_tf_dataset"]

_MEANING: Final = {
    "auto_tune": (False, "the number of connections is always measured"),
    "num_workers": (0, "fetching needs no workers; give num_workers to the DataLoader to decode in processes"),
    "reader_mode": ("sequential", "large objects are read whole, in one request"),
    "part_size": (8 << 20, "large objects are read whole, in one request"),
    "max_inflight_parts": (4, "large objects are read whole, in one request"),
}


def check_meaningless(options: dict[str, Any]) -> None:
    """Warn of options that were changed and mean nothing here."""
    for name, (default, why) in _MEANING.items():
        if name in options and options[name] != default:
            warnings.warn(f"s3dlio's {name}={options[name]!r} means nothing here: {why}", UserWarning, stacklevel=4)


class Objects:
    """The objects below a URI, as an epoch gives them.

    Args:
        uri: A bucket or folder.
        shuffle: Another order in each epoch, from `seed` and the epoch's number.
        seed: Of the order.
        prefetch: Requests at a time.
    """

    def __init__(self, uri: str, *, shuffle: bool = False, seed: int = 0, prefetch: int = 8) -> None:
        if prefetch < 0:
            raise ConfigError(f"prefetch cannot be {prefetch}", hint="give 0 or more objects")
        self.uri = uri
        self.shuffle = shuffle
        self.seed = seed
        self.prefetch = max(1, prefetch)
        self.epoch = 0
        self._urls: list[str] | None = None

    @property
    def urls(self) -> list[str]:
        """All of them, in order of their keys; listed once."""
        if self._urls is None:
            self._urls = [found.url for found, _ in only_objects(select(self.uri, {}, recursive=True))]
        return self._urls

    def of(self, index: int, count: int) -> list[str]:
        """The share of one of `count` readers of this epoch; the next call is of the next epoch."""
        urls = [*self.urls]
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(urls)
        self.epoch += 1
        return urls[index::count]

    def read(self, urls: list[str]) -> Iterator[memoryview]:
        """Their bytes, in order."""
        for _, result in read_each(urls, self.prefetch, {}):
            yield result.data


def batches_of(items: Iterator[Any], batch_size: int, drop_last: bool) -> Iterator[list[Any]]:
    """`items` in lists of `batch_size`; the last one may be shorter, or is left out."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch and not drop_last:
        yield batch


def _arrays(objects: Objects, batch_size: int, drop_last: bool, writable: bool, sharded: bool) -> Iterator[Any]:
    import numpy as np

    found = ranks.find_ranks()
    rank, world = (found.rank, found.world_size) if sharded else (0, 1)
    for batch in batches_of(objects.read(objects.of(rank, world)), batch_size, drop_last):
        for data in batch:
            array = np.frombuffer(data, np.uint8)
            array = array.copy() if writable else array
            array.flags.writeable = writable
            yield array


class S3JaxIterable:
    """uint8 arrays of the objects below a URI, one an object. `batch_size` only decides what `drop_last` drops, as there."""

    def __init__(
        self,
        uri: str,
        *,
        loader_opts: dict[str, Any] | None = None,
        transform: Callable[[Any], Any] | None = None,
        writable: bool = False,
        suppress_nonwritable_warning: bool = True,
    ) -> None:
        del suppress_nonwritable_warning  # an array that may not be written to says so itself
        options = dict(loader_opts or {})
        check_meaningless(options)
        self._objects = Objects(
            uri, shuffle=options.get("shuffle", False), seed=options.get("seed", 0), prefetch=options.get("prefetch", 8)
        )
        self._batch_size = options.get("batch_size", 1)
        self._drop_last = options.get("drop_last", False)
        self._transform = transform
        self._writable = writable

    @classmethod
    def from_prefix(
        cls,
        uri: str,
        *,
        prefetch: int = 8,
        num_workers: int = 0,
        batch_size: int = 1,
        drop_last: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        auto_tune: bool = False,
        transform: Callable[[Any], Any] | None = None,
        writable: bool = False,
        suppress_nonwritable_warning: bool = True,
    ) -> S3JaxIterable:
        """The objects below `uri`."""
        options = {
            "prefetch": prefetch,
            "num_workers": num_workers,
            "batch_size": batch_size,
            "drop_last": drop_last,
            "shuffle": shuffle,
            "seed": seed,
            "auto_tune": auto_tune,
        }
        return cls(
            uri,
            loader_opts=options,
            transform=transform,
            writable=writable,
            suppress_nonwritable_warning=suppress_nonwritable_warning,
        )

    def __iter__(self) -> Iterator[Any]:
        for array in _arrays(self._objects, self._batch_size, self._drop_last, self._writable, sharded=False):
            yield array if self._transform is None else self._transform(array)


def make_tf_dataset(
    uri: str,
    *,
    prefetch: int = 8,
    num_workers: int = 0,
    batch_size: int = 1,
    drop_last: bool = False,
    shuffle: bool = False,
    seed: int = 0,
    auto_tune: bool = False,
    map_fn: Callable[[Any], Any] | None = None,
    writable: bool = False,
    suppress_nonwritable_warning: bool = True,
) -> Any:
    """A `tf.data.Dataset` of uint8 vectors, one an object."""
    import tensorflow as tf

    del suppress_nonwritable_warning, writable  # TensorFlow copies
    check_meaningless({"num_workers": num_workers, "auto_tune": auto_tune})
    objects = Objects(uri, shuffle=shuffle, seed=seed, prefetch=prefetch)
    made = tf.data.Dataset.from_generator(
        lambda: _arrays(objects, batch_size, drop_last, False, sharded=False),
        output_signature=tf.TensorSpec((None,), tf.uint8),
    )
    return made if map_fn is None else made.map(map_fn)


JaxIterable = S3JaxIterable
