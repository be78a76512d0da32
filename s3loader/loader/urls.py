"""From what names samples (URLs, paths, keys, patterns of them) to stores and keys."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeAlias
from urllib.parse import unquote

from s3loader.errors import ConfigError, ObjectNotFoundError
from s3loader.exchange.keys import is_shard_key, is_sidecar_key
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import StoreKeywords, open_store
from s3loader.types import Location, ObjectMeta, ObjectURL

__all__ = ["Locations", "escape", "expand_braces", "find_keys", "is_pattern", "names_of", "one_store", "split_url"]

Locations: TypeAlias = Location | Iterable[Location]
"""One or several; with an open store, its keys."""

_MAX_EXPANSION: Final = 1_000_000
_SPECIAL: Final = r"][{},*?:\\"
_ESCAPED: Final = re.compile(rf"\\([{_SPECIAL}])")
_GLOB: Final = re.compile(r"(\\.)|[*?[]", re.DOTALL)
_ENCODED: Final = re.compile(r"(?:%[0-9A-Fa-f]{2})+")


def split_url(url: Location) -> tuple[ObjectURL, str]:
    """(the bucket or root folder, key) of an object."""
    target = ObjectURL.parse(url)
    if target.scheme == "file":
        return ObjectURL("file", "", "/"), target.key.lstrip("/")
    return ObjectURL(target.scheme, target.bucket, ""), target.key


def names_of(locations: Locations, what: str = "url") -> list[str]:
    """Each of them as text.

    Raises:
        ConfigError: one is neither str, path nor URL; or they are in no order (a set, a dict) or a table.
    """
    if isinstance(locations, (str, os.PathLike, ObjectURL)):
        return [_name(locations, what)]
    unordered = isinstance(locations, (set, frozenset, dict)) or hasattr(locations, "columns")
    if unordered or isinstance(locations, (bytes, bytearray)) or not hasattr(locations, "__iter__"):
        raise ConfigError(
            f"{what} cannot be {type(locations).__name__}",
            hint="give a URL, a path, or a list of them"
            + (": the order is that of the samples; of a table, one column" if unordered else ""),
        )
    return [_name(location, what) for location in locations]


def _name(location: Any, what: str) -> str:
    if isinstance(location, ObjectURL):
        return str(location)
    if isinstance(location, (str, os.PathLike)):
        return location if isinstance(location, str) else str(location) if "://" in str(location) else os.fsdecode(location)
    raise ConfigError(
        f"{what} holds {type(location).__name__}, which is no URL: {location!r:.80}", hint="give each as str, Path or ObjectURL"
    )


# -- braces, as bash expands them ------------------------------------------------------------------


def expand_braces(pattern: str, *, keep_escapes: bool = False) -> list[str]:
    """``a-{000..002}.tar``, ``{train,val{1..2}}.tar``: what bash makes of it, in its order; ``::`` joins patterns.

    Lists and ranges nest; a range has numbers (padded with zeros where one of its ends is) or single letters, and may have a
    step (``{0..10..2}``); what bash leaves alone stays as it is. A backslash before one of ``{ } , * ? [ ] : \\`` takes its
    meaning away.

    Args:
        pattern: What to expand.
        keep_escapes: Leave the backslashes in, for `one_store`, which looks at ``* ? [`` next.

    Raises:
        ConfigError: it stands for too many URLs.
    """
    found = [name for part in re.split(r"(?<!\\)::", pattern) for name in _expanded(part)]
    return found if keep_escapes else [_ESCAPED.sub(r"\1", name) for name in found]


def _expanded(text: str) -> list[str]:
    start = end = _gobble(text, 0, "{")
    while start < len(text):
        end = _gobble(text, start + 1, "}")
        if end < len(text):
            break
        start = _gobble(text, start + 1, "{")
    if start >= len(text):
        return [text]
    head, inner, tail = text[:start], text[start + 1 : end], text[end + 1 :]
    if "," in re.sub(r"\\.", "", inner, flags=re.DOTALL):
        middles = [name for part in _parts(inner) for name in _expanded(part)]
    else:
        middles = _sequence(inner) or [f"{{{inner}}}"]
    tails = _expanded(tail) if tail else [""]
    if len(middles) * len(tails) > _MAX_EXPANSION:
        raise _too_many(text)
    return [head + middle + rest for middle in middles for rest in tails]


def _gobble(text: str, i: int, wanted: str) -> int:
    """Where the next `wanted` stands that is in no inner braces; the length of `text` if nowhere. A closing brace counts only
    after a comma or two dots."""
    level, closable = 0, wanted != "}"
    begin = i == 0
    while i < len(text):
        char = text[i]
        if char == "\\":
            i += 2
            continue
        if char == wanted and level == 0 and closable and not (wanted == "{" and begin and i == 0 and text[1:2] == "}"):
            return i
        if char == "{":
            level += 1 if wanted != "{" else 0
        elif char == "}" and level:
            level -= 1
        elif wanted == "}" and level == 0 and (char == "," or (text[i : i + 2] == ".." and text[i + 2 : i + 3] != "}")):
            closable = True
        i += 1
    return len(text)


def _parts(inner: str) -> Iterator[str]:
    begin = 0
    while begin <= len(inner):
        end = _gobble(inner, begin, ",")
        yield inner[begin:end]
        begin = end + 1


def _sequence(text: str) -> list[str] | None:
    match = re.fullmatch(r"(?:([+-]?[0-9]+)\.\.([+-]?[0-9]+)|([A-Za-z])\.\.([A-Za-z]))(?:\.\.([+-]?[0-9]+))?", text)
    if match is None:
        return None
    low, high, first, last, step = match.groups()
    begin, end = (int(low), int(high)) if low else (ord(first), ord(last))
    by = abs(int(step or 1)) or 1
    if abs(end - begin) // by > _MAX_EXPANSION:
        raise _too_many(f"{{{text}}}")
    numbers = range(begin, end + 1, by) if end >= begin else range(begin, end - 1, -by)
    if first:
        return [escape(chr(number)) for number in numbers]
    padded = any(re.match(r"-?0[0-9]", bound) for bound in (low, high))
    width = max(len(low), len(high)) if padded else 0
    return [str(number).zfill(width) for number in numbers]


def _too_many(text: str) -> ConfigError:
    return ConfigError(
        f"{text:.80} stands for more than {_MAX_EXPANSION} URLs",
        hint="check the numbers of the range, or pass a list of URLs",
    )


def escape(text: str) -> str:
    """`text` as a pattern that means it alone."""
    return re.sub(rf"[{_SPECIAL}]", r"\\\g<0>", text)


# -- names with * ? [] ----------------------------------------------------------------------------


def is_pattern(name: str) -> bool:
    """Whether it holds ``*``, ``?`` or ``[`` (without a backslash before), so that a listing tells what it means."""
    return any(match[1] is None for match in _GLOB.finditer(name))


def find_keys(store: ObjectStore, pattern: str) -> list[str]:
    """Keys that match, in order of a listing: ``*`` and ``?`` match within a folder, ``**`` across folders, ``[...]`` one
    character. A key that is the pattern itself matches too. Indexes of shards are left out.
    """
    first = next((match.start() for match in _GLOB.finditer(pattern) if match[1] is None), len(pattern))
    head = _ESCAPED.sub(r"\1", pattern[:first])
    cut = head.rfind("/") + 1
    flat = "/" not in pattern[first:] and "**" not in pattern
    entries = store.list(head[:cut] if store.engine == "file" else head, delimiter="/" if flat else "")
    match, literal = re.compile(_regex(pattern), re.DOTALL).fullmatch, _ESCAPED.sub(r"\1", pattern)
    names = (meta.key for meta in entries if isinstance(meta, ObjectMeta))
    return [key for key in names if (key == literal or match(key)) and not is_sidecar_key(key)]


def _regex(pattern: str) -> str:
    found, i = [], 0
    while i < len(pattern):
        char = pattern[i]
        if char == "\\" and i + 1 < len(pattern):
            found.append(re.escape(pattern[i + 1]) if pattern[i + 1] in _SPECIAL else re.escape(pattern[i : i + 2]))
            i += 2
            continue
        if pattern.startswith("**", i):
            found.append(".*")
            i += 2
            continue
        close = pattern.find("]", i + 2 + (pattern[i + 1 : i + 2] in ("!", "^"))) if char == "[" else -1
        if close > 0:
            inner = pattern[i + 1 : close]
            negated = inner[0] in "!^"
            body = re.sub(r"[\\\[\]^&|~]", r"\\\g<0>", inner[negated:])
            found.append(f"(?!/)[{'^' if negated else ''}{body}]")
            i = close + 1
            continue
        found.append({"*": "[^/]*", "?": "[^/]"}.get(char) or re.escape(char))
        i += 1
    return "".join(found)


# -- stores and keys ------------------------------------------------------------------------------


def one_store(
    names: list[str], store: ObjectStore | None, options: StoreKeywords, *, patterns: bool = False
) -> tuple[ObjectStore, list[str]]:
    """The store that all names are of, and their keys.

    Args:
        names: URLs and paths; with `store`, its keys.
        store: An open store.
        options: For `open_store`.
        patterns: They have escapes. Look for the keys of names with ``* ? [``, and for the tar archives in those that end
            with a slash.

    Raises:
        ConfigError: they are of several buckets.
        ObjectNotFoundError: nothing matches a pattern.
    """
    look = [patterns and (name.endswith("/") or is_pattern(name)) for name in names]
    if patterns:
        names = [name if listed else _ESCAPED.sub(r"\1", name) for name, listed in zip(names, look, strict=True)]
    pairs: list[tuple[ObjectURL | None, str]] = [
        (None, name) if store is not None else _split_pattern(name) if listed else split_url(name)
        for name, listed in zip(names, look, strict=True)
    ]
    roots = {root for root, _ in pairs}
    if store is None and len(roots) != 1:
        some = ", ".join(sorted(str(root) for root in roots)[:3])
        problem = f"the URLs lie in several buckets: {some}" if roots else "there are no URLs"
        raise ConfigError(
            problem, hint="make one dataset of each bucket, and mix them (mix_datasets)" if roots else "give some"
        )
    root = roots.pop() if roots else None
    found = open_store(root, **options) if store is None and root is not None else store
    assert found is not None
    keys: list[str] = []
    for name, (_, key), listed in zip(names, pairs, look, strict=True):
        folder = name.endswith("/")
        matching = find_keys(found, f"{key}**" if folder else key) if listed else [key]
        matching = list(filter(is_shard_key, matching)) if listed and folder else matching
        if not matching:
            what = f"there are no tar archives in {name}" if folder else f"nothing matches {name}"
            raise ObjectNotFoundError(what, op="list", url=found.url)
        keys += matching
    return found, keys


def _split_pattern(name: str) -> tuple[ObjectURL, str]:
    """(root, pattern of keys): only the folders before the first ``* ? [`` are read as a URL."""
    first = next((match.start() for match in _GLOB.finditer(name) if match[1] is None), len(name))
    cut = name.rfind("/", 0, first) + 1
    if "://" in name and cut <= name.index("://") + 3:
        raise ConfigError(f"no bucket in {name!r}: patterns are of keys", hint="write the name of the bucket in full")
    root, folder = split_url(_ESCAPED.sub(r"\1", name[:cut]) or ".")
    tail = name[cut:]
    if "://" in name and root.scheme == "file":  # what is percent-encoded has no meaning as a pattern
        tail = _ENCODED.sub(lambda match: escape(unquote(match[0], errors="surrogateescape")), tail)
    return root, (f"{escape(folder.rstrip('/'))}/" if folder else "") + tail
