"""Indexes of tar shards: which are missing or outdated, and making them, beside the shards or in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, Literal, Unpack

from s3loader.arguments import checked, local_path
from s3loader.errors import ConfigError, S3LoaderError
from s3loader.exchange.keys import is_manifest_key, is_shard_key
from s3loader.exchange.reading import iter_manifest
from s3loader.loader.catalog import ArchiveOptions, keep_index, kept_index
from s3loader.loader.layout import Shard
from s3loader.loader.sources import rooted
from s3loader.loader.urls import Locations, expand_braces, is_pattern, names_of, one_store, split_url
from s3loader.shard.build import BuiltIndex, build_index
from s3loader.store import ObjectStore, open_store
from s3loader.store.open import JobKeywords, StoreKeywords
from s3loader.store.ordered import map_ordered
from s3loader.tasks import batches, executor_of

__all__ = ["archives_of", "index_archives"]

_KEYS_OF_A_TASK: Final = 4


@checked
def archives_of(url: Locations, **place: Unpack[StoreKeywords]) -> tuple[ObjectStore, list[str]]:
    """The tar shards that `url` means, and their store.

    Args:
        url: Shards, patterns of them (``{000..146}``, ``*``), folders, or the manifest of a dataset; all of one bucket.
        place: Keywords of `open_store`.

    Raises:
        ConfigError: there is none in the manifest.
        ObjectNotFoundError: nothing matches.
    """
    names = names_of(url)
    if len(names) == 1 and is_manifest_key(names[0]) and not is_pattern(names[0]):
        root, key = split_url(names[0])
        store, key, _ = rooted(open_store(root, **place), root, key, place)
        keys = [str(entry.get("archive_key")) for entry in iter_manifest(store, key) if entry["kind"] == "shard"]
        if not keys:
            raise ConfigError("the manifest lists no shards", url=names[0], hint="loose objects need no index")
        return store, list(dict.fromkeys(keys))
    plain = [name for pattern in names for name in expand_braces(pattern, keep_escapes=True)]
    plain = [name if name.endswith("/") or is_pattern(name) or is_shard_key(name) else f"{name}/" for name in plain]
    store, keys = one_store(plain, None, place, patterns=True)
    keys = [key for key in dict.fromkeys(keys) if is_shard_key(key)]
    if not keys:
        raise ConfigError("no tar archives are named", url=names[0], hint="name .tar files, or a folder that holds some")
    return store, keys


@checked
def index_archives(
    url: Locations,
    *,
    index_dir: str | None = None,
    force: bool = False,
    checksums: bool = True,
    workers: int = 4,
    allow_missing_end: bool = False,
    allow_trailing: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int, BuiltIndex], None] | None = None,
    **job: Unpack[JobKeywords],
) -> list[BuiltIndex]:
    """Make the indexes of tar shards that are missing or of another version of their shard.

    Torn samples refuse no index here; the results count them.

    Args:
        url: As for `archives_of`.
        index_dir: Keep them in this local folder, for `open_dataset(index_dir=...)`; default: beside the shards.
        force: Make those that are current too.
        checksums: Read every byte and note CRC32C values; only beside the shards it can be turned off.
        workers: Shards read at a time.
        allow_missing_end: Accept shards without the zero blocks that end one.
        allow_trailing: Leave out what follows the end of a shard.
        dry_run: Only look; write nothing.
        progress: Is called with shards done, of how many, and the result of the last one.
        job: Keywords of `open_store`; and ``engine="ray"`` with ``address``: tasks of a Ray cluster make them.

    Returns:
        One result per shard, in order; a shard that failed has its `error`.

    Raises:
        ConfigError, ObjectNotFoundError: as `archives_of`.
    """
    executor, place = executor_of(job)
    store, keys = archives_of(url, **place)
    done = 0

    def count(result: BuiltIndex) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(keys), result)

    if index_dir is None:
        options: dict[str, Any] = {
            "workers": workers, "force": force, "checksums": checksums, "allow_missing_end": allow_missing_end,
            "allow_trailing": allow_trailing, "on_torn": "split", "errors": "return", "dry_run": dry_run,
        }  # fmt: skip
        if executor is None:
            return build_index(keys, store=store, progress=count, **options)
        task = partial(_index_there, store.url, dict(place), options)
        found: dict[int, list[BuiltIndex]] = {}
        for number, results in executor.run(task, batches(keys, lambda _: 1, _KEYS_OF_A_TASK, _KEYS_OF_A_TASK)):
            found[number] = results
            for result in results:
                count(result)
        return [result for number in sorted(found) for result in found[number]]
    if executor is not None:
        raise ConfigError("a folder of indexes is one machine's", hint="leave out index_dir, or the engine")
    if not checksums:
        raise ConfigError("indexes in a folder have checksums", hint="leave out index_dir, or take checksums")
    kept = ArchiveOptions(local_path(index_dir, "index_dir"), "split", allow_missing_end, allow_trailing)
    return list(_locally(store, keys, kept, workers, count, force=force, dry_run=dry_run))


def _index_there(url: str, place: dict[str, Any], options: dict[str, Any], keys: list[str]) -> list[BuiltIndex]:
    """A task."""
    with open_store(url, **place) as store:
        return build_index(keys, store=store, **options)


def _locally(
    store: ObjectStore,
    keys: list[str],
    options: ArchiveOptions,
    workers: int,
    count: Callable[[BuiltIndex], None],
    *,
    force: bool,
    dry_run: bool,
) -> Iterable[BuiltIndex]:
    one = partial(_one_locally, store, options, force, dry_run)
    for result in map_ordered(one, keys, concurrency=min(workers, len(keys)), name="s3loader-index"):
        count(result)
        yield result


def _one_locally(store: ObjectStore, options: ArchiveOptions, force: bool, dry_run: bool, key: str) -> BuiltIndex:
    url = f"{store.url}/{key}"
    try:
        meta = store.head(key)
        shard = Shard(key, -1, pin=meta.etag, now=meta.size)
        index = None if force else kept_index(store, shard, options.index_dir)
        if index is None and dry_run:
            stale = kept_index(store, Shard(key, -1), options.index_dir) is not None
            return BuiltIndex(url, "outdated" if stale else "missing")
        action: Literal["built", "kept"] = "built" if index is None else "kept"
        index = index or keep_index(store, key, options)
    except S3LoaderError as error:
        return BuiltIndex(url, "failed", error=error)
    grouping = index.grouping
    left_out = dict(grouping.left_out or {})
    return BuiltIndex(url, action, len(index), index.samples, None, grouping.torn, dict(index.not_files), left_out)
