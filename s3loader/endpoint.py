"""Where the objects of one bucket live: host, port, and the request path of a key."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import quote, urlsplit

from s3loader.config import DEFAULT_REGION, S3Settings
from s3loader.errors import ConfigError

__all__ = ["Endpoint"]

# AWS partitions whose domain is not amazonaws.com, by the start of the region's name
_DOMAINS: Final = (
    ("cn-", "amazonaws.com.cn"),
    ("us-isob-", "sc2s.sgov.gov"),
    ("us-isof-", "csp.hci.ic.gov"),
    ("us-iso-", "c2s.ic.gov"),
    ("eu-isoe-", "cloud.adc-e.uk"),
    ("eusc-", "amazonaws.eu"),
)
_HOSTABLE: Final = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_plain: Final = re.compile(r"[A-Za-z0-9_.~/-]*").fullmatch  # what quoting leaves alone: a tenth of its time
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One bucket at one S3 endpoint."""

    scheme: Literal["http", "https"]
    host: str
    """Name to connect to and to verify; with virtual addressing it begins with the bucket. IPv6
    without brackets."""
    port: int
    base_path: str
    """What precedes bucket and key in every path, quoted: ``""`` or ``"/gateway"``."""
    addressing_style: Literal["path", "virtual"]
    region: str
    bucket: str
    ca_bundle: str | None = None
    """PEM file of the authorities to trust in place of the system's."""

    @classmethod
    def from_settings(cls, settings: S3Settings, bucket: str | None = None) -> Endpoint:
        """The endpoint of `bucket` (by default the settings' own).

        Raises:
            ConfigError: no bucket, an endpoint URL that is none, a CA bundle that is not there.
        """
        name = bucket or settings.bucket
        if not name:
            raise ConfigError("no bucket", hint="give s3://BUCKET/PREFIX or set S3_BUCKET")
        region = settings.region or DEFAULT_REGION
        scheme, host, port, base_path = _split(settings.endpoint_url or f"https://s3.{region}.{_domain(region)}")
        if settings.ca_bundle and not os.path.isfile(settings.ca_bundle):
            raise ConfigError(
                f"the CA bundle {settings.ca_bundle} is not a file ({settings.origins.get('ca_bundle', 'argument')})",
                hint="give the path of a PEM file with the authority's certificate",
            )
        style = settings.addressing_style
        if style not in ("path", "virtual"):
            # a dot in the bucket's name would leave the wildcard of AWS's certificate
            style = "virtual" if settings.on_aws and _HOSTABLE.fullmatch(name) else "path"
        if style == "virtual":
            host = f"{name}.{host}"
        return cls(scheme, host, port, base_path, "virtual" if style == "virtual" else "path", region, name, settings.ca_bundle)

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.scheme == "https"

    @property
    def host_header(self) -> str:
        """Value of the Host header, as it is signed: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def path(self, key: str) -> str:
        """Request path of `key` ("" is the bucket itself), quoted once, as it is sent and signed.

        Raises:
            ConfigError: the key cannot be written as UTF-8.
        """
        try:
            quoted = key if _plain(key) else quote(key, safe="/~")
        except UnicodeEncodeError:
            raise ConfigError(
                f"the key {key!r} is not valid Unicode", hint="it holds half of a surrogate pair: decode it right first"
            ) from None
        if self.addressing_style == "virtual":
            return f"{self.base_path}/{quoted}"
        return f"{self.base_path}/{self.bucket}/{quoted}" if key else f"{self.base_path}/{self.bucket}"

    def url(self, key: str = "") -> str:
        """``http(s)://...`` of `key`."""
        return f"{self.scheme}://{self.host_header}{self.path(key)}"


def _domain(region: str) -> str:
    return next((domain for start, domain in _DOMAINS if region.startswith(start)), "amazonaws.com")


def _split(url: str) -> tuple[Literal["http", "https"], str, int, str]:
    """Scheme, host, port and base path of an endpoint URL. A bad URL is not echoed where it may
    hold a password."""
    hint = "write http(s)://HOST[:PORT]"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigError("endpoint_url is not a URL", hint=hint) from None
    if parts.username is not None or parts.password is not None:
        raise ConfigError("endpoint_url holds a user name or password", hint="give keys as access_key_id and secret_access_key")
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"endpoint_url is not an HTTP URL: {url!r}", hint=hint)
    if parts.query or parts.fragment:
        raise ConfigError(f"endpoint_url has a query or fragment: {url!r}", hint=hint)
    if any(c.isspace() or not c.isprintable() for c in url):
        raise ConfigError("endpoint_url holds white space or control characters", hint=hint)
    scheme: Literal["http", "https"] = "https" if parts.scheme == "https" else "http"
    return scheme, host, port or _PORTS[scheme], quote(parts.path.rstrip("/"), safe="/~%")
