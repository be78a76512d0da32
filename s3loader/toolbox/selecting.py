"""Which objects a URL and a pattern name.

A URL ending with a slash, and a bucket, name what is below them. Any other URL names one object; asked for more than that
one (`recursive`), also what is below it as a folder: ``s3://b/a1`` never means ``s3://b/a10``. Every character of a URL is
meant as it stands; patterns are given apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from s3loader.errors import BucketNotFoundError, ConfigError, ObjectNotFoundError
from s3loader.store.objectstore import ObjectStore
from s3loader.toolbox.stores import names_folder, object_at, root_of, url_in
from s3loader.types import CommonPrefix, Location, ObjectMeta, ObjectURL

__all__ = ["Found", "glob_pattern", "literal_head", "only_objects", "select"]


@dataclass(frozen=True, slots=True)
class Found:
    """One object, or folder, that was asked for."""

    store: ObjectStore
    key: str
    """In `store`; of a folder it ends with a slash."""
    name: str
    """Relative to the URL that was asked; of an object that the URL names itself, its last component."""
    url: str
    meta: ObjectMeta | None
    """As the listing tells it; None for a folder."""


def select(
    url: Location,
    place: Mapping[str, Any],
    *,
    recursive: bool = False,
    glob: str | None = None,
    regex: str | None = None,
    children: bool = True,
) -> Iterator[Found]:
    """What `url` names, in order of the UTF-8 bytes of the keys, as the listing comes.

    Args:
        recursive: All below the URL; else what is directly in it, folders as such.
        glob: Only names that match: ``*`` and ``?`` stop at a slash, ``**`` does not, ``[a-c]`` is a set. Without a slash it is
            held against the last component, with one against the whole name below the URL (and all below it is listed).
        regex: Only names below the URL in which this is found (`re.search`; anchor it with ``^`` and ``$``).
        children: Whether a URL that names one object also means the folder of that name.

    Raises:
        ConfigError: a pattern that is none, or two.
        BucketNotFoundError: there is no such bucket or folder.
    """
    wanted = _wanted(glob, regex)
    below = names_folder(url) or glob is not None or regex is not None
    recursive = recursive or (glob is not None and "/" in glob)
    if not below:
        yield from _itself(url, place)
        if not children:
            return
    where = ObjectURL.parse(url)
    if where.scheme == "file":
        store, prefix = root_of(where, place), ""
        if not below and not names_folder(url):
            return
    else:
        store = root_of(where, place)
        prefix = where.key if not where.key or where.key.endswith("/") else f"{where.key}/"
    head = literal_head(glob) if glob is not None and ("/" in glob or not recursive) else ""
    for entry in store.list(prefix + head, delimiter="" if recursive else "/"):
        name = entry.key[len(prefix) :]
        if name and wanted(name, entry):
            meta = None if isinstance(entry, CommonPrefix) else entry
            yield Found(store, entry.key, name, url_in(where, entry.key), meta)


def only_objects(found: Iterator[Found]) -> Iterator[tuple[Found, ObjectMeta]]:
    """Those that are objects, with what the listing tells of each."""
    return ((entry, entry.meta) for entry in found if entry.meta is not None)


def _itself(url: Location, place: Mapping[str, Any]) -> Iterator[Found]:
    store, key = object_at(url, place)
    try:
        meta = store.head(key)
    except BucketNotFoundError:
        if store.engine == "file":
            return
        raise
    except ObjectNotFoundError:
        return
    yield Found(store, key, key.rpartition("/")[2], str(ObjectURL.parse(url)), meta)


def _wanted(glob: str | None, regex: str | None) -> Any:
    if glob is not None and regex is not None:
        raise ConfigError("glob and regex at once", hint="give one of them")
    if glob is not None:
        pattern = glob_pattern(glob)
        whole = "/" in glob

        def matches(name: str, entry: ObjectMeta | CommonPrefix) -> bool:
            name = name.removesuffix("/") if isinstance(entry, CommonPrefix) else name
            return pattern.fullmatch(name if whole else name.rpartition("/")[2]) is not None

        return matches
    if regex is not None:
        try:
            found = re.compile(regex)
        except (re.error, TypeError) as error:
            raise ConfigError(f"not a regular expression: {regex!r}: {error}", hint="for * and ? use glob=") from error
        return lambda name, entry: found.search(name) is not None
    return lambda name, entry: True


def literal_head(glob: str) -> str:
    """What every name that matches begins with."""
    found = re.search(r"[*?\[]", glob)
    return glob if found is None else glob[: found.start()]


def glob_pattern(glob: str) -> re.Pattern[str]:
    """A glob as a regular expression for `fullmatch`.

    Raises:
        ConfigError: it is empty.
    """
    if not isinstance(glob, str) or not glob:
        raise ConfigError(f"not a glob: {glob!r}", hint='such as "*.csv", "run-?/**", "[0-9]*.tar"')
    made, at = [], 0
    while at < len(glob):
        if glob.startswith("**/", at):
            made.append("(?:.*/)?")
            at += 3
            continue
        if glob.startswith("**", at):
            made.append(".*")
            at += 2
            continue
        char = glob[at]
        at += 1
        if char == "*":
            made.append("[^/]*")
        elif char == "?":
            made.append("[^/]")
        elif char == "[" and (end := glob.find("]", at + (2 if glob.startswith("!", at) else 1))) >= 0:
            inside = glob[at:end].replace("\\", "\\\\").replace("[", "\\[").replace("&", "\\&").replace("~", "\\~")
            inside = inside.replace("|", "\\|")
            made.append(f"(?!/)[^{inside[1:]}]" if inside.startswith("!") else f"[{inside.replace('^', chr(92) + '^')}]")
            at = end + 1
        else:
            made.append(re.escape(char))
    try:
        return re.compile("".join(made), re.DOTALL)
    except re.error as error:
        raise ConfigError(f"not a glob: {glob!r}: {error}", hint="a set is written like [a-c]") from error
