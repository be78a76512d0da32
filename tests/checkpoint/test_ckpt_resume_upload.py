"""A save that was interrupted is made again: what the store holds is not sent again, and the result is bit-exact."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from resume_helpers import (
    MIB,
    ONCE,
    OPTIONS,
    ORDERLY,
    check,
    down,
    equal,
    holdings,
    outage,
    outage_of,
    quick_folder,
    save_again,
    sent,
    state,
)

from s3loader import events
from s3loader.checkpoint import ArrayShard, CheckpointManager, CheckpointOptions
from s3loader.checkpoint.dcp import Writing
from s3loader.errors import UnavailableError, UnsupportedOperationError
from s3loader.events import OpEvent
from s3loader.store import ObjectStore, open_store
from s3loader.testing import Moment, Seen, Server, open_faulty_store, server
from s3loader.types import ObjectMeta, PartResult


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one."""
    yield from quick_folder(tmp_path)


def killed(opened: Callable[..., tuple[ObjectStore, Any]], nth: int, work: Callable[[ObjectStore], None]) -> bool:
    """Do `work` in a child that is killed before its request number `nth`; whether it was."""

    def hook(seen: Seen, moment: Moment) -> None:
        if seen.number == nth and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            store, _ = opened(hook=hook)
            able: Any = store
            able.conditional_writes = lambda: True  # probing has tests of its own
            work(store)
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def save_once(store: ObjectStore, options: CheckpointOptions = OPTIONS, seed: int = 1, **rank: Any) -> None:
    CheckpointManager(store, options=options, **rank).save(1, state(seed)).result(600)


def test_killed_at_every_request_on_files(folder: Path) -> None:
    resumed = set()
    for nth in range(8, 100):
        path = folder / str(nth)
        path.mkdir()
        if not killed(functools.partial(open_faulty_store, str(path)), nth, save_once):
            break
        with CheckpointManager(path, options=OPTIONS) as manager:
            if manager.latest() is None:
                resumed.add(save_again(manager, state()).resumed)
        shutil.rmtree(path)
    else:
        pytest.fail("it never ends")
    assert len(resumed) > 8
    assert max(resumed) > 57_000


def test_killed_twice(folder: Path) -> None:
    """The second attempt takes over from the first, the third from both."""
    resumed = set()
    for nth in range(12, 40, 2):
        path = folder / str(nth)
        path.mkdir()
        opened = functools.partial(open_faulty_store, str(path))
        assert killed(opened, 18, save_once)
        if not killed(opened, nth, save_once):
            break
        with CheckpointManager(path, options=OPTIONS) as manager:
            if manager.latest() is None:
                resumed.add(save_again(manager, state()).resumed)
        shutil.rmtree(path)
    assert len(resumed) >= 3


@pytest.fixture(scope="module", params=["moto", "ministack"])
def s3(request: pytest.FixtureRequest) -> Iterator[Server]:
    with server(request.param) as running:
        yield running


LARGE = CheckpointOptions(part_size=5 * MIB, file_size=13 * MIB, concurrency=2, deadline=300)


def large() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {"model": {"w": rng.integers(0, 255, 12 * MIB, np.uint8)}, "v": rng.integers(0, 255, 6 * MIB, np.uint8)}


def test_killed_on_s3(s3: Server) -> None:
    """ETags are MD5s there, and the engine is the one that is used by default."""
    resumed = set()
    for nth in (12, 13, 14, 16, 17, 20):
        bucket = s3.bucket()

        def work(store: ObjectStore) -> None:
            CheckpointManager(store, options=LARGE).save(1, large()).result(600)

        if not killed(functools.partial(open_faulty_store, f"s3://{bucket}/run", **s3._arguments()), nth, work):
            break
        store = s3.open_store(bucket + "/run")
        with CheckpointManager(store, options=LARGE) as manager:
            held = sum(holdings(store).values())
            with sent() as seen:
                result = manager.save(1, large()).result(600)
            # what the dead process had sent to the end, the server may have taken in since `held` was counted
            assert held <= result.resumed <= result.written
            assert sum(event.bytes for event in seen) == result.written - result.resumed
            assert np.array_equal(manager.restore()["model"]["w"], large()["model"]["w"])
            assert manager.open().verify() == []
            resumed.add(result.resumed)
        store.close()
    assert len(resumed) >= 3


