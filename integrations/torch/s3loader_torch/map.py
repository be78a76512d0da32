"""`S3MapDataset`: any sample by its number; a batch of them with coalesced reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from s3loader import ConfigError, Decode, SampleReader
from s3loader.adapters import DatasetSource, FromSources, checked, open_source
from s3loader_torch.compat import DatasetKeywords, without_connector
from s3loader_torch.convert import ReturnType, to_return_type, to_tensors
from s3loader_torch.topology import end_with_parent

__all__ = ["S3MapDataset"]


@checked
class S3MapDataset(TorchDataset[Any], FromSources):
    """Random access: ``dataset[i]``, and ``dataset.__getitems__([i, j, ...])``, which torch's DataLoader calls for each batch.

    `from_prefix` and `from_objects` take s3torchconnector's keywords, and give readers unless told otherwise.

    For training, `S3IterableDataset` is faster: it reads whole blocks. This one is for samplers of your own and for evaluation.

    Args:
        dataset: What `s3loader.open_dataset` returns, or a URL for it.
        decode: Extension -> function, a function, or one of the names that `s3loader.LoaderOptions` knows; None: no decoding.
        transform: Called with each decoded sample.
        return_type: What raw bytes become: ``"tensor"``, ``"bytes"``, ``"reader"`` or ``"sample"``.
        verify: Check the CRC32C of every member that has one.
        options: With a URL, those of `s3loader.open_dataset` and `open_store`.

    Raises:
        ConfigError: an option is unusable.
    """

    object_defaults: ClassVar[Mapping[str, Any]] = {"return_type": "reader"}

    def __init__(
        self,
        dataset: DatasetSource,
        *,
        decode: Decode = None,
        transform: Callable[[Any], Any] | None = None,
        return_type: ReturnType = "tensor",
        verify: bool = True,
        **options: Unpack[DatasetKeywords],
    ) -> None:
        self.source, rest = open_source(dataset, without_connector(options))
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

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several samples at once, in the order given.

        Raises:
            IndexError: an index is out of range.
        """
        end_with_parent()
        size = len(self)
        numbers = np.array([range(size)[index] for index in indices], dtype=np.int64)
        return [to_tensors(sample) for sample in self._reader.read(numbers)]
