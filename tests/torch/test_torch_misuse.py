"""Batches that cannot be sent, workers that die and are needed again, several iterators at a time."""

import multiprocessing
import os
import signal

import pytest
from torch.utils.data import DataLoader
from torch_helpers import numbered, numbers, sequence

from s3loader.errors import ConfigError, SampleError, WorkerError
from s3loader.torch import S3DataLoader, S3IterableDataset

SAMPLES = 140


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return numbered(tmp_path_factory.mktemp("misuse"), SAMPLES)


def fails(_sample):
    raise ValueError("no")


def last_fail(sample):
    return fails(sample) if int(bytes(sample[:6].numpy())) >= SAMPLES - 16 else sample


def generator(sample):
    return (i for i in sample) if int(bytes(sample[:6].numpy())) == 20 else sample


def test_a_batch_that_cannot_be_sent_from_a_worker_is_an_error_and_no_hang(url):
    got, loader = [], S3DataLoader(url, batch_size=8, shuffle="none", num_workers=2, transform=generator, timeout=600)
    with pytest.raises(SampleError, match=r"cannot pickle 'generator' object \[positions 16 to 23") as caught:
        got.extend(number for batch in loader for number in numbers([batch]))
    assert got == list(range(16))
    assert caught.value.position == 16
    assert loader.state_dict()["consumed"] == 16


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_skipped_behind_the_last_batch_is_in_the_quarantine(url, workers):
    loader = S3DataLoader(url, batch_size=8, shuffle="none", num_workers=workers, transform=last_fail, on_error="skip")
    assert numbers(loader) == list(range(SAMPLES - 16))
    assert sorted(entry.sample for entry in loader.quarantine) == list(range(SAMPLES - 16, SAMPLES))
    assert loader.stats.skipped == 16


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_which_every_sample_was_skipped_is_an_error(url, workers):
    loader = S3DataLoader(url, batch_size=8, num_workers=workers, transform=fails, on_error="skip")
    with pytest.raises(SampleError, match="every sample of epoch 0 was skipped"):
        list(loader)
    assert len(loader.quarantine) == SAMPLES


def test_persistent_workers_that_died_are_started_anew(url):
    loader = S3DataLoader(url, batch_size=8, num_workers=2, persistent_workers=True)
    assert numbers(loader) == sequence(url, batch_size=8)
    batches = iter(loader)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerError):
        list(batches)
    assert numbers(loader) == sequence(url, epoch=1, batch_size=8)


def test_two_iterators_at_a_time_have_an_epoch_each_or_an_error(url):
    loader = S3DataLoader(url, batch_size=8, num_workers=1)
    pairs = list(zip(loader, loader, strict=True))
    assert numbers(one for one, _ in pairs) == sequence(url, batch_size=8)
    assert numbers(two for _, two in pairs) == sequence(url, epoch=1, batch_size=8)
    loader = S3DataLoader(url, batch_size=8, num_workers=1, persistent_workers=True)
    with pytest.raises(WorkerError, match="taken over"):
        list(zip(loader, loader, strict=True))


def test_workers_outlive_an_iteration_unless_told_otherwise(url):
    def workers(**options):
        loader = S3DataLoader(url, batch_size=8, num_workers=2, **options)
        seen = []
        for epoch in range(3):
            assert numbers(loader) == sequence(url, epoch=epoch, batch_size=8)
            seen.append({child.pid for child in multiprocessing.active_children()})
        return seen

    first, second, third = workers()
    assert first == second == third
    assert len(first) == 2
    assert workers(persistent_workers=False) == [set()] * 3


def test_two_iterators_over_one_dataset_begin_at_the_beginning_each(url):
    dataset = S3IterableDataset(url, batch_size=8)
    first = iter(dataset)
    head = next(first)
    assert numbers(dataset) == sequence(url, batch_size=8)
    assert numbers([head, *first]) == sequence(url, batch_size=8)


def test_an_epoch_chosen_in_the_middle_is_the_next_one(url):
    loader = S3DataLoader(url, batch_size=8, num_workers=1)
    batches = iter(loader)
    next(batches)
    loader.set_epoch(5)
    next(batches)
    assert (loader.state_dict()["epoch"], loader.state_dict()["consumed"]) == (5, 0)
    list(batches)
    assert numbers(loader) == sequence(url, epoch=5, batch_size=8)


def sizes(batch):
    return [len(sample) for sample in batch]


def names(batch):
    return list(batch[0].keys())


@pytest.mark.parametrize("function", [sizes, names])
def test_a_collate_fn_that_would_see_packed_batches_is_told_where_it_belongs(url, function):
    dataset = S3IterableDataset(url, batch_size=8, shuffle="none", group="webdataset")
    loader = DataLoader(dataset, batch_size=None, num_workers=1, collate_fn=function)
    with pytest.raises(ConfigError, match=r"to the dataset, as collate="):
        next(iter(loader))
    theirs = S3IterableDataset(url, batch_size=8, shuffle="none", group="webdataset", collate=function)
    assert len(next(iter(DataLoader(theirs, batch_size=None, num_workers=1)))) in (8, 2)
