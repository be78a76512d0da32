"""`open_dataset`: which kind of dataset stands at a URL; and what the datasets of all frameworks share of opening one: where
samples come from, as constructors and as keywords."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Final, Literal, ParamSpec, TypeAlias, TypeVar, Unpack

from s3loader.arguments import checked
from s3loader.errors import ConfigError, ObjectNotFoundError
from s3loader.exchange.keys import is_manifest_key, is_shard_key, is_sidecar_key
from s3loader.loader.dataset import Dataset, Group
from s3loader.loader.filters import Filter
from s3loader.loader.options import LoaderKeywords
from s3loader.loader.sources import (
    from_manifest,
    from_mds,
    from_objects,
    from_parquet,
    from_prefix,
    from_tfrecord,
    from_webdataset,
    holds_mds,
    of_listing,
    open_prefix,
)
from s3loader.loader.urls import Locations, escape, expand_braces, is_pattern, names_of, one_store
from s3loader.progress import ShowProgress
from s3loader.shard.build import OnTorn, check_on_torn
from s3loader.store.bulk import ReadFailure
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import StoreKeywords
from s3loader.types import Location, ObjectMeta, ObjectURL, ReadRequest
from s3loader.units import KIB

__all__ = [
    "AdapterKeywords",
    "DatasetSource",
    "FromSources",
    "Kind",
    "MemberKeywords",
    "SourceKeywords",
    "open_dataset",
    "open_source",
]

Kind: TypeAlias = Literal["auto", "manifest", "webdataset", "mds", "tfrecord", "parquet", "objects", "prefix"]
"""What a dataset is made of: ``"auto"`` looks; ``"manifest"``: the lines of one; ``"webdataset"``: the members of tar shards;
``"mds"``: a folder that MosaicML Streaming wrote; ``"tfrecord"``: the records of TFRecord files, ``"parquet"``: the
rows of Parquet files (neither is found by looking);
``"objects"``: the objects named, each whole; ``"prefix"``: every object of a folder, each whole."""

_CHOICES: Final = (
    'say which is meant: kind="webdataset" takes the samples in the tar shards, "prefix" every object of the folder whole, '
    '"objects" what is named, whole, "manifest" and "mds" what these list; or name what is meant: ".../*.tar", a manifest'
)
_MDS_INDEX: Final = "index.json"
_BESIDE: Final = re.compile(r"(^|/)(\.[^/]*|_SUCCESS|(?i:readme|license|licence|notice)[^/]*)(/|$)")
"""What lies in folders of shards and is none of them."""
_MANY: Final = 100
"""Files that are looked into to see whether they are manifests."""
_HEAD: Final = 64 * KIB


@checked
def open_dataset(
    url: Locations,
    *,
    kind: Kind = "auto",
    store: ObjectStore | None = None,
    group: Group = None,
    members: str | Iterable[str] | None = None,
    columns: str | Iterable[str] | None = None,
    sample: Literal["row", "row_group"] = "row",
    where: Filter | None = None,
    index_dir: str | os.PathLike[str] | None = None,
    on_torn: OnTorn = "error",
    allow_missing_end: bool = False,
    allow_trailing: bool = False,
    lower_extensions: bool = False,
    **store_options: Unpack[StoreKeywords],
) -> Dataset:
    """The dataset at a URL, by what stands there.

    - ``.jsonl`` is a manifest;
    - tar archives (a URL with braces or ``*``, a list, a folder of them) are shards: a dataset of the samples in them;
    - a folder with one manifest of ours, or with the ``index.json`` of MDS shards, is that dataset;
    - any other folder, pattern or list: its objects, each a sample.

    What could be read in two ways is an error that lists them; `kind` says which is meant. A folder's name needs no slash at
    its end, and never stands for others that begin with it.

    Args:
        url: A URL, path, pattern, or a list of these; with `store`, keys of it.
        kind: ``"auto"`` looks; ``"manifest"``, ``"webdataset"`` (tar shards), ``"mds"`` (MosaicML Streaming), ``"tfrecord"``
            (records), ``"parquet"`` (rows, or row groups), ``"objects"`` (those named, each whole),
            ``"prefix"`` (every object of a folder, each whole).
        store: An open store.
        group: ``"webdataset"``: neighbours whose names agree up to the first dot of the base name are one sample, a dict by
            extension; None: each member (or object) is a sample.
        members: Of grouped samples, only the members with these extensions (``["jpg", "cls"]``); the others are not fetched
            where that saves bytes.
        columns: Of Parquet files, only these columns.
        sample: Of Parquet files: ``"row"``, or ``"row_group"``, as `from_parquet` takes it.
        where: Keep only samples whose manifest entry passes (manifests only).
        index_dir: Local folder for the indexes of shards that have none, if the store may not be written to; default: the
            user's cache folder.
        on_torn: Members of one sample that lie apart, or stand there twice: ``"error"``, or ``"split"`` takes each stretch for
            a sample; a folder's objects of one sample are always brought together.
        allow_missing_end: Of shards without an index: accept one without the zero blocks that end it (it may be truncated).
        allow_trailing: Of shards without an index: leave out what follows the end of one.
        lower_extensions: Extensions in small letters, as WebDataset gives them: ``a.JPG`` is the ``jpg`` of its sample.
        store_options: For `open_store`, where no store is given.

    Raises:
        ConfigError: the URL or an option is unusable, or what is there can be read in several ways.
        ObjectNotFoundError: there is nothing there.
        S3LoaderError: as `from_manifest`, `from_webdataset`, `from_mds`, `from_prefix` and `from_objects` raise.
    """
    names = names_of(url)
    found = _Found(kind, names) if kind != "auto" else _look(names, store, store_options)
    options: dict[str, Any] = {"store": store, **store_options} if found.store is None else {"store": found.store}
    check_on_torn(on_torn)
    alike: dict[str, Any] = {**options, "group": group, "members": members, "lower_extensions": lower_extensions}
    shards: dict[str, Any] = {"index_dir": index_dir, "on_torn": on_torn}
    shards |= {"allow_missing_end": allow_missing_end, "allow_trailing": allow_trailing}
    if found.kind != "parquet" and (columns is not None or sample != "row"):
        raise ConfigError("columns= and sample= are for Parquet files", hint='kind="parquet" opens them')
    if where is not None and found.kind != "manifest":
        raise ConfigError("where= needs a manifest, whose entries it looks at", hint="write one over these objects")
    if found.kind == "webdataset":
        urls = [name if _is_shard(name) or name.endswith("/") or is_pattern(name) else f"{name}/" for name in found.names]
        dataset = from_webdataset(urls, **shards, **alike)
    elif found.kind == "tfrecord":
        if group is not None or members is not None:
            raise ConfigError(f"group={group!r} and members={members!r} mean nothing to records", hint="leave it out")
        dataset = from_tfrecord(found.names, index_dir=index_dir, **options)
    elif found.kind == "parquet":
        if group is not None or members is not None:
            raise ConfigError(f"group={group!r} and members={members!r} mean nothing to rows", hint="columns= names columns")
        dataset = from_parquet(found.names, columns=columns, sample=sample, index_dir=index_dir, **options)
    elif found.kind == "objects":
        dataset = from_objects(found.names, on_torn=on_torn, **alike)
    elif len(found.names) != 1:
        raise ConfigError(f"kind={kind!r} takes one URL, not {len(names)}", hint="open each, and mix them (mix_datasets)")
    elif found.kind == "manifest":
        dataset = from_manifest(found.names[0], where=where, **shards, **alike)
    elif found.kind == "prefix" and found.metas is not None:
        dataset = of_listing(options["store"], found.prefix, found.metas, group, names[0], lower_extensions).only(members)
    elif found.kind == "prefix":
        dataset = from_prefix(found.names[0], **alike)
    elif group is None and members is None:
        dataset = from_mds(found.names[0], **options)
    else:
        raise ConfigError(
            f"group={group!r} and members={members!r} mean nothing to MDS shards, whose samples are whole", hint="leave it out"
        )
    return dataset


@dataclass(frozen=True, slots=True)
class _Found:
    """What stands there: its kind, and what was learned on the way."""

    kind: Kind
    names: Sequence[str]
    """URLs, or keys of `store`."""
    store: ObjectStore | None = None
    """Opened to look."""
    metas: Sequence[ObjectMeta] | None = None
    """The objects of a folder."""
    prefix: str = ""
    """Of the folder."""


def _is_shard(name: str) -> bool:
    return is_shard_key(expand_braces(name)[0])


def _look(names: list[str], store: ObjectStore | None, options: StoreKeywords) -> _Found:
    """By their names where these tell, else by what the store lists."""
    if len(names) == 1 and is_manifest_key(names[0]) and not is_pattern(names[0]):
        return _Found("manifest", names)
    plain = [name for pattern in names for name in expand_braces(pattern, keep_escapes=True)]
    if plain and all(map(is_shard_key, plain)):
        return _Found("webdataset", names)
    if len(names) == 1 and (len(plain) > 1 or is_pattern(plain[0])):
        opened, keys = one_store(plain, store, options, patterns=True)
        _refuse_mixed(names[0], keys)
        if is_shard_key(keys[0]):
            return _Found("webdataset", [escape(key) for key in keys], opened)
        return _Found("objects", keys, opened)
    if len(names) != 1:
        _refuse_mixed("the list", [name for name in names if not name.endswith("/")], sum(name.endswith("/") for name in names))
        return _Found("objects", names)
    return _look_into(names[0], store, options)


def _refuse_mixed(what: str, keys: Sequence[str], folders: int = 0) -> None:
    """Names must be all of shards, or all of objects that are looked at as a whole."""
    shards, manifests = sum(map(is_shard_key, keys)), sum(map(is_manifest_key, keys))
    counts = {"tar shards": shards, "manifests": manifests, "folders": folders, "other objects": len(keys) - shards - manifests}
    there = [f"{count} {kind}" for kind, count in counts.items() if count]
    if manifests or folders or len(there) > 1:
        raise ConfigError(f"{what} names {' and '.join(there)}", hint=_CHOICES)


def _look_into(name: str, store: ObjectStore | None, options: StoreKeywords) -> _Found:
    """What the folder `name` holds."""
    target = ObjectURL.parse(name) if store is None else None
    if target is not None and target.scheme == "file" and os.path.isfile(target.key):
        mds = target.key.endswith(f"/{_MDS_INDEX}") and holds_mds(target)
        return _Found("mds" if mds else "objects", [name])
    if name.endswith(f"/{_MDS_INDEX}") and holds_mds(name, store=store, **options):
        return _Found("mds", [name])
    opened, prefix = open_prefix(name, store, options)
    folder = prefix if not prefix or prefix.endswith("/") else f"{prefix}/"
    top = list(opened.list(folder, delimiter="/"))
    if not top and prefix != folder:
        return _no_folder(name, opened, prefix)
    metas = [entry for entry in top if isinstance(entry, ObjectMeta)]
    if any(meta.key == folder + _MDS_INDEX for meta in metas) and holds_mds(folder, store=opened):
        return _Found("mds", [name])
    manifests = _manifests(opened, metas)
    if len(manifests) == 1:
        if target is None:
            return _Found("manifest", manifests)
        root = target if target.scheme == "file" else ObjectURL(target.scheme, target.bucket, "")
        return _Found("manifest", [str(root.joined(manifests[0]))])
    if manifests:
        raise ConfigError(f"{name} holds several manifests: {_some(manifests)}", hint="open the one that is meant by its name")
    if len(metas) < len(top):
        metas = [entry for entry in opened.list(folder) if isinstance(entry, ObjectMeta)]
    return _all_alike(name, opened, folder, metas)


def _all_alike(name: str, store: ObjectStore, folder: str, metas: list[ObjectMeta]) -> _Found:
    """A folder of shards, or of objects; an error where it is both, or other datasets lie in it."""
    shards = [meta.key for meta in metas if is_shard_key(meta.key) and not _BESIDE.search(meta.key[len(folder) :])]
    if shards:
        ours = {*shards, *(meta.key for meta in metas if is_sidecar_key(meta.key) or meta.key.endswith("/"))}
        others = [m.key for m in metas if m.key not in ours and not _BESIDE.search(m.key[len(folder) :])]
        if others:
            raise ConfigError(
                f"{name} holds {len(shards)} tar shards and {len(others)} other objects ({_some(others)})", hint=_CHOICES
            )
        return _Found("webdataset", [escape(key) for key in shards], store)
    mds = [meta.key for meta in metas if meta.key.endswith((".mds", ".mds.zstd", ".mds.zst"))]
    inner = _manifests(store, [meta for meta in metas if "/" in meta.key[len(folder) :]]) or mds
    if inner:
        raise ConfigError(
            f"{name} holds folders that are datasets of their own: {_some(inner)}",
            hint=f"open one of them, or several and mix them (mix_datasets); {_CHOICES}",
        )
    return _Found("prefix", [name], store, metas, folder)


def _no_folder(name: str, store: ObjectStore, prefix: str) -> _Found:
    """An object of this name; or an error that names what begins like it."""
    begin = [entry.key for entry in itertools.islice(store.list(prefix, delimiter="/"), _MANY)]
    if prefix in begin:
        return _Found("objects", [prefix], store)
    if not begin:
        raise ObjectNotFoundError(f"there is neither a folder nor an object of this name: {name}", op="list", url=store.url)
    raise ConfigError(
        f"there is no folder {name}/, but {_some(begin)}",
        hint=f'open one of these; {name}* or kind="prefix" takes all objects that begin so',
    )


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _manifests(store: ObjectStore, metas: Iterable[ObjectMeta]) -> list[str]:
    """Keys of those that are manifests of ours, as far as their first lines tell."""
    keys = [meta.key for meta in metas if is_manifest_key(meta.key) and meta.size][:_MANY]
    heads = store.read_many((ReadRequest(key, 0, _HEAD) for key in keys), errors="return")
    return [answer.request.key for answer in heads if not isinstance(answer, ReadFailure) and _is_entry(bytes(answer.data))]


def _is_entry(head: bytes) -> bool:
    try:
        entry = json.loads(head.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and entry.get("kind") in ("file", "shard", "manifest_ref")


# -- what the datasets of all frameworks share -----------------------------------------------------

P = ParamSpec("P")
T = TypeVar("T")

DatasetSource: TypeAlias = Dataset | Locations | Callable[..., Dataset]
"""An open dataset, a URL or URLs for `open_dataset`, or a function that opens one and takes `SourceKeywords`."""


class MemberKeywords(StoreKeywords, total=False):
    """The keywords of `open_dataset` and `open_store`, but for those of Parquet files."""

    kind: Kind
    store: ObjectStore | None
    group: Group
    members: str | Iterable[str] | None
    where: Filter | None
    index_dir: str | os.PathLike[str] | None
    on_torn: OnTorn
    allow_missing_end: bool
    allow_trailing: bool
    lower_extensions: bool


class SourceKeywords(MemberKeywords, total=False):
    """How a dataset is opened, where none is given that is open: the keywords of `open_dataset` and `open_store`."""

    columns: str | Iterable[str] | None
    sample: Literal["row", "row_group"]


class AdapterKeywords(LoaderKeywords, SourceKeywords, total=False):
    """The options that the datasets of every framework take."""

    epoch: int
    progress: ShowProgress


def open_source(dataset: DatasetSource, options: Mapping[str, Any]) -> tuple[Dataset, dict[str, Any]]:
    """(the dataset itself, or the one that it names; the options that were not for opening it).

    Raises:
        ConfigError: a dataset was given, and options for opening one; or an option that this kind of source has not.
    """
    known = SourceKeywords.__optional_keys__
    ours = {name: value for name, value in options.items() if name in known}
    rest = {name: value for name, value in options.items() if name not in known}
    if isinstance(dataset, Dataset):
        if ours:
            raise ConfigError(f"{', '.join(sorted(ours))}: the dataset is open already", hint="give these to open_dataset")
        return dataset, rest
    opener = dataset if callable(dataset) else partial(open_dataset, dataset)
    taken = {*inspect.signature(opener).parameters, *StoreKeywords.__optional_keys__}
    if not taken.issuperset(ours):
        raise ConfigError(
            f"{', '.join(sorted(ours.keys() - taken))}: this kind of dataset has no such option",
            hint="leave it out; where= and index_dir= are for manifests and shards",
        )
    return opener(**ours), rest


class FromSources:
    """Constructors for a class whose first argument is a `DatasetSource`.

    Each takes the keywords of the class beside those of the function of its name in `s3loader`, and returns the class it is
    called on.
    """

    object_defaults: ClassVar[Mapping[str, Any]] = {}
    """What `from_prefix` and `from_objects` give the class where the caller gives nothing."""

    if TYPE_CHECKING:

        def __init__(self, dataset: Any = None, *args: Any, **options: Any) -> None: ...

    @classmethod
    def from_manifest(cls: Callable[Concatenate[Any, P], T], manifest: Location, *args: P.args, **options: P.kwargs) -> T:
        """The samples a manifest lists; takes the keywords of `s3loader.from_manifest` too."""
        return cls(partial(from_manifest, manifest), *args, **options)

    @classmethod
    def from_webdataset(cls: Callable[Concatenate[Any, P], T], urls: Locations, *args: P.args, **options: P.kwargs) -> T:
        """WebDataset shards by their URLs, braces included; takes the keywords of `s3loader.from_webdataset` too."""
        return cls(partial(from_webdataset, urls), *args, **options)

    @classmethod
    def from_parquet(cls: Callable[Concatenate[Any, P], T], urls: Locations, *args: P.args, **options: P.kwargs) -> T:
        """The rows of Parquet files; takes the keywords of `s3loader.from_parquet` too."""
        return cls(partial(from_parquet, urls), *args, **options)

    @classmethod
    def from_tfrecord(cls: Callable[Concatenate[Any, P], T], urls: Locations, *args: P.args, **options: P.kwargs) -> T:
        """The records of TFRecord files; takes the keywords of `s3loader.from_tfrecord` too."""
        return cls(partial(from_tfrecord, urls), *args, **options)

    @classmethod
    def from_mds(cls: Callable[Concatenate[Any, P], T], url: Location, *args: P.args, **options: P.kwargs) -> T:
        """A folder that MosaicML Streaming wrote; takes the keywords of `s3loader.from_mds` too."""
        return cls(partial(from_mds, url), *args, **options)

    @classmethod
    def from_prefix(cls: Callable[Concatenate[Any, P], T], s3_uri: Location, *args: P.args, **options: P.kwargs) -> T:
        """Every object under a prefix, in order of their keys; takes the keywords of `s3loader.from_prefix` too."""
        _set_defaults(cls, options)
        return cls(partial(from_prefix, s3_uri), *args, **options)

    @classmethod
    def from_objects(cls: Callable[Concatenate[Any, P], T], object_uris: Locations, *args: P.args, **options: P.kwargs) -> T:
        """These objects, in this order; takes the keywords of `s3loader.from_objects` too."""
        _set_defaults(cls, options)
        return cls(partial(from_objects, object_uris), *args, **options)


def _set_defaults(cls: Any, options: dict[str, Any]) -> None:
    for name, value in cls.object_defaults.items():
        options.setdefault(name, value)
