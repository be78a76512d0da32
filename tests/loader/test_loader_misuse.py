"""What people do to a loader in the middle of an iteration, and functions of theirs that fail."""

import asyncio
import threading

import pytest

from s3loader import open_store
from s3loader.adapters import Cursor
from s3loader.errors import ConfigError, PlanError, SampleError, StateMismatchError
from s3loader.exchange import publish_manifest
from s3loader.loader import Loader, from_manifest, mix_datasets
from s3loader.store.buffers import shared_pool
from s3loader.testing import write_shard, write_sharded_dataset

SAMPLES = 120


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    store = open_store(tmp_path_factory.mktemp("misuse").as_uri())
    write_sharded_dataset(store, ((f"s{i:05d}.bin", b"%06d" % i) for i in range(SAMPLES)), per_shard=40)
    return from_manifest("manifest.jsonl", store=store)


def numbers(batches):
    return [int(bytes(sample[:6])) for batch in batches for sample in batch]


def fails(_sample):
    raise ValueError("no")


def test_an_epoch_chosen_in_the_middle_is_the_next_one_and_what_the_old_one_delivers_does_not_count(dataset):
    loader = Loader(dataset, batch_size=8)
    batches = iter(loader)
    next(batches)
    loader.set_epoch(7)
    next(batches)
    assert (loader.state_dict()["epoch"], loader.state_dict()["consumed"]) == (7, 0)
    list(batches)
    assert numbers(loader) == numbers(Loader(dataset, batch_size=8, epoch=7))
    assert loader.epoch == 7


def test_a_state_loaded_in_the_middle_holds_though_the_old_iteration_comes_to_its_end(dataset):
    whole = numbers(Loader(dataset, batch_size=8))
    loader = Loader(dataset, batch_size=8)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    next(batches)
    loader.load_state_dict(state)
    next(batches)
    assert loader.state_dict() == state
    list(batches)
    assert numbers(loader) == whole[8:]


def test_iterators_side_by_side_and_in_threads_have_an_epoch_each(dataset):
    loader = Loader(dataset, batch_size=8)
    epochs = [numbers(loader) for _ in range(3)]
    loader = Loader(dataset, batch_size=8)
    pairs = list(zip(loader, loader, strict=True))
    assert [numbers(one for one, _ in pairs), numbers(two for _, two in pairs)] == epochs[:2]
    loader, got, all_begun = Loader(dataset, batch_size=8), {}, threading.Barrier(3)

    def run(i):
        batches = iter(loader)
        head = next(batches)
        all_begun.wait(600)
        got[i] = numbers([head, *batches])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got.values()) == sorted(epochs)


def test_a_cancelled_async_iteration_is_cancelled(dataset):
    inside, go_on = threading.Event(), threading.Event()

    def waits(sample):
        inside.set()
        go_on.wait(600)
        return sample

    async def cancelled():
        async def consume():
            async for _ in Loader(dataset, batch_size=8, transform=waits):
                pass

        task = asyncio.create_task(consume())
        await asyncio.to_thread(inside.wait, 600)
        task.cancel()
        asyncio.get_running_loop().call_later(0.01, go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())


def test_a_collate_that_fails_is_told_with_its_place(dataset):
    def collate(samples):
        if len(samples) and numbers([samples])[0] == 16:
            return next(iter(()))  # StopIteration must not end the epoch
        return samples

    got, loader = [], Loader(dataset, batch_size=8, shuffle="none", collate=collate)
    with pytest.raises(SampleError, match=r"collate failed: StopIteration.*positions 16 to 23 of epoch 0") as caught:
        got.extend(number for batch in loader for number in numbers([batch]))
    assert got == list(range(16))
    assert (caught.value.shard, caught.value.member, caught.value.position) == ("shards/shard-000000.tar", "s00016.bin", 16)
    with pytest.raises(SampleError, match=r"size \[shards/shard-000000\.tar#s00001\.bin, position 1 of epoch 0\]"):
        list(
            Loader(dataset, batch_size=2, shuffle="none", transform=lambda s: bytes(s) * (1 + int(s[-1:]) % 2), collate="fixed")
        )


def test_an_epoch_of_which_every_sample_was_skipped_is_an_error(dataset):
    loader = Loader(dataset, batch_size=8, transform=fails, on_error="skip")
    with pytest.raises(SampleError, match=r"every sample of epoch 0 was skipped; the first failure: .*no"):
        list(loader)
    assert len(loader.quarantine) == SAMPLES
    assert list(Loader(dataset, batch_size=8, transform=fails, on_error="skip", allow_empty=True)) == []


