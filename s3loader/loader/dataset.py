"""A dataset as the loader sees it: parts (shards, runs of loose objects) with samples laid end to end."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from s3loader.arguments import checked
from s3loader.errors import (
    ConfigError,
    IntegrityError,
    ObjectNotFoundError,
    PlanError,
    S3LoaderError,
    ShardReadError,
    StateMismatchError,
)
from s3loader.loader.catalog import (
    ArchiveOptions,
    absent_indexes,
    copies,
    current_index,
    find_index,
    kept_index,
    take_index,
)
from s3loader.loader.layout import Layout, LayoutCache, LooseRun, MemberSavings, Shard, wrong_size
from s3loader.loader.mds import MdsShard
from s3loader.loader.options import LoaderOptions
from s3loader.loader.rows import ParquetShard, RowLayout, row_units
from s3loader.plan import Catalog, OrderSpec, Plan, choose_spec, plan_for
from s3loader.plan.order import locate
from s3loader.plan.permutation import Int64Array
from s3loader.shard.build import no_random_access
from s3loader.shard.index import ShardIndex, index_key
from s3loader.shard.samples import LeftOut, sample_key
from s3loader.store.backend import ReadResult
from s3loader.store.bulk import ReadFailure
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import open_store
from s3loader.types import ReadRequest
from s3loader.units import MIB

__all__ = ["Dataset", "Group"]

Group: TypeAlias = Literal["webdataset"] | None
"""None: each member (or object) is a sample. ``"webdataset"``: neighbours whose names agree up to the
first dot of the base name are one sample, a dict by extension; hidden files, names without an extension and what stands under
``__x__`` belong to none."""

_LAYOUT_BYTES: Final = 64 * MIB
_LOOKED_AT: Final = 4
"""Parts whose layouts say what leaving members out saves."""


class Dataset:
    """Where the samples are. Made by `s3loader.loader.open_dataset` and its siblings; immutable, picklable, safe after fork.

    Args:
        store: Where all parts are.
        parts: Shards and runs of loose objects, in order.
        group: ``"webdataset"``: neighbours whose names agree up to the first dot of the base name are one sample, a dict by
            extension; None: each member (or object) is a sample.
        selected: For a filtered dataset: the samples kept of each part, by number.
        name: For messages.
        index_dir: Local folder for the indexes of shards that have none, if the store may not be written to.
        archives: How indexes are made of archives that have none, in place of `index_dir`.
        lower_extensions: Extensions in small letters, as WebDataset gives them: ``a.JPG`` is the ``jpg`` of its sample.
        left_out: What its sources have that is not read, by kind.
    """

    def __init__(
        self,
        store: ObjectStore,
        parts: Sequence[Shard | LooseRun],
        *,
        group: Group = None,
        selected: Sequence[Int64Array] | None = None,
        name: str = "",
        index_dir: str | os.PathLike[str] | None = None,
        archives: ArchiveOptions | None = None,
        lower_extensions: bool = False,
        left_out: Mapping[str, LeftOut] | None = None,
    ) -> None:
        self.store = store
        self.parts = parts
        self.group: Group = group
        self.selected = selected
        self.name = name or store.url
        self.archives = archives or ArchiveOptions(None if index_dir is None else os.fspath(index_dir))
        self.index_dir = self.archives.index_dir
        self.lower_extensions = lower_extensions
        self.left_out: Mapping[str, LeftOut] = left_out or {}
        self.members: frozenset[str] | None = None
        self._member_savings: MemberSavings | None = None
        counts = [part.samples for part in parts] if selected is None else [len(kept) for kept in selected]
        self.catalog = Catalog(
            np.array(counts, dtype=np.int64), self._total_bytes(), self._digest(), row_units(parts, selected)
        )
        self.starts = np.cumsum(self.catalog.counts) - self.catalog.counts
        self._drop_layouts()

    @checked
    def only(self, members: str | Iterable[str] | None) -> Dataset:
        """The same samples in the same order, with only the members of these extensions (what follows the first dot of the
        base name: ``"jpg"``, ``"seg.png"``); the bytes of the others are not fetched where that saves any. None: all.

        Raises:
            ConfigError: there are none, or samples are not grouped.
        """
        if members is None:
            return self
        wanted = frozenset(name.removeprefix(".") for name in ([members] if isinstance(members, str) else members))
        if self.group is None or not wanted:
            raise ConfigError(
                "members= leaves out members of grouped samples" if wanted else "members= names no extension",
                hint='give group="webdataset" and the extensions that are wanted, such as members=["jpg", "cls"]',
            )
        twin = copy.copy(self)
        twin.members, twin._member_savings = wanted, None
        twin._drop_layouts()
        return twin

    @checked
    def slice(self, start: int, stop: int) -> Dataset:
        """The samples from number `start` to before `stop`, as a dataset that holds only the parts they lie in.

        Raises:
            ConfigError: there are no such samples.
        """
        if not 0 <= start < stop <= len(self):
            raise ConfigError(f"there are no samples {start} to {stop} of {len(self)}", url=self.name, hint="count from 0")
        first, last = (int(number) for number in locate(self.starts, np.array([start, stop - 1], dtype=np.int64))[0])
        selected = []
        for number in range(first, last + 1):
            begin, count = int(self.starts[number]), int(self.catalog.counts[number])
            low, high = max(0, start - begin), min(count, stop - begin)
            kept = np.arange(low, high, dtype=np.int64) if self.selected is None else self.selected[number][low:high]
            selected.append(kept)
        whole = self.selected is None and sum(map(len, selected)) == sum(part.samples for part in self.parts[first : last + 1])
        return self._of_parts(first, last + 1, None if whole else selected)

    @checked
    def of_parts(self, low: int, high: int) -> Dataset:
        """The parts from number `low` to before `high`, as a dataset."""
        return self._of_parts(low, high, None if self.selected is None else self.selected[low:high])

    def _of_parts(self, low: int, high: int, selected: Sequence[Int64Array] | None) -> Dataset:
        return Dataset(
            self.store,
            self.parts[low:high],
            group=self.group,
            selected=selected,
            name=self.name,
            archives=self.archives,
            lower_extensions=self.lower_extensions,
        ).only(self.members)

    @checked
    def without_store(self, place: Mapping[str, Any]) -> Callable[[], Dataset]:
        """What makes this dataset again, on another machine: it pickles without the open store and the credentials that were
        found for it, and opens the store's URL there with `place`, keywords of `open_store`."""
        state = self.__getstate__()
        del state["store"]
        return partial(_reopened, state, self.store.url, dict(place))

    @property
    def member_savings(self) -> MemberSavings:
        """What of its bytes is used and fetched; where members are left out, as a few of its parts have it (read for this)."""
        if self.members is None or not len(self):
            return MemberSavings(1.0, 1.0, 0.0)
        if self._member_savings is None:
            some = range(0, len(self.parts), max(1, len(self.parts) // _LOOKED_AT))
            layouts = [layout for layout in self.layouts(some).values() if not isinstance(layout, S3LoaderError)]
            self._member_savings = MemberSavings.of(layouts)
        return self._member_savings

    def _drop_layouts(self) -> None:
        self._pid = os.getpid()
        self._layouts = LayoutCache(_LAYOUT_BYTES)

    def __getstate__(self) -> dict[str, Any]:
        absent = absent_indexes(self.store)
        state = {name: value for name, value in vars(self).items() if name != "_layouts"}
        return {**state, "_absent": {part.key for part in self.parts if isinstance(part, Shard) and part.key in absent}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        absent = state.pop("_absent")
        vars(self).update(state)
        absent_indexes(self.store).update(absent)
        self._drop_layouts()

    def __len__(self) -> int:
        return self.catalog.samples

    @property
    def store_urls(self) -> tuple[str, ...]:
        """URLs of the stores that its requests go to."""
        return (self.store.url,)

    def _total_bytes(self) -> int:
        if self.selected is not None:
            kept = sum(len(numbers) for numbers in self.selected)
            return int(self._bytes_of_all() * kept / max(1, sum(part.samples for part in self.parts)))
        return self._bytes_of_all()

    @property
    def stored_bytes(self) -> int | None:
        """Bytes of all parts, those a filter leaves out included; None where some are unknown, or where it has no shards."""
        shards = [max(part.size, part.now) for part in self.parts if isinstance(part, Shard)]
        loose = [part.known_sizes for part in self.parts if isinstance(part, LooseRun)]
        if not shards or min(shards) <= 0 or any(len(sizes) and int(sizes.min()) < 0 for sizes in loose):
            return None
        return sum(shards) + sum(int(sizes.sum()) for sizes in loose)

    def _bytes_of_all(self) -> int:
        return sum(part.content if isinstance(part, Shard) else int(np.maximum(part.sizes, 0).sum()) for part in self.parts)

    def _digest(self) -> str:
        hasher = hashlib.sha256(repr(self.group).encode())
        for part in self.parts:
            if isinstance(part, Shard):
                hasher.update(f"\0{part.key}\0{part.samples}\0{part.etag}\0{part.size}\n".encode("utf-8", "surrogateescape"))
                if isinstance(part, ParquetShard):
                    hasher.update(repr(part.groups).encode())
            else:
                rows = zip(part.keys, part.sizes.tolist(), part.etags, strict=True)
                for key, size, etag in rows:
                    hasher.update(f"\1{key}\0{size}\0{etag}\n".encode("utf-8", "surrogateescape"))
                hasher.update(part.first.tobytes())
        for numbers in self.selected or ():
            hasher.update(b"\2" + numbers.tobytes())
        return hasher.hexdigest()[:32]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was accepted when the dataset was opened."""
        return tuple(note for note in (copies(self.parts), self._left_out_note()) if note is not None)

    def _left_out_note(self) -> str | None:
        if not self.left_out:
            return None
        kinds = [f"{some.count:,} {kind} ({some.shown})" for kind, some in sorted(self.left_out.items())]
        return f"not read, because they are no samples: {'; '.join(kinds)}"

    # -- layouts -----------------------------------------------------------------------------

    def layouts(self, parts: Iterable[int]) -> dict[int, Layout | S3LoaderError]:
        """The layouts of `parts`, those of shards read from their side-cars, several at a time.

        A part whose index cannot be had has the error in place of the layout: its samples fail when
        their turn comes, not earlier.
        """
        if os.getpid() != self._pid:
            self._drop_layouts()
        found: dict[int, Layout | S3LoaderError] = {}
        missing: list[int] = []
        for number in dict.fromkeys(parts):
            layout = self._layouts.get(number)
            if layout is not None:
                found[number] = layout
            elif isinstance(part := self.parts[number], LooseRun):
                found[number] = self._of_loose(number, part)
            else:
                missing.append(number)
        if missing:
            found |= (loaded := self.load_layouts(missing))
            self.keep_layouts(loaded)
        return found

    def has_layout(self, part: int) -> bool:
        """Whether the layout of `part` is at hand."""
        return part in self._layouts and os.getpid() == self._pid

    def keep_layouts(self, layouts: Mapping[int, Layout | S3LoaderError]) -> None:
        """Have what `load_layouts` returned at hand, as far as there is room."""
        for number, layout in layouts.items():
            if not isinstance(layout, S3LoaderError):
                self._layouts.put(number, layout)

    def layout(self, part: int) -> Layout:
        """The layout of one part.

        Raises:
            ShardReadError: its index is missing, corrupt, or made for another version.
            StoreError: it cannot be read.
        """
        layout = self.layouts([part])[part]
        if isinstance(layout, S3LoaderError):
            raise layout
        return layout

    def _of_loose(self, number: int, part: LooseRun) -> Layout | S3LoaderError:
        try:
            layout = self._select(number, Layout.of_loose(part, lower=self.lower_extensions))
        except ShardReadError as error:
            return error
        self._layouts.put(number, layout)
        return layout

    def _select(self, number: int, layout: Layout) -> Layout:
        if self.selected is not None:
            layout = layout.select(self.selected[number])
        return layout if self.members is None else layout.only(self.members)

    def load_layouts(self, numbers: Sequence[int]) -> dict[int, Layout | S3LoaderError]:
        """The layouts of these parts, which are shards, or why there is none; their indexes are read in bulk.

        It changes nothing here, so it may run in a thread beside the others.
        """
        found: dict[int, Layout | S3LoaderError] = {}
        requests: list[ReadRequest] = []
        absent = absent_indexes(self.store)
        for number in numbers:
            shard = self.parts[number]
            assert isinstance(shard, Shard)
            if isinstance(shard, (MdsShard, ParquetShard)):
                requests.append(shard.head_request(number))
            elif shard.key in absent and (kept := kept_index(self.store, shard, self.index_dir)) is not None:
                found[number] = self._layout_of(number, shard, kept)
            elif (read := take_index(self.store, shard.key)) is not None:
                found[number] = self._layout_of(number, shard, partial(self._index_of, shard, read))
            else:
                requests.append(ReadRequest(index_key(shard.key), tag=number))
        for answer in self.store.read_many(requests, errors="return"):
            number = answer.request.tag
            shard = self.parts[number]
            assert isinstance(shard, Shard)
            if isinstance(shard, ParquetShard):
                found[number] = self._rows_of(number, shard, answer)
            else:
                found[number] = self._layout_of(number, shard, partial(self._index, shard, answer))
        return found

    def _rows_of(self, number: int, shard: ParquetShard, answer: ReadResult | ReadFailure) -> Layout | S3LoaderError:
        try:
            if isinstance(answer, ReadFailure):
                return answer.error
            return self._select(number, shard.layout_of(answer, f"{self.store.url}/{shard.key}"))
        except S3LoaderError as error:
            return self._explain(shard, error)

    def _layout_of(self, number: int, shard: Shard, index: ShardIndex | Callable[[], ShardIndex]) -> Layout | S3LoaderError:
        try:
            return self._check(number, shard, index if isinstance(index, ShardIndex) else index())
        except S3LoaderError as error:
            return self._explain(shard, error)

    def _index(self, shard: Shard, answer: ReadResult | ReadFailure) -> ShardIndex:
        """The index in what the store answered, or one that is kept elsewhere."""
        missing = isinstance(answer, ReadFailure) and isinstance(answer.error, ObjectNotFoundError)
        if isinstance(answer, ReadFailure) and (isinstance(shard, MdsShard) or not missing):
            raise answer.error
        if isinstance(shard, MdsShard):
            assert isinstance(answer, ReadResult)
            return shard.index_of(answer)
        # A copy: a view would keep a pooled buffer lent for as long as the layout is cached.
        return self._index_of(shard, None if isinstance(answer, ReadFailure) else bytes(answer.data))

    def _index_of(self, shard: Shard, beside: bytes | None) -> ShardIndex:
        """The index in what stands beside the archive (None: nothing), or one that is kept elsewhere."""
        try:
            return find_index(self.store, shard, self.index_dir, beside, asked=True)
        except ShardReadError:
            if not shard.automatic:
                raise
            return current_index(self.store, shard, self.archives, asked=beside is None)

    def _check(self, number: int, shard: Shard, index: ShardIndex) -> Layout:
        size = shard.size or shard.now
        if shard.now >= 0 and size != shard.now:
            raise wrong_size(f"{self.store.url}/{shard.key}", size, shard.now)
        if size > 0 and index.archive_size != size:
            raise ShardReadError(f"the index is of an archive of {index.archive_size} bytes, this one has {size}")
        if shard.now < 0 and shard.etag and index.etag and index.etag != shard.etag:
            raise ShardReadError(f"the index was made for ETag {index.etag!r}, the dataset has {shard.etag!r}")
        if not index.random_access:
            raise no_random_access(index.compression or "", f"{self.store.url}/{shard.key}")
        layout = Layout.of_shard(shard, index, grouped=self.group is not None, lower=self.lower_extensions)
        if layout.samples != shard.samples:
            raise ShardReadError(f"the index has {layout.samples} samples, the dataset expects {shard.samples}")
        return self._select(number, layout)

    def _explain(self, shard: Shard, error: S3LoaderError) -> S3LoaderError:
        mds = isinstance(shard, (MdsShard, ParquetShard))
        url = f"{self.store.url}/{shard.key if mds else index_key(shard.key)}"
        if isinstance(error, ObjectNotFoundError) and not mds:
            if self._is_gone(shard):
                return ObjectNotFoundError("the shard is not there any more", op="read", url=f"{self.store.url}/{shard.key}")
            return ShardReadError(
                "the shard has no index", op="read", url=url, hint="s3loader.shard.build_index makes one beside it"
            )
        if isinstance(error, (ShardReadError, IntegrityError)) and error.url is None:
            return type(error)(error.message, op="read", url=url, hint=error.hint)
        return error

    def _is_gone(self, shard: Shard) -> bool:
        try:
            return not self.store.exists(shard.key)
        except S3LoaderError:
            return False  # what is known is that the index is missing

    # -- names -------------------------------------------------------------------------------

    def locate(self, sample: int) -> tuple[int, int]:
        """(part, number in it) of a sample.

        Raises:
            PlanError: there is no such sample.
        """
        if not 0 <= sample < len(self):
            raise PlanError(f"sample {sample} of {len(self)} does not exist", hint="samples are numbered from 0")
        part, number = locate(self.starts, np.array([sample], dtype=np.int64))
        return int(part[0]), int(number[0])

    def keys(self, samples: Int64Array) -> list[str]:
        """Key of each sample; empty where the index cannot be had."""
        parts, numbers = locate(self.starts, samples)
        layouts = self.layouts(np.unique(parts).tolist())
        out = []
        for part, number in zip(parts.tolist(), numbers.tolist(), strict=True):
            layout = layouts[part]
            out.append("" if isinstance(layout, S3LoaderError) else self.sample_key(layout, layout.first_member(number)))
        return out

    def sample_key(self, layout: Layout, member: int) -> str:
        """Key of the sample whose first member is `member`: ``archive#name``, or the key of a loose object."""
        name = layout.name(member)
        if self.group is not None:
            name = sample_key(name)
        return name if layout.loose else f"{layout.key(member)}#{name}"

    @checked
    def find(self, key: str) -> int:
        """Number of the sample with this key (as `sample_key` gives it), or of the one that has a member of this name.

        Raises:
            PlanError: there is none.
        """
        number = self.find_all([key])[key]
        if number is None:
            raise PlanError(f"no sample is called {key!r}", hint="keys are archive#name, or those of loose objects")
        return number

    @checked
    def find_all(self, keys: Iterable[str]) -> dict[str, int | None]:
        """As `find`, of many at once; None for a key that no sample has."""
        found: dict[str, int | None] = dict.fromkeys(keys)
        in_archive: dict[str, list[str]] = {}
        for key in found:
            for mark in re.finditer("#", key):  # the archive's own name may have one
                in_archive.setdefault(key[: mark.start()], []).append(key)
        for number, part in enumerate(self.parts):
            candidates: Iterable[str] = found if isinstance(part, LooseRun) else in_archive.get(part.key, ())
            start = 0 if isinstance(part, LooseRun) else len(part.key) + 1
            names = {key[start:]: key for key in candidates if found[key] is None}
            if any(names):
                found |= {names[name]: at for name, at in self._numbers(number, names).items()}
        return found

    def _numbers(self, part: int, names: Container[str]) -> dict[str, int]:
        """Numbers of the samples of a part that are called as in `names`, or have a member that is; first ones first."""
        layout = self.layout(part)
        if isinstance(layout, RowLayout):
            return {name: int(self.starts[part]) + at for name, at in layout.numbers_of(names).items()}
        exact: dict[str, int] = {}
        grouped: dict[str, int] = {}
        for member in range(int(layout.first[-1])):
            name = layout.name(member)
            if name in names:
                exact.setdefault(name, member)
            if self.group is not None and (stem := sample_key(name)) in names:
                grouped.setdefault(stem, member)
        members = grouped | exact
        at = np.searchsorted(layout.first, list(members.values()), side="right") - 1
        return {name: int(self.starts[part]) + number for name, number in zip(members, at.tolist(), strict=True)}

    # -- plans -------------------------------------------------------------------------------

    def choose(self, options: LoaderOptions, world_size: int) -> Mapping[str, Any]:
        """The order spec of a new run, as a state stores it."""
        return self._choose(self.catalog, options, world_size, 0).as_dict()

    @staticmethod
    def _choose(catalog: Catalog, options: LoaderOptions, world_size: int, salt: int) -> OrderSpec:
        given: Mapping[str, Any] = {}
        if isinstance(options.order, OrderSpec):
            return options.order
        if options.order is not None:
            given = options.order
        try:
            return choose_spec(
                catalog.samples,
                catalog.total_bytes,
                batch_size=options.batch_size,
                world_size=world_size,
                shuffle=options.shuffle,
                seed=options.seed + salt,
                units=catalog.units,
                **given,
            )
        except TypeError as error:
            raise PlanError(f"order: {error}", hint="its entries are block, lanes, chunk, window and run") from error

    def plan(self, spec: Mapping[str, Any], *, skip: Sequence[tuple[int, int, int]] = (), exclude: Sequence[int] = ()) -> Plan:
        """The plan that `spec` describes over this data.

        Raises:
            StateMismatchError: the spec is not one of such a dataset.
        """
        return plan_for(self.catalog, OrderSpec.from_dict(spec), skip=skip, exclude=exclude)

    def check_spec(self, spec: Mapping[str, Any], options: LoaderOptions) -> None:
        """Refuse a state's spec that contradicts what the options say outright.

        Raises:
            StateMismatchError: naming each entry that differs.
        """
        self._check_spec(spec, options, 0)

    @staticmethod
    def _check_spec(spec: Mapping[str, Any], options: LoaderOptions, salt: int) -> None:
        expected: dict[str, Any] = {"shuffle": options.shuffle}
        if isinstance(options.order, OrderSpec):
            expected = options.order.as_dict()
        else:
            if options.shuffle != "none":
                expected["seed"] = (options.seed + salt) % (1 << 64)
            if options.shuffle == "block":
                expected |= options.order or {}
        differs = [
            f"{name} ({spec.get(name)!r} in the state, {value!r} here)"
            for name, value in expected.items()
            if spec.get(name) != value
        ]
        if differs:
            raise StateMismatchError(
                f"the state belongs to another sequence; what differs: {', '.join(differs)}",
                hint="restore these options, or give allow_changed=True to go on with the new ones at the same count",
                differs=differs,
            )


def _reopened(state: dict[str, Any], url: str, place: dict[str, Any]) -> Dataset:
    twin = Dataset.__new__(Dataset)
    twin.__setstate__({**state, "store": open_store(url, **place)})
    return twin
