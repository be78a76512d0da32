"""`S3MapDataset`: any sample by its number; a batch of them with coalesced reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from s3loader.errors import ConfigError
from s3loader.loader import (
    Dataset,
    Decode,
    SampleReader,
    from_manifest,
    from_objects,
    from_prefix,
    from_webdataset,
)
from s3loader_torch.compat import connector_options, open_source
from s3loader_torch.convert import ReturnType, to_return_type, to_tensors

__all__ = ["S3MapDataset"]


class S3MapDataset(TorchDataset[Any]):
    """Random access: ``dataset[i]``, and ``dataset.__getitems__([i, j, ...])``, which torch's DataLoader calls for each batch.

    For training, `S3IterableDataset` is faster: it reads whole blocks. This one is for samplers of your own and for evaluation.

    Args:
        dataset: What `s3loader.open_dataset` returns, or a URL for it.
        decode: See `s3loader.LoaderOptions`.
        transform: Called with each decoded sample.
        return_type: What raw bytes become; see `S3IterableDataset`.
        verify: Check the CRC32C of every member that has one.
        options: With a URL, those of `s3loader.open_dataset` and `open_store`.

    Raises:
        ConfigError: an option is unusable.
    """

    def __init__(
        self,
        dataset: Dataset | str | Iterable[str],
        *,
        decode: Decode = None,
        transform: Callable[[Any], Any] | None = None,
        return_type: ReturnType = "tensor",
        verify: bool = True,
        **options: Any,
    ) -> None:
        self.source, rest = open_source(dataset, options)
        if rest:
            raise ConfigError(f"unknown option: {', '.join(sorted(rest))}", hint="use decode, transform, return_type, verify")
        bucket = self.source.store.url.partition("://")[2].partition("/")[0]
        self._reader = SampleReader(
            self.source,
            decode=decode,
            transform=to_return_type(return_type, transform, bucket),
            transform_key=return_type == "reader",
            verify=verify,
        )

    @classmethod
    def from_manifest(cls, manifest: str, *, store: Any = None, group: Any = None, where: Any = None, **options: Any) -> Self:
        """The samples a manifest lists; see `s3loader.from_manifest`."""
        store_options, rest = connector_options(options)
        return cls(from_manifest(manifest, store=store, group=group, where=where, **store_options), **rest)

    @classmethod
    def from_webdataset(
        cls, urls: str | Iterable[str], *, store: Any = None, group: Any = "webdataset", **options: Any
    ) -> Self:
        """WebDataset shards by their URLs, braces included; see `s3loader.from_webdataset`."""
        store_options, rest = connector_options(options)
        return cls(from_webdataset(urls, store=store, group=group, **store_options), **rest)

    @classmethod
    def from_prefix(cls, s3_uri: str, *, store: Any = None, group: Any = None, **options: Any) -> Self:
        """Every object under a prefix, as readers unless told otherwise; takes s3torchconnector's keywords."""
        store_options, rest = connector_options(options)
        return cls(from_prefix(s3_uri, store=store, group=group, **store_options), **{"return_type": "reader", **rest})

    @classmethod
    def from_objects(cls, object_uris: str | Iterable[str], *, store: Any = None, group: Any = None, **options: Any) -> Self:
        """These objects, as readers unless told otherwise; takes s3torchconnector's keywords."""
        store_options, rest = connector_options(options)
        return cls(from_objects(object_uris, store=store, group=group, **store_options), **{"return_type": "reader", **rest})

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several samples at once, in the order given.

        Raises:
            IndexError: an index is out of range.
        """
        size = len(self)
        numbers = np.array([range(size)[index] for index in indices], dtype=np.int64)
        return [to_tensors(sample) for sample in self._reader.read(numbers)]
