"""The engine delivers exactly what the plan says, from real shards, however it is cut up and resumed."""

import asyncio
import pickle
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader import open_store
from s3loader.errors import ConfigError, PlanError, StateMismatchError
from s3loader.loader import Loader, from_manifest
from s3loader.plan import OrderSpec
from s3loader.testing import write_sharded_dataset

SAMPLES = 700


def content(i):
    return f"{i:06d}-".encode() * (1 + i * 7 % 90)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = open_store(tmp_path_factory.mktemp("loader").as_uri())
    write_sharded_dataset(store, ((f"d/s{i:05d}.bin", content(i)) for i in range(SAMPLES)), per_shard=130)
    write_sharded_dataset(
        store,
        ((f"d/s{i:05d}.bin", content(i)) for i in range(SAMPLES)),
        per_shard=130,
        prefix="packed",
        manifest="packed.jsonl",
        compression="zstd",
    )
    return store


@pytest.fixture(scope="module")
def dataset(store):
    return from_manifest("manifest.jsonl", store=store)


def numbers(batches):
    return [int(bytes(sample[:6])) for batch in batches for sample in batch]


def plan_order(loader, epoch=0):
    plan = loader.plan
    return plan.samples_at(np.arange(plan.size, dtype=np.int64), epoch).tolist()


@pytest.mark.parametrize("shuffle", ["block", "full", "shard", "none"])
@pytest.mark.parametrize("manifest", ["manifest.jsonl", "packed.jsonl"])
def test_every_byte_of_every_sample_in_the_order_of_the_plan(store, shuffle, manifest):
    loader = Loader(from_manifest(manifest, store=store), batch_size=16, shuffle=shuffle, seed=5)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [16] * 43 + [12]
    assert numbers(batches) == plan_order(loader)
    assert all(bytes(s) == content(int(bytes(s[:6]))) for batch in batches for s in batch)
    assert loader.stats.samples == SAMPLES
    assert loader.stats.bytes_used == sum(len(content(i)) for i in range(SAMPLES))


specs = st.builds(
    lambda m, lanes, c, w, g: {"block": m, "lanes": lanes, "chunk": c, "window": w, "run": g},
    st.integers(1, 40), st.integers(1, 12), st.integers(1, 24), st.integers(1, 5), st.integers(1, 8),
)  # fmt: skip


