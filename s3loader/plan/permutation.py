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
_FEW: Final = 16
"""Up to this number of values, Python's integers are faster than numpy's calls."""
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


def _network(values: UInt64Array, low_bits: Any, high_bits: Any, keys: Any, order: range) -> UInt64Array:
    """Run the rounds in `order`: even ones change the high half of each value, odd ones the low half."""
    low_mask, high_mask = (_U[1] << low_bits) - _U[1], (_U[1] << high_bits) - _U[1]
    low, high = values & low_mask, values >> low_bits
    for i in order:
        salt = np.uint64(((i + 1) * _GOLDEN) & _MASK)
        if i % 2 == 0:
            high ^= _mix_in_place(low + (keys + salt)) & high_mask
        else:
            low ^= _mix_in_place(high + (keys + salt)) & low_mask
    out: UInt64Array = (high << low_bits) | low
    return out


def _walk_few(values: list[int], sizes: list[int], halves: list[list[int]], keys: list[int], order: range) -> list[int]:
    """The network with cycle walking, in Python's integers: values that landed outside, sent on until they land inside."""
    found = []
    for value, size, (low_bits, high_bits), key in zip(values, sizes, halves, keys, strict=True):
        low_mask, high_mask = (1 << low_bits) - 1, (1 << high_bits) - 1
        while value >= size:
            low, high = value & low_mask, value >> low_bits
            for i in order:
                salted = key + (i + 1) * _GOLDEN
                if i % 2 == 0:
                    high ^= _mix((low + salted) & _MASK) & high_mask
                else:
                    low ^= _mix((high + salted) & _MASK) & low_mask
            value = (high << low_bits) | low
        found.append(value)
    return found


def _halves(size: int) -> tuple[int, int]:
    """Bits of the low and the high half for a domain of `size`."""
    bits = max(MIN_BITS, (size - 1).bit_length())
    return bits // 2, bits - bits // 2


def _walk(values: Int64Array, size: int | Int64Array, keys: int | UInt64Array, order: range) -> Int64Array:
    if values.size == 0:
        return values
    if not isinstance(size, int):
        distinct, which = np.unique(size, return_inverse=True)
        if len(distinct) != 1:
            return _walk_mixed(values, size, keys, order, np.array([_halves(int(n)) for n in distinct], dtype=np.uint64)[which])
        size = int(distinct[0])
    if size <= 1:
        return np.zeros_like(values)
    halves = _halves(size)
    low, high = (_U[bits] for bits in halves)
    # A 1-element array, since numpy scalars warn where arrays wrap around.
    shared = np.array([keys], dtype=np.uint64) if isinstance(keys, int) else None
    each: Any = keys
    out = _network(values.astype(np.uint64), low, high, each if shared is None else shared, order)
    outside = np.flatnonzero(out >= size)
    while (few := outside.size) > _FEW:
        again = _network(out[outside], low, high, each[outside] if shared is None else shared, order)
        out[outside] = again
        outside = outside[again >= size]
    if few:
        left = [keys] * few if isinstance(keys, int) else keys[outside].tolist()
        out[outside] = _walk_few(out[outside].tolist(), [size] * few, [[*halves]] * few, left, order)
    return out.astype(np.int64)


def _walk_mixed(values: Int64Array, sizes: Int64Array, keys: Any, order: range, halves: UInt64Array) -> Int64Array:
    """The same with a size and a key per value: one pass for all of them."""
    out = values.astype(np.uint64)
    limits = sizes.astype(np.uint64)
    out = _network(out, halves[:, 0], halves[:, 1], keys, order)
    outside = np.flatnonzero(out >= limits)
    while outside.size > _FEW:
        again = _network(out[outside], halves[outside, 0], halves[outside, 1], keys[outside], order)
        out[outside] = again
        outside = outside[again >= limits[outside]]
    if outside.size:
        left, of, cuts, by = (column[outside].tolist() for column in (out, limits, halves, keys))
        out[outside] = _walk_few(left, of, cuts, by, order)
    return out.astype(np.int64)


def permute(values: Int64Array, size: int | Int64Array, keys: int | UInt64Array) -> Int64Array:
    """Images of `values` under the bijection of `keys`.

    Args:
        values: int64 in ``[0, size)``.
        size: One for all, or one per value (then `keys` too).
        keys: One for all, or one per value.
    """
    return _walk(values, size, keys, range(ROUNDS))


def unpermute(values: Int64Array, size: int | Int64Array, keys: int | UInt64Array) -> Int64Array:
    """The inverse of `permute`."""
    return _walk(values, size, keys, range(ROUNDS - 1, -1, -1))
