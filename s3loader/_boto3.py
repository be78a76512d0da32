"""boto3 sessions, clients and configuration files. Imports botocore: import this lazily."""

from __future__ import annotations

import os
from typing import Any, Final

import botocore.exceptions
import botocore.loaders
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config

from s3loader.errors import ConfigError

__all__ = ["create_client", "create_session", "read_config"]


def read_config(profile: str | None) -> dict[str, str]:
    """The settings for S3 in the AWS configuration files.

    Raises:
        ConfigError: the profile does not exist, or a file cannot be parsed.
    """
    try:
        session = botocore.session.Session(profile=profile)
        scoped = session.get_scoped_config()
        services = session.full_config.get("services", {}).get(scoped.get("services", ""), {})
    except botocore.exceptions.ProfileNotFound:
        raise ConfigError(
            f"there is no AWS profile {profile!r}", hint="`aws configure list-profiles` names those there are"
        ) from None
    except botocore.exceptions.BotoCoreError as error:
        raise ConfigError(f"the AWS configuration cannot be read: {type(error).__name__}", hint="see ~/.aws/config") from None
    s3 = scoped.get("s3")
    service = services.get("s3", {}) if isinstance(services, dict) else {}
    found = {
        "region": scoped.get("region"),
        "ca_bundle": scoped.get("ca_bundle"),
        "endpoint_url": service.get("endpoint_url") or scoped.get("endpoint_url"),
        "addressing_style": s3.get("addressing_style") if isinstance(s3, dict) else None,
    }
    return {name: value for name, value in found.items() if value}


def create_session(*, profile: str | None, key_id: str | None, secret: str | None, token: str | None) -> Any:
    """A new boto3 session with these keys or, without any, the profile's chain."""
    import boto3

    session = botocore.session.Session(profile=None if key_id else profile)
    session.register_component("data_loader", _loader_of(session, os.path.dirname(boto3.__file__)))
    if key_id:
        session.set_credentials(key_id, secret, token)
    return boto3.Session(botocore_session=session)


class _Loader(botocore.loaders.Loader):  # type: ignore[misc]  # botocore is untyped
    """One for all sessions of the process: parsing the service models anew takes 60 ms for each."""

    @property
    def search_paths(self) -> list[str]:
        return [*self._search_paths]  # a copy: every boto3 session appends to it


_loaders: Final[dict[str, _Loader]] = {}


def _loader_of(session: Any, boto3_folder: str) -> _Loader:
    paths = session.get_config_variable("data_path") or ""
    if paths not in _loaders:
        own = [os.path.expandvars(os.path.expanduser(path)) for path in paths.split(os.pathsep) if path]
        _loaders[paths] = _Loader(extra_search_paths=[*own, os.path.join(boto3_folder, "data")])
    return _loaders[paths]


def create_client(
    session: Any,
    *,
    endpoint_url: str | None,
    region: str | None,
    ca_bundle: str | None,
    addressing_style: str,
    config: Config | None = None,
    anonymous: bool = False,
) -> Any:
    """A new S3 client on a boto3 session.

    Checksums go only where the service requires them: boto3's default trailers are refused by
    many S3-compatible stores, cost 2 CPU-s per GB, and s3loader signs its own CRC32C.

    Raises:
        ConfigError: boto3 refuses a value.
    """
    own = Config(
        signature_version=UNSIGNED if anonymous else "s3v4",
        s3={"addressing_style": addressing_style},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return session.client(
            "s3",
            region_name=region,
            endpoint_url=endpoint_url,
            verify=ca_bundle,
            config=own.merge(config) if config is not None else own,
        )
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise ConfigError(
            f"boto3 makes no client of these settings: {type(error).__name__}: {error}",
            hint="check region, endpoint_url and profile",
        ) from None
