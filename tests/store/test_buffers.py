"""The buffer pool: nobody's bytes are ever written over, and memory is used again."""

from __future__ import annotations

import gc
import os
import threading

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.store.buffers import BufferPool, aligned_block, shared_pool


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def test_a_buffer_comes_back_when_its_last_view_is_gone() -> None:
    pool = BufferPool()
    view = pool.lease(100_000)
    assert len(view) >= 100_000
    assert not view.readonly
    place = address(view)
    slice_ = view[10:20]
    del view
    assert address(pool.lease(100_000)) != place
    array = np.frombuffer(slice_, np.uint8)
    del slice_
    assert address(pool.lease(100_000)) != place
    sub = array[3:].reshape(1, -1)
    del array
    assert address(pool.lease(100_000)) != place
    del sub
    gc.collect()
    assert place in {address(pool.lease(100_000)) for _ in range(5)}


def test_sizes() -> None:
    pool = BufferPool()
    for size in (0, 1, 4096, 4097, 65_536, 65_537, 100_000, 1 << 20, (1 << 20) + 1, 8_400_000):
        view = pool.lease(size)
        assert size <= len(view) <= max(4096, size * 9 // 8 + 1)
        view[:] = b"\1" * len(view)


def test_every_buffer_starts_on_a_64_byte_boundary() -> None:
    """1-31 bytes into a page the kernel's copy is 3-4 times slower on a large part of all processors."""
    pool = BufferPool()
    for size in (1, 4096, 5000, 40_000, 100_000, 1 << 20, 9_000_000):
        views = [pool.lease(size) for _ in range(5)]
        assert not any(address(view) % 64 for view in views)
        del views
        assert address(pool.lease(size)) % 64 == 0  # one that was used before
    assert len(aligned_block(0)) == 0
    assert address(memoryview(aligned_block(777))) % 64 == 0


def test_steady_use_circulates_few_buffers() -> None:
    pool = BufferPool()
    burst = [pool.lease(100_000) for _ in range(50)]
    kept = pool.kept_bytes
    del burst
    places = set()
    for _ in range(300):
        places.add(address(pool.lease(100_000)))
    assert pool.kept_bytes == kept
    late = {address(pool.lease(100_000)) for _ in range(100)}
    assert len(late) <= 3


def test_the_bound_holds_and_what_is_lent_beyond_it_lives() -> None:
    pool = BufferPool(1 << 20)
    views = [pool.lease(200_000) for _ in range(20)]
    assert pool.kept_bytes <= 1 << 20
    for i, view in enumerate(views):
        view[:] = bytes([i]) * len(view)
    assert len({address(view) for view in views}) == 20
    assert all(view[0] == view[-1] == i for i, view in enumerate(views))
    big = pool.lease(5 << 20)
    big[-1] = 1
    assert pool.kept_bytes <= 1 << 20
    del views, view
    again = [pool.lease(100_000) for _ in range(10)]  # another size takes the place of the first
    assert pool.kept_bytes <= 1 << 20
    places = {address(view) for view in again}
    del again
    assert places & {address(pool.lease(100_000)) for _ in range(3)}
    pool.clear()
    assert pool.kept_bytes == 0


def test_buffers_lent_for_ever_do_not_fill_the_pool() -> None:
    pool = BufferPool(1 << 20)
    hoard = [pool.lease(200_000) for _ in range(5)]
    places = [address(pool.lease(200_000)) for _ in range(50)]
    assert len(set(places[25:])) <= 3
    assert len(hoard) == 5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 5000, 9000, 70_000]), st.integers(0, 12)), max_size=60))
def test_no_two_living_views_share_memory(steps: list[tuple[int, int]]) -> None:
    pool = BufferPool(300_000)
    living: dict[int, memoryview] = {}
    for stamp, (size, drop) in enumerate(steps):
        view = pool.lease(size)[:size]
        view[:] = stamp.to_bytes(2, "big") * (size // 2) + b"\0" * (size % 2)
        living[stamp] = view
        living.pop(drop * len(steps) // 13, None)
        assert all(int.from_bytes(kept[:2], "big") == owner for owner, kept in living.items() if len(kept) > 1)
        del view
        assert pool.kept_bytes <= 300_000


def test_threads() -> None:
    pool = BufferPool(8 << 20)
    wrong: list[int] = []

    def work(number: int) -> None:
        mine = []
        for i in range(400):
            view = pool.lease(50_000 if i % 3 else 9000)
            view[:8] = number.to_bytes(8, "big")
            mine.append(view)
            if len(mine) > 5:
                wrong.extend(number for old in mine if int.from_bytes(old[:8], "big") != number)
                mine.clear()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.kept_bytes <= 8 << 20


def test_a_forked_child_begins_empty_and_keeps_what_was_lent() -> None:
    pool = BufferPool()
    view = pool.lease(100_000)
    view[:5] = b"hello"
    with pool._lock:  # another thread may hold it at that moment
        pid = os.fork()
        if pid == 0:
            ok = pool.kept_bytes == 0 and bytes(view[:5]) == b"hello" and len(pool.lease(100_000)) >= 100_000
            os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert pool.kept_bytes > 0


def test_the_shared_pool_is_one() -> None:
    assert shared_pool() is shared_pool()


def test_a_reader_with_a_small_budget_bounds_what_is_kept_meanwhile():
    pool = BufferPool(1 << 20)
    for size in (200_000, 300_000, 400_000):
        pool.lease(size)
    assert pool.kept_bytes > 800_000
    with pool.bounded(300_000):
        assert pool.kept_bytes <= 300_000
        lent = [pool.lease(size) for size in (100_000, 150_000, 250_000, 400_000)]
        assert [len(view) >= size for view, size in zip(lent, (100_000, 150_000, 250_000, 400_000), strict=True)] == [True] * 4
        assert pool.kept_bytes <= 300_000
        with pool.bounded(500_000):  # another reader beside it
            pool.lease(400_000)
            assert 400_000 <= pool.kept_bytes <= 800_000
    del lent
    for size in (200_000, 300_000, 400_000):
        pool.lease(size)
    assert pool.kept_bytes > 800_000
