"""Every option of stores, manifest writers and checkpoints has an effect."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s3loader import WriterProgress, events
from s3loader.checkpoint import CheckpointManager, CheckpointOptions
from s3loader.errors import CheckpointError, ConfigError, S3LoaderError, StoreTimeoutError
from s3loader.exchange import ManifestWriterConfig, S3ExchangeStore, ShardSizePolicy
from s3loader.store import ObjectStore, StoreOptions, open_store
from s3loader.testing import Fault, open_faulty_store

STATE = {"model": {f"w{i}": np.arange(3000, dtype=np.float32) + i for i in range(4)}}


def keys(store: ObjectStore, suffix: str = "") -> list[str]:
    return [meta.key for meta in store.list() if meta.key.endswith(suffix)]


class Together:
    """A hook: how many requests of a kind are under way at once. Each waits until `wanted` are."""

    def __init__(self, wanted: int, op: str) -> None:
        self.wanted, self.op, self.begun, self.inside, self.most = wanted, op, 0, 0, 0
        self.lock, self.full = threading.Lock(), threading.Event()

    def __call__(self, seen: Any, moment: Any) -> None:
        if self.op not in seen.op or seen.key.endswith(("jsonl", "idx")):
            return
        with self.lock:
            self.begun += moment == "before"
            self.inside += 1 if moment == "before" else -1
            self.most = max(self.most, self.inside)
            if self.inside >= self.wanted:
                self.full.set()
        if moment == "before":
            assert self.full.wait(30)


# -- stores ----------------------------------------------------------------------------------------


def tried(**options: Any) -> int:
    store, faults = open_faulty_store("memory://kept", [Fault("unavailable", times=None)], options=StoreOptions(**options))
    with pytest.raises(S3LoaderError):
        store.get("k")
    return len(faults.seen)


def max_attempts(folder: Path) -> None:
    assert [tried(max_attempts=attempts) for attempts in (1, 3)] == [1, 3]


def retry_budget(folder: Path) -> None:
    assert tried(retry_budget=0) == 1


def hedge_reads(folder: Path) -> None:  # what it does: tests/store/test_hedged_reads.py
    for wanted in (True, False):
        keys: dict[str, Any] = {"access_key_id": "a", "secret_access_key": "b", "endpoint_url": "http://127.0.0.1:9"}
        with open_store("s3://bucket", region="us-east-1", options=StoreOptions(hedge_reads=wanted), **keys) as store:
            assert (store.backend.inner._connections.hedges is not None) is wanted  # type: ignore[attr-defined]


HOST_ELSEWHERE = "localhost"


class Answers(BaseHTTPRequestHandler):
    """Notes what it was sent; never answers for the key ``silent``."""

    protocol_version = "HTTP/1.1"
    seen: dict[str, dict[str, str]]
    end: threading.Event

    def do_GET(self) -> None:
        type(self).seen[self.path] = {name.lower(): value for name, value in self.headers.items()}
        if self.path.endswith("silent"):
            self.end.wait(30)
            self.close_connection = True
            return
        if self.path.endswith("elsewhere") and not self.headers["Host"].startswith(HOST_ELSEWHERE):
            self.send_response(307)
            self.send_header("Location", f"http://{HOST_ELSEWHERE}:{self.server.server_port}{self.path}")  # type: ignore[attr-defined]
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        drips = self.path.endswith("drips")
        self.send_response(200)
        self.send_header("Content-Length", "1000" if drips else "1")
        self.send_header("ETag", '"e"')
        self.end_headers()
        self.wfile.write(b"1")
        with contextlib.suppress(OSError):
            while drips and not self.end.wait(0.02):
                self.wfile.write(b"1")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def endpoint() -> Iterator[str]:
    Answers.seen, Answers.end = {}, threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        ENDPOINT.append(f"http://127.0.0.1:{server.server_address[1]}")
        yield ENDPOINT[0]
        Answers.end.set()
        server.shutdown()
        thread.join()
        ENDPOINT.clear()


ENDPOINT: list[str] = []


def sent(key: str, **options: Any) -> dict[str, str]:
    given: dict[str, Any] = {"endpoint_url": ENDPOINT[0], "region": "us-east-1", "options": StoreOptions(**options)}
    with open_store("s3://b", access_key_id="id", secret_access_key="secret", **given) as store:
        store.get(key)
    return Answers.seen[f"/b/{key}"]


def connect_timeout(folder: Path) -> None:
    assert StoreOptions(connect_timeout="250ms").connect_timeout == 0.25
    with pytest.raises(ConfigError):
        StoreOptions(connect_timeout=0)  # that it ends: tests/store/test_error_mapping.py, nobody answers


def read_timeout(folder: Path) -> None:
    with pytest.raises(StoreTimeoutError):
        sent("silent", read_timeout="200ms", max_attempts=1)


def request_timeout(folder: Path) -> None:
    with pytest.raises(StoreTimeoutError):
        sent("drips", request_timeout="200ms", max_attempts=1)


def follow_redirects(folder: Path) -> None:
    with pytest.raises(S3LoaderError):
        sent("elsewhere")
    assert sent("elsewhere", follow_redirects=True)["host"].startswith(HOST_ELSEWHERE)


def max_requests_per_second(folder: Path) -> None:
    waits: list[str] = []
    end = events.subscribe(lambda event: waits.append(event.op))
    store = open_store("memory://kept-rate", options=StoreOptions(max_requests_per_second=20))
    for _ in range(30):
        store.exists("k")
    end()
    assert "WAIT" in waits


def concurrency_of_stores(folder: Path) -> None:
    for most in (2, 5):
        together = Together(most, "get")
        store, _ = open_faulty_store("memory://kept-many", hook=together, options=StoreOptions(concurrency=most))
        store.put("k", b"1")
        list(store.get_many(["k"] * 20, driver="threads"))
        assert together.most == most


def part_size_of_stores(folder: Path) -> None:
    for size, parts in (("100B", 10), ("300B", 4)):
        count = Together(0, "part")
        store, _ = open_faulty_store("memory://kept-parts", hook=count, options=StoreOptions(part_size=size))
        with store.multipart("k") as writer:
            writer.write(bytes(1000))
        assert count.begun == parts


def unsigned(folder: Path) -> None:
    assert "authorization" in sent("signed")
    assert "authorization" not in sent("plain", unsigned=True)


def requester_pays(folder: Path) -> None:
    assert "x-amz-request-payer" not in sent("ours")
    assert sent("theirs", requester_pays=True)["x-amz-request-payer"] == "requester"


# -- manifest writers ------------------------------------------------------------------------------


def written(folder: Path, name: str = "m.jsonl", **options: Any) -> ObjectStore:
    store = open_store(folder)
    with S3ExchangeStore(store).open_manifest_writer(name, **options) as writer:
        for i in range(6):
            if "shard_size" in options:
                writer.add_to_shard(f"{i}.txt", b"12345")
            else:
                writer.put_object(f"{i}.txt", b"12345")
    return store


SHARDED: dict[str, Any] = {"mode": "overwrite", "shard_size": ShardSizePolicy(max_entries=2)}


def mode(folder: Path) -> None:
    for _ in range(2):
        store = written(folder / "a", mode="append_parts")
        written(folder / "o", mode="overwrite")
    assert len(list(S3ExchangeStore(store).iter_manifest_entries("m.jsonl"))) == 12
    assert len(list(S3ExchangeStore(folder / "o").iter_manifest_entries("m.jsonl"))) == 6


def part_max_entries(folder: Path) -> None:
    assert len([key for key in keys(written(folder, part_max_entries=2)) if "part-" in key]) == 3


def part_max_bytes(folder: Path) -> None:
    assert len([key for key in keys(written(folder, part_max_bytes=1)) if "part-" in key]) == 6


def shard_size(folder: Path) -> None:
    assert len(keys(written(folder / "2", **SHARDED), ".tar")) == 3
    assert len(keys(written(folder / "1", mode="overwrite", shard_size=ShardSizePolicy(max_entries=1)), ".tar")) == 6


def shard_prefix(folder: Path) -> None:
    assert all(key.startswith("here/") for key in keys(written(folder, shard_prefix="here", **SHARDED), ".tar"))


def shard_format(folder: Path) -> None:
    assert len(keys(written(folder, shard_format="tar", **SHARDED), ".tar")) == 3
    with pytest.raises((ConfigError, S3LoaderError)):
        written(folder, shard_format="zip", **SHARDED)


def shard_compression(folder: Path) -> None:
    assert len(keys(written(folder, shard_compression="zstd", **SHARDED), ".tar.zst")) == 3


def internal_manifest_path(folder: Path) -> None:
    store = written(folder, internal_manifest_path="__what__.jsonl", **SHARDED)
    body = store.get(keys(store, ".tar")[0])
    assert b"__what__.jsonl" in body
    assert b"__manifest__" not in body
    assert [e["internal_manifest_path"] for e in S3ExchangeStore(store).iter_manifest_entries("m.jsonl")] == [
        "__what__.jsonl"
    ] * 3  # type: ignore[typeddict-item]


def group(folder: Path) -> None:
    for value in (None, "webdataset"):
        store = written(folder / str(value), group=value, **SHARDED)
        body = store.get(keys(store, ".tar")[0])
        assert (b"__manifest__.jsonl" in body) == (value is None)


def publish_on_error(folder: Path) -> None:
    for on in (False, True):
        store = open_store(folder / str(on))
        writer = S3ExchangeStore(store).open_manifest_writer("m.jsonl", mode="overwrite", publish_on_error=on)
        writer.put_object("k", b"1")
        writer.__exit__(KeyError, KeyError(), None)
        assert store.exists("m.jsonl") == on


def publish(folder: Path) -> None:
    written(folder, mode="overwrite", publish="create")
    with pytest.raises(S3LoaderError):
        written(folder, mode="overwrite", publish="create")


def max_in_flight(folder: Path) -> None:
    for most in (1, 3):
        counter = Together(most, "put")
        store, _ = open_faulty_store(folder / str(most), hook=counter)
        with S3ExchangeStore(store).open_manifest_writer("m.jsonl", mode="overwrite", max_in_flight=most) as writer:
            for i in range(9):
                writer.put_object(f"{i}", b"1")
        assert counter.most == most


def progress(folder: Path) -> None:
    told: list[WriterProgress] = []
    written(folder / "s", progress=told.append, **SHARDED)
    written(folder / "o", progress=told.append, part_max_entries=2)
    last = {name.name: max(getattr(one, name.name) for one in told) for name in fields(WriterProgress)}
    assert all(last.values()), last


# -- checkpoints -----------------------------------------------------------------------------------


def saved(folder: Path, state: Any = STATE, step: int = 0, **options: Any) -> ObjectStore:
    with CheckpointManager(folder, options=CheckpointOptions(**options)) as manager:
        manager.save(step, state).result()
    return open_store(folder)


def data_files(store: ObjectStore) -> list[str]:
    return keys(store, ".safetensors")


def staging_budget(folder: Path) -> None:
    with CheckpointManager(folder, options=CheckpointOptions(staging_budget="8KiB", part_size="4KiB")) as manager:
        result = manager.save(0, STATE).result()
        assert result.written >= 48_000
        assert manager.restore()["model"]["w3"][5] == 8
    with pytest.raises(ConfigError):
        CheckpointOptions(staging_budget=-1)


def part_size(folder: Path) -> None:
    assert CheckpointOptions(part_size="17MiB").part_size == 32 << 20
    assert CheckpointOptions(part_size="4KiB").block == 4096


def file_size(folder: Path) -> None:
    small = data_files(saved(folder / "small", part_size="4KiB", file_size="13KiB"))
    large = data_files(saved(folder / "large", part_size="4KiB"))
    assert len(small) > len(large) == 1


def concurrency(folder: Path) -> None:
    for most in (1, 3):
        counter = Together(most, "part")
        store, _ = open_faulty_store(folder / str(most), hook=counter)
        with CheckpointManager(store, options=CheckpointOptions(concurrency=most, part_size="4KiB")) as manager:
            manager.save(0, STATE).result()
        assert counter.most == most


def overlap(folder: Path) -> None:
    gate = threading.Event()
    store, _ = open_faulty_store(folder, hook=lambda seen, moment: gate.wait(30) if "safetensors" in seen.key else None)
    with CheckpointManager(store, options=CheckpointOptions(overlap="refuse")) as manager:
        manager.save(0, STATE)
        with pytest.raises(CheckpointError, match="still being saved"):
            manager.save(1, STATE)
        gate.set()


def incremental(folder: Path) -> None:
    for on in (False, True):
        with CheckpointManager(folder / str(on), options=CheckpointOptions(incremental=on)) as manager:
            manager.save(0, STATE).result()
            again = manager.save(1, STATE).result()
            assert (again.written < again.bytes) == on


def resume_uploads(folder: Path) -> None:
    assert CheckpointOptions(resume_uploads=False).resume_uploads is False  # tests/checkpoint/test_ckpt_resume_upload.py
    with pytest.raises(ConfigError):
        CheckpointOptions(resume_uploads="no")  # type: ignore[arg-type]


def save_apart(folder: Path, on: bool) -> list[S3LoaderError]:
    """Two ranks save a tensor that they do not agree on; what became of it."""
    options = CheckpointOptions(check_replicas=on, deadline=20)
    failures: list[S3LoaderError] = []

    def save(rank: int) -> None:
        try:
            with CheckpointManager(folder, rank=rank, world_size=2, job="j", options=options) as manager:
                manager.save(0, {"w": np.full(2000, float(rank))}).result()
        except S3LoaderError as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def check_replicas(folder: Path) -> None:
    assert not save_apart(folder / "off", False)
    assert save_apart(folder / "on", True)


def deadline(folder: Path) -> None:
    alone = CheckpointManager(folder, rank=0, world_size=2, job="j", options=CheckpointOptions(deadline=0.2))
    with pytest.raises(CheckpointError):
        alone.save(0, STATE).result()
    with contextlib.suppress(CheckpointError):
        alone.close()


def grace(folder: Path) -> None:
    for seconds in ("1d", 0):
        refused = [Fault("unavailable", op="put", key="root.jsonl", times=None)]
        store, _ = open_faulty_store(folder / str(seconds), refused, options=StoreOptions(max_attempts=1))
        with pytest.raises(S3LoaderError), CheckpointManager(store) as manager:
            manager.save(0, STATE).result()
        with CheckpointManager(folder / str(seconds), options=CheckpointOptions(grace=seconds)) as manager:
            assert bool(manager.gc(dry_run=True).keys) == (seconds == 0)


def node_cache(folder: Path) -> None:
    saved(folder / "run")
    with CheckpointManager(folder / "run", options=CheckpointOptions(node_cache=folder / "shared")) as manager:
        manager.restore()
    assert (folder / "shared").is_dir()


def node_cache_size(folder: Path) -> None:
    assert CheckpointOptions(node_cache_size="1MiB").node_cache_size == 1 << 20


def settle(folder: Path) -> None:
    assert CheckpointOptions(settle="2s").settle == 2.0


STORES = (
    max_attempts, retry_budget, hedge_reads, connect_timeout, read_timeout, request_timeout, follow_redirects,
    max_requests_per_second, concurrency_of_stores, part_size_of_stores, unsigned, requester_pays,
)  # fmt: skip
WRITERS = (
    mode, part_max_entries, part_max_bytes, shard_size, shard_prefix, shard_format, shard_compression, internal_manifest_path,
    group, publish_on_error, publish, max_in_flight, progress,
)  # fmt: skip
CHECKPOINTS = (
    staging_budget, part_size, file_size, concurrency, overlap, incremental, resume_uploads, check_replicas, deadline, grace,
    node_cache, node_cache_size, settle,
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "effects"), [(StoreOptions, STORES), (ManifestWriterConfig, WRITERS), (CheckpointOptions, CHECKPOINTS)]
)
def test_the_tables_hold_every_option(options: Any, effects: tuple[Callable[[Path], None], ...]) -> None:
    names = {effect.__name__.removesuffix("_of_stores") for effect in effects}
    assert names == {field.name for field in fields(options)}


@pytest.mark.parametrize("effect", [*STORES, *WRITERS, *CHECKPOINTS], ids=lambda effect: effect.__name__)
def test_every_option_has_an_effect(effect: Callable[[Path], None], tmp_path: Path) -> None:
    effect(tmp_path)
