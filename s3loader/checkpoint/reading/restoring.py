"""From a saved tree back to objects: into what the caller has, or anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from s3loader.checkpoint.format.records import Chunk
from s3loader.checkpoint.state import tree
from s3loader.checkpoint.state.leaves import Target, adapter_for, adapter_of_kind, framework_that_expands
from s3loader.errors import CheckpointError

__all__ = ["Restoration"]

_MISSING: Any = object()


class Restoration:
    """One restore: first `wanted` is read, then `value` builds the result.

    Args:
        node: The saved tree.
        chunks: Chunks of every tensor by its name.
        target: What to restore into; a tree of the same shape, where any part may be missing (restored anew),
            an array (filled in place where it can be) or an object with state.
        rank: Whose part of a `PerRank` to restore.
        fresh: Makes the target of a leaf by its kind, type and shape; default: as it was saved.
    """

    def __init__(
        self,
        node: Any,
        chunks: Mapping[str, Sequence[Chunk]],
        target: Any = None,
        *,
        rank: int = 0,
        fresh: Callable[[str, str, tuple[int, ...]], Target] | None = None,
    ) -> None:
        self._node, self._chunks, self._target, self._rank = node, chunks, target, rank
        self._fresh = fresh or (lambda kind, dtype, shape: adapter_of_kind(kind).fresh(dtype, shape))
        self._values: dict[str, Any] = {}
        self._in_place: dict[str, bool] = {}
        self._states: dict[str, Any] = {}
        self._targets: list[tuple[Sequence[Chunk], Target, Callable[[Any], None]]] = []
        self._collect(node, target if target is not None else _MISSING, "", owned=False)

    @property
    def wanted(self) -> Iterable[tuple[Sequence[Chunk], Target, Callable[[Any], None]]]:
        """What `read_targets` takes."""
        return self._targets

    def value(self) -> Any:
        """The restored tree; objects of the target with their state loaded."""
        return self._build(self._node, self._target if self._target is not None else _MISSING, "")

    # what to read

    def _collect(self, node: Any, target: Any, name: str, *, owned: bool) -> None:
        """Plan what lies under `node`; `owned`: the target is the state of an object, which looks after itself."""
        if isinstance(node, dict) and node.get("$") == "leaf":
            self._leaf(node["of"], target, name, owned)
            return
        if _per_rank(node):
            inner, own = tree.own_node(node, name, self._rank)
            self._collect(own, target.value if isinstance(target, tree.PerRank) else target, inner, owned=owned)
            return
        if not isinstance(node, dict | list):
            if not owned and target is not _MISSING and adapter_for(target) is not None:
                raise CheckpointError(
                    f"{name!r} is {node!r} in the checkpoint, an array in the target",
                    hint="give None in its place to get what was saved; `s3loader ckpt inspect --values` shows it",
                )
            return
        inside = self._inside(target, name)
        owned = owned or name in self._states
        if not owned:
            _refuse_more(node, inside, name)
        for key, inner, child in tree.children(node, name):
            self._collect(child, _child(inside, key), inner, owned=owned)

    def _leaf(self, kind: str, target: Any, name: str, owned: bool) -> None:
        chunks = self._chunks.get(name)
        if not chunks:
            raise CheckpointError(
                f"{name!r} is in the tree of the checkpoint, but not among its tensors",
                hint="it is damaged; go back to an earlier step",
            )
        dtype, shape = chunks[0].dtype, tuple(chunks[0].shape)
        into = None
        if target is not _MISSING and target is not None:
            adapter = adapter_for(target)
            if adapter is None and not owned:
                raise CheckpointError(
                    f"{name!r} is an array in the checkpoint, a {type(target).__qualname__} in the target",
                    hint="give an array in its place, or None to get a new one",
                )
            into = adapter.into(target) if adapter is not None else None
            if into is not None and owned and into.dtype != dtype:
                into = None  # the object converts it when it gets its state
            if into is not None and (into.dtype, tuple(into.shape)) != (dtype, shape):
                raise CheckpointError(
                    f"{name!r} is {dtype} {list(shape)} in the checkpoint, {into.dtype} {list(into.shape)} in the target",
                    hint="restore it without a target and convert it",
                )
        place = into if into is not None else self._fresh(kind, dtype, shape)
        self._in_place[name] = place.in_place

        values = self._values  # not `self`: a cycle would keep all that was restored until the next collection

        def done(value: Any) -> None:
            values[name] = value

        self._targets.append((chunks, place, done))

    def _inside(self, target: Any, name: str) -> Any:
        """The tree in a target: itself, or the state of an object."""
        if target is _MISSING or _is_container(target):
            return target
        if name not in self._states:
            state = tree.expand(target)
            if state is None:
                raise CheckpointError(
                    f"the target at {name!r} is a {type(target).__qualname__}, which has no state to restore",
                    hint="give an array, a container, an object with load_state_dict(), or None",
                )
            self._states[name] = state
        return self._states[name]

    # the result

    def _build(self, node: Any, target: Any, name: str) -> Any:
        if isinstance(node, dict) and node.get("$") == "leaf":
            return self._values[name]
        if _per_rank(node):
            inner, own = tree.own_node(node, name, self._rank)
            return self._build(own, target.value if isinstance(target, tree.PerRank) else target, inner)
        inside = self._states.get(name, target)
        if inside is _MISSING or not isinstance(node, dict | list):
            value = tree.decode(node, self._values.__getitem__, name, self._rank)
        else:
            value = self._filled(node, inside, name)
        return self._load(target, value, node, name) if name in self._states else value

    def _filled(self, node: Any, target: Any, name: str) -> Any:
        """A container, with the types of the target's where they are richer than what is stored."""
        built = {key: self._build(child, _child(target, key), inner) for key, inner, child in tree.children(node, name)}
        by_name = {tree.child_name(name, key): value for key, value in built.items()}
        if tree.is_namedtuple(target) and set(tree.fields_of(target)) == set(built):
            return type(target)(**built)
        if tree.is_dataclass(target) and not tree.is_stateful(target) and built.keys() <= set(tree.dataclass_fields(target)):
            return _replaced(target, built)
        if not built:
            return tree.decode(node, self._values.__getitem__, name, self._rank)
        return _rebuilt(node, name, by_name)

    def _load(self, target: Any, state: Any, node: Any, name: str) -> Any:
        known = framework_that_expands(target)
        if known is not None:
            in_place = all(self._in_place[leaf] for leaf, _ in tree.leaf_names(node, name))
            return known[0].absorb(target, state, in_place=in_place)
        target.load_state_dict(state)
        return target


