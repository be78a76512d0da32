"""`open_store`: from a URL to a store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypedDict

from s3loader.arguments import checked, local_path
from s3loader.errors import ConfigError
from s3loader.store.backend import Backend
from s3loader.store.local.backend import LocalBackend
from s3loader.store.memory import MemoryBackend
from s3loader.store.objectstore import ObjectStore
from s3loader.store.options import StoreOptions
from s3loader.store.pipeline import Pipeline
from s3loader.store.retry import RateLimit, RetryPolicy
from s3loader.types import Location, ObjectURL

if TYPE_CHECKING:
    from s3loader.config import S3Settings

__all__ = ["Engine", "JobKeywords", "PlaceKeywords", "StoreKeywords", "assemble", "open_store", "settings_of"]

Engine: TypeAlias = Literal["auto", "direct", "obstore", "boto3"]
_SETTINGS: Final = {
    "endpoint_url": "endpoint_url",
    "region": "region",
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "profile": "profile",
    "ca_bundle": "ca_bundle",
    "addressing_style": "addressing_style",
}
"""Fields of `S3Settings`, with the keyword of each."""
_ENGINES = ("auto", "direct", "obstore", "boto3")


class _Whereabouts(TypedDict, total=False):
    endpoint_url: str | None
    region: str | None
    access_key_id: str | None
    secret_access_key: str | None
    session_token: str | None
    profile: str | None
    ca_bundle: str | os.PathLike[str] | None
    addressing_style: str | None
    s3_client: Any
    settings: S3Settings | None


class PlaceKeywords(_Whereabouts, total=False):
    """The keywords of `open_store` but `options`, for what has options of its own."""

    engine: Engine


class JobKeywords(_Whereabouts, total=False):
    """The keywords of `open_store`, and who runs the tasks of a job, which have room in one `engine`."""

    engine: Literal["local", "ray", "auto", "direct", "obstore", "boto3"]
    """``"local"`` (the default): this machine; ``"ray"``: a Ray cluster; else this machine, and the engine of the store."""
    address: str | None
    """Of the cluster; default: ``RAY_ADDRESS``, else one on this machine for the time of the job."""
    options: StoreOptions | None


class StoreKeywords(PlaceKeywords, total=False):
    """The keywords of `open_store`, for functions that hand them on."""

    options: StoreOptions | None


@checked
def open_store(
    url: Location,
    *,
    engine: Engine = "auto",
    endpoint_url: str | None = None,
    region: str | None = None,
    access_key_id: str | None = None,
    secret_access_key: str | None = None,
    session_token: str | None = None,
    profile: str | None = None,
    ca_bundle: str | os.PathLike[str] | None = None,
    addressing_style: str | None = None,
    s3_client: Any = None,
    settings: S3Settings | None = None,
    options: StoreOptions | None = None,
) -> ObjectStore:
    """Open ``s3://bucket/prefix``, ``file:///folder`` (or a plain path), ``memory://name``, ``gs://`` or ``az://``.

    Nothing is asked of the store yet. What is not given comes from `settings`, else from the
    environment, ``.env`` and the AWS chain, in this order.

    Args:
        url: The root; keys are relative to it.
        engine: ``"auto"`` picks one; a name forces it. Means nothing to ``file://`` and ``memory://``.
        s3_client: A boto3 S3 client of your own, honoured in full; implies ``engine="boto3"``.
        settings: Settings to start from; single arguments beat them.
        options: Retries, timeouts, concurrency: a `StoreOptions`.

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
    place: PlaceKeywords = {
        "endpoint_url": endpoint_url,
        "region": region,
        "access_key_id": access_key_id,
        "secret_access_key": secret_access_key,
        "session_token": session_token,
        "profile": profile,
        "ca_bundle": None if ca_bundle is None else local_path(ca_bundle, "ca_bundle"),
        "addressing_style": addressing_style,
        "settings": settings,
    }
    if target.scheme in ("file", "memory"):
        return _open(target, "auto", None, options, None)
    return _open(target, engine, settings_of(place), options, s3_client)


def settings_of(place: PlaceKeywords) -> S3Settings:
    """The settings that these keywords of `open_store` mean; what is not given is looked up now.

    Raises:
        ConfigError: a setting is unusable.
    """
    from s3loader.config import S3Settings

    given: Mapping[str, Any] = place
    explicit = {name: given[keyword] for name, keyword in _SETTINGS.items() if given.get(keyword) is not None}
    settings = place.get("settings")
    if settings is None:
        return S3Settings.load(**explicit)
    return settings.replace(**explicit) if explicit else settings


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
        from s3loader.store.engine_choice import open_backend

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


def assemble(engine: Backend, target: ObjectURL, options: StoreOptions) -> Pipeline:
    """The path of requests to `engine`: what retries and events see is the full key."""
    prefix = ""
    if target.scheme != "file" and target.key:
        prefix = target.key if target.key.endswith("/") else target.key + "/"
    rate = options.max_requests_per_second
    return Pipeline(
        engine,
        prefix=prefix,
        retry=RetryPolicy.of(options.max_attempts, options.retry_budget),
        limit=RateLimit(rate) if rate is not None else None,
    )
