"""Deleting many keys, with a report of what failed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from s3loader.errors import BucketNotFoundError, ObjectNotFoundError, StoreError
from s3loader.store.boto3.client import BotoClient
from s3loader.store.s3errors import Where, from_status
from s3loader.types import DeleteFailure

__all__ = ["delete_many"]

_BATCH: Final = 1000
"""The most keys of one DeleteObjects."""
# what an XML 1.0 document cannot hold (or, as a carriage return, keep), so that DeleteObjects cannot name the key
_NOT_XML: Final = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def delete_many(client: BotoClient, keys: Sequence[str], delete: Callable[[str], None]) -> list[DeleteFailure]:
    """Delete `keys` by DeleteObjects, or one by one with `delete` where that cannot be."""
    failures: list[DeleteFailure] = []
    unique = list(dict.fromkeys(keys))
    plain = [key for key in unique if not _NOT_XML.search(key)]
    single = [key for key in unique if _NOT_XML.search(key)]
    for at in range(0, len(plain), _BATCH):
        batch = plain[at : at + _BATCH]
        try:
            failures += _delete_batch(client, batch)
        except StoreError as error:
            if error.status not in (400, 405, 501):
                raise
            single += batch  # a server without it, or one that wants another checksum with it
    for key in single:
        try:
            delete(key)
        except BucketNotFoundError:
            raise
        except StoreError as error:
            failures.append(DeleteFailure(key, error))
    return failures


def _delete_batch(client: BotoClient, keys: Sequence[str]) -> list[DeleteFailure]:
    wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    parameters = {"Delete": wanted}
    answer = client.call("delete", "delete_objects", "", parameters, about=keys[0], objects=lambda _: len(keys))
    failures = []
    for entry in answer.get("Errors") or ():
        key = entry.get("Key", "")
        error = from_status(None, entry.get("Code"), entry.get("Message") or "", Where("delete", client.at(key)))
        if not isinstance(error, ObjectNotFoundError):
            failures.append(DeleteFailure(key, error))
    return failures
