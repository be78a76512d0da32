"""`where`, `find` and `explain` of the torch loaders: those of the engine, whatever processes read."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch_helpers import number, numbered

from s3loader.errors import ConfigError, PlanError
from s3loader.loader import Loader, open_dataset
from s3loader.torch import S3DataLoader, S3IterableDataset

SAMPLES = 200
OPTIONS = {"batch_size": 8, "seed": 3, "shuffle": "full"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("provenance")
    return str(numbered(folder, SAMPLES))


@pytest.mark.parametrize("workers", [0, 2])
def test_where_and_find_tell_what_comes(url: str, workers: int) -> None:
    loader = S3DataLoader(url, num_workers=workers, **OPTIONS)
    for epoch in range(2):
        got = [number(sample) for batch in loader for sample in batch]
        assert loader.epoch == epoch
        places = [loader.where(position) for position in range(SAMPLES)]
        assert [(place.epoch, place.position) for place in places] == [(epoch, position) for position in range(SAMPLES)]
        steps = [loader.find(place.key) for place in places[::17]]
        assert steps == [(position // 8, 0) for position in range(0, SAMPLES, 17)]
        assert [place.sample for place in places] == got


def test_they_are_those_of_the_engine_after_a_state_too(url: str) -> None:
    first = S3DataLoader(url, **OPTIONS)
    batches = iter(first)
    for _ in range(3):
        next(batches)
    ranks = [S3DataLoader(url, rank=rank, world_size=3, **{**OPTIONS, "batch_size": 5}) for rank in range(3)]
    engine = Loader(open_dataset(url), world_size=3, **{**OPTIONS, "batch_size": 5})
    engine.load_state_dict(first.state_dict())
    for loader in ranks:
        loader.load_state_dict(first.state_dict())
        for epoch in (None, 0, 4):
            assert loader.where(77, epoch=epoch) == engine.where(77, epoch=epoch)
            key = engine.where(77, epoch=epoch).key
            assert loader.find(key, epoch=epoch) == engine.find(key, epoch=epoch)
        assert loader.explain(price_per_gb=0.1) == engine.explain(workers=1, price_per_gb=0.1)


def test_explain_counts_the_workers_there_are(url: str) -> None:
    engine = Loader(open_dataset(url), **OPTIONS)
    for workers in (0, 1, 2):
        loader = S3DataLoader(url, num_workers=workers, **OPTIONS)
        assert loader.explain() == engine.explain(workers=max(1, workers))
        assert loader.explain().steps == len(loader)
    dataset = S3IterableDataset(url, **OPTIONS)
    assert dataset.explain(workers=2) == engine.explain(workers=2)
    assert dataset.where(7) == engine.where(7)
    dataset.set_epoch(5)
    assert dataset.where(7) == engine.where(7, epoch=5)


def test_what_cannot_be_told_is_an_error(url: str) -> None:
    loader = S3DataLoader(url, **OPTIONS)
    with pytest.raises(PlanError, match="position 200 of 200"):
        loader.where(SAMPLES)
    with pytest.raises(PlanError):
        loader.find("nothing")
    samples = S3IterableDataset(url, shuffle="none")
    assert samples.where(3).sample == 3
    with pytest.raises(ConfigError, match="batch"):
        samples.find(samples.where(3).key)
