"""What is wrong with the samples of a dataset: all that is torn, and what is not read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from s3loader.arguments import checked
from s3loader.errors import S3LoaderError
from s3loader.loader.dataset import Dataset
from s3loader.loader.layout import Shard
from s3loader.loader.opening import open_dataset
from s3loader.loader.parts import Edges
from s3loader.shard.index import ShardIndex
from s3loader.shard.samples import LeftOut, torn_samples
from s3loader.store.open import JobKeywords
from s3loader.tasks import executor_of

__all__ = ["DatasetCheck", "TornPlace", "check_dataset"]


@dataclass(frozen=True, slots=True)
class TornPlace:
    """Two places that hold members of one sample."""

    key: str
    """Of the sample."""
    first: str
    """``shard#member`` before the tear; the key of a loose object."""
    second: str
    """The member behind it; in the same shard, or at the start of another."""
    twice: bool
    """Both are called alike: the member stands there twice."""

    def __str__(self) -> str:
        return f"{self.key}: {self.first} and {self.second}{' (twice)' if self.twice else ''}"


@dataclass(frozen=True, slots=True)
class DatasetCheck:
    """What `check_dataset` found."""

    url: str
    shards: int
    samples: int
    """With every stretch of a torn sample counted."""
    torn: tuple[TornPlace, ...]
    left_out: Mapping[str, LeftOut]
    """What is not read, by kind: links without their file, folders, hidden files, names without extension."""
    errors: Mapping[str, S3LoaderError]
    """By shard: why it cannot be looked at."""

    @property
    def ok(self) -> bool:
        """Whether no sample is torn and every shard could be looked at."""
        return not self.torn and not self.errors


@checked
def check_dataset(url: Any, *, workers: int = 0, **options: Any) -> DatasetCheck:
    """Look for samples that are torn: members of one key that lie apart, or a member that stands there twice.

    Reads the indexes of all shards (and makes those that are missing), no contents.

    Args:
        url: Of the dataset, as for `open_dataset`; or an open `Dataset` that is grouped.
        workers: Processes that look; 0: this one. On a cluster: tasks at a time; 0: as many as it has CPUs.
        options: For `open_dataset`; its samples are grouped, and torn ones taken apart. Also ``engine="ray"`` and ``address``:
            tasks of a Ray cluster look at some shards each.

    Raises:
        S3LoaderError: the dataset cannot be opened.
    """
    job: Any = {name: options.pop(name) for name in _PLACE & options.keys()}
    executor, place = executor_of(job, workers)
    if isinstance(url, Dataset):
        dataset = url
    else:
        given: dict[str, Any] = {**place, **options, "group": "webdataset", "on_torn": "split"}
        dataset = open_dataset(url, **given)
    if executor is None:
        return _report(dataset, [_look_at(lambda: dataset)])
    starts = range(0, len(dataset.parts), _PARTS_OF_A_TASK)
    tasks = [dataset.of_parts(low, low + _PARTS_OF_A_TASK).without_store(place) for low in starts]
    found = dict(executor.run(_look_at, tasks))
    return _report(dataset, [found[number] for number in range(len(tasks))])


_PARTS_OF_A_TASK: Final = 64
_PLACE: Final = JobKeywords.__optional_keys__


class _Looked(NamedTuple):
    """What was found in some parts."""

    shards: int
    torn: list[TornPlace]
    errors: dict[str, S3LoaderError]
    edges: Edges


def _look_at(make: Callable[[], Dataset]) -> _Looked:
    dataset = make()
    looked = _Looked(sum(isinstance(part, Shard) for part in dataset.parts), [], {}, Edges())
    for number, part in enumerate(dataset.parts):
        if not isinstance(part, Shard):
            looked.torn.extend(
                TornPlace(one.key, part.keys[one.first], part.keys[one.second], one.twice)
                for one in torn_samples(part.keys)
                if not one.twice
            )
            continue
        layout = dataset.layouts([number])[number]
        if isinstance(layout, S3LoaderError):
            looked.errors[part.key] = layout
        elif layout.index is not None:
            looked.torn.extend(_in_shard(part.key, layout.index))
            looked.edges.add(part.key, layout.index)
    return looked


def _report(dataset: Dataset, looked: Sequence[_Looked]) -> DatasetCheck:
    edges = Edges()
    for some in looked:
        edges.merge(some.edges)
    torn = [place for some in looked for place in some.torn]
    torn += (TornPlace(key, "#".join(first), "#".join(second), False) for key, first, second in edges.torn())
    errors = {key: error for some in looked for key, error in some.errors.items()}
    return DatasetCheck(dataset.name, sum(some.shards for some in looked), len(dataset), tuple(torn), dataset.left_out, errors)


def _in_shard(shard: str, index: ShardIndex) -> Iterator[TornPlace]:
    if index.grouping.torn:
        names = index.names()
        for one in torn_samples(names):
            yield TornPlace(one.key, f"{shard}#{names[one.first]}", f"{shard}#{names[one.second]}", one.twice)


def report_lines(check: DatasetCheck) -> Iterable[str]:
    """The report as text."""
    yield f"{check.url}: {check.samples:,} samples in {check.shards:,} shards"
    for kind, some in sorted(check.left_out.items()):
        yield f"not read: {some.count:,} {kind} ({some.shown})"
    for place in check.torn:
        yield f"torn: {repr(str(place))[1:-1]}"
    for shard, error in check.errors.items():
        yield f"error: {shard}: {error.message}"
    yield "ok" if check.ok else f"{len(check.torn):,} torn samples, {len(check.errors):,} shards that cannot be read"
