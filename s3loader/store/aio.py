"""The async twin of `ObjectStore`: the same verbs, run by the sync ones in a few threads.

The logic exists once. A future per call is dear, so hot paths use the bulk verbs: their twins hand
over everything that is ready at once.
"""

from __future__ import annotations

import asyncio
import functools
import io
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from s3loader.errors import ClosedError
from s3loader.store.objectstore import ObjectStore
from s3loader.store.parts import MultipartWriter
from s3loader.types import PutResult

__all__ = ["AsyncMultipartWriter", "AsyncObjectReader", "AsyncObjectStore"]

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")

_THREADS: Final = 32
_NAME: Final = "s3loader-aio"
_TAKE_SECONDS: Final = 0.002
_TAKE_ITEMS: Final = 1000


class _Pool:
    """Threads of one store, made when first needed, anew in each process."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.closed = False
        self._pid = 0
        self._executor: ThreadPoolExecutor | None = None

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The value of `call`, made in a thread.

        Raises:
            ClosedError: the store was closed.
        """
        if self.closed:
            raise ClosedError("the store was closed", url=self.url, hint="open it again with open_store")
        if self._executor is None or self._pid != os.getpid():
            self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix=_NAME)
            self._pid = os.getpid()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, functools.partial(call, *args, **kwargs))

    def shut_down(self) -> None:
        """End the threads once they have done what they were given."""
        self.closed = True
        if self._executor is not None and self._pid == os.getpid():
            mine = threading.current_thread().name.startswith(_NAME)  # `close` itself runs in one
            self._executor.shutdown(wait=not mine)
        self._executor = None


class _Twin:
    """What has a sync twin and a pool to run it in."""

    def __init__(self, sync: Any, pool: _Pool) -> None:
        self._sync = sync
        self._pool = pool


def _twin(
    verb: Callable[Concatenate[S, P], T],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """The coroutine of a sync verb, with its arguments and its documentation."""

    async def call(self: _Twin, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._pool.run(verb, self._sync, *args, **kwargs)

    functools.update_wrapper(call, verb)
    return call


def _twins(
    verb: Callable[Concatenate[S, P], Iterator[T]],
) -> Callable[Concatenate[Any, P], AsyncGenerator[T, None]]:
    """The async iterator of a sync verb that iterates. Close it (`contextlib.aclosing`) if you leave it early."""

    async def iterate(self: _Twin, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[T, None]:
        source = _Source(await self._pool.run(verb, self._sync, *args, **kwargs))
        try:
            while True:
                items, end, error = await self._pool.run(source.take)
                for item in items:
                    yield item
                if error is not None:
                    raise error
                if end:
                    return
        finally:
            if self._pool.closed:
                source.close()
            else:
                await self._pool.run(source.close)

    functools.update_wrapper(iterate, verb)
    return iterate


class _Source:
    """A sync iterator that is advanced and closed by one thread at a time."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self._lock = threading.Lock()

    def take(self) -> tuple[list[Any], bool, Exception | None]:
        """What is there soon, at least one item; whether that was the end; what went wrong behind it."""
        taken: list[Any] = []
        with self._lock:
            until = time.perf_counter() + _TAKE_SECONDS
            try:
                for item in self._items:
                    taken.append(item)
                    if len(taken) >= _TAKE_ITEMS or time.perf_counter() > until:
                        return taken, False, None
            except Exception as error:  # noqa: BLE001 - raised to the consumer, behind what came before it
                return taken, True, error
        return taken, True, None

    def close(self) -> None:
        """End the iterator, once `take` is not in it any more."""
        with self._lock:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()


class AsyncMultipartWriter(_Twin):
    """`MultipartWriter` with coroutines. ``async with`` publishes on leaving, and aborts on an exception."""

    _sync: MultipartWriter

    write = _twin(MultipartWriter.write)
    commit = _twin(MultipartWriter.commit)
    flush = _twin(MultipartWriter.flush)
    close = _twin(MultipartWriter.close)
    abort = _twin(MultipartWriter.abort)

    def reserve(self, size: int) -> memoryview:
        """Memory of the part being filled, to be written to directly: at least 1, at most `size` bytes; `commit` follows."""
        return self._sync.reserve(size)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._sync.tell()

    @property
    def result(self) -> PutResult | None:
        """What was made; None before `close`."""
        return self._sync.result

    async def __aenter__(self) -> AsyncMultipartWriter:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.run(self._sync.__exit__, kind, error, trace)


def _writer(
    verb: Callable[Concatenate[ObjectStore, P], MultipartWriter],
) -> Callable[Concatenate[Any, P], AsyncMultipartWriter]:
    """No coroutine: a new writer has sent nothing yet."""

    def make(self: _Twin, /, *args: P.args, **kwargs: P.kwargs) -> AsyncMultipartWriter:
        return AsyncMultipartWriter(verb(self._sync, *args, **kwargs), self._pool)

    functools.update_wrapper(make, verb)
    return make


class AsyncObjectReader(_Twin):
    """A read-only, seekable, buffered binary file over an object, pinned to its ETag of now."""

    _sync: io.BufferedReader

    read = _twin(io.BufferedReader.read)
    readinto = _twin(io.BufferedReader.readinto)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; no request is made."""
        return self._sync.seek(offset, whence)

    def tell(self) -> int:
        """Position in bytes."""
        return self._sync.tell()

    def close(self) -> None:
        """No more reading; no request is made."""
        self._sync.close()

    async def __aenter__(self) -> AsyncObjectReader:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncObjectStore(_Twin):
    """`ObjectStore.aio`: its verbs as coroutines, `list` and the bulk verbs as async iterators.

    May be used from several event loops, one after the other or at once.
    """

    _sync: ObjectStore

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store, _Pool(store.url))

    get = _twin(ObjectStore.get)
    get_range = _twin(ObjectStore.get_range)
    get_ranges = _twin(ObjectStore.get_ranges)
    read_into = _twin(ObjectStore.read_into)
    head = _twin(ObjectStore.head)
    exists = _twin(ObjectStore.exists)
    tags = _twin(ObjectStore.tags)
    put = _twin(ObjectStore.put)
    delete = _twin(ObjectStore.delete)
    delete_many = _twin(ObjectStore.delete_many)
    copy = _twin(ObjectStore.copy)
    capabilities = _twin(ObjectStore.capabilities)
    conditional_writes = _twin(ObjectStore.conditional_writes)
    close = _twin(ObjectStore.close)

    list = _twins(ObjectStore.list)
    read_many = _twins(ObjectStore.read_many)
    get_many = _twins(ObjectStore.get_many)
    put_many = _twins(ObjectStore.put_many)

    multipart = _writer(ObjectStore.multipart)

    async def open(self, key: str, *, version_id: str | None = None) -> AsyncObjectReader:
        """A read-only, seekable, buffered binary file over an object, pinned to its ETag of now."""
        reader = await self._pool.run(self._sync.open, key, version_id=version_id)
        return AsyncObjectReader(reader, self._pool)

    def let_go(self) -> None:
        """End the threads."""
        self._pool.shut_down()

    def __repr__(self) -> str:
        return f"{self._sync!r}.aio"
