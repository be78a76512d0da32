"""Many writers of one manifest and one folder: nothing lost, nothing doubled, no shard overwritten."""

from __future__ import annotations

import threading
import uuid
import warnings
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from exchange_helpers import append_many, files, run_together, watched, write_shards, write_until_killed

from s3loader import ObjectStore, S3ExchangeStore, ShardSizePolicy, StoreOptions, open_store
from s3loader.errors import ConflictError, ObjectChangedError, ObjectExistsError, OutcomeUnknownError
from s3loader.exchange import append_entries, commit, iter_manifest, publish_manifest
from s3loader.testing import FaultProxy, Rule, Server, server
from s3loader.types import Update


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server("ministack") as running:
        yield running


def all_keys(store: ObjectStore, manifest: str) -> list[str]:
    return [entry["key"] for entry in iter_manifest(store, manifest)]  # type: ignore[typeddict-item]


def wanted(workers: int, count: int) -> list[str]:
    return sorted(f"{worker}/{i}" for worker in range(workers) for i in range(count))


def check_shards(store: ObjectStore, manifest: str, workers: int, count: int) -> None:
    exchange = S3ExchangeStore(store)
    found = {entry["id"]: body.read() for body, entry in exchange.iter_objects(manifest)}  # type: ignore[typeddict-item]
    assert found == {f"{w}-{i}": f"content {w} {i}".encode() for w in range(workers) for i in range(count)}
    shards = [entry["archive_key"] for entry in exchange.iter_manifest_entries(manifest) if entry["kind"] == "shard"]
    assert len(shards) == len(set(shards)) == workers * -(-count // 3)
    assert sorted(shards) == list(exchange.list_keys("d/shards/"))


def test_sixteen_processes_append_two_hundred_times_each(tmp_path: Path) -> None:
    run_together(append_many, 16, str(tmp_path), "d/m.jsonl", 200)
    assert sorted(all_keys(open_store(str(tmp_path)), "d/m.jsonl")) == wanted(16, 200)


def test_sixteen_processes_write_shards_into_one_folder(tmp_path: Path) -> None:
    run_together(write_shards, 16, str(tmp_path), "d/m.jsonl", 10)
    check_shards(open_store(str(tmp_path)), "d/m.jsonl", 16, 10)


def test_appends_and_shards_of_several_processes_on_s3(s3: Server) -> None:
    bucket = s3.bucket()
    store = s3.open_store(bucket)
    run_together(append_many, 6, store, "d/a.jsonl", 8)
    assert sorted(all_keys(store, "d/a.jsonl")) == wanted(6, 8)
    run_together(write_shards, 6, store, "d/m.jsonl", 7)
    check_shards(store, "d/m.jsonl", 6, 7)


def test_nothing_is_lost_or_doubled_when_one_reply_in_ten_is_dropped_after_it_took_effect(s3: Server) -> None:
    bucket = s3.bucket()
    rule = Rule("drop_reply", method="PUT", path="/d/", probability=0.1)
    with FaultProxy(s3.endpoint_url, [rule], seed=7) as proxy:
        faulty = s3.open_store(bucket, endpoint_url=proxy.endpoint_url)
        run_together(append_many, 4, faulty, "d/a.jsonl", 12)
        run_together(write_shards, 4, faulty, "d/m.jsonl", 7)
    assert rule.fired >= 5
    store = s3.open_store(bucket)
    assert sorted(all_keys(store, "d/a.jsonl")) == wanted(4, 12)
    check_shards(store, "d/m.jsonl", 4, 7)


def test_a_killed_writer_changes_no_manifest_and_stands_in_nobodys_way(tmp_path: Path) -> None:
    store = S3ExchangeStore(str(tmp_path))
    store.write_manifest("d/m.jsonl", files("before"))
    context = get_context("forkserver")
    context.set_forkserver_preload(["exchange_helpers"])
    ready = context.Event()
    process = context.Process(target=write_until_killed, args=(str(tmp_path), "d/m.jsonl", ready))
    process.start()
    assert ready.wait(600)
    process.kill()
    process.join()
    assert all_keys(store.objects, "d/m.jsonl") == ["before"]
    with store.open_manifest_writer("d/m.jsonl", shard_size=ShardSizePolicy(max_entries=2)) as writer:
        for i in range(4):
            writer.add_to_shard(f"after {i}", b"y")
    keys = list(store.get_manifest("d/m.jsonl").get_keys())
    assert [key.partition("#")[2] for key in keys] == ["", "after 0", "after 1", "after 2", "after 3"]
    assert [store.get_object(key).read() for key in keys[1:]] == [b"y"] * 4


def drop_answers(key: str, error: type[Exception] = OutcomeUnknownError) -> tuple[ObjectStore, list[str]]:
    """A store whose first write of `key` takes effect and then fails with `error`."""
    seen, backend = watched(open_store(f"memory://{uuid.uuid4().hex}"))
    dropped: list[str] = []
    put = backend.put

    def once(name: str, *args: Any, **options: Any) -> Any:
        result = put(name, *args, **options)
        if name == key and not dropped:
            dropped.append(name)
            raise error("the answer was lost")
        return result

    backend.put = once  # type: ignore[method-assign]
    return seen, dropped


def test_a_lost_answer_is_settled_by_reading_back() -> None:
    store, dropped = drop_answers("m.jsonl")
    append_entries(store, "m.jsonl", files("a"))
    assert dropped
    assert all_keys(store, "m.jsonl") == ["a"]


def test_a_refusal_that_hides_our_own_success_is_not_repeated() -> None:
    store, dropped = drop_answers("m.jsonl", ObjectExistsError)
    append_entries(store, "m.jsonl", files("a"))
    assert dropped
    assert all_keys(store, "m.jsonl") == ["a"]


def test_a_lost_answer_and_a_rewritten_history_are_said_not_guessed() -> None:
    store, _ = drop_answers("m.jsonl")
    publish_manifest(open_store(store.url), "m.jsonl", files("old"))
    inner = store.backend.get
    reads: list[int] = []

    def rewritten(key: str, *args: Any, **options: Any) -> Any:
        if key == "m.jsonl":
            reads.append(1)
            if len(reads) == 2:
                publish_manifest(open_store(store.url), "m.jsonl", files("somebody", "else's"))
        return inner(key, *args, **options)

    store.backend.get = rewritten  # type: ignore[method-assign]
    with pytest.raises(OutcomeUnknownError):
        append_entries(store, "m.jsonl", files("a"))


def test_publishing_with_conditions() -> None:
    store = S3ExchangeStore(f"memory://{uuid.uuid4().hex}")
    with store.open_manifest_writer("m.jsonl", mode="overwrite", publish="create") as writer:
        writer.add_file("a")
    assert writer.published is not None
    etag = writer.published.etag
    assert etag == store.objects.head("m.jsonl").etag
    with pytest.raises(ObjectExistsError), store.open_manifest_writer("m.jsonl", mode="overwrite", publish="create"):
        pass
    with store.open_manifest_writer("m.jsonl", mode="overwrite", publish=Update(etag)) as writer:
        writer.add_file("b")
    with pytest.raises(ObjectChangedError), store.open_manifest_writer("m.jsonl", mode="overwrite", publish=Update(etag)):
        pass
    assert all_keys(store.objects, "m.jsonl") == ["b"]
    with pytest.raises(ObjectChangedError):
        publish_manifest(store.objects, "m.jsonl", files("c"), mode=Update(etag))


def without_conditions() -> tuple[ObjectStore, Any]:
    """A store that ignores every condition, as some servers do."""
    seen, backend = watched(open_store(f"memory://{uuid.uuid4().hex}"))
    put = backend.put
    backend.put = lambda key, data, *, mode="overwrite", **options: put(key, data, mode="overwrite", **options)  # type: ignore
    seen.conditional_writes = lambda: False  # type: ignore[method-assign]
    return seen, backend


def test_without_conditional_writes_one_warning_and_one_writer() -> None:
    store, backend = without_conditions()
    commit._warned.discard(store.url)
    with pytest.warns(RuntimeWarning, match="does not honour conditional writes"):
        append_entries(store, "m.jsonl", files("a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        append_entries(store, "m.jsonl", files("b"))
        exchange = S3ExchangeStore(store)
        for content in (b"1", b"2"):
            with exchange.open_manifest_writer("s.jsonl", shard_size=ShardSizePolicy(max_entries=1)) as writer:
                writer.add_to_shard("x", content)
        with pytest.raises(ObjectExistsError):
            publish_manifest(store, "m.jsonl", files("c"), mode="create")
        with pytest.raises(ObjectChangedError):
            publish_manifest(store, "m.jsonl", files("c"), mode=Update("other"))
    assert all_keys(store, "m.jsonl") == ["a", "b"]
    assert [body.read() for body, _ in exchange.iter_objects("s.jsonl")] == [b"1", b"2"]
    get = backend.get
    raced: list[int] = []

    def race(key: str, *args: Any, **options: Any) -> Any:
        answer = get(key, *args, **options)
        if key == "m.jsonl":
            raced.append(1)
            if len(raced) == 1:  # between our read and our write somebody else appends: we overwrite that,
                return answer
            publish_manifest(open_store(store.url), "m.jsonl", files("theirs"))  # or they overwrite ours
            return get(key, *args, **options)
        return answer

    backend.get = race
    with pytest.raises(ConflictError):
        append_entries(store, "m.jsonl", files("d"))


def test_compacting_in_place_does_not_swallow_an_append() -> None:
    seen, backend = watched(open_store(f"memory://{uuid.uuid4().hex}"))
    store = S3ExchangeStore(seen)
    store.put_object("a", b"x")
    store.write_manifest("m.jsonl", files("a"))

    def append(key: str, data: Any, mode: Any) -> None:
        if key == "m.jsonl":
            backend.on_put = None
            S3ExchangeStore(open_store(seen.url)).write_manifest("m.jsonl", files("late"), mode="append_parts")

    backend.on_put = append
    with pytest.raises(ObjectChangedError):
        store.compact_manifest("m.jsonl", "m.jsonl")
    assert all_keys(seen, "m.jsonl") == ["a", "late"]


def test_whoever_lets_go_does_not_wait_for_what_is_read_ahead(s3: Server) -> None:
    """The index of the next shard is on its way, and does not come."""
    bucket = s3.bucket()
    with s3.open_store(bucket) as store:
        write_shards(store, "m.jsonl", 0, 9)
        second = [entry["archive_key"] for entry in iter_manifest(store, "m.jsonl") if entry["kind"] == "shard"][1]
    rule = Rule("hold", "GET", second.rpartition("/")[2])
    patient = StoreOptions(read_timeout=3600, request_timeout=3600, hedge_reads=False)
    with FaultProxy(s3.endpoint_url, [rule]) as proxy:
        store = s3.open_store(bucket, endpoint_url=proxy.endpoint_url, options=patient)
        contents = [S3ExchangeStore(store).iter_objects("m.jsonl")]
        next(contents[0])
        assert rule.reached.wait(300)
        closing = threading.Thread(target=contents.clear, daemon=True)
        closing.start()
        closing.join(300)
        assert not closing.is_alive()
        rule.release.set()
        store.close()
