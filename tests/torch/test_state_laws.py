"""The laws of states, over everything that loads: what is loaded and not yet started has the state that was loaded; what is
delivered before and after a save is the epoch, however often; and an epoch that was resumed once is whole the next time."""

import itertools
import traceback

import pytest
from torch.utils.data import DataLoader
from torch_helpers import numbered, numbers, sequence

from s3loader.errors import ConfigError, StateMismatchError
from s3loader.loader import GrainSource, Loader, from_manifest
from s3loader.torch import S3DataLoader, S3IterableDataset

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create", "ignore::FutureWarning", "ignore:'set_vital' is deprecated"
)

SAMPLES, BATCH = 26, 4
BATCHES = 7


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return numbered(tmp_path_factory.mktemp("laws"), SAMPLES)


def as_list(samples):
    return samples


class Core:
    """Everything that counts for itself: a state, and the next iteration is of the next epoch."""

    advances = True

    def __init__(self, url, workers=0, **options):
        self.url, self.workers, self.options = url, workers, options

    def make(self):
        return Loader(from_manifest(self.url), batch_size=BATCH, **self.options)

    def state(self, loader, given=0):
        return loader.state_dict()

    def load(self, loader, state):
        loader.load_state_dict(state)

    def set_epoch(self, loader, epoch):
        loader.set_epoch(epoch)

    def order(self, epoch):
        return sequence(self.url, epoch, batch_size=BATCH)


class Counting(Core):
    def make(self):
        return S3DataLoader(self.url, batch_size=BATCH, num_workers=self.workers, **self.options)


class Jax(Core):
    def make(self):
        pytest.importorskip("jax")
        from s3loader.jax import S3JaxIterable

        return S3JaxIterable(self.url, batch_size=BATCH, collate=None, tail="short", **self.options)


class Plain(Core):
    """A plain DataLoader: the dataset has the state, and keeps the epoch."""

    advances = False

    def make(self):
        dataset = S3IterableDataset(self.url, batch_size=BATCH, yields=self.options.get("yields"))
        samples = dataset.yields == "samples"
        return DataLoader(
            dataset, batch_size=BATCH if samples else None, num_workers=self.workers, collate_fn=as_list if samples else None,
            persistent_workers=self.options.get("persistent", False),
        )  # fmt: skip

    def state(self, loader, given=0):
        return loader.dataset.state_after(given)

    def load(self, loader, state):
        loader.dataset.load_state_dict(state)

    def set_epoch(self, loader, epoch):
        loader.dataset.set_epoch(epoch)


class Stateful(Core):
    """torchdata's: a state for each worker."""

    advances = False
    batch = BATCH

    def make(self):
        stateful = pytest.importorskip("torchdata.stateful_dataloader")
        dataset = S3IterableDataset(self.url, batch_size=BATCH, yields=self.options.get("yields"))
        samples = dataset.yields == "samples"
        return stateful.StatefulDataLoader(
            dataset, batch_size=BATCH if samples else None, num_workers=self.workers, collate_fn=as_list if samples else None,
            persistent_workers=self.options.get("persistent", False),
        )  # fmt: skip

    def set_epoch(self, loader, epoch):
        loader.dataset.set_epoch(epoch)


KINDS = {
    "Loader": (Core, {}),
    "S3JaxIterable": (Jax, {}),
    "S3DataLoader-0": (Counting, {}),
    "S3DataLoader-1": (Counting, {"workers": 1}),
    "S3DataLoader-2": (Counting, {"workers": 2, "persistent_workers": True}),
    "DataLoader-0": (Plain, {}),
    "DataLoader-1": (Plain, {"workers": 1, "persistent": True}),
    "DataLoader-2": (Plain, {"workers": 2}),
    "DataLoader-2-samples": (Plain, {"workers": 2, "yields": "samples"}),
    "StatefulDataLoader-0": (Stateful, {}),
    "StatefulDataLoader-0-samples": (Stateful, {"yields": "samples"}),
    "StatefulDataLoader-1": (Stateful, {"workers": 1}),
    "StatefulDataLoader-2": (Stateful, {"workers": 2}),
    "StatefulDataLoader-2-samples": (Stateful, {"workers": 2, "yields": "samples", "persistent": True}),
}


@pytest.fixture(params=KINDS)
def kind(request, url):
    make, options = KINDS[request.param]
    return make(url, **options)


