"""A target that is not quite what was saved: names that a wrapper has changed, parts that one of the two lacks.

Only on request. The target is prepared before it is restored (`Fitting.node`, `Fitting.target`) and completed afterwards
(`Fitting.finish`), so that restoring itself knows only targets that fit.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from s3loader.checkpoint.format.records import Chunk
from s3loader.checkpoint.state import tree
from s3loader.checkpoint.state.leaves import SpreadAdapter, adapter_for
from s3loader.errors import CheckpointError, ConfigError

__all__ = ["WRAPPERS", "Fit", "Fitting", "Restored", "with_way_out"]

WRAPPERS: Final = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What DDP, ``torch.compile``, FSDP1 and activation checkpointing put before the names of what they wrap."""
_ANYWAY: Final = (
    "restore(..., strict=False) restores what both have and lists the rest; `s3loader ckpt inspect` shows what was saved"
)


class Fit(NamedTuple):
    """How a target may differ from what was saved."""

    strict: bool = True
    assign: bool = False
    strip: bool | str | Sequence[str] = False

    @property
    def exact(self) -> bool:
        """Whether it may not."""
        return self.strict and not self.assign and not self.strip

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What may be taken off names.

        Raises:
            ConfigError: not text.
        """
        if isinstance(self.strip, bool):
            return WRAPPERS if self.strip else ()
        given = (self.strip,) if isinstance(self.strip, str) else tuple(self.strip)
        if not all(isinstance(prefix, str) and prefix.strip(".") for prefix in given):
            raise ConfigError(
                f"strip cannot be {self.strip!r}", hint=f"strip=True takes off {', '.join(WRAPPERS)}; or name your own"
            )
        return tuple(prefix.rstrip(".") + "." for prefix in given)


class Restored(dict[str, Any]):
    """Restored items, and what target and checkpoint do not have in common."""

    missing: list[str]
    """Names that the target has and the checkpoint lacks: these were left as they are."""
    unexpected: list[str]
    """Names of modules' states that the checkpoint has and the target lacks: these were not read."""


