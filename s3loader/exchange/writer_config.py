"""Options and progress of a `ManifestWriter`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

from s3loader.errors import ConfigError
from s3loader.exchange.types import ShardSizePolicy, WriteMode
from s3loader.shard.index import INTERNAL_MANIFEST
from s3loader.types import PutMode

__all__ = ["ManifestWriterConfig", "WriterKeywords", "WriterProgress"]


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
    publish_on_error: bool
    publish: PutMode
    max_in_flight: int
    progress: Callable[[WriterProgress], None] | None


@dataclass(frozen=True, slots=True)
class ManifestWriterConfig:
    """Options of a `ManifestWriter` with their defaults; see there."""

    mode: WriteMode = "append_parts"
    part_max_entries: int = 50_000
    part_max_bytes: int = 50 * 1024 * 1024
    shard_size: ShardSizePolicy | None = None
    shard_prefix: str | None = None
    shard_format: str = "tar"
    shard_compression: str | None = None
    internal_manifest_path: str = INTERNAL_MANIFEST
    publish_on_error: bool = False
    publish: PutMode = "overwrite"
    max_in_flight: int = 8
    progress: Callable[[WriterProgress], None] | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("overwrite", "append_parts"):
            raise ConfigError(f"Invalid mode: {self.mode}", hint='"overwrite" or "append_parts"')
        numbers = (self.part_max_entries, self.part_max_bytes, self.max_in_flight)
        if not all(isinstance(number, int) and number >= 1 for number in numbers):
            raise ConfigError(
                "part_max_entries, part_max_bytes and max_in_flight must be whole numbers from 1 up",
                hint="leave them out for the defaults",
            )
        if not isinstance(self.shard_size, ShardSizePolicy | None):
            raise ConfigError(
                f"shard_size cannot be {type(self.shard_size).__name__}", hint="for example ShardSizePolicy(max_bytes=64 << 20)"
            )
        if self.publish != "overwrite" and self.mode != "overwrite":
            raise ConfigError(
                'publish= is for mode="overwrite": an append is always a compare-and-swap',
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