def take(loader, count):
    """So many batches of an iteration that is broken off then."""
    batches = iter(loader)
    got = [next(batches) for _ in range(count)]
    return batches, numbers(got)


@pytest.mark.parametrize("saves", [(0, 3), (2, 0, 1, 3)])
def test_what_is_delivered_before_and_after_any_saves_is_the_epoch(kind, saves):
    loader, got = kind.make(), []
    kind.set_epoch(loader, 1)
    for count in saves:
        if count:
            batches, part = take(loader, count)
            got += part
        state = kind.state(loader, count)
        batches = None  # ends its workers
        loader = kind.make()
        kind.load(loader, state)
        if not isinstance(kind, Stateful):
            assert kind.state(loader) == state
    assert got + numbers(loader) == kind.order(1)
    assert numbers(loader) == kind.order(1 + kind.advances)
    assert batches is None


def test_a_save_behind_the_last_batch_loses_and_repeats_nothing(kind):
    loader = kind.make()
    batches, got = take(loader, BATCHES)
    state = kind.state(loader, BATCHES)
    assert got == kind.order(0)
    del batches
    second = kind.make()
    kind.load(second, state)
    if isinstance(kind, Stateful):
        assert numbers(second) == []
        assert numbers(second) == kind.order(0)
        return
    assert kind.state(second) == state
    assert numbers(second) == kind.order(1)
    assert numbers(second) == kind.order(1 + kind.advances)
    # A trainer that asks for the epoch of the state gets what is left of it, and then the next one.
    third = kind.make()
    kind.load(third, state)
    for epoch, expected in ((0, []), (1, kind.order(1)), (2, kind.order(2))):
        kind.set_epoch(third, epoch)
        assert numbers(third) == expected


