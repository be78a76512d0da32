"""`ObjectStore`: the public face of every store."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from s3loader import ranges as ranges_
from s3loader.arguments import checked
from s3loader.errors import (
    BucketNotFoundError,
    ClosedError,
    ConfigError,
    ObjectChangedError,
    ObjectNotFoundError,
    RangeError,
    UnsupportedOperationError,
)
from s3loader.store.arguments import (
    check_attributes,
    check_several,
    checked_attributes,
    checked_key,
    checked_mode,
    checked_ranges,
    open_source,
    readable,
    writable,
)
from s3loader.store.backend import Backend
from s3loader.store.bulk import BulkVerbs, empty_read
from s3loader.store.options import StoreOptions
from s3loader.store.parts import MultipartWriter, part_size_for, put_file
from s3loader.store.pipeline import below
from s3loader.types import (
    Buffer,
    ByteRange,
    Capabilities,
    CommonPrefix,
    DeleteFailure,
    NetworkState,
    ObjectMeta,
    PutMode,
    PutResult,
    ReadRequest,
)
from s3loader.units import MIB, parse_size

if TYPE_CHECKING:
    from s3loader.store.aio import AsyncObjectStore

__all__ = ["ObjectStore"]

_DELETE_BATCH: Final = 1000
_PIECE: Final = 16 * MIB
"""Bytes of one request of a large `read_into`."""
_UNBOUNDED: Final = 1 << 62
"""Where the caller holds all bytes in any case."""


@checked
class ObjectStore(BulkVerbs):
    """One object store, or a folder of one. Made by `open_store`.

    Keys are relative to the URL it was opened with. All verbs may be called from several threads,
    in forked and spawned children, and raise the tree of `s3loader.errors` only. `aio` has the
    same verbs as coroutines. Pickles by what it was opened with.

    Args:
        url: Where it is, for messages.
        backend: The outermost backend; its keys are those of this store.
        options: Retries, timeouts in seconds, concurrency, part size in bytes; default: those of `StoreOptions`.
        reopen: Makes the same store again elsewhere, for pickling: a function and its arguments.
        identity: Stores of the same identity can do the same things; None: like no other.
        bound: What it holds that no other process can have; empty: nothing.
    """

    def __init__(
        self,
        url: str,
        backend: Backend,
        *,
        options: StoreOptions | None = None,
        reopen: tuple[Callable[..., ObjectStore], tuple[Any, ...]] | None = None,
        identity: tuple[str, ...] | None = None,
        bound: str = "",
    ) -> None:
        self.url = url
        self.options = options or StoreOptions()
        self._backend = backend
        self._reopen = reopen
        self._identity = identity
        self._bound = bound
        self._closed = False
        self._capabilities: Capabilities | None = None
        self._conditional: bool | None = None
        self._aio: AsyncObjectStore | None = None

    @property
    def engine(self) -> str:
        """Which engine does the work: ``direct obstore boto3 file memory``."""
        return self._backend.engine

    @property
    def backend(self) -> Backend:
        """The outermost backend, wrappers included.

        Raises:
            ClosedError: the store was closed.
        """
        self._check_open()
        return self._backend

    # reading

    def get(self, key: str, *, if_match: str | None = None, version_id: str | None = None) -> bytes:
        """The whole object.

        Args:
            if_match: Fail with `ObjectChangedError` unless the object's ETag is this one.
            version_id: A version other than the newest.
        """
        _, data = self.backend.get(checked_key(key), if_match=if_match, version_id=version_id)
        return data if isinstance(data, bytes) else bytes(data)

    def get_range(self, key: str, start: int, end: int | None = None, *, if_match: str | None = None) -> bytes:
        """Bytes ``[start, end)``; fewer where the object ends before `end`.

        Args:
            start: Where negative, that many bytes before the object's end (its beginning, if it has fewer).
            end: None: the object's end. Where negative, that many bytes before it; this looks at the object first, as a
                negative `start` with an `end` does, and reads the very one it saw.

        Raises:
            RangeError: `start` lies beyond the object.
        """
        if start < 0 and end is None:
            with contextlib.suppress(UnsupportedOperationError):  # Azure, and servers that ignore such a range
                _, data = self.backend.get(checked_key(key), start, if_match=if_match)
                return data if isinstance(data, bytes) else bytes(data)
        if start < 0 or (end is not None and end < 0):
            meta = self.backend.head(checked_key(key))
            start = ranges_.first_byte(start, meta.size)
            end = meta.size if end is None else end + meta.size if end < 0 else end
            if end <= start:
                return b""
            if_match = if_match or meta.etag or None
        if end is None:
            _, data = self.backend.get(checked_key(key), start, if_match=if_match)
            return data if isinstance(data, bytes) else bytes(data)
        span = ByteRange(start, end)
        if not len(span):
            empty_read(self.backend, checked_key(key), start, if_match)
            return b""
        _, data = self.backend.get(checked_key(key), start, end, if_match=if_match)
        return data if isinstance(data, bytes) else bytes(data)

    def get_ranges(
        self,
        key: str,
        ranges: Sequence[tuple[int, int]] | Sequence[ByteRange],
        *,
        if_match: str | None = None,
        max_gap: int | str = "256KiB",
        max_size: int | str = "16MiB",
    ) -> list[memoryview]:
        """Several ranges of one object, in the order given, all of the same version of it.

        Neighbours are fetched together, several at a time.

        Args:
            ranges: ``(start, end)`` pairs; each must lie in the object.
            max_gap: Bytes that may be fetched in vain to save a request.
            max_size: Bytes of one request, unless a single range is larger.

        Raises:
            ConfigError: what is given are no ranges.
            RangeError: a range reaches beyond the object.
            ObjectChangedError: the object was replaced between two requests.
        """
        wanted = checked_ranges(ranges)
        spans = ranges_.coalesce(wanted, max_gap=parse_size(max_gap, "max_gap"), max_size=parse_size(max_size, "max_size"))
        checked_key(key)
        found = [memoryview(b"")] * len(wanted)
        if not spans:
            empty_read(self.backend, key, max((start for start, _ in wanted), default=0), if_match)
            return found
        requests = [ReadRequest(key, span.start, span.end, if_match) for span in spans]
        for span, result in zip(spans, self.read_many(requests, max_bytes=_UNBOUNDED), strict=True):
            if_match = if_match or result.etag
            if result.etag != if_match:
                raise ObjectChangedError("it was replaced while it was read", op="get ranges", url=self._at(key))
            for i in span.members:
                start, end = wanted[i]
                if end > result.size:
                    raise RangeError(
                        f"it has {result.size} bytes, asked for [{start}, {end})", op="get ranges", url=self._at(key)
                    )
                found[i] = result.data[start - span.start : end - span.start]
        return found

    def read_into(self, key: str, start: int, buffer: Any, *, if_match: str | None = None) -> ObjectMeta:
        """Fill `buffer` with the bytes from `start`; nothing is allocated. Large ones come in several parts at once.

        Args:
            buffer: Anything writable and contiguous with the buffer protocol (bytearray, memoryview, numpy array).

        Raises:
            ConfigError: the buffer is read-only or not contiguous.
            RangeError: the object has fewer bytes there.
        """
        view = writable(buffer)
        if start < 0:
            raise ConfigError(
                f"a start cannot be negative: {start}", hint="count from the object's first byte; its size is head(key).size"
            )
        if not len(view):
            return empty_read(self.backend, checked_key(key), start, if_match)
        backend = self.backend
        if len(view) < 2 * _PIECE or backend.engine in ("file", "memory"):
            return backend.read_into(checked_key(key), start, view, if_match=if_match)
        meta = backend.head(checked_key(key))
        requests = (
            ReadRequest(key, start + a, into=view[a:b], if_match=if_match or meta.etag or None)
            for a, b in ranges_.split(0, len(view), _PIECE)
        )
        for result in self.read_many(requests, max_bytes=_UNBOUNDED):
            if (result.etag, result.size) != (meta.etag, meta.size):
                raise ObjectChangedError("it was replaced while it was read", op="read", url=self._at(key))
        return meta

    def open(self, key: str, *, version_id: str | None = None) -> io.BufferedReader:
        """A read-only, seekable, buffered binary file over the object, pinned to its ETag of now."""
        from s3loader.store.reader import open_reader

        return open_reader(self, checked_key(key), version_id)

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """Size, ETag and metadata of the object."""
        return self.backend.head(checked_key(key), version_id=version_id)

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        try:
            self.head(key)
        except BucketNotFoundError:
            if self.engine == "file":
                return False
            raise
        except ObjectNotFoundError:
            return False
        return True

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """Entries whose key starts with `prefix`, in order of the UTF-8 bytes of their keys, as they come.

        Args:
            prefix: A string, not a folder: ``"a"`` also finds ``"ab"``.
            delimiter: Where given, keys that have it after the prefix are rolled up into `CommonPrefix`.
            start_after: Leave out keys up to and including this one.
        """
        if not all(isinstance(text, str) for text in (prefix, delimiter, start_after)):
            raise ConfigError("prefix, delimiter and start_after are str", hint='leave them out, or pass ""')
        return self.backend.list(prefix, delimiter=delimiter, start_after=start_after)

    # writing

    def put(
        self,
        key: str,
        data: Any,
        *,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> PutResult:
        """Write one object atomically; large ones go by multipart.

        Args:
            data: Anything with the buffer protocol, a path, or a binary file (read from where it stands).
            mode: ``"overwrite"``, ``"create"`` (only if the key is free), or ``Update(etag)``.
            content_type: Media type of the data.
            metadata: User metadata, ASCII.
            attributes: What else describes it, by the names that ``head(key).attributes`` gives: ``cache_control``,
                ``content_disposition``, ``content_encoding``, ``content_language``, ``expires``, ``storage_class``,
                ``server_side_encryption`` (``"AES256"``, ``"aws:kms"``, ``"aws:kms:dsse"``) and ``ssekms_key_id``.
            tags: Up to 10 tags of the object; `ObjectStore.tags` reads them.

        Raises:
            UnsupportedOperationError: the store cannot keep one of `attributes` or `tags`; or SSE-C is asked for.
            SourceNotFoundError: there is no local file under that path; ConfigError: it cannot be read.
            ObjectExistsError: mode ``"create"`` and the key is taken.
            ObjectChangedError: mode ``Update`` and the object is another one by now, or gone.
            OutcomeUnknownError: a conditional write was sent, its answer lost, and reading back did not tell.
        """
        checked_mode(mode)
        self._check_attributes(content_type, metadata)
        said = checked_attributes(attributes, tags)
        if isinstance(data, (str, os.PathLike)):
            if isinstance(data, str):
                raise ConfigError("data is a str", hint="encode text, or pass pathlib.Path(...) to upload a file")
            with open_source(data) as file:
                return self.put(key, file, mode=mode, content_type=content_type, metadata=metadata, attributes=said)
        if hasattr(data, "read"):
            size = self.options.part_size
            return put_file(
                self.backend,
                checked_key(key),
                data,
                part_size=size,
                mode=mode,
                content_type=content_type,
                metadata=metadata,
                attributes=said,
            )
        view = readable(data)
        limit = getattr(self._backend, "PUT_LIMIT", None) or 2 * self.options.part_size
        if len(view) <= limit:
            body: Buffer = data if isinstance(data, bytes) else view
            if said:
                return self.backend.put(
                    checked_key(key), body, mode=mode, content_type=content_type, metadata=metadata, attributes=said
                )
            return self.backend.put(checked_key(key), body, mode=mode, content_type=content_type, metadata=metadata)
        with self.multipart(key, mode=mode, content_type=content_type, metadata=metadata, attributes=said) as writer:
            writer.write(view, copy=False)
        assert writer.result is not None
        return writer.result

    def multipart(
        self,
        key: str,
        *,
        part_size: int | str | None = None,
        max_in_flight: int = 4,
        max_bytes: int | str | None = None,
        size: int | None = None,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> MultipartWriter:
        """A writer that uploads in parts as data comes and makes the object at `close`.

        Args:
            part_size: Bytes of a part (S3 wants at least 5 MiB); default `StoreOptions.part_size`.
            max_in_flight: Parts uploaded at a time; memory is one part more.
            max_bytes: Bytes uploaded at a time, whatever their number; a single part may exceed it. None: no such bound.
            size: Bytes that will be written, where known: `close` then publishes nothing else, parts are as large as 10,000 of
                them need (a `part_size` that is too small for it is an error at once).
            mode: As for `put`; the condition holds at `close`.
            content_type: As for `put`.
            metadata: As for `put`.
            attributes: As for `put`.
            tags: As for `put`.
        """
        self._check_attributes(content_type, metadata)
        return MultipartWriter(
            self.backend,
            checked_key(key),
            part_size=self._part_size(size) if part_size is None else parse_size(part_size, "part_size"),
            max_in_flight=max_in_flight,
            max_bytes=None if max_bytes is None else parse_size(max_bytes, "max_bytes"),
            size=size,
            mode=checked_mode(mode),
            content_type=content_type,
            metadata=metadata,
            attributes=checked_attributes(attributes, tags),
        )

    def tags(self, key: str, *, version_id: str | None = None) -> dict[str, str]:
        """Tags of the object; one request.

        Raises:
            UnsupportedOperationError: the store has none.
        """
        return dict(self.backend.tags(checked_key(key), version_id=version_id))

    def _part_size(self, size: int | None) -> int:
        return self.options.part_size if size is None else part_size_for(size, self.options.part_size)

    def delete(self, key: str) -> None:
        """Delete the object; one that does not exist is no error."""
        self.backend.delete(checked_key(key))

    def delete_many(self, keys: Iterable[str]) -> builtins.list[DeleteFailure]:
        """Delete all of them; returns those that could not be, each with its error."""
        self._check_open()
        check_several(keys, "key")
        failures: builtins.list[DeleteFailure] = []
        batch: builtins.list[str] = []
        for key in keys:
            try:
                batch.append(checked_key(key))
            except ConfigError as error:
                if not isinstance(key, str) or not key:
                    raise
                failures.append(DeleteFailure(key, error))
            if len(batch) == _DELETE_BATCH:
                failures += self.backend.delete_many(batch)
                batch = []
        return failures + self.backend.delete_many(batch) if batch else failures

    def copy(self, source: str, target: str, *, mode: PutMode = "overwrite") -> PutResult:
        """Copy inside this store, by the server where it can."""
        return self.backend.copy(checked_key(source), checked_key(target), mode=checked_mode(mode))

    # the rest

    def capabilities(self) -> Capabilities:
        """What this store really does, found by trying on throw-away keys; asked once per root, then remembered.

        Raises:
            AccessDeniedError: the credentials may not write and delete there.
            ClosedError: the store was closed.
        """
        self._check_open()
        if self._capabilities is None:
            from s3loader.store import probe

            self._capabilities = probe.capabilities(self.backend, self._identity)
        return self._capabilities

    def conditional_writes(self) -> bool:
        """`Capabilities.conditional_writes` alone: six small requests, once per bucket; raises what `capabilities` does."""
        self._check_open()
        if self._conditional is None:
            from s3loader.store import probe

            known = self._capabilities
            self._conditional = known.conditional_writes if known else probe.conditional_writes(self.backend, self._identity)
        return self._conditional

    @property
    def aio(self) -> AsyncObjectStore:
        """The same verbs as coroutines and async iterators.

        Raises:
            ClosedError: the store was closed.
        """
        self._check_open()
        if self._aio is None:
            from s3loader.store.aio import AsyncObjectStore

            self._aio = AsyncObjectStore(self)
        return self._aio

    def below(self, folder: str) -> ObjectStore:
        """The store of a folder in this one, over the same connections; keys are relative to it. Closing either closes both."""
        again = None if self._reopen is None else (_reopen_below, (self._reopen, folder))
        return ObjectStore(
            f"{self.url}/{folder}",
            below(self.backend, f"{folder}/"),
            options=self.options,
            reopen=again,
            identity=self._identity,
            bound=self._bound,
        )

    def network(self) -> NetworkState | None:
        """What was measured of the store's endpoint in this process, such as how many connections pay; None: nothing is."""
        measured = getattr(self._backend, "network", None)
        return None if measured is None else measured()

    def open_ahead(self, connections: int, *, reads: bool = False) -> None:
        """A hint that so many requests will come at once: connections for them are begun to be opened, where the engine can.

        Args:
            connections: How many.
            reads: They will be large reads, from a distant store: so many may be under way at a time from the first one on,
                where else their number is tried out (`network`), unless the store has said "slow down" before.
        """
        ahead = getattr(self._backend, "open_ahead", None)
        if ahead is not None:
            ahead(connections, reads=reads)

    def close(self) -> None:
        """Let go of connections and threads; closing twice is fine."""
        if not self._closed:
            self._closed = True
            if self._aio is not None:
                self._aio.let_go()
            self._backend.close()

    def __enter__(self) -> ObjectStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._bound:
            raise ConfigError(
                f"this store cannot be pickled: {self._bound}", url=self.url, hint="open it in each process, from settings"
            )
        if self._reopen is None:
            return _rebuild, (self.url, self._backend, self.options)
        return self._reopen

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r}, engine={self.engine!r})"

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the store was closed", url=self.url, hint="open it again with open_store")

    def _check_attributes(self, content_type: str | None, metadata: Mapping[str, str] | None) -> None:
        if content_type is not None or metadata:
            check_attributes(content_type, metadata, headers=self._backend.engine not in ("file", "memory"))

    def _at(self, key: str) -> str:
        return f"{self.url}/{key}"


def _reopen_below(reopen: tuple[Callable[..., ObjectStore], tuple[Any, ...]], folder: str) -> ObjectStore:
    make, arguments = reopen
    return make(*arguments).below(folder)


def _rebuild(url: str, backend: Backend, options: StoreOptions) -> ObjectStore:
    return ObjectStore(url, backend, options=options)
