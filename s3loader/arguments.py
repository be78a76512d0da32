"""What callers pass in is held against the annotations, when they call.

`checked` on a function, or on a class for its constructor and public methods, refuses an argument of a wrong type and an
unknown keyword with a `ConfigError` that says what is wanted; and turns what is obvious (``np.int64(3)`` for an int) into
what the annotation says. Where the types are the usual ones, a call costs one set lookup per argument more.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import operator
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, Final, Literal, SupportsFloat, SupportsIndex, TypeVar, Union, cast

from s3loader.errors import ConfigError

__all__ = ["as_float", "checked", "local_path", "unknown_option", "whole_number"]

F = TypeVar("F", bound=Callable[..., Any])

_FOREIGN: Final[Mapping[str, tuple[str, ...]]] = {
    "async_save": ("save(...) returns at once; result() waits",),
    "aws_access_key_id": ("access_key_id=...",),
    "aws_profile": ("profile=...",),
    "aws_secret_access_key": ("secret_access_key=...",),
    "aws_session_token": ("session_token=...",),
    "batch": ("batch_size=...",),
    "batch_sampler": ("order=...",),
    "buffer_size": ('prefetch="64MiB"', 'shuffle="block"'),
    "cache_size": ('cache_limit="16GiB"',),
    "client": ("s3_client=...",),
    "client_kwargs": ("endpoint_url=...",),
    "collate_fn": ("collate=...",),
    "decoder": ("decode=...",),
    "drop_last": ('tail="drop"',),
    "drop_remainder": ('tail="drop"',),
    "empty_check": ("allow_empty=True",),
    "endpoint": ("endpoint_url=...",),
    "generator": ("seed=...",),
    "handler": ('on_error="skip"',),
    "index": ("rank=...", "index_dir=..."),
    "keep_last": ("keep=LatestN(3)",),
    "keep_period": ("keep=EveryNSteps(1000)",),
    "local": ("cache_dir=...",),
    "local_cache": ("cache_dir=...",),
    "local_dir": ("cache_dir=...",),
    "map_fn": ("transform=...",),
    "max_concurrency": ("concurrency=16",),
    "max_requests": ("concurrency=16",),
    "max_retries": ("max_attempts=5",),
    "max_to_keep": ("keep=3",),
    "max_workers": ("concurrency=16", "max_in_flight=8"),
    "maxcount": ("shard_size=ShardSizePolicy(max_entries=...)", "max_entries=..."),
    "maxsize": ('shard_size=ShardSizePolicy(max_bytes=...)', "max_bytes=..."),
    "nodesplitter": ("rank=..., world_size=...",),
    "num_hosts": ("world_size=...",),
    "num_parallel_calls": ("decode_threads=4",),
    "num_replicas": ("world_size=...",),
    "num_shards": ("world_size=...",),
    "num_threads": ("decode_threads=4", "concurrency=16"),
    "num_workers": ("workers=4", "decode_threads=4"),
    "on_exception": ('on_error="skip"',),
    "path": ("url=...",),
    "prefetch_factor": ('prefetch="64MiB"',),
    "predownload": ('prefetch="64MiB"',),
    "process_count": ("world_size=...",),
    "process_index": ("rank=...",),
    "random_seed": ("seed=...",),
    "region_name": ("region=...",),
    "remote": ("url=...",),
    "retries": ("max_attempts=5",),
    "sampler": ("order=...",),
    "save_top_k": ('keep=BestN(3, "loss")',),
    "save_total_limit": ("keep=3",),
    "shard_index": ("rank=...",),
    "shuffle_buffer": ('shuffle="block"',),
    "shuffle_seed": ("seed=...",),
    "shuffle_size": ('shuffle="block"',),
    "split_by_node": ("rank=..., world_size=...",),
    "splitter": ("rank=..., world_size=...",),
    "threads": ("decode_threads=4", "concurrency=16"),
    "timeout": ('read_timeout="30s"', 'deadline="10m"'),
    "token": ("session_token=...",),
    "transforms": ("transform=...",),
    "verify_ssl": ("ca_bundle=...",),
}  # fmt: skip
"""Words of other frameworks: how ours says it."""

_PART_OF: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("max_attempts", "retry_budget", "connect_timeout", "read_timeout", "max_requests_per_second", "unsigned",
         "requester_pays"),
        "open_store(url, options=StoreOptions({}=...))",
    ),
    **dict.fromkeys(
        ("staging_budget", "file_size", "overlap", "incremental", "resume_uploads", "check_replicas", "deadline", "grace",
         "node_cache", "node_cache_size", "settle"),
        "CheckpointManager(url, options=CheckpointOptions({}=...))",
    ),
}  # fmt: skip
"""Options that stand in an object of their own."""

_KEY: Final = "a key is a non-empty str, relative to the store's URL"
_MORE: Final[Mapping[str, str]] = {
    **dict.fromkeys(("key", "manifest_key", "archive_key", "src_manifest_key", "dst_manifest_key", "source", "target"), _KEY),
    "keys": "pass a list of keys",
    "entries": "pass a list of entries",
    "manifest": "the key of a manifest, a Manifest, or a list of entries",
    "url": "s3://bucket/prefix, or the path of a folder",
    "local_dir": "the path of a folder",
    "epoch": "an epoch is a whole number from 0",
    "start": "0 <= start <= end, in bytes from the object's beginning",
    "end": "0 <= start <= end, in bytes from the object's beginning",
    "on_missing": '"report" lists them in the .missing of the iterator',
}
"""What the words of an annotation do not say."""

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_SECRET: Final = re.compile("secret|token|password|key_id|credential")
_QUICK_REPR: Final = reprlib.Repr()
_QUICK_REPR.maxstring = _QUICK_REPR.maxother = 80


# -- single values -------------------------------------------------------------------------------


def whole_number(value: Any) -> int | None:
    """`value` as an int, if it is a whole number of any type (numpy's, a tensor of one); None if not, as bool is none."""
    if type(value) is int:
        return value
    if isinstance(value, (bool, str)) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except Exception:  # noqa: BLE001 - an array of several: each library raises its own
        return None


def as_float(value: Any) -> float | None:
    """`value` as a float (an int stays one), if it is a number of any type; None if not, as bool is none."""
    if isinstance(value, (bool, str)) or not isinstance(value, (SupportsFloat, SupportsIndex)):
        return None
    try:
        return value if isinstance(value, (int, float)) else float(value)
    except Exception:  # noqa: BLE001 - an array of several: each library raises its own
        return None


def local_path(value: str | os.PathLike[str], name: str = "path") -> str:
    """A path of this machine as text, with ``~`` expanded.

    Raises:
        ConfigError: it is no path, or a URL (also one that ``Path`` has taken a slash from).
    """
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"{name} cannot be {_shown(value)}", hint="it takes a local path: str or Path")
    text = os.fsdecode(value)
    if _SCHEME.match(text):
        raise ConfigError(f"{name} is a local path, and {text!r} looks like a URL", hint=url_hint(text))
    return os.path.expanduser(text)


