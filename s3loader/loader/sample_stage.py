"""What happens to a fetched sample: decode, transform, and the policy for those that fail."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from s3loader.errors import S3LoaderError, SampleError
from s3loader.loader.dataset import Dataset
from s3loader.loader.decode import DECODERS, make_decoder
from s3loader.loader.options import LoaderOptions
from s3loader.loader.quarantine import Quarantined
from s3loader.loader.run import Failed
from s3loader.loader.stats import LoaderStats
from s3loader.plan.permutation import Int64Array, derive

__all__ = ["Place", "SampleStage", "batch_error", "place_of", "refuse_all_skipped", "users_frames"]

_REPLACEMENTS: Final = 16
_FRAMES: Final = 20
_OURS: Final = frozenset({"s3loader", "s3loader_torch", "s3loader_tensorflow", "s3loader_jax"})
_DRAWS: Final = 16
"""Draws for one replacement, of which most may hit samples that are left out on purpose."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample comes from."""

    key: str
    """Key of its object; ``archive#name`` in a shard."""
    shard: str
    """Key of the object that is read."""
    offset: int
    length: int
    """Bytes from its first member to the end of its last, as they lie in the shard; -1 where unknown."""
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
    first = layout.first_member(number)
    start, length = layout.extent(number)
    return Place(dataset.sample_key(layout, first), layout.key(first), start, length, epoch, position, sample)


def batch_error(
    stage: str, error: Exception, dataset: Dataset, epoch: int, samples: Int64Array, positions: Int64Array
) -> S3LoaderError:
    """What to raise where a whole batch fails: the error with the place of the batch, its first sample named, or the one that
    the error's `row` says."""
    row = error.details.get("row") if isinstance(error, S3LoaderError) else None
    if not isinstance(row, int) or not 0 <= row < len(samples):
        row = None
    at, last = row or 0, int(positions[-1])
    sample, position = int(samples[at]), int(positions[at])
    facts: dict[str, Any] = {"position": position, "epoch": epoch, "sample": sample, "positions": positions.tolist()}
    key = dataset.keys(samples[at : at + 1])[0] or f"sample {sample}"
    shard = getattr(dataset.parts[dataset.locate(sample)[0]], "key", key)
    facts |= {"key": key, "shard": shard, "member": key.removeprefix(f"{shard}#")}
    if row is None:
        where = f" [positions {position} to {last} of epoch {epoch}, the first is {key}]"
    else:
        where = f" [{key}, position {position} of epoch {epoch}]"
    if not isinstance(error, S3LoaderError):
        placed: S3LoaderError = SampleError(f"{stage} failed: {type(error).__name__}: {error}{where}", **facts)
    else:
        placed = copy.copy(error)
        placed.details = {**facts, **error.details}
        placed.message = error.message + where
        placed.args = (placed.message,)
    placed.frames = placed.frames or users_frames(error)
    return placed


def refuse_all_skipped(quarantine: Sequence[Quarantined], epoch: int) -> None:
    """An epoch of which nothing is left is an error, whatever the policy: a loop over it would train on nothing.

    Raises:
        SampleError: every sample was skipped.
    """
    here = [entry for entry in quarantine if entry.epoch == epoch]
    if here:
        first = here[0]
        raise SampleError(
            f"every sample of epoch {epoch} was skipped; the first failure: {first.error}",
            hint='look at .quarantine; on_error="raise" stops at the first',
            position=first.position,
            epoch=epoch,
            sample=first.sample,
            key=first.key,
        )


