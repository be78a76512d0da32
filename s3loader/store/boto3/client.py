"""A boto3 client that lives per process, and raises our errors."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from s3loader import events
from s3loader.config import S3Settings
from s3loader.credentials import CredentialsSource
from s3loader.errors import S3LoaderError
from s3loader.store.backend import Op
from s3loader.store.boto3.listing import read_pages_ourselves
from s3loader.store.boto3.watch import Watch
from s3loader.store.client_errors import from_botocore
from s3loader.store.options import MOST_THREADS, StoreOptions
from s3loader.store.s3errors import Condition, Where
from s3loader.store.told import NAMES

__all__ = ["BotoClient"]

T = TypeVar("T")

_STALE: Final = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")


class BotoClient:
    """Calls boto3 for one bucket, with every error mapped.

    Our own client is made on first use in each process, without retries of its own (ours are
    around it). A client given by the user is used as it is, with its endpoint, credentials,
    retries and stubs; a forked child only gives it fresh connections, for those it inherits are
    the parent's.
    """

    def __init__(
        self, bucket: str, settings: S3Settings, credentials: CredentialsSource, options: StoreOptions, given: Any = None
    ) -> None:
        self.bucket = bucket
        self.root = f"s3://{bucket}"
        self.given = given
        self._settings = settings
        self._credentials = credentials
        self._options = options
        self._own: Any = None
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def get(self) -> Any:
        """This process's boto3 client."""
        if self._pid != os.getpid():
            # a new lock: the old one may have been held by a thread that does not exist here
            self._own, self._lock, self._pid = None, threading.Lock(), os.getpid()
            if self.given is not None:
                _drop_connections(self.given)
        if self.given is not None:
            return self.given
        if self._own is None:
            with self._lock:
                if self._own is None:
                    self._own = self._make()
        return self._own

    def _make(self) -> Any:
        from botocore.config import Config

        options = self._options
        client = self._settings.create_client(
            session=self._credentials.session(),
            anonymous=self._credentials.unsigned,
            config=Config(
                connect_timeout=options.connect_timeout,
                read_timeout=options.read_timeout,
                retries={"total_max_attempts": 1, "mode": "standard"},
                max_pool_connections=2 * (options.concurrency or MOST_THREADS),
                tcp_keepalive=True,
            ),
        )
        read_pages_ourselves(client)
        if options.requester_pays:
            client.meta.events.register("before-call.s3", _say_who_pays)
        return client

    def call(
        self,
        verb: Op,
        operation: str,
        key: str,
        parameters: Mapping[str, Any],
        condition: Condition = None,
        *,
        about: str | None = None,
        objects: Callable[[dict[str, Any]], int] | None = None,
    ) -> dict[str, Any]:
        """One boto3 operation on the bucket.

        Args:
            verb: What we call it, for errors and events.
            operation: Method of the client.
            key: For errors and events; give it to boto3 as a parameter too.
            parameters: Of the operation, all but the bucket.
            condition: What the request is conditional on, for errors.
            about: The key that its event names; default: `key`.
            objects: How many its answer concerns, for the event; default: one.
        """
        size = len(parameters.get("Body", b""))
        where = Where(verb, self.at(key), condition)
        told = NAMES[verb], self.at(key if about is None else about), None
        return self._ask(operation, parameters, where, told, lambda answer: (answer, size), objects)

    def read(self, verb: Op, key: str, parameters: Mapping[str, Any], offset: int, take: Callable[[dict[str, Any]], T]) -> T:
        """What `take` makes of an answer with a body, which it reads; it returns the bytes last, or that which holds them.

        Args:
            verb, key, parameters: As of `call`.
            offset: The first byte asked for; negative: from the end.
            take: Where it raises, the body is closed.
        """

        def taken(answer: dict[str, Any]) -> tuple[T, int]:
            try:
                result = take(answer)
            except BaseException:
                answer["Body"].close()  # half read: the connection is of no use any more
                raise
            return result, int(answer["ContentLength"])

        where = Where(verb, self.at(key), "read")
        return self._ask("get_object", parameters, where, (NAMES[verb], where.url, offset if offset >= 0 else None), taken)

    def _ask(
        self,
        operation: str,
        parameters: Mapping[str, Any],
        where: Where,
        told: tuple[str, str, int | None],
        take: Callable[[dict[str, Any]], tuple[T, int]],
        objects: Callable[[dict[str, Any]], int] | None = None,
    ) -> T:
        """What `take` makes of the answer; it says how many bytes were moved, too. `told`: name, URL, offset for the event."""
        watch: Watch | None = None
        try:
            client = self.get()
            if events.active():
                watch = Watch(client, where, *told)
            with watch or contextlib.nullcontext():
                answer = getattr(client, operation)(Bucket=self.bucket, **parameters)
            result, size = take(answer)
        except Exception as error:  # noqa: BLE001 - boto3's errors share no base; every one of them is mapped
            mapped = self._mapped(error, where)
            if watch is not None:
                watch.end(error=mapped)
            # a server's answer is told in full by ours; what broke below it is worth its traceback
            raise mapped from (None if mapped.status is not None or mapped is error else error)
        if watch is not None:
            watch.end(size, None, 1 if objects is None else objects(answer), answer)
        return result

    def _mapped(self, error: Exception, where: Where) -> S3LoaderError:
        """The error of ours that `error` is."""
        mapped = from_botocore(error, where)
        if mapped.code in _STALE:
            mapped.retryable = not self._credentials.static and self.given is None
            if mapped.retryable:
                self._own = None
                self._credentials.refresh()
        return mapped

    def at(self, key: str) -> str:
        """Full URL of `key`, for errors."""
        return f"{self.root}/{key}" if key else self.root

    def close(self) -> None:
        """Close our own client's connections."""
        own, self._own = self._own, None
        if own is not None and self._pid == os.getpid():
            own.close()


def _say_who_pays(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["x-amz-request-payer"] = "requester"


def _drop_connections(client: Any) -> None:
    """Give a user's client, in a forked child, a connection pool of its own.

    The pool's locks may be held for ever by threads of the parent, so it is replaced by one made
    of the same values; botocore has no public way to do this.
    """
    from botocore.httpsession import URLLib3Session

    endpoint: Any = getattr(client, "_endpoint", None)
    old: Any = getattr(endpoint, "http_session", None)
    if type(old) is not URLLib3Session:  # a stub's own
        return
    proxies, timeout = old._proxy_config, old._timeout
    endpoint.http_session = URLLib3Session(
        verify=old._verify,
        proxies=proxies._proxies,
        timeout=timeout if isinstance(timeout, (int, float)) else (timeout.connect_timeout, timeout.read_timeout),
        max_pool_connections=old._max_pool_connections,
        socket_options=old._socket_options,
        client_cert=(old._cert_file, old._key_file) if old._key_file else old._cert_file,
        proxies_config=proxies._proxies_settings,
    )
