"""Mixtures: weights hold in every window, nothing is lost, and they resume like any other plan."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.errors import PlanError
from s3loader.plan import Catalog, OrderSpec, Topology, mix
from s3loader.plan.mixture import MixtureOrder, deal, quotas
from s3loader.plan.order import make_order


def make_mix(sizes, **options):
    catalogs = [Catalog(np.array([size], dtype=np.int64), size * 100, f"d{size}") for size in sizes]
    specs = [OrderSpec("block", seed, 8, 2, 4, 2, 2) for seed in range(len(sizes))]
    return mix(catalogs, specs, **options)


def datasets_of(plan, sizes, epoch=0):
    samples = plan.samples_at(np.arange(plan.size, dtype=np.int64), epoch)
    return np.searchsorted(np.cumsum(sizes), samples, side="right"), samples


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_period_holds_its_quotas_and_no_prefix_is_off_by_one(counts):
    pattern, period = deal(counts), sum(counts)
    for d, n in enumerate(counts):
        prefix = np.cumsum(pattern == d)
        assert prefix[-1] == n
        assert (np.abs(prefix * period - np.arange(1, period + 1) * n) < period).all()


@given(st.lists(st.floats(0.5, 10), min_size=1, max_size=5), st.integers(0, 200))
@settings(max_examples=30, deadline=None)
def test_every_window_is_within_one_sample_of_the_weights(weights, at):
    sizes = [50 + 10 * d for d in range(len(weights))]
    plan = make_mix(sizes, weights=weights, period=120, length=600)
    dataset, _ = datasets_of(plan, sizes)
    window = dataset[at : at + 120]
    for d, weight in enumerate(weights):
        assert abs((window == d).sum() - 120 * weight / sum(weights)) <= 1


def test_quotas_are_exact_where_they_can_be():
    assert quotas([0.5, 0.3, 0.2]) == (5, 3, 2)
    assert quotas([1, 1]) == (1, 1)
    assert quotas([2.0]) == (1,)
    for bad in ([], [0.0], [1, -1], [1, float("nan")], [1, float("inf")], [1, 1e-5]):
        with pytest.raises(PlanError):
            quotas(bad)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_lengths_and_accounting(epoch):
    sizes = [100, 30]
    everything = make_mix(sizes, weights=[1, 1])
    _, samples = datasets_of(everything, sizes, 0)
    assert set(samples.tolist()) == set(range(130))
    assert make_mix(sizes, weights=[1, 1], length="first").size < 62
    plan = make_mix(sizes, weights=[3, 1], length=50)
    _, samples = datasets_of(plan, sizes, epoch)
    assert len(samples) == 50
    # The big dataset goes on where the last epoch stopped: three epochs of 50 * 3/4 see it whole, once.
    seen = [s for e in range(2) for d, s in zip(*datasets_of(plan, sizes, e), strict=True) if d == 0]
    assert len(seen) == len(set(seen))


@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_positions_of_finds_the_first_occurrence(epoch, a, b):
    sizes = [40, 25]
    plan = make_mix(sizes, weights=[a, b], length=70)
    samples = plan.samples_at(np.arange(70, dtype=np.int64), epoch).tolist()
    found = plan.order.positions_of(np.arange(65, dtype=np.int64), epoch).tolist()
    assert found == [samples.index(s) if s in samples else -1 for s in range(65)]


def test_ranks_and_workers_slice_a_mixture_too():
    plan = make_mix([90, 41], weights=[2, 1])
    expected = plan.samples_at(np.arange(plan.size, dtype=np.int64), 2).tolist()
    assert [s for b in plan.batches(2, Topology(), 7) for s in b.tolist()] == expected
    parts = [s for r in range(3) for w in range(2) for b in plan.batches(2, Topology(r, 3, w, 2), 5) for s in b.tolist()]
    assert sorted(parts) == sorted(expected)


def test_units_of_a_mixture_cover_their_samples():
    orders = [make_order(np.array([n], dtype=np.int64), OrderSpec("block", n, 6, 2, 3, 2, 2)) for n in (80, 50)]
    order = MixtureOrder(orders, (2, 1), "all")
    positions = np.arange(order.size, dtype=np.int64)
    samples = order.samples_at(positions, 1)
    units = order.units(positions, samples, 1)
    inside = units.length > 0
    assert inside.any()
    assert ((samples >= units.start) & (samples < units.start + units.length))[inside].all()
    assert (positions < units.until)[inside].all()


def test_golden_digest_of_a_mixture():
    """See the golden digests of the orders."""
    plan = make_mix([500, 300, 20], weights=[0.6, 0.35, 0.05])
    samples = plan.samples_at(np.arange(plan.size, dtype=np.int64), 2)
    assert hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest()[:16] == "b353082b7983f22b"


def test_an_empty_or_mismatched_mixture_is_refused():
    for sizes, options in (([], {}), ([0, 5], {}), ([5, 5], {"weights": [1]}), ([5], {"length": 0})):
        with pytest.raises(PlanError):
            make_mix(sizes, **options)
