"""The shards of a manifest being written: one growing, the others on their way."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Final

from s3loader.errors import ConfigError, ConflictError, ObjectExistsError, ObjectNotFoundError, WriterStateError
from s3loader.exchange.commit import can_compare_and_swap, put_settled
from s3loader.exchange.delete import UploadedKeys
from s3loader.exchange.keys import beside
from s3loader.exchange.pack import Extent, ShardPacker, Source, loaded, source_size
from s3loader.exchange.types import ManifestWriterConfig, ShardEntry, ShardSizePolicy
from s3loader.shard.compression import normalize_compression, suffix_of
from s3loader.shard.index import claim_bytes, index_key
from s3loader.shard.samples import extension_of, left_out_reason, sample_key
from s3loader.shard.tar import check_member_path
from s3loader.shard.upload import INDEX_TYPE
from s3loader.store.objectstore import ObjectStore
from s3loader.store.ordered import BoundedPool
from s3loader.types import PutMode, PutResult

__all__ = ["ShardNames", "ShardStream"]

_MOST_HEADER: Final = 8192
"""Bytes of the headers and padding of a member with a path below 1,000 characters, at most."""
_MOST_LINE: Final = 32768
"""Of its line in the internal manifest."""
_LONGEST_BETWEEN: Final = 1000
"""Members of no sample behind which a sample is taken to have ended; fewer may stand between its members."""
_LARGEST_BETWEEN: Final = 256 << 20
"""So many bytes of them also."""


class ShardStream:
    """Takes members, claims names, and gives a future entry for each shard that is full.

    What the growing shard has: `_samples` counted, their `_keys`, what it had when the last one `_began` and `_ended`, and the
    key of the sample that may go on (`_open`; None after one that came whole). Of the last sample of all shards the key and
    extensions are kept, to see one that is torn.
    """

    def __init__(
        self,
        store: ObjectStore,
        manifest_key: str,
        config: ManifestWriterConfig,
        pool: BoundedPool,
        uploaded: UploadedKeys,
        on_full: Callable[[Future[ShardEntry]], None],
    ) -> None:
        self._store = store
        self._config = config
        self._pool = pool
        self._uploaded = uploaded
        suffix = suffix_of(normalize_compression(config.shard_compression))
        prefix = beside(manifest_key, "shards") if config.shard_prefix is None else config.shard_prefix.strip("/")
        self._names = ShardNames(store, prefix, suffix)
        self._on_full = on_full
        self._growing: ShardPacker | None = None
        self._samples = 0
        self._began = self._ended = Extent(0, 0, 0)
        self._keys: set[str] = set()
        self._open: str | None = None
        self._last: str | None = None
        self._extensions: set[str] = set()
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
    ) -> None:
        """Add a member; first the shard is closed, if it is full and no sample of it goes on.

        Raises:
            WriterStateError: no `shard_size` was given.
            ConfigError: the member would tear a sample.
        """
        policy = self._policy()
        size = source_size(source, size_bytes)
        check_member_path(member_path)
        belongs = left_out_reason(member_path) is None
        key = sample_key(member_path) if belongs else None
        extension = extension_of(member_path) if belongs else ""
        if key is not None:
            self._refuse_torn(key, {extension})
        if self._growing is not None and self._may_close(key):
            now, began = self._growing.extent, self._began
            before = Extent(now.members - began.members, now.body - began.body, now.lines - began.lines)
            self._make_room([(member_path, size)], id, meta, before)  # what begins is expected to be no smaller
        packer = self._new() if self._growing is None else self._growing
        start = packer.extent
        packer.add(member_path, source, id=id, meta=meta, size_bytes=size)
        if key is None and self._open is not None:
            return
        if key is None or key != self._open:
            self._samples += 1
            self._began = start
        if key is not None:
            self._note(key, {extension})
            self._open, self._ended = key, packer.extent
        elif not policy.holds(len(packer) + 1, self._samples + 1, 0):
            self._close()

    def add_sample(self, key: str, values: Mapping[str, Source], id: str | None, meta: dict[str, Any] | None) -> None:
        """Add the members of one sample; first the shard is closed, if it has no room for them.

        Raises:
            WriterStateError: no `shard_size` was given.
            ConfigError: the key or an extension is unusable, or the shard has members of this key.
        """
        policy = self._policy()
        members: dict[str, tuple[Source, int]] = {}
        for extension, value in values.items():
            path = _member_of(key, extension)
            if path in members:
                raise ConfigError(
                    f"sample {key!r} has two members {path!r}", hint="give an extension once: jpg and .jpg are one"
                )
            size = source_size(value)
            members[path] = loaded(path, value, size), size
        if not members:
            raise ConfigError(f"sample {key!r} has no members", hint='give some: {"jpg": image, "cls": b"3"}')
        if key in self._keys:
            raise ConfigError(
                f"the shard has members of sample {key!r} already",
                hint="add a sample once, with all its members, under its own key",
            )
        extensions = set(map(extension_of, members))
        self._refuse_torn(key, extensions)
        if self._growing is not None:
            self._make_room([(path, size) for path, (_, size) in members.items()], id, meta, Extent(0, 0, 0))
        packer = self._new() if self._growing is None else self._growing
        self._began = packer.extent
        packer.add_together(((path, *member) for path, member in members.items()), id=id, meta=meta)
        self._samples += 1
        self._note(key, extensions)
        self._open = None
        if not policy.holds(len(packer) + 1, self._samples + 1, 0):
            self._close()

    def _policy(self) -> ShardSizePolicy:
        policy = self._config.shard_size
        if policy is None:
            raise WriterStateError(
                "Shard buffering not enabled (shard_size not set)",
                hint="open the writer with shard_size=ShardSizePolicy(max_samples=...)",
            )
        return policy

    def _may_close(self, key: str | None) -> bool:
        """Whether a shard may end before a member of sample `key` (None: of none).

        Members of no sample do not end the one they stand in, unless so many follow that the shard would grow without end.
        """
        if self._open is None or key is not None:
            return key is None or key != self._open
        assert self._growing is not None
        members, body, _ = (now - then for now, then in zip(self._growing.extent, self._ended, strict=True))
        return members >= _LONGEST_BETWEEN or body >= _LARGEST_BETWEEN

    def _make_room(self, members: list[tuple[str, int]], id: str | None, meta: dict[str, Any] | None, least: Extent) -> None:
        """Close the shard, if a sample of these members (path, bytes), or one of `least`, would exceed a limit."""
        packer = self._growing
        if packer is None or not len(packer):
            return
        policy = self._policy()
        count = max(len(members), least.members)
        if policy.holds(len(packer) + count, self._samples + 1, 0):
            if policy.max_bytes is None:
                return
            content = sum(size for _, size in members)
            if meta is None and id is None and max(len(path) for path, _ in members) < 1000:  # far from the limit, mostly
                most = Extent(
                    count, max(content + _MOST_HEADER * len(members), least.body), max(_MOST_LINE * count, least.lines)
                )
                if policy.holds(0, 0, packer.tar_size(most)):
                    return
            exact = packer.extent_of(members, id, meta)
            size = packer.tar_size(Extent(count, max(exact.body, least.body), max(exact.lines, least.lines)))
            if policy.holds(0, 0, size):
                return
        self._close()

    def _close(self) -> None:
        full = self.end()
        if full is not None:
            self._on_full(full)

    def _note(self, key: str, extensions: set[str]) -> None:
        self._keys.add(key)
        if key == self._last and key == self._open:
            self._extensions |= extensions
        else:
            self._last, self._extensions = key, extensions

    def _refuse_torn(self, key: str, extensions: set[str]) -> None:
        """Whether members of sample `key` may follow.

        Raises:
            ConfigError: they would be torn from the others of the sample.
        """
        hint = "give all members of a sample to one call of add_sample, or to add_to_shard one after another"
        if not self._keys and key == self._last and not extensions & self._extensions:
            raise ConfigError(f"sample {key!r} would be torn: its other members are in a shard that was closed", hint=hint)
        if key not in self._keys:
            return
        if key != self._open:
            whole = key == self._last  # it came whole, by add_sample
            if whole or self._config.group is not None:
                raise ConfigError(f"sample {key!r} would be torn: its other members are in the shard already", hint=hint)
        elif self._config.group is not None and extensions & self._extensions:
            raise ConfigError(f"sample {key!r} has a member {sorted(extensions)[0]!r} already", hint=hint)

    def _new(self) -> ShardPacker:
        conditional = can_compare_and_swap(self._store)
        key = self._names.claim()
        self._uploaded.note("index", index_key(key))
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
        self._samples, self._open, self._keys, self._began = 0, None, set(), Extent(0, 0, 0)
        if packer is None:
            return None
        if not len(packer):  # nothing but a name was made of it
            self._names.release(packer.key)
            return None

        def finish() -> ShardEntry:
            self._uploaded.note("archive", packer.key)
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


def _member_of(key: str, extension: str) -> str:
    """The path of a member of a sample.

    Raises:
        ConfigError: a reader would not take it for a member of that sample with that extension.
    """
    if not (isinstance(key, str) and isinstance(extension, str)):
        raise ConfigError(
            f"a sample's key and extensions are text, not {type(key).__name__} and {type(extension).__name__}",
            hint='for example add_sample("train/000001", {"jpg": image, "cls": b"3"})',
        )
    path = f"{key}.{extension.removeprefix('.')}"
    check_member_path(path)
    if extension_of(path) == "__key__":
        raise ConfigError(
            f"'__key__' is no member of sample {key!r}: readers give every sample its key under that name",
            hint="the key is the first argument: add_sample(sample.pop('__key__'), sample)",
        )
    if left_out_reason(path) is not None or sample_key(path) != key or not extension_of(path):
        raise ConfigError(
            f"{path!r} is not the member {extension!r} of a sample {key!r}: what follows the first dot of its base name is"
            " the extension, and hidden names and __x__ belong to no sample",
            hint="use a key without dots in its last part, such as train/000001, and extensions such as jpg or seg.png",
        )
    return path


class ShardNames:
    """Hands out archive keys ``<prefix>/shard-<number><suffix>``.

    Args:
        store: The store.
        prefix: Folder of the shards, without a trailing slash; may be empty.
        suffix: ``.tar``, ``.tar.gz``, ...
    """

    def __init__(self, store: ObjectStore, prefix: str, suffix: str) -> None:
        self._store = store
        self._stem = f"{prefix}/shard-" if prefix else "shard-"
        self._suffix = suffix
        self._number = 0
        self._owner = uuid.uuid4().hex
        self._taken: set[int] | None = None

    def claim(self) -> str:
        """The next free key, now ours."""
        while True:
            self._number += 1
            if self._taken is not None and self._number in self._taken:
                continue
            key = f"{self._stem}{self._number:06d}{self._suffix}"
            if self._try(key):
                return key
            if self._taken is None:  # once: skip all that are known to be taken without asking one by one
                self._taken = self._list()

    def release(self, key: str) -> None:
        """Give a claimed name back, of which no archive was made."""
        self._store.delete(index_key(key))

    def _try(self, key: str) -> bool:
        conditional = can_compare_and_swap(self._store)
        if self._store.exists(key) or (not conditional and self._store.exists(index_key(key))):
            return False
        claim = claim_bytes(f"{self._owner}-{self._number}")
        url = f"{self._store.url}/{key}"
        mode: PutMode = "create" if conditional else "overwrite"

        def put(_: bytes | None) -> PutResult:
            return self._store.put(index_key(key), claim, mode=mode, content_type=INDEX_TYPE)

        def is_ours(now: bytes | None, before: bytes | None, doubtful: bool) -> bool:
            if now is None or now == claim:
                return now is not None
            if conditional:
                raise ObjectExistsError("the name is taken", op="claim", url=url)
            raise ConflictError(
                "another writer took the same shard name, and the store has no conditional writes",
                op="claim",
                url=url,
                retryable=False,
                hint="give each writer its own shard_prefix on this store",
            )

        try:
            put_settled(put, lambda: self._side_car(key), is_ours, None, op="claim", url=url, conditional=conditional)
        except ObjectExistsError:
            return False
        return True

    def _side_car(self, key: str) -> bytes | None:
        try:
            return self._store.get(index_key(key))
        except ObjectNotFoundError:
            return None

    def _list(self) -> set[int]:
        numbered = re.compile(rf"(\d{{6,}}){re.escape(self._suffix)}(\.idx)?")
        found = (numbered.fullmatch(entry.key[len(self._stem) :]) for entry in self._store.list(self._stem))
        return {int(match[1]) for match in found if match is not None}