def test_the_two_ranks_one_of_which_had_finished(folder: Path) -> None:
    def work(store: ObjectStore, rank: int) -> None:
        parts = {f"w{rank}": ArrayShard(np.arange(3000.0) + rank, (0,), (3000,))}
        boxes = {"model": {f"w{r}": parts[f"w{r}"] if r == rank else ArrayShard(np.zeros(0), (3000,), (3000,)) for r in (0, 1)}}
        options = CheckpointOptions(part_size="4096B", deadline=3)
        manager = CheckpointManager(store, options=options, rank=rank, world_size=2, job=os.environ["RESUME_JOB"])
        result = manager.save(1, boxes).result(600)
        (folder / f"result-{rank}").write_text(f"{result.resumed} {result.written}")

    def both(job: str, *strikes: int) -> list[bool]:
        os.environ["RESUME_JOB"] = job
        pids = []
        for rank, nth in enumerate(strikes):
            pid = os.fork()
            if pid == 0:
                opened = functools.partial(open_faulty_store, str(folder / "run"))
                os._exit(1 if killed(opened, nth, functools.partial(work, rank=rank)) else 0)
            pids.append(pid)
        return [os.waitpid(pid, 0)[1] != 0 for pid in pids]

    (folder / "run").mkdir()
    assert both("first", 13, 0) == [True, False]
    store = open_store(str(folder / "run"))
    held = holdings(store)
    assert not (folder / "result-1").exists()
    assert held["d-00001-000.safetensors"] > 24_000
    assert both("second", 0, 0) == [False, False]
    resumed, written = map(int, (folder / "result-1").read_text().split())
    assert resumed == written == held["d-00001-000.safetensors"]
    resumed, written = map(int, (folder / "result-0").read_text().split())
    assert resumed == held.get("d-00000-000.safetensors", 0) < written
    with CheckpointManager(folder / "run") as manager:
        assert np.array_equal(manager.restore(1)["model"]["w1"], np.arange(3000.0) + 1)
        assert manager.open(1).verify() == []


# the same process


@pytest.mark.parametrize("nth", [1, 2, 4, 6, 9, 12, 15])
@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_an_outage(nth: int, scheme: str, request: pytest.FixtureRequest, folder: Path) -> None:
    url = f"memory://{request.node.name}" if scheme == "memory" else str(folder)
    manager, _ = outage(url, "upload part", nth)
    assert manager.latest() is None
    save_again(manager, state())
    manager.close()


def test_it_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "s3loader.checkpoint")
    manager, _ = outage("memory://told", "upload part", 7)
    told: list[OpEvent] = []
    end = events.subscribe(lambda event: told.append(event) if event.op == "RESUME" else None)
    result = save_again(manager, state())
    end()
    assert sum(event.bytes for event in told) == result.resumed > 0
    assert "are taken over" in caplog.text


def test_another_state_takes_nothing_over() -> None:
    for seed in (2, 3):
        manager, faults = outage(f"memory://other-{seed}", "upload part", 9)
        assert sum(holdings(manager.store).values()) > 20_000
        before = len(faults.seen)
        result = manager.save(1, state(seed)).result(600)
        assert result.resumed == 0
        asked = [seen.op for seen in faults.seen[before:] if seen.op in ("list uploads", "list parts")]
        assert asked.count("list uploads") == 1
        assert asked.count("list parts") <= 4
        check(manager, state(seed))


