"""Ranks, workers, tails, gaps and resuming: whoever takes part, the sequence is the same, exactly once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.errors import ConfigError, PlanError, StateMismatchError
from s3loader.plan import Catalog, Gaps, OrderSpec, PlanState, Topology, choose_spec, plan_for


def make_plan(samples=1000, shuffle="block", digest="d", shards=7, **spec):
    counts = np.diff(np.linspace(0, samples, shards + 1).astype(np.int64))
    catalog = Catalog(counts, samples * 10_000, digest)
    return plan_for(catalog, choose_spec(samples, samples * 10_000, batch_size=8, shuffle=shuffle, **spec))


def whole(plan, epoch=0):
    return plan.samples_at(np.arange(plan.size, dtype=np.int64), epoch).tolist()


def run(plan, epoch, consumed, steps, world, workers, batch, tail="short"):
    """Deliver up to `steps` steps on all ranks, each rank fed by its workers in turn; (samples in order, consumed after)."""
    schedule = plan.schedule(epoch, batch, world_size=world, tail=tail, consumed=consumed)
    gaps = plan.gaps(epoch)
    queues = [
        [iter(plan.batches(epoch, Topology(rank, world, worker, workers), batch, tail=tail, consumed=consumed))
         for worker in range(workers)]
        for rank in range(world)
    ]  # fmt: skip
    out, done = [], 0
    most = max((schedule.steps(rank) for rank in range(world)), default=0)
    for step in range(min(steps, most)):
        for rank in range(world):
            batch_ = next(queues[rank][step % workers], None)
            if batch_ is not None:
                out += batch_.tolist()
        done += 1
    after = int(gaps.expand(np.array([schedule.consumed_after(done)]))[0])
    return out, after


topologies = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 40))


@given(
    st.integers(1, 1500),
    st.sampled_from(["block", "full", "shard", "none"]),
    st.integers(0, 3),
    st.lists(st.tuples(topologies, st.integers(0, 12)), max_size=3),
    topologies,
)
@settings(max_examples=60, deadline=None)
def test_stop_anywhere_resume_on_anything_and_the_sequence_is_the_same(samples, shuffle, epoch, legs, last):
    plan = make_plan(samples, shuffle)
    out, consumed = [], 0
    for (world, workers, batch), steps in legs:
        part, consumed = run(plan, epoch, consumed, steps, world, workers, batch)
        out += part
        state = PlanState.from_dict(plan.state(epoch, consumed).as_dict())
        plan.check(state)
        assert state.consumed == len(out)
    world, workers, batch = last
    part, consumed = run(plan, epoch, consumed, 10**9, world, workers, batch)
    assert out + part == whole(plan, epoch)
    assert consumed == samples


@given(st.integers(1, 400), topologies, st.sampled_from(["drop", "pad", "short"]))
@settings(max_examples=60, deadline=None)
def test_tails(samples, topology, tail):
    world, workers, batch = topology
    plan = make_plan(samples)
    schedule = plan.schedule(0, batch, world_size=world, tail=tail)
    steps = [schedule.steps(rank) for rank in range(world)]
    ranks = [
        [b.tolist() for w in range(workers) for b in plan.batches(0, Topology(r, world, w, workers), batch, tail=tail)]
        for r in range(world)
    ]
    assert [len(batches) for batches in ranks] == steps
    delivered = sorted(sample for batches in ranks for b in batches for sample in b)
    if tail == "short":
        assert delivered == list(range(samples))
        assert max(steps) - min(steps) <= (samples % (world * batch) < world)
    else:
        assert len(set(steps)) == 1
        assert all(len(b) == batch for batches in ranks for b in batches)
    if tail == "drop":
        assert len(set(delivered)) == len(delivered) == samples // (world * batch) * world * batch
    if tail == "pad":
        assert set(delivered) == set(range(samples))
        assert len(delivered) < samples + world * batch


def test_more_ranks_than_samples():
    plan = make_plan(3)
    assert [plan.schedule(0, 4, world_size=5, tail="short").steps(rank) for rank in range(5)].count(1) == 3
    assert plan.schedule(0, 4, world_size=5, tail="drop").steps(4) == 0
    assert [len(b) for b in plan.batches(0, Topology(4, 5), 4, tail="pad")] == [4]


def test_an_empty_dataset_has_no_steps():
    plan = make_plan(0)
    for tail in ("drop", "pad", "short"):
        assert plan.schedule(0, 4, world_size=2, tail=tail).steps(1) == 0


@given(st.integers(0, 60), st.lists(st.tuples(st.integers(-5, 70), st.integers(-5, 70)), max_size=6))
@settings(max_examples=60, deadline=None)
def test_gaps_renumber_what_is_kept(size, intervals):
    gaps = Gaps(intervals, size)
    kept = [p for p in range(size) if not any(a <= p < b for a, b in intervals)]
    assert gaps.kept == len(kept)
    assert gaps.expand(np.arange(len(kept), dtype=np.int64)).tolist() == kept
    assert gaps.expand(np.array([len(kept)])).tolist() == [size]
    assert [gaps.shrink(p) for p in range(size + 1)] == [sum(q < p for q in kept) for p in range(size + 1)]


@given(st.integers(20, 300), topologies, st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_skipped_and_excluded_samples_are_the_only_ones_missing_also_after_a_resume(samples, topology, steps):
    base = make_plan(samples)
    catalog = Catalog(base.counts, base.total_bytes, "d")
    plan = plan_for(catalog, OrderSpec.from_dict(base.spec), skip=[(0, 5, 9), (1, 0, 3)], exclude=[2, 11])
    order = whole(base)
    expected = [sample for p, sample in enumerate(order) if not 5 <= p < 9 and sample not in (2, 11)]
    world, workers, batch = topology
    first, consumed = run(plan, 0, 0, steps, world, workers, batch)
    rest, end = run(plan, 0, consumed, 10**9, 3, 2, 7)
    assert first + rest == expected
    assert end == samples


def test_where_and_find_are_inverse_and_tell_the_truth():
    plan = make_plan(203)
    for tail in ("drop", "short", "pad"):
        for rank in range(3):
            steps = plan.batches(1, Topology(rank, 3), 8, tail=tail, consumed=24)
            for step, batch in enumerate(steps):
                for sample in batch.tolist():
                    place = plan.find(sample, 1, batch_size=8, world_size=3, tail=tail, start=24)
                    assert place is not None
                    if place.position >= 24:  # padding samples stand at the start of the epoch
                        assert (place.step, place.rank, place.sample) == (step, rank, sample)
                    assert plan.where(place.position, 1, batch_size=8, world_size=3, tail=tail, start=24) == place
    with pytest.raises(PlanError):
        plan.where(203)
    with pytest.raises(PlanError):
        plan.find(-1)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_a_bad_batch_size_is_refused(bad):
    with pytest.raises((PlanError, ConfigError), match="batch_size"):
        make_plan().schedule(0, bad)


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(ConfigError):
        Topology(2, 2)


def test_state_is_small_and_names_what_differs():
    plan = make_plan(1000, seed=1)
    state = plan.state(3, 640)
    assert len(repr(state.as_dict())) < 240
    with pytest.raises(StateMismatchError, match="seed") as caught:
        make_plan(1000, seed=2).check(state)
    assert caught.value.differs[0].startswith("seed")
    with pytest.raises(StateMismatchError, match="dataset"):
        make_plan(1000, seed=1, digest="other").check(state)
    with pytest.raises(StateMismatchError, match="version"):
        PlanState.from_dict({**state.as_dict(), "version": 2})
    for broken in ({}, {"version": 1}, {**state.as_dict(), "consumed": -1}, {**state.as_dict(), "epoch": "x"}):
        with pytest.raises(StateMismatchError):
            PlanState.from_dict(broken)
