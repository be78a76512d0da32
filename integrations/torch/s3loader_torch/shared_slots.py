"""Shared memory that workers use again: a batch leaves a worker without fresh pages.

A worker writes a batch into a slot (an anonymous memory file), marks it taken and sends its name; the
other side maps the slot once and makes tensors over it. When the last of them is gone, the mark is
cleared and the worker may write there again. Nothing has a name in the file system, so nothing outlives
the processes. Where slots run out or memory files do not exist, torch's own way is taken.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import weakref
from multiprocessing.reduction import DupFd
from typing import Any, Final

import numpy as np
import torch

from s3loader import WorkerError

__all__ = ["SharedRows", "lend_slot", "open_shared"]

_HEAD: Final = mmap.PAGESIZE
"""The first page holds the mark: 1 while the data is in use."""
_SLOTS: Final = 8
_SMALL_SLOTS: Final = 32
_SMALL_BYTES: Final = 32 << 20
"""Up to `_SMALL_SLOTS` are made while all of them take no more than this. Each keeps a descriptor open."""
_ROUND: Final = 1 << 16


class Slot:
    """A piece of shared memory, on the worker's side."""

    def __init__(self, capacity: int) -> None:
        self.token = secrets.token_hex(8)
        self.capacity = capacity
        self.fd = os.memfd_create("s3loader-slot", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _HEAD + capacity)
        self._map = mmap.mmap(self.fd, _HEAD + capacity)
        self.data: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(self._map, dtype=np.uint8)[_HEAD:]
        self.known = False
        """Whether the other side has it mapped."""

    @property
    def taken(self) -> bool:
        return self._map[0] != 0

    def take(self) -> None:
        self._map[0] = 1


_lent: list[Slot] = []
_owner = -1


def lend_slot(size: int) -> Slot | None:
    """A free slot of this process for `size` bytes, marked taken; None where there is none."""
    global _owner
    if not hasattr(os, "memfd_create"):
        return None
    if _owner != os.getpid():  # slots inherited by fork are the parent's
        _lent.clear()
        _owner = os.getpid()
    slot = next((slot for slot in _lent if slot.capacity >= size and not slot.taken), None)
    if slot is None:
        capacity = -(-size // _ROUND) * _ROUND
        small = sum(slot.capacity for slot in _lent) + capacity <= _SMALL_BYTES
        if len(_lent) >= (_SMALL_SLOTS if small else _SLOTS):
            return None
        try:
            slot = Slot(capacity)
        except OSError:  # no memory or descriptors left: torch's way will say so, or manage
            return None
        _lent.append(slot)
    slot.take()
    return slot


class SharedRows:
    """Bytes in a slot on their way: unpickles to a uint8 tensor over them."""

    def __init__(self, slot: Slot, size: int) -> None:
        self._slot = slot
        self._size = size

    def __reduce__(self) -> tuple[Any, ...]:
        slot = self._slot
        descriptor = None if slot.known else DupFd(slot.fd)
        slot.known = True
        return (open_shared, (slot.token, os.getpid(), slot.capacity, descriptor, self._size))


class _Mapping:
    def __init__(self, pid: int, capacity: int, fd: int) -> None:
        self.pid = pid
        try:
            self._map = mmap.mmap(fd, _HEAD + capacity)
        finally:
            os.close(fd)

    def tensor(self, size: int) -> torch.Tensor:
        array = np.frombuffer(self._map, dtype=np.uint8)[_HEAD : _HEAD + size]
        tensor = torch.from_numpy(array)  # its storage keeps `array` alive
        weakref.finalize(array, self._free).atexit = False
        return tensor

    def _free(self) -> None:
        with contextlib.suppress(ValueError):  # the map was closed
            self._map[0] = 0


_known: dict[str, _Mapping] = {}


def open_shared(token: str, pid: int, capacity: int, descriptor: Any, size: int) -> torch.Tensor:
    """The bytes a worker has put into a slot.

    Raises:
        WorkerError: the message that said where the slot is was lost with its worker.
    """
    mapping = _known.get(token)
    if mapping is None:
        if descriptor is None:
            raise WorkerError(f"worker process {pid} died: a batch it had prepared cannot be found")
        for other in [name for name, known in _known.items() if not _alive(known.pid)]:
            del _known[other]  # tensors over it keep the memory
        mapping = _known[token] = _Mapping(pid, capacity, descriptor.detach())
    return mapping.tensor(size)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