def _replaced(target: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass like `target` with other values, also of fields that its constructor does not take."""
    taken = {field.name for field in dataclasses.fields(target) if field.init}
    made = dataclasses.replace(target, **{name: value for name, value in values.items() if name in taken})
    for name in values.keys() - taken:
        object.__setattr__(made, name, values[name])  # it may be frozen
    return made


def _rebuilt(node: Any, name: str, children: Mapping[str, Any]) -> Any:
    """`node` decoded, with its direct children given."""
    marks = {"$": "leaf", "of": ""}
    if isinstance(node, list):
        shallow: Any = [marks] * len(node)
    elif isinstance(node["of"], dict):
        shallow = {**node, "of": dict.fromkeys(node["of"], marks)}
    elif node["$"] in ("dict", "odict", "counter"):
        shallow = {**node, "of": [[pair[0], marks] for pair in node["of"]]}
    else:
        shallow = {**node, "of": [marks] * len(node["of"])}
    return tree.decode(shallow, children.__getitem__, name)


def _refuse_more(node: Any, target: Any, name: str) -> None:
    """An entry of the caller's own containers that the checkpoint lacks would stay as it is without a word."""
    keys = {key for key, _, _ in tree.children(node, name)}
    if isinstance(target, Mapping):
        more = [key for key in target if key not in keys]
    elif isinstance(target, list | tuple) and not tree.is_namedtuple(target):
        more = list(range(len(keys), len(target)))
    elif tree.is_dataclass(target) or tree.is_namedtuple(target):
        _same_fields(keys, target, name)
        return
    else:
        return
    if more:
        raise CheckpointError(
            f"the target has {tree.child_name(name, more[0])!r}, which is not in the checkpoint",
            hint="leave it out of the target, or restore without a target; `s3loader ckpt inspect` lists what was saved",
        )


def _same_fields(saved: set[Any], target: Any, name: str) -> None:
    own = set(tree.dataclass_fields(target) if tree.is_dataclass(target) else tree.fields_of(target))
    if saved != own and not all(isinstance(key, int) for key in saved):
        raise CheckpointError(
            f"{name!r} has the fields {sorted(map(str, saved))} in the checkpoint, {sorted(own)} in the target",
            hint="restore it without a target and convert it",
        )


def _per_rank(node: Any) -> bool:
    return isinstance(node, dict) and node.get("$") == "per_rank"


def _is_container(target: Any) -> bool:
    if isinstance(target, Mapping | list | tuple | set | frozenset | str | int | float | complex) or target is None:
        return True
    return tree.is_dataclass(target) and not tree.is_stateful(target)


def _child(target: Any, key: Any) -> Any:
    if target is _MISSING or target is None:
        return _MISSING
    if isinstance(target, Mapping):
        return target.get(key, _MISSING)
    if tree.is_namedtuple(target):
        return getattr(target, key, _MISSING) if isinstance(key, str) else target[key]
    if isinstance(target, list | tuple):
        return target[key] if isinstance(key, int) and key < len(target) else _MISSING
    if dataclasses.is_dataclass(target):
        return getattr(target, str(key), _MISSING)
    return _MISSING
