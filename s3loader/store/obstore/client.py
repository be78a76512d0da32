"""An obstore store that is made on first use, and raises our errors."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

from s3loader import events
from s3loader.config import S3Settings
from s3loader.credentials import CredentialsSource
from s3loader.endpoint import Endpoint
from s3loader.errors import ConfigError, UnsupportedOperationError
from s3loader.store.arguments import bare_etag
from s3loader.store.backend import Op
from s3loader.store.client_errors import from_obstore
from s3loader.store.obstore import runtime as obstore_runtime
from s3loader.store.options import StoreOptions
from s3loader.store.s3errors import STALE_KEYS, Condition, Where
from s3loader.store.told import NAMES, Request, first_byte_came
from s3loader.types import Buffer, ObjectMeta

__all__ = ["ObstoreClient", "from_identifier", "meta_of", "open_azure", "open_gcs", "open_s3", "standard_of", "to_identifier"]

T = TypeVar("T")
R = TypeVar("R")

_STATUSES: Final[Mapping[str, Mapping[Op, int]]] = {
    "gs": {"head": 200, "put": 200, "delete": 204, "copy": 200, "list": 200, "complete upload": 200},
    "az": {"head": 200, "put": 201, "delete": 202, "copy": 202, "list": 200, "complete upload": 201},
}
"""What the services answer to what succeeded, as they document it: obstore does not tell."""
# attributes of obstore that are HTTP's own, by the names of `ObjectMeta.attributes`; every other one is user metadata
_STANDARD: Final = {
    "Cache-Control": "cache_control",
    "Content-Disposition": "content_disposition",
    "Content-Encoding": "content_encoding",
    "Content-Language": "content_language",
    "Content-Type": "",
    "Storage-Class": "storage_class",
}


class ObstoreClient:
    """Calls obstore on one bucket.

    Args:
        root: URL of the bucket.
        make: Is asked for the store when it is first needed.
        credentials: Where keys come from, if not from obstore's own places.
        tells: Whether it tells `events` of its requests; else it notes for its thread when the first byte came.
    """

    def __init__(
        self, root: str, make: Callable[[], Any], credentials: CredentialsSource | None = None, *, tells: bool = True
    ) -> None:
        self.root = root
        self._make = make
        self._credentials = credentials
        self._tells = tells
        self._statuses = _STATUSES.get(root.partition(":")[0], {})
        self._store: Any = None
        self._lock = threading.Lock()

    def at(self, key: str) -> str:
        """Full URL of `key`, for errors."""
        return f"{self.root}/{key}" if key else self.root

    def call(
        self,
        verb: Op,
        key: str,
        sync: Callable[[Any, Any], T],
        condition: Condition = None,
        *,
        size: int = 0,
        told: Callable[[T], int | None] = lambda _: 1,
    ) -> T:
        """One obstore call, made by ``sync(obstore, store)``.

        Args:
            verb: What we call it, for errors and events.
            key: Of the object.
            sync: Makes one request.
            condition: What it is conditional on, for errors.
            size: Bytes that go up.
            told: How many objects the answer concerns; None: there was no request to tell of.
        """
        status = self._statuses.get(verb)
        return self._ask(verb, key, sync, lambda result: (result, size), condition, told, None, status)

    def read(
        self,
        verb: Op,
        key: str,
        sync: Callable[[Any, Any], Any],
        take: Callable[[Any], Buffer],
        offset: int | None,
        *,
        part: bool,
    ) -> tuple[Any, Buffer]:
        """The answer of ``sync(obstore, store)``, and the body that `take` reads of it.

        Args:
            verb, key, sync: As of `call`; `sync` returns when the head of the answer is there.
            take: Reads the body.
            offset: The first byte asked for; None: from the end.
            part: Whether a range was asked for.
        """

        def taken(answer: Any) -> tuple[tuple[Any, Buffer], int]:
            data = take(answer)
            return (answer, data), len(data)

        return self._ask(verb, key, sync, taken, "read", lambda _: 1, offset, 206 if part else 200)

    def _ask(
        self,
        verb: Op,
        key: str,
        sync: Callable[[Any, Any], T],
        take: Callable[[T], tuple[R, int]],
        condition: Condition,
        told: Callable[[R], int | None],
        offset: int | None,
        status: int | None,
    ) -> R:
        where = Where(verb, self.at(key), condition)
        request = Request(NAMES[verb], where.url, "obstore", offset) if events.active() else None

        def run() -> tuple[R, int]:
            store = self._ready()
            if request is not None:
                request.start = events.now()
            found = sync(*store)
            if request is not None:
                request.answered(status)
            return take(found)

        try:
            if self._credentials is not None:
                self._credentials()  # obstore would swallow what this raises
            result, size = obstore_runtime.call(run)
        except Exception as error:  # noqa: BLE001 - obstore's errors, ValueError and FileNotFoundError share no base
            mapped = from_obstore(error, where)
            if mapped.code in STALE_KEYS and self._credentials is not None:
                mapped.retryable = not self._credentials.static
                if mapped.retryable:
                    self._store = None
                    self._credentials.refresh()
            if request is not None and self._tells:
                if mapped.status is not None and request.status is None:
                    request.answered(mapped.status)
                request.end(error=mapped)
            raise mapped from (None if mapped.status is not None or mapped is error else error)
        if request is not None and not self._tells:
            first_byte_came(request.first_byte, request.status)
        elif request is not None and (objects := told(result)) is not None:
            request.end(size, None, objects)
        return result

    def _ready(self) -> tuple[Any, Any]:
        import obstore

        if self._store is None:
            with self._lock:
                if self._store is None:
                    self._store = self._make()
        return obstore, self._store

    def close(self) -> None:
        """Let the store go; obstore closes its connections with it."""
        self._store = None


def open_s3(endpoint: Endpoint, credentials: CredentialsSource, options: StoreOptions) -> Any:
    """An obstore S3 store.

    Everything is given: what is not, obstore takes from ``AWS_*`` variables, and a session token or
    an endpoint found there would be mixed with the keys we were given.
    """
    from obstore.store import S3Store

    base = f"{endpoint.scheme}://{endpoint.host_header}{endpoint.base_path}"

    def provide() -> Any:
        found = credentials()
        if found is None:
            raise ConfigError(
                "unsigned requests have no credentials", hint="leave unsigned out of StoreOptions for signed requests"
            )
        expiry = None if found.expiry is None else datetime.fromtimestamp(found.expiry, UTC)
        return {
            "access_key_id": found.access_key_id,
            "secret_access_key": found.secret_access_key,
            "token": found.session_token,
            "expires_at": expiry,
        }

    config: dict[str, Any] = {
        "endpoint": base,
        "aws_endpoint_url_s3": base,
        "region": endpoint.region,
        "virtual_hosted_style_request": endpoint.addressing_style == "virtual",
        "unsigned_payload": True,
        "checksum_algorithm": "CRC64NVME",
        "disable_bulk_delete": True,
        "skip_signature": credentials.unsigned,
        "request_payer": options.requester_pays,
    }
    return S3Store(
        endpoint.bucket,
        credential_provider=None if credentials.unsigned else provide,
        client_options=_client_options(options, http=not endpoint.tls, ca_bundle=endpoint.ca_bundle),
        retry_config=_NO_RETRIES,
        **config,
    )


def open_gcs(bucket: str, settings: S3Settings, options: StoreOptions) -> Any:
    """An obstore GCS store; credentials by Google's own variables and files."""
    from obstore.store import GCSStore

    url = _own_endpoint(settings)
    config: dict[str, Any] = {"skip_signature": True} if options.unsigned else {}
    if url is not None and options.unsigned:
        # an emulator: skip_signature alone still asks for a token before it writes
        key = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        config["service_account_key"] = json.dumps(key)
    elif url is not None:
        config["base_url"] = url
    return GCSStore(bucket, client_options=_other_options(url, settings, options), retry_config=_NO_RETRIES, **config)


