"""Samples by number, in any order: for map-style datasets, replacements, and looking at data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from s3loader.arguments import checked
from s3loader.errors import ConfigError
from s3loader.loader.dataset import Dataset
from s3loader.loader.decode import Decode
from s3loader.loader.layout import SampleBuffer, plan_reads
from s3loader.loader.options import LoaderOptions
from s3loader.loader.run import Fetcher
from s3loader.loader.sample_stage import SampleStage
from s3loader.loader.stats import LoaderStats
from s3loader.plan.budget import GET_WORTH
from s3loader.plan.order import locate
from s3loader.plan.permutation import Int64Array
from s3loader.units import MIB

__all__ = ["GrainSource", "SampleReader", "read_samples"]


def read_samples(dataset: Dataset, samples: Int64Array, *, verify: bool = True, stats: LoaderStats | None = None) -> list[Any]:
    """Any samples by number, in the order given (they may repeat): neighbours are fetched together.

    Returns:
        memoryviews or dicts, or `Failed` in place of a sample that could not be read.
    """
    alone, which = np.unique(samples, return_inverse=True)
    found = SampleBuffer(len(alone))
    parts, numbers = locate(dataset.starts, alone)
    layouts = dataset.layouts(np.unique(parts).tolist())
    edges = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(parts)] if len(parts) else []
    reads = [
        read
        for low, high in itertools.pairwise(edges)
        for read in plan_reads(
            layouts[int(parts[low])],
            numbers[low:high],
            found,
            low,
            max_gap=GET_WORTH,
            max_size=8 * MIB,
        )
    ]
    fetcher = Fetcher(
        dataset.store,
        grouped=dataset.group is not None,
        verify=verify,
        max_bytes=64 * MIB,
        driver="auto",
        concurrency=None,
        stats=stats if stats is not None else LoaderStats(),
    )
    fetcher.add(reads)
    for _ in fetcher.run():
        pass
    return [found.take(slot) for slot in which.tolist()]


@checked
class SampleReader:
    """Reads, decodes and transforms samples by number. Picklable if the functions are.

    Args:
        dataset: Where they are.
        decode: Extension -> function, a function, or one of the names that `LoaderOptions.decode` knows; None: no decoding.
        transform: Called with each decoded sample.
        transform_key: Call it with the key too.
        verify: Check checksums.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        decode: Decode = None,
        transform: Callable[..., Any] | None = None,
        transform_key: bool = False,
        verify: bool = True,
    ) -> None:
        self._dataset = dataset
        self._options = LoaderOptions(
            batch_size=1, decode=decode, transform=transform, transform_key=transform_key, verify=verify
        )

    def read(self, samples: Int64Array | Sequence[int]) -> list[Any]:
        """The finished samples, in the order given; numbers below 0 count from the end.

        Raises:
            ConfigError: these are no whole numbers.
            IndexError: there is no such sample.
            S3LoaderError: of the first that cannot be read, decoded or transformed.
        """
        numbers = np.asarray(samples)
        if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu"):
            raise ConfigError(f"samples are read by their numbers, not {samples!r}", hint="for example read([0, 1, 2])")
        numbers = numbers.astype(np.int64)
        wrong = numbers[(numbers < -len(self)) | (numbers >= len(self))]
        if len(wrong):
            raise IndexError(f"there is no sample {wrong[0]} among {len(self)}")
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        items = read_samples(self._dataset, numbers, verify=self._options.verify)
        return SampleStage(self._dataset, self._options).finish(items, numbers)

    def __getitem__(self, sample: int) -> Any:
        return self.read(np.array([range(len(self._dataset))[sample]], dtype=np.int64))[0]

    def __len__(self) -> int:
        return len(self._dataset)


@checked
class GrainSource:
    """For ``grain.MapDataset.source(...)`` and ``grain.DataLoader``: Grain orders, this reads.

    Raw samples are `bytes`, since Grain sends them between processes.

    Args:
        dataset: What `open_dataset` and its siblings return.
        decode: Extension -> function, a function, or one of the names that `LoaderOptions.decode` knows.
        transform: Called with each decoded sample.
        verify: Check the CRC32C of every member that has one.
    """

    def __init__(
        self, dataset: Dataset, *, decode: Decode = "bytes", transform: Callable[[Any], Any] | None = None, verify: bool = True
    ) -> None:
        self._reader = SampleReader(dataset, decode=decode, transform=transform, verify=verify)
        self._name = dataset.name

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Any:
        return self._getitems([int(index)])[0]

    def _getitems(self, indices: Sequence[int]) -> list[Any]:
        """Several records at once: Grain's protocol for sources that read in batches.

        Raises:
            IndexError: an index is out of range.
        """
        size = len(self)
        return self._reader.read(np.array([range(size)[int(index)] for index in indices], dtype=np.int64))

    def __repr__(self) -> str:
        return f"GrainSource({self._name!r}, {len(self)} samples)"
