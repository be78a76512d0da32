"""Links inside an archive: which member's bytes a hard or symbolic link stands for. No I/O.

A hard link names an earlier member by its full path. A symbolic link is relative to its own folder, may point forward, to
another link, or through a link to a folder. Both mean what extracting the archive would leave under that path. A leading slash
counts for nothing, as for `tar`, except that a symbolic link with a relative name may not point to an absolute path.
"""

from __future__ import annotations

import posixpath
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = ["Link", "resolve_links"]

_MOST_HOPS: Final = 40


class Link(NamedTuple):
    """One link of an archive."""

    name: str
    target: str
    symbolic: bool
    at: int
    """How many files stand before it."""


class _Place(NamedTuple):
    at: int
    """Files before it."""
    file: int | None
    link: Link | None


def resolve_links(names: Sequence[str], links: Sequence[Link], folders: Sequence[str] = ()) -> list[int | str]:
    """For each link the position in `names` of the file it stands for; or, as text, what kind of link leads to none.

    Args:
        names: The files of the archive, in archive order.
        links: Its links, in archive order.
        folders: The folders it lists.
    """
    return _Resolver(names, links, folders).all(links)


class _Resolver:
    def __init__(self, names: Sequence[str], links: Sequence[Link], folders: Sequence[str]) -> None:
        self._places: dict[str, list[_Place]] = {}
        self._folders = {_path(folder) for folder in folders}
        self._found: dict[Link, int | str] = {}
        waiting = deque(links)
        for position, name in enumerate(names):
            while waiting and waiting[0].at <= position:
                self._add_link(waiting.popleft())
            path = _path(name)
            self._places.setdefault(path, []).append(_Place(position, position, None))
            self._add_folders(path)
        for link in waiting:
            self._add_link(link)

    def _add_link(self, link: Link) -> None:
        path = _path(link.name)
        self._places.setdefault(path, []).append(_Place(link.at, None, link))
        self._add_folders(path)

    def _add_folders(self, path: str) -> None:
        while (path := posixpath.dirname(path)) and path not in self._folders:
            self._folders.add(path)

    def all(self, links: Sequence[Link]) -> list[int | str]:
        for link in links:  # earlier ones first: a hard link to a hard link, and so on, is one step
            self._found[link] = self._resolve(link, 0)
        return [self._found[link] for link in links]

    def _resolve(self, link: Link, hops: int) -> int | str:
        if link in self._found:
            return self._found[link]
        kind = "symbolic link" if link.symbolic else "hard link"
        if hops > _MOST_HOPS:
            return f"{kind} in a circle"
        if not link.symbolic:
            path = _path(link.target)
            earlier = [place for place in self._places.get(path, ()) if self._before(place, link)]
            if earlier and path == _path(link.name):
                return "hard link to itself"  # a file that was given to tar twice
            return self._follow(earlier[-1], hops) if earlier else "hard link without its file"
        target = _target(link)
        return "symbolic link out of the archive" if target is None else self._follow_path(target, hops)

    @staticmethod
    def _before(place: _Place, link: Link) -> bool:
        return place.link is not link and (place.at < link.at or (place.file is None and place.at == link.at))

    def _follow(self, place: _Place, hops: int) -> int | str:
        if place.file is not None:
            return place.file
        assert place.link is not None
        return self._resolve(place.link, hops + 1)

    def _follow_path(self, path: str, hops: int) -> int | str:
        path = posixpath.normpath(path)
        if path == ".." or path.startswith("../"):
            return "symbolic link out of the archive"
        places = self._places.get(path)
        if places:
            return self._follow(places[-1], hops)
        if path in self._folders or path == ".":
            return "symbolic link to a folder"
        parts = path.split("/")
        for i in range(1, len(parts)):
            folder = self._places.get("/".join(parts[:i]))
            link = folder[-1].link if folder else None
            if link is None or not link.symbolic or hops > _MOST_HOPS:
                continue
            inner = _target(link)
            if inner is None:
                return "symbolic link out of the archive"
            return self._follow_path(posixpath.join(inner, *parts[i:]), hops + 1)
        return "symbolic link without its file"


def _path(name: str) -> str:
    return posixpath.normpath(name.lstrip("/"))


def _target(link: Link) -> str | None:
    """Where a symbolic link leads, from the root of the archive; None: out of it."""
    if link.target.startswith("/"):
        return link.target.lstrip("/") if link.name.startswith("/") else None
    return posixpath.join(posixpath.dirname(link.name.lstrip("/")), link.target)