def test_one_byte_that_differs_takes_that_file_alone_out() -> None:
    manager, _ = outage("memory://byte", "upload part", 11)
    want = state()
    whole = sum(holdings(manager.store).values())
    want["model"]["w0"][-1] += 1
    result = manager.save(1, want).result(600)
    assert 0 < result.resumed < whole
    check(manager, want)


def test_without_it_nothing_is_left_open() -> None:
    options = CheckpointOptions(part_size="4096B", file_size="20000B", concurrency=1, resume_uploads=False)
    store, faults = open_faulty_store("memory://off", options=ONCE)
    with CheckpointManager(store, options=options) as manager:
        manager.session()
        with outage_of(faults, "upload part", 3), pytest.raises(UnavailableError):
            manager.save(1, state()).result(600)
        assert list(store.backend.list_multipart("ckpt/")) == []
        assert manager.save(1, state()).result(600).resumed == 0


def test_what_nobody_went_on_with_is_aborted_after_the_next_commit() -> None:
    manager, _ = outage("memory://next", "upload part", 2)
    assert list(manager.store.backend.list_multipart("ckpt/")) != []
    manager.save(2, state(2)).result(600)
    assert list(manager.store.backend.list_multipart("ckpt/")) == []


def test_state_larger_than_the_staging_memory() -> None:
    """Finished files are taken over; an open upload whose parts could not be held is not."""
    options = CheckpointOptions(part_size="4096B", file_size="40000B", concurrency=1, staging_budget="16384B")
    manager, _ = outage("memory://budget", "upload part", 14, options)
    finished = {e.key: e.size for e in manager.store.list("ckpt/") if isinstance(e, ObjectMeta) and e.key.endswith("tensors")}
    assert finished
    result = manager.save(1, state()).result(600)
    assert result.resumed == sum(finished.values())
    check(manager, state())


@pytest.mark.parametrize("buffers", [5, 6])
def test_just_enough_staging_memory(buffers: int) -> None:
    """All buffers are held by the one file that is taken over, and it is complete all the same."""
    options = CheckpointOptions(part_size="4096B", file_size="20000B", concurrency=2, staging_budget=f"{buffers * 4096}B")
    manager, _ = outage(f"memory://just-{buffers}", "upload part", 4, options)
    assert save_again(manager, state()).resumed > 0


def test_no_request_more_where_nothing_was_interrupted() -> None:
    asked = []
    for on in (True, False):
        options = CheckpointOptions(part_size="4096B", file_size="20000B", concurrency=1, resume_uploads=on)
        store, faults = open_faulty_store(f"memory://requests-{on}")
        with CheckpointManager(store, options=options) as manager:
            for step in (1, 2):
                manager.save(step, state(step)).result(600)
            manager.save(2, state(7), on_exists="replace").result(600)
        with CheckpointManager(store, options=options) as manager:
            manager.save(3, state(3)).result(600)
        asked.append([seen.op for seen in faults.seen])
    assert asked[0] == asked[1]
    assert "list parts" not in asked[0]


def test_a_replacement_and_a_deleted_step_are_written_anew() -> None:
    """Their steps have had a root, so somebody may be deleting."""
    manager, _ = outage("memory://replaced", "upload part", 9)
    manager.save(1, state()).result(600)
    manager.delete(1)
    with sent() as seen:
        result = manager.save(1, state()).result(600)
    assert result.resumed == 0
    assert sum(event.bytes for event in seen) == result.written


def test_what_was_taken_over_lives_as_long_as_it_is_needed() -> None:
    """Deleting the step deletes it, but not while a later step refers to it."""
    options = CheckpointOptions(part_size="4096B", file_size="20000B", concurrency=1, incremental=True)
    manager, _ = outage("memory://needed", "upload part", 12, options)
    assert manager.save(1, state()).result(600).resumed > 20_000
    assert manager.save(2, state()).result(600).written == 0
    manager.delete(1)
    manager.gc(grace=0)
    assert equal(manager.restore(2), state())
    assert manager.open(2).verify() == []
    assert manager.roots()[0].facts["refs"] == [1]
    manager.delete(2)
    manager.gc(grace=0)
    assert [entry.key for entry in manager.store.list("ckpt/") if entry.key.endswith(".safetensors")] == []