@given(
    st.sampled_from(["block", "block", "full", "shard", "none"]), specs, st.integers(1, 9), st.integers(1, 5),
    st.integers(1, 50), st.integers(0, 9), st.sampled_from(["700KiB", "100KiB", "4KiB"]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_ranks_workers_resume_and_memory_limits_never_change_the_sequence(
    dataset, shuffle, order, world, workers, batch, steps, limit
):
    options = {"shuffle": shuffle, "seed": 3, "memory_limit": limit}
    first = Loader(dataset, batch_size=8, order=order, **options)
    head, batches = [], iter(first)
    for _ in range(steps):
        head += numbers([next(batches)])
    batches.close()
    state = first.state_dict()
    assert state["consumed"] == len(head)

    def part(rank, worker):
        loader = Loader(dataset, batch_size=batch, rank=rank, world_size=world, worker=worker, workers=workers, **options)
        loader.load_state_dict(state)
        return [numbers([b]) for b in loader]

    parts = [[part(rank, worker) for worker in range(workers)] for rank in range(world)]
    tail = []
    for step in range(max(len(p) for rank in parts for p in rank) * workers):
        for rank in parts:
            mine = rank[step % workers]
            tail += mine[step // workers] if step // workers < len(mine) else []
    assert head + tail == plan_order(first)


@pytest.mark.parametrize("tail", ["drop", "pad", "short"])
def test_tails_and_len(dataset, tail):
    loaders = [Loader(dataset, batch_size=32, tail=tail, rank=r, world_size=3) for r in range(3)]
    got = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(g) for g in got]
    sizes = [len(batch) for g in got for batch in g]
    assert sum(sizes) == {"drop": 672, "pad": 768, "short": 700}[tail]
    if tail == "pad":
        assert sorted(set(numbers(b for g in got for b in g))) == list(range(700))


def test_epochs_advance_by_themselves_and_by_set_epoch(dataset):
    loader = Loader(dataset, batch_size=50)
    first, second = numbers(loader), numbers(loader)
    assert (first, second) == (plan_order(loader, 0), plan_order(loader, 1))
    assert loader.epoch == 1
    loader.set_epoch(0)
    assert numbers(loader) == first
    loader.set_epoch(0)
    assert numbers(loader) == first
    next(iter(loader))
    assert loader.epoch == 1


def test_a_state_at_the_end_of_an_epoch_goes_on_with_the_next(dataset):
    loader = Loader(dataset, batch_size=50)
    for _ in loader:
        state = loader.state_dict()  # as taken inside the loop, after the last batch
    assert state["consumed"] == 700
    other = Loader(dataset, batch_size=7)
    other.load_state_dict(state)
    assert numbers(other) == plan_order(loader, 1)
    assert other.epoch == 1


def test_states_of_other_data_seeds_or_options_are_refused_by_name(store, dataset):
    loader = Loader(dataset, batch_size=10, seed=1)
    next(iter(loader))
    state = loader.state_dict()
    with pytest.raises(StateMismatchError, match="seed"):
        Loader(dataset, batch_size=10, seed=2).load_state_dict(state)
    with pytest.raises(StateMismatchError, match="shuffle"):
        Loader(dataset, batch_size=10, seed=1, shuffle="full").load_state_dict(state)
    with pytest.raises(StateMismatchError, match="window"):
        Loader(dataset, batch_size=10, seed=1, order={"window": 9}).load_state_dict(state)
    grouped = from_manifest("packed.jsonl", store=store)
    with pytest.raises(StateMismatchError, match="dataset") as caught:
        Loader(grouped, batch_size=10, seed=1).load_state_dict(state)
    assert caught.value.differs
    changed = Loader(grouped, batch_size=10, seed=1)
    changed.load_state_dict(state, allow_changed=True)
    assert numbers(changed) == plan_order(changed)[10:]
    for broken in ({}, {"version": 99}, {**state, "consumed": 701}):
        with pytest.raises(StateMismatchError):
            Loader(dataset, batch_size=10, seed=1).load_state_dict(broken)


def test_skipped_steps_and_excluded_keys_are_missing_and_stay_missing_after_a_resume(dataset):
    key = "shards/shard-000002.tar#d/s00300.bin"
    loader = Loader(dataset, batch_size=10, skip_steps=[(2, 4)], exclude=[key])
    order = plan_order(loader)
    expected = [s for p, s in enumerate(order) if not 20 <= p < 40 and s != 300]
    batches = iter(loader)
    head = numbers([next(batches), next(batches), next(batches)])
    batches.close()
    other = Loader(dataset, batch_size=33)
    other.load_state_dict(loader.state_dict())
    assert head + numbers(other) == expected
    assert 300 not in numbers(other)  # the next epoch
    with pytest.raises(PlanError, match="no sample"):
        len(Loader(dataset, batch_size=10, exclude=["nothing"]))


def test_skipping_after_a_loss_spike_means_the_epoch_that_is_resumed(dataset):
    loader = Loader(dataset, batch_size=10, epoch=3)
    batches = iter(loader)
    head = numbers([next(batches), next(batches)])
    batches.close()
    again = Loader(dataset, batch_size=10, skip_steps=[(2, 5)])
    again.load_state_dict(loader.state_dict())
    order = plan_order(loader, 3)
    assert head + numbers(again) == order[:20] + order[50:]
    assert numbers(again) == plan_order(loader, 4)


def test_provenance_both_ways(dataset):
    loader = Loader(dataset, batch_size=16, rank=1, world_size=2)
    for batch in loader.iter_batches():
        for place, sample, position in zip(batch.places(), batch.data, batch.positions.tolist(), strict=True):
            assert place.key == f"{place.shard}#d/s{int(bytes(sample[:6])):05d}.bin"
            assert place.length == len(sample)
            assert dataset.store.get_range(place.shard, place.offset, place.offset + place.length) == bytes(sample)
            assert loader.where(position) == place
            assert loader.find(place.key) == (batch.step, 1)
    assert loader.find(loader.where(0).key) == (0, 0)


def test_async_iteration_gives_the_same(dataset):
    async def collect():
        return [batch async for batch in Loader(dataset, batch_size=33, seed=2)]

    assert numbers(asyncio.run(collect())) == numbers(Loader(dataset, batch_size=33, seed=2))


def test_an_abandoned_iteration_leaves_no_thread(dataset):
    before = set(threading.enumerate())
    for _ in range(3):
        batches = iter(Loader(dataset, batch_size=4, decode_threads=2, transform=bytes))
        next(batches)
        batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=600)
    assert set(threading.enumerate()) <= before


def test_a_dataset_pickles_small_and_works_again(dataset):
    list(Loader(dataset, batch_size=100))
    data = pickle.dumps(dataset)
    assert len(data) < 4000
    assert numbers(Loader(pickle.loads(data), batch_size=100)) == numbers(Loader(dataset, batch_size=100))


def test_mismatched_options_are_refused_at_once(dataset):
    for options in (
        {"batch_size": 0}, {"batch_size": -1}, {"batch_size": "8"}, {}, {"batch_size": 1, "shuffle": "x"},
        {"batch_size": 1, "tail": "x"}, {"batch_size": 1, "decode": "x"}, {"batch_size": 1, "collate": "x"},
        {"batch_size": 1, "memory_limit": "much"}, {"batch_size": 1, "bogus": 1}, {"batch_size": 1, "rank": 1},
        {"batch_size": 1, "on_error": "ignore"},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            Loader(dataset, **options)
    with pytest.raises(PlanError):
        len(Loader(dataset, batch_size=1, order={"blocks": 3}))
    assert Loader(dataset, batch_size=3, order=OrderSpec("none")).plan.spec == {"shuffle": "none"}


def test_a_dataset_without_samples_is_an_error_unless_it_may_be_empty(tmp_path):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, [], per_shard=5)
    dataset = from_manifest("manifest.jsonl", store=store)
    with pytest.raises(PlanError, match=r"nothing to load from file://.*manifest.jsonl \(0 samples"):
        list(Loader(dataset, batch_size=4))
    loader = Loader(dataset, batch_size=4, allow_empty=True)
    assert list(loader) == []
    assert len(loader) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 4, "world_size": 3, "tail": "drop"}, "takes 12 samples.*10 samples, batch size 4, world size 3"),
        ({"batch_size": 1, "world_size": 11}, "fewer samples than ranks.*10 samples, batch size 1, world size 11"),
        ({"batch_size": 1, "skip_steps": [(0, 10)]}, "nothing to load"),
    ],
)
def test_an_epoch_without_a_batch_is_refused_by_all_ranks_alike(tmp_path, options, said):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, [(f"{i:02d}", b"x") for i in range(10)], per_shard=5)
    dataset = from_manifest("manifest.jsonl", store=store)
    for rank in range(options.get("world_size", 1)):
        with pytest.raises(PlanError, match=said) as caught:
            list(Loader(dataset, rank=rank, **options))
        assert caught.value.hint
        assert sum(map(len, Loader(dataset, rank=rank, allow_empty=True, **options))) <= 1
    if "skip_steps" not in options:
        padded = Loader(dataset, rank=options["world_size"] - 1, **{**options, "tail": "pad"})
        assert sum(map(len, padded)) == options["batch_size"]


