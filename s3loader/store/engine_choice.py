"""Which engine serves a store, and why. Engines that are rarely asked for are imported when they are."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Final
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from s3loader.config import S3Settings
from s3loader.credentials import CredentialsSource
from s3loader.endpoint import Endpoint
from s3loader.errors import ConfigError
from s3loader.store.backend import Backend
from s3loader.store.obstore import runtime as obstore_runtime  # now: it notes a fork of a process that has obstore
from s3loader.store.options import StoreOptions
from s3loader.store.pipeline import innermost
from s3loader.store.s3 import S3Backend
from s3loader.types import ObjectURL

__all__ = ["explain_engine", "open_backend"]

_ENGINES: Final = ("auto", "direct", "obstore", "boto3")
_OTHERS: Final = {"gs": "GCS", "az": "Azure"}
_why: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def open_backend(
    url: ObjectURL,
    settings: S3Settings,
    *,
    engine: str = "auto",
    s3_client: Any = None,
    options: StoreOptions | None = None,
) -> Backend:
    """The engine for the bucket of `url` (its key is not looked at), as a backend. Asks nothing of the store.

    Args:
        url: ``s3://``, ``gs://`` or ``az://``.
        settings: Endpoint, keys, CA bundle.
        engine: ``"auto"``, or the one to force.
        s3_client: A boto3 client of the user's; then boto3 it is.
        options: Timeouts, signing.

    Raises:
        ConfigError: the engine cannot serve this store, or a setting is unusable.
    """
    options = options or StoreOptions()
    if engine not in _ENGINES:
        raise ConfigError(f"unknown engine {engine!r}", hint=f"use one of {', '.join(_ENGINES)}")
    if options.requester_pays and (url.scheme in _OTHERS or s3_client is not None):
        what = _OTHERS.get(url.scheme, "a client of your own")
        raise ConfigError(f"requester_pays means nothing to {what}", hint="leave it out, and tell the service in its own way")
    if s3_client is not None and not hasattr(s3_client, "get_object"):
        raise ConfigError(f"s3_client cannot be {type(s3_client).__name__}", hint='pass boto3.client("s3", ...)')
    if url.scheme in _OTHERS:
        return _remember(_open_other(url, settings, engine, s3_client, options), "obstore is the one engine for it")
    chosen, why = _choose(url, settings, engine, s3_client)
    if s3_client is not None:
        from s3loader.store.boto3.engine import Boto3Backend

        return _remember(Boto3Backend(url.bucket, settings, options=options, s3_client=s3_client), why)
    endpoint = Endpoint.from_settings(settings, url.bucket)
    credentials = CredentialsSource(settings, unsigned=options.unsigned)
    if chosen == "boto3":
        from s3loader.store.boto3.engine import Boto3Backend

        return _remember(Boto3Backend(url.bucket, settings, credentials=credentials, options=options), why)
    reader = None
    if endpoint.tls and importlib.util.find_spec("obstore") is not None:
        from s3loader.store.obstore.engine import ObstoreS3Reader

        reader = ObstoreS3Reader(endpoint, credentials, options)
    return _remember(S3Backend(endpoint, credentials, options, proxy=_proxy(endpoint), tls_reader=reader), why)


def _choose(url: ObjectURL, settings: S3Settings, engine: str, s3_client: Any) -> tuple[str, str]:
    """The engine for S3, and the reason."""
    special = url.bucket.endswith("--x-s3") or url.bucket.startswith("arn:")
    if s3_client is not None:
        if engine not in ("auto", "boto3"):
            raise ConfigError(f"engine={engine!r} cannot use the given s3_client", hint='leave engine out, or say "boto3"')
        return "boto3", "an s3_client was given, and is honoured in full"
    if engine == "obstore":
        raise ConfigError('engine="obstore" serves gs:// and az://, not s3://', hint="leave engine out")
    if engine != "auto":
        if special and engine != "boto3":
            raise ConfigError(f"engine={engine!r} cannot serve the bucket {url.bucket}", hint='use engine="boto3"')
        return engine, "it was asked for"
    if special:
        return "boto3", "directory buckets and access points need boto3's own signing"
    return "direct", "our own client does all of S3, and is the fastest"


def _proxy(endpoint: Endpoint) -> str | None:
    """URL of the proxy between us and the endpoint, as botocore finds it in the environment."""
    if not any(name.lower() in (f"{endpoint.scheme}_proxy", "all_proxy") for name in os.environ):
        return None
    from botocore.utils import get_environ_proxies

    found: str | None = get_environ_proxies(endpoint.url()).get(endpoint.scheme)
    return found if found is None or "://" in found else f"http://{found}"


def _open_other(url: ObjectURL, settings: S3Settings, engine: str, s3_client: Any, options: StoreOptions) -> Backend:
    from s3loader.store.obstore.client import ObstoreClient, open_azure, open_gcs
    from s3loader.store.obstore.engine import ObstoreBackend

    name, make = _OTHERS[url.scheme], {"gs": open_gcs, "az": open_azure}[url.scheme]
    if engine not in ("auto", "obstore"):
        raise ConfigError(f"engine={engine!r} cannot serve {name}", hint="leave engine out")
    if s3_client is not None:
        raise ConfigError(f"an s3_client cannot serve {name}", hint="give an s3:// URL")
    client = ObstoreClient(f"{url.scheme}://{url.bucket}", lambda: make(url.bucket, settings, options))
    return ObstoreBackend(url.scheme, url.bucket, client)


def _remember(backend: Backend, why: str) -> Backend:
    _why[backend] = why
    return backend


def explain_engine(backend: Backend) -> str:
    """Which engine serves `backend` in this process, and why. For people to read."""
    engine = innermost(backend)
    lines = [f"engine {engine.engine}: {_why.get(engine, 'it was made directly')}"]
    if engine.url.partition("://")[0] in _OTHERS and not obstore_runtime.usable():
        lines.append(obstore_runtime.FORKED)
    if isinstance(engine, S3Backend) and engine.proxy is not None:
        lines.append(f"through the proxy {urlsplit(engine.proxy).hostname}")
    if isinstance(engine, S3Backend) and engine.tls_reader is not None and engine.tls_reader.usable():
        lines.append('bulk reads with driver="threads" over TLS use obstore\'s sockets')
    return "\n".join(lines)
