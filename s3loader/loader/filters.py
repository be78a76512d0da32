"""Filters: which samples of a dataset are kept, decided from manifest entries before anything is ordered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np

from s3loader.errors import S3LoaderError, ShardReadError
from s3loader.exchange.lines import iter_entries
from s3loader.exchange.types import ManifestEntry
from s3loader.loader.dataset import Dataset
from s3loader.loader.layout import Layout
from s3loader.plan.permutation import Int64Array
from s3loader.shard.samples import sample_key
from s3loader.types import ReadRequest

__all__ = ["Filter", "filtered"]

_TOGETHER: Final = 32
"""Shards whose indexes and internal manifests are held and read at a time."""

Filter = Callable[[Mapping[str, Any]], bool]
"""Called with the manifest entry of each sample (``key id meta size_bytes ...``); it stays where True comes back.
Of a grouped sample: ``key`` is the sample's, ``meta`` has the entries of all members, ``members`` their entries."""


def filtered(dataset: Dataset, keep: Filter, entries: Iterable[ManifestEntry]) -> Dataset:
    """`dataset` with only the samples that `keep` accepts.

    Args:
        dataset: Not filtered yet.
        keep: Called with the manifest entry of each sample; it stays where True comes back.
        entries: The manifest's entries, in order.

    Raises:
        ShardReadError: a shard has no internal manifest to filter by.
    """
    loose = {entry["key"]: entry for entry in entries if entry["kind"] == "file"}
    selected: list[Int64Array] = []
    for low in range(0, len(dataset.parts), _TOGETHER):
        numbers = range(len(dataset.parts))[low : low + _TOGETHER]
        found = dataset.layouts(numbers)
        layouts = [_usable(found[number]) for number in numbers]
        shards = _internal_manifests(dataset, [layout for layout in layouts if not layout.loose])
        selected += [_kept(dataset, layout, loose if layout.loose else next(shards), keep) for layout in layouts]
    return Dataset(
        dataset.store,
        dataset.parts,
        group=dataset.group,
        selected=selected,
        name=dataset.name,
        archives=dataset.archives,
        lower_extensions=dataset.lower_extensions,
        left_out=dataset.left_out,
    )


def _usable(layout: Layout | S3LoaderError) -> Layout:
    if isinstance(layout, S3LoaderError):
        raise layout
    return layout


def _internal_manifests(dataset: Dataset, layouts: Sequence[Layout]) -> Iterator[dict[str, Any]]:
    """Entries of each shard's internal manifest by member name, in order; many are read at a time."""
    requests = [_request(dataset, layout) for layout in layouts]
    for answer in dataset.store.read_many(requests):
        entries = cast("Iterable[dict[str, Any]]", iter_entries([bytes(answer.data)]))
        yield {entry["member_path"]: entry for entry in entries if "member_path" in entry}


def _request(dataset: Dataset, layout: Layout) -> ReadRequest:
    index = layout.index
    assert index is not None
    if index.internal_manifest is None or index.compression is not None:
        url = f"{dataset.store.url}/{layout.key(0)}"
        raise ShardReadError("the shard has no internal manifest to filter by", op="read", url=url)
    start, size, _ = index.internal_manifest
    return ReadRequest(layout.key(0), start, start + size, layout.etag or None)


def _kept(dataset: Dataset, layout: Layout, entries: Mapping[str, Any], keep: Filter) -> Int64Array:
    first = layout.first.tolist()
    kept = []
    for number in range(len(first) - 1):
        names = [layout.name(member) for member in range(first[number], first[number + 1])]
        members = [entries.get(name) or {"key": name} for name in names]
        if keep(_merged(names[0], members) if dataset.group is not None else members[0]):
            kept.append(number)
    return np.array(kept, dtype=np.int64)


def _merged(name: str, members: list[Any]) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    for member in members:
        said = member.get("meta")
        meta |= said if isinstance(said, Mapping) else {}
    sizes = [size for member in members if type(size := member.get("size_bytes")) is int]
    return {"key": sample_key(name), "id": members[0].get("id"), "meta": meta, "size_bytes": sum(sizes), "members": members}
