"""What happens to a fetched sample: decode, transform, and the policy for those that fail."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from s3loader.errors import S3LoaderError, SampleError
from s3loader.loader.cut import Failed
from s3loader.loader.dataset import Dataset
from s3loader.loader.decode import make_decoder
from s3loader.loader.options import LoaderOptions
from s3loader.loader.run import RawBatch
from s3loader.loader.stats import LoaderStats
from s3loader.plan.permutation import derive

__all__ = ["Place", "Quarantined", "SampleWork"]

_REPLACEMENTS: Final = 16


class Quarantined(NamedTuple):
    """One sample that was left out."""

    sample: int
    key: str
    epoch: int
    position: int
    error: str
    """Type and message."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample comes from."""

    key: str
    """Key of its object; ``archive#name`` in a shard."""
    shard: str
    """Key of the object that is read."""
    offset: int
    length: int
    """Bytes from its first member to the end of its last; -1 where unknown."""
    epoch: int
    position: int
    sample: int


def place_of(dataset: Dataset, sample: int, position: int, epoch: int) -> Place:
    """Where `sample` is stored.

    Raises:
        ShardReadError: the shard's index cannot be had.
    """
    part, number = dataset.locate(sample)
    layout = dataset.layout(part)
    first, last = int(layout.first[number]), int(layout.first[number + 1]) - 1
    start, end = int(layout.offsets[first]), int(layout.offsets[last] + layout.sizes[last])
    length = -1 if layout.sizes[last] < 0 else end - start
    return Place(dataset.sample_key(layout, first), layout.key(first), start, length, epoch, position, sample)


class SampleWork:
    """Turns raw batches into lists of finished samples, under the policy of the options."""

    def __init__(
        self,
        dataset: Dataset,
        options: LoaderOptions,
        epoch: int,
        read: Callable[[Any], list[Any]],
        stats: LoaderStats,
        quarantine: list[Quarantined],
    ) -> None:
        self._dataset = dataset
        self._options = options
        self._epoch = epoch
        self._read = read
        self._stats = stats
        self._quarantine = quarantine
        self._decode = make_decoder(options.decode)
        self._idle = self._decode is None and options.transform is None
        self._pool = ThreadPoolExecutor(options.decode_threads, "s3loader-decode") if options.decode_threads else None

    def close(self) -> None:
        """End the decoding threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def finish(self, raw: RawBatch) -> list[Any]:
        """The finished samples of a batch, in order.

        Raises:
            S3LoaderError: of the first sample that failed, with its place, where the policy is to raise.
        """
        begun = time.perf_counter()
        items = raw.items
        if not self._idle:
            names = self._names(raw)
            if self._pool is not None:
                items = list(self._pool.map(self._one, items, names))
            else:
                items = [self._one(item, name) for item, name in zip(items, names, strict=True)]
        if Failed in set(map(type, items)):
            items = self._apply_policy(raw, items)
        self._stats.decode += time.perf_counter() - begun
        return items

    def _names(self, raw: RawBatch) -> list[str]:
        """Member names, where decoding needs them and the sample itself does not have them."""
        if self._decode is None or self._dataset.group is not None:
            return [""] * len(raw.items)
        return self._dataset.names(raw.samples)

    def _one(self, item: Any, name: str) -> Any:
        if type(item) is Failed:
            return item
        stage = "decoding"
        try:
            if self._decode is not None:
                item = self._decoded(item, name)
            if self._options.transform is not None:
                stage = "transform"
                item = self._options.transform(item)
        except Exception as error:  # noqa: BLE001  # of the user's code or a decoder: what to do with it is the policy's matter
            return Failed(_wrap(stage, error))
        return item

    def _decoded(self, item: Any, name: str) -> Any:
        assert self._decode is not None
        if isinstance(item, Mapping):
            return {
                extension: value if extension.startswith("__") else self._decode(extension, value)
                for extension, value in item.items()
            }
        base = name.rsplit("/", 1)[-1]
        return self._decode(base.partition(".")[2], item)

    # -- failures ----------------------------------------------------------------------------

    def _apply_policy(self, raw: RawBatch, items: list[Any]) -> list[Any]:
        out = []
        for i, item in enumerate(items):
            if type(item) is not Failed:
                out.append(item)
                continue
            error = self._placed(item, int(raw.samples[i]), int(raw.positions[i]))
            if self._options.on_error == "raise":
                raise error from error.__cause__
            self._note(error, int(raw.samples[i]), int(raw.positions[i]))
            if self._options.on_error == "replace":
                out.append(self._replacement(int(raw.positions[i]), error))
            else:
                self._stats.skipped += 1
        return out

    def _placed(self, failed: Failed, sample: int, position: int) -> S3LoaderError:
        """The error with the sample's place in its message and attributes; its type stays."""
        error = copy.copy(failed.error)
        error.__cause__ = failed.error.__cause__
        facts: dict[str, Any] = {"position": position, "epoch": self._epoch, "sample": sample}
        key = f"sample {sample}"
        try:
            place = place_of(self._dataset, sample, position, self._epoch)
            key = place.key
            facts |= {"shard": place.shard, "key": place.key}
        except S3LoaderError:
            part, _ = self._dataset.locate(sample)
            source = self._dataset.parts[part]
            facts["shard"] = getattr(source, "key", "")
        if failed.member:
            facts["member"] = failed.member
        facts.setdefault("member", key.partition("#")[2] or key)
        error.details = {**facts, **error.details}
        error.message = f"{error.message} [{key}, position {position} of epoch {self._epoch}]"
        error.args = (error.message,)
        return error

    def _note(self, error: S3LoaderError, sample: int, position: int) -> None:
        key = error.details.get("key", f"sample {sample}")
        self._quarantine.append(Quarantined(sample, key, self._epoch, position, f"{type(error).__name__}: {error.message}"))

    def _replacement(self, position: int, cause: S3LoaderError) -> Any:
        """A sample fixed by seed, epoch and position, so that every run replaces alike."""
        for attempt in range(_REPLACEMENTS):
            sample = derive(self._options.seed % (1 << 64), self._epoch, position, attempt) % len(self._dataset)
            number = np.array([sample], dtype=np.int64)
            item = self._read(number)[0]
            if not self._idle and type(item) is not Failed:
                name = self._dataset.names(number)[0] if self._dataset.group is None else ""
                item = self._one(item, name)
            if type(item) is not Failed:
                self._stats.replaced += 1
                return item
        raise SampleError(
            f"no replacement in {_REPLACEMENTS} tries; the first failure: {cause.message}", **cause.details
        ) from cause


def _wrap(stage: str, error: Exception) -> S3LoaderError:
    if isinstance(error, S3LoaderError):
        return error
    wrapped = SampleError(f"{stage} failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
