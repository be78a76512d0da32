"""Which members of an archive make up samples, by WebDataset's rule, and where a sample is torn.

A member belongs to a sample when its base name has an extension: everything before the first dot of the base
name, with the folder, is the *key*, everything behind it the *extension*. Left out of samples are hidden files
(``._x.jpg``, ``.DS_Store``, in every folder), names without an extension (``README``), and what stands under a
name of the form ``__x__`` at the top (``__meta__/info.json``). Neighbours of one key are one sample; members that
are left out do not part them.

WebDataset itself takes hidden files below a folder for samples (``d/._x.jpg`` has the key ``d/`` there) and does not
see through a leading ``./``; both are mended here.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "NO_SAMPLE",
    "Grouping",
    "LeftOut",
    "TornSample",
    "add_left_out",
    "extension_of",
    "group_names",
    "key_hash",
    "left_out_reason",
    "note_left_out",
    "sample_key",
    "torn_samples",
]

NO_SAMPLE: Final = 0xFFFF_FFFF
"""In place of a sample's number: the member belongs to none."""

_META: Final = re.compile(r"(?:\./)*__[^/]*__(?:/|\Z)")
_SHOWN: Final = 3
"""Names given as examples of what was left out."""


def sample_key(name: str) -> str:
    """What the members of one sample share: folder and base name up to its first dot (``a/b.seg.png`` -> ``a/b``).

    The whole name where the base name has no dot, or begins with one.
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    return name if dot <= base else name[:dot]


def extension_of(name: str) -> str:
    """What follows the first dot of the base name (``a/b.seg.png`` -> ``seg.png``); empty where there is none."""
    return name[len(sample_key(name)) + 1 :]


def left_out_reason(name: str) -> str | None:
    """Why a member of this name belongs to no sample; None: it belongs to one."""
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot == base:
        return "hidden"
    if dot < 0:
        return "without extension" if _META.match(name) is None else "__metadata__"
    if "__" in name and _META.match(name) is not None:
        return "__metadata__"
    return None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Members of one kind that are not read."""

    count: int
    names: tuple[str, ...]
    """Some of them."""

    @property
    def shown(self) -> str:
        """The names as text that any terminal can print."""
        names = [repr(name)[1:-1] for name in self.names]
        return ", ".join([*names, "..."] if self.count > len(names) else names)


def note_left_out(found: dict[str, LeftOut], kind: str, name: str) -> None:
    """Count one more."""
    before = found.get(kind, LeftOut(0, ()))
    found[kind] = LeftOut(before.count + 1, (*before.names, name)[:_SHOWN])


def add_left_out(found: dict[str, LeftOut], more: Mapping[str, LeftOut]) -> None:
    """Add what another archive leaves out."""
    for kind, some in more.items():
        before = found.get(kind, LeftOut(0, ()))
        found[kind] = LeftOut(before.count + some.count, (*before.names, *some.names)[:_SHOWN])


class TornSample(NamedTuple):
    """Members of one key that do not stand together, or one member that stands there twice."""

    key: str
    first: int
    """Position of a member before the tear."""
    second: int
    """Position of the first member behind it."""
    twice: bool
    """The member at `second` has the name of the one at `first`."""


@dataclass(frozen=True)
class Grouping:
    """Members of an archive as samples."""

    groups: npt.NDArray[np.uint32]
    """Number of each member's sample, from 0, rising by at most one; `NO_SAMPLE` for members of none."""
    samples: int
    torn: int = 0
    """How many times members of a key that was there before begin a sample of their own."""
    edges: tuple[str, str] | None = None
    """`key_hash` of the first and the last sample."""
    left_out: Mapping[str, LeftOut] | None = None
    """Members that belong to no sample, by reason."""

    @classmethod
    def each(cls, count: int) -> Grouping:
        """Every member is a sample of its own."""
        return cls(np.arange(count, dtype=np.uint32), count)


def key_hash(key: str) -> str:
    """16 hexadecimal digits that stand for a sample's key."""
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _starts(names: Sequence[str], groups: array[int], left_out: dict[str, LeftOut]) -> tuple[list[str], list[int]]:
    """Fill `groups`; returns key and first member of each sample."""
    keys: list[str] = []
    starts: list[int] = []
    number, key = -1, None
    extensions: set[str] = set()
    for position, name in enumerate(names):
        base = name.rfind("/") + 1
        dot = name.find(".", base)
        if dot <= base or ("__" in name and _META.match(name) is not None):
            groups.append(NO_SAMPLE)
            note_left_out(left_out, left_out_reason(name) or "", name)
            continue
        this, extension = name[:dot], name[dot:]
        if this != key or extension in extensions:
            number, key = number + 1, this
            keys.append(this)
            starts.append(position)
            extensions.clear()
        extensions.add(extension)
        groups.append(number)
    return keys, starts


def group_names(names: Sequence[str]) -> Grouping:
    """The samples of an archive whose members are called `names`, in archive order.

    A member that its sample has already begins another sample, of the same key.
    """
    groups = array("I")
    left_out: dict[str, LeftOut] = {}
    keys, _ = _starts(names, groups, left_out)
    edges = (key_hash(keys[0]), key_hash(keys[-1])) if keys else None
    return Grouping(np.array(groups, dtype=np.uint32), len(keys), len(keys) - len(set(keys)), edges, left_out)


def torn_samples(names: Sequence[str]) -> Iterator[TornSample]:
    """Every place where members of a key that was there before begin a sample of their own, in archive order."""
    groups = array("I")
    keys, starts = _starts(names, groups, {})
    ends = [*starts[1:], len(names)]
    before: dict[str, int] = {}
    for number, key in enumerate(keys):
        former = before.get(key)
        before[key] = number
        if former is None:
            continue
        members = [i for i in range(starts[former], ends[former]) if groups[i] == former]
        same = [i for i in members if names[i] == names[starts[number]]]
        yield TornSample(key, same[0] if same else members[-1], starts[number], bool(same))
