"""Where the objects of one bucket live: host, port, and the request path of a key."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Final, Literal
from urllib.parse import SplitResult, quote, urlsplit

from s3loader.config import DEFAULT_REGION, S3Settings
from s3loader.errors import ConfigError

__all__ = ["Endpoint"]

# what AWS has allowed so far, and others still do; what else a URL may hold would end up in a path or a host
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_HOSTABLE: Final = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_plain: Final = re.compile(r"[A-Za-z0-9_.~/-]*").fullmatch  # what quoting leaves alone: a tenth of its time
# bucket.s3.eu-west-1.amazonaws.com, s3-fips.dualstack.us-east-1.amazonaws.com, s3.amazonaws.com, ...
_AWS_HOST: Final = re.compile(
    r"(?:^|(?<=\.))(?P<service>s3(?:-fips)?(?:\.dualstack)?)(?P<region>[.-][a-z]{2,5}(?:-[a-z]+)+-\d+)?"
    r"\.(?P<domain>amazonaws\.com(?:\.cn)?|amazonaws\.eu|c2s\.ic\.gov|sc2s\.sgov\.gov|csp\.hci\.ic\.gov|cloud\.adc-e\.uk)$"
)
_REGION: Final = re.compile(r"[a-z0-9-]{1,40}")
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

    @property
    def root(self) -> str:
        """``scheme://host[:port]``."""
        return f"{self.scheme}://{self.host_header}"

    @classmethod
    def from_settings(cls, settings: S3Settings, bucket: str | None = None) -> Endpoint:
        """The endpoint of `bucket` (by default the settings' own).

        Raises:
            ConfigError: no bucket, an endpoint URL that is none, a CA bundle that is not there.
        """
        name = bucket or settings.bucket
        if not name:
            raise ConfigError("no bucket", hint="give s3://BUCKET/PREFIX or set S3_BUCKET")
        if not _BUCKET.fullmatch(name) or ".." in name:
            raise ConfigError(
                f"{name!r} is no name of a bucket",
                hint="3 to 63 lower-case letters, digits, dots and hyphens; is it part of the key?",
            )
        if settings.ca_bundle and not os.path.isfile(settings.ca_bundle):
            raise ConfigError(
                f"the CA bundle {settings.ca_bundle} is not a file ({settings.origins.get('ca_bundle', 'argument')})",
                hint="give the path of a PEM file with the authority's certificate",
            )
        if settings.endpoint_url is None:
            return cls._of_aws(settings, name)
        scheme, host, port, base_path = _split(settings.endpoint_url)
        region = settings.region or DEFAULT_REGION
        style: Literal["path", "virtual"] = "path"
        if settings.addressing_style == "virtual":
            style = "virtual"
        elif settings.addressing_style != "path" and settings.on_aws and _HOSTABLE.fullmatch(name):
            style = "virtual"  # a dot in the bucket's name would leave the wildcard of AWS's certificate
        if style == "virtual":
            host = f"{name}.{host}"
        return cls(scheme, host, port, base_path, style, region, name, settings.ca_bundle)

    @classmethod
    def _of_aws(cls, settings: S3Settings, bucket: str) -> Endpoint:
        """Where botocore would send a request for `bucket`: partitions, FIPS, dual stack, acceleration and addressing are
        its to know. Asks nothing of the network."""
        client = settings.create_client(anonymous=True)
        asked: list[str] = []

        def stop(params: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Any]]:
            asked.append(params["url"])
            return SimpleNamespace(status_code=200), {}

        client.meta.events.register("before-call.s3.GetObject", stop)  # what it returns stands for the response
        client.get_object(Bucket=bucket, Key="k")
        region = client.meta.region_name
        client.close()
        scheme, host, port, path = _split(asked[0].partition("?")[0])
        virtual = not path.startswith(f"/{bucket}/")
        base = path.removesuffix("/k").removesuffix("" if virtual else f"/{bucket}")
        style: Literal["path", "virtual"] = "virtual" if virtual else "path"
        region = DEFAULT_REGION if region in (None, "aws-global") else region
        return cls(scheme, host, port, base, style, region, bucket, settings.ca_bundle)

    @property
    def on_aws(self) -> bool:
        """Whether the host is one of AWS's own."""
        return _AWS_HOST.search(self.host) is not None

    def in_region(self, region: str) -> Endpoint:
        """The same bucket signed for, and on AWS asked of, another region."""
        if not _REGION.fullmatch(region):
            return self
        host = _AWS_HOST.sub(lambda m: f"{m['service']}.{region}.{m['domain']}", self.host)
        return replace(self, region=region, host=host)

    def at(self, location: SplitResult) -> Endpoint | None:
        """The same bucket at the host that a redirect of the same service names; None: it names another service's.

        Only AWS redirects within its service: to a host of S3's own, over the same scheme.
        """
        host = location.hostname or ""
        there = _AWS_HOST.search(host)
        if there is None or not self.on_aws or location.scheme != self.scheme or location.port not in (None, self.port):
            return None
        style: Literal["path", "virtual"] = "virtual" if host.startswith(f"{self.bucket}.") else "path"
        region = (there["region"] or self.region).lstrip(".-")
        return replace(self, host=host, addressing_style=style, region=region, base_path="")

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
