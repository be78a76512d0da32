"""What the suite runs in another process: importable there, and free of pytest."""

from __future__ import annotations

import asyncio
import hashlib
import traceback
from typing import Any

from s3loader.store import ObjectStore
from s3loader.types import Buffer

__all__ = ["sha256", "use"]


def sha256(data: Buffer) -> str:
    """In hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def use(store: ObjectStore, key: str, digest: str, shared: bool, answer: Any) -> None:
    """Use the store as a worker does; send None, or what went wrong, to the queue `answer`.

    `digest` is the SHA-256 of the object `key`: data itself would fill the pipe to a child that dies early.
    """
    try:
        if shared:
            assert sha256(store.get(key)) == digest, "get"
            assert [sha256(r.data) for r in store.get_many([key] * 5)] == [digest] * 5, "get_many"
            assert [sha256(r.data) for r in store.get_many([key] * 5, driver="threads")] == [digest] * 5, "in threads"
        store.put("from the child", b"hello")
        assert store.get_range("from the child", 1, 3) == b"el", "get_range"
        assert "from the child" in [entry.key for entry in store.list()], "list"
        assert asyncio.run(_read(store)) == b"hello", "async"
        store.close()
        answer.put(None)
    except BaseException:  # noqa: BLE001  it reaches the parent as text
        answer.put(traceback.format_exc())


async def _read(store: ObjectStore) -> bytes:
    return bytes(await store.aio.get("from the child"))
