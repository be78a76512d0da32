"""The vocabulary of manifests, as typed dictionaries: plain dicts at run time, as s3exchange gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypedDict

from s3loader.arguments import checked, whole_number
from s3loader.errors import ConfigError
from s3loader.options import one_of
from s3loader.shard.index import INTERNAL_MANIFEST, WEBDATASET_MANIFEST
from s3loader.shard.samples import left_out_reason
from s3loader.shard.tar import RECORD
from s3loader.types import PutMode
from s3loader.units import parse_size

__all__ = [
    "CompactOptions",
    "CompactReport",
    "DeleteReport",
    "FileEntry",
    "ManifestEntry",
    "ManifestRef",
    "ManifestRefEntry",
    "ManifestWriterConfig",
    "ShardEntry",
    "ShardItem",
    "ShardSizePolicy",
    "StreamingBodyLike",
    "WriteMode",
    "WriterKeywords",
    "WriterProgress",
]

WriteMode: TypeAlias = Literal["overwrite", "append_parts", "create"]
"""How a manifest is written: whole, in place of what is there; as a part that is added to it; whole and exactly once."""


class _FileFields(TypedDict):
    kind: Literal["file"]
    key: str


class FileEntry(_FileFields, total=False):
    """One object, or one member of a shard (then with `member_path`, and `archive_key` once read)."""

    id: str | None
    meta: dict[str, Any] | None
    content_type: str | None
    size_bytes: int | None
    etag: str | None
    member_path: str
    archive_key: str


class _ShardFields(TypedDict):
    kind: Literal["shard"]
    archive_key: str


class ShardEntry(_ShardFields, total=False):
    """One tar archive with many members."""

    format: str
    compression: str | None
    internal_manifest_path: str
    count: int
    size_bytes: int
    meta: dict[str, Any] | None


class ManifestRefEntry(TypedDict):
    """Another manifest whose entries belong here."""

    kind: Literal["manifest_ref"]
    key: str


ManifestEntry: TypeAlias = FileEntry | ShardEntry | ManifestRefEntry
ManifestRef: TypeAlias = ManifestRefEntry


class _ItemFields(TypedDict):
    source: bytes | Path | str
    member_path: str


class ShardItem(_ItemFields, total=False):
    """One member to pack. A `str` source is a local path."""

    id: str | None
    meta: dict[str, Any] | None
    size_bytes: int | None


@checked
@dataclass(frozen=True, slots=True)
class ShardSizePolicy:
    """How large a shard may grow; it is closed before the sample that would exceed one of the limits.

    A shard never ends within a sample, so one sample that is larger than the limits makes a shard of its own, and one that
    is added member by member (`add_to_shard`) may exceed them by its last members.

    Raises:
        ConfigError: no limit is set, or one is unusable.
    """

    max_entries: int | None = None
    """Members."""
    max_bytes: int | str | None = None
    """Bytes of the (uncompressed) tar with headers, padding and internal manifest, rounded up to a tar record of 10,240 bytes;
    also as text: ``"64MiB"``."""
    max_samples: int | None = None
    """Samples: members with the same name up to the first dot of their base name; a member without extension counts as one."""

    def __post_init__(self) -> None:
        if self.max_entries is None and self.max_bytes is None and self.max_samples is None:
            raise ConfigError(
                "At least one of max_entries, max_samples or max_bytes must be set",
                hint='for example ShardSizePolicy(max_bytes="64MiB")',
            )
        if isinstance(self.max_bytes, str):
            object.__setattr__(self, "max_bytes", parse_size(self.max_bytes, "max_bytes"))
        for name in ("max_entries", "max_bytes", "max_samples"):
            value = getattr(self, name)
            whole = whole_number(value)
            if value is not None and (whole is None or whole < 1):
                raise ConfigError(f"{name} must be at least 1, not {value!r}", hint="None means no limit")
            object.__setattr__(self, name, whole)

    def holds(self, entries: int, samples: int, size: int) -> bool:
        """Whether a shard of these numbers of members and samples, and a tar of `size` bytes, is within the limits."""
        largest = self.max_bytes
        assert not isinstance(largest, str)
        return (
            (self.max_entries is None or entries <= self.max_entries)
            and (self.max_samples is None or samples <= self.max_samples)
            and (largest is None or size <= largest + -largest % RECORD)
        )


class DeleteReport(TypedDict):
    """What a deletion did, or with ``dry_run=True`` would do."""

    deleted_object_count: int
    deleted_archive_count: int
    deleted_manifest_count: int
    errors: dict[str, str]
    """Key to message, for what could not be deleted."""


class CompactReport(TypedDict):
    """What `compact_manifest` did."""

    total_entries: int
    """Entries written."""
    removed_entries: int
    """Entries dropped because their object is gone."""
    resolved_refs: int
    """References that were followed."""
    expanded_shards: int
    """Members written in place of their shards' entries."""


