"""A pool of buffers that were used before: receiving into them costs no page faults.

Faulting and zeroing fresh memory costs more than copying the bytes. So a block is kept when it is
lent, and lent again once nobody can see it any more. Whether anybody can is asked of the block
itself: a `bytearray` with a living memoryview, or array over one, refuses to change its length.
Nothing has to be given back, and nothing can be given back too early.

Blocks start on 64-byte boundaries. That is not for Python's sake: a large bytearray starts 16 bytes
into a page, and there AMD's processors with fast ``rep movsb`` copy 3-4 times slower, which is how
the kernel hands over what a socket received (measured: 1 MiB in 100 us at 0 or 32 and more bytes
into a page, 290-350 us at 1-31).
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from s3loader.units import MIB

__all__ = ["BufferPool", "aligned_block", "shared_pool"]

_SMALLEST: Final = 4096
_LOOKS: Final = 2
"""Blocks looked at before a new one is made: the longest lent come first, so if these are in use
most others are too."""
_ALIGNMENT: Final = 64


def aligned_block(size: int) -> bytearray:
    """`size` zero bytes that start on a 64-byte boundary.

    CPython takes bytes from the front of a bytearray by moving its start, not its bytes.
    """
    block = bytearray(size + _ALIGNMENT)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    del block[: -address % _ALIGNMENT]
    del block[size:]
    return block


class BufferPool:
    """Lends blocks of memory; at most `max_bytes` are kept for reuse (lent ones included).

    Sizes are rounded up to eighths of a power of two, so at most an eighth of a block lies idle.
    Safe to use from several threads; a forked child starts with an empty pool.

    Args:
        max_bytes: Beyond it blocks are still lent, but freed with their last view.
    """

    def __init__(self, max_bytes: int = 256 * MIB) -> None:
        self.max_bytes = max_bytes
        self._reset()
        _pools.add(self)

    def _reset(self) -> None:
        self._shelves: dict[int, _Shelf] = {}
        self._kept = 0
        self._bounds: list[int] = []
        self._lock = threading.Lock()

    @contextmanager
    def bounded(self, max_bytes: int) -> Iterator[None]:
        """Meanwhile keep no more than `max_bytes`, with those of others who do so added: for readers with a small budget.

        Blocks of sizes that were needed once would else stay until they fill the pool.
        """
        bounds = self._bounds
        with self._lock:
            bounds.append(max_bytes)
            self._make_room(0)
        try:
            yield
        finally:
            with self._lock:
                bounds.remove(max_bytes)

    @property
    def kept_bytes(self) -> int:
        """Memory that the pool holds on to, in bytes."""
        return self._kept

    def lease(self, size: int) -> memoryview:
        """A writable view of at least `size` bytes with any content.

        The block is lent until the last view of it (a slice, an array) is gone. Do not call
        `release()` on a view that something without its own export was made from, such as
        `torch.frombuffer`: that would give the block back under it.
        """
        if size <= _SMALLEST:
            size = _SMALLEST
        else:
            shift = (size - 1).bit_length() - 4
            size = ((size - 1 >> shift) + 1) << shift
        shelf = self._shelves.get(size)
        if shelf is None:
            shelf = self._shelves.setdefault(size, _Shelf())
        used = shelf.used
        for _ in range(_LOOKS):
            try:
                block = used.popleft()  # from here no other thread sees it
            except IndexError:
                break
            if not _is_free(block):
                used.append(block)
                continue
            view = memoryview(block)
            used.append(block)
            if len(used) > 1:
                block = used.popleft()
                if _is_free(block):  # one more than needed now
                    shelf.spare.append(block)
                else:
                    used.appendleft(block)
            return view
        try:
            block = shelf.spare.pop()
        except IndexError:
            return self._grow(size, used)
        used.append(block)
        return memoryview(block)

    def _grow(self, size: int, used: deque[bytearray]) -> memoryview:
        """A new block, kept if it fits; older ones are forgotten (not freed) to make room."""
        view = memoryview(block := aligned_block(size))
        with self._lock:
            if self._make_room(size):
                used.append(block)
                self._kept += size
        return view

    def _make_room(self, size: int) -> bool:
        """Whether a block of `size` can be kept, others having been forgotten for it."""
        most = min(self.max_bytes, sum(self._bounds)) if self._bounds else self.max_bytes
        while self._kept + size > most and self._forget(size):
            pass
        return self._kept + size <= most

    def _forget(self, wanted: int) -> bool:
        """Drop one block, rather a spare one, and of another size than `wanted`. One that is lent lives on with its
        views; were it not dropped, blocks lent for ever would fill the pool."""
        shelves = sorted(self._shelves.items(), key=lambda item: item[0] == wanted)
        for size, blocks in (
            *((size, shelf.spare) for size, shelf in shelves),
            *((size, shelf.used) for size, shelf in shelves),
        ):
            try:
                blocks.popleft()
            except IndexError:
                continue
            self._kept -= size
            return True
        return False

    def clear(self) -> None:
        """Keep nothing; what is lent stays valid."""
        with self._lock:
            self._shelves.clear()
            self._kept = 0


class _Shelf:
    """Blocks of one size."""

    __slots__ = ("spare", "used")

    def __init__(self) -> None:
        self.used: deque[bytearray] = deque()
        """In circulation, the longest lent first."""
        self.spare: deque[bytearray] = deque()
        """Not needed of late. So few blocks circulate, and those stay in the processor's cache."""


def _is_free(block: bytearray) -> bool:
    try:
        block.append(block.pop())  # keeps length and place; refused while a view lives
    except BufferError:
        return False
    return True


_pools: weakref.WeakSet[BufferPool] = weakref.WeakSet()
_shared: BufferPool | None = None


def shared_pool() -> BufferPool:
    """The pool of this process that engines use by default."""
    global _shared
    if _shared is None:
        _shared = BufferPool()
    return _shared


def _forget_after_fork() -> None:
    for pool in list(_pools):
        pool._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
