"""Datasets for Grain: `RandomAccessDataSource` with batched, coalesced reads. Imports nothing of Grain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from s3loader.loader.dataset import Dataset
from s3loader.loader.decode import Decode
from s3loader.loader.reading import SampleReader

__all__ = ["GrainSource"]


class GrainSource:
    """For ``grain.MapDataset.source(...)`` and ``grain.DataLoader``: Grain orders, this reads.

    Raw samples are `bytes`, since Grain sends them between processes.

    Args:
        dataset: What `open_dataset` and its siblings return.
        decode: See `LoaderOptions`.
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