def url_hint(text: str) -> str:
    """How to give a URL that a `Path` has damaged, or where one does not belong."""
    scheme, _, rest = text.partition(":")
    if rest.startswith("//"):
        return "give a path; a folder that is really called so is ./" + text
    return f'Path() takes a slash from URLs: give "{scheme}://{rest.lstrip("/")}" as str; a folder called so is "./{text}"'


def unknown_option(names: Iterable[str], known: Iterable[str], owner: str = "") -> ConfigError:
    """The error for keywords that `owner` does not know: names the nearest known one, or our word for another framework's.

    Args:
        names: What was given.
        known: What there is.
        owner: The function or class.
    """
    names, known = sorted(names), list(known)
    words = [word for word in (_nearest(name, known) for name in names) if word]
    head = f"{owner}: " if owner else ""
    return ConfigError(
        f"{head}unknown option: {', '.join(names)}", hint="; ".join(words) if words else f"use some of {', '.join(known)}"
    )


def _nearest(name: str, known: list[str]) -> str:
    ours = [usage for usage in _FOREIGN.get(name.lower(), ()) if re.split("[=(]", usage)[0] in known]
    if ours:
        return f"{name} is {' or '.join(ours)} here"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}=?"
    words = [name] if name in _PART_OF else [re.split("[=(]", usage)[0] for usage in _FOREIGN.get(name.lower(), ())]
    return next((f"say {_PART_OF[word].format(word)}" for word in words if word in _PART_OF), "")


