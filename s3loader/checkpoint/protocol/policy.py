"""Which steps to keep: pure functions of what is committed. `LatestN(3) | EveryNSteps(1000)` keeps either's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from s3loader.errors import ConfigError

__all__ = ["BestN", "EveryNSteps", "KeepPolicy", "LatestN", "StepInfo"]


@dataclass(frozen=True, slots=True)
class StepInfo:
    """A committed step, as a policy sees it."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class KeepPolicy:
    """Says which steps to keep. Whatever it says, the newest step is never deleted."""

    __slots__ = ()

    def keep(self, steps: Sequence[StepInfo]) -> set[int]:
        """The steps to keep out of `steps` (ascending)."""
        raise TypeError("KeepPolicy is abstract")

    def __or__(self, other: KeepPolicy) -> KeepPolicy:
        return _Either(self, other)


@dataclass(frozen=True, slots=True)
class _Either(KeepPolicy):
    one: KeepPolicy
    other: KeepPolicy

    def keep(self, steps: Sequence[StepInfo]) -> set[int]:
        return self.one.keep(steps) | self.other.keep(steps)


@dataclass(frozen=True, slots=True)
class LatestN(KeepPolicy):
    """The `n` newest steps."""

    n: int = 3

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"LatestN({self.n}) would keep nothing", hint="LatestN(1) is the least; keep=None keeps all")

    def keep(self, steps: Sequence[StepInfo]) -> set[int]:
        """See `KeepPolicy.keep`."""
        return {info.step for info in steps[-self.n :]}


@dataclass(frozen=True, slots=True)
class EveryNSteps(KeepPolicy):
    """Steps that are multiples of `n`, for ever."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"EveryNSteps({self.n}): give a positive number of steps", hint="e.g. EveryNSteps(1000)")

    def keep(self, steps: Sequence[StepInfo]) -> set[int]:
        """See `KeepPolicy.keep`."""
        return {info.step for info in steps if info.step % self.n == 0}


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
        """See `KeepPolicy.keep`."""
        sign = 1 if self.mode == "min" else -1
        scored = [
            (sign * value, -info.step)
            for info in steps
            if (value := info.metrics.get(self.metric)) is not None and value == value
        ]
        return {-step for _, step in sorted(scored)[: self.n]}
