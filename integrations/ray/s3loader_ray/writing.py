"""`write_shards`: the rows of a `ray.data.Dataset` as shards with one manifest, which appears at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal, Unpack

import ray.data
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink, WriteResult

from s3loader import ManifestWriter, ObjectExistsError, ShardSizePolicy, open_store
from s3loader.adapters import StoreKeywords, archive_of, as_sample, checked, drop_tries, entries_of, parse_size, write_part

__all__ = ["ShardDatasink", "write_shards"]

_MANIFEST: Final = "manifest.jsonl"
_PARTS: Final = "_pack"


@checked
def write_shards(
    dataset: ray.data.Dataset,
    url: str,
    *,
    shard_size: int | str = "64MiB",
    shard_samples: int | None = None,
    compression: str | None = None,
    exists: Literal["error", "replace"] = "error",
    concurrency: int | None = None,
    ray_remote_args: dict[str, Any] | None = None,
    **store: Unpack[StoreKeywords],
) -> str:
    """Write each row as a sample into shards at `url`; the manifest appears last, at once, or not at all.

    Columns are extensions, as `read_manifest` gives them: bytes stay as they are, numbers and texts become text, ``npy`` takes
    arrays, ``json`` anything; null: the sample has no such member. ``__key__`` names the sample, else it is numbered. A task
    that Ray runs twice writes one part once.

    Args:
        dataset: The rows.
        url: Where to: ``s3://bucket/prefix``, or a folder that all nodes see.
        shard_size: Bytes of a shard; each task ends with one that may be smaller.
        shard_samples: Samples of a shard at most.
        compression: Of the shards: None or ``"zstd"``.
        exists: What to do where there is a dataset: ``"error"``, or ``"replace"``.
        concurrency, ray_remote_args: As of `ray.data.Dataset.write_datasink`.
        store: Keywords for `open_store`. What is given here is sent to the tasks; without, each node finds its own credentials.

    Returns:
        URL of the manifest.

    Raises:
        ObjectExistsError: there is a dataset.
        S3LoaderError: a task failed; nothing was published, and what was written is deleted.
    """
    policy = ShardSizePolicy(max_bytes=parse_size(shard_size, "shard_size"), max_samples=shard_samples)
    options = {"shard_size": policy, "shard_compression": compression, "group": "webdataset"}
    sink = ShardDatasink(url, options, exists=exists, place=dict(store))
    dataset.write_datasink(sink, concurrency=concurrency, ray_remote_args=ray_remote_args or {})
    return sink.manifest


class ShardDatasink(Datasink[tuple[int, str]]):  # type: ignore[misc]  # Ray is not looked into
    """Shards at a URL, for `ray.data.Dataset.write_datasink`.

    Args:
        url: Where to.
        options: For `ManifestWriter`: how shards are cut.
        exists: ``"error"`` or ``"replace"``.
        place: Keywords of `open_store`.
    """

    def __init__(self, url: str, options: dict[str, Any], *, exists: str = "error", place: dict[str, Any]) -> None:
        self._url = url
        self._options = options
        self._exists = exists
        self._place = place
        self._name = os.urandom(4).hex()
        with open_store(url, **place) as store:
            self.manifest = f"{store.url}/{_MANIFEST}"
            """URL of the manifest."""
            self._refuse(store)

    def _refuse(self, store: Any) -> None:
        if self._exists != "replace" and store.exists(_MANIFEST):
            raise ObjectExistsError(
                "there is a dataset already", op="write", url=store.url, hint='write it elsewhere, or say exists="replace"'
            )

    def get_name(self) -> str:
        """For progress and plans."""
        return "S3LoaderShards"

    def write(self, blocks: Iterable[Block], ctx: Any) -> tuple[int, str]:
        """One part, in a task: its number, and the key of its manifest."""
        number = int(ctx.task_idx)
        key = f"{_PARTS}/{self._name}-{number:06d}.jsonl"
        with open_store(self._url, **self._place) as store:
            write_part(store, _samples(blocks, number), key, f"shards/{self._name}-{number:06d}", self._options)
        return number, key

    def on_write_complete(self, write_result: WriteResult[tuple[int, str]]) -> None:
        """All parts are there: publish them at once."""
        with open_store(self._url, **self._place) as store:
            parts = [key for _, key in sorted({(number, key) for number, key in write_result.write_returns})]
            entries = [entry for key in parts for entry in entries_of(store, key)]
            old = entries_of(store, _MANIFEST) if store.exists(_MANIFEST) else []
            mode: Literal["create", "overwrite"] = "create" if self._exists != "replace" else "overwrite"
            with ManifestWriter(store, _MANIFEST, mode=mode) as writer:
                for entry in entries:
                    writer.add_entry(entry)
            gone = {archive_of(entry) for entry in old} - {archive_of(entry) for entry in entries} - {""}
            store.delete_many([*parts, *gone, *(f"{archive}.idx" for archive in gone)])
            drop_tries(store, f"shards/{self._name}", entries)

    def on_write_failed(self, error: Exception) -> None:
        """Nothing was published: remove what was written."""
        with open_store(self._url, **self._place) as store:
            store.delete_many([entry.key for entry in store.list(f"{_PARTS}/{self._name}-")])
            drop_tries(store, f"shards/{self._name}", [])


def _samples(blocks: Iterable[Block], number: int) -> Iterator[Any]:
    count = 0
    for block in blocks:
        for row in BlockAccessor.for_block(block).iter_rows(public_row_format=True):
            yield as_sample(row, f"{number:06d}-{count:09d}")
            count += 1
