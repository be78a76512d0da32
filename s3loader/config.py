"""Settings of an S3 store, and where each of them came from.

One value is looked for in this order, and `S3Settings.origins` says where it was found::

    argument  >  environment  >  .env in the working directory  >  AWS chain  >  default

The AWS chain is the ``AWS_*`` variables and, through botocore, ``~/.aws/config`` and the profile.
Key id, secret and session token are one value: they are always taken from the same place, and a
``profile`` given as an argument beats keys found in the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final
from urllib.parse import urlsplit

from s3loader.arguments import local_path, unknown_option
from s3loader.errors import ConfigError, without_passwords

__all__ = ["DEFAULT_REGION", "S3Settings", "Secret", "plain", "read_dotenv"]

DEFAULT_REGION: Final = "us-east-1"

# setting -> variables of ours, then those of AWS, each list in order of precedence
_OURS: Final[Mapping[str, tuple[str, ...]]] = {
    "endpoint_url": ("S3_ENDPOINT_URL",),
    "region": ("S3_REGION",),
    "bucket": ("S3_BUCKET",),
    "addressing_style": ("S3_ADDRESSING_STYLE",),
}
_AWS: Final[Mapping[str, tuple[str, ...]]] = {
    "endpoint_url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "profile": ("AWS_PROFILE", "AWS_DEFAULT_PROFILE"),
    "ca_bundle": ("AWS_CA_BUNDLE", "AWS_CA_BUNDLE_PATH"),
}
_KEYS: Final = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
_KEY_NAMES: Final = (
    ("S3_AWS_ACCESS_KEY_ID", "S3_AWS_SECRET_ACCESS_KEY", "S3_AWS_SESSION_TOKEN"),
    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
_STYLES: Final = ("auto", "path", "virtual")


class Secret(str):
    """A string that shows as ``***`` in `repr`, `str`, `print` and logging.

    It still is the string: it compares, encodes, concatenates and passes to boto3 as such. Only
    an f-string that names it shows it, for botocore's signer works with one.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def __str__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return format(self.reveal(), spec)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Secret, (self.reveal(),))

    def reveal(self) -> str:
        """The plain string."""
        return str.__str__(self)


def plain(value: str | None) -> str | None:
    """`value` without the mask of a `Secret`."""
    return value.reveal() if isinstance(value, Secret) else value


