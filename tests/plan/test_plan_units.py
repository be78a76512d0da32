"""Orders of samples that are stored in units of unlike size, which are only fetched whole."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.plan import OrderSpec, Schedule, Topology, choose_spec
from s3loader.plan.order import make_order
from s3loader.plan.permutation import derive, permute

UNITS = st.lists(st.integers(0, 40), min_size=1, max_size=60)
SPECS = st.builds(
    OrderSpec,
    shuffle=st.sampled_from(["block", "none", "shard", "full"]),
    seed=st.integers(0, 2**64 - 1),
    lanes=st.integers(1, 9),
    chunk=st.integers(1, 12),
    window=st.integers(1, 5),
)


def counts_of(units: list[int]) -> np.ndarray:
    """Shards of a few units each."""
    return np.array([sum(units[low : low + 4]) for low in range(0, len(units), 4)], dtype=np.int64)


@settings(max_examples=60, deadline=None)
@given(UNITS, SPECS, st.integers(0, 3))
def test_a_bijection_whose_units_last_as_long_as_they_are_needed(units: list[int], spec: OrderSpec, epoch: int) -> None:
    sizes = np.array(units, dtype=np.int64)
    order = make_order(counts_of(units), spec, sizes)
    positions = np.arange(sum(units), dtype=np.int64)
    samples = order.samples_at(positions, epoch)
    assert sorted(samples.tolist()) == positions.tolist()
    assert order.positions_of(samples, epoch).tolist() == positions.tolist()
    some = positions[::3]
    assert order.samples_at(some, epoch).tolist() == samples[::3].tolist()
    starts = np.cumsum(sizes) - sizes
    found = order.units(positions, samples, epoch)
    for position, sample, start, length, until in zip(positions, samples, *found, strict=True):
        unit = int(np.searchsorted(starts, sample, side="right")) - 1
        assert (start, length) == (starts[unit], sizes[unit])
        assert until > position
        last = order.positions_of(np.arange(start, start + length, dtype=np.int64), epoch).max()
        assert until > last  # so it is fetched once by whoever takes all of it
    open_at = [len({s for s, p, u in zip(found.start, positions, found.until, strict=True) if p <= at < u}) for at in positions]
    assert (
        max(open_at, default=0) * int(sizes.max()) <= max(1, spec.lanes) * spec.window * int(sizes.max())
        or spec.shuffle != "block"
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 2, 4, 8]), st.integers(1, 20), st.integers(0, 2**32))
def test_whole_rounds_of_lanes_give_each_unit_to_one_reader(world: int, workers: int, batch: int, seed: int) -> None:
    """Where the workers divide the lanes of a rank; what is left at the end is for all."""
    units = np.array([100 + 7 * (n % 5) for n in range(200)], dtype=np.int64)
    spec = choose_spec(int(units.sum()), 1, batch_size=batch, world_size=world, seed=seed, units=units)
    assert spec.lanes % (world * workers) == 0
    order = make_order(np.array([units.sum()], dtype=np.int64), spec, units)
    rounds = order._at(0).used * spec.lanes  # type: ignore[attr-defined]
    assert rounds > 0.8 * order.size
    schedule = Schedule(0, order.size, batch, world)
    readers: dict[int, set[tuple[int, int]]] = {}
    for rank in range(world):
        for worker in range(workers):
            steps = schedule.worker_steps(Topology(rank, world, worker, workers))
            positions, _ = schedule.positions(rank, steps)
            positions = positions[positions < rounds]
            for start in np.unique(order.units(positions, order.samples_at(positions, 0), 0).start).tolist():
                readers.setdefault(start, set()).add((rank, worker))
    assert all(len(some) == 1 for some in readers.values())


def test_neighbours_are_of_several_units() -> None:
    units = np.full(64, 1000, dtype=np.int64)
    spec = choose_spec(64_000, 64_000, batch_size=32, seed=1, units=units)
    order = make_order(np.array([64_000], dtype=np.int64), spec, units)
    first = order.samples_at(np.arange(8192, dtype=np.int64), 0)
    assert len(np.unique(first // 1000)) >= spec.lanes
    other = order.samples_at(np.arange(8192, dtype=np.int64), 1)
    assert (first != other).any()


@pytest.mark.parametrize("megabytes", [1, 60, 1000])
def test_what_is_open_is_bounded(megabytes: int) -> None:
    units = np.full(200, 1000, dtype=np.int64)
    spec = choose_spec(200_000, 200 * megabytes << 20, batch_size=32, units=units)
    assert spec.lanes * spec.window * megabytes <= max(256, megabytes)
    assert spec.lanes >= 1


def spelled_out(units: list[int], spec: OrderSpec, epoch: int) -> list[int]:
    """The unit order as docs/order-and-resume.md has it, step by step."""

    def place(key: tuple[int, ...], size: int, at: int) -> int:
        return int(permute(np.array([at], dtype=np.int64), size, derive(*key))[0])

    first = np.cumsum([0, *units]).tolist()
    count, lanes, w, c = len(units), spec.lanes, spec.window, spec.chunk
    dealt: list[list[int]] = []
    for lane in range(lanes):
        mine = [place((spec.seed, epoch, 6), count, n) for n in range(lane, count, lanes)]
        edge = 1 + lane * w // lanes
        windows = [mine[:edge], *(mine[at : at + w] for at in range(edge, len(mine), w))]
        samples = []
        for number, window in enumerate(windows):
            stood = [sample for unit in window for sample in range(first[unit], first[unit + 1])]
            samples += [stood[place((spec.seed, epoch, 2, lane, number), len(stood), y)] for y in range(len(stood))]
        dealt.append(samples)
    u = min(map(len, dealt)) // c * c
    rounds = [dealt[p // c % lanes][p // (c * lanes) * c + p % c] for p in range(u * lanes)]
    return rounds + [sample for samples in dealt for sample in samples[u:]]


@settings(max_examples=40, deadline=None)
@given(UNITS, SPECS.filter(lambda spec: spec.shuffle == "block"), st.integers(0, 3))
def test_the_order_is_what_the_document_says(units: list[int], spec: OrderSpec, epoch: int) -> None:
    order = make_order(counts_of(units), spec, np.array(units, dtype=np.int64))
    assert order.samples_at(np.arange(sum(units), dtype=np.int64), epoch).tolist() == spelled_out(units, spec, epoch)


def test_golden() -> None:
    """The sequence does not change with versions, machines or frameworks."""
    units = np.array([(n * 37) % 101 for n in range(300)], dtype=np.int64)
    order = make_order(np.array([int(units.sum())], dtype=np.int64), OrderSpec(seed=7, lanes=6, chunk=5, window=3), units)
    samples = order.samples_at(np.arange(order.size, dtype=np.int64), 2)
    assert hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest()[:16] == "716be5ddc30c89d7"