def _shown(value: Any) -> str:
    kind = type(value)
    try:
        text = _QUICK_REPR.repr(value)
    except Exception:  # noqa: BLE001 - of the caller's class
        text = "..."
    if "\n" in text or len(text) > 100 or " object at 0x" in text:
        return f"of type {kind.__qualname__}"
    return f"{text} ({kind.__qualname__})"


# -- what an annotation takes ----------------------------------------------------------------------

_NO: Final = object()


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    quick: frozenset[type]
    """Values of exactly these types pass."""
    accept: Callable[[Any], Any]
    """The value, or what it stands for; `_NO` if it is not taken."""
    words: str


def _instance(cls: type, words: str, *, quick: bool = True) -> _Kind:
    return _Kind(frozenset([cls] if quick else []), lambda value: value if isinstance(value, cls) else _NO, words)


def _or_no(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: _NO if (found := convert(value)) is None else found


def _as_bool(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    return bool(value) if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_") else _NO


_PLAIN: Final[Mapping[Any, _Kind]] = {
    type(None): _Kind(frozenset([type(None)]), lambda value: value if value is None else _NO, "None"),
    str: _instance(str, "str"),
    bool: _Kind(frozenset([bool]), _as_bool, "True or False"),
    int: _Kind(frozenset([int]), _or_no(whole_number), "a whole number"),
    SupportsIndex: _Kind(frozenset([int]), _or_no(whole_number), "a whole number"),
    float: _Kind(frozenset([float, int]), _or_no(as_float), "a number"),
    os.PathLike: _instance(os.PathLike, "Path", quick=False),
    collections.abc.Callable: _Kind(frozenset(), lambda value: value if callable(value) else _NO, "a function"),
}
_GROUPS: Final = (list, tuple, set, frozenset)


def _kind(annotation: Any) -> _Kind | None:
    """How to check values of an annotation; None where anything goes, or nothing can be told."""
    origin = typing.get_origin(annotation)
    found = _PLAIN.get(origin or annotation) if _hashable(annotation) else None
    if found is not None:
        return found
    if annotation is None:
        return _PLAIN[type(None)]
    if origin in (Union, types.UnionType):
        return _union([_kind(part) for part in typing.get_args(annotation)])
    if origin is Literal:
        return _literal(typing.get_args(annotation))
    if origin is not None and not isinstance(origin, type):  # Annotated, Required, Unpack, ...
        return _kind(typing.get_args(annotation)[0]) if typing.get_args(annotation) else None
    cls = origin or annotation
    if not isinstance(cls, type) or cls in (object, Any):
        return None
    if typing.is_typeddict(cls):
        return _Kind(
            frozenset(), _mapping(()).accept, f"dicts with {' and '.join(sorted(getattr(cls, '__required_keys__', ())))}"
        )
    if issubclass(cls, collections.abc.Mapping):
        return _mapping(typing.get_args(annotation))
    if cls in (collections.abc.Iterable, collections.abc.Sequence, collections.abc.Collection, list, tuple, set, frozenset):
        return _several(cls, typing.get_args(annotation))
    if getattr(cls, "_is_protocol", False) and not getattr(cls, "_is_runtime_protocol", False):
        return None
    if issubclass(cls, IO):  # no file is an instance of it
        return _Kind(frozenset(), lambda value: value if hasattr(value, "read") else _NO, "an open file")
    name = getattr(cls, "_s3loader_by_name", "")
    if name:  # of a module that is imported for types only
        return _Kind(frozenset(), lambda value: value if name in (c.__name__ for c in type(value).__mro__) else _NO, name)
    return _instance(cls, f"{cls.__name__}(...)")


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _union(kinds: list[_Kind | None]) -> _Kind | None:
    if any(kind is None for kind in kinds):
        return None
    parts = cast("list[_Kind]", kinds)

    def accept(value: Any) -> Any:
        return next((found for kind in parts if (found := kind.accept(value)) is not _NO), _NO)

    words = list(dict.fromkeys(kind.words for kind in parts))
    text = " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} or {words[-1]}"
    return _Kind(frozenset().union(*(kind.quick for kind in parts)), accept, text)


def _literal(allowed: tuple[Any, ...]) -> _Kind:
    def accept(value: Any) -> Any:
        return next((one for one in allowed if isinstance(value, type(one)) and value == one), _NO)

    return _Kind(frozenset(), accept, " or ".join(f'"{one}"' if isinstance(one, str) else repr(one) for one in allowed))


def _mapping(args: tuple[Any, ...]) -> _Kind:
    keys, values = (_kind(args[0]), _kind(args[1])) if len(args) == 2 else (None, None)

    def accept(value: Any) -> Any:
        if not isinstance(value, collections.abc.Mapping):
            return value if hasattr(value, "keys") and hasattr(value, "__getitem__") and not _is_table(value) else _NO
        if keys is None and values is None:
            return value
        for key, item in value.items():
            if not (_passes(keys, key) and _passes(values, item)):
                return _NO
        return value

    of = f" of {values.words} by {keys.words}" if keys is not None and values is not None else ""
    return _Kind(frozenset(), accept, f"a dict{of}")


def _passes(kind: _Kind | None, value: Any) -> bool:
    return kind is None or type(value) in kind.quick or kind.accept(value) is not _NO


def _is_table(value: Any) -> bool:
    """A DataFrame: going through it gives the names of its columns, which nobody means."""
    return hasattr(value, "columns") and hasattr(value, "dtypes")


def _several(cls: type, args: tuple[Any, ...]) -> _Kind:
    fixed = cls is tuple and args and args[-1] is not Ellipsis
    kinds = [_kind(arg) for arg in args if arg is not Ellipsis]
    one = kinds[0] if kinds else None
    # dicts are looked at one by one where they are used, which tells the place
    loose = one is None or "dicts with" in one.words

    def accept(value: Any) -> Any:
        if isinstance(value, (str, bytes, bytearray, memoryview, collections.abc.Mapping)) or _is_table(value):
            return _NO
        if fixed:
            whole = isinstance(value, (tuple, list)) and len(value) == len(kinds)
            return value if whole and all(map(_passes, kinds, value)) else _NO
        if not hasattr(value, "__iter__") and not (hasattr(value, "__getitem__") and hasattr(value, "__len__")):
            return _NO
        if cls is collections.abc.Sequence and not (hasattr(value, "__getitem__") and hasattr(value, "__len__")):
            return _NO
        if not loose and isinstance(value, _GROUPS) and not all(_passes(one, item) for item in value):
            return _NO
        return value

    if fixed:
        return _Kind(frozenset(), accept, f"({', '.join(kind.words if kind else '...' for kind in kinds)})")
    return _Kind(frozenset(), accept, f"a list of {one.words}" if one else "a list")


# -- annotations of functions ---------------------------------------------------------------------


class _Names(dict[str, Any]):
    """Names as a module has them; what it imports for types only is known by its name."""

    def __missing__(self, name: str) -> Any:
        found = getattr(__builtins__, name, None) if not isinstance(__builtins__, dict) else __builtins__.get(name)
        return type(name, (), {"_s3loader_by_name": name}) if found is None else found


def _evaluated(annotation: Any, module: str | None) -> Any:
    if isinstance(annotation, typing.ForwardRef):
        module = getattr(annotation, "__forward_module__", None) or module
        annotation = annotation.__forward_arg__
    if not isinstance(annotation, str):
        return annotation
    names = _Names(vars(sys.modules[module])) if module in sys.modules else _Names()
    try:
        return eval(annotation, {}, names)  # noqa: S307 - an annotation of our own source
    except Exception:  # noqa: BLE001 - an attribute of a module that is imported for types only
        return Any


def _unpacked(annotation: Any) -> type | None:
    """The TypedDict of ``**options: Unpack[...]``."""
    inner = typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Unpack else None
    return inner if typing.is_typeddict(inner) else None


class _Signature:
    """What a function takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.owner = function.__qualname__.removesuffix(".__init__")
        self.positional: list[_Kind | None] = []
        self.names: list[str] = []
        self.named: dict[str, _Kind | None] = {}
        self.rest: _Kind | None = None
        self.open = False
        """Takes any keyword."""
        self.optional: set[str] = set()
        """Names that may be left out."""
        for name, parameter in inspect.signature(function).parameters.items():
            annotation = _evaluated(parameter.annotation, function.__module__)
            kind = None if annotation is parameter.empty else _kind(annotation)
            if parameter.kind is parameter.VAR_KEYWORD:
                options = _unpacked(annotation)
                self.open = options is None
                for option, its in () if options is None else _annotations(options).items():
                    self.named[option] = _kind(its)
                    self.optional.add(option)
            elif parameter.kind is parameter.VAR_POSITIONAL:
                self.rest = kind
            else:
                if parameter.kind is not parameter.KEYWORD_ONLY:
                    self.positional.append(kind)
                    self.names.append(name)
                if parameter.default is not parameter.empty:
                    self.optional.add(name)
                if parameter.kind is not parameter.POSITIONAL_ONLY:
                    self.named[name] = kind

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, converted; raises `ConfigError`."""
        unknown = [name for name in kwargs if name not in self.named and not self.open]
        if unknown:
            known = [name for name in self.named if name not in ("self", "cls")]
            raise unknown_option(unknown, known, self.owner)
        values = list(args)
        try:
            return self._checked(values, kwargs)
        except ConfigError as error:
            where = getattr(args[0], "_where", None) if args and self.names[:1] == ["self"] else None
            if isinstance(where, str):  # what says in all its errors where it is
                error.op, error.url = self.owner.rpartition(".")[2], where
            raise

    def _checked(self, values: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        for i, value in enumerate(values):
            kind = self.positional[i] if i < len(self.positional) else self.rest
            name = self.names[i] if i < len(self.names) else f"argument {i + 1}"
            values[i] = self._value(name, value, kind)
        return values, {name: self._value(name, value, self.named.get(name)) for name, value in kwargs.items()}

    def _value(self, name: str, value: Any, kind: _Kind | None) -> Any:
        if kind is None or type(value) in kind.quick:
            return value
        found = kind.accept(value)
        if found is _NO:
            shown = f"of type {type(value).__qualname__}" if _SECRET.search(name) else _shown(value)
            more = f": {_MORE[name]}" if name in _MORE else "; leave it out for the default" if name in self.optional else ""
            raise ConfigError(f"{self.owner}: {name} cannot be {shown}", hint=f"{name} takes {kind.words}{more}")
        return found


def _annotations(cls: type) -> dict[str, Any]:
    """Fields of a TypedDict or dataclass."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, annotation in vars(base).get("__annotations__", {}).items():
            found[name] = _evaluated(annotation, base.__module__)
    return found


_UNKNOWN: Final = _Kind(frozenset(), lambda value: _NO, "")


def _wrap(function: Callable[..., Any]) -> Callable[..., Any]:
    signature: _Signature | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal signature  # made at the first call, when all names it mentions exist
        if signature is None:
            signature = _Signature(function)
        for value, kind in zip(args, signature.positional, strict=False):
            if kind is not None and type(value) not in kind.quick:
                args, kwargs = signature.check(args, kwargs)  # type: ignore[assignment]
                return function(*args, **kwargs)
        if len(args) > len(signature.positional):
            args, kwargs = signature.check(args, kwargs)  # type: ignore[assignment]
        elif kwargs:
            named = signature.named
            missing = None if signature.open else _UNKNOWN
            for name, value in kwargs.items():
                kind = named.get(name, missing)
                if kind is not None and type(value) not in kind.quick:
                    args, kwargs = signature.check(args, kwargs)  # type: ignore[assignment]
                    break
        return function(*args, **kwargs)

    return call


def checked(target: F) -> F:
    """Hold the arguments of a function, or of a class's constructor and public methods, against their annotations.

    Raises, when called:
        ConfigError: an argument has a wrong type, or a keyword is not known.
    """
    if not isinstance(target, type):
        return cast("F", _wrap(target))
    for name, member in list(vars(target).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(member, types.FunctionType):
            setattr(target, name, _wrap(member))
        elif isinstance(member, (classmethod, staticmethod)):
            setattr(target, name, type(member)(_wrap(member.__func__)))
    return cast("F", target)
