"""Which sample comes at which position: the numbers that fix an order (`OrderSpec`), how good ones are found, and four orders,
each a pure bijection of ``[0, samples)``.

`docs/order-and-resume.md` specifies them well enough to write them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias, get_args

import numpy as np

from s3loader.arguments import checked
from s3loader.errors import PlanError, StateMismatchError
from s3loader.plan.permutation import MAX_SIZE, Int64Array, UInt64Array, derive, derive_each, permute, unpermute
from s3loader.units import KIB, MIB

__all__ = [
    "ALGORITHM",
    "BlockOrder",
    "FullOrder",
    "Order",
    "OrderSpec",
    "SequentialOrder",
    "ShardOrder",
    "Shuffle",
    "UnitOrder",
    "Units",
    "UnitsAsTheyCome",
    "choose_spec",
    "locate",
    "make_order",
]

Shuffle: TypeAlias = Literal["block", "full", "shard", "none"]

ALGORITHM: Final = 1
"""Version of the order's algorithm; a state of another version is refused."""

PHASES: Final = 8
"""Lanes per rank by default: 1, 2, 4 or 8 workers own their lanes alone."""
WINDOW_BYTES: Final = 16 * MIB
WINDOW_BLOCKS: Final = 4
SMALL_WINDOW_BLOCKS: Final = 16
RUN_BYTES: Final = 256 * KIB
UNIT_BYTES: Final = 256 * MIB
"""Units that a rank has open at a time are chosen to be no more than this; how much memory it has never changes an order."""


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
    units: Int64Array | None = None,
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
        units: Samples of what can only be fetched whole, which are the blocks then; None: samples can be fetched one by one.
    """
    seed %= 1 << 64
    if shuffle != "block":
        return OrderSpec(shuffle=shuffle, seed=seed)
    average = max(1, total_bytes // max(1, samples))
    chunk = batch_size if chunk is None else chunk
    if units is not None:
        phases, w = _lanes_of_units(units, average, world_size)
        lanes = world_size * phases if lanes is None else lanes
        largest = max(1, int(units.max())) if len(units) else 1
        return OrderSpec(shuffle, seed, block or largest, lanes, chunk, w if window is None else window, run or 1)
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


def _lanes_of_units(units: Int64Array, average: int, world_size: int) -> tuple[int, int]:
    """(lanes of each rank, units of a window): several units in each lane, and no more open at a time than `UNIT_BYTES`."""
    largest = average * int(units.max()) if len(units) else 1
    phases, window = PHASES, WINDOW_BLOCKS
    while phases > 1 and world_size * phases * window > len(units):
        phases //= 2
    while window > 1 and (phases * window * largest > UNIT_BYTES or world_size * phases * window > len(units)):
        window //= 2
    while phases > 1 and phases * window * largest > UNIT_BYTES:
        phases //= 2
    return phases, window


# -- the orders ------------------------------------------------------------------------------------

_BLOCKS: Final = 1
_WINDOWS: Final = 2
_RUNS: Final = 3
_FULL: Final = 4
_SHARDS: Final = 5
_UNITS: Final = 6


class Units(NamedTuple):
    """What is best fetched whole for each of some positions; int64 arrays of their length."""

    start: Int64Array
    """First sample of the block."""
    length: Int64Array
    """Samples in it; 0 where the sample is best fetched by itself, with its neighbours in the look-ahead; negative where that
    is so unless the block happens to be open still."""
    until: Int64Array
    """No position from here on needs this block."""


def locate(starts: Int64Array, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
    """(part, number in the part) of each sample, int64.

    Args:
        starts: Number of the first sample of each part; parts lie end to end and may be empty.
        samples: Numbers of samples that exist.
    """
    part = np.searchsorted(starts, samples, side="right") - 1
    return part, samples - starts[part]


def no_units(size: int) -> Units:
    """All zero."""
    zeros = np.zeros(size, dtype=np.int64)
    return Units(zeros, zeros, zeros)


def join_units(parts: Sequence[tuple[Int64Array, Units]], size: int) -> Units:
    """Scatter ``(where, units)`` parts into one of `size`."""
    out = Units(*(np.zeros(size, dtype=np.int64) for _ in range(3)))
    for where, part in parts:
        for target, source in zip(out, part, strict=True):
            target[where] = source
    return out


class Order(Protocol):
    """A sequence of samples per epoch. Arrays are int64; out-of-range input is the caller's mistake."""

    @property
    def size(self) -> int:
        """Positions in an epoch."""
        ...

    def samples_at(self, positions: Int64Array, epoch: int) -> Int64Array:
        """The sample at each position."""
        ...

    def positions_of(self, samples: Int64Array, epoch: int) -> Int64Array:
        """The position of each sample, or -1 where it does not occur (in mixtures only)."""
        ...

    def units(self, positions: Int64Array, samples: Int64Array, epoch: int) -> Units:
        """What to fetch for `positions`, whose samples are `samples`."""
        ...

    def open_samples(self, positions: Int64Array) -> int:
        """Samples in the blocks that are open at a time for whoever takes `positions`; 0 without blocks."""
        ...


