"""Connecting to a host that has several addresses: spread over all of them, past those that do not answer.

A front end of a large store is one address of many, and a name resolves to others every few seconds.
A dead address, or an IPv6 that leads nowhere, costs a quarter of a second once, not a connect timeout
each time: the next address is tried beside it, and the first that answers wins (RFC 8305, "happy
eyeballs"; the delay is the one recommended there).
"""

from __future__ import annotations

import errno
import itertools
import selectors
import socket
import time
from typing import Any, Final

__all__ = ["Addresses"]

_STAGGER: Final = 0.25
"""Seconds after which the next address is tried beside the ones before."""
_FRESH: Final = 30.0
"""Seconds that what a name resolves to is believed."""
_SHUNNED: Final = 60.0
"""Seconds that an address which did not answer comes last."""
_UNDER_WAY: Final = (0, errno.EINPROGRESS, errno.EWOULDBLOCK)


class Addresses:
    """The addresses of one host. Safe to use from several threads."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._found: list[Any] = []
        self._until = 0.0
        self._turn = itertools.count()
        self._shunned: dict[Any, float] = {}

    def connect(self, timeout: float) -> socket.socket:
        """A connected socket, in blocking mode.

        Args:
            timeout: Seconds for all addresses together.

        Raises:
            OSError: none of them answered in time; the error of the last.
        """
        order = self._order()
        if len(order) == 1:
            return self._try_one(order[0], timeout)
        return self._try_all(order, timeout)

    def _order(self) -> list[Any]:
        """Each connection begins with another address; those that did not answer of late come last."""
        now = time.monotonic()
        found = self._found
        if not found or now > self._until:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            self._found, self._until = found, now + _FRESH
        first = next(self._turn) % len(found)
        rotated = found[first:] + found[:first]
        return sorted(rotated, key=lambda info: self._shunned.get(info[4], 0.0) > now)

    def _shun(self, address: Any) -> None:
        if len(self._shunned) > 256:
            self._shunned.clear()
        self._shunned[address] = time.monotonic() + _SHUNNED

    def _try_one(self, info: Any, timeout: float) -> socket.socket:
        sock = socket.socket(*info[:3])
        try:
            sock.settimeout(timeout)
            sock.connect(info[4])
            sock.setblocking(True)
        except BaseException:
            sock.close()
            self._until = 0.0  # the name may lead elsewhere by now
            raise
        return sock

    def _try_all(self, order: list[Any], timeout: float) -> socket.socket:
        deadline = time.monotonic() + timeout
        waiting: dict[socket.socket, Any] = {}
        error: OSError = TimeoutError("no address answered in time")
        with selectors.DefaultSelector() as selector:
            try:
                start_next = 0.0
                while order or waiting:
                    now = time.monotonic()
                    if now >= deadline:
                        raise TimeoutError(f"none of {self._host}'s addresses answered within {timeout:g} s")
                    if order and (now >= start_next or not waiting):
                        info = order.pop(0)
                        sock = socket.socket(*info[:3])
                        waiting[sock] = info[4]
                        sock.setblocking(False)
                        selector.register(sock, selectors.EVENT_WRITE, sock)
                        code = sock.connect_ex(info[4])
                        if code not in _UNDER_WAY:
                            error = self._failed(selector, waiting, sock, code)
                        else:
                            start_next = now + _STAGGER
                        continue
                    for key, _ in selector.select((min(start_next, deadline) if order else deadline) - now):
                        tried: socket.socket = key.data
                        code = tried.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                        if code:
                            error, start_next = self._failed(selector, waiting, tried, code), 0.0
                            continue
                        del waiting[tried]
                        for address in waiting.values():  # begun before or beside it, and still silent
                            self._shun(address)
                        tried.setblocking(True)
                        return tried
                self._until = 0.0
                raise error
            finally:
                for sock in waiting:
                    sock.close()

    def _failed(
        self, selector: selectors.BaseSelector, waiting: dict[socket.socket, Any], sock: socket.socket, code: int
    ) -> OSError:
        address = waiting.pop(sock)
        self._shun(address)
        selector.unregister(sock)
        sock.close()
        return OSError(code, f"{errno.errorcode.get(code, code)} from {address[0]}")
