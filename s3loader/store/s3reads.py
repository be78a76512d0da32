"""What the S3 engines share about reads: ETags, empty ranges, keys that must stay literal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from s3loader.errors import ObjectChangedError, RangeError, UnsupportedOperationError
from s3loader.store.s3errors import Where
from s3loader.types import ObjectMeta

if TYPE_CHECKING:
    from s3loader.store.backend import Backend

__all__ = ["bare_etag", "check_etag", "is_plain_key", "read_nothing", "refuse_suffix"]

# a segment that is empty, "." or "..", or a control character
_ODD: Final = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def bare_etag(value: str | None) -> str:
    """An ETag without quotes and without the mark of a weak one (a proxy adds it; the bytes are the same)."""
    return (value or "").removeprefix("W/").strip('"')


def check_etag(told: str | None, if_match: str | None, where: Where) -> None:
    """Raise `ObjectChangedError` unless the ETag of an answer is `if_match`.

    Where a server ignores If-Match (rclone does), its answer still tells. The error has no status,
    so that probing can tell such a server from one that refuses.
    """
    if if_match is not None and bare_etag(told) != bare_etag(if_match):
        raise ObjectChangedError("its ETag is not the one asked for", op=where.op, url=where.url)


def read_nothing(
    backend: Backend, key: str, start: int, if_match: str | None, version_id: str | None, where: Where
) -> ObjectMeta:
    """An empty range at `start`: HTTP has no way to ask for one, so the object is only looked at. So it is where a server has
    nothing for a range from the end (`start` is negative), which is right of an empty object only.

    Raises:
        RangeError: `start` is beyond the object's end.
        ObjectChangedError: its ETag is not `if_match`.
    """
    meta = backend.head(key, version_id=version_id)
    check_etag(meta.etag, if_match, where)
    refuse_suffix(start, meta, where)
    if start > meta.size:
        raise RangeError(f"it has {meta.size} bytes, asked for them from {start} on", op=where.op, url=where.url)
    return meta


def refuse_suffix(start: int, meta: ObjectMeta, where: Where) -> None:
    """Raise where bytes from the end of an object that has some were refused: rclone does so, if it has too few."""
    if start < 0 and meta.size:
        text = "the server gives no bytes from the end of this object"
        raise UnsupportedOperationError(text, op=where.op, url=where.url, hint="ask for them by their offset")


def is_plain_key(key: str) -> bool:
    """Whether path-minded clients (obstore) keep `key` as it is: no empty, ``.`` or ``..`` segment,
    no control character."""
    return _ODD.search(key) is None
