"""What the suite runs in another process: importable there, and free of pytest."""

from __future__ import annotations

import asyncio
import traceback
from typing import Any

from s3loader.store import ObjectStore

__all__ = ["use"]


def use(store: ObjectStore, key: str, data: bytes, shared: bool, answer: Any) -> None:
    """Use the store as a worker does; send None, or what went wrong, to the queue `answer`."""
    try:
        if shared:
            assert store.get(key) == data, "get"
            assert [bytes(r.data) for r in store.get_many([key] * 5)] == [data] * 5, "get_many"
            assert [bytes(r.data) for r in store.get_many([key] * 5, driver="threads")] == [data] * 5, "get_many in threads"
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
