"""Each sample of a dataset: its key, its members with their sizes, the shard it is in. No contents are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

from s3loader.arguments import checked
from s3loader.errors import ConfigError, ObjectNotFoundError, S3LoaderError
from s3loader.loader.dataset import Dataset
from s3loader.loader.layout import Layout, LooseRun
from s3loader.loader.opening import open_dataset
from s3loader.shard.build import OnTorn
from s3loader.shard.samples import extension_of
from s3loader.store.open import StoreKeywords

__all__ = ["SampleMember", "SampleRow", "iter_samples", "open_for_inspection"]

_TOGETHER = 16
"""Parts whose indexes are read at a time."""


class SampleMember(NamedTuple):
    """A file of a sample."""

    name: str
    """Its extension; of samples that are not grouped its whole name."""
    bytes: int | None
    """None: nobody knows before it is read (a loose object whose manifest does not say)."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One sample and where it is."""

    number: int
    """In the dataset, from 0."""
    key: str
    """Without its shard."""
    shard: str | None
    """Key of the archive; None: its members are objects of their own."""
    offset: int | None
    """Of its first member's content in the archive."""
    members: tuple[SampleMember, ...]

    @property
    def bytes(self) -> int | None:
        """Of all members; None where one is not known."""
        sizes = [member.bytes for member in self.members]
        return None if None in sizes else sum(size or 0 for size in sizes)


@checked
def open_for_inspection(
    url: Any, *, index_dir: str | None = None, on_torn: OnTorn = "split", **place: Unpack[StoreKeywords]
) -> Dataset:
    """The dataset at `url`, its samples grouped where its kind has groups.

    Args:
        url: As for `open_dataset`.
        index_dir: Local folder for the indexes of shards that have none, if the store may not be written to.
        on_torn: Samples whose members lie apart: ``"split"`` takes each stretch for a sample, ``"error"`` refuses them.
        place: Keywords of `open_store`.

    Raises:
        ObjectNotFoundError: there are no samples.
        ConfigError, S3LoaderError: as `open_dataset`.
    """
    options: dict[str, Any] = {**place, "index_dir": index_dir, "on_torn": on_torn}
    try:
        dataset = open_dataset(url, group="webdataset", **options)
    except ConfigError as error:
        try:
            dataset = open_dataset(url, **options)  # MDS, whose samples are whole without grouping
        except ConfigError:
            raise error from None
    if not len(dataset):
        raise ObjectNotFoundError("there are no samples", op="open", url=str(url), hint="check the URL")
    return dataset


def iter_samples(dataset: Dataset, *, limit: int | None = None) -> Iterator[SampleRow]:
    """The samples in the order of the dataset (that of its parts, not of training).

    Args:
        dataset: An open one.
        limit: Most of them; None: all.

    Raises:
        S3LoaderError: a shard's index cannot be had; raised in its place, after the samples before it.
    """
    left = len(dataset) if limit is None else min(limit, len(dataset))
    number = 0
    for first in range(0, len(dataset.parts), _TOGETHER):
        if left <= 0:
            return
        together = [
            part
            for part in range(first, min(first + _TOGETHER, len(dataset.parts)))
            if int(dataset.starts[part]) < number + left and int(dataset.catalog.counts[part])
        ]
        layouts = dataset.layouts(together)
        for part in together:
            layout = layouts[part]
            if isinstance(layout, S3LoaderError):
                raise layout
            for row in range(min(left, layout.samples)):
                yield _row(dataset, layout, number, row)
                number, left = number + 1, left - 1


def _row(dataset: Dataset, layout: Layout, number: int, row: int) -> SampleRow:
    low, high = int(layout.first[row]), int(layout.first[row + 1])
    grouped = dataset.group is not None
    names = [layout.name(member) for member in range(low, high)]
    members = tuple(
        SampleMember(extension_of(name) if grouped else name, None if size < 0 else size)
        for name, size in zip(names, layout.sizes[low:high].tolist(), strict=True)
    )
    loose = isinstance(layout.source, LooseRun)
    shard = None if loose else layout.key(low)
    key = dataset.sample_key(layout, low)
    return SampleRow(
        number,
        key if shard is None else key[len(shard) + 1 :],
        shard,
        None if loose else int(layout.offsets[low]),
        members,
    )
