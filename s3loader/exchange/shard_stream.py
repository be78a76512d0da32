"""The shards of a manifest being written: one growing, the others on their way."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from s3loader.exchange.claims import ShardNames
from s3loader.exchange.commit import can_compare_and_swap
from s3loader.exchange.errors import WriterStateError
from s3loader.exchange.journal import Journal
from s3loader.exchange.keys import beside
from s3loader.exchange.packer import ShardPacker, Source
from s3loader.exchange.types import ShardEntry
from s3loader.exchange.writer_config import ManifestWriterConfig
from s3loader.shard.compression import normalize_compression, suffix_of
from s3loader.shard.index import index_key
from s3loader.shard.pool import UploadPool
from s3loader.store.objectstore import ObjectStore

__all__ = ["ShardStream"]


class ShardStream:
    """Takes members, claims names, and gives a future entry for each shard that is full."""

    def __init__(
        self, store: ObjectStore, manifest_key: str, config: ManifestWriterConfig, pool: UploadPool, journal: Journal
    ) -> None:
        self._store = store
        self._config = config
        self._pool = pool
        self._journal = journal
        suffix = suffix_of(normalize_compression(config.shard_compression))
        prefix = beside(manifest_key, "shards") if config.shard_prefix is None else config.shard_prefix.strip("/")
        self._names = ShardNames(store, prefix, suffix)
        self._growing: ShardPacker | None = None
        self._finishing: list[ShardPacker] = []
        self.count = 0
        """Shards that were full or flushed."""

    @property
    def members(self) -> int:
        """Members of the growing shard."""
        return 0 if self._growing is None else len(self._growing)

    @property
    def content_bytes(self) -> int:
        """Bytes of content in the growing shard."""
        return 0 if self._growing is None else self._growing.content_bytes

    @property
    def held(self) -> int:
        """Bytes of the growing shard that are in memory."""
        return 0 if self._growing is None else self._growing.held

    def add(
        self, member_path: str, source: Source, id: str | None, meta: dict[str, Any] | None, size_bytes: int | None
    ) -> Future[ShardEntry] | None:
        """Add a member; the entry to come of the shard, where that is now full.

        Raises:
            WriterStateError: no `shard_size` was given.
        """
        policy = self._config.shard_size
        if policy is None:
            raise WriterStateError(
                "Shard buffering not enabled (shard_size not set)",
                hint="open the writer with shard_size=ShardSizePolicy(max_entries=...)",
            )
        packer = self._new() if self._growing is None else self._growing
        packer.add(member_path, source, id=id, meta=meta, size_bytes=size_bytes)
        return self.end() if policy.reached(len(packer), packer.content_bytes) else None

    def _new(self) -> ShardPacker:
        conditional = can_compare_and_swap(self._store)
        key = self._names.claim()
        self._journal.note("index", index_key(key))
        self._growing = ShardPacker(
            self._store,
            key,
            pool=self._pool,
            archive_format=self._config.shard_format,
            compression=self._config.shard_compression,
            internal_manifest_path=self._config.internal_manifest_path,
            mode="create" if conditional else "overwrite",
        )
        return self._growing

    def end(self) -> Future[ShardEntry] | None:
        """Finish the growing shard in the background; None where it has no members."""
        packer, self._growing = self._growing, None
        if packer is None:
            return None
        if not len(packer):  # nothing but a name was made of it
            self._names.release(packer.key)
            return None

        def finish() -> ShardEntry:
            self._journal.note("archive", packer.key)
            entry = packer.finish()
            self._finishing.remove(packer)
            return entry

        self._finishing.append(packer)
        self.count += 1
        return self._pool.submit(finish, packer.held)

    def drop(self) -> Iterator[tuple[str, Exception]]:
        """Drop what is not finished; what could not be cleaned up, with the reason."""
        half = [*self._finishing, *([] if self._growing is None else [self._growing])]
        for packer in half:
            try:
                packer.abort()
                self._names.release(packer.key)
            except Exception as error:  # noqa: BLE001 - the caller has an error already, this one becomes its note
                yield packer.key, error
