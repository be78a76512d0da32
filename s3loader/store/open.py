"""`open_store`: from a URL to a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from s3loader.errors import ConfigError
from s3loader.store.base import Backend
from s3loader.store.local.backend import LocalBackend
from s3loader.store.memory import MemoryBackend
from s3loader.store.objectstore import ObjectStore
from s3loader.store.options import StoreOptions
from s3loader.store.wrappers.limit import LimitBackend
from s3loader.store.wrappers.observed import ObservedBackend
from s3loader.store.wrappers.prefix import PrefixBackend
from s3loader.store.wrappers.retry import RetryBackend
from s3loader.types import ObjectURL

if TYPE_CHECKING:
    from s3loader.config import S3Settings

__all__ = ["Engine", "StoreKeywords", "assemble", "open_store"]

Engine: TypeAlias = Literal["auto", "direct", "obstore", "boto3"]
_ENGINES = ("auto", "direct", "obstore", "boto3")


class StoreKeywords(TypedDict, total=False):
    """The keywords of `open_store`, for functions that hand them on."""

    engine: Engine
    endpoint_url: str | None
    region: str | None
    access_key_id: str | None
    secret_access_key: str | None
    session_token: str | None
    profile: str | None
    ca_bundle: str | None
    addressing_style: str | None
    s3_client: Any
    settings: S3Settings | None
    options: StoreOptions | None


def open_store(
    url: Any,
    *,
    engine: Engine = "auto",
    endpoint_url: str | None = None,
    region: str | None = None,
    access_key_id: str | None = None,
    secret_access_key: str | None = None,
    session_token: str | None = None,
    profile: str | None = None,
    ca_bundle: str | None = None,
    addressing_style: str | None = None,
    s3_client: Any = None,
    settings: S3Settings | None = None,
    options: StoreOptions | None = None,
) -> ObjectStore:
    """Open ``s3://bucket/prefix``, ``file:///folder`` (or a plain path), ``memory://name``, ``gs://`` or ``az://``.

    Nothing is asked of the store yet. What is not given comes from `settings`, else from the
    environment, ``.env`` and the AWS chain (see `s3loader.config.S3Settings`).

    Args:
        url: The root; keys are relative to it.
        engine: ``"auto"`` picks one; a name forces it. Means nothing to ``file://`` and ``memory://``.
        s3_client: A boto3 S3 client of your own, honoured in full; implies ``engine="boto3"``.
        settings: Settings to start from; single arguments beat them.
        options: Retries, timeouts, concurrency: see `StoreOptions`.

    Raises:
        ConfigError: the URL, engine or a setting is unusable.
        CredentialsError: no credentials were found where some are needed.
    """
    if engine not in _ENGINES:
        raise ConfigError(f"unknown engine {engine!r}", hint=f"use one of {', '.join(_ENGINES)}")
    options = StoreOptions() if options is None else options
    if not isinstance(options, StoreOptions):
        raise ConfigError(f"options cannot be {type(options).__name__}", hint="pass StoreOptions(max_attempts=3, ...)")
    target = ObjectURL.parse(url)
    explicit = {
        "endpoint_url": endpoint_url,
        "region": region,
        "aws_access_key_id": access_key_id,
        "aws_secret_access_key": secret_access_key,
        "aws_session_token": session_token,
        "profile": profile,
        "ca_bundle": ca_bundle,
        "addressing_style": addressing_style,
    }
    explicit = {name: value for name, value in explicit.items() if value is not None}
    if target.scheme in ("file", "memory"):
        return _open(target, "auto", None, options, None)
    from s3loader.config import S3Settings

    if settings is None:
        settings = S3Settings.load(**explicit)
    elif explicit:
        settings = settings.replace(**explicit)
    return _open(target, engine, settings, options, s3_client)


def _open(
    target: ObjectURL, engine: Engine, settings: S3Settings | None, options: StoreOptions, s3_client: Any = None
) -> ObjectStore:
    backend: Backend
    if target.scheme == "file":
        backend = LocalBackend(target.key)
    elif target.scheme == "memory":
        backend = MemoryBackend(target.bucket)
    else:
        assert settings is not None
        from s3loader.store.s3 import open_backend

        backend = open_backend(target, settings, engine=engine, s3_client=s3_client, options=options)
    identity = (backend.engine, backend.url, str(settings and settings.endpoint_url), str(settings and settings.region))
    return ObjectStore(
        target.base,
        assemble(backend, target, options),
        options=options,
        reopen=(_open, (target, engine, settings, options)) if s3_client is None else None,
        identity=identity if s3_client is None else None,
        bound="" if s3_client is None else "it uses your own boto3 client",
    )


def assemble(engine: Backend, target: ObjectURL, options: StoreOptions) -> Backend:
    """The wrappers around an engine, in their order: prefix, retry, limit, events.

    Each attempt is limited and seen by itself; what retries and events see is the full key.
    """
    backend: Backend = engine if getattr(engine, "emits_events", False) else ObservedBackend(engine)
    if options.max_requests_per_second is not None:
        backend = LimitBackend(backend, options.max_requests_per_second)
    backend = RetryBackend(backend, max_attempts=options.max_attempts, budget=options.retry_budget)
    if target.scheme != "file" and target.key:
        backend = PrefixBackend(backend, target.key if target.key.endswith("/") else target.key + "/")
    return backend