class CompactOptions(TypedDict, total=False):
    """The keywords of `compact_manifest`."""

    resolve_refs: bool
    """Put the referenced entries in place of references (the default); otherwise references are kept as they are."""
    apply_deletes: bool
    """Drop entries whose object, archive or member is gone (the default; one HEAD each, several at a time)."""
    expand_shards: bool
    """Put a shard's members in place of its entry."""
    delete_parts: bool
    """Compacting a manifest onto itself: delete its old parts afterwards. By default they stay: nothing refers to them now,
    and no `delete_manifest` finds them, but another manifest may have taken over the reference, or somebody be reading."""


class StreamingBodyLike(Protocol):
    """What `get_object` and the iterators give: a readable, closable stream."""

    def read(self, amt: int | None = None, /) -> bytes:
        """The next `amt` bytes, or all that are left."""
        ...

    def close(self) -> None:
        """Let go of the stream; closing twice is fine."""
        ...


class WriterKeywords(TypedDict, total=False):
    """The keywords of `ManifestWriter`, which describes them, for functions that hand them on."""

    mode: WriteMode
    part_max_entries: int
    part_max_bytes: int
    shard_size: ShardSizePolicy | None
    shard_prefix: str | None
    shard_format: str
    shard_compression: str | None
    internal_manifest_path: str
    group: Literal["webdataset"] | None
    publish_on_error: bool
    publish: PutMode
    max_in_flight: int
    progress: Callable[[WriterProgress], None] | None


@checked
@dataclass(frozen=True, slots=True)
class ManifestWriterConfig:
    """Options of a `ManifestWriter`, which describes them, with their defaults."""

    mode: WriteMode = "append_parts"
    part_max_entries: int = 50_000
    part_max_bytes: int = 50 * 1024 * 1024
    shard_size: ShardSizePolicy | None = None
    shard_prefix: str | None = None
    shard_format: str = "tar"
    shard_compression: str | None = None
    internal_manifest_path: str = ""
    group: Literal["webdataset"] | None = None
    publish_on_error: bool = False
    publish: PutMode = "overwrite"
    max_in_flight: int = 8
    progress: Callable[[WriterProgress], None] | None = None

    def __post_init__(self) -> None:
        one_of("group", self.group, (None, "webdataset"))
        if not self.internal_manifest_path:
            usual = WEBDATASET_MANIFEST if self.group is not None else INTERNAL_MANIFEST
            object.__setattr__(self, "internal_manifest_path", usual)
        elif self.group is not None and left_out_reason(self.internal_manifest_path) is None:
            raise ConfigError(
                f"internal_manifest_path {self.internal_manifest_path!r} would be a sample for WebDataset",
                hint=f'leave it out for "{WEBDATASET_MANIFEST}", or take another name of the form "__x__"',
            )
        if self.mode not in ("overwrite", "append_parts", "create"):
            raise ConfigError(f"Invalid mode: {self.mode}", hint='"append_parts", "overwrite" or "create"')
        numbers = (self.part_max_entries, self.part_max_bytes, self.max_in_flight)
        if not all(isinstance(number, int) and number >= 1 for number in numbers):
            raise ConfigError(
                "part_max_entries, part_max_bytes and max_in_flight must be whole numbers from 1 up",
                hint="leave them out for the defaults",
            )
        if not isinstance(self.shard_size, ShardSizePolicy | None):
            raise ConfigError(
                f"shard_size cannot be {type(self.shard_size).__name__}", hint='for example ShardSizePolicy(max_bytes="64MiB")'
            )
        if self.publish != "overwrite" and self.mode != "overwrite":
            raise ConfigError(
                'publish= is for mode="overwrite": the other modes have conditions of their own',
                hint='leave publish= out, or open the writer with mode="overwrite"',
            )


@dataclass(frozen=True, slots=True)
class WriterProgress:
    """How far a writer is, for its `progress` callback."""

    entries: int
    """Entries whose objects are stored."""
    objects: int
    """Objects uploaded by `put_object`."""
    shards: int
    parts: int
    bytes: int
    """Bytes of objects and archives uploaded."""
