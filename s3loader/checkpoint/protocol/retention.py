"""Which steps to keep, and how the others go: un-publish first, delete after; never what a step, or a save under way, needs.

Policies are pure functions of what is committed; ``LatestN(3) | EveryNSteps(1000)`` keeps what either keeps.

Order matters in a deletion. A save that references files of a base step writes its pin, *then* looks whether the base is still
committed; whoever deletes writes the base's tombstone, *then* reads the pins, *then* the roots. Either the save sees the
tombstone, or the deleter sees the pin or the root that followed it.

A run may go back to an earlier step and save lower numbers than before. So "the last ones" are those that were committed
last, which attempts tell without a clock: a later job has a higher epoch, a later save of it a higher number.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from s3loader.arguments import checked
from s3loader.checkpoint.format import layout
from s3loader.checkpoint.format.records import Pin
from s3loader.checkpoint.protocol.roots import Root
from s3loader.checkpoint.protocol.run import Run, Scan
from s3loader.errors import CheckpointError, ConfigError, FencedError, StepExistsError

__all__ = [
    "BestN",
    "EveryNSteps",
    "KeepPolicy",
    "LatestN",
    "StepInfo",
    "by_commit",
    "delete_keys",
    "discard_later",
    "in_use",
    "later",
    "retire_all",
    "to_retire",
]

_log = logging.getLogger("s3loader.checkpoint")
_ROUNDS: Final = 5


@dataclass(frozen=True, slots=True)
class StepInfo:
    """A committed step, as a policy sees it."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class KeepPolicy:
    """Says which steps to keep. Whatever it says, the step committed last is never deleted."""

    __slots__ = ()

    def keep(self, steps: Sequence[StepInfo]) -> set[int]:
        """The steps to keep out of `steps`, which come in the order of their commits: ascending, unless the run went back
        to an earlier step and saved from there."""
        raise TypeError("KeepPolicy is abstract")

    def __or__(self, other: KeepPolicy) -> KeepPolicy:
        return _Either(self, other)


@dataclass(frozen=True, slots=True)
class _Either(KeepPolicy):
    one: KeepPolicy
    other: KeepPolicy

    def keep(self, steps: Sequence[StepInfo]) -> set[int]:
        """The steps to keep out of `steps`, which come in the order of their commits."""
        return self.one.keep(steps) | self.other.keep(steps)


@checked
@dataclass(frozen=True, slots=True)
class LatestN(KeepPolicy):
    """The `n` steps that were committed last: the highest, unless the run went back to an earlier step and saved from there."""

    n: int = 3

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"LatestN({self.n}) would keep nothing", hint="LatestN(1) is the least; keep=None keeps all")

    def keep(self, steps: Sequence[StepInfo]) -> set[int]:
        """The steps to keep out of `steps`, which come in the order of their commits."""
        return {info.step for info in steps[-self.n :]}


