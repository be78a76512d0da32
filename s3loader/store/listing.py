"""Delimiters and start-after over a stream of keys, as S3 defines them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from s3loader.types import CommonPrefix, ObjectMeta

__all__ = ["key_bytes", "roll_up"]


def key_bytes(key: str) -> bytes:
    """The bytes that order `key` in a listing."""
    return key.encode("utf-8", "surrogateescape")


def roll_up(metas: Iterable[ObjectMeta], prefix: str, delimiter: str, start_after: str) -> Iterator[ObjectMeta | CommonPrefix]:
    """Entries of a listing from all objects under `prefix` in key order.

    A key that has the delimiter after the prefix is given once per common prefix instead.
    `start_after` drops keys up to and including it before they are rolled up, so a common
    prefix appears as long as one of its keys is left.
    """
    after = key_bytes(start_after)
    last = ""
    for meta in metas:
        if start_after and key_bytes(meta.key) <= after:
            continue
        at = meta.key.find(delimiter, len(prefix)) if delimiter else -1
        if at < 0:
            yield meta
            continue
        common = meta.key[: at + len(delimiter)]
        if common != last:
            last = common
            yield CommonPrefix(common)
