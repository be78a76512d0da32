"""Several datasets as one, with weights that hold in every window of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from s3loader.arguments import checked
from s3loader.errors import PlanError, StateMismatchError
from s3loader.loader.dataset import Dataset
from s3loader.loader.layout import LooseRun, Shard
from s3loader.loader.options import LoaderOptions
from s3loader.plan import OrderSpec, Plan, mix
from s3loader.plan.mixture import Length, quotas
from s3loader.shard.samples import LeftOut, add_left_out
from s3loader.store.backend import Backend
from s3loader.store.objectstore import ObjectStore
from s3loader.types import Buffer, ObjectMeta

__all__ = ["Mixture", "mix_datasets"]


class Mixture(Dataset):
    """A dataset of datasets. Made by `mix_datasets`."""

    def __init__(
        self, datasets: Sequence[Dataset], weights: Sequence[float] | None, period: int | None, length: Length
    ) -> None:
        if not datasets:
            raise PlanError("a mixture needs datasets", hint="mix_datasets([a, b], weights=[0.7, 0.3])")
        if len({dataset.group for dataset in datasets}) > 1:
            raise PlanError("the datasets of a mixture must be grouped alike", hint="open them with the same group=")
        if any(isinstance(dataset, Mixture) for dataset in datasets):
            raise PlanError("a mixture cannot hold a mixture", hint="give all datasets to one, with their weights multiplied")
        if weights is not None and len(weights) != len(datasets):
            raise PlanError(f"{len(weights)} weights for {len(datasets)} datasets", hint="one weight for each dataset")
        empty = [dataset.name for dataset in datasets if not len(dataset)]
        if empty:
            raise PlanError(
                f"there is nothing in {', '.join(empty)}, so it cannot be mixed in", hint="leave it out, or check where="
            )
        self.datasets = tuple(datasets)
        self.weights = tuple(weights) if weights is not None else tuple(float(len(dataset)) for dataset in datasets)
        self.period = period
        self.length: Length = length
        store, parts = _one_store(datasets)
        selected = None
        if any(dataset.selected is not None for dataset in datasets):
            selected = [kept for dataset in datasets for kept in _selection(dataset)]
        name = " + ".join(dataset.name for dataset in datasets)
        if len({dataset.members for dataset in datasets}) > 1:
            raise PlanError("the datasets of a mixture must have the same members", hint="open them with the same members=")
        if len({dataset.lower_extensions for dataset in datasets}) > 1:
            raise PlanError(
                "the datasets of a mixture must name extensions alike", hint="open them with the same lower_extensions="
            )
        left_out: dict[str, LeftOut] = {}
        for dataset in datasets:
            add_left_out(left_out, dataset.left_out)
        super().__init__(
            store,
            parts,
            group=datasets[0].group,
            selected=selected,
            name=name,
            archives=datasets[0].archives,
            lower_extensions=datasets[0].lower_extensions,
            left_out=left_out,
        )
        self.members = datasets[0].members

    @property
    def store_urls(self) -> tuple[str, ...]:
        """URLs of the stores of all of them."""
        return tuple(dict.fromkeys(dataset.store.url for dataset in self.datasets))

    def choose(self, options: LoaderOptions, world_size: int) -> Mapping[str, Any]:
        """The spec for a new run: an order for each dataset, with a seed of its own."""
        counts = quotas(self.weights, self.period)
        specs = []
        for salt, (dataset, count) in enumerate(zip(self.datasets, counts, strict=True)):
            share = max(1, round(options.batch_size * count / sum(counts)))
            part = dataclasses.replace(options, batch_size=share)
            specs.append(self._choose(dataset.catalog, part, world_size, salt))
        return dict(mix([dataset.catalog for dataset in self.datasets], specs, counts=counts, length=self.length).spec)

    def plan(self, spec: Mapping[str, Any], *, skip: Sequence[tuple[int, int, int]] = (), exclude: Sequence[int] = ()) -> Plan:
        """The plan of a spec that `choose` made, or that a state holds."""
        try:
            specs = [OrderSpec.from_dict(one) for one in spec["mix"]]
            counts, length = [int(n) for n in spec["quotas"]], int(spec["length"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateMismatchError("the state is not one of a mixture", differs=["mixture"]) from error
        if len(specs) != len(self.datasets):
            raise StateMismatchError(
                f"the state is of {len(specs)} datasets, these are {len(self.datasets)}", differs=["number of datasets"]
            )
        catalogs = [dataset.catalog for dataset in self.datasets]
        return mix(catalogs, specs, counts=counts, length=length, skip=skip, exclude=exclude)

    def check_spec(self, spec: Mapping[str, Any], options: LoaderOptions) -> None:
        """Refuse a spec of a state that does not fit these options; the weights must be the same, too."""
        if list(spec.get("quotas", ())) != list(quotas(self.weights, self.period)):
            raise StateMismatchError(
                "the state belongs to a mixture of other weights",
                hint="restore the weights, or give allow_changed=True to go on with the new ones at the same count",
                differs=["weights"],
            )
        for salt, one in enumerate(spec["mix"]):
            self._check_spec(one, options, salt)


@checked
def mix_datasets(
    datasets: Sequence[Dataset],
    *,
    weights: Sequence[float] | None = None,
    period: int | None = None,
    length: Length = "all",
) -> Mixture:
    """One dataset whose sequence takes from each of `datasets` in the ratio of `weights`.

    Args:
        datasets: Grouped alike; they may lie in different stores.
        weights: In samples, in any scale; default: the sizes of the datasets.
        period: Every window of so many samples holds the same whole number of each dataset, its weight rounded by
            less than one. Default: the smallest period up to 1000 that holds the weights exactly.
        length: Samples in an epoch: ``"all"`` (until each dataset was seen whole), ``"first"`` (until the first was), or
            a number. A dataset goes on in the next epoch where it stopped, and starts over in a new order when it is through.

    Raises:
        PlanError: weights or datasets that cannot be mixed.
    """
    return Mixture(datasets, weights, period, length)


def _selection(dataset: Dataset) -> Iterator[Any]:
    import numpy as np

    if dataset.selected is not None:
        yield from dataset.selected
    else:
        for part in dataset.parts:
            yield np.arange(part.samples, dtype=np.int64)


def _one_store(datasets: Sequence[Dataset]) -> tuple[ObjectStore, list[Shard | LooseRun]]:
    stores = [dataset.store for dataset in datasets]
    if len({store.url for store in stores}) == 1:
        return stores[0], [part for dataset in datasets for part in dataset.parts]
    parts = [_moved(part, f"{i}/") for i, dataset in enumerate(datasets) for part in dataset.parts]
    return _routed(stores), parts


def _moved(part: Shard | LooseRun, prefix: str) -> Shard | LooseRun:
    if isinstance(part, Shard):
        return dataclasses.replace(part, key=prefix + part.key)
    return dataclasses.replace(part, keys=tuple(prefix + key for key in part.keys))


def _routed(stores: Sequence[ObjectStore]) -> ObjectStore:
    return ObjectStore(
        "mixture://", cast("Backend", Router(stores)), options=stores[0].options, reopen=(_routed, (tuple(stores),))
    )


class Router:
    """Reads keys ``i/key`` from the i-th store: what a loader needs of a `Backend`, and no more."""

    url = "mixture://"
    engine = "mixture"

    def __init__(self, stores: Sequence[ObjectStore]) -> None:
        self._stores = list(stores)

    def _at(self, key: str) -> tuple[Backend, str]:
        number, _, rest = key.partition("/")
        return self._stores[int(number)].backend, rest

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """Bytes ``[start, end)`` (to the end of the object where `end` is None or beyond it)."""
        backend, rest = self._at(key)
        return backend.get(rest, start, end, if_match=if_match, version_id=version_id)

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """Fill `buffer` (1-D, format ``B``, writable) with ``len(buffer)`` bytes from `start`."""
        backend, rest = self._at(key)
        return backend.read_into(rest, start, buffer, if_match=if_match)

    def head(self, key: str, *, version_id: str | None = None) -> ObjectMeta:
        """What the store says of one object, without its bytes."""
        backend, rest = self._at(key)
        return backend.head(rest, version_id=version_id)

    def close(self) -> None:
        """Nothing: the stores belong to their datasets."""
