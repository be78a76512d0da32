"""Where a run stands in its sequence: a small dict, the same on every rank, made of JSON scalars only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from s3loader.errors import StateMismatchError
from s3loader.plan.spec import ALGORITHM

__all__ = ["PlanState"]


@dataclass(frozen=True, slots=True)
class PlanState:
    """`consumed` positions of `epoch` have been delivered, over all ranks together.

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