@dataclass(frozen=True)
class S3Settings:
    """How to reach an S3 store. ``S3Settings()`` reads the environment, now.

    Every field may be given as an argument; None looks it up (see the module). Unknown to all:
    `region` is ``us-east-1``, `addressing_style` ``auto``, the rest None.

    Raises:
        ConfigError: a value is empty or malformed, half a key pair was found, or the profile
            does not exist.
    """

    endpoint_url: str | None = None
    """``http(s)://host[:port][/path]``; None is AWS itself."""
    region: str | None = None
    bucket: str | None = None
    aws_access_key_id: str | None = field(default=None, repr=False)
    aws_secret_access_key: Secret | str | None = field(default=None, repr=False)
    aws_session_token: Secret | str | None = field(default=None, repr=False)
    profile: str | None = None
    """Profile of ``~/.aws/config``."""
    ca_bundle: str | None = None
    """PEM file of authorities to trust in place of the system's (by obstore: besides them)."""
    addressing_style: str | None = None
    """``path`` = host/bucket/key, ``virtual`` = bucket.host/key, ``auto`` = virtual on AWS only."""
    origins: Mapping[str, str] = field(init=False, compare=False, repr=False)
    """Where each value came from: ``"argument"``, ``"env S3_REGION"``, ``".env S3_REGION"``,
    ``"AWS config"`` or ``"default"``; values that are None have no entry."""

    def __post_init__(self) -> None:
        explicit = {f.name: getattr(self, f.name) for f in fields(self) if f.init and getattr(self, f.name) is not None}
        values, origins = _resolve(explicit, os.environ, read_dotenv())
        for name, value in values.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "origins", origins)

    @classmethod
    def load(cls, **explicit: Any) -> S3Settings:
        """The settings with `explicit` ones on top; arguments that are None are looked up."""
        unknown = sorted(set(explicit) - {f.name for f in fields(cls) if f.init})
        if unknown:
            raise _unknown(unknown)
        return cls(**explicit)

    def replace(self, **changes: Any) -> S3Settings:
        """A copy with some values changed; reads nothing anew.

        As at the start, keys are one value: new ones take the place of all three old ones, and a
        new profile alone drops them.

        Raises:
            ConfigError: a value is unusable, or half a key pair is given.
        """
        names = [f.name for f in fields(self) if f.init]
        unknown = sorted(set(changes) - set(names))
        if unknown:
            raise _unknown(unknown)
        given = {name: (_checked(name, value), "argument") for name, value in changes.items() if value is not None}
        dropped = set(changes)
        if given.keys() & {*_KEYS, "profile"}:
            dropped |= set(_KEYS)
            _check_pair(given)
        kept = {name: (getattr(self, name), origin) for name, origin in self.origins.items() if name not in dropped}
        found = {**kept, **given}
        new = object.__new__(type(self))
        for name in names:
            object.__setattr__(new, name, found[name][0] if name in found else None)
        object.__setattr__(new, "origins", {name: found[name][1] for name in names if name in found})
        return new

    def __repr__(self) -> str:
        return f"S3Settings({', '.join(f'{name}={shown!r}' for name, shown, _ in self._shown())})"

    def describe(self) -> str:
        """One line per known value with its origin; secrets are masked."""
        rows = list(self._shown())
        width = max((len(name) for name, _, _ in rows), default=0)
        return "\n".join(f"{name:<{width}} = {shown}  ({origin})" for name, shown, origin in rows)

    def _shown(self) -> Iterator[tuple[str, str, str]]:
        for name, origin in self.origins.items():
            value = getattr(self, name)
            if name == "aws_access_key_id":
                value = f"{value[:4]}***"
            yield name, "***" if isinstance(value, Secret) else without_passwords(str(value)), origin

    def create_session(self) -> Any:
        """A new boto3 session with these keys, or with the profile's chain.

        Raises:
            ConfigError: the profile does not exist.
        """
        from s3loader import _boto3  # here and not above: boto3 takes 200 ms to import

        secret, token = (plain(value) for value in (self.aws_secret_access_key, self.aws_session_token))
        return _boto3.create_session(profile=self.profile, key_id=self.aws_access_key_id, secret=secret, token=token)

    def create_client(self, *, session: Any = None, config: Any = None, anonymous: bool = False) -> Any:
        """A new boto3 S3 client of these settings.

        Args:
            session: The boto3 session to make it on, in place of a new one.
            config: A `botocore.config.Config` merged over the settings' own.
            anonymous: Do not sign requests.

        Raises:
            ConfigError: boto3 refuses a value.
        """
        from s3loader import _boto3

        auto = self.addressing_style in (None, "auto")
        return _boto3.create_client(
            session or self.create_session(),
            endpoint_url=self.endpoint_url,
            region=self.region,
            ca_bundle=self.ca_bundle,
            addressing_style=("auto" if self.on_aws else "path") if auto else str(self.addressing_style),
            config=config,
            anonymous=anonymous,
        )

    @property
    def on_aws(self) -> bool:
        """Whether the endpoint is one of AWS's own."""
        if self.endpoint_url is None:
            return True
        host = urlsplit(self.endpoint_url).hostname or ""
        return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _resolve(
    explicit: dict[str, Any], environ: Mapping[str, str], dotenv: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    found: dict[str, tuple[Any, str]] = {name: (_checked(name, value), "argument") for name, value in explicit.items()}
    layers = (("env", environ), (".env", dotenv))
    ignore_aws_url = any(layer.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true" for _, layer in layers)
    for names in (_OURS, _AWS):
        for setting, variables in names.items():
            if setting in found or (names is _AWS and setting == "endpoint_url" and ignore_aws_url):
                continue
            hit = _first(variables, layers)
            if hit is not None:
                found[setting] = (_checked(setting, hit[0], hit[1]), hit[1])
    _resolve_keys(found, layers)
    if not {"region", "endpoint_url", "ca_bundle"} <= found.keys():
        profile = found["profile"][0] if "profile" in found else None
        for setting, value in _aws_config(profile, environ).items():
            if setting not in found and not (setting == "endpoint_url" and ignore_aws_url):
                found[setting] = (_checked(setting, value, "AWS config"), "AWS config")
    found.setdefault("region", (DEFAULT_REGION, "default"))
    found.setdefault("addressing_style", ("auto", "default"))
    order = [f.name for f in fields(S3Settings) if f.name in found]
    return {name: found[name][0] for name in order}, {name: found[name][1] for name in order}


def _first(variables: tuple[str, ...], layers: tuple[tuple[str, Mapping[str, str]], ...]) -> tuple[str, str] | None:
    """The first variable that is set and not empty: its value and its origin."""
    for layer, names in layers:
        for variable in variables:
            if names.get(variable):
                return names[variable], f"{layer} {variable}"
    return None


def _resolve_keys(found: dict[str, tuple[Any, str]], layers: tuple[tuple[str, Mapping[str, str]], ...]) -> None:
    """Key id, secret and token as one value; leaves `found` alone where they are given or a
    profile was asked for."""
    given = [name for name in _KEYS if name in found]
    if not given and not ("profile" in found and found["profile"][1] == "argument"):
        for names in _KEY_NAMES:
            hits = {key: _first((variable,), layers) for key, variable in zip(_KEYS, names, strict=True)}
            if hits[_KEYS[0]] or hits[_KEYS[1]]:
                found.update({key: (_checked(key, hit[0], hit[1]), hit[1]) for key, hit in hits.items() if hit})
                break
    _check_pair(found)


def _check_pair(found: Mapping[str, tuple[Any, str]]) -> None:
    """Raise `ConfigError` where only a part of the keys was found."""
    there = [name for name in _KEYS if name in found]
    for name in _KEYS[:2]:
        if there and name not in found:
            raise ConfigError(
                f"{name} is missing, though {there[0]} is given ({found[there[0]][1]})",
                hint="give key id and secret together, from one place",
            )


def _checked(name: str, value: Any, origin: str = "argument") -> Any:
    """`value` of setting `name`, or `ConfigError`. Never echoes what may hold a secret."""
    if name == "ca_bundle" and isinstance(value, (str, os.PathLike)) and value:
        value = local_path(value, name)
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f"{name} is {'empty' if value == '' else 'not a string'} ({origin})", hint="set it to a text, or take it out"
        )
    if name in _KEYS and (any(c.isspace() for c in value) or not value.isprintable()):
        raise ConfigError(f"{name} holds white space or control characters ({origin})", hint="was it pasted with a line break?")
    if name in ("aws_secret_access_key", "aws_session_token"):
        return Secret(value.reveal() if isinstance(value, Secret) else value)
    if name == "addressing_style" and value not in _STYLES:
        raise ConfigError(f"addressing_style is {value!r} ({origin})", hint=f"use one of {', '.join(_STYLES)}")
    if name == "endpoint_url":
        return value.rstrip("/")
    return value


def _aws_config(profile: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """What ``~/.aws/config`` says for S3, read by botocore's rules; empty where there is none."""
    paths = (
        environ.get("AWS_CONFIG_FILE") or "~/.aws/config",
        environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials",
    )
    if profile is None and not any(os.path.exists(os.path.expanduser(path)) for path in paths):
        return {}
    from s3loader._boto3 import read_config

    return read_config(profile)


_LINE = re.compile(
    r"""^[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_.]*)[ \t]*=[ \t]*   # name =
        (?:'([^']*)'|"((?:[^"\\]|\\.)*)"|([^\n]*))                       # 'raw'  "escapes"  bare
        [ \t]*(?:\#[^\n]*)?$""",
    re.MULTILINE | re.VERBOSE | re.DOTALL,
)
_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t"}


def read_dotenv(path: str = ".env") -> dict[str, str]:
    """Variables of a ``.env`` file; a file that is not there is empty. `os.environ` is untouched.

    ``NAME=value`` with an optional ``export``; values bare (a `` #`` starts a comment), in single
    quotes (raw) or in double quotes (backslash escapes, may span lines). Nothing is interpolated,
    for secrets may hold a ``$``. Lines that are none of this are skipped: other tools read the
    file too.

    Raises:
        ConfigError: the file is there but cannot be read as UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {os.path.abspath(path)}: {type(error).__name__}",
            hint="check its permissions, or take it out of the configuration",
        ) from None
    values: dict[str, str] = {}
    for name, raw, quoted, bare in _LINE.findall(text.replace("\r\n", "\n")):
        if quoted:
            values[name] = re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), quoted, flags=re.DOTALL)
        else:
            values[name] = raw or re.sub(r"(^|\s+)#.*", "", bare).strip()
    return values


def _unknown(names: list[str]) -> ConfigError:
    return unknown_option(names, [f.name for f in fields(S3Settings) if f.init], "S3Settings")