def test_what_is_left_of_an_epoch_may_be_less_than_a_batch(tmp_path):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, [(f"{i:02d}", b"x") for i in range(10)], per_shard=5)
    dataset = from_manifest("manifest.jsonl", store=store)
    first = Loader(dataset, batch_size=3)
    batches = iter(first)
    for _ in range(3):
        next(batches)
    resumed = Loader(dataset, batch_size=3, tail="drop")
    resumed.load_state_dict(first.state_dict())
    assert [len(batch) for batch in resumed] == [3, 3, 3]  # the next epoch


def test_workers_of_a_rank_share_its_memory_limit(tmp_path):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, [(f"{i:03d}", bytes(4096)) for i in range(600)], per_shard=100)
    dataset = from_manifest("manifest.jsonl", store=store)

    def in_flight(workers):
        loader = Loader(dataset, batch_size=4, workers=workers, memory_limit="300KiB", shuffle="full")
        budget = loader._planner(loader.schedule(), 0, loader.topology).budget
        assert loader.explain().peak == budget.resident + budget.in_flight
        return budget.in_flight

    assert in_flight(1) == 100 * 1024
    assert in_flight(4) == 25 * 1024


def test_len_behind_the_last_batch_is_that_of_the_next_epoch(tmp_path):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, [(f"{i:02d}", b"x") for i in range(20)], per_shard=5)
    first = Loader(from_manifest("manifest.jsonl", store=store), batch_size=4)
    list(first)
    resumed = Loader(from_manifest("manifest.jsonl", store=store), batch_size=4)
    resumed.load_state_dict(first.state_dict())
    assert len(resumed) == len(list(resumed)) == 5
    assert resumed.epoch == 1


def test_the_end_of_an_epoch_fetches_nothing_again_that_is_still_open(dataset):
    order = OrderSpec("block", seed=2, block=7, lanes=4, chunk=8, window=2, run=1)  # 28 samples are left of the lanes
    loader = Loader(dataset, batch_size=8, order=order, memory_limit="200KiB")
    assert numbers(loader) == plan_order(loader)
    shards = len(dataset.parts)
    assert 100 <= loader.stats.requests <= 100 + shards  # each block once; a block over two shards is two requests
    resumed = Loader(dataset, batch_size=8, order=order, memory_limit="200KiB")
    resumed.load_state_dict(loader.plan.state(0, 688).as_dict())  # nothing is open there: the last samples come alone
    assert numbers(resumed) == plan_order(loader)[688:]
