"""Who takes which positions of an epoch (batches, ranks, workers, its end, positions left out: `Schedule`), how far a run has
come in them (`PlanState`), and where an iteration stands and the next one begins (`Cursor`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np

from s3loader.errors import ConfigError, PlanError, StateMismatchError
from s3loader.plan.order import ALGORITHM
from s3loader.plan.permutation import Int64Array

__all__ = ["Cursor", "Gaps", "OnBreak", "PlanState", "Schedule", "Tail", "Topology", "checked_epoch"]

Tail: TypeAlias = Literal["drop", "pad", "short"]
"""What happens to the samples that do not fill a batch on every rank. ``"drop"``: they are left out.
``"pad"``: they are filled up with the first samples of the epoch. ``"short"``: they are divided among the
ranks as evenly as it goes; only where there are fewer of them than ranks, some ranks have a batch less."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Who of how many: a rank, and a worker of that rank."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        for name, index, count in (("rank", self.rank, self.world_size), ("worker", self.worker, self.workers)):
            if count < 1 or not 0 <= index < count:
                raise ConfigError(
                    f"{name} {index} of {count} does not exist",
                    hint="rank is from 0 to world_size - 1, worker from 0 to workers - 1",
                )


class Gaps:
    """Positions left out of a sequence of `size`, as sorted ``[start, end)`` intervals.

    What is left is renumbered without holes: ``kept`` position q is position ``expand(q)``.
    """

    def __init__(self, intervals: Iterable[tuple[int, int]], size: int) -> None:
        merged: list[list[int]] = []
        for start, end in sorted((max(0, a), min(b, size)) for a, b in intervals):
            if end <= start:
                continue
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self.size = size
        self.intervals = [(a, b) for a, b in merged]
        starts = np.array([a for a, _ in merged], dtype=np.int64)
        lengths = np.array([b - a for a, b in merged], dtype=np.int64)
        self._removed = np.cumsum(lengths)
        self._kept_before = starts - (self._removed - lengths)
        self.kept = size - (int(self._removed[-1]) if merged else 0)

    def __bool__(self) -> bool:
        return bool(self.intervals)

    def expand(self, kept: Int64Array) -> Int64Array:
        """The position of each kept position; `self.kept` itself becomes `self.size`."""
        if not self.intervals:
            return kept
        before = np.searchsorted(self._kept_before, kept, side="right")
        out = kept + np.where(before > 0, self._removed[before - 1], 0)
        return np.where(kept >= self.kept, self.size, out)

    def position(self, kept: int) -> int:
        """The position of one kept position."""
        return int(self.expand(np.array([kept], dtype=np.int64))[0]) if self.intervals else kept

    def shrink(self, position: int) -> int:
        """How many kept positions lie before `position`."""
        return position - sum(min(b, position) - a for a, b in self.intervals if a < position)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Step k of rank r takes positions ``start + (k * world_size + r) * batch_size`` and on, for one batch.

    Worker w of W takes the steps ``k = w (mod W)``. All numbers here are kept positions (those that are left when gaps are
    taken out).
    """

    start: int
    """Already consumed."""
    size: int
    """Positions in the epoch."""
    batch_size: int
    world_size: int = 1
    tail: Tail = "short"

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise PlanError(
                f"batch_size must be a whole number from 1, not {self.batch_size!r}", hint="samples per batch and rank"
            )
        if self.tail not in get_args(Tail):
            raise PlanError(f"unknown tail {self.tail!r}", hint='use "drop", "pad" or "short"')
        if not 0 <= self.start <= self.size:
            raise PlanError(
                f"{self.start} samples consumed of {self.size}", hint="take the state of this dataset, or begin at 0"
            )

    @property
    def stride(self) -> int:
        """Samples of one step over all ranks."""
        return self.batch_size * self.world_size

    @property
    def full_steps(self) -> int:
        """Steps in which every rank has a full batch of new samples."""
        return (self.size - self.start) // self.stride

    def steps(self, rank: int = 0) -> int:
        """Batches of this rank; the same on every rank unless a short tail has fewer samples than ranks."""
        left = (self.size - self.start) % self.stride
        if self.tail == "drop" or left == 0:
            return self.full_steps
        if self.tail == "pad":
            return self.full_steps + 1
        return self.full_steps + (self._share(left, rank) < self._share(left, rank + 1))

    def _share(self, left: int, rank: int) -> int:
        return -(-left * rank // self.world_size)

    def worker_steps(self, topology: Topology) -> range:
        """The steps of one worker of one rank."""
        return range(topology.worker, self.steps(topology.rank), topology.workers)

    def positions(self, rank: int, steps: range) -> tuple[Int64Array, Int64Array]:
        """(positions of all `steps` of `rank` end to end, length of each batch).

        Padding positions are taken from the start of the epoch.
        """
        k = np.arange(steps.start, steps.stop, steps.step, dtype=np.int64)
        lengths = np.full(len(k), self.batch_size, dtype=np.int64)
        first = self.start + (k * self.world_size + rank) * self.batch_size
        if len(k) and self.tail == "short" and k[-1] >= self.full_steps:
            left = (self.size - self.start) % self.stride
            first[-1] = self.start + self.full_steps * self.stride + self._share(left, rank)
            lengths[-1] = self._share(left, rank + 1) - self._share(left, rank)
        ends = np.cumsum(lengths)
        out = np.arange(int(ends[-1]) if len(k) else 0, dtype=np.int64) + np.repeat(first - (ends - lengths), lengths)
        if self.tail == "pad":
            out %= max(1, self.size)
        return out, lengths

    def samples_in(self, rank: int, steps: range) -> int:
        """Samples of the batches `steps` of `rank`, padding included."""
        samples = len(steps) * self.batch_size
        if steps and self.tail == "short" and steps[-1] >= self.full_steps:
            left = (self.size - self.start) % self.stride
            samples += self._share(left, rank + 1) - self._share(left, rank) - self.batch_size
        return samples

    def consumed_after(self, step: int) -> int:
        """Positions consumed when `step` steps are done on every rank."""
        return min(self.size, self.start + step * self.stride)


# -- how far a run has come ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlanState:
    """`consumed` positions of `epoch` have been delivered, over all ranks together; the same on every rank, made of JSON
    scalars only.

    It says nothing of ranks, workers or batch size: any of them may differ when the sequence goes on.
    """

    plan_digest: str
    """Identifies data, order spec and seed: 16 hex digits."""
    spec: Mapping[str, Any]
    """The order spec, so that another run continues this very sequence whatever its own defaults are."""
    epoch: int = 0
    consumed: int = 0
    skip: tuple[tuple[int, int, int], ...] = ()
    """``(epoch, start, end)``: positions left out on purpose."""
    exclude: tuple[int, ...] = ()
    """Numbers of samples left out on purpose, in every epoch."""
    version: int = ALGORITHM

    def as_dict(self) -> dict[str, Any]:
        """For `json.dumps`, a checkpoint, or torch's `state_dict`."""
        out: dict[str, Any] = {
            "version": self.version,
            "plan_digest": self.plan_digest,
            "spec": dict(self.spec),
            "epoch": self.epoch,
            "consumed": self.consumed,
        }
        if self.skip:
            out["skip"] = [list(interval) for interval in self.skip]
        if self.exclude:
            out["exclude"] = list(self.exclude)
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlanState:
        """The inverse of `as_dict`.

        Raises:
            StateMismatchError: it is not such a state, or of another version of the algorithm.
        """
        try:
            version = int(values["version"])
            if version != ALGORITHM:
                raise StateMismatchError(
                    f"the state was written by version {version} of the order's algorithm, this is version {ALGORITHM}",
                    hint="finish the epoch with the release of s3loader that began it",
                    differs=["version"],
                )
            return cls(
                plan_digest=str(values["plan_digest"]),
                spec=dict(values["spec"]),
                epoch=_natural(values["epoch"]),
                consumed=_natural(values["consumed"]),
                skip=tuple((_natural(e), _natural(a), _natural(b)) for e, a, b in values.get("skip", ())),
                exclude=tuple(_natural(sample) for sample in values.get("exclude", ())),
                version=version,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            if isinstance(error, StateMismatchError):
                raise
            raise StateMismatchError(
                f"this is not a loader state: {error!r}", hint="give what state_dict() returned", differs=["format"]
            ) from error


def _natural(value: Any) -> int:
    number = int(value)
    if number != value:
        raise ValueError(f"{value!r} is not a whole number")
    if number < 0:
        raise ValueError(f"{value} is negative")
    return number


# -- where an iteration stands, and the next one begins --------------------------------------------

OnBreak: TypeAlias = Literal["next", "rest", "again"]
"""Where an iteration begins after one that was broken off (``break``, ``islice``, a trainer's limit of batches). ``"next"``: at
the next epoch, as torch's sampler would. ``"rest"``: at the batch after the last one delivered. ``"again"``: where that one
began. A loaded state or `set_epoch` beats it, and a state always says what was delivered."""

_EPOCHS: Final = 1 << 40
_BEGINNING: Final = threading.Lock()


def checked_epoch(epoch: int) -> int:
    """`epoch`, where it is one that a state can hold.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(epoch, bool) or not hasattr(epoch, "__index__") or not 0 <= epoch < _EPOCHS:
        raise ConfigError(f"an epoch is a whole number from 0, not {epoch!r}", hint="epochs count from 0")
    return epoch.__index__()


class Cursor:
    """Epoch and count of consumed positions, as they move with iterations.

    An iteration begins where a loaded state or `set_epoch` says; else at the next epoch if the last iteration came to
    its end, where it began if it ended in an error, and where `OnBreak` says if it was broken off.

    Only the iteration that began last moves it, and only until another epoch or position is chosen: what an
    older one still delivers must not change what was chosen.

    Raises:
        ConfigError: there is no such epoch.
    """

    __slots__ = ("_on_break", "_phase", "_start", "consumed", "epoch", "over", "restart", "turn")

    def __init__(self, epoch: int = 0, on_break: OnBreak = "next") -> None:
        self.epoch = checked_epoch(epoch)
        self.consumed = 0
        self.turn = 0
        """Names the iteration that may move this."""
        self.over = False
        """Nothing was left of the epoch where it was loaded: the next iteration is of the one behind it, unless
        `set_epoch` asks for this one."""
        self._on_break: OnBreak = on_break
        self._phase: Literal["chosen", "begun", "failed", "done"] = "chosen"
        self._start = 0
        self.restart = False
        """This very epoch was chosen while it ran."""

    @property
    def coming(self) -> tuple[int, int]:
        """Epoch and start in it of the running iteration; if there is none, of the next one."""
        if self._phase == "done" or self.over:
            return self.epoch + 1, 0
        return self.epoch, 0 if self.restart else self._start

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is of this epoch; a loaded position in it is kept."""
        if checked_epoch(epoch) != self.epoch:
            self.load(epoch, 0)
        elif self._phase == "chosen":
            self.over = False
        elif self._phase == "done":
            self._phase, self._start, self.consumed = "chosen", 0, 0
        else:
            self.restart = True

    def load(self, epoch: int, consumed: int, *, over: bool = False) -> None:
        """The next iteration goes on from here; `over`: nothing is left of this epoch."""
        self.epoch = checked_epoch(epoch)
        self.consumed = self._start = consumed
        self.over, self.restart = over, False
        self._phase = "chosen"
        self.turn += 1

    def begin(self, left: Callable[[int], bool]) -> tuple[int, int, int]:
        """An iteration begins; returns its epoch, where in it, and the name (`turn`) under which it moves this.

        Args:
            left: Whether anything of this epoch is left behind so many positions.
        """
        rest = self._on_break == "rest" and left(self.consumed)
        with _BEGINNING:  # iterations of several threads are of an epoch each
            epoch, start = self.coming
            if self._phase == "begun" and not self.restart:
                if rest:
                    start = self.consumed
                elif self._on_break != "again":
                    epoch, start = epoch + 1, 0
            elif self._phase == "failed" and rest and not self.restart:
                start = self.consumed
            self.load(epoch, start)
            self._phase = "begun"
            return epoch, start, self.turn

    def move(self, turn: int, consumed: int) -> None:
        """The iteration `turn` has delivered so much."""
        if turn == self.turn:
            self.consumed = consumed

    def finish(self, turn: int, size: int) -> None:
        """The iteration `turn` came to its end."""
        if turn == self.turn:
            self.consumed, self._phase = size, "done"

    def fail(self, turn: int) -> None:
        """The iteration `turn` ended in an error."""
        if turn == self.turn:
            self._phase = "failed"