def open_azure(container: str, settings: S3Settings, options: StoreOptions) -> Any:
    """An obstore Azure store; account and credentials by Azure's own variables (``AZURE_STORAGE_ACCOUNT_NAME`` ...)."""
    from obstore.store import AzureStore

    url = _own_endpoint(settings)
    config: dict[str, Any] = {"skip_signature": True} if options.unsigned else {}
    if url is not None:
        config["endpoint"] = url
    return AzureStore(container, client_options=_other_options(url, settings, options), retry_config=_NO_RETRIES, **config)


_NO_RETRIES: Final[Any] = {"max_retries": 0, "retry_timeout": timedelta(minutes=3)}


def _own_endpoint(settings: S3Settings) -> str | None:
    """An endpoint given as an argument; one found in the environment is S3's."""
    return settings.endpoint_url if settings.origins.get("endpoint_url") == "argument" else None


def _other_options(url: str | None, settings: S3Settings, options: StoreOptions) -> Any:
    return _client_options(options, http=bool(url and url.startswith("http://")), ca_bundle=settings.ca_bundle)


def _client_options(options: StoreOptions, *, http: bool, ca_bundle: str | None) -> Any:
    found: dict[str, Any] = {
        "allow_http": http,
        "connect_timeout": timedelta(seconds=options.connect_timeout),
        "read_timeout": timedelta(seconds=options.read_timeout),
        # the time of a whole request is not bounded, that of each read is: large objects take long
        "timeout": timedelta(days=1),
    }
    if ca_bundle:
        try:
            with open(ca_bundle, "rb") as file:
                found["root_certificate"] = file.read()
        except OSError as error:
            raise ConfigError(
                f"cannot read the CA bundle {ca_bundle}: {error.strerror}",
                hint="ca_bundle is the path of a PEM file that this process may read",
            ) from None
    return found


