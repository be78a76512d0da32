"""What may happen to stored bytes: seeded mutations of bytes, and of the JSON in them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["JSON", "JSON_LINES", "SAFETENSORS", "Raw", "Structure", "dumps", "mutate_bytes", "mutate_json"]

DEEP = 100_000
"""Levels of nesting that no recursive reader survives."""
NUMBERS = (0, 1, -1, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**60, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)


class Raw(str):
    """JSON text that is written as it stands."""


class Pairs(NamedTuple):
    """An object as pairs, so that a key may come twice."""

    pairs: list[tuple[str, Any]]


class Structure(NamedTuple):
    """Where the JSON of a format stands: `unpack` gives its documents, `pack` puts changed ones back.

    `pack` is given the original bytes and the text of each document.
    """

    unpack: Callable[[bytes], list[Any]]
    pack: Callable[[bytes, list[bytes]], bytes]


def _safetensors_header(data: bytes) -> list[Any]:
    (length,) = struct.unpack_from("<Q", data)
    return [json.loads(data[8 : 8 + length])]


def _with_safetensors_header(data: bytes, documents: list[bytes]) -> bytes:
    (length,) = struct.unpack_from("<Q", data)
    header = documents[0] + b" " * (-len(documents[0]) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


JSON = Structure(lambda data: [json.loads(data)], lambda _, documents: documents[0])
JSON_LINES = Structure(
    lambda data: [json.loads(line) for line in data.splitlines() if line.strip()],
    lambda _, documents: b"".join(document + b"\n" for document in documents),
)
SAFETENSORS = Structure(_safetensors_header, _with_safetensors_header)


def dumps(value: Any) -> bytes:
    """Compact JSON; `Raw` is written as it stands."""
    return _text(value).encode("utf-8", "surrogatepass")


def _text(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{_text(key)}:{_text(inner)}" for key, inner in value.pairs) + "}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_text(str(key))}:{_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_text, value)) + "]"
    return json.dumps(value)


def _odd_value(rng: random.Random) -> Any:
    choices: list[Callable[[], Any]] = [
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice([None, True, False, "", "x", "../x", "a#b", "\0", "x" * 5000, [], {}, [[]], {"": None}]),
        lambda: rng.choice([0.5, -0.0, 1e308, Raw("1e999"), Raw("NaN"), Raw("Infinity"), Raw("-0"), Raw("1" * 5000)]),
        lambda: rng.choice([Raw('"\\ud800"'), Raw('"\\u0000"'), Raw("tru"), Raw('"'), Raw("")]),
        lambda: [rng.choice(NUMBERS) for _ in range(rng.randrange(5))],
        lambda: Raw(rng.choice(["[", '{"a":']) * DEEP) if rng.random() < 0.2 else Raw("[" * DEEP + "]" * DEEP),
    ]
    return rng.choices(choices, weights=[8, 6, 4, 2, 3, 1])[0]()


def _nodes(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        _nodes(inner, found)
    return found


def mutate_json(rng: random.Random, document: Any) -> Any:
    """`document` with one thing about it changed (in place where it can be)."""
    nodes = _nodes(document, [])
    if not nodes or rng.random() < 0.03:
        return _odd_value(rng)
    holder, key = rng.choice(nodes)
    value = holder[key]
    kind = rng.randrange(9)
    if kind < 4:
        holder[key] = _odd_value(rng)
    elif kind == 4:
        holder[key] = rng.choice([[value], {"x": value}, str(value), json.dumps(value, default=str)])
    elif kind == 5:
        del holder[key]
    elif kind == 6 and isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[key] = rng.choice([value + 1, value - 1, -value, value * 2, float(value), value * 2**32])
    elif kind == 7:
        other, at = rng.choice(nodes)
        holder[key], other[at] = other[at], holder[key]
        if _has_cycle(document):
            holder[key], other[at] = other[at], holder[key]
    elif isinstance(holder, list):
        holder.insert(key, value)
    else:
        changed = Pairs(list(holder.items()))
        changed.pairs.insert(rng.randrange(len(holder) + 1), (key, rng.choice([value, _odd_value(rng)])))
        if holder is document:
            return changed
        for outer, name in nodes:
            if outer[name] is holder:
                outer[name] = changed
                break
    return document


def _has_cycle(value: Any, above: tuple[int, ...] = ()) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    if id(value) in above:
        return True
    below = value.values() if isinstance(value, dict) else value
    return any(_has_cycle(inner, (*above, id(value))) for inner in below)


def mutate_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """`data` with one stretch of it changed; `other` is another valid object, for splices."""
    out = bytearray(data)
    at = rng.randrange(len(out) + 1)
    end = min(len(out), at + rng.choice([1, 2, 4, 8, 16, 64, 512, len(out)]))
    kind = rng.randrange(10)
    if kind <= 2 and out:
        out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
    elif kind == 3:
        return bytes(out[:at])
    elif kind == 4:
        out[at:at] = rng.choice([bytes(end - at), rng.randbytes(end - at), out[at:end]])
    elif kind == 5:
        del out[at:end]
    elif kind == 6:
        out[at:end] = rng.choice([bytes(end - at), b"\xff" * (end - at), rng.randbytes(end - at)])
    elif kind == 7:
        number = rng.choice(NUMBERS)
        width = rng.choice([2, 4, 8])
        patch = (number % (1 << 8 * width)).to_bytes(width, rng.choice(["little", "big"]))  # type: ignore[arg-type]
        out[at : at + width] = patch[: max(0, len(out) - at)]
    elif kind == 8:
        cut = rng.randrange(len(other) + 1)
        return bytes(out[:at]) + other[cut:]
    else:
        out += rng.choice([b"\n", b"\0" * 512, rng.randbytes(rng.randrange(1, 64)), other])
    return bytes(out)


def mutate(rng: random.Random, data: bytes, other: bytes, structure: Structure | None) -> bytes:
    """`data` with one to three changes, of its JSON or of its bytes."""
    if structure is not None and rng.random() < 0.6:
        documents = structure.unpack(data)
        which = rng.randrange(len(documents)) if documents else None
        if which is not None:
            for _ in range(rng.choice([1, 1, 1, 2, 3])):
                if not isinstance(documents[which], (dict, list)):
                    break
                documents[which] = mutate_json(rng, documents[which])
        if len(documents) > 1 and rng.random() < 0.1:
            rng.shuffle(documents)
        return structure.pack(data, [dumps(document) for document in documents])
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = mutate_bytes(rng, data, other)
    return data


def seeds(values: Sequence[bytes]) -> Callable[[random.Random], bytes]:
    """A `make_valid` that chooses one of `values`."""
    return lambda rng: rng.choice(values)