@checked
@dataclass(frozen=True, slots=True)
class EveryNSteps(KeepPolicy):
    """Steps that are multiples of `n`, for ever."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"EveryNSteps({self.n}): give a positive number of steps", hint="e.g. EveryNSteps(1000)")

    def keep(self, steps: Sequence[StepInfo]) -> set[int]:
        """The steps to keep out of `steps`, which come in the order of their commits."""
        return {info.step for info in steps if info.step % self.n == 0}


@checked
@dataclass(frozen=True, slots=True)
class BestN(KeepPolicy):
    """The `n` steps whose `metric` is smallest (``mode="max"``: largest); a step without it, or with NaN, is never among them.

    Of equal values the later step wins.
    """

    metric: str
    n: int = 1
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(
                f"BestN({self.metric!r}, {self.n}) would keep nothing",
                hint="BestN(metric, 1) is the least; keep=None keeps all",
            )
        if self.mode not in ("min", "max"):
            raise ConfigError(
                f"BestN: mode is 'min' or 'max', not {self.mode!r}", hint="mode='min' for losses, 'max' for accuracies"
            )

    def keep(self, steps: Sequence[StepInfo]) -> set[int]:
        """The steps to keep out of `steps`, which come in the order of their commits."""
        sign = 1 if self.mode == "min" else -1
        scored = [
            (sign * value, -info.step)
            for info in steps
            if (value := info.metrics.get(self.metric)) is not None and value == value
        ]
        return {-step for _, step in sorted(scored)[: self.n]}


def by_commit(committed: Iterable[Root]) -> list[Root]:
    """Roots in the order in which their saves were begun, which is that of their commits."""
    return sorted(committed, key=lambda root: root.attempt)


def to_retire(committed: Sequence[Root], policy: KeepPolicy, spare: Collection[int] = ()) -> list[Root]:
    """Roots out of `committed` that the policy does not keep; never the last one, and no step in `spare`."""
    ordered = by_commit(committed)
    infos = [StepInfo(r.step, {k: v for k, v in (r.facts.get("metrics") or {}).items() if v is not None}) for r in ordered]
    kept = {*policy.keep(infos), *spare}
    return [r for r in ordered[:-1] if r.step not in kept]


def later(run: Run, step: int) -> list[Root]:
    """Roots of the steps after `step` that are committed or damaged, the newest first."""
    return list(itertools.takewhile(lambda root: root.step > step, run.newest_first()))


def discard_later(run: Run, step: int, epoch: int) -> list[int]:
    """Roll back to `step`: un-publish every step after it, then delete their files; returns those steps, ascending.

    The newest goes first, so wherever this is cut off, what is left is a run that ends at some step, without a hole.

    Raises:
        CheckpointError: another process commits steps meanwhile.
    """
    discarded: list[int] = []
    for _ in range(_ROUNDS):
        roots = later(run, step)
        if not roots:
            return sorted(discarded)
        discarded += retire_all(run, roots, epoch)
    raise CheckpointError(
        f"the run cannot be rolled back to step {step}: steps after it are written while they are deleted",
        url=run.store.url,
        hint="end the other job that saves to this run, then roll back again",
    )


def in_use(run: Run) -> tuple[set[str], Scan]:
    """Keys that must not be deleted: pinned by a save under way, or listed by a committed root."""
    pinned: set[str] = set()
    for entry in run.store.list(layout.PINS):
        found = run.read(entry.key, Pin)
        if found is not None:
            pinned.update(found[0].keys)
    scan = run.scan()
    return pinned | scan.referenced(), scan


def retire_all(run: Run, roots: Iterable[Root], epoch: int) -> list[int]:
    """Un-publish steps, then delete their files; returns the steps that this call un-published.

    Raises:
        CheckpointError: some files could not be deleted; garbage collection will find them.
    """
    retired: list[Root] = []
    for root in roots:
        try:
            run.roots.retire(root, epoch)
        except (StepExistsError, FencedError):
            _log.info("step %d was replaced or retired by another process", root.step)
            continue
        retired.append(root)
    if retired:
        keep, scan = in_use(run)
        keys = {meta.key for r in retired for meta in scan.attempts.get(r.step, {}).get(r.attempt, ())}
        keys |= {key for r in retired for key, _ in r.keys.values()}  # files of steps that were retired before it, too
        delete_keys(run, sorted(keys - keep))
    return [r.step for r in retired]


def delete_keys(run: Run, keys: Iterable[str]) -> int:
    """Delete all of `keys`; returns how many.

    Raises:
        CheckpointError: some could not be.
    """
    doomed = list(keys)
    failures = run.store.delete_many(doomed)
    if failures:
        raise CheckpointError(
            f"{len(failures)} of {len(doomed)} files could not be deleted: {failures[0].error}",
            url=f"{run.store.url}/{failures[0].key}",
            hint="`s3loader ckpt gc` deletes what is left once the cause is gone",
        ) from failures[0].error
    return len(doomed)
