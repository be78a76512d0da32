"""Stores cross process boundaries: forked at any moment, spawned, pickled."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from forking import in_child

from s3loader.store import ObjectStore, StoreOptions, open_store
from s3loader.types import PutRequest


def stores(tmp_path: Path) -> list[ObjectStore]:
    options = StoreOptions(max_requests_per_second=1e6)
    return [open_store(tmp_path, options=options), open_store(f"memory://{uuid.uuid4().hex}/p", options=options)]


def test_forked_while_threads_are_at_work(tmp_path: Path) -> None:
    """A lock that another thread holds at the fork must not stay held in the child."""
    for store in stores(tmp_path):
        stop = threading.Event()

        def busy(store: ObjectStore = store, stop: threading.Event = stop) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                store.put(f"busy/{number % 7}", b"x" * 100)
                store.delete(f"busy/{(number + 3) % 7}")
                list(store.list("busy/"))

        workers = [threading.Thread(target=busy) for _ in range(3)]
        for worker in workers:
            worker.start()
        try:
            for round_ in range(8):
                key = f"child/{round_}"

                def work(store: ObjectStore = store, key: str = key) -> bool:
                    store.put(key, b"from the child", mode="create")
                    found = [bytes(r.data) for r in store.get_many([key] * 5, driver="threads")]
                    return found == [b"from the child"] * 5 and key in [entry.key for entry in store.list("child/")]

                in_child(work)
        finally:
            stop.set()
            for worker in workers:
                worker.join()


def test_memory_in_the_child_is_a_copy() -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.put("k", b"parent")

    def work() -> bool:
        store.put("k", b"child")
        return store.get("k") == b"child"

    in_child(work)
    assert store.get("k") == b"parent"


def _read(store: ObjectStore, answers: Any) -> None:
    answers.put([bytes(r.data) for r in store.get_many(["a", "b"])])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pickled_to_a_process(tmp_path: Path, method: str) -> None:
    store = open_store(tmp_path)
    list(store.put_many([PutRequest("a", b"1"), PutRequest("b", b"2")]))
    context: Any = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    child = context.Process(target=_read, args=(store, answers))
    child.start()
    assert answers.get() == [b"1", b"2"]
    child.join(600)
    assert child.exitcode == 0
    child.close()
    answers.close()


def test_a_pickle_is_small_and_lazy(tmp_path: Path) -> None:
    store = open_store(tmp_path / "not yet there")
    data = pickle.dumps(store)
    assert len(data) < 2000
    assert not (tmp_path / "not yet there").exists()
    pickle.loads(data).put("k", b"x")
    assert store.get("k") == b"x"
