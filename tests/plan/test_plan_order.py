"""The order of samples: a bijection both ways, fixed for ever by golden digests and a second implementation."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.errors import ConfigError, PlanError
from s3loader.plan import OrderSpec, choose_spec, permutation
from s3loader.plan.order import BlockOrder, make_order
from s3loader.plan.permutation import derive, derive_each, permute, unpermute

MASK = (1 << 64) - 1


# -- the algorithm again, as docs/order-and-resume.md tells it, one sample at a time ------------------


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def key_of(*words):
    key = 0
    for word in words:
        key = mix(((key ^ word) + 0x9E3779B97F4A7C15) & MASK)
    return key


def bijection(value, size, key):
    if size <= 1:
        return 0
    bits = max(6, (size - 1).bit_length())
    low_bits = bits // 2
    while True:
        low, high = value % (1 << low_bits), value >> low_bits
        for i in range(8):
            salted = key + (i + 1) * 0x9E3779B97F4A7C15
            if i % 2 == 0:
                high ^= mix((low + salted) & MASK) % (1 << (bits - low_bits))
            else:
                low ^= mix((high + salted) & MASK) % (1 << low_bits)
        value = (high << low_bits) | low
        if value < size:
            return value


def block_order(samples, m, lanes, c, w, g, seed, epoch):
    full = samples // m
    per_lane = full // lanes
    used = per_lane * m // c * c
    block = [bijection(n, full, key_of(seed, epoch, 1)) for n in range(full)]
    lane_sequences = []
    for lane in range(lanes):
        windows, at = [], 0
        while at < per_lane * m:
            blocks = 1 + lane * w // lanes if at == 0 else w
            windows.append((at, min(at + blocks * m, per_lane * m)))
            at = windows[-1][1]
        sequence = []
        for number, (start, end) in enumerate(windows):
            for y in range(end - start):
                x = start + bijection(y, end - start, key_of(seed, epoch, 2, lane, number))
                sequence.append(block[x // m * lanes + lane] * m + x % m)
        lane_sequences.append(sequence)
    out = []
    for turn in range(used // c):
        for lane in range(lanes):
            out += lane_sequences[lane][turn * c : (turn + 1) * c]
    rest = [sample for sequence in lane_sequences for sample in sequence[used:]]
    for n in range(per_lane * lanes, full):
        rest += range(block[n] * m, block[n] * m + m)
    rest += range(full * m, samples)
    runs = len(rest) // g
    for i in range(runs):
        run = bijection(i, runs, key_of(seed, epoch, 3))
        out += rest[run * g : (run + 1) * g]
    return out + rest[runs * g :]


# -- laws ---------------------------------------------------------------------------------------------

seeds = st.integers(0, MASK)
specs = st.builds(
    OrderSpec,
    st.sampled_from(["block", "block", "block", "full", "shard", "none"]),
    seeds,
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 9),
)
counts = st.lists(st.integers(0, 400), max_size=6).map(lambda values: np.array(values, dtype=np.int64))


@given(counts, specs, st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_every_order_is_a_bijection_with_its_inverse(counts, spec, epoch):
    order = make_order(counts, spec)
    positions = np.arange(order.size, dtype=np.int64)
    samples = order.samples_at(positions, epoch)
    assert np.array_equal(np.sort(samples), positions)
    assert np.array_equal(order.positions_of(samples, epoch), positions)
    pick = positions[::-3]
    assert np.array_equal(order.samples_at(pick, epoch), samples[pick])


@given(
    st.integers(0, 700), st.integers(1, 30), st.integers(1, 9), st.integers(1, 20), st.integers(1, 5), st.integers(1, 7), seeds
)
@settings(max_examples=40, deadline=None)
def test_block_order_is_what_the_specification_says(samples, m, lanes, c, w, g, seed):
    order = BlockOrder(samples, OrderSpec("block", seed, m, lanes, c, w, g))
    assert order.samples_at(np.arange(samples, dtype=np.int64), 3).tolist() == block_order(samples, m, lanes, c, w, g, seed, 3)


@given(st.integers(1, 1 << 62), seeds, st.lists(st.integers(0, MASK), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_permutation_inverts_and_agrees_with_plain_integers(size, key, raw):
    values = np.array([value % size for value in raw], dtype=np.int64)
    image = permute(values, size, key)
    assert ((image >= 0) & (image < size)).all()
    assert np.array_equal(unpermute(image, size, key), values)
    assert image.tolist() == [bijection(value, size, key) for value in values.tolist()]


@given(st.integers(1, 3000), st.integers(0, MASK), st.booleans())
@settings(max_examples=40, deadline=None)
def test_values_walked_few_at_a_time_land_where_many_do(size, key, mixed):
    values = np.arange(size, dtype=np.int64)
    sizes = np.arange(size, dtype=np.int64) // 7 * 5 + 1 + values if mixed else size
    keys = derive_each(key, values) if mixed else key
    many, permutation._FEW = permutation._FEW, 0
    try:
        want = permute(values, sizes, keys)
    finally:
        permutation._FEW = many
    assert np.array_equal(permute(values, sizes, keys), want)


def test_keys_of_columns_are_the_keys_of_their_rows():
    lanes, numbers = np.array([0, 1, 5], dtype=np.int64), np.array([7, 0, 2], dtype=np.int64)
    keys = derive_each(derive(3, 4), lanes, numbers)
    assert keys.tolist() == [key_of(3, 4, lane, number) for lane, number in zip(lanes.tolist(), numbers.tolist(), strict=True)]


def test_blocks_are_needed_only_inside_their_window():
    order = BlockOrder(5000, OrderSpec("block", 9, 10, 7, 5, 4, 3))
    positions = np.arange(5000, dtype=np.int64)
    samples = order.samples_at(positions, 0)
    units = order.units(positions, samples, 0)
    in_block = units.length > 0
    assert in_block.sum() == order.lane_samples
    assert (units.start[in_block] == samples[in_block] // 10 * 10).all()
    for start in np.unique(units.start[in_block]):
        here = in_block & (units.start == start)
        assert len(np.unique(units.until[here])) == 1
        assert positions[here].max() < units.until[here][0]


@pytest.mark.parametrize("size", [2, 3, 5, 6, 16, 40, 70])
def test_a_shuffled_order_is_uniform(size):
    """Over 10,000 seeds every sample stands at every position equally often (fewer rounds or bits fail here)."""
    trials = 10_000
    keys = derive_each(0, np.repeat(np.arange(trials, dtype=np.int64), size))
    values = np.tile(np.arange(size, dtype=np.int64), trials)
    hits = np.zeros((size, size), dtype=int)
    np.add.at(hits, (values, permute(values, size, keys)), 1)
    chi2, freedom = ((hits - trials / size) ** 2 / (trials / size)).sum(), (size - 1) ** 2
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


GOLDEN = {
    ("block", 0): "91e4a5d5442831f5",
    ("block", 1): "c28513a61d398a2d",
    ("full", 0): "775266fb6235f353",
    ("shard", 0): "8d15b06c332ca8d9",
    ("none", 0): "5cbf1e9ecdfb0b6a",
}


@pytest.mark.parametrize(("shuffle", "epoch"), GOLDEN)
def test_golden_digests(shuffle, epoch):
    """If one of these changes, every saved state in the world breaks: raise ALGORITHM instead."""
    shards = np.array([1000, 0, 2345, 77, 4000, 1], dtype=np.int64)
    spec = OrderSpec(shuffle, 123456789, block=48, lanes=6, chunk=16, window=3, run=5)
    order = make_order(shards, spec)
    samples = order.samples_at(np.arange(order.size, dtype=np.int64), epoch)
    assert hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest()[:16] == GOLDEN[shuffle, epoch]


def test_a_billion_samples_in_a_hundred_thousand_shards_need_no_memory_of_their_own():
    shards = np.full(100_000, 10_000, dtype=np.int64)
    spec = choose_spec(10**9, 10**9 * 4096, batch_size=32, world_size=64)
    order = make_order(shards, spec)
    positions = np.array([0, 1, 999_999_999, 123_456_789], dtype=np.int64)
    samples = order.samples_at(positions, 7)
    assert np.array_equal(order.positions_of(samples, 7), positions)
    held = sum(value.nbytes for value in vars(order).values() if isinstance(value, np.ndarray))
    assert held == 0


# -- specs --------------------------------------------------------------------------------------------


@given(st.integers(0, 10**9), st.integers(1, 10**7), st.integers(1, 4096), st.integers(1, 64))
@settings(max_examples=50, deadline=None)
def test_chosen_specs_are_valid_and_bounded(samples, average, batch_size, world_size):
    spec = choose_spec(samples, samples * average, batch_size=batch_size, world_size=world_size, seed=-1)
    assert spec.seed == MASK
    assert spec.block == 1 or spec.block * spec.window * average <= 17 << 20
    assert OrderSpec.from_dict(spec.as_dict()) == spec


def test_a_small_sorted_dataset_is_mixed_well_by_default():
    """1,797 samples sorted into ten classes: a batch of 32 must see several of them."""
    spec = choose_spec(1797, 1797 * 600, batch_size=32)
    samples = BlockOrder(1797, spec).samples_at(np.arange(1792, dtype=np.int64), 0)
    classes = (samples // 180).reshape(-1, 32)
    assert np.mean([len(set(batch)) for batch in classes.tolist()]) > 5


@pytest.mark.parametrize(
    "change", [{"shuffle": "random"}, {"block": 0}, {"lanes": -1}, {"chunk": 1.5}, {"seed": 1 << 64}, {"window": True}]
)
def test_impossible_specs_are_refused(change):
    with pytest.raises((PlanError, ConfigError)):
        OrderSpec(**change)