class SequentialOrder:
    """``shuffle="none"``: as stored."""

    def __init__(self, size: int) -> None:
        self.size = size

    def samples_at(self, positions: Int64Array, epoch: int) -> Int64Array:
        """The sample at each position."""
        return positions

    def positions_of(self, samples: Int64Array, epoch: int) -> Int64Array:
        """The position of each sample, or -1 where it does not occur (in mixtures only)."""
        return samples

    def units(self, positions: Int64Array, samples: Int64Array, epoch: int) -> Units:
        """What to fetch for `positions`, whose samples are `samples`."""
        return no_units(len(positions))

    def open_samples(self, positions: Int64Array) -> int:
        """Samples in the blocks that are open at a time for whoever takes `positions`; 0 without blocks."""
        return 0


class FullOrder:
    """``shuffle="full"``: one permutation of all samples."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed

    def samples_at(self, positions: Int64Array, epoch: int) -> Int64Array:
        """The sample at each position."""
        return permute(positions, self.size, derive(self.seed, epoch, _FULL))

    def positions_of(self, samples: Int64Array, epoch: int) -> Int64Array:
        """The position of each sample, or -1 where it does not occur (in mixtures only)."""
        return unpermute(samples, self.size, derive(self.seed, epoch, _FULL))

    def units(self, positions: Int64Array, samples: Int64Array, epoch: int) -> Units:
        """What to fetch for `positions`, whose samples are `samples`."""
        return no_units(len(positions))

    def open_samples(self, positions: Int64Array) -> int:
        """Samples in the blocks that are open at a time for whoever takes `positions`; 0 without blocks."""
        return 0


class ShardOrder:
    """``shuffle="shard"``: shards in permuted order, samples of a shard as stored."""

    def __init__(self, counts: Int64Array, seed: int) -> None:
        self.size = int(counts.sum())
        self.seed = seed
        self._counts = counts
        self._starts = np.cumsum(counts) - counts
        self._epoch = -1
        self._order = self._ends = counts  # replaced by `_at`

    def _at(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """(permuted shard numbers, ends of their positions) of `epoch`."""
        if epoch != self._epoch:
            shards = len(self._counts)
            self._order = permute(np.arange(shards, dtype=np.int64), shards, derive(self.seed, epoch, _SHARDS))
            self._ends = np.cumsum(self._counts[self._order])
            self._epoch = epoch
        return self._order, self._ends

    def samples_at(self, positions: Int64Array, epoch: int) -> Int64Array:
        """The sample at each position."""
        order, ends = self._at(epoch)
        slot = np.searchsorted(ends, positions, side="right")
        shard = order[slot]
        return self._starts[shard] + positions - (ends[slot] - self._counts[shard])

    def positions_of(self, samples: Int64Array, epoch: int) -> Int64Array:
        """The position of each sample, or -1 where it does not occur (in mixtures only)."""
        _, ends = self._at(epoch)
        shard, number = locate(self._starts, samples)
        slot = unpermute(shard.astype(np.int64), len(self._counts), derive(self.seed, epoch, _SHARDS))
        return number + ends[slot] - self._counts[shard]

    def units(self, positions: Int64Array, samples: Int64Array, epoch: int) -> Units:
        """What to fetch for `positions`, whose samples are `samples`."""
        return no_units(len(positions))

    def open_samples(self, positions: Int64Array) -> int:
        """Samples in the blocks that are open at a time for whoever takes `positions`; 0 without blocks."""
        return 0


class BlockOrder:
    """``shuffle="block"``: permuted blocks dealt to lanes, lanes taken in turn, windows of a lane shuffled.

    Attributes:
        lane_samples: Positions below this lie in lanes; the rest is the end of the epoch, in runs.
    """

    def __init__(self, size: int, spec: OrderSpec) -> None:
        self.size = size
        self.spec = spec
        m, lanes, c = spec.block, spec.lanes, spec.chunk
        self.full_blocks = size // m
        self.lane_blocks = self.full_blocks // lanes
        self.lane_used = self.lane_blocks * m // c * c
        """Samples of each lane that whole rounds cover."""
        self.lane_samples = self.lane_used * lanes
        self._rest = self.lane_blocks * m - self.lane_used
        self._whole_runs = (size - self.lane_samples) // spec.run

    # -- lanes -------------------------------------------------------------------------------

    def first_window(self, lane: Int64Array) -> Int64Array:
        """Blocks in the first window of each lane, 1 to `window`: lanes must not all need new blocks at once."""
        return 1 + lane * self.spec.window // self.spec.lanes

    def window_span(self, lane: Int64Array, offset: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """(number, first sample offset, end) of the window that holds each offset of a lane."""
        m, w = self.spec.block, self.spec.window
        first = self.first_window(lane) * m
        number = np.where(offset < first, 0, (offset - first) // (w * m) + 1)
        start = np.where(number == 0, 0, first + (number - 1) * (w * m))
        end = np.where(number == 0, first, start + w * m)
        return number, start, np.minimum(end, self.lane_blocks * m)

    def _shuffle_in_windows(self, lane: Int64Array, offset: Int64Array, epoch: int, *, inverse: bool) -> Int64Array:
        number, start, end = self.window_span(lane, offset)
        keys = derive_each(derive(self.spec.seed, epoch, _WINDOWS), lane, number)
        step = unpermute if inverse else permute
        return start + step(offset - start, end - start, keys)

    def _lane_to_sample(self, lane: Int64Array, offset: Int64Array, epoch: int) -> Int64Array:
        m = self.spec.block
        inner = self._shuffle_in_windows(lane, offset, epoch, inverse=False)
        slot = inner // m * self.spec.lanes + lane
        return self._blocks(slot, epoch, inverse=False) * m + inner % m

    def _blocks(self, numbers: Int64Array, epoch: int, *, inverse: bool) -> Int64Array:
        step = unpermute if inverse else permute
        return step(numbers, self.full_blocks, derive(self.spec.seed, epoch, _BLOCKS))

    def lane_of(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """(lane, offset in it) of positions below `lane_samples`."""
        c, lanes = self.spec.chunk, self.spec.lanes
        turn, inner = np.divmod(positions, c)
        around, lane = np.divmod(turn, lanes)
        return lane, around * c + inner

    def position_in_lane(self, lane: Int64Array, offset: Int64Array) -> Int64Array:
        """The inverse of `lane_of`."""
        c, lanes = self.spec.chunk, self.spec.lanes
        return (offset // c * lanes + lane) * c + offset % c

    # -- the end of the epoch ----------------------------------------------------------------

    def _runs(self, tail: Int64Array, epoch: int, *, inverse: bool) -> Int64Array:
        g = self.spec.run
        number, inner = np.divmod(tail, g)
        whole = number < self._whole_runs
        step = unpermute if inverse else permute
        number[whole] = step(number[whole], self._whole_runs, derive(self.spec.seed, epoch, _RUNS))
        return number * g + inner

    def _tail_to_sample(self, tail: Int64Array, epoch: int) -> Int64Array:
        m, lanes, rest = self.spec.block, self.spec.lanes, self._rest
        index = self._runs(tail, epoch, inverse=False)
        out = np.empty_like(index)
        in_lane = index < lanes * rest
        if in_lane.any():
            lane, offset = np.divmod(index[in_lane], rest)
            out[in_lane] = self._lane_to_sample(lane, self.lane_used + offset, epoch)
        slot, inner = np.divmod(index[~in_lane] - lanes * rest, m)
        slot += self.lane_blocks * lanes
        block = np.full_like(slot, self.full_blocks)  # the last, partial block stays where it is
        full = slot < self.full_blocks
        block[full] = self._blocks(slot[full], epoch, inverse=False)
        out[~in_lane] = block * m + inner
        return out

    # -- both ways ---------------------------------------------------------------------------

    def samples_at(self, positions: Int64Array, epoch: int) -> Int64Array:
        """The sample at each position."""
        in_lane = positions < self.lane_samples
        if in_lane.all():
            return self._lane_to_sample(*self.lane_of(positions), epoch)
        out = np.empty_like(positions)
        if in_lane.any():
            out[in_lane] = self._lane_to_sample(*self.lane_of(positions[in_lane]), epoch)
        out[~in_lane] = self._tail_to_sample(positions[~in_lane] - self.lane_samples, epoch)
        return out

    def positions_of(self, samples: Int64Array, epoch: int) -> Int64Array:
        """The position of each sample, or -1 where it does not occur (in mixtures only)."""
        m, lanes = self.spec.block, self.spec.lanes
        block, inner = np.divmod(samples, m)
        slot = block.copy()
        full = block < self.full_blocks
        slot[full] = self._blocks(block[full], epoch, inverse=True)
        tail = (slot - self.lane_blocks * lanes) * m + inner + lanes * self._rest
        out = np.empty_like(samples)
        in_lane = slot < self.lane_blocks * lanes
        lane, offset = slot[in_lane] % lanes, slot[in_lane] // lanes * m + inner[in_lane]
        offset = self._shuffle_in_windows(lane, offset, epoch, inverse=True)
        tail[in_lane] = lane * self._rest + offset - self.lane_used
        used = np.zeros_like(in_lane)
        used[in_lane] = offset < self.lane_used
        out[used] = self.position_in_lane(lane, offset)[offset < self.lane_used]
        out[~used] = self.lane_samples + self._runs(tail[~used], epoch, inverse=True)
        return out

    def units(self, positions: Int64Array, samples: Int64Array, epoch: int) -> Units:
        """What to fetch for `positions`, whose samples are `samples`. In lanes the block, until its window is over; the last of
        a lane until the end of the epoch,
        where what whole rounds left of them comes."""
        m = self.spec.block
        in_lane = positions < self.lane_samples
        here, tail = np.flatnonzero(in_lane), np.flatnonzero(~in_lane)
        parts = []
        if here.size:
            lane, offset = self.lane_of(positions[here])
            _, _, end = self.window_span(lane, offset)
            until = self.position_in_lane(lane, np.minimum(end, self.lane_used) - 1) + 1
            if self._rest:
                until[end == self.lane_blocks * m] = self.size
            parts.append((here, Units(samples[here] // m * m, np.full(here.size, m), until)))
        if tail.size and self._rest:
            parts.append((tail, Units(samples[tail] // m * m, np.full(tail.size, -m), np.full(tail.size, self.size))))
        return join_units(parts, len(positions))

    def open_samples(self, positions: Int64Array) -> int:
        """Samples in the blocks that are open at a time for whoever takes `positions`; 0 without blocks. A window of each
        lane."""
        lanes, _ = self.lane_of(positions[positions < self.lane_samples])
        return len(np.unique(lanes)) * self.spec.window * self.spec.block


class _Wholes:
    """What orders of samples share that are stored in units: a unit is fetched whole, whichever of its samples is wanted."""

    def __init__(self, units: Int64Array) -> None:
        self._units = units
        self._unit_starts = np.cumsum(units) - units
        self.largest = int(units.max()) if len(units) else 0

    def unit_of(self, samples: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """(number, first sample, samples) of the unit that holds each sample."""
        unit, _ = locate(self._unit_starts, samples)
        return unit, self._unit_starts[unit], self._units[unit]


class UnitsAsTheyCome(_Wholes):
    """Another order (``"none"``, ``"shard"``, ``"full"``) of samples that are stored in units."""

    def __init__(self, order: SequentialOrder | ShardOrder | FullOrder, units: Int64Array) -> None:
        super().__init__(units)
        self.order = order
        self.size = order.size

    def samples_at(self, positions: Int64Array, epoch: int) -> Int64Array:
        """The sample at each position."""
        return self.order.samples_at(positions, epoch)

    def positions_of(self, samples: Int64Array, epoch: int) -> Int64Array:
        """The position of each sample, or -1 where it does not occur (in mixtures only)."""
        return self.order.positions_of(samples, epoch)

    def units(self, positions: Int64Array, samples: Int64Array, epoch: int) -> Units:
        """What to fetch for `positions`: the unit, until its last sample; in a full permutation until the end of the epoch."""
        _, start, length = self.unit_of(samples)
        full = isinstance(self.order, FullOrder)
        until = np.full_like(positions, self.size) if full else positions + (start + length - samples)
        return Units(start, length, until)

    def open_samples(self, positions: Int64Array) -> int:
        """Samples in the units that are open at a time for whoever takes `positions`; all, in a full permutation."""
        return self.size if isinstance(self.order, FullOrder) else min(self.size, 2 * self.largest)


class _Epoch(NamedTuple):
    """How units lie in lanes in one epoch; lanes are laid end to end, and units in them."""

    unit: Int64Array
    """The unit in each place."""
    place: Int64Array
    """The place of each unit."""
    ends: Int64Array
    """Samples up to the end of each place."""
    lanes: Int64Array
    """Samples before each lane, then all: lanes + 1."""
    windows: Int64Array
    """Samples up to the end of each window."""
    keys: UInt64Array
    """Of the permutation in each window."""
    used: int
    """Samples of each lane that whole rounds cover."""
    rests: Int64Array
    """Samples of the lanes that they do not, up to the end of each lane."""


class UnitOrder(_Wholes):
    """``shuffle="block"`` of samples that are stored in units of unlike size (row groups of Parquet files), which are the
    blocks: permuted, dealt to lanes in turn, windows of a lane shuffled. What whole rounds of all lanes do not cover follows,
    lane by lane."""

    def __init__(self, units: Int64Array, spec: OrderSpec) -> None:
        super().__init__(units)
        self.size = int(units.sum())
        self.spec = spec
        self._epoch: tuple[int, _Epoch] | None = None

    def _at(self, epoch: int) -> _Epoch:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._dealt(epoch)
        return self._epoch[1]

    def _dealt(self, epoch: int) -> _Epoch:
        count, lanes, w = len(self._units), self.spec.lanes, self.spec.window
        slots = np.arange(count, dtype=np.int64)
        order = np.argsort(slots % lanes, kind="stable")
        unit = permute(slots, count, derive(self.spec.seed, epoch, _UNITS))[order]
        place = np.empty_like(unit)
        place[unit] = slots
        ends = np.cumsum(self._units[unit])
        lane = order % lanes
        number = order // lanes - (1 + lane * w // lanes)
        number = np.where(number < 0, 0, number // w + 1)  # lanes must not all need new units at once
        last = np.flatnonzero(np.diff(lane, append=-1) | np.diff(number, append=-1))
        keys = derive_each(derive(self.spec.seed, epoch, _WINDOWS), lane[last], number[last])
        bounds = np.concatenate([[0], np.cumsum(np.bincount(lane, minlength=lanes))])
        starts = np.concatenate([[0], ends])[bounds]
        used = int(np.diff(starts).min()) // self.spec.chunk * self.spec.chunk
        return _Epoch(unit, place, ends, starts, ends[last], keys, used, np.cumsum(np.diff(starts) - used))

    # -- positions and places of samples, both ways ------------------------------------------

    def _shuffled(self, at: Int64Array, here: _Epoch, *, inverse: bool) -> Int64Array:
        """Where what lies at `at` comes to lie in its window."""
        window = np.searchsorted(here.windows, at, side="right")
        start = np.where(window > 0, here.windows[window - 1], 0)
        step = unpermute if inverse else permute
        return start + step(at - start, here.windows[window] - start, here.keys[window])

    def samples_at(self, positions: Int64Array, epoch: int) -> Int64Array:
        """The sample at each position."""
        if not len(positions):
            return positions
        here, c, lanes = self._at(epoch), self.spec.chunk, self.spec.lanes
        turn, inner = np.divmod(positions, c)
        around, lane = np.divmod(turn, lanes)
        tail = positions - here.used * lanes
        of_tail = np.minimum(np.searchsorted(here.rests, tail, side="right"), lanes - 1)
        behind = here.used + tail - np.where(of_tail > 0, here.rests[of_tail - 1], 0)
        at = np.where(tail < 0, here.lanes[lane] + around * c + inner, here.lanes[of_tail] + behind)
        at = self._shuffled(at, here, inverse=False)
        place = np.searchsorted(here.ends, at, side="right")
        unit = here.unit[place]
        return self._unit_starts[unit] + at - (here.ends[place] - self._units[unit])

    def positions_of(self, samples: Int64Array, epoch: int) -> Int64Array:
        """The position of each sample, or -1 where it does not occur (in mixtures only)."""
        if not len(samples):
            return samples
        here = self._at(epoch)
        unit, start, length = self.unit_of(samples)
        at = self._shuffled(here.ends[here.place[unit]] - length + samples - start, here, inverse=True)
        lane = np.searchsorted(here.lanes, at, side="right") - 1
        return self._position(lane, at - here.lanes[lane], here)

    def _position(self, lane: Int64Array, offset: Int64Array, here: _Epoch) -> Int64Array:
        c, lanes = self.spec.chunk, self.spec.lanes
        in_rounds = (offset // c * lanes + lane) * c + offset % c
        behind = here.used * (lanes - 1) + np.where(lane > 0, here.rests[lane - 1], 0) + offset
        return np.where(offset < here.used, in_rounds, behind)

    # -- what to fetch -----------------------------------------------------------------------

    def units(self, positions: Int64Array, samples: Int64Array, epoch: int) -> Units:
        """What to fetch for `positions`: the unit, until the window that it lies in is over."""
        here = self._at(epoch)
        unit, start, length = self.unit_of(samples)
        end = here.windows[np.searchsorted(here.windows, here.ends[here.place[unit]] - 1, side="right")]
        lane = np.searchsorted(here.lanes, end - 1, side="right") - 1
        return Units(start, length, self._position(lane, end - 1 - here.lanes[lane], here) + 1)

    def open_samples(self, positions: Int64Array) -> int:
        """Samples in the units that are open at a time for whoever takes `positions`: at most a window of each lane."""
        turn = positions[positions < self._at(0).used * self.spec.lanes] // self.spec.chunk
        lanes = max(1, len(np.unique(turn % self.spec.lanes)))
        return min(self.size, lanes * self.spec.window * self.largest)


def make_order(counts: Int64Array, spec: OrderSpec, units: Int64Array | None = None) -> Order:
    """The order `spec` describes, over shards of `counts` samples each.

    Args:
        counts: Samples of each shard.
        spec: Of the order.
        units: Samples of what can only be fetched whole, laid end to end as the shards are; None: samples can be fetched
            one by one.

    Raises:
        PlanError: more than 2**62 samples.
    """
    size = int(counts.sum())
    if size > MAX_SIZE:
        raise PlanError(f"too many samples: {size}", hint="split the dataset")
    if spec.shuffle == "block":
        return BlockOrder(size, spec) if units is None else UnitOrder(units, spec)
    order: SequentialOrder | ShardOrder | FullOrder
    if spec.shuffle == "full":
        order = FullOrder(size, spec.seed)
    elif spec.shuffle == "shard":
        order = ShardOrder(counts, spec.seed)
    else:
        order = SequentialOrder(size)
    return order if units is None else UnitsAsTheyCome(order, units)
