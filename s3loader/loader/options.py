"""Everything a loader can be told, with its defaults."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, SupportsIndex, TypeAlias, TypedDict, get_args

from s3loader.arguments import checked, local_path, unknown_option
from s3loader.errors import ConfigError
from s3loader.fetch.diskcache import OnFull
from s3loader.loader.collate import Collate, make_collate
from s3loader.loader.decode import Decode, make_decoder
from s3loader.loader.quarantine import Quarantined
from s3loader.plan import OrderSpec, Shuffle, Tail
from s3loader.plan.schedule import OnBreak
from s3loader.store.backend import Driver
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Location
from s3loader.units import parse_duration, parse_size

__all__ = ["LoaderKeywords", "LoaderOptions", "OnError"]

_PER_NODE: Final = "/node"

OnError: TypeAlias = Literal["raise", "skip", "replace"]
"""What a sample that cannot be read, verified, decoded or transformed does. ``"raise"``: the error reaches you when its turn
comes. ``"skip"``: the batch is shorter. ``"replace"``: another sample, fixed by seed, epoch and position, takes its
place, so that all ranks stay in step. What was left out stands in `Loader.quarantine`,
and where `quarantine` says."""


@checked
@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """How samples are ordered, fetched, decoded and batched.

    Raises:
        ConfigError: an option is unusable.
    """

    batch_size: int
    """Samples per batch and rank."""
    shuffle: Shuffle = "block"
    seed: int = 0
    """Any integer; taken modulo 2**64."""
    order: OrderSpec | Mapping[str, Any] | None = None
    """The whole spec of the order, or some of its numbers (``block lanes chunk window run``); the rest is chosen to fit the
    data, `batch_size` and `world_size`."""
    tail: Tail = "short"
    allow_empty: bool = False
    """An epoch in which some rank gets no batch at all is a `PlanError`, unless this is set."""
    decode: Decode = None
    transform: Callable[..., Any] | None = None
    """Called with each decoded sample."""
    transform_key: bool = False
    """Call it with ``(sample, key)``: ``archive#member``, or the key of a loose object."""
    collate: Collate = None
    on_error: OnError = "raise"
    on_break: OnBreak = "next"
    verify: bool = True
    """Check the CRC32C of every member that has one."""
    memory_limit: int | str = "512MiB"
    """Bytes of samples that one rank holds: being fetched, waiting, and in open blocks; or ``"8GiB/node"``: that all ranks of a
    machine hold together, in equal shares. Worker processes (of a DataLoader, or `workers=`) get equal shares of a rank's."""
    prefetch: int | str = "256MiB"
    """Of these, at most so many fetched ahead by each process; of S3 as many as pay (docs/performance.md)."""
    driver: Driver = "auto"
    """``"threads"`` fetch beside your code (``"auto"`` with `cache_dir`: other processes wait for what they fetch); ``"pump"``
    fetches while you wait, for processes that do nothing else."""
    concurrency: int | None = None
    """Most requests at a time; default: the store's."""
    decode_threads: int = 0
    """Threads that decode and transform, for functions that release the GIL; 0: the calling thread."""
    cache_dir: str | os.PathLike[str] | None = None
    """Keep fetched ranges in this folder, shared by all processes of the node: what several of them want at the same moment is
    fetched by one."""
    cache_limit: int | str = "16GiB"
    """Most bytes in `cache_dir`; what was not used for longest goes first."""
    cache_on_full: OnFull = "warn"
    """Where the disk of `cache_dir` is full or fails: ``"warn"`` once and go on without it, or ``"raise"`` `CacheFullError`."""
    hedge_after: float | str | None = None
    """Ask a second time for a range that has not come after this time (``"200ms"``), and take what comes first."""
    skip_steps: Sequence[tuple[int, int]] = ()
    """``(first, end)`` steps, counted from the epoch's start in the loader's own batch and world size, that are left out of
    its first epoch (of a resumed one's, if a state is loaded)."""
    exclude: Sequence[str | Quarantined] = ()
    """Keys of samples to leave out; or what `read_quarantine` returns, of which samples that are not there any more are
    passed over."""
    quarantine: Location | ObjectStore | None = None
    """Where the list of samples that were skipped or replaced is kept, for `read_quarantine`: a URL or absolute path, a key of
    the dataset's store, or an open store. Objects are written below it, before the batch that lacks a sample is given."""

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ConfigError(
                f"batch_size must be a whole number from 1, not {self.batch_size!r}", hint="samples per batch and rank"
            )
        if not isinstance(self.seed, SupportsIndex):
            raise ConfigError(
                f"seed must be a whole number, not {self.seed!r}", hint="any whole number; it is taken modulo 2**64"
            )
        for first, end in self.skip_steps:
            if not 0 <= first <= end:
                raise ConfigError(f"skip_steps: there are no steps ({first}, {end})", hint="write (first, end), counted from 0")
        for name, allowed in (
            ("shuffle", Shuffle),
            ("tail", Tail),
            ("on_error", OnError),
            ("on_break", OnBreak),
            ("driver", Driver),
            ("cache_on_full", OnFull),
        ):
            if getattr(self, name) not in get_args(allowed):
                choices = ", ".join(f'"{choice}"' for choice in get_args(allowed))
                raise ConfigError(
                    f"{name} must be one of {choices}, not {getattr(self, name)!r}", hint="leave it out for the default"
                )
        if self.decode_threads < 0:
            raise ConfigError(
                f"decode_threads cannot be negative: {self.decode_threads}", hint="0 decodes in the calling thread"
            )
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", local_path(self.cache_dir, "cache_dir"))
        self.memory_of_node()
        for name in ("prefetch", "cache_limit"):
            parse_size(getattr(self, name), name)
        if self.hedge_after is not None:
            parse_duration(self.hedge_after)
        make_decoder(self.decode)
        make_collate(self.collate)

    def memory_of_node(self) -> tuple[int, bool]:
        """`memory_limit` in bytes, and whether it is that of a node.

        Raises:
            ConfigError: it is no size.
        """
        limit = self.memory_limit
        if isinstance(limit, str) and limit.rstrip().endswith(_PER_NODE):
            return parse_size(limit.rstrip().removesuffix(_PER_NODE), "memory_limit"), True
        return parse_size(limit, "memory_limit"), False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> LoaderOptions:
        """From keyword arguments.

        Raises:
            ConfigError: an option is unknown or unusable.
        """
        known = [field.name for field in fields(cls)]
        unknown = set(values).difference(known)
        if unknown:
            raise unknown_option(unknown, known)
        if "batch_size" not in values:
            raise ConfigError("batch_size is missing", hint="give the samples per batch and rank")
        shuffle = values.get("shuffle")
        if isinstance(shuffle, bool):
            values = {**values, "shuffle": "block" if shuffle else "none"}
        return cls(**values)


class LoaderKeywords(TypedDict, total=False):
    """The fields of `LoaderOptions` without `batch_size`, as keywords of everything that makes a `Loader`.

    As in other libraries ``shuffle=True`` means ``"block"``, ``False`` means ``"none"``.
    """

    shuffle: Shuffle | bool
    seed: int
    order: OrderSpec | Mapping[str, Any] | None
    tail: Tail
    allow_empty: bool
    decode: Decode
    transform: Callable[..., Any] | None
    transform_key: bool
    collate: Collate
    on_error: OnError
    on_break: OnBreak
    verify: bool
    memory_limit: int | str
    prefetch: int | str
    driver: Driver
    concurrency: int | None
    decode_threads: int
    cache_dir: str | os.PathLike[str] | None
    cache_limit: int | str
    cache_on_full: OnFull
    hedge_after: float | str | None
    skip_steps: Sequence[tuple[int, int]]
    exclude: Sequence[str | Quarantined]
    quarantine: Location | ObjectStore | None