class Module:
    """Poses as the module for those of its names that are restored, under the names they were saved with."""

    def __init__(self, module: Any, names: Mapping[str, str], *, assign: bool, spread: Mapping[str, Any]) -> None:
        self.module, self._names, self._assign, self._spread = module, names, assign, spread
        """`names`: saved name -> name in the module. `spread`: memory for what `assign` gives a module that is spread over
        processes, by saved name."""

    def state_dict(self) -> dict[str, Any]:
        if self._assign:
            return dict(self._spread)
        own = self.module.state_dict()
        return {saved: own[name] for saved, name in self._names.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        renamed = {self._names[saved]: value for saved, value in state.items()}
        self.module.load_state_dict(renamed, strict=False, **({"assign": True} if self._assign else {}))


class Fitting:
    """One restore into a target that need not fit.

    Args:
        node: The saved tree.
        chunks: Chunks of every tensor by its name.
        target: What to restore into.
        fit: How it may differ.

    Raises:
        CheckpointError: a module lacks names, or has others, and `Fit.strict` is set; two names become one.
    """

    def __init__(self, node: Any, chunks: Mapping[str, Sequence[Chunk]], target: Any, fit: Fit) -> None:
        self._chunks, self._fit, self._prefixes = chunks, fit, fit.prefixes
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self._after: list[Callable[[Any], Any]] = []
        self._kept: dict[str, dict[Any, Any]] = {}
        self.node, self.target = self._fitted(node, target, "")

    def finish(self, value: Any) -> Any:
        """The restored tree, complete."""
        return self._finished(value, "")

    # before

    def _fitted(self, node: Any, target: Any, name: str) -> tuple[Any, Any]:
        if _is_module(target) and _is_mapping(node):
            return self._module(node, target, name)
        if type(target) in (dict, OrderedDict) and _is_mapping(node):
            return self._mapping(node, target, name)
        if type(target) in (list, tuple) and isinstance(_children_of(node), list):
            parts = list(tree.children(node, name))
            if len(parts) == len(target):
                fitted = [self._fitted(child, part, inner) for (_, inner, child), part in zip(parts, target, strict=True)]
                return _with_children(node, [child for child, _ in fitted]), type(target)(part for _, part in fitted)
        return node, target

    def _mapping(self, node: Any, target: dict[Any, Any], name: str) -> tuple[Any, Any]:
        saved = {key: (inner, child) for key, inner, child in tree.children(node, name)}
        parts: dict[Any, Any] = {}
        nodes: dict[Any, Any] = {}
        for key, part in target.items():
            if key in saved:
                nodes[key], parts[key] = self._fitted(saved[key][1], part, saved[key][0])
            elif self._fit.strict:
                parts[key] = part
            else:
                self._kept.setdefault(name, {})[key] = part
                self.missing += _names_in(part, tree.child_name(name, key))
        children = [nodes.get(key, child) for key, (_, child) in saved.items()]
        return _with_children(node, children), type(target)(parts)

    def _module(self, node: Any, module: Any, name: str) -> tuple[Any, Any]:
        saved = {str(key): child for key, _, child in tree.children(node, name)}
        state = module.state_dict()
        own = list(state)
        names = _matched(list(saved), own, self._prefixes, name)
        for key in names.values() if not self._fit.assign else ():
            if getattr(getattr(state[key], "device", None), "type", "") == "meta":
                raise CheckpointError(
                    f"{tree.child_name(name, key)!r} of the target is on the meta device, so there is no memory to fill",
                    hint="materialise the module first: module.to_empty(device=...), or restore(..., assign=True)",
                )
        unexpected = [tree.child_name(name, key) for key in saved if key not in names]
        missing = [tree.child_name(name, key) for key in own if key not in names.values()]
        if self._fit.strict and (missing or unexpected):
            raise _unlike(missing, unexpected, list(saved), own, name)
        self.missing += missing
        self.unexpected += unexpected
        kept = {key: child for key, child in saved.items() if key in names}
        spread = self._spread(names, state, name) if self._fit.assign else {}
        return {"$": node["$"], "of": kept}, Module(module, names, assign=self._fit.assign, spread=spread)

    def _spread(self, names: Mapping[str, str], state: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Empty tensors of the types that were saved, spread over processes as those of the module are, by saved name."""
        made: dict[str, Any] = {}
        for saved, own in names.items():
            chunks, adapter = self._chunks.get(tree.child_name(name, saved)), adapter_for(state[own])
            if chunks and isinstance(adapter, SpreadAdapter) and tuple(chunks[0].shape) == tuple(state[own].shape):
                made[saved] = adapter.like(state[own], chunks[0].dtype).finish()
        return made

    # after

    def _finished(self, value: Any, name: str) -> Any:
        if isinstance(value, Module):
            return value.module
        if type(value) in (dict, OrderedDict):
            done = {key: self._finished(part, tree.child_name(name, key)) for key, part in value.items()}
            value.update({**done, **self._kept.get(name, {})})
            return value
        if type(value) in (list, tuple):
            return type(value)(self._finished(part, tree.child_name(name, i)) for i, part in enumerate(value))
        return value


def _is_module(target: Any) -> bool:
    """Whether it has a state of names that may be loaded in parts."""
    if isinstance(target, type) or not callable(getattr(target, "state_dict", None)):
        return False
    try:
        return "strict" in inspect.signature(target.load_state_dict).parameters
    except (AttributeError, TypeError, ValueError):
        return False


def _is_mapping(node: Any) -> bool:
    return isinstance(node, dict) and node.get("$") in ("dict", "odict")


def _children_of(node: Any) -> Any:
    return node if isinstance(node, list) else node.get("of") if isinstance(node, dict) and node.get("$") == "tuple" else None


def _with_children(node: Any, children: Sequence[Any]) -> Any:
    if isinstance(node, list):
        return list(children)
    of = node["of"]
    if isinstance(of, dict):
        return {**node, "of": dict(zip(of, children, strict=True))}
    if node["$"] == "tuple":
        return {**node, "of": list(children)}
    return {**node, "of": [[pair[0], child, *pair[2:]] for pair, child in zip(of, children, strict=True)]}


def _names_in(part: Any, name: str) -> list[str]:
    """The names of what lies in a part of a target."""
    if isinstance(part, Mapping) and part:
        return [inner for key, child in part.items() for inner in _names_in(child, tree.child_name(name, key))]
    if _is_module(part):
        module: Any = part
        return [tree.child_name(name, key) for key in module.state_dict()]
    return [name]


def _matched(saved: Sequence[str], own: Sequence[str], prefixes: Sequence[str], where: str) -> dict[str, str]:
    """Saved name -> the module's, first as they are, then without the prefixes on either side."""
    names = {key: key for key in saved if key in set(own)}
    if not prefixes:
        return names
    left: dict[str, str] = {}
    for key in own:
        if key not in names:
            plain = _plain(key, prefixes)
            if plain in left:
                raise _ambiguous(where, left[plain], key)
            left[plain] = key
    taken: dict[str, str] = {}
    for key in saved:
        plain = _plain(key, prefixes)
        if key not in names and plain in left:
            if plain in taken:
                raise _ambiguous(where, taken[plain], key)
            taken[plain] = key
            names[key] = left[plain]
    return {key: names[key] for key in saved if key in names}


def _plain(key: str, prefixes: Sequence[str]) -> str:
    """`key` without any of `prefixes`, which stand at its beginning or after a dot."""
    dotted, before = "." + key, ""
    while dotted != before:
        before = dotted
        for prefix in prefixes:
            dotted = dotted.replace("." + prefix, ".")
    return dotted[1:]


def _ambiguous(where: str, one: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"{where!r}: {one!r} and {other!r} are one name without what strip= takes off",
        hint="name the prefix of the wrapper only, e.g. strip='module.'",
    )


def _unlike(
    missing: Sequence[str], unexpected: Sequence[str], saved: Sequence[str], own: Sequence[str], where: str
) -> CheckpointError:
    told = [f"the checkpoint lacks {_some(missing)}"] if missing else []
    told += [f"the module lacks {_some(unexpected)}"] if unexpected else []
    return CheckpointError(f"{where!r}: {'; '.join(told)}", hint=_way(saved, own))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def _way(saved: Iterable[str], own: Iterable[str]) -> str:
    plain = {_plain(key, WRAPPERS) for key in saved}, {_plain(key, WRAPPERS) for key in own}
    if plain[0] == plain[1]:
        return "the names differ by what a wrapper (DDP, torch.compile, FSDP) puts before them: restore(..., strip=True)"
    return _ANYWAY


def _modules(node: Any, target: Any, name: str) -> Iterator[tuple[list[str], list[str]]]:
    """Names that were saved, and names that there are, of the modules in a target."""
    if _is_module(target) and _is_mapping(node):
        yield [str(key) for key, _, _ in tree.children(node, name)], list(target.state_dict())
    elif isinstance(target, Mapping):
        for key, inner, child in tree.children(node, name):
            yield from _modules(child, target.get(key), inner)


def with_way_out(error: CheckpointError, node: Any, target: Any) -> CheckpointError:
    """`error` of a restore, with a hint at the option that helps, where names differ."""
    if "Missing key" in error.message or "Unexpected key" in error.message:
        unlike = (_way(saved, own) for saved, own in _modules(node, target, "") if set(saved) != set(own))
        error.hint = next(unlike, _ANYWAY)
    return error
