"""Datasets from what people have: a manifest, a prefix, a list of objects, WebDataset URLs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final, Unpack

import numpy as np

from s3loader.errors import ConfigError, InvalidManifestError, ObjectNotFoundError, S3LoaderError, ShardReadError
from s3loader.exchange.keys import is_manifest_key, is_shard_key, is_sidecar_key
from s3loader.exchange.reading import iter_manifest
from s3loader.exchange.types import ManifestEntry
from s3loader.loader.dataset import Dataset, Group
from s3loader.loader.filters import Filter, filtered
from s3loader.loader.indexes import find_index, make_indexes
from s3loader.loader.layout import LooseRun, Shard
from s3loader.loader.mds import from_mds, holds_mds
from s3loader.shard.index import index_key, is_foreign, read_counts, sample_key
from s3loader.store.bulk import ReadFailure
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import StoreKeywords, open_store
from s3loader.types import Buffer, ObjectMeta, ObjectURL, ReadRequest
from s3loader.units import KIB

__all__ = ["from_manifest", "from_objects", "from_prefix", "from_webdataset", "open_dataset"]

_HEAD: Final = 4 * KIB
_MAX_EXPANSION: Final = 10_000_000


# -- URLs -----------------------------------------------------------------------------------------


def split_url(url: str) -> tuple[str, str]:
    """(URL of the bucket or root folder, key) of an object URL."""
    target = ObjectURL.parse(url)
    if target.scheme == "file":
        return "file:///", target.key.lstrip("/")
    return f"{target.scheme}://{target.bucket}", target.key


def expand_braces(pattern: str) -> list[str]:
    """``a-{000..002}.tar`` and ``{train,val}.tar`` as WebDataset and bash expand them; ``::`` joins patterns.

    Raises:
        ConfigError: a range is too long.
    """
    if "::" in pattern:
        return [url for part in pattern.split("::") for url in expand_braces(part)]
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [head + middle + rest for middle in _alternatives(match.group(1)) for rest in expand_braces(tail)]


def _alternatives(text: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if numbers is None:
        return text.split(",")
    low, high = int(numbers.group(1)), int(numbers.group(2))
    width = len(numbers.group(1)) if numbers.group(1).startswith("0") else 0
    if abs(high - low) > _MAX_EXPANSION:
        raise ConfigError(
            f"{{{text}}} stands for more than {_MAX_EXPANSION} URLs",
            hint="check the numbers of the range, or pass a list of URLs",
        )
    step = 1 if high >= low else -1
    return [str(n).zfill(width) for n in range(low, high + step, step)]


# -- from entries to parts ------------------------------------------------------------------------


def _etag(value: Any) -> str:
    return str(value).strip('"') if value else ""


class _Parts:
    """Collects shards and runs of loose objects in order."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.done: list[Shard | LooseRun] = []
        self._keys: list[str] = []
        self._sizes: list[int] = []
        self._etags: list[str] = []

    def add_object(self, key: str, size: int | None, etag: str) -> None:
        self._keys.append(key)
        self._sizes.append(-1 if size is None else size)
        self._etags.append(etag)

    def add_shard(self, shard: Shard) -> None:
        self.close_run()
        self.done.append(shard)

    def close_run(self) -> None:
        if not self._keys:
            return
        names = [sample_key(key) for key in self._keys] if self.group else []
        first = [0, *(i for i in range(1, len(self._keys)) if not names or names[i] != names[i - 1]), len(self._keys)]
        sizes = np.array(self._sizes, dtype=np.int64)
        self.done.append(LooseRun(tuple(self._keys), sizes, tuple(self._etags), np.array(first, dtype=np.int64)))
        self._keys, self._sizes, self._etags = [], [], []

    def finish(self) -> list[Shard | LooseRun]:
        self.close_run()
        return self.done


def _parts_of(entries: Iterable[ManifestEntry], group: Group) -> list[Shard | LooseRun]:
    parts = _Parts(group)
    for entry in entries:
        if entry["kind"] == "file":
            parts.add_object(entry["key"], entry.get("size_bytes"), _etag(entry.get("etag")))
        elif entry["kind"] == "shard":
            meta = entry.get("meta") or {}
            count = entry.get("count")
            parts.add_shard(
                Shard(
                    entry["archive_key"],
                    -1 if count is None else count,
                    _etag(meta.get("etag")),
                    entry.get("size_bytes") or 0,
                    count,
                )
            )
    return parts.finish()


def _counted(store: ObjectStore, parts: list[Shard | LooseRun], group: Group, index_dir: str | None) -> list[Shard | LooseRun]:
    """`parts` with the number of samples of each shard, from the heads of the indexes where the manifest does not tell."""
    shards = {i: part for i, part in enumerate(parts) if isinstance(part, Shard) and (group is not None or part.samples < 0)}
    heads: dict[int, Buffer | S3LoaderError] = {}
    if shards:
        requests = (ReadRequest(index_key(shard.key), 0, _HEAD, tag=i) for i, shard in shards.items())
        for answer in store.read_many(requests, errors="return"):
            heads[answer.request.tag] = answer.error if isinstance(answer, ReadFailure) else bytes(answer.data)
    missing = [shards[i].key for i, head in heads.items() if isinstance(head, ObjectNotFoundError)]
    if missing:
        make_indexes(store, missing, index_dir)
    for i, head in heads.items():
        parts[i] = _with_counts(store, shards[i], head, group, index_dir)
    return parts


