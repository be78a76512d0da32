"""Real DataLoader processes: every start method, exact resume with other workers, errors that arrive whole."""

import os
import traceback

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch_helpers import content, number, numbered, numbers, sequence

from s3loader import open_store
from s3loader.errors import ConfigError, IntegrityError, SampleError, StateMismatchError
from s3loader.loader import read_quarantine
from s3loader.testing import write_sharded_dataset
from s3loader.torch import S3DataLoader, S3IterableDataset, S3MapDataset

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SAMPLES = 300


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return numbered(tmp_path_factory.mktemp("torch"), SAMPLES)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_plain_dataloader_gives_the_plan_under_every_start_method(url, method):
    dataset = S3IterableDataset(url, batch_size=16)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=method)
    assert len(loader) == 19
    batches = list(loader)
    assert all(isinstance(sample, torch.Tensor) and sample.dtype == torch.uint8 for sample in batches[0])
    assert numbers(batches) == sequence(url, batch_size=16)
    assert all(bytes(s.numpy()) == content(number(s)) for b in batches for s in b)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_thread_mode_is_process_mode(url, workers):
    loader = S3DataLoader(url, batch_size=7, num_workers=workers, seed=4)
    assert numbers(loader) == sequence(url, batch_size=7, seed=4)
    assert numbers(loader) == sequence(url, batch_size=7, seed=4, epoch=1)
    assert loader.stats.samples == 2 * SAMPLES


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 3), (3, 2)])
def test_resume_is_exact_with_other_workers_and_batch_size(url, before, after):
    first = S3DataLoader(url, batch_size=8, num_workers=before, prefetch_factor=4 if before else None)
    batches = iter(first)
    head = numbers(next(batches) for _ in range(11))
    state = first.state_dict()
    assert state["consumed"] == 88
    del batches
    second = S3DataLoader(url, batch_size=5, num_workers=after)
    second.load_state_dict(state)
    assert second.remaining == 43
    assert head + numbers(second) == sequence(url, batch_size=8)
    assert second.epoch == 0
    assert sorted(numbers(second)) == list(range(SAMPLES))  # the whole next epoch
    assert second.epoch == 1