class SampleStage:
    """Turns raw batches into lists of finished samples, under the policy of the options."""

    def __init__(
        self,
        dataset: Dataset,
        options: LoaderOptions,
        *,
        epoch: int = 0,
        read: Callable[[Int64Array], list[Any]] | None = None,
        stats: LoaderStats | None = None,
        quarantine: list[Quarantined] | None = None,
        exclude: Sequence[int] = (),
    ) -> None:
        self._dataset = dataset
        self._options = options
        self._epoch = epoch
        self._exclude = frozenset(exclude)
        self._read = read
        self._stats = stats if stats is not None else LoaderStats()
        self._quarantine = quarantine if quarantine is not None else []
        self._decode = make_decoder(options.decode)
        self.kept: list[int] | None = None
        """Which of the items given to `finish` last were not skipped; None: all."""
        self._idle = self._decode is None and options.transform is None
        self._needs_keys = options.transform_key or (self._decode is not None and dataset.group is None)
        self._pool = ThreadPoolExecutor(options.decode_threads, "s3loader-decode") if options.decode_threads else None

    def close(self) -> None:
        """End the decoding threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def finish(self, items: list[Any], samples: Int64Array, positions: Int64Array | None = None) -> list[Any]:
        """Decoded and transformed `items`, in order; those that failed by the policy of the options.

        Raises:
            S3LoaderError: of the first sample that failed, with its place, where the policy is to raise.
        """
        begun = time.perf_counter()
        self.kept = None
        if not self._idle:
            keys = self._keys(samples)
            if self._pool is not None:
                items = list(self._pool.map(self._one, items, keys))
            else:
                items = [self._one(item, key) for item, key in zip(items, keys, strict=True)]
        if Failed in set(map(type, items)):
            where = positions.tolist() if positions is not None else [-1] * len(items)
            items = self._apply_policy(items, samples.tolist(), where)
        self._stats.decode += time.perf_counter() - begun
        return items

    def _keys(self, samples: Int64Array) -> list[str]:
        return self._dataset.keys(samples) if self._needs_keys else [""] * len(samples)

    def _one(self, item: Any, key: str) -> Any:
        if type(item) is Failed:
            return item
        stage = "decoding"
        transform = self._options.transform
        try:
            if self._decode is not None:
                item = self._decoded(item, key)
            if transform is not None:
                stage = "transform"
                item = transform(item, key) if self._options.transform_key else transform(item)
        except Exception as error:  # noqa: BLE001  # of the user's code or a decoder: what to do with it is the policy's matter
            return Failed(_wrap(stage, error))
        return item

    def _decoded(self, item: Any, key: str) -> Any:
        assert self._decode is not None
        if isinstance(item, Mapping):
            return {
                extension: self._decode(extension, value) if type(value) is memoryview and extension[:2] != "__" else value
                for extension, value in item.items()
            }
        base = key.rsplit("/", 1)[-1]
        return self._decode(base.partition(".")[2], item)

    # -- failures ----------------------------------------------------------------------------

    def _apply_policy(self, items: list[Any], samples: list[int], positions: list[int]) -> list[Any]:
        out = []
        kept = self.kept = []
        for row, (item, sample, position) in enumerate(zip(items, samples, positions, strict=True)):
            kept.append(row)
            if type(item) is not Failed:
                out.append(item)
                continue
            error = self._placed(item, sample, position)
            if self._options.on_error == "raise":
                raise error from error.__cause__
            key = error.details.get("key", f"sample {sample}")
            text = f"{type(error).__name__}: {error.message}"
            self._quarantine.append(Quarantined(sample, key, self._epoch, position, text))
            if self._options.on_error == "replace":
                out.append(self._replacement(position, error))
            else:
                kept.pop()
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
        facts.setdefault("member", key.removeprefix(f"{facts['shard']}#"))
        error.details = {**facts, **error.details}
        where = f", position {position} of epoch {self._epoch}" if position >= 0 else ""
        error.message = f"{error.message} [{key}{where}]"
        error.args = (error.message,)
        return error

    def _replacement(self, position: int, cause: S3LoaderError) -> Any:
        """A sample fixed by seed, epoch and position, so that every run replaces alike."""
        assert self._read is not None
        tried = 0
        for attempt in range(_REPLACEMENTS * _DRAWS):
            sample = derive(self._options.seed % (1 << 64), self._epoch, position, attempt) % len(self._dataset)
            if sample in self._exclude:
                continue
            if (tried := tried + 1) > _REPLACEMENTS:
                break
            number = np.array([sample], dtype=np.int64)
            item = self._read(number)[0]
            if not self._idle:
                item = self._one(item, self._keys(number)[0])
            if type(item) is not Failed:
                self._stats.replaced += 1
                return item
        raise SampleError(
            f"no replacement in {_REPLACEMENTS} tries; the first failure: {cause.message}", **cause.details
        ) from cause


def _wrap(stage: str, error: Exception) -> S3LoaderError:
    if isinstance(error, S3LoaderError):
        error.frames = error.frames or users_frames(error)
        return error
    wrapped = SampleError(f"{stage} failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    wrapped.frames = users_frames(error)
    return wrapped


def users_frames(error: BaseException) -> str:
    """The traceback of `error` from where code of the user's was called, as text; empty where none was."""
    tb, last = error.__traceback__, None
    while tb is not None and str(tb.tb_frame.f_globals.get("__name__")).partition(".")[0] in _OURS:
        last, tb = tb.tb_frame.f_code, tb.tb_next
    if tb is None or last in {getattr(decoder, "__code__", None) for decoder in DECODERS.values()}:
        return ""
    frames = traceback.TracebackException(type(error), error, tb, limit=-_FRAMES)
    return "".join(frames.format()).rstrip()