def test_states_are_the_same_with_and_without_workers(url):
    def states(kind):
        loader, seen = kind.make(), []
        for given, _ in enumerate(loader, 1):
            state = kind.state(loader, given)
            if isinstance(kind, Stateful):
                worker = state["_snapshot"]["_worker_snapshots"]["worker_0"] if kind.workers else state
                state = worker["fetcher_state"]["dataset_iter_state"]
            seen.append(state)
        return seen

    consumed = [4, 8, 12, 16, 20, 24, 26]
    for make, workers in ((Core, (0,)), (Counting, (0, 1, 2)), (Plain, (0, 1, 2)), (Stateful, (0, 1))):
        assert [[state["consumed"] for state in states(make(url, w))] for w in workers] == [consumed] * len(workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_save_right_after_a_resume_is_as_good_as_the_first(url, workers):
    kind = Stateful(url, workers)
    loader = kind.make()
    _, head = take(loader, 3)
    state = loader.state_dict()
    for begun in (False, True, True):
        loader = kind.make()
        loader.load_state_dict(state)
        batches = iter(loader) if begun else None
        state = loader.state_dict()
        del batches
    loader = kind.make()
    loader.load_state_dict(state)
    assert head + numbers(loader) == kind.order(0)


def test_samples_for_batches_of_any_size_resume_exactly_in_a_stateful_dataloader(url):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make(size=5, workers=2):
        return stateful.StatefulDataLoader(
            S3IterableDataset(url, order={"block": 4}), batch_size=size, num_workers=workers, collate_fn=as_list
        )

    whole = numbers(make())
    assert sorted(whole) == list(range(SAMPLES))
    loader = make()
    batches, head = take(loader, 3)
    state = loader.state_dict()
    second = make()
    second.load_state_dict(state)
    assert head + numbers(second) == whole
    for other in (make(workers=1), make(workers=3)):
        other.load_state_dict(state)
        with pytest.raises(StateMismatchError, match="other workers") as caught:
            list(other)
        traceback.clear_frames(caught.tb)  # torch's iterator ends its workers slowly if the garbage collector finds it
    assert batches is not None


def test_the_state_of_one_worker_is_not_taken_for_that_of_all(url):
    dataset = S3IterableDataset(url, batch_size=BATCH)
    with pytest.raises(StateMismatchError, match="one of 2 workers"):
        dataset.load_state_dict({**dataset.state_dict(), "worker_step": 2, "workers": 2})
    list(DataLoader(dataset, batch_size=None, num_workers=1))
    with pytest.raises(ConfigError, match="state_after"):
        dataset.state_dict()


def test_ranks_with_nothing_left_stay_in_the_epoch_of_the_others(url):
    state = {**Loader(from_manifest(url), batch_size=BATCH).state_dict(), "consumed": SAMPLES - 1}
    for make in (Core, Counting):
        ranks = [make(url, rank=rank, world_size=2).make() for rank in range(2)]
        for rank in ranks:
            rank.load_state_dict(state)
        assert [len(numbers(rank)) for rank in ranks] == [1, 0]
        assert [len(numbers(rank)) for rank in ranks] == [13, 13]
        assert [rank.epoch for rank in ranks] == [1, 1]


@pytest.mark.parametrize("make", [Core, Counting, Jax])
@pytest.mark.parametrize("on_break", ["next", "rest", "again"])
def test_what_follows_an_iteration_that_was_broken_off(url, make, on_break):
    kind = make(url, on_break=on_break)
    loader, epochs = kind.make(), [kind.order(epoch) for epoch in range(4)]
    parts = [numbers(itertools.islice(loader, 2)) for _ in range(4)]
    state = kind.state(loader)
    expected = {
        "next": [epoch[:8] for epoch in epochs],
        "rest": [epochs[0][:8], epochs[0][8:16], epochs[0][16:24], epochs[0][24:]],
        "again": [epochs[0][:8]] * 4,
    }[on_break]
    assert parts == expected
    # Whatever comes next here, a resume goes on with the rest.
    second = kind.make()
    second.load_state_dict(state)
    rest = {"next": epochs[3][8:], "rest": epochs[1], "again": epochs[0][8:]}[on_break]
    assert numbers(second) == rest
    loader.set_epoch(2)
    assert numbers(loader) == epochs[2]
    next(iter(loader))
    loader.load_state_dict(loader.state_dict())
    assert numbers(loader) == epochs[3][4:]


@pytest.mark.parametrize("make", [Core, Counting])
def test_an_iteration_that_failed_is_not_over(url, make):
    def fails_once(sample, seen=[]):  # noqa: B006 - counts calls
        seen.append(1)
        if len(seen) == 10:
            raise ValueError("once")
        return sample

    loader = make(url, transform=fails_once, decode="bytes").make()
    with pytest.raises(Exception, match="once"):
        list(loader)
    assert len(list(loader)) == BATCHES
    assert loader.epoch == 0


def test_grain_goes_on_where_it_stopped(url):
    grain = pytest.importorskip("grain")
    source = GrainSource(from_manifest(url))

    def batches():
        return iter(grain.MapDataset.source(source).seed(3).shuffle().batch(BATCH, batch_fn=list).to_iter_dataset())

    whole = numbers(batches())
    first = batches()
    head = [next(first) for _ in range(3)]
    second = batches()
    second.set_state(first.get_state())
    assert second.get_state() == first.get_state()
    assert numbers([*head, *second]) == whole


def test_lengths_are_right_or_there_is_none(url):
    unknown = S3IterableDataset(url)
    with pytest.raises(TypeError, match="yields="):
        len(unknown)
    with pytest.raises(TypeError, match="yields="):
        len(DataLoader(unknown, batch_size=BATCH, num_workers=2))
    for kind in ("batches", "samples"):
        for workers in (0, 1, 2, 3):
            dataset = S3IterableDataset(url, batch_size=BATCH, yields=kind)
            size = BATCH if kind == "samples" else None
            loader = DataLoader(dataset, batch_size=size, num_workers=workers, collate_fn=as_list)
            assert len(loader) == len(list(loader)) == BATCHES
    assert len(S3IterableDataset(url, batch_size=BATCH, yields="samples")) == SAMPLES
    assert len(S3IterableDataset(url, batch_size=BATCH, yields="samples", tail="drop")) == 24


def test_a_start_is_that_of_one_iteration_also_with_persistent_workers(url):
    for workers, persistent in ((0, False), (2, False), (2, True)):
        dataset = S3IterableDataset(url, batch_size=BATCH)
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=persistent)
        dataset.load_state_dict(dataset.state_after(3))
        assert len(loader) == BATCHES
        next(iter(loader))  # takes the start
        whole = sequence(url, batch_size=BATCH)
        assert numbers(loader) == whole
        dataset.load_state_dict(dataset.state_after(5))
        assert numbers(loader) == whole[20:]
        assert numbers(loader) == whole