def test_a_rest_of_an_epoch_may_be_skipped_whole(dataset):
    def last_fail(sample):
        return fails(sample) if int(bytes(sample[:6])) >= SAMPLES - 8 else sample

    first = Loader(dataset, batch_size=8, shuffle="none", transform=last_fail, on_error="skip")
    batches = iter(first)
    for _ in range(SAMPLES // 8 - 1):
        next(batches)
    resumed = Loader(dataset, batch_size=8, shuffle="none", transform=last_fail, on_error="skip")
    resumed.load_state_dict(first.state_dict())
    assert list(resumed) == []


def test_no_replacement_is_a_sample_that_was_excluded(dataset):
    excluded = set(range(40))
    loader = Loader(
        dataset,
        batch_size=8,
        exclude=[f"shards/shard-000000.tar#s{i:05d}.bin" for i in excluded],
        transform=lambda sample: fails(sample) if int(bytes(sample[:6])) % 3 == 1 else sample,
        on_error="replace",
    )
    got = numbers(loader)
    assert len(got) == SAMPLES - 40
    assert not excluded & set(got)


@pytest.mark.parametrize("epoch", [-1, 1 << 70, 1.5, "1", None, True])
def test_an_epoch_that_no_state_could_hold_is_refused(dataset, epoch):
    with pytest.raises(ConfigError, match="an epoch is a whole number from 0"):
        Loader(dataset, batch_size=8, epoch=epoch)
    with pytest.raises(ConfigError, match="an epoch is a whole number from 0"):
        Cursor().set_epoch(epoch)


def test_a_rank_has_at_least_one_worker_to_be_explained(dataset):
    with pytest.raises(ConfigError, match="at least one worker"):
        Loader(dataset, batch_size=8).explain(workers=0)


def test_buffers_that_wait_for_their_size_to_come_again_count_as_memory(tmp_path):
    """Ranges of all sizes: what the pool keeps of each must not come on top of the limit, epoch after epoch."""
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, ((f"s{i:05d}.bin", bytes(1000 + 2731 * (i % 37))) for i in range(600)), per_shard=150)
    loader = Loader(from_manifest("manifest.jsonl", store=store), batch_size=8, memory_limit="4MiB", prefetch="4MiB")
    shared_pool().clear()
    kept = [shared_pool().kept_bytes for _ in range(3) for _ in loader]
    assert max(kept) <= 4 << 20


@pytest.mark.parametrize(
    "options",
    [{"seed": "x"}, {"seed": None}, {"seed": 1.5}, {"skip_steps": [(-3, 2)]}, {"skip_steps": [(5, 2)]}],
)
def test_numbers_that_make_no_order_or_a_state_nobody_can_load_are_refused(dataset, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Loader(dataset, batch_size=8, **options)


def test_mixtures_say_what_is_wrong_with_them(dataset):
    empty = from_manifest("manifest.jsonl", store=dataset.store, where=lambda _entry: False)
    with pytest.raises(PlanError, match=r"there is nothing in .*manifest\.jsonl"):
        mix_datasets([dataset, empty])
    for length in ("some", 1.5, True):
        with pytest.raises((PlanError, ConfigError), match=r"a mixture of|length takes"):
            len(Loader(mix_datasets([dataset, dataset], weights=[1, 1], length=length), batch_size=8))


def test_a_state_of_half_a_position_is_refused(dataset):
    state = Loader(dataset, batch_size=8).state_dict()
    with pytest.raises(StateMismatchError, match="not a whole number"):
        Loader(dataset, batch_size=8).load_state_dict({**state, "consumed": 1.5})


def test_archives_and_members_with_marks_in_their_names_are_found_and_named(tmp_path):
    store = open_store(tmp_path.as_uri())
    members = [("a#b.bin", b"0"), ("#", b"1"), ("##x", b"2"), ("plain.bin", b"3"), ("ünï/日本.bin", b"4")]
    publish_manifest(store, "m.jsonl", [write_shard(store, key, members) for key in ("sh#ard.tar", "sh", "ü x.tar")])
    dataset = from_manifest("m.jsonl", store=store)
    loader = Loader(dataset, batch_size=4)
    places = [place for batch in loader.iter_batches() for place in batch.places()]
    assert len(places) == 15
    assert [dataset.find(place.key) for place in places] == [place.sample for place in places]
    with pytest.raises(SampleError) as caught:
        list(Loader(dataset, batch_size=1, shuffle="none", transform=fails))
    assert (caught.value.shard, caught.value.member) == ("sh#ard.tar", "a#b.bin")
