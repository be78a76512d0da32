"""What several exchange tests need: stores that count, spoil or refuse."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from typing import Any

from s3loader import ObjectStore, S3ExchangeStore, ShardSizePolicy
from s3loader.store import Backend, ForwardingBackend
from s3loader.types import Buffer, ObjectMeta, PutMode, PutResult


class Watched(ForwardingBackend):
    """Notes reads and writes; lets a test spoil them."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.lock = threading.Lock()
        self.reads: list[tuple[str, int]] = []
        """``(key, bytes)`` of every GET."""
        self.puts: list[str] = []
        self.on_put: Callable[[str, Buffer, PutMode], None] | None = None
        self.on_get: Callable[[str, bytes], bytes] | None = None

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        meta, data = self.inner.get(key, start, end, if_match=if_match, version_id=version_id)
        if self.on_get is not None:
            data = self.on_get(key, bytes(data))
        with self.lock:
            self.reads.append((key, len(data)))
        return meta, data

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        if self.on_put is not None:
            self.on_put(key, data, mode)
        with self.lock:
            self.puts.append(key)
        return self.inner.put(key, data, mode=mode, content_type=content_type, metadata=metadata)

    def bytes_of(self, key: str) -> int:
        return sum(size for name, size in self.reads if name == key)

    def clear(self) -> None:
        self.reads.clear()
        self.puts.clear()


def watched(store: ObjectStore) -> tuple[ObjectStore, Watched]:
    """`store` with a watcher around it; capabilities asked beforehand, so that the probe is not seen."""
    backend = Watched(store.backend)
    seen = ObjectStore(store.url, backend, options=store.options)
    seen.capabilities()
    backend.clear()
    return seen, backend


def files(*keys: str) -> list[Any]:
    """File entries with nothing but a key."""
    return [{"kind": "file", "key": key} for key in keys]


def shard(store: S3ExchangeStore, key: str = "s/a.tar", count: int = 3, **options: Any) -> list[bytes]:
    """A shard with members m0, m1, ... of 1,000 bytes each."""
    data = [bytes([65 + i]) * 1000 for i in range(count)]
    options.setdefault("compression", None)
    store.put_shard_archive(key, [{"source": d, "member_path": f"m{i}", "id": f"i{i}"} for i, d in enumerate(data)], **options)
    return data


def contents(store: S3ExchangeStore, manifest: Any) -> list[bytes]:
    return [body.read() for body, _ in store.iter_objects(manifest)]


# work of child processes


def append_many(store: Any, manifest: str, worker: int, count: int) -> None:
    """`count` appends of one entry each."""
    exchange = S3ExchangeStore(store)
    for i in range(count):
        exchange.write_manifest(manifest, files(f"{worker}/{i}"), mode="append_parts")


def write_shards(store: Any, manifest: str, worker: int, count: int) -> None:
    """`count` members in shards of three, all writers in one folder, appended to one manifest."""
    with S3ExchangeStore(store).open_manifest_writer(manifest, shard_size=ShardSizePolicy(max_entries=3)) as writer:
        for i in range(count):
            writer.add_to_shard(f"{worker}-{i}", f"content {worker} {i}".encode(), id=f"{worker}-{i}")


def run_together(work: Callable[..., None], workers: int, *args: Any) -> None:
    """`work(store, manifest, worker, count)` in so many processes at once; all must succeed."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["exchange_helpers"])
    store, manifest, count = args
    processes = [context.Process(target=work, args=(store, manifest, worker, count)) for worker in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert codes == [0] * workers


def write_until_killed(store: Any, manifest: str, ready: Any) -> None:
    """Writes shards for ever; says when the first are there."""
    exchange = S3ExchangeStore(store)
    writer = exchange.open_manifest_writer(manifest, part_max_entries=1, shard_size=ShardSizePolicy(max_entries=2))
    for i in range(1 << 30):
        writer.add_to_shard(f"{i}", b"x" * 1000)
        if i == 9:
            ready.set()
