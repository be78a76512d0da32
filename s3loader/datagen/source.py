"""Bytes that look random, made on the spot: the same for the same seed, everywhere; any part of them without the rest.

A 4 KiB block is a row of a fixed random table combined with a key that is drawn from seed, object and block number, so that it
costs one pass over memory, and no two blocks are alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

import numpy as np

from s3loader.arguments import as_float, whole_number
from s3loader.errors import ConfigError
from s3loader.types import Buffer
from s3loader.units import MIB, parse_size

__all__ = ["BLOCK", "Generator"]

BLOCK: Final = 4096
"""Bytes of a block: what `dedup` repeats."""
_WORDS: Final = BLOCK // 8
_ROWS: Final = 256
_UNIT: Final = 512
_MOST_COMPRESSIBLE: Final = 200.0
_FINE: Final = 16.0
"""Up to this factor each 512 bytes hold some random ones, above only each block does."""
# bytes that zlib (level 6) makes of a unit, and how many of its bytes are random then, the rest being zero
_OF_UNIT: Final = (
    (
        7.46,
        9.66,
        11.8,
        20.36,
        29.6,
        36.75,
        56.0,
        69.1,
        90.3,
        107.3,
        132.8,
        175.2,
        260.9,
        345.3,
        387.8,
        443.9,
        483.8,
        503.8,
        512,
    ),
    (4, 6, 8, 16, 25, 32, 51, 64, 85, 102, 128, 170, 256, 340, 384, 440, 480, 500, 512),
)
_OF_BLOCK: Final = ((16.4, 25.7, 30.3, 43.4, 51.9, 77.4, 143.3, 216.75, 428.7), (8, 16, 20, 32, 40, 64, 128, 200, 410))


class Generator:
    """The bytes of one object.

    Args:
        size: Of the object: bytes, or text such as ``"8MiB"``.
        seed: The same seed gives the same bytes, on every machine; None draws one, which is then in `seed`.
        index: Number of the object: objects of one seed differ.
        dedup: Of so many blocks of 4 KiB, one is unique: 4 makes a quarter of the blocks unique.
        compress: What zlib makes of it is so many times smaller, up to 200.

    Raises:
        ConfigError: an argument is unusable.
    """

    def __init__(
        self, size: int | str, *, seed: int | None = None, index: int = 0, dedup: float = 1, compress: float = 1
    ) -> None:
        self.size = parse_size(size, "size_bytes" if whole_number(size) is not None else "size")
        self.seed = int.from_bytes(os.urandom(8), "little") if seed is None else _whole(seed, "seed")
        self.index = _whole(index, "index")
        self.dedup = _factor(dedup, "dedup", float("inf"))
        self.compress = _factor(compress, "compress", _MOST_COMPRESSIBLE)
        blocks = -(-self.size // BLOCK)
        self.unique_blocks = max(1, round(blocks / self.dedup)) if blocks else 0
        """Blocks that differ."""
        self._key, self._row = _keys(self.seed, self.index)
        self._random = _random_bytes(self.compress)

    def fill(self, buffer: Buffer, offset: int = 0) -> int:
        """Write the object's bytes from `offset` on into a writable buffer; returns how many fit or were left.

        Raises:
            ConfigError: the buffer cannot be written to.
        """
        view = memoryview(buffer)
        if view.readonly or not view.c_contiguous:
            raise ConfigError("the buffer cannot be written to", hint="pass a bytearray, or a writable contiguous array")
        view = view.cast("B") if view.nbytes else memoryview(bytearray())
        count = max(0, min(len(view), self.size - offset))
        out = np.frombuffer(view, np.uint8, count)
        at = 0
        while at < count:
            block, inside = divmod(offset + at, BLOCK)
            whole = (count - at) // BLOCK if not inside else 0
            if whole:
                target = out[at : at + whole * BLOCK]
                if target.ctypes.data % 8:
                    for first in range(0, whole, _ROWS):
                        some = min(_ROWS, whole - first)
                        target[first * BLOCK : (first + some) * BLOCK] = self._blocks(block + first, some).reshape(-1)
                else:
                    self._write(block, target.view(np.uint64).reshape(whole, _WORDS))
                at += whole * BLOCK
            else:
                piece = self._blocks(block, 1).reshape(-1)[inside : inside + count - at]
                out[at : at + len(piece)] = piece
                at += len(piece)
        return count

    def chunks(self, size: int = 8 * MIB) -> Iterator[memoryview]:
        """All of it, in pieces of `size` bytes, each in memory of its own."""
        for at in range(0, self.size, size):
            buffer = _memory(min(size, self.size - at))
            self.fill(buffer, at)
            yield buffer

    def whole(self) -> memoryview:
        """All of it."""
        buffer = _memory(self.size)
        self.fill(buffer)
        return buffer

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"Generator({self.size}, seed={self.seed}, index={self.index}, dedup={self.dedup:g}, compress={self.compress:g})"

    # -- blocks ----------------------------------------------------------------------------------

    def _blocks(self, first: int, count: int) -> Any:
        made = np.empty((count, _WORDS), np.uint64)
        self._write(first, made)
        return made.view(np.uint8)

    def _write(self, first: int, out: Any) -> None:
        """Blocks from `first` on; a run ends where the table or the unique blocks begin again."""
        done, count = 0, len(out)
        while done < count:
            number = (first + done) % self.unique_blocks
            row = (number + self._row) % _ROWS
            some = min(count - done, self.unique_blocks - number, _ROWS - row)
            keys = _mixed(np.arange(number, number + some, dtype=np.uint64) + self._key)
            np.bitwise_xor(_table()[row : row + some], keys[:, None], out=out[done : done + some])
            self._thin(out[done : done + some])
            done += some

    def _thin(self, rows: Any) -> None:
        """Zeros in place of what compresses."""
        if self._random is None:
            return
        units = rows.view(np.uint8).reshape(len(rows), len(self._random), -1)
        for unit, random in enumerate(self._random):
            units[:, unit, random:] = 0


def _memory(size: int) -> memoryview:
    fresh: Any = np.empty(size, np.uint8)  # a bytearray would be zeroed first
    return memoryview(fresh)


def _random_bytes(factor: float) -> list[int] | None:
    """Random bytes at the start of each unit of a block, for zlib to make the block `factor` times smaller."""
    if factor <= 1:
        return None
    if factor > _FINE:
        return [max(1, round(float(np.interp(BLOCK / factor, *_OF_BLOCK))))]
    wanted = float(np.interp(_UNIT / factor, *_OF_UNIT))
    units = BLOCK // _UNIT
    return [round(wanted * (unit + 1)) - round(wanted * unit) for unit in range(units)]


@lru_cache(1)
def _table() -> Any:
    raw = np.random.SFC64(0x5331).random_raw(_ROWS * _WORDS)  # whose stream numpy keeps for ever
    return raw.reshape(_ROWS, _WORDS)


def _keys(seed: int, index: int) -> tuple[Any, int]:
    words = np.array([seed & _MASK, (seed >> 64) & _MASK, index & _MASK, (index >> 64) & _MASK], np.uint64)
    key = np.uint64(0x243F6A8885A308D3)
    for word in words:
        key = _mixed(np.array([key ^ word]))[0]
    return key, int(key >> np.uint64(32)) % _ROWS


_MASK: Final = (1 << 64) - 1


def _mixed(words: Any) -> Any:
    """The finalizer of SplitMix64, of an array; a bijection."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _whole(value: Any, name: str) -> int:
    number = whole_number(value)
    if number is None or number < 0:
        raise ConfigError(f"{name} cannot be {value!r}", hint="a whole number from 0 on")
    return number


def _factor(value: Any, name: str, most: float) -> float:
    factor = as_float(value)
    if factor is None or not 1 <= factor <= most:
        raise ConfigError(f"{name} cannot be {value!r}", hint=f"a number from 1 to {most:g}" if most < 1e9 else "1 or more")
    return factor
