"""State as a tree: arrays become named leaves, everything else JSON. Nothing is pickled.

A leaf's name is the path to it: keys and positions joined by ``/`` (``~`` and ``/`` inside a key
are written ``~0`` and ``~1``, as in RFC 6901), e.g. ``model/layer.0.weight`` or
``optimizer/state/0/exp_avg``. Where two keys of one dict read the same, what is no string says its
type: beside ``"1"`` the key 1 is ``~int:1``. JSON values stand for themselves, arrays for lists, and every
object is a tagged node ``{"$": tag, "of": ...}``; a dict whose keys are not all strings is a list of
``[key, node]``, or ``[key, node, part of the name]``.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from s3loader.checkpoint.state.leaves import LeafAdapter, adapter_for, framework_of_tag
from s3loader.checkpoint.state.opening import framework_constant, open_container, open_object
from s3loader.errors import CheckpointError, FormatError, UnsupportedStateError

__all__ = [
    "AddLeaf",
    "PerRank",
    "check_items",
    "child_name",
    "children",
    "decode",
    "encode",
    "leaf_names",
    "own_node",
    "rank_name",
    "split_name",
]

_SAFE_INT: Final = 2**53
_LONG_INT: Final = 1024  # bits; Python refuses to write integers of thousands of digits in decimal
_MAKE: Final[dict[str, Callable[..., Any]]] = {"dict": dict, "odict": OrderedDict, "counter": Counter}


@dataclass(frozen=True, slots=True)
class PerRank:
    """State that differs between ranks (random generators, say): every rank saves its own and gets its own back.

    Everything else is taken to be the same on all ranks and is saved once.
    """

    value: Any


AddLeaf: TypeAlias = Callable[[str, LeafAdapter, Any, bool], None]


def rank_name(name: str, rank: int | str) -> str:
    """Name of what `rank` saved under a `PerRank` at `name`."""
    return child_name(name, f"rank-{int(rank):05d}")


def own_node(node: dict[str, Any], name: str, rank: int) -> tuple[str, Any]:
    """Name and node of what `rank` saved under a ``per_rank`` node.

    Raises:
        CheckpointError: the checkpoint was saved by fewer ranks.
    """
    if str(rank) not in node["of"]:
        raise CheckpointError(
            f"{name!r} was saved per rank, by {len(node['of'])} ranks; there is none for rank {rank}",
            hint="restore without this item, and start it anew on the new ranks",
        )
    return rank_name(name, rank), node["of"][str(rank)]


def child_name(name: str, key: Any) -> str:
    """Name of what lies under `key` in `name`."""
    return _joined(name, _escaped(str(key)))


def _joined(name: str, part: str) -> str:
    return f"{name}/{part}" if name else part


def _escaped(text: str) -> str:
    return text.replace("~", "~0").replace("/", "~1")


def _parts(keys: Iterable[Any]) -> list[str]:
    """The keys of one dict as parts of names, each another one: where two read the same, what is no string says its type."""
    keys = list(keys)
    read = Counter(map(str, keys))
    return [
        _escaped(str(key)) if type(key) is str or read[str(key)] == 1 else f"~{type(key).__name__}:{_escaped(str(key))}"
        for key in keys
    ]


def split_name(name: str) -> list[str]:
    """The keys on the path to a leaf, as strings."""
    return [part.replace("~1", "/").replace("~0", "~") for part in name.split("/")]


def encode(value: Any, add: AddLeaf, rank: int = 0, name: str = "") -> Any:
    """The JSON of `value`; `add` is called for each leaf: name, adapter, value, and whether it lies in a `PerRank`.

    Raises:
        UnsupportedStateError: something in it is neither leaf nor JSON nor a container of them.
    """
    return _Encoder(add, rank).node(value, name)


class _Encoder:
    def __init__(self, add: AddLeaf, rank: int) -> None:
        self._add = add
        self._rank = rank
        self._own = False
        self._names: set[str] = set()
        self._open: set[int] = set()

    def node(self, value: Any, name: str) -> Any:
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is str:
            return _text(value, name)
        if kind is int:
            return value if -_SAFE_INT <= value <= _SAFE_INT else {"$": "int", "of": _digits(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$": "float", "of": repr(value)}
        if kind is complex:
            return {"$": "complex", "of": [repr(value.real), repr(value.imag)]}
        if id(value) in self._open:
            raise UnsupportedStateError(
                f"{name or 'the state'} contains itself", path=name, hint="break the cycle: save the parts by name"
            )
        self._open.add(id(value))
        try:
            return self._container(value, name)
        except RecursionError:
            raise UnsupportedStateError(
                f"{name[:80]}... is nested too deeply", path=name, hint="flatten it, or give it a state_dict() that is flat"
            ) from None
        finally:
            self._open.discard(id(value))

    def _container(self, value: Any, name: str) -> Any:
        adapter = adapter_for(value)
        if adapter is not None:
            return self._leaf(adapter, value, name)
        if isinstance(value, PerRank):
            return self._per_rank(value, name)
        if type(value) in (set, frozenset):
            items = sorted(value, key=lambda item: (type(item).__name__, repr(item)))
            return {"$": type(value).__name__, "of": [self.node(item, child_name(name, i)) for i, item in enumerate(items)]}
        opened = open_container(value)
        if opened is not None and opened.tag in _MAKE:
            return self._mapping(opened.tag, opened.children, name)
        if opened is not None:
            children = {key: self.node(item, child_name(name, key)) for key, item in opened.children.items()}
            if opened.tag == "namedtuple":
                return {"$": "namedtuple", "name": type(value).__name__, "of": children}
            return [*children.values()] if opened.tag == "list" else {"$": opened.tag, "of": [*children.values()]}
        constant = framework_constant(value)
        if constant is not None:
            return {"$": constant[0], "of": constant[1]}
        known = open_object(value)
        if known is not None:
            return self.node(known.state, name)
        where = f"{name!r} is" if name else "the state is"
        raise UnsupportedStateError(
            f"{where} a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold",
            path=name,
            hint="save arrays, numbers, strings, None, bytes, lists, tuples and dicts of these, or objects with state_dict()",
        )

    def _per_rank(self, value: PerRank, name: str) -> Any:
        outer, self._own = self._own, True
        try:
            return {"$": "per_rank", "of": {str(self._rank): self.node(value.value, rank_name(name, self._rank))}}
        finally:
            self._own = outer

    def _mapping(self, tag: str, value: Mapping[Any, Any], name: str) -> Any:
        if all(type(key) is str for key in value):
            return {"$": tag, "of": {_text(key, name): self.node(item, child_name(name, key)) for key, item in value.items()}}
        for key in value:
            if not _plain(key):
                raise UnsupportedStateError(
                    f"{name!r} has a key of type {type(key).__qualname__}",
                    path=name,
                    hint="keys are strings, numbers, booleans, None or tuples of these; convert them first",
                )
        pairs = []
        for (key, item), part in zip(value.items(), _parts(value), strict=True):
            inner = _joined(name, part)
            pair = [self.node(key, inner), self.node(item, inner)]
            pairs.append(pair if part == _escaped(str(key)) else [*pair, part])
        return {"$": tag, "of": pairs}

    def _leaf(self, adapter: LeafAdapter, value: Any, name: str) -> Any:
        if not name:
            raise UnsupportedStateError("a checkpoint holds a dict of items, not one array", hint="save(step, {'name': array})")
        if name in self._names or name == "__metadata__":
            raise UnsupportedStateError(
                f"two tensors of the state have the name {name!r}", path=name, hint="rename one of the keys on its path"
            )
        self._names.add(name)
        _text(name, name)
        try:
            self._add(name, adapter, value, self._own)
        except UnsupportedStateError as error:
            raise UnsupportedStateError(f"{name!r}: {error.message}", path=name, hint=error.hint) from error
        return {"$": "leaf", "of": adapter.kind}


def _digits(value: int) -> str:
    return str(value) if value.bit_length() < _LONG_INT else hex(value)


def _text(value: str, name: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnsupportedStateError(
            f"{name!r}: the string {value!r} is not valid Unicode", path=name, hint="save it as bytes"
        ) from None
    return value


def _plain(key: Any) -> bool:
    return key is None or type(key) in (bool, int, float, str) or (type(key) is tuple and all(map(_plain, key)))


def children(node: Any, name: str) -> Iterator[tuple[Any, str, Any]]:
    """``(key, name, node)`` of what lies directly inside a container's node; nothing for others.

    Raises:
        FormatError: the JSON is not what `encode` makes.
    """
    try:
        yield from _children(node, name)
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def _children(node: Any, name: str) -> Iterator[tuple[Any, str, Any]]:
    if isinstance(node, list):
        of: Any = node
    elif isinstance(node, dict) and node.get("$") == "per_rank":
        for rank, item in node["of"].items():
            yield rank, rank_name(name, rank), item
        return
    elif isinstance(node, dict) and node.get("$") in ("dict", "odict", "counter", "namedtuple", "tuple", "set", "frozenset"):
        of = node["of"]
        if isinstance(of, list) and node["$"] in _MAKE:
            for pair in of:
                key = decode(pair[0], _no_leaf, name)
                yield key, _joined(name, str(pair[2])) if len(pair) > 2 else child_name(name, key), pair[1]
            return
    else:
        return
    for key, item in of.items() if isinstance(of, dict) else enumerate(of):
        yield key, child_name(name, key), item


def leaf_names(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """``(name, kind)`` of every leaf under `node`, in order."""
    if isinstance(node, dict) and node.get("$") == "leaf":
        yield name, str(node.get("of"))
        return
    for _, inner, item in children(node, name):
        yield from leaf_names(item, inner)


def check_items(node: Any) -> None:
    """Make sure that a stored tree of items is one, before anything is done by it.

    Raises:
        FormatError: it is not what `encode` makes of a dict of items.
    """
    try:
        of = node["of"]
        if not isinstance(of, dict) and not all(isinstance(pair[0], str) for pair in of):
            raise TypeError("the items are no dict by name")
        _check(node, "")
    except _DAMAGE as error:
        raise _damaged("", error) from error


def _check(node: Any, name: str) -> None:
    if isinstance(node, dict):
        tag, of = node["$"], node.get("of")
        if not isinstance(tag, str) or (tag == "leaf" and not isinstance(of, str)):
            raise FormatError(f"the tree of the checkpoint is damaged at {name[:200]!r}: {str(node)[:200]}", hint=_DAMAGED_HINT)
        if tag in _CONTAINERS and not isinstance(of, dict | list):
            raise FormatError(
                f"the tree of the checkpoint is damaged at {name[:200]!r}: a {tag} without items", hint=_DAMAGED_HINT
            )
    for key, inner, item in children(node, name):
        hash(key)
        _check(item, inner)


_CONTAINERS: Final = ("per_rank", "dict", "odict", "counter", "namedtuple", "tuple", "set", "frozenset")
_DAMAGED_HINT: Final = "the index is damaged; go back to an earlier step"
_DAMAGE: Final = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError)


def _no_leaf(name: str) -> Any:
    raise FormatError(f"{name!r}: a leaf where a key is expected", hint=_DAMAGED_HINT)


def decode(node: Any, leaf: Callable[[str], Any], name: str = "", rank: int = 0) -> Any:
    """The value that `encode` described; `leaf` gives the value of a leaf by its name, `rank` chooses what is per rank.

    Raises:
        FormatError: the JSON is not what `encode` makes.
    """
    if not isinstance(node, dict | list):
        return node
    try:
        if isinstance(node, list):
            return [decode(item, leaf, inner, rank) for _, inner, item in children(node, name)]
        return _decode_tagged(node, leaf, name, rank)
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> FormatError:
    if isinstance(error, FormatError):
        return error
    return FormatError(
        f"the tree of the checkpoint is damaged at {name[:200]!r}: {type(error).__name__}: {error}",
        hint=_DAMAGED_HINT,
    )


def _decode_tagged(node: dict[str, Any], leaf: Callable[[str], Any], name: str, rank: int) -> Any:
    tag = node["$"]
    if tag == "per_rank":
        inner, own = own_node(node, name, rank)
        return decode(own, leaf, inner, rank)
    if tag == "leaf":
        return leaf(name)
    if tag == "int":
        return int(node["of"], 0)
    if tag == "float":
        return float(node["of"])
    if tag == "complex":
        return complex(*map(float, node["of"]))
    inside = [(key, decode(item, leaf, inner, rank)) for key, inner, item in children(node, name)]
    if tag in _MAKE:
        return _MAKE[tag](dict(inside)) if tag != "odict" else OrderedDict(inside)
    if tag == "namedtuple":
        return dict(inside)
    if tag in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[tag](value for _, value in inside)
    framework = framework_of_tag(tag)
    if framework is None:
        raise FormatError(f"{name!r} is a {tag}, which cannot be restored here", hint=f"install {tag.partition('.')[0]}")
    return framework.decode(tag, node["of"])
