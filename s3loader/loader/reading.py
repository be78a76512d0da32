"""Samples by number, in any order: for map-style datasets, replacements, and looking at data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from s3loader.loader.dataset import Dataset
from s3loader.loader.decode import Decode
from s3loader.loader.fetch import Fetcher
from s3loader.loader.options import LoaderOptions
from s3loader.loader.pieces import Slots, cut_into_pieces
from s3loader.loader.samples import SampleWork
from s3loader.loader.stats import LoaderStats
from s3loader.plan.permutation import Int64Array
from s3loader.units import KIB, MIB

__all__ = ["SampleReader", "read_samples"]


def read_samples(dataset: Dataset, samples: Int64Array, *, verify: bool = True, stats: LoaderStats | None = None) -> list[Any]:
    """Any samples by number, in the order given (they may repeat): neighbours are fetched together.

    Returns:
        memoryviews or dicts, or `Failed` in place of a sample that could not be read.
    """
    alone, which = np.unique(samples, return_inverse=True)
    found = Slots(len(alone))
    parts = np.searchsorted(dataset.starts + dataset.catalog.counts, alone, side="right")
    layouts = dataset.layouts(np.unique(parts).tolist())
    edges = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(parts)] if len(parts) else []
    pieces = [
        piece
        for low, high in itertools.pairwise(edges)
        for piece in cut_into_pieces(
            layouts[int(parts[low])],
            alone[low:high] - dataset.starts[parts[low]],
            found,
            low,
            max_gap=256 * KIB,
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
    for _ in fetcher.run(pieces):
        pass
    return [found.take(slot) for slot in which.tolist()]


class SampleReader:
    """Reads, decodes and transforms samples by number. Picklable if the functions are.

    Args:
        dataset: Where they are.
        decode: See `LoaderOptions`, as for the rest.
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

    def read(self, samples: Int64Array) -> list[Any]:
        """The finished samples, in the order given.

        Raises:
            S3LoaderError: of the first that cannot be read, decoded or transformed.
        """
        items = read_samples(self._dataset, samples, verify=self._options.verify)
        return SampleWork(self._dataset, self._options).finish(items, samples)

    def __getitem__(self, sample: int) -> Any:
        return self.read(np.array([range(len(self._dataset))[sample]], dtype=np.int64))[0]

    def __len__(self) -> int:
        return len(self._dataset)
