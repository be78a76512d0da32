"""Short socket calls that keep the GIL.

`socket.send` gives the GIL away even for the microseconds that copying a request takes, and where
the main thread is busy in Python it comes back only after its switch interval, 5 ms. A call that
cannot wait need not pay that. `ctypes.PyDLL` is the documented way to call C with the GIL held.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Final, TypeAlias

__all__ = ["receive_now", "send_now"]

_FLAGS: Final = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)
_Calls: TypeAlias = tuple[Callable[..., int], Callable[..., int]]
_calls: _Calls | None = None


def _load() -> _Calls | None:
    global _calls
    if _calls is None and os.name == "posix" and hasattr(socket, "MSG_DONTWAIT"):
        import ctypes  # 2 ms that only those pay who use background threads

        library = ctypes.PyDLL(None)
        library.send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
        library.recv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        library.send.restype = library.recv.restype = ctypes.c_ssize_t
        address, first_byte = ctypes.addressof, ctypes.c_char.from_buffer
        _calls = (
            lambda descriptor, data: library.send(descriptor, data, len(data), _FLAGS),
            lambda descriptor, view: library.recv(descriptor, address(first_byte(view)), len(view), _FLAGS),
        )
    return _calls


def send_now(descriptor: int, data: bytes) -> int:
    """Bytes sent at once; -1: none, and why, the ordinary call will say."""
    calls = _load()
    return -1 if calls is None else calls[0](descriptor, data)


def receive_now(descriptor: int, target: memoryview) -> int:
    """Bytes received at once into `target` (writable, not empty); -1: none, 0: the other side has closed."""
    calls = _load()
    return -1 if calls is None else calls[1](descriptor, target)
