"""A dataset as the loader sees it: parts (shards, runs of loose objects) with samples laid end to end."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from s3loader.errors import (
    ConfigError,
    IntegrityError,
    ObjectNotFoundError,
    PlanError,
    S3LoaderError,
    ShardReadError,
    StateMismatchError,
)
from s3loader.loader.indexes import find_index
from s3loader.loader.layout import Layout, LayoutCache, LooseRun, Shard
from s3loader.loader.mds_format import MdsShard
from s3loader.loader.options import LoaderOptions
from s3loader.loader.shares import Shares
from s3loader.plan import Catalog, OrderSpec, Plan, choose_spec, plan_for
from s3loader.plan.permutation import Int64Array
from s3loader.shard.index import ShardIndex, index_key, is_foreign, sample_key
from s3loader.store.bulk import ReadFailure
from s3loader.store.objectstore import ObjectStore
from s3loader.types import ReadRequest
from s3loader.units import MIB

__all__ = ["Dataset", "Group"]

Group: TypeAlias = Literal["webdataset"] | None
"""None: each member (or object) is a sample. ``"webdataset"``: neighbours whose names agree up to the
first dot of the base name are one sample, a dict by extension."""

_LAYOUT_BYTES: Final = 64 * MIB
_LOOKED_AT: Final = 4
"""Parts whose layouts say what leaving members out saves."""


class Dataset:
    """Where the samples are. Made by `s3loader.loader.open_dataset` and its siblings; immutable, picklable, safe after fork.

    Args:
        store: Where all parts are.
        parts: Shards and runs of loose objects, in order.
        group: See `Group`.
        selected: For a filtered dataset: the samples kept of each part, by number.
        name: For messages.
        index_dir: See `from_manifest`.
    """

    def __init__(
        self,
        store: ObjectStore,
        parts: Sequence[Shard | LooseRun],
        *,
        group: Group = None,
        selected: Sequence[Int64Array] | None = None,
        name: str = "",
        index_dir: str | None = None,
    ) -> None:
        self.store = store
        self.parts = parts
        self.group: Group = group
        self.selected = selected
        self.name = name or store.url
        self.index_dir = index_dir
        self.members: frozenset[str] | None = None
        self._shares: Shares | None = None
        counts = [part.samples for part in parts] if selected is None else [len(kept) for kept in selected]
        self.catalog = Catalog(np.array(counts, dtype=np.int64), self._total_bytes(), self._digest())
        self.starts = np.cumsum(self.catalog.counts) - self.catalog.counts
        self._drop_layouts()

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
        twin.members, twin._shares = wanted, None
        twin._drop_layouts()
        return twin

    @property
    def shares(self) -> Shares:
        """What of its bytes is used and fetched; where members are left out, as a few of its parts have it (read for this)."""
        if self.members is None or not len(self):
            return Shares(1.0, 1.0, 0.0)
        if self._shares is None:
            some = range(0, len(self.parts), max(1, len(self.parts) // _LOOKED_AT))
            layouts = [layout for layout in self.layouts(some).values() if not isinstance(layout, S3LoaderError)]
            self._shares = Shares.of(layouts)
        return self._shares

    def _drop_layouts(self) -> None:
        self._pid = os.getpid()
        self._layouts = LayoutCache(_LAYOUT_BYTES)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_layouts"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._drop_layouts()

    def __len__(self) -> int:
        return self.catalog.samples

    def _total_bytes(self) -> int:
        if self.selected is not None:
            kept = sum(len(numbers) for numbers in self.selected)
            return int(self._bytes_of_all() * kept / max(1, sum(part.samples for part in self.parts)))
        return self._bytes_of_all()

    def _bytes_of_all(self) -> int:
        return sum(part.size if isinstance(part, Shard) else int(np.maximum(part.sizes, 0).sum()) for part in self.parts)

    def _digest(self) -> str:
        hasher = hashlib.sha256(repr(self.group).encode())
        for part in self.parts:
            if isinstance(part, Shard):
                hasher.update(f"\0{part.key}\0{part.samples}\0{part.etag}\0{part.size}\n".encode("utf-8", "surrogateescape"))
            else:
                rows = zip(part.keys, part.sizes.tolist(), part.etags, strict=True)
                for key, size, etag in rows:
                    hasher.update(f"\1{key}\0{size}\0{etag}\n".encode("utf-8", "surrogateescape"))
                hasher.update(part.first.tobytes())
        for numbers in self.selected or ():
            hasher.update(b"\2" + numbers.tobytes())
        return hasher.hexdigest()[:32]

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
            found |= self._load(missing)
        return found

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
            return self._keep(number, self._select(number, Layout.of_loose(part)))
        except ShardReadError as error:
            return error

    def _keep(self, number: int, layout: Layout) -> Layout:
        self._layouts.put(number, layout)
        return layout

    def _select(self, number: int, layout: Layout) -> Layout:
        if self.selected is not None:
            layout = layout.select(self.selected[number])
        return layout if self.members is None else layout.only(self.members)

    def _load(self, missing: Sequence[int]) -> dict[int, Layout | S3LoaderError]:
        found: dict[int, Layout | S3LoaderError] = {}
        shards = [part for number in missing if isinstance(part := self.parts[number], Shard)]
        requests = (
            shard.head_request(number) if isinstance(shard, MdsShard) else ReadRequest(index_key(shard.key), tag=number)
            for number, shard in zip(missing, shards, strict=True)
        )
        for shard, answer in zip(shards, self.store.read_many(requests, errors="return"), strict=True):
            number = answer.request.tag
            try:
                # A copy: a view would keep a pooled buffer lent for as long as the layout is cached.
                data = None if isinstance(answer, ReadFailure) else bytes(answer.data)
                if isinstance(answer, ReadFailure) and not isinstance(answer.error, ObjectNotFoundError):
                    raise answer.error
                if isinstance(shard, MdsShard):
                    if isinstance(answer, ReadFailure):
                        raise answer.error
                    index = shard.index_of(answer)
                elif data is None or is_foreign(data):
                    index = find_index(self.store, shard.key, self.index_dir)
                else:
                    index = ShardIndex.from_bytes(data)
                found[number] = self._keep(number, self._check(number, shard, index))
            except S3LoaderError as error:
                found[number] = self._explain(shard, error)
        return found

    def _check(self, number: int, shard: Shard, index: ShardIndex) -> Layout:
        if shard.etag and index.etag and index.etag != shard.etag:
            raise ShardReadError(f"the index was made for ETag {index.etag!r}, the dataset has {shard.etag!r}")
        if index.compression not in (None, "zstd"):
            raise ShardReadError(
                f"{index.compression} shards cannot be read at random", hint="write shards plain or with zstd; convert these"
            )
        layout = Layout.of_shard(shard, index, grouped=self.group is not None)
        if layout.samples != shard.samples:
            raise ShardReadError(f"the index has {layout.samples} samples, the dataset expects {shard.samples}")
        return self._select(number, layout)

    def _explain(self, shard: Shard, error: S3LoaderError) -> S3LoaderError:
        mds = isinstance(shard, MdsShard)
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
        part = int(np.searchsorted(self.starts + self.catalog.counts, sample, side="right"))
        return part, sample - int(self.starts[part])

    def keys(self, samples: Int64Array) -> list[str]:
        """Key of each sample; empty where the index cannot be had."""
        parts = np.searchsorted(self.starts + self.catalog.counts, samples, side="right")
        layouts = self.layouts(np.unique(parts).tolist())
        out = []
        for part, number in zip(parts.tolist(), (samples - self.starts[parts]).tolist(), strict=True):
            layout = layouts[part]
            out.append("" if isinstance(layout, S3LoaderError) else self.sample_key(layout, int(layout.first[number])))
        return out

    def sample_key(self, layout: Layout, member: int) -> str:
        """Key of the sample whose first member is `member`: ``archive#name``, or the key of a loose object."""
        name = layout.name(member)
        if self.group is not None:
            name = sample_key(name)
        return name if layout.loose else f"{layout.key(member)}#{name}"

    def find(self, key: str) -> int:
        """Number of the sample with this key (see `sample_key`), or of the one that has a member of this name.

        Raises:
            PlanError: there is none.
        """
        number = self.find_all([key])[key]
        if number is None:
            raise PlanError(f"no sample is called {key!r}", hint="keys are archive#name, or those of loose objects")
        return number

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
