"""Keyed bijections of ``[0, size)``, computed where they are needed and never stored.

A Feistel network over the smallest power of two that holds `size`, with cycle walking: a value
that lands outside ``[0, size)`` is sent through again until it lands inside (Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", 2002). The round function is the finaliser of
SplitMix64 (Steele, Lea and Flood, 2014). Everything is exact 64-bit arithmetic, so the same key
gives the same order on every machine. Not a cipher: it hides nothing.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_SIZE", "Int64Array", "UInt64Array", "derive", "derive_each", "permute", "unpermute"]

Int64Array: TypeAlias = npt.NDArray[np.int64]
UInt64Array: TypeAlias = npt.NDArray[np.uint64]

MAX_SIZE: Final = 1 << 62
ROUNDS: Final = 8
MIN_BITS: Final = 6  # on fewer bits the rounds do not mix well enough
_GOLDEN: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1
_A: Final = 0xBF58476D1CE4E5B9
_B: Final = 0x94D049BB133111EB
_U: Final = [np.uint64(n) for n in range(64)]
_NA, _NB, _NG = np.uint64(_A), np.uint64(_B), np.uint64(_GOLDEN)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _A) & _MASK
    z = ((z ^ (z >> 27)) * _B) & _MASK
    return z ^ (z >> 31)


def derive(*words: int) -> int:
    """A 64-bit key from any number of integers in ``[0, 2**64)``."""
    key = 0
    for word in words:
        key = _mix(((key ^ word) + _GOLDEN) & _MASK)
    return key


def _mix_in_place(z: UInt64Array) -> UInt64Array:
    z ^= z >> _U[30]
    z *= _NA
    z ^= z >> _U[27]
    z *= _NB
    z ^= z >> _U[31]
    return z


def derive_each(key: int, *columns: Int64Array) -> UInt64Array:
    """``derive`` continued from `key` with one word per column, for every row: uint64 of the columns' shape."""
    out = np.full(columns[0].shape, key, dtype=np.uint64)
    for column in columns:
        out ^= column.astype(np.uint64)
        out += _NG
        _mix_in_place(out)
    return out


def _network(values: UInt64Array, bits: int, keys: Any, order: range) -> UInt64Array:
    """Run the rounds in `order` on `values` < 2**bits; even rounds change the high half, odd ones the low half."""
    low_bits = bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (bits - low_bits)) - 1)
    low, high = values & low_mask, values >> _U[low_bits]
    for i in order:
        salt = np.uint64(((i + 1) * _GOLDEN) & _MASK)
        if i % 2 == 0:
            high ^= _mix_in_place(low + (keys + salt)) & high_mask
        else:
            low ^= _mix_in_place(high + (keys + salt)) & low_mask
    return (high << _U[low_bits]) | low


def _walk(values: Int64Array, size: int, keys: int | UInt64Array, order: range) -> Int64Array:
    if size <= 1:
        return np.zeros_like(values)
    bits = max(MIN_BITS, (size - 1).bit_length())
    # A 1-element array, since numpy scalars warn where arrays wrap around.
    shared = np.array([keys], dtype=np.uint64) if isinstance(keys, int) else None
    out = _network(values.astype(np.uint64), bits, keys if shared is None else shared, order)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        again = _network(out[outside], bits, keys[outside] if shared is None else shared, order)  # type: ignore[index]  # an array here
        out[outside] = again
        outside = outside[again >= size]
    return out.astype(np.int64)


def permute(values: Int64Array, size: int, keys: int | UInt64Array) -> Int64Array:
    """Images of `values` (int64 in ``[0, size)``) under the bijection of `keys`, one key or one per value."""
    return _walk(values, size, keys, range(ROUNDS))


def unpermute(values: Int64Array, size: int, keys: int | UInt64Array) -> Int64Array:
    """The inverse of `permute`."""
    return _walk(values, size, keys, range(ROUNDS - 1, -1, -1))