# stores


def test_a_store_without_list_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, faults = outage("memory://silent", "upload part", 9)
    finished = [e.size for e in manager.store.list("ckpt/") if isinstance(e, ObjectMeta) and e.key.endswith("tensors")]

    def silent(key: str, upload_id: str) -> Iterator[PartResult]:
        raise UnsupportedOperationError("not here", op="list parts", url=key)

    monkeypatch.setattr(faults, "list_parts", silent)
    result = manager.save(1, state()).result(600)
    assert 0 < result.resumed == sum(finished) < result.written
    assert equal(manager.restore(), state())


@pytest.mark.parametrize("shape", ["md5 of something else", "other parts", "opaque"])
def test_etags_that_prove_nothing(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the finished file is read and compared byte for byte: encrypted with own keys, cut otherwise, another store."""
    manager, faults = outage(f"memory://etags-{shape.replace(' ', '-')}", "upload part", 9)
    tag = {"md5 of something else": "0" * 32 + "-5", "other parts": "0" * 32 + "-2", "opaque": "xyz"}[shape]
    real_list, real_get = faults.list, faults.get

    def listed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for entry in real_list(*args, **kwargs):
            yield replace(entry, etag=tag) if isinstance(entry, ObjectMeta) and "/d-0" in entry.key else entry

    def got(key: str, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("if_match") == tag:
            kwargs["if_match"] = None
        return real_get(key, *args, **kwargs)

    finished = [e.size for e in manager.store.list("ckpt/") if isinstance(e, ObjectMeta) and e.key.endswith("tensors")]
    with monkeypatch.context() as patch:
        patch.setattr(faults, "list", listed)
        patch.setattr(faults, "get", got)
        start = len(faults.seen)
        result = manager.save(1, state()).result(600)
        read = [seen for seen in faults.seen[start:] if seen.op == "get" and seen.key.endswith(".safetensors")]
    assert result.resumed >= sum(finished) > 0
    assert len(read) >= 5
    check(manager, state())


@pytest.mark.parametrize("op", ["list", "list uploads", "list parts", "get"])
def test_a_look_that_fails_is_no_failure(op: Any) -> None:
    manager, faults = outage(f"memory://look-{op.replace(' ', '-')}", "upload part", 9)

    def hook(seen: Seen, moment: Moment) -> None:
        if seen.op == op and moment == "before":
            faults.hook = None
            raise down(seen)

    faults.hook = hook
    manager.save(1, state()).result(600)
    assert faults.hook is None
    check(manager, state())


# torch.distributed.checkpoint


def test_dcp_goes_on_too(folder: Path) -> None:
    def write(nth: int | None) -> int:
        store, faults = open_faulty_store(str(folder), options=ONCE)
        manager = CheckpointManager(store, options=ORDERLY)
        writing = Writing(manager, None)
        (seat,) = writing.begin(1)
        part = writing.part(writing.ticket(seat, 0))
        for name, array in state()["model"].items():
            part.add_value(name, [name], array)
        with contextlib.nullcontext() if nth is None else outage_of(faults, "upload part", nth), sent() as seen:
            part.upload()
        writing.publish()
        return sum(event.bytes for event in seen)

    with pytest.raises(UnavailableError):
        write(9)
    store = open_store(str(folder))
    held = sum(holdings(store, 0).values())
    assert held > 20_000
    bytes_sent = write(None)
    with CheckpointManager(folder) as manager:
        assert manager.latest() == 0
        assert manager.open(0).verify() == []
        assert manager.open(0).info["written"] == held + bytes_sent
