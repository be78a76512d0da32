"""The vocabulary of manifests, as typed dictionaries: plain dicts at run time, as s3exchange gives them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypedDict

from s3loader.errors import ConfigError

__all__ = [
    "CompactOptions",
    "CompactReport",
    "DeleteReport",
    "FileEntry",
    "ManifestEntry",
    "ManifestRef",
    "ManifestRefEntry",
    "ShardEntry",
    "ShardItem",
    "ShardSizePolicy",
    "StreamingBodyLike",
    "WriteMode",
]

WriteMode: TypeAlias = Literal["overwrite", "append_parts"]


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


@dataclass(frozen=True, slots=True)
class ShardSizePolicy:
    """When a growing shard is full: at so many entries or so many bytes of content, whichever comes first.

    Raises:
        ConfigError: neither is set.
    """

    max_entries: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.max_entries is None and self.max_bytes is None:
            raise ConfigError(
                "At least one of max_entries or max_bytes must be set", hint="for example ShardSizePolicy(max_bytes=64 << 20)"
            )
        for name in ("max_entries", "max_bytes"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"{name} must be at least 1, not {value}", hint="None means no limit")

    def reached(self, entries: int, size: int) -> bool:
        """Whether `entries` members of together `size` bytes fill the shard."""
        most, largest = self.max_entries, self.max_bytes
        return (most is not None and entries >= most) or (largest is not None and size >= largest)


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