def test_persistent_workers_follow_epochs_and_states(url):
    loader = S3DataLoader(url, batch_size=16, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        assert numbers(loader) == sequence(url, batch_size=16, epoch=epoch)
    loader.set_epoch(5)
    assert numbers(loader) == sequence(url, batch_size=16, epoch=5)
    state = loader.state_dict()
    loader.load_state_dict({**state, "epoch": 2, "consumed": 160})
    assert numbers(loader) == sequence(url, batch_size=16, epoch=2)[160:]
    plain = S3IterableDataset(url, batch_size=16)
    workers = DataLoader(plain, batch_size=None, num_workers=2, persistent_workers=True)
    assert numbers(workers) == numbers(workers) == sequence(url, batch_size=16)
    plain.set_epoch(3)
    assert numbers(workers) == sequence(url, batch_size=16, epoch=3)


def test_a_plain_dataloader_resumes_from_the_number_of_batches(url):
    dataset = S3IterableDataset(url, batch_size=16)
    batches = iter(DataLoader(dataset, batch_size=None, num_workers=2))
    head = numbers(next(batches) for _ in range(5))
    again = S3IterableDataset(url, batch_size=16)
    again.load_state_dict(dataset.state_after(5))
    assert head + numbers(DataLoader(again, batch_size=None, num_workers=1)) == sequence(url, batch_size=16)


def test_without_a_batch_size_torch_makes_the_batches_and_nothing_is_lost_or_doubled(url):
    dataset = S3IterableDataset(url, return_type="bytes", transform=len)
    loader = DataLoader(dataset, batch_size=10, num_workers=2)
    values = sorted(int(v) for batch in loader for v in batch)
    assert values == sorted(len(content(i)) for i in range(SAMPLES))
    with pytest.raises(ConfigError, match="cannot know what they have delivered"):
        dataset.state_dict()
    with pytest.raises(ConfigError, match="batch size"):
        dataset.state_after(3)
    with pytest.raises(ConfigError, match="batch size"):
        S3DataLoader(dataset)
    assert len(numbers(S3DataLoader(S3IterableDataset(url), batch_size=10))) == SAMPLES


def test_ranks_from_arguments_environment_and_no_sharding(url, monkeypatch):
    parts = [numbers(S3DataLoader(url, batch_size=10, rank=r, world_size=3)) for r in range(3)]
    assert sorted(i for part in parts for i in part) == list(range(SAMPLES))
    dataset = S3IterableDataset(url, batch_size=10)  # built before the ranks are known
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert numbers(dataset) == parts[1]
    assert numbers(DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn")) == parts[1]
    assert sorted(numbers(S3IterableDataset(url, batch_size=10, enable_sharding=False))) == list(range(SAMPLES))
    with pytest.raises(ConfigError):
        list(S3IterableDataset(url, batch_size=10, rank=1))


@pytest.mark.parametrize(("kind", "check"), [
    ("tensor", lambda s: isinstance(s, torch.Tensor)),
    ("bytes", lambda s: type(s) is bytes and s[0:1] == b"0"),
    ("reader", lambda s: s.key.endswith(".bin") and s.read(3) == b"000" and s.seek(0) == 0),
    ("sample", lambda s: bytes(s).startswith(b"000")),
])  # fmt: skip
@pytest.mark.parametrize("workers", [0, 2])
def test_return_types(url, kind, check, workers):
    batches = list(S3DataLoader(url, batch_size=9, num_workers=workers, return_type=kind))
    assert all(check(sample) for batch in batches for sample in batch)


@pytest.mark.parametrize("batch_size", [None, 9])
@pytest.mark.parametrize("workers", [0, 2])
def test_samples_stay_bytes_in_a_plain_dataloader(url, batch_size, workers):
    dataset = S3IterableDataset(url, batch_size=batch_size, return_type="sample")
    got = list(DataLoader(dataset, batch_size=None, num_workers=workers))
    samples = got if batch_size is None else [sample for batch in got for sample in batch]
    assert {type(sample) for sample in samples} == {bytes}
    assert sorted(int(sample[:6]) for sample in samples) == list(range(SAMPLES))


def test_collated_batches_are_tensors(url):
    fixed = S3DataLoader(url, batch_size=12, num_workers=2, collate="fixed", decode=head_as_array)
    batch = next(iter(fixed))
    assert batch.shape == (12, 6)
    assert batch.dtype == torch.int64
    ragged = next(iter(S3DataLoader(url, batch_size=12, collate="ragged")))
    assert [bytes(row.numpy()) for row in ragged.rows()] == [content(number(row)) for row in ragged.rows()]


def head_as_array(data):
    return np.frombuffer(data[:6], dtype=np.uint8).astype(np.int64)


def fail_on_77(sample):
    if number(sample) == 77:
        raise ValueError("seventy-seven")
    return sample


@pytest.mark.parametrize("workers", [0, 2])
def test_a_transform_that_raises_reaches_the_consumer_with_its_place(url, workers):
    loader = S3DataLoader(url, batch_size=16, num_workers=workers, transform=fail_on_77)
    got = []
    with pytest.raises(SampleError, match="seventy-seven") as caught:
        got.extend(number(s) for batch in loader for s in batch)
    expected = sequence(url, batch_size=16)
    position = expected.index(77)
    assert got == expected[: position // 16 * 16]
    assert caught.value.position == position
    assert caught.value.member == "s00077.bin"
    assert caught.value.shard == "shards/shard-000001.tar"
    state = loader.state_dict()
    assert state["consumed"] == len(got)
    # a plain DataLoader keeps type and text
    dataset = S3IterableDataset(url, batch_size=16, transform=fail_on_77)
    with pytest.raises(SampleError, match=r"s00077\.bin") as caught:
        list(DataLoader(dataset, batch_size=None, num_workers=workers))
    traceback.clear_frames(caught.tb)  # torch's iterator ends its workers slowly if the garbage collector finds it


def test_bad_samples_skipped_or_replaced_are_listed(url):
    skip = S3DataLoader(url, batch_size=16, num_workers=2, transform=fail_on_77, on_error="skip")
    got = numbers(skip)
    assert got == [i for i in sequence(url, batch_size=16) if i != 77]
    assert [entry.key for entry in skip.quarantine] == ["shards/shard-000001.tar#s00077.bin"]
    replace = S3DataLoader(url, batch_size=16, num_workers=1, transform=fail_on_77, on_error="replace")
    got = [[number(s) for s in batch] for batch in replace]
    assert [len(batch) for batch in got] == [16] * 18 + [12]
    flat = [i for batch in got for i in batch]
    assert 77 not in flat
    assert flat == numbers(S3DataLoader(url, batch_size=16, transform=fail_on_77, on_error="replace"))


def test_a_flipped_bit_in_a_shard_is_an_integrity_error_in_order(url, tmp_path):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, ((f"s{i:05d}.bin", content(i)) for i in range(100)), per_shard=50)
    path = tmp_path / "shards" / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"000060-")] ^= 1
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(IntegrityError, match=r"s00060\.bin") as caught:
        list(S3DataLoader(f"{tmp_path.as_uri()}/manifest.jsonl", batch_size=8, num_workers=2))
    assert caught.value.shard == "shards/shard-000001.tar"
    assert caught.value.position >= 0


def test_a_state_of_another_dataset_is_refused_where_it_is_loaded(url, tmp_path):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, [("a.bin", b"x")] * 1, per_shard=1)
    loader = S3DataLoader(url, batch_size=8)
    with pytest.raises(StateMismatchError, match="dataset"):
        loader.load_state_dict(S3DataLoader(f"{tmp_path.as_uri()}/manifest.jsonl", batch_size=8).state_dict())
    loader.load_state_dict(loader.state_dict())


