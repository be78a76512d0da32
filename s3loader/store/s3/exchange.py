"""The blocking way to run one job on one connection."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Final

from s3loader.errors import S3LoaderError
from s3loader.store.s3.connection import TICK, Connection, Connections
from s3loader.store.s3.gil import receive_now, send_now
from s3loader.store.s3.head import UnexpectedResponse
from s3loader.store.s3.jobs import Job, Scratch
from s3loader.types import Buffer

__all__ = ["exchange", "is_stale", "perform"]

_SHORT: Final = 64 * 1024
"""Bytes that may be copied with the GIL held."""
_WAIT_ALL: Final = getattr(socket, "MSG_WAITALL", 0)


def exchange(
    connection: Connection,
    job: Job,
    scratch: Scratch,
    admit: Callable[[Job, int], None] | None = None,
    quiet: bool = False,
) -> None:
    """Send the job's request and receive its answer.

    Args:
        job: Becomes done.
        scratch: Memory of this thread.
        admit: Called once, before the body is received, with the bytes by which the object is larger than `job.cost`
            said (negative: smaller); it may wait.
        quiet: Give the GIL away as rarely as can be: once where all goes well.

    Raises:
        UnexpectedResponse, OSError: as they come; the connection is spoilt then.
    """
    connection.block(True)
    connection.expires = time.monotonic() + job.time_limit
    job.begin(scratch)
    quiet = quiet and not connection.tls
    pieces = job.wire()
    left: Sequence[Buffer] = pieces
    if quiet and len(pieces) == 1 and send_now(connection.fd, pieces[0]) == len(pieces[0]):
        left = ()
    while left:
        left = connection.send(left)
    cost = job.cost
    expected = job.least() if quiet else 0
    done = _receive(connection, job, expected)
    connection.used = True
    while not done and job.head is None:
        done = _receive(connection, job, 0)
    if admit is not None and job.cost != cost:
        admit(job, job.cost - cost)
    while not done:
        target = job.target()
        count = receive_now(connection.fd, target) if quiet and len(target) <= _SHORT else -1
        done = job.feed(count) if count > 0 else _receive(connection, job, -1)


def _receive(connection: Connection, job: Job, expected: int) -> bool:
    """Wait for bytes; True: the answer is complete.

    Args:
        job: Gets them.
        expected: Wait until so many bytes are there, -1: all that the job has room for. Where
            fewer come, that costs `TICK` seconds.
    """
    target = job.target()
    flags = 0
    if expected and not connection.tls:
        flags = _WAIT_ALL
        if expected > 0:
            target = target[:expected]
    deadline = 0.0
    while True:
        try:
            count = connection.sock.recv_into(target, 0, flags)
        except (BlockingIOError, ssl.SSLWantReadError):  # the kernel's timeout, `TICK`
            now = time.monotonic()
            deadline = deadline or now + connection.read_timeout - TICK
            if now >= deadline:
                raise TimeoutError(f"nothing came for {connection.read_timeout:g} s") from None
            _on_time(connection)
            continue
        if not count:
            raise ConnectionResetError("the server closed the connection")
        if count >= expected:
            return job.feed(count) or _on_time(connection)
        done = True
        try:
            done = job.feed(count)
        finally:
            if done:
                job.was_short()
        return done or _on_time(connection)


def _on_time(connection: Connection) -> bool:
    """False, as long as the job may take its time."""
    if time.monotonic() > connection.expires:
        raise TimeoutError("the response did not end in time")
    return False


def is_stale(connection: Connection, job: Job, error: BaseException) -> bool:
    """Whether the server may have closed an idle connection just as the request went out, so that
    the request, if it may be sent twice, deserves another connection."""
    return connection.used and job.resendable and job.untouched and isinstance(error, ConnectionError | ssl.SSLEOFError)


def perform(
    job: Job,
    connections: Connections,
    scratch: Scratch,
    *,
    admit: Callable[[Job, int], None] | None = None,
    track: Callable[[Connection | None], None] | None = None,
    quiet: bool = False,
) -> None:
    """Run one job in this thread, on the careful path where need be; `job.done` afterwards.

    Args:
        job: The job.
        connections: Where to take a connection from, and to give it back to.
        scratch: Memory of this thread.
        admit, quiet: Of `exchange`.
        track: Called with the connection in use, and with None after it, so that another thread can shut it.
    """
    if not job.fast:
        job.ask_carefully()
        return
    connection = None
    try:
        connection = connections.take()
        while True:
            if connection is None:
                job.check_credentials()
                connection = connections.open()
            connection.job = job
            if track is not None:
                track(connection)
            try:
                exchange(connection, job, scratch, admit, quiet)
                break
            except OSError as error:
                if not is_stale(connection, job, error):
                    raise
                connection.close()
                connection = None
    except (OSError, UnexpectedResponse) as error:
        if connection is not None:
            connection.close()
        if track is not None:
            track(None)
        job.refuse(error)
        job.ask_carefully()
    except S3LoaderError as error:  # a key that is no Unicode, credentials that cannot be had
        if connection is not None:
            connection.close()
        job.fail(error)
    except BaseException:  # KeyboardInterrupt: half an answer may be under way
        if connection is not None:
            connection.close()
        raise
    else:
        if track is not None:
            track(None)
        connection.job = None
        if job.head is not None and job.head.keep_alive:
            connections.give(connection)
        else:
            connection.close()
        job.ask_carefully()  # unless it is done, as nearly always
