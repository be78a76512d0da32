"""The numbers that fix an order of samples, and how good ones are found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, TypeAlias, get_args

from s3loader.arguments import checked
from s3loader.errors import PlanError, StateMismatchError
from s3loader.units import KIB, MIB

__all__ = ["ALGORITHM", "OrderSpec", "Shuffle", "choose_spec"]

Shuffle: TypeAlias = Literal["block", "full", "shard", "none"]

ALGORITHM: Final = 1
"""Version of the order's algorithm; a state of another version is refused."""

PHASES: Final = 8
"""Lanes per rank by default: 1, 2, 4 or 8 workers own their lanes alone."""
WINDOW_BYTES: Final = 16 * MIB
WINDOW_BLOCKS: Final = 4
SMALL_WINDOW_BLOCKS: Final = 16
RUN_BYTES: Final = 256 * KIB


@checked
@dataclass(frozen=True, slots=True)
class OrderSpec:
    """What, beside the data and the epoch, decides which sample comes at which position."""

    shuffle: Shuffle = "block"
    seed: int = 0
    """In ``[0, 2**64)``."""
    block: int = 1
    """`m`: samples in a block, the unit that is fetched whole (``"block"`` only, as are the next four)."""
    lanes: int = 1
    """`L`: how many blocks are open side by side in the global sequence."""
    chunk: int = 1
    """`c`: samples taken from one lane before the next has its turn."""
    window: int = 1
    """`w`: blocks of a lane that are shuffled together."""
    run: int = 1
    """`g`: consecutive samples kept together at the end of the epoch, where lanes no longer come out even."""

    def __post_init__(self) -> None:
        if self.shuffle not in get_args(Shuffle):
            raise PlanError(f"unknown shuffle {self.shuffle!r}", hint='use "block", "full", "shard" or "none"')
        for field in fields(self)[1:]:
            value, least = getattr(self, field.name), 0 if field.name == "seed" else 1
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 64:
                raise PlanError(
                    f"{field.name} must be a whole number from {least}, not {value!r}",
                    hint="leave it out: it is chosen to fit the data",
                )

    def as_dict(self) -> dict[str, Any]:
        """As stored in a state: only what this shuffle depends on."""
        values = asdict(self)
        if self.shuffle == "block":
            return values
        return {name: values[name] for name in (("shuffle",) if self.shuffle == "none" else ("shuffle", "seed"))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OrderSpec:
        """The inverse of `as_dict`.

        Raises:
            StateMismatchError: an entry is unknown: a newer version wrote it.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise StateMismatchError(
                f"the order spec has unknown entries: {', '.join(sorted(unknown))}", differs=sorted(unknown)
            )
        return cls(**values)


def choose_spec(
    samples: int,
    total_bytes: int,
    *,
    batch_size: int,
    world_size: int = 1,
    shuffle: Shuffle = "block",
    seed: int = 0,
    block: int | None = None,
    lanes: int | None = None,
    chunk: int | None = None,
    window: int | None = None,
    run: int | None = None,
) -> OrderSpec:
    """The spec for a new run; whatever is given is kept, the rest is chosen.

    A window holds about 16 MiB (4 blocks of 4 MiB), and at most half of a lane, so that a small dataset is
    mixed well too. `block` is rounded to whole chunks where that is possible: then lanes come out even.

    Args:
        samples: Samples in the dataset.
        total_bytes: Their bytes, for the average size.
        batch_size: Samples per batch and rank.
        world_size: Ranks of the run; the default `lanes` is 8 for each.
        shuffle: ``"block"``, ``"full"``, ``"shard"`` or ``"none"``.
        seed: Any integer; it is taken modulo 2**64.
    """
    seed %= 1 << 64
    if shuffle != "block":
        return OrderSpec(shuffle=shuffle, seed=seed)
    average = max(1, total_bytes // max(1, samples))
    chunk = batch_size if chunk is None else chunk
    lanes = world_size * PHASES if lanes is None else lanes
    by_bytes, by_count = WINDOW_BYTES // average, samples // (2 * max(1, lanes))
    small = by_count < by_bytes
    if window is None:
        window = SMALL_WINDOW_BLOCKS if small else WINDOW_BLOCKS
    if block is None:
        block = max(1, min(by_bytes, by_count) // max(1, window))
        if block >= 2 * chunk > 0:
            block -= block % chunk
    if run is None:
        run = 1 if small else max(1, min(chunk, RUN_BYTES // average))
    return OrderSpec(shuffle, seed, block, lanes, chunk, window, run)