def _with_counts(store: ObjectStore, shard: Shard, head: Buffer | S3LoaderError, group: Group, index_dir: str | None) -> Shard:
    if isinstance(head, S3LoaderError) and not isinstance(head, ObjectNotFoundError):
        raise head
    try:
        if isinstance(head, S3LoaderError) or is_foreign(head):
            index = find_index(store, shard.key, index_dir)
            members, samples, etag, size = len(index), index.samples, index.etag, index.archive_size
        else:
            counts = read_counts(head)
            members, samples, etag, size = counts.members, counts.samples, counts.archive_etag, counts.archive_size
    except ShardReadError as error:
        raise ShardReadError(error.message, op="read", url=f"{store.url}/{index_key(shard.key)}", hint=error.hint) from error
    if shard.members is not None and shard.members != members:
        raise ShardReadError(
            f"the index has {members} members, the manifest says {shard.members}", op="read", url=f"{store.url}/{shard.key}"
        )
    return Shard(shard.key, samples if group is not None else members, shard.etag or etag, shard.size or size, members)


# -- constructors ---------------------------------------------------------------------------------


def from_manifest(
    manifest: str,
    *,
    store: ObjectStore | None = None,
    group: Group = None,
    members: str | Iterable[str] | None = None,
    where: Filter | None = None,
    index_dir: str | None = None,
    **store_options: Unpack[StoreKeywords],
) -> Dataset:
    """The dataset a manifest lists: shards and loose objects, also mixed, references followed.

    Args:
        manifest: URL of the manifest; with `store`, its key there.
        store: The store whose keys the manifest lists. Without it: the folder or bucket above the manifest, as far up as is
            needed for the first key to exist.
        group: See `Group`.
        members: Of grouped samples, only the members with these extensions (``["jpg", "cls"]``); see `Dataset.only`.
        where: Keep only samples whose entry passes; see `Filter`.
        index_dir: Where indexes of shards that have none are kept, if the store may not be written to.
        store_options: For `open_store`, where no store is given.

    Raises:
        ManifestNotFoundError: there is no such manifest.
        InvalidManifestError: a line is not understood.
        ShardReadError: a shard has no usable index.
    """
    if store is None:
        root, key = split_url(manifest)
        store, key = _rooted(open_store(root, **store_options), root, key, store_options)
    else:
        key = manifest
    parts = _counted(store, _parts_of(iter_manifest(store, key), group), group, index_dir)
    dataset = Dataset(store, parts, group=group, name=f"{store.url}/{key}", index_dir=index_dir)
    dataset = dataset if where is None else filtered(dataset, where, iter_manifest(store, key))
    return dataset.only(members)


def _rooted(store: ObjectStore, root: str, key: str, options: StoreKeywords) -> tuple[ObjectStore, str]:
    """The store relative to which the manifest's keys exist, and the manifest's key in it."""
    first = next((entry for entry in iter_manifest(store, key, resolve_refs=False, limit=1)), None)
    if first is None:
        return store, key
    wanted = str(first.get("archive_key") or first.get("key"))
    folders = key.split("/")[:-1]
    for depth in range(len(folders), -1, -1):
        folder = "/".join(folders[:depth])
        if store.exists(f"{folder}/{wanted}" if folder else wanted):
            if not folder:
                return store, key
            return open_store(f"{root}{folder}" if root.endswith("/") else f"{root}/{folder}", **options), key[
                len(folder) + 1 :
            ]
    raise InvalidManifestError(
        f"its first entry {wanted!r} exists neither beside it nor in a folder above",
        op="read",
        url=f"{root}/{key}",
        hint="give store=open_store(...) at the URL that the manifest's keys are relative to",
    )


def from_prefix(
    url: str,
    *,
    store: ObjectStore | None = None,
    group: Group = None,
    members: str | Iterable[str] | None = None,
    **store_options: Unpack[StoreKeywords],
) -> Dataset:
    """Every object whose key starts with the prefix, one sample each (or grouped), in order of their keys.

    Indexes of shards, and empty objects that stand for folders, are left out.

    Args:
        url: ``s3://bucket/prefix``; with `store`, a prefix of its keys. A file URL is a folder.
        store: An open store.
        group: See `Group`.
        members: Of grouped samples, only the members with these extensions (``["jpg", "cls"]``); see `Dataset.only`.
        store_options: For `open_store`.
    """
    prefix = url
    if store is None:
        target = ObjectURL.parse(url)
        root, prefix = (str(target), "") if target.scheme == "file" else split_url(url)
        store = open_store(root, **store_options)
    parts = _Parts(group)
    for meta in store.list(prefix):
        if isinstance(meta, ObjectMeta) and not is_sidecar_key(meta.key) and not (meta.size == 0 and meta.key.endswith("/")):
            parts.add_object(meta.key, meta.size, meta.etag)
    return Dataset(store, parts.finish(), group=group, name=url).only(members)


