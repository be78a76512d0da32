"""Shared memory that is used again: never while somebody still looks at it."""

import gc
import pickle
import sys

import numpy as np
import pytest
import torch

from s3loader import open_store
from s3loader.loader import from_manifest
from s3loader.testing import write_sharded_dataset
from s3loader.torch import S3DataLoader
from s3loader_torch import shared_slots
from s3loader_torch.convert import pack_batch as pack

SIZE = 40_000


def content(i):
    return np.random.default_rng(i).integers(0, 256, SIZE, dtype=np.uint8).tobytes()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    store = open_store(tmp_path_factory.mktemp("ring").as_uri())
    write_sharded_dataset(store, ((f"{i:05d}.bin", content(i)) for i in range(480)), per_shard=120)
    return from_manifest("manifest.jsonl", store=store)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("hold", [False, True])
def test_large_batches_arrive_whole_whether_they_are_kept_or_let_go(dataset, method, hold):
    loader = S3DataLoader(dataset, batch_size=40, num_workers=2, shuffle="none", multiprocessing_context=method)
    kept, seen = [], 0
    for batch in loader:
        for sample in batch:
            assert bytes(sample.numpy()) == content(seen)
            seen += 1
        if hold:
            kept.append(batch)
    assert seen == 480
    for number, sample in enumerate(sample for batch in kept for sample in batch):
        assert bytes(sample[:100].numpy()) == content(number)[:100]


def test_a_slot_is_free_when_the_last_tensor_over_it_is_gone():
    shared_slots._lent.clear()
    rows = [memoryview(bytes([i]) * 600_000) for i in range(2)]
    first = pickle.loads(_dumps(pack(rows, "tensor")))
    (slot,) = shared_slots._lent
    assert slot.taken
    view = first[1][5:10].reshape(1, 5)
    del first
    gc.collect()
    assert slot.taken
    second = pickle.loads(_dumps(pack(rows, "tensor")))
    assert len(shared_slots._lent) == 2
    assert view.tolist() == [[1] * 5]
    del view
    gc.collect()
    assert not slot.taken
    third = pickle.loads(_dumps(pack(rows, "tensor")))
    assert len(shared_slots._lent) == 2
    assert [int(row[0]) for row in second + third] == [0, 1, 0, 1]


def test_when_all_slots_are_in_use_torchs_own_way_is_taken():
    shared_slots._lent.clear()
    rows = [memoryview(b"x" * 2_000_000)] * 1
    held = [pickle.loads(_dumps(pack([*rows, *rows], "tensor"))) for _ in range(10)]
    assert len(shared_slots._lent) == 8
    assert all(isinstance(row, torch.Tensor) and len(row) == 2_000_000 for batch in held for row in batch)


def _dumps(value):
    """As torch's queues pickle."""
    from multiprocessing.reduction import ForkingPickler

    return bytes(ForkingPickler.dumps(value))


@pytest.mark.parametrize("kind", ["tensor", "bytes"])
def test_a_batch_crosses_as_one_object_however_many_samples_it_has(kind):
    """What the training process does for each sample stays below Python: one call of its own code a batch, not one a sample."""

    def calls(samples: int) -> int:
        message = _dumps(pack([memoryview(bytes(64))] * samples, kind))
        count = 0

        def counting(_frame, event, _argument):
            nonlocal count
            count += event == "call"

        gc.disable()  # its callbacks would count
        sys.setprofile(counting)
        try:
            batch = pickle.loads(message)
        finally:
            sys.setprofile(None)
            gc.enable()
        assert len(batch) == samples
        return count

    shared_slots._lent.clear()
    calls(1)
    assert calls(16) == calls(200), "by the pipe"
    calls(10_000)  # whose slot serves both
    assert calls(512) == calls(10_000), "in a slot"


def test_small_batches_get_more_slots_and_then_the_pipe():
    """A slot keeps a descriptor open, so there are not many; then a batch goes by the pipe, which needs none."""
    shared_slots._lent.clear()
    row = memoryview(bytes(60_000))
    held = [pickle.loads(_dumps(pack([row], "tensor"))) for _ in range(100)]
    assert len(shared_slots._lent) == 32
    assert all(len(batch) == 1 and len(batch[0]) == 60_000 for batch in held)
    del held
    gc.collect()
    assert not any(slot.taken for slot in shared_slots._lent)