def test_skipped_steps_are_of_the_first_epoch_only(url):
    loader = S3DataLoader(url, batch_size=10, num_workers=1, skip_steps=[(1, 3)])
    whole = sequence(url, batch_size=10)
    assert numbers(loader) == whole[:10] + whole[30:]
    assert numbers(loader) == sequence(url, batch_size=10, epoch=1)


def test_map_dataset_reads_any_sample_and_whole_batches(url):
    dataset = S3MapDataset(url)
    assert len(dataset) == SAMPLES
    assert bytes(dataset[250].numpy()) == content(250)
    assert bytes(dataset[-1].numpy()) == content(299)
    assert numbers([dataset.__getitems__([5, 299, 5, 0])]) == [5, 299, 5, 0]
    with pytest.raises(IndexError):
        dataset[SAMPLES]
    loader = DataLoader(S3MapDataset(url, transform=number), batch_size=32, shuffle=True, num_workers=2)
    assert sorted(int(v) for batch in loader for v in batch) == list(range(SAMPLES))


def test_from_prefix_and_from_objects_are_called_as_s3torchconnector_calls_them(tmp_path):
    store = open_store(tmp_path.as_uri())
    for i in range(7):
        store.put(f"img/{i}.bin", content(i))
    dataset = S3IterableDataset.from_prefix(
        f"{tmp_path.as_uri()}/img", region="us-east-1", transform=lambda reader: (reader.key, reader.read())
    )
    assert list(dataset) == [(f"{i}.bin", content(i)) for i in range(7)]
    uris = [f"{tmp_path.as_uri()}/img/{i}.bin" for i in (3, 1, 3)]
    readers = list(S3IterableDataset.from_objects(uris, region="us-east-1", enable_sharding=True))
    assert [reader.read() for reader in readers] == [content(i) for i in (3, 1, 3)]
    mapped = S3MapDataset.from_objects(uris, region="us-east-1")
    assert mapped[1].read() == content(1)


def test_pin_memory_walks_through_our_batches(url):
    loader = S3DataLoader(url, batch_size=16, num_workers=0, pin_memory=False)
    assert len(next(iter(loader))) == 16


def test_len_is_the_whole_epoch_and_remaining_what_is_left(url):
    loader = S3DataLoader(url, batch_size=16)
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    resumed = S3DataLoader(url, batch_size=16)
    resumed.load_state_dict(loader.state_dict())
    assert (len(resumed), resumed.remaining) == (19, 14)
    assert len(list(resumed)) == 14
    after = S3DataLoader(url, batch_size=16)
    after.load_state_dict(resumed.state_dict())
    assert after.remaining == len(list(after)) == 19


class RefuseSome:
    def __init__(self, *bad):
        self.bad = bad

    def __call__(self, sample):
        if number(sample) in self.bad:
            raise ValueError("refused")
        return sample


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_steps_that_are_skipped_whole_move_neither_the_order_nor_the_state(tmp_path, workers):
    small = numbered(tmp_path, 13)
    bad = (1, 5, 12)  # one each of two workers, and the last step of all
    options = {"batch_size": 1, "shuffle": "none", "on_error": "skip", "transform": RefuseSome(*bad)}
    good = [i for i in range(13) if i not in bad]
    loader = S3DataLoader(small, num_workers=workers, **options)
    seen = [(number(batch[0]), loader.state_dict()["consumed"]) for batch in loader]
    assert seen == [(i, i + 1) for i in good]
    assert [entry.sample for entry in loader.quarantine] == list(bad)
    assert loader.stats.skipped == 3
    for stop in (1, 4, 9):
        first = S3DataLoader(small, num_workers=workers, **options)
        batches = iter(first)
        head = numbers(next(batches) for _ in range(stop))
        state = first.state_dict()
        batches.close()
        second = S3DataLoader(small, num_workers=0 if workers else 2, **options)
        second.load_state_dict(state)
        assert head + numbers(second) == good


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_workers_leave_out_is_kept_where_the_options_say(url, tmp_path, method):
    kept = (tmp_path / "left-out").as_uri()
    options = {"batch_size": 8, "on_error": "replace", "transform": RefuseSome(3, 77, 150), "quarantine": kept}
    loader = S3DataLoader(url, num_workers=2, multiprocessing_context=method, **options)
    assert len(numbers(loader)) == SAMPLES
    table = read_quarantine(kept)
    assert sorted(table) == sorted(loader.quarantine)
    assert sorted(entry.sample for entry in table) == [3, 77, 150]
    plain = DataLoader(S3IterableDataset(url, **options), batch_size=None, num_workers=2)
    plain.dataset.set_epoch(1)
    assert len(numbers(plain)) == SAMPLES
    assert [entry.epoch for entry in read_quarantine(kept)] == [0] * 3 + [1] * 3
    assert sorted(numbers(S3DataLoader(url, batch_size=8, exclude=read_quarantine(kept)))) == [
        i for i in range(SAMPLES) if i not in (3, 77, 150)
    ]