def from_objects(
    urls: str | Iterable[str],
    *,
    store: ObjectStore | None = None,
    group: Group = None,
    members: str | Iterable[str] | None = None,
    **store_options: Unpack[StoreKeywords],
) -> Dataset:
    """These objects, one sample each (or grouped), in this order; one that is listed twice is two samples.

    Args:
        urls: Their URLs, all of one bucket; with `store`, their keys.
        store: An open store.
        group: See `Group`.
        members: Of grouped samples, only the members with these extensions (``["jpg", "cls"]``); see `Dataset.only`.
        store_options: For `open_store`.
    """
    names = [urls] if isinstance(urls, str) else [str(url) for url in urls]
    store, keys = _one_store(names, store, store_options)
    parts = _Parts(group)
    for key in keys:
        parts.add_object(key, None, "")
    return Dataset(store, parts.finish(), group=group, name=names[0] if names else "").only(members)


def _one_store(urls: Sequence[str], store: ObjectStore | None, options: StoreKeywords) -> tuple[ObjectStore, list[str]]:
    if store is not None:
        return store, list(urls)
    pairs = [split_url(url) for url in urls]
    roots = {root for root, _ in pairs}
    if len(roots) != 1:
        problem = "there are no URLs" if not roots else f"the URLs lie in several buckets: {', '.join(sorted(roots)[:3])}"
        raise ConfigError(problem, hint="make one dataset of each bucket, and mix them")
    return open_store(roots.pop(), **options), [key for _, key in pairs]


def from_webdataset(
    urls: str | Iterable[str],
    *,
    store: ObjectStore | None = None,
    group: Group = "webdataset",
    members: str | Iterable[str] | None = None,
    index_dir: str | None = None,
    **store_options: Unpack[StoreKeywords],
) -> Dataset:
    """Tar shards by their URLs, with braces: ``s3://bucket/train-{000000..000146}.tar``.

    A shard without an index is read once to make one, which is kept beside it.

    Args:
        urls: One pattern or several, all of one bucket; with `store`, patterns of its keys.
        store: An open store.
        group: ``"webdataset"``: dicts by extension; None: each member is a sample.
        members: Of grouped samples, only the members with these extensions (``["jpg", "cls"]``); see `Dataset.only`.
        index_dir: Where indexes are kept if the store may not be written to; default: the user's cache folder.
        store_options: For `open_store`.

    Raises:
        ObjectNotFoundError: there is no such shard.
        ShardReadError: a shard is damaged, or its index is unusable.
    """
    patterns = [urls] if isinstance(urls, str) else list(urls)
    names = [name for pattern in patterns for name in expand_braces(pattern)]
    store, keys = _one_store(names, store, store_options)
    parts: list[Shard | LooseRun] = [Shard(key, -1) for key in keys]
    parts = _counted(store, parts, group, index_dir)
    name = patterns[0] if patterns else ""
    return Dataset(store, parts, group=group, name=name, index_dir=index_dir).only(members)


def open_dataset(
    url: str | Iterable[str],
    *,
    store: ObjectStore | None = None,
    group: Group = None,
    members: str | Iterable[str] | None = None,
    where: Filter | None = None,
    index_dir: str | None = None,
    **store_options: Unpack[StoreKeywords],
) -> Dataset:
    """The dataset at a URL, by what it looks like: ``.jsonl`` is a manifest, ``.tar`` (with braces) are shards, a list is
    objects, a folder whose ``index.json`` describes MDS shards is such a dataset, anything else a prefix.

    Args:
        url: Of the dataset; with `store`, keys of it.
        store: An open store.
        group: See `Group`.
        members: Of grouped samples, only the members with these extensions (``["jpg", "cls"]``); see `Dataset.only`.
        where: Keep only samples whose manifest entry passes (manifests only).
        index_dir: See `from_webdataset`.
        store_options: For `open_store`, where no store is given.

    Raises:
        ConfigError: the URL or an option is unusable.
        S3LoaderError: see the function for each kind, `from_manifest` and so on.
    """
    options: dict[str, Any] = {"store": store, "group": group, "members": members, **store_options}
    if isinstance(url, str) and is_manifest_key(url):
        return from_manifest(url, where=where, index_dir=index_dir, **options)
    if where is not None:
        raise ConfigError("where= needs a manifest, whose entries it looks at", hint="write one over these objects")
    if isinstance(url, str) and is_shard_key(expand_braces(url)[0]):
        return from_webdataset(url, index_dir=index_dir, **options)
    if not isinstance(url, str):
        return from_objects(url, **options)
    if not holds_mds(url, store=store, **store_options):
        return from_prefix(url, **options)
    if group is not None or members is not None:
        raise ConfigError(
            f"group={group!r} and members={members!r} mean nothing to MDS shards, whose samples are whole", hint="leave it out"
        )
    return from_mds(url, store=store, **store_options)
