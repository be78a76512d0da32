"""Datasets from what people have: a manifest, a prefix, a list of objects, WebDataset URLs, MDS folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final, Literal, Unpack

from s3loader.arguments import checked, local_path
from s3loader.errors import (
    AccessDeniedError,
    ConfigError,
    IntegrityError,
    InvalidManifestError,
    ObjectNotFoundError,
    ShardReadError,
)
from s3loader.exchange.keys import is_sidecar_key
from s3loader.exchange.reading import iter_manifest
from s3loader.exchange.types import ManifestEntry
from s3loader.loader.catalog import ArchiveOptions, look
from s3loader.loader.dataset import Dataset, Group
from s3loader.loader.filters import Filter, filtered
from s3loader.loader.layout import LooseRun, Shard
from s3loader.loader.mds import COMPRESSIONS_OF_MDS, Columns, CompressedMdsShard, MdsShard, check_size
from s3loader.loader.parts import Parts, counted, parts_of
from s3loader.loader.rows import ParquetShard
from s3loader.loader.urls import Locations, expand_braces, names_of, one_store, split_url
from s3loader.shard.build import OnTorn, check_on_torn
from s3loader.shard.parquet import FOOTER, read_footer
from s3loader.shard.samples import LeftOut, extension_of
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import StoreKeywords, open_store
from s3loader.store.ordered import map_ordered
from s3loader.types import Location, ObjectMeta, ObjectURL

__all__ = [
    "from_manifest",
    "from_mds",
    "from_objects",
    "from_parquet",
    "from_prefix",
    "from_tfrecord",
    "from_webdataset",
    "holds_mds",
    "rooted",
]

_AHEAD: Final = 12
"""Connections that are opened while the first thing is asked for."""


@checked
def from_manifest(
    manifest: Location,
    *,
    store: ObjectStore | None = None,
    group: Group = None,
    members: str | Iterable[str] | None = None,
    where: Filter | None = None,
    index_dir: str | os.PathLike[str] | None = None,
    on_torn: OnTorn = "error",
    allow_missing_end: bool = False,
    allow_trailing: bool = False,
    lower_extensions: bool = False,
    **store_options: Unpack[StoreKeywords],
) -> Dataset:
    """The dataset a manifest lists: shards and loose objects, also mixed, references followed.

    Args:
        manifest: URL of the manifest; with `store`, its key there.
        store: The store whose keys the manifest lists. Without it: the folder or bucket above the manifest, as far up as is
            needed for the first key to exist.
        group: ``"webdataset"``: neighbours whose names agree up to the first dot of the base name are one sample, a dict by
            extension; None: each member (or object) is a sample.
        members: Of grouped samples, only the members with these extensions (``["jpg", "cls"]``); the others are not fetched
            where that saves bytes.
        where: Called with the manifest entry of each sample (``key id meta size_bytes ...``); those stay for which it returns
            True.
        index_dir: Where indexes of shards that have none are kept, if the store may not be written to.
        on_torn: Members of one sample that lie apart (in a shard, or at the end of one and the start of another), and members
            that stand there twice, are an error when samples are grouped; ``"split"`` takes each stretch for a sample.
        allow_missing_end: Of shards without an index: accept one without the zero blocks that end it (it may be truncated).
        allow_trailing: Of shards without an index: leave out what follows the end of one.
        lower_extensions: Extensions in small letters, as WebDataset gives them: ``a.JPG`` is the ``jpg`` of its sample.
        store_options: For `open_store`, where no store is given.

    Raises:
        ManifestNotFoundError: there is no such manifest.
        InvalidManifestError: a line is not understood.
        ShardReadError: a shard has no usable index, cannot be read at random, or tears a sample.
    """
    if store is None:
        root, key = split_url(manifest)
        above = open_store(root, **store_options)
        above.open_ahead(_AHEAD)
        store, key, own = rooted(above, root, key, store_options)
    else:
        (key,) = names_of(manifest, "manifest")
        own = None
    options = ArchiveOptions(
        None if index_dir is None else local_path(index_dir, "index_dir"), on_torn, allow_missing_end, allow_trailing
    )
    found = Parts(group, on_torn, where=f"{store.url}/{key}")
    parts = counted(store, parts_of(iter_manifest(store, key, own=own), found), group, options, found.left_out)
    dataset = Dataset(
        store,
        parts,
        group=group,
        name=f"{store.url}/{key}",
        archives=options,
        lower_extensions=lower_extensions,
        left_out=found.left_out,
    )
    dataset = dataset if where is None else filtered(dataset, where, iter_manifest(store, key))
    return dataset.only(members)


def rooted(
    store: ObjectStore, root: ObjectURL, key: str, options: StoreKeywords
) -> tuple[ObjectStore, str, Iterator[ManifestEntry]]:
    """The store relative to which the manifest's keys exist, the manifest's key in it, and its own entries."""
    own = iter_manifest(store, key, resolve_refs=False)
    first = next(own, None)
    if first is None:
        return store, key, iter(())
    wanted = str(first.get("archive_key") or first.get("key"))
    folders = key.split("/")[:-1]
    above = ["/".join(folders[:depth]) for depth in range(len(folders), -1, -1)]
    for folder, there in zip(above, look(store, [f"{folder}/{wanted}" if folder else wanted for folder in above]), strict=True):
        if there is not None:
            own = chain([first], own)
            if not folder:
                return store, key, own
            found = open_store(root.joined(folder), **options) if root.scheme == "file" else store.below(folder)
            return found, key[len(folder) + 1 :], own
    raise InvalidManifestError(
        f"its first entry {wanted!r} exists neither beside it nor in a folder above",
        op="read",
        url=str(root.joined(key)),
        hint="give store=open_store(...) at the URL that the manifest's keys are relative to",
    )


@checked
def from_prefix(
    url: Location,
    *,
    store: ObjectStore | None = None,
    group: Group = None,
    members: str | Iterable[str] | None = None,
    lower_extensions: bool = False,
    **store_options: Unpack[StoreKeywords],
) -> Dataset:
    """Every object of a folder, one sample each (or grouped), in order of their keys.

    Indexes of shards, and empty objects that stand for folders, are left out.

    Args:
        url: ``s3://bucket/folder/``; with `store`, a prefix of its keys. Without a slash at its end it is that folder too; only
            where there is none, every object whose key starts so. A file URL is always a folder.
        store: An open store.
        group: ``"webdataset"``: neighbours whose names agree up to the first dot of the base name are one sample, a dict by
            extension; None: each member (or object) is a sample.
        members: Of grouped samples, only the members with these extensions (``["jpg", "cls"]``); the others are not fetched
            where that saves bytes.
        lower_extensions: Extensions in small letters, as WebDataset gives them: ``a.JPG`` is the ``jpg`` of its sample.
        store_options: For `open_store`.
    """
    (name,) = names_of(url)
    store, prefix = open_prefix(name, store, store_options)
    return of_listing(store, prefix, listed(store, prefix), group, name, lower_extensions).only(members)


def open_prefix(name: str, store: ObjectStore | None, options: StoreKeywords) -> tuple[ObjectStore, str]:
    """The store that a folder's keys are relative to, and the folder's prefix there.

    Raises:
        ObjectNotFoundError: there is no such local folder.
    """
    if store is not None:
        return store, name
    target = ObjectURL.parse(name)
    if target.scheme == "file" and not os.path.isdir(target.key):  # a store would be an empty one, and hide the typing mistake
        raise ObjectNotFoundError("there is no such folder", op="open", url=str(target), hint="check the path")
    root, prefix = (target, "") if target.scheme == "file" else split_url(target)
    return open_store(root, **options), prefix


def listed(store: ObjectStore, prefix: str) -> list[ObjectMeta]:
    """The objects of a folder; of keys that start with `prefix` where there is no such folder."""
    folder = prefix if not prefix or prefix.endswith("/") else f"{prefix}/"
    found = [meta for meta in store.list(folder) if isinstance(meta, ObjectMeta)]
    return found if found or folder == prefix else [meta for meta in store.list(prefix) if isinstance(meta, ObjectMeta)]


def of_listing(
    store: ObjectStore, prefix: str, metas: Iterable[ObjectMeta], group: Group, name: str, lower_extensions: bool
) -> Dataset:
    """Each object a sample; indexes of shards and what stands for a folder are left out."""
    parts = Parts(group, "split", gather=True, where=name, root=prefix[: prefix.rfind("/") + 1])
    for meta in metas:
        if not is_sidecar_key(meta.key) and not (meta.size == 0 and meta.key.endswith("/")):
            parts.add_object(meta.key, meta.size, meta.etag)
    return Dataset(store, parts.finish(), group=group, name=name, lower_extensions=lower_extensions, left_out=parts.left_out)


@checked
def from_objects(
    urls: Locations,
    *,
    store: ObjectStore | None = None,
    group: Group = None,
    members: str | Iterable[str] | None = None,
    on_torn: OnTorn = "error",
    lower_extensions: bool = False,
    **store_options: Unpack[StoreKeywords],
) -> Dataset:
    """These objects, one sample each (or grouped), in this order; one that is listed twice is two samples.

    Args:
        urls: Their URLs or paths, all of one bucket, taken as they stand; with `store`, their keys.
        store: An open store.
        group: ``"webdataset"``: neighbours whose names agree up to the first dot of the base name are one sample, a dict by
            extension; None: each member (or object) is a sample.
        members: Of grouped samples, only the members with these extensions (``["jpg", "cls"]``); the others are not fetched
            where that saves bytes.
        on_torn: Objects of one sample that do not follow one another are an error when they are grouped; ``"split"`` takes
            each stretch for a sample.
        lower_extensions: Extensions in small letters, as WebDataset gives them: ``a.JPG`` is the ``jpg`` of its sample.
        store_options: For `open_store`.
    """
    names = names_of(urls, "urls")
    store, keys = one_store(names, store, store_options)
    check_on_torn(on_torn)
    parts = Parts(group, on_torn, where=store.url)
    for key in keys:
        parts.add_object(key, None, "")
    name = names[0] if names else ""
    return Dataset(
        store, parts.finish(), group=group, name=name, lower_extensions=lower_extensions, left_out=parts.left_out
    ).only(members)


@checked
def from_webdataset(
    urls: Locations,
    *,
    store: ObjectStore | None = None,
    group: Group = "webdataset",
    members: str | Iterable[str] | None = None,
    index_dir: str | os.PathLike[str] | None = None,
    on_torn: OnTorn = "error",
    allow_missing_end: bool = False,
    allow_trailing: bool = False,
    lower_extensions: bool = False,
    **store_options: Unpack[StoreKeywords],
) -> Dataset:
    """Tar shards by their URLs, with braces: ``s3://bucket/train-{000000..000146}.tar``, ``s3://bucket/*.tar``, or a folder.

    A shard without an index is read once to make one, which is kept beside it.

    Args:
        urls: One pattern or several, all of one bucket; with `store`, patterns of its keys. Braces expand as in bash
            (`expand_braces`); ``*``, ``?``, ``[...]`` and, across folders, ``**`` list what there is. What ends with a
            slash is a folder, all tar archives below which are meant.
        store: An open store.
        group: ``"webdataset"``: dicts by extension; None: each member is a sample.
        members: Of grouped samples, only the members with these extensions (``["jpg", "cls"]``); the others are not fetched
            where that saves bytes.
        index_dir: Where indexes are kept if the store may not be written to; default: the user's cache folder.
        on_torn: Members of one sample that lie apart (in a shard, or at the end of one and the start of another), and members
            that stand there twice, are an error when samples are grouped; ``"split"`` takes each stretch for a sample.
        allow_missing_end: Of shards without an index: accept one without the zero blocks that end it (it may be truncated).
        allow_trailing: Of shards without an index: leave out what follows the end of one.
        lower_extensions: Extensions in small letters, as WebDataset gives them: ``a.JPG`` is the ``jpg`` of its sample.
        store_options: For `open_store`.

    Raises:
        ObjectNotFoundError: there is no such shard.
        ShardReadError: a shard is damaged, cannot be read at random, or tears a sample; or its index is unusable.
    """
    options = ArchiveOptions(
        None if index_dir is None else local_path(index_dir, "index_dir"), on_torn, allow_missing_end, allow_trailing
    )
    left_out: dict[str, LeftOut] = {}
    store, parts, name = _archives(urls, store, store_options, group, options, left_out)
    dataset = Dataset(
        store,
        parts,
        group=group,
        name=name,
        archives=options,
        lower_extensions=lower_extensions,
        left_out=left_out,
    )
    return dataset.only(members)


@checked
def from_tfrecord(
    urls: Locations,
    *,
    store: ObjectStore | None = None,
    index_dir: str | os.PathLike[str] | None = None,
    **store_options: Unpack[StoreKeywords],
) -> Dataset:
    """The records of uncompressed TFRecord files; a sample is the bytes of one (a serialized ``tf.train.Example``, mostly).

    A file without an index is read once to make one (lengths and checksums; of large records not the data), which is kept
    beside it. Each record is held against the CRC-32C that its writer stored.

    Args:
        urls: One URL or pattern or several, all of one bucket; with `store`, keys. Braces, ``*``, ``?`` and ``[...]`` as for
            `from_webdataset`. What ends with a slash is a folder, all objects below which are meant.
        store: An open store.
        index_dir: Where indexes are kept if the store may not be written to; default: the user's cache folder.
        store_options: For `open_store`.

    Raises:
        ObjectNotFoundError: there is no such file.
        ShardReadError: a file is damaged, cut off, compressed, or holds no records; or its index is unusable.
    """
    options = ArchiveOptions(None if index_dir is None else local_path(index_dir, "index_dir"), "split")
    store, parts, name = _archives(urls, store, store_options, None, options, {}, tars=False)
    return Dataset(store, parts, name=name, archives=options)


@checked
def from_parquet(
    urls: Locations,
    *,
    columns: str | Iterable[str] | None = None,
    sample: Literal["row", "row_group"] = "row",
    store: ObjectStore | None = None,
    index_dir: str | os.PathLike[str] | None = None,
    **store_options: Unpack[StoreKeywords],
) -> Dataset:
    """The rows of Parquet files; a sample is a dict of its columns, and ``__key__``.

    Numbers come as numpy scalars, texts as str, bytes as memoryviews (for `decode` by the column's name), lists of numbers as
    arrays, dates, decimals and structs as Python's own objects, what is missing as None. A row group is fetched whole, once, by
    ranges of the columns wanted, and its rows are shuffled among those of others: ``shuffle="block"`` keeps a few row groups
    open. Where these do not fit into `memory_limit` (and all of them, with ``"full"``), they are read again and again.
    The file's footer is its index: it is read when the dataset is opened, once, and once in each process that reads rows.

    Args:
        urls: One URL or pattern or several, all of one bucket; with `store`, keys. Braces, ``*``, ``?`` and ``[...]`` as for
            `from_webdataset`. What ends with a slash is a folder, all objects below which are meant.
        columns: Only these: their names, or paths in the schema (``"price"``, ``"tags.list.element"``); None: all.
        sample: ``"row"``; or ``"row_group"``: samples are dicts of the columns' bytes, which ``transform=decode_row_group``
            makes a `pyarrow.Table` of. An index of each file is then kept beside it, and `batch_size` counts row groups.
        store: An open store.
        index_dir: For row groups: where indexes are kept if the store may not be written to; default: the user's cache folder.
        store_options: For `open_store`.

    Raises:
        ObjectNotFoundError: there is no such file.
        ShardReadError: a file is damaged, or no Parquet file; or its index is unusable.
        ConfigError: there is no such column; or pyarrow is not installed.
    """
    wanted = None if columns is None else list(dict.fromkeys([columns] if isinstance(columns, str) else columns))
    if wanted is not None and not wanted:
        raise ConfigError("columns= names no column", hint="leave it out to read all")
    if sample == "row":
        store, keys, name = _files(urls, store, store_options, tars=False)
        return _rows(store, keys, wanted, name)
    options = ArchiveOptions(None if index_dir is None else local_path(index_dir, "index_dir"), "split")
    store, parts, name = _archives(urls, store, store_options, "webdataset", options, {}, tars=False)
    dataset = Dataset(store, parts, group="webdataset", name=name, archives=options)
    if wanted is None:
        return dataset
    if len(dataset):
        layout = dataset.layout(next(i for i, part in enumerate(parts) if part.samples))
        assert layout.index is not None
        known = {extension_of(each) for each in layout.index.names()}
        if missing := [column for column in wanted if column not in known]:
            raise ConfigError(f"{name} has no column {missing[0]!r}", hint=f"it has {', '.join(sorted(known - {FOOTER}))}")
    return dataset.only([*wanted, FOOTER])


def _rows(store: ObjectStore, keys: Sequence[str], columns: Sequence[str] | None, name: str) -> Dataset:
    """The rows of these files; their footers are read side by side."""
    footers = map_ordered(partial(read_footer, store), keys, concurrency=min(_FOOTERS, len(keys)), name="s3loader-footers")
    found = [ParquetShard.of(key, footer, columns, f"{store.url}/{key}") for key, footer in zip(keys, footers, strict=True)]
    dataset = Dataset(store, [shard for shard, _ in found], name=name)
    dataset.keep_layouts({number: layout for number, (_, layout) in enumerate(found)})
    return dataset


def _archives(
    urls: Locations,
    store: ObjectStore | None,
    store_options: StoreKeywords,
    group: Group,
    options: ArchiveOptions,
    left_out: dict[str, LeftOut],
    *,
    tars: bool = True,
) -> tuple[ObjectStore, list[Shard | LooseRun], str]:
    """Archives by their URLs: their store, the archives as parts, and a name for them.

    Args:
        left_out: Gets what is no sample of theirs.
        tars: A folder stands for the tar archives below it; False: for all objects there but indexes.
    """
    store, keys, name = _files(urls, store, store_options, tars)
    shards: list[Shard | LooseRun] = [Shard(key, -1, automatic=True) for key in keys]
    return store, counted(store, shards, group, options, left_out), name


def _files(
    urls: Locations, store: ObjectStore | None, store_options: StoreKeywords, tars: bool
) -> tuple[ObjectStore, list[str], str]:
    """The store of some files, their keys, and a name for them; arguments as of `_archives`."""
    patterns = names_of(urls, "urls")
    names = [name for pattern in patterns for name in expand_braces(pattern, keep_escapes=True)]
    if not tars:
        names = [f"{name}**" if name.endswith("/") else name for name in names]
    store, keys = one_store(names, store, store_options, patterns=True)
    if not tars:
        keys = [key for key in keys if not key.endswith((".idx", "/"))]  # ours and DALI's, and what stands for a folder
    store.open_ahead(min(_AHEAD, 1 + len(keys)))
    return store, keys, patterns[0] if patterns else ""


# -- MosaicML Streaming ----------------------------------------------------------------------------

_FOOTERS: Final = 32
"""Footers that are read side by side."""
_INDEX: Final = "index.json"
_VERSION: Final = 2
_MALFORMED: Final = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)
_WORDS: Final = (b'"shards"', b'"raw_data"', b'"column_encodings"')


@checked
def from_mds(url: Location, *, store: ObjectStore | None = None, **store_options: Unpack[StoreKeywords]) -> Dataset:
    """The dataset in a folder of raw MDS shards; a sample is a dict of its columns, and ``__key__``, its number as text.

    Integers, floats, texts, JSON and arrays come decoded (numpy scalars and arrays; ``int`` as a Python int); ``bytes``,
    ``jpeg``, ``png`` and encodings that are not known come as memoryviews, for `decode` by column name. The format has no
    checksums of samples, so only sizes, offsets and ETags are verified.

    Args:
        url: The folder with ``index.json``; with `store`, its prefix there.
        store: An open store. The folder is listed once, to pin sizes and ETags.
        store_options: For `open_store`.

    Raises:
        ObjectNotFoundError: ``index.json`` or a shard does not exist.
        ShardReadError: the index is not understood, shards are compressed, or a column is pickled.
        IntegrityError: a shard has another size than the index says.
    """
    store, prefix = _folder(url, store, store_options)
    where = f"{store.url}/{prefix}"
    described = _described(store.get(prefix + _INDEX), where + _INDEX)
    found = {meta.key: meta for meta in store.list(prefix) if isinstance(meta, ObjectMeta)} if described else {}
    shards: list[MdsShard] = []
    first = 0
    made: dict[str, Columns] = {}
    for number, entry in enumerate(described):
        try:
            shard = _shard(entry, prefix, first, found, made)
        except (ShardReadError, IntegrityError, ObjectNotFoundError) as error:
            error.op, error.url = "read", f"{where}{_basename(entry) or _INDEX}"
            raise
        except _MALFORMED as error:
            text = f"shard {number} is not described as an MDS shard: {type(error).__name__}: {error}"
            raise ShardReadError(text, op="read", url=where + _INDEX) from error
        shards.append(shard)
        first += shard.samples
    return Dataset(store, shards, name=str(url))


def compressed_mds(url: Location) -> list[CompressedMdsShard] | None:
    """The shards of a folder of compressed MDS shards; None: there is no ``index.json``, or none of its shards is compressed.

    Raises:
        ObjectNotFoundError: a shard does not exist.
        ShardReadError: the index is not understood, only some are compressed, the compression is not known, or a column is
            pickled.
    """
    store, prefix = _folder(url, None, {})
    with store:
        try:
            described = _described(store.get(prefix + _INDEX), f"{store.url}/{prefix}{_INDEX}")
        except ObjectNotFoundError:
            return None
        if not any(isinstance(entry, Mapping) and entry.get("zip_data") is not None for entry in described):
            return None
        found = {meta.key: meta for meta in store.list(prefix) if isinstance(meta, ObjectMeta)}
        shards: list[CompressedMdsShard] = []
        first, made = 0, dict[str, Columns]()
        try:
            for entry in described:
                shards.append(_compressed(entry, prefix, first, found, made))
                first += shards[-1].plain.samples
        except _MALFORMED as error:
            text = f"a shard is not described as a compressed MDS shard: {type(error).__name__}: {error}"
            raise ShardReadError(text, op="read", url=f"{store.url}/{prefix}{_INDEX}") from error
    return shards


def rows_of_compressed_mds(url: Location, shard: CompressedMdsShard) -> Iterator[dict[str, Any]]:
    """The samples of one shard of the folder `url`, as `CompressedMdsShard.rows` gives them."""
    store, _ = _folder(url, None, {})
    with store:
        yield from shard.rows(store)


def _compressed(
    entry: Mapping[str, Any], prefix: str, first: int, found: Mapping[str, ObjectMeta], made: dict[str, Columns]
) -> CompressedMdsShard:
    name, size, key = entry["compression"], entry["zip_data"]["bytes"], prefix + entry["zip_data"]["basename"]
    compression = COMPRESSIONS_OF_MDS.get(name.partition(":")[0])
    if compression is None:
        raise ShardReadError(
            f"shards compressed with {name!r} are not read",
            op="read",
            url=key,
            hint="write the dataset with compression zstd, or None",
        )
    if key not in found:
        raise ObjectNotFoundError("the index names a shard that is not there", op="read", url=key)
    raw = {name: value for name, value in entry.items() if name not in ("compression", "zip_data")}
    inside = prefix + entry["raw_data"]["basename"]
    plain = _shard(raw, prefix, first, {inside: ObjectMeta(inside, entry["raw_data"]["bytes"])}, made)
    return CompressedMdsShard(key, size, found[key].etag, compression, plain)


def holds_mds(url: Location, *, store: ObjectStore | None = None, **store_options: Unpack[StoreKeywords]) -> bool:
    """Whether an ``index.json`` that describes MDS shards is, or stands in, the folder `url`. One GET."""
    given = store
    store, prefix = _folder(url, store, store_options)
    try:
        data = store.get(prefix + _INDEX)
    except (ObjectNotFoundError, AccessDeniedError):
        return False  # where it may not be read, the samples will say so themselves
    finally:
        if given is None:
            store.close()
    try:
        _, shards = _index(data)
    except _MALFORMED:
        return any(word in data for word in _WORDS)  # one that is damaged must not make samples of its shards
    is_mds = (isinstance(entry, Mapping) and entry.get("format") == "mds" for entry in shards)
    return not shards or b'"column_encodings"' in data or any(is_mds)


def _folder(url: Location, store: ObjectStore | None, options: StoreKeywords) -> tuple[ObjectStore, str]:
    """(the store, the prefix in it) of the folder, or of its ``index.json``."""
    (name,) = names_of(url)
    folder = (name[: -len(_INDEX)] if name.rsplit("/", 1)[-1] == _INDEX else name).rstrip("/")
    if store is None:
        return open_store(folder or ("/" if name.startswith("/") else "."), **options), ""
    return store, f"{folder}/" if folder else ""


def _index(data: bytes) -> tuple[Any, list[Mapping[str, Any]]]:
    index = json.loads(data)
    version, shards = index["version"], index["shards"]
    if not isinstance(shards, list):
        raise TypeError("shards is no list")
    return version, shards


def _described(data: bytes, url: str) -> list[Mapping[str, Any]]:
    try:
        version, shards = _index(data)
    except _MALFORMED as error:
        raise ShardReadError(f"not the index of MDS shards: {type(error).__name__}: {error}", op="read", url=url) from error
    if version != _VERSION:
        raise ShardReadError(f"version {version!r} of the index is not known, only {_VERSION}", op="read", url=url)
    return shards


def _basename(entry: Any) -> str | None:
    raw = entry.get("raw_data") if isinstance(entry, Mapping) else None
    name = raw.get("basename") if isinstance(raw, Mapping) else None
    return name if isinstance(name, str) else None


def _shard(
    entry: Mapping[str, Any], prefix: str, first: int, found: Mapping[str, ObjectMeta], made: dict[str, Columns]
) -> MdsShard:
    if entry["format"] != "mds":
        raise ShardReadError(f"format {entry['format']!r} cannot be read, only 'mds'")
    if entry.get("compression") is not None or entry.get("zip_data") is not None:
        raise ShardReadError(
            f"the shard is compressed ({entry.get('compression')}), so no sample of it can be read alone",
            hint="`s3loader pack FOLDER URL` reads it whole and writes shards; or write it with MDSWriter(compression=None)",
        )
    described = tuple(list(entry[name]) for name in ("column_names", "column_encodings", "column_sizes"))
    columns = made.setdefault(repr(described), Columns(*described))
    samples, size, key = entry["samples"], entry["raw_data"]["bytes"], prefix + entry["raw_data"]["basename"]
    if type(samples) is not int or type(size) is not int or samples < 0:
        raise ShardReadError("the index gives no number of samples or bytes")
    if key not in found:
        raise ObjectNotFoundError("the index names a shard that is not there")
    meta = found[key]
    shard = MdsShard(key, samples, meta.etag, size, pin=meta.etag, now=meta.size, first=first, columns=columns)
    check_size(shard, meta.size)
    if size < shard.head_size:
        raise ShardReadError(f"{size} bytes cannot hold the offsets of {samples} samples")
    return shard
