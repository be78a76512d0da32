"""What the datasets of all frameworks share: where samples come from, as constructors and as keywords."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, TypeAlias, TypeVar

from s3loader.errors import ConfigError
from s3loader.loader.dataset import Dataset, Group
from s3loader.loader.filters import Filter
from s3loader.loader.opening import Kind, open_dataset
from s3loader.loader.options import LoaderKeywords
from s3loader.loader.sources import (
    from_manifest,
    from_mds,
    from_objects,
    from_parquet,
    from_prefix,
    from_tfrecord,
    from_webdataset,
)
from s3loader.loader.urls import Locations
from s3loader.progress import ShowProgress
from s3loader.shard.build import OnTorn
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import StoreKeywords
from s3loader.types import Location

__all__ = ["AdapterKeywords", "DatasetSource", "FromSources", "SourceKeywords", "open_source"]

P = ParamSpec("P")
T = TypeVar("T")

DatasetSource: TypeAlias = Dataset | Locations | Callable[..., Dataset]
"""An open dataset, a URL or URLs for `open_dataset`, or a function that opens one and takes `SourceKeywords`."""


class SourceKeywords(StoreKeywords, total=False):
    """How a dataset is opened, where none is given that is open: the keywords of `open_dataset` and `open_store`."""

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
        """The row groups of Parquet files; takes the keywords of `s3loader.from_parquet` too."""
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
