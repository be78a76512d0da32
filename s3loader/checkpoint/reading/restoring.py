"""From a saved tree back to objects: into what the caller has, or anew.

The law: every leaf of the target is filled, or an error names the first that was not; what comes back has the types of the
target. Only the state of an object that converts what it is given (`load_state_dict`) is more lenient: the object decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from s3loader.checkpoint.format.records import Chunk
from s3loader.checkpoint.state import tree
from s3loader.checkpoint.state.leaves import NUMPY, LeafAdapter, SpreadAdapter, Target, adapter_for, adapter_of_kind
from s3loader.checkpoint.state.opening import Opened, WithState, framework_constant, open_container, open_object
from s3loader.dtypes import nbytes, numpy_dtype
from s3loader.errors import CheckpointError

__all__ = ["Restoration", "converting", "converts"]

_MISSING: Any = object()
_Build: TypeAlias = Callable[[], Any]
"""Makes the value of a node, once everything is read."""
_SETS = ("set", "frozenset")


class _Owner(NamedTuple):
    """The object in whose state we are; it converts by itself what does not fit."""

    known: WithState
    path: tuple[Any, ...] = ()

    def under(self, key: Any) -> _Owner:
        return self._replace(path=(*self.path, key))


class Restoration:
    """One restore: first `wanted` is read, then `value` builds the result.

    Args:
        node: The saved tree.
        chunks: Chunks of every tensor by its name.
        target: What to restore into; a tree of the same shape, where any part may be missing (restored anew),
            an array (filled in place where it can be) or an object with state.
        rank: Whose part of a `PerRank` to restore.
        fresh: Makes the target of a leaf by its kind, type and shape; default: as it was saved.
        convert: Whether arrays of the target may be of another type, of the same kind of number or a wider one.
    """

    def __init__(
        self,
        node: Any,
        chunks: Mapping[str, Sequence[Chunk]],
        target: Any = None,
        *,
        rank: int = 0,
        fresh: Callable[[str, str, tuple[int, ...]], Target] | None = None,
        convert: bool = False,
    ) -> None:
        self._chunks, self._target, self._rank, self._own_fresh, self._convert = chunks, target, rank, fresh, convert
        self._values: dict[str, Any] = {}
        self._in_place: dict[str, bool] = {}
        self._targets: list[tuple[Sequence[Chunk], Target, Callable[[Any], None]]] = []
        self._build = self._plan(node, target if target is not None else _MISSING, "", None)

    @property
    def wanted(self) -> Iterable[tuple[Sequence[Chunk], Target, Callable[[Any], None]]]:
        """What `read_targets` takes."""
        return self._targets

    def value(self) -> Any:
        """The restored tree; objects of the target with their state loaded."""
        return self._build()

    def _plan(self, node: Any, target: Any, name: str, owner: _Owner | None) -> _Build:
        """Plan what lies under `node`."""
        if _tag(node) == "per_rank":
            inner, own = tree.own_node(node, name, self._rank)
            return self._plan(own, target, inner, owner)
        if isinstance(target, tree.PerRank):
            target = target.value
        if target is _MISSING or target is None:
            return self._anew(node, name, owner)
        if _tag(node) == "leaf" and (adapter := adapter_for(target)) is not None:
            return self._leaf(node["of"], target, adapter, name, owner)
        if (opened := open_container(target)) is not None:
            return self._container(node, target, opened, name, owner)
        if isinstance(target, set | frozenset):
            return self._set(node, target, name, owner)
        if not _is_value(target) and (known := open_object(target)) is not None:
            return self._object(node, target, known, name)
        if owner is None and not _fits(node, target):
            raise _mismatch(node, target, name)
        return self._anew(node, name, owner)

    # what has no target

    def _anew(self, node: Any, name: str, owner: _Owner | None) -> _Build:
        """As it was saved."""
        if _tag(node) == "leaf":
            return self._fresh_leaf(node["of"], name, owner)
        if _tag(node) == "per_rank":
            return self._plan(node, _MISSING, name, owner)
        built = {
            inner: self._anew(child, inner, owner.under(key) if owner is not None else None)
            for key, inner, child in tree.children(node, name)
        }
        return lambda: _decoded(node, name, {inner: build() for inner, build in built.items()})

    def _fresh_leaf(self, kind: str, name: str, owner: _Owner | None) -> _Build:
        chunks = self._chunks_of(name)
        dtype, shape = chunks[0].dtype, tuple(chunks[0].shape)
        place = None
        if owner is not None and owner.known.place is not None:
            place = owner.known.place(owner.path, dtype, shape)
        if place is None and self._own_fresh is not None:
            place = self._own_fresh(kind, dtype, shape)
        if place is None:
            # versions that did not say so saved what is spread over processes as boxes of a plain tensor
            adapter = adapter_of_kind("torch.sharded" if kind == "torch" and chunks[0].box is not None else kind)
            try:
                if isinstance(adapter, SpreadAdapter):
                    place = adapter.beside(dtype, shape, _leaves(self._target))
                else:
                    place = adapter.fresh(dtype, shape)
            except CheckpointError as error:
                raise _named(error, name) from error
        return self._want(name, chunks, place)

    # leaves

    def _chunks_of(self, name: str) -> Sequence[Chunk]:
        chunks = self._chunks.get(name)
        if not chunks:
            raise CheckpointError(
                f"{name!r} is in the tree of the checkpoint, but not among its tensors",
                hint="it is damaged; go back to an earlier step",
            )
        return chunks

    def _leaf(self, kind: str, target: Any, adapter: LeafAdapter, name: str, owner: _Owner | None) -> _Build:
        chunks = self._chunks_of(name)
        dtype, shape = chunks[0].dtype, tuple(chunks[0].shape)
        if kind != adapter.kind and ".key." in kind and ".key." in adapter.kind:
            raise CheckpointError(
                f"{name!r} is a {kind} in the checkpoint, a {adapter.kind} in the target",
                hint="make the target's key with the implementation that was saved, or give None to get the key as it was",
            )
        try:
            into = adapter.into(target)
        except CheckpointError as error:
            if owner is not None:
                return self._fresh_leaf(kind, name, owner)  # the object takes it, or says why not
            raise _named(error, name) from error
        if into is None:
            if owner is not None:
                return self._fresh_leaf(kind, name, owner)
            if dtype != "U8" or len(shape) != 1:
                raise CheckpointError(
                    f"{name!r} is {dtype} {list(shape)} in the checkpoint, {type(target).__qualname__} in the target",
                    hint="give an array in its place, or None to get a new one",
                )
            return self._want(name, chunks, adapter.fresh(dtype, shape))
        if (into.dtype, tuple(into.shape)) != (dtype, shape):
            if owner is not None and not owner.known.exact:
                return self._fresh_leaf(kind, name, owner)
            if owner is not None and tuple(into.shape) == shape:  # the object converts it when it gets its state
                if isinstance(adapter, SpreadAdapter):
                    return self._want(name, chunks, adapter.beside(dtype, shape, [target]))
                return self._want(name, chunks, adapter.fresh(dtype, shape))
            alike = tuple(into.shape) == shape
            if alike and self._convert and converts(dtype, into.dtype):
                return self._want(name, chunks, converting(into, dtype))
            raise CheckpointError(
                f"{name!r} is {dtype} {list(shape)} in the checkpoint, {into.dtype} {list(into.shape)} in the target",
                hint="give a target of the shape that was saved; `s3loader ckpt inspect` shows it"
                if not alike
                else "restore(..., convert=True) converts to the same kind of number or a wider one; or give no target"
                if converts(dtype, into.dtype)
                else "no conversion keeps its values: give a target of the type that was saved, or None",
            )
        return self._want(name, chunks, into)

    def _want(self, name: str, chunks: Sequence[Chunk], place: Target) -> _Build:
        self._in_place[name] = place.in_place
        values = self._values  # not `self`: a cycle would keep all that was restored until the next collection

        def done(value: Any) -> None:
            values[name] = value

        self._targets.append((chunks, place, done))
        return lambda: values[name]

    # containers and objects

    def _container(self, node: Any, target: Any, opened: Opened, name: str, owner: _Owner | None) -> _Build:
        saved = {key: (inner, child) for key, inner, child in tree.children(node, name)}
        places = _places(node, saved, opened)
        if owner is not None and (places is None or set(places.values()) != set(opened.children)):
            return self._partly(node, saved, opened, name, owner)
        if places is None:
            raise _mismatch(node, target, name)
        if owner is None:
            _refuse_others(saved, places, opened, target, name)
        built = {}
        for key, (inner, child) in saved.items():
            at = places.get(key, _MISSING)
            if at is _MISSING and key in opened.rest:
                continue
            part = opened.children.get(at, _MISSING) if at is not _MISSING else _MISSING
            place = key if at is _MISSING else at
            built[place] = self._plan(child, part, inner, owner.under(key) if owner is not None else None)
        order = [*(key for key in opened.children if key in built), *(key for key in built if key not in opened.children)]

        def build() -> Any:
            return opened.rebuild({key: built[key]() for key in order})

        return build

    def _partly(self, node: Any, saved: Mapping[Any, tuple[str, Any]], opened: Opened, name: str, owner: _Owner) -> _Build:
        """Inside the state of an object, which has other children now: as it was saved, into what there is."""
        if not saved:
            return self._anew(node, name, owner)
        built = {
            inner: self._plan(child, opened.children.get(key, _MISSING), inner, owner.under(key))
            for key, (inner, child) in saved.items()
        }
        return lambda: _decoded(node, name, {inner: build() for inner, build in built.items()})

    def _set(self, node: Any, target: set[Any] | frozenset[Any], name: str, owner: _Owner | None) -> _Build:
        if owner is None and _tag(node) not in _SETS:
            raise _mismatch(node, target, name)
        build = self._anew(node, name, owner)
        kind = type(target)
        return build if owner is not None else (lambda: kind(build()))

    def _object(self, node: Any, target: Any, known: WithState, name: str) -> _Build:
        if not _alike(node, known.state, name):
            raise _mismatch(node, target, name)
        owner = None if known.in_place else _Owner(known)
        build = self._plan(node, known.state, name, owner)
        leaves, in_place = [leaf for leaf, _ in tree.leaf_names(node, name)], self._in_place

        def load() -> Any:
            return known.load(build(), name, all(in_place[leaf] for leaf in leaves))

        return load


def _tag(node: Any) -> str:
    """``list`` of a list, the tag of a tagged node, nothing of a plain value."""
    if isinstance(node, list):
        return "list"
    return str(node.get("$")) if isinstance(node, dict) else ""


def _is_value(target: Any) -> bool:
    return target is None or isinstance(target, bool | int | float | complex | str) or framework_constant(target) is not None


_CONTAINERS = ("list", "tuple", "dict", "odict", "counter", "namedtuple", *_SETS)


def _fits(node: Any, target: Any) -> bool:
    """Whether a plain value was saved, and the target is one."""
    return _tag(node) not in ("leaf", *_CONTAINERS) and _is_value(target)


def _alike(node: Any, state: Any, name: str) -> bool:
    """Whether the state of an object can have been saved as `node`: both are mappings, or sequences, or no containers."""
    if state is None or _tag(node) == "per_rank":
        return True
    opened = open_container(state)
    if opened is None:
        return isinstance(state, set | frozenset) == (_tag(node) in _SETS) and _tag(node) not in _CONTAINERS[: -len(_SETS)]
    return _places(node, {key: None for key, _, _ in tree.children(node, name)}, opened) is not None


def _places(node: Any, saved: Mapping[Any, Any], opened: Opened) -> dict[Any, Any] | None:
    """Where in the target each saved child goes, for those it has a place for; None where the kinds do not fit."""
    sequence = _tag(node) in ("list", "tuple") and all(isinstance(key, int) for key in saved)
    if _tag(node) not in ("list", "tuple", "dict", "odict", "counter", "namedtuple"):
        return None
    if opened.tag in ("list", "tuple"):
        if not sequence and not (opened.foreign and set(saved) == {str(i) for i in range(len(saved))}):
            return None
        return {key: int(key) for key in saved if int(key) in opened.children}
    if sequence:
        if not opened.named or opened.tag != "namedtuple" or len(saved) != len(opened.children):
            return None
        return dict(zip(saved, opened.children, strict=True))
    places = {key: key for key in saved if key in opened.children}
    if opened.foreign:  # earlier versions wrote these keys as text
        texts = {str(key): key for key in opened.children}
        if len(texts) == len(opened.children):
            places |= {key: texts[key] for key in saved if key not in places and isinstance(key, str) and key in texts}
    return places


def _refuse_others(saved: Mapping[Any, Any], places: Mapping[Any, Any], opened: Opened, target: Any, name: str) -> None:
    """An entry of the caller's own containers that the checkpoint lacks would stay as it is without a word; and what a type
    has no place for would be lost."""
    taken = set(places.values())
    more = [key for key in opened.children if key not in taken]
    lost = [key for key in saved if key not in places and key not in opened.rest]
    if opened.named and (more or lost):
        raise CheckpointError(
            f"{name!r} has the fields {sorted(map(str, saved))} in the checkpoint, "
            f"{sorted(map(str, opened.children))} in the target",
            hint="restore it without a target and convert it",
        )
    if more:
        first = _first(opened.children[more[0]], tree.child_name(name, more[0]))
        raise CheckpointError(
            f"the target has {first!r}, which is not in the checkpoint",
            hint="leave it out of the target, or restore without a target; `s3loader ckpt inspect` lists what was saved",
        )
    if opened.fixed and lost:
        raise CheckpointError(
            f"{tree.child_name(name, lost[0])!r} is in the checkpoint, and the {type(target).__qualname__} of the target has "
            "no place for it",
            hint="give a target of the structure that was saved, or None in its place; `s3loader ckpt inspect` tells it",
        )


def _decoded(node: Any, name: str, children: Mapping[str, Any]) -> Any:
    """`node` decoded, with its direct children given by their names."""
    if not children or not isinstance(node, dict | list):
        return tree.decode(node, children.__getitem__, name)
    marks = {"$": "leaf", "of": ""}
    if isinstance(node, list):
        shallow: Any = [marks] * len(node)
    elif isinstance(node["of"], dict):
        shallow = {**node, "of": dict.fromkeys(node["of"], marks)}
    elif node["$"] in ("dict", "odict", "counter"):
        shallow = {**node, "of": [[pair[0], marks, *pair[2:]] for pair in node["of"]]}
    else:
        shallow = {**node, "of": [marks] * len(node["of"])}
    return tree.decode(shallow, children.__getitem__, name)


def _inside(value: Any) -> Mapping[Any, Any]:
    """What lies directly in a part of a target."""
    if value is None or _is_value(value) or adapter_for(value) is not None:
        return {}
    if isinstance(value, tree.PerRank):
        return {"": value.value}
    opened = open_container(value)
    if opened is not None:
        return opened.children
    known = open_object(value)
    return {"": known.state} if known is not None else {}


def _leaves(target: Any) -> Iterator[Any]:
    """The arrays of a target."""
    if target is None or target is _MISSING:
        return
    if adapter_for(target) is not None:
        yield target
    elif open_container(target) is None and (known := open_object(target)) is not None:
        yield from known.near
        yield from _leaves(known.state)
    else:
        for part in _inside(target).values():
            yield from _leaves(part)


def _first(target: Any, name: str) -> str:
    """Name of the first leaf in a part of a target; its own, where it has none."""
    for key, part in _inside(target).items():
        return _first(part, tree.child_name(name, key) if key != "" else name)
    return name


def _named(error: CheckpointError, name: str) -> CheckpointError:
    return CheckpointError(f"{name!r}: {error.message}", hint=error.hint)


def _mismatch(node: Any, target: Any, name: str) -> CheckpointError:
    """What was saved and what it should be restored into are of different kinds."""
    there = type(target).__qualname__
    if _tag(node) == "leaf":
        if open_container(target) is None and not _is_value(target):
            return CheckpointError(
                f"the target at {name!r} is a {there}, which has no state to restore",
                hint="give an array, a container, an object with load_state_dict(), or None",
            )
        saved, hint = "an array", "give an array in its place, or None to get a new one"
    elif _tag(node) in _CONTAINERS:
        if not _is_value(target) and not _inside(target) and adapter_for(target) is None:
            return CheckpointError(
                f"the target at {name!r} is a {there}, which has no state to restore",
                hint="give an array, a container, an object with load_state_dict(), or None",
            )
        kind = {"odict": "dict", "counter": "dict"}.get(_tag(node), _tag(node))
        saved, hint = f"a {kind}", "give a target of that structure, or None in its place to get what was saved"
    else:
        text = repr(node)
        saved = text if len(text) < 80 else f"{text[:77]}..."
        hint = "give None in its place to get what was saved; `s3loader ckpt inspect --values` shows it"
    what = "an array" if adapter_for(target) is not None else f"a {there}"
    first = _first(target, name)
    told = f"; {first!r} could not be filled" if first != name else ""
    return CheckpointError(f"{name!r} is {saved} in the checkpoint, {what} in the target{told}", hint=hint)


def converts(saved: str, dtype: str) -> bool:
    """Whether an array saved as `saved` may become one of `dtype`: the same kind of number, or a wider kind."""
    return _kind(saved) <= _kind(dtype)


def _kind(dtype: str) -> int:
    """Booleans, integers, floats, complex numbers."""
    return 0 if dtype == "BOOL" else 1 if dtype[0] in "UI" else 3 if dtype[0] == "C" else 2


def converting(into: Target, saved: str) -> Target:
    """A target of the type `saved` in the place of `into`: each of its boxes is read and verified apart, then converted."""
    parts = [(piece, NUMPY.fresh(saved, piece.shape)) for piece in into.pieces]

    def finish() -> Any:
        import numpy as np

        for piece, part in parts if nbytes(into.dtype, into.shape) else ():
            memory = np.frombuffer(piece.open(), numpy_dtype(into.dtype)).reshape(piece.shape)
            np.copyto(memory, part.finish(), casting="unsafe")
        return into.finish()

    pieces = [piece._replace(open=part.pieces[0].open) for piece, part in parts]
    return Target(saved, into.shape, pieces, finish, into.in_place)
