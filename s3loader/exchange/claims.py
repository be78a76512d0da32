"""Names of new shards, claimed so that no two writers ever get the same.

``shard-000001.tar`` while it is free, else the next free number. The claim is a create-only put of the
index side-car: it exists before the archive does, and is replaced by the real index at the end. An archive
without a side-car (as s3exchange writes them) counts as taken.
"""

from __future__ import annotations

import re
import uuid

from s3loader.errors import ConflictError, ObjectExistsError, ObjectNotFoundError, OutcomeUnknownError
from s3loader.exchange.commit import can_compare_and_swap
from s3loader.shard.index import claim_bytes, index_key
from s3loader.shard.upload import INDEX_TYPE
from s3loader.store.objectstore import ObjectStore
from s3loader.types import PutMode

__all__ = ["ShardNames"]


class ShardNames:
    """Hands out archive keys ``<prefix>/shard-<number><suffix>``.

    Args:
        store: The store.
        prefix: Folder of the shards, without a trailing slash; may be empty.
        suffix: ``.tar``, ``.tar.gz``, ...
    """

    def __init__(self, store: ObjectStore, prefix: str, suffix: str) -> None:
        self._store = store
        self._stem = f"{prefix}/shard-" if prefix else "shard-"
        self._suffix = suffix
        self._number = 0
        self._owner = uuid.uuid4().hex
        self._taken: set[int] | None = None

    def claim(self) -> str:
        """The next free key, now ours."""
        while True:
            self._number += 1
            if self._taken is not None and self._number in self._taken:
                continue
            key = f"{self._stem}{self._number:06d}{self._suffix}"
            if self._try(key):
                return key
            if self._taken is None:  # once: skip all that are known to be taken without asking one by one
                self._taken = self._list()

    def release(self, key: str) -> None:
        """Give a claimed name back, of which no archive was made."""
        self._store.delete(index_key(key))

    def _try(self, key: str) -> bool:
        conditional = can_compare_and_swap(self._store)
        if self._store.exists(key) or (not conditional and self._store.exists(index_key(key))):
            return False
        claim = claim_bytes(f"{self._owner}-{self._number}")
        try:
            mode: PutMode = "create" if conditional else "overwrite"
            self._store.put(index_key(key), claim, mode=mode, content_type=INDEX_TYPE)
        except (ObjectExistsError, ConflictError):  # taken, or being taken
            return False
        except OutcomeUnknownError:
            return self._is_ours(key, claim)
        if not conditional and not self._is_ours(key, claim):
            raise ConflictError(
                "another writer took the same shard name, and the store has no conditional writes",
                op="claim",
                url=f"{self._store.url}/{key}",
                retryable=False,
                hint="give each writer its own shard_prefix on this store",
            )
        return True

    def _is_ours(self, key: str, claim: bytes) -> bool:
        try:
            return self._store.get(index_key(key)) == claim
        except ObjectNotFoundError:
            return False

    def _list(self) -> set[int]:
        numbered = re.compile(rf"(\d{{6,}}){re.escape(self._suffix)}(\.idx)?")
        found = (numbered.fullmatch(entry.key[len(self._stem) :]) for entry in self._store.list(self._stem))
        return {int(match[1]) for match in found if match is not None}
