"""Keys: normal form, templates, virtual keys. Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import Any, Final

from s3loader.arguments import checked
from s3loader.errors import ConfigError, MissingPlaceholderError
from s3loader.shard.compression import infer_archive_format

__all__ = ["infer_id_from_key", "is_manifest_key", "is_shard_key", "normalize_key", "resolve_template", "split_virtual_key"]

_SLASHES: Final = re.compile("/+")
_PLACEHOLDER: Final = re.compile(r"\{\{|\}\}|\{(\w+)\}|[{}]")


@checked
def normalize_key(key: str) -> str:
    """`key` with runs of slashes made one, and none at either end."""
    return _SLASHES.sub("/", key).strip("/")


@checked
def resolve_template(template: str, variables: Mapping[str, Any], default_vars: Mapping[str, Any] | None = None) -> str:
    """`template` with each ``{name}`` replaced by the value of that variable, then normalised.

    Only plain names are placeholders: no attributes, no indices, no format specs. ``{{`` and ``}}`` are braces.
    Values are put in as text and are not looked at again.

    Raises:
        MissingPlaceholderError: a name is in neither mapping.
        ConfigError: a brace that belongs to no placeholder, or a value that would leave the folder the template
            puts it in: it has a ``..`` component, or holds ``#`` (which separates archive and member) or a
            control character.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name is None:
            if len(match.group()) == 2:
                return match.group()[0]
            raise ConfigError(
                f"only plain placeholders like {{name}} are allowed in a key template: {template!r}",
                hint="write {{ and }} for braces",
            )
        for source in (variables, default_vars or {}):
            if name in source:
                return _checked_value(name, str(source[name]))
        raise MissingPlaceholderError(name, template)

    return normalize_key(_PLACEHOLDER.sub(value, template))


def _checked_value(name: str, text: str) -> str:
    if "#" in text or ".." in text.split("/") or any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise ConfigError(
            f"variable {name!r} has a value that cannot be part of a key: {text!r}",
            hint="leave out .. and # and control characters",
        )
    return text


@checked
def infer_id_from_key(key: str) -> str:
    """The base name of `key` without its last extension (``a/b.tar.gz`` -> ``b.tar``, ``.hidden`` -> empty)."""
    base = key.rsplit("/", 1)[-1]
    return base.rsplit(".", 1)[0] if "." in base else base


def split_virtual_key(key: str) -> tuple[str, str] | None:
    """``("archive", "member")`` of ``archive#member`` (the first ``#`` separates), or None for a plain key."""
    archive, mark, member = key.partition("#")
    return (archive, member) if mark and archive and member else None


def virtual_key(archive_key: str, member_path: str) -> str:
    """The key under which a member of an archive is addressed."""
    return f"{archive_key}#{member_path}"


def is_shard_key(key: str) -> bool:
    """Whether the suffix says tar archive."""
    try:
        infer_archive_format(key)
    except ValueError:
        return False
    return True


def is_manifest_key(key: str) -> bool:
    """Whether the suffix says manifest."""
    return key.endswith(".jsonl")


def is_sidecar_key(key: str) -> bool:
    """Whether this is the index beside an archive."""
    for suffix in (".s3loader.idx", ".idx"):
        if key.endswith(suffix):
            return is_shard_key(key[: -len(suffix)])
    return False


def beside(key: str, name: str) -> str:
    """`name` in the folder of `key`."""
    return posixpath.join(posixpath.dirname(key), name)