def standard_of(attributes: Mapping[str, str] | None, url: str) -> dict[str, str]:
    """What a write says of its object, as obstore names it.

    Raises:
        UnsupportedOperationError: obstore has no word for it.
    """
    names = {ours: theirs for theirs, ours in _STANDARD.items() if ours}
    for name in attributes or {}:
        if name not in names:
            raise UnsupportedOperationError(
                f"{name} cannot be set through obstore",
                op="put",
                url=url,
                hint=f"leave it out; it takes {', '.join(sorted(names))}",
            )
    return {names[name]: value for name, value in (attributes or {}).items()}


def meta_of(key: str, meta: Mapping[str, Any], attributes: Mapping[str, str]) -> ObjectMeta:
    """obstore's metadata in our terms."""
    modified = meta.get("last_modified")
    version = meta.get("version")
    return ObjectMeta(
        key=key,
        size=int(meta["size"]),
        etag=bare_etag(meta.get("e_tag")),
        last_modified=modified.timestamp() if modified is not None else None,
        content_type=attributes.get("Content-Type"),
        version_id=None if version == "null" else version,
        metadata={name.lower(): value for name, value in attributes.items() if name not in _STANDARD},
        attributes={known: attributes[name] for name, known in _STANDARD.items() if known and name in attributes},
    )


_ESCAPE: Final = re.compile(r"_x([0-9a-f]{2})_")


def to_identifier(name: str) -> str:
    """A metadata name as Azure takes it (an identifier): ``a-b`` is ``a_x2d_b``."""
    return re.sub(r"_(?=x[0-9a-f]{2}_)|[^a-z0-9_]|^[0-9]", lambda m: f"_x{ord(m[0]):02x}_", name.lower())


def from_identifier(name: str) -> str:
    """The inverse of `to_identifier`; names that it did not make stay as they are."""
    return _ESCAPE.sub(lambda m: chr(int(m[1], 16)), name)
