"""The list of samples that were left out: entries, the files that keep them, and the table read from those.

Each process that leaves samples out writes objects of its own under one prefix, named by time, rank, worker and a random
number, so that nobody overwrites what another one wrote. An object is written whole, before the batch that lacks its samples is
handed out; so the list is complete up to the last batch delivered, however a process ends.
"""

from __future__ import annotations

import html
import json
import re
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeAlias, Unpack, overload

from s3loader.arguments import checked
from s3loader.checksum import json_seal_holds, seal_json
from s3loader.errors import ConfigError, FormatError, ObjectNotFoundError
from s3loader.store.objectstore import ObjectStore
from s3loader.store.open import StoreKeywords, open_store
from s3loader.types import Buffer, Location, ObjectMeta, ReadRequest

__all__ = ["Quarantine", "QuarantineLog", "Quarantined", "read_quarantine"]

_TOGETHER: Final = 500
"""Entries of one object. The last one is written again with each new entry."""
_MOST: Final = 100_000
_SHOWN: Final = 50
_NAME: Final = re.compile(r"(?:^|/)\d{13}-r\d+-w\d+-[0-9a-f]{12}-\d{5}\.jsonl$")
_HEADINGS: Final = ("epoch", "position", "sample", "key", "error")

Target: TypeAlias = Location | ObjectStore


class Quarantined(NamedTuple):
    """One sample that was left out."""

    sample: int
    """Its number in the dataset."""
    key: str
    """``archive#name``, or the key of a loose object; ``sample N`` where the index that knows it cannot be read."""
    epoch: int
    position: int
    error: str
    """Type and message."""


class QuarantineLog:
    """Writes the entries of one process.

    Args:
        target: A URL or path; a key, which is one of `beside`; or an open store.
        beside: The store of the dataset.
        rank: Of this process.
        worker: Of this process.

    Raises:
        ConfigError: the target cannot be written to.
    """

    def __init__(self, target: Target, beside: ObjectStore, rank: int, worker: int) -> None:
        self._store, self._prefix = _open(target, beside)
        self._place = {"rank": rank, "worker": worker}
        self._name = ""
        self._segment = 0
        self._lines: list[bytes] = []
        self._noted = 0
        self._lock = threading.Lock()

    def follow(self, entries: Sequence[Quarantined]) -> None:
        """Keep what came to `entries` since the last call; it is in the store when this returns.

        Raises:
            StoreError: it cannot be written.
        """
        with self._lock:
            new = entries[self._noted : _MOST]
            if len(entries) > _MOST >= self._noted:
                text = f"more than {_MOST} samples were left out by one process: the rest is not listed"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            self._noted = len(entries)
            for entry in new:
                if len(self._lines) == _TOGETHER:
                    self._write()
                    self._segment, self._lines = self._segment + 1, []
                self._lines.append(seal_json(json.dumps({**entry._asdict(), **self._place}).encode("ascii")) + b"\n")
            if new:
                self._write()

    def _new_name(self) -> str:
        place = f"r{self._place['rank']:05d}-w{self._place['worker']:03d}"
        return f"{self._prefix}{time.time_ns() // 1_000_000:013d}-{place}-{uuid.uuid4().hex[:12]}"

    def _write(self) -> None:
        self._name = self._name or self._new_name()
        self._store.put(f"{self._name}-{self._segment:05d}.jsonl", b"".join(self._lines))


@checked
class Quarantine(Sequence[Quarantined]):
    """What `read_quarantine` returns: entries by epoch and position. Prints as a table; `LoaderOptions.exclude` takes it."""

    def __init__(self, entries: Sequence[Quarantined], url: str = "") -> None:
        self.entries = tuple(entries)
        self.url = url

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the samples, each once."""
        return tuple(dict.fromkeys(entry.key for entry in self.entries))

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, at: int) -> Quarantined: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Quarantined, ...]: ...
    def __getitem__(self, at: int | slice) -> Quarantined | tuple[Quarantined, ...]:
        return self.entries[at]

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for entry in self.entries[:_SHOWN]:
            yield tuple(str(getattr(entry, name)) for name in _HEADINGS)

    def _summary(self) -> str:
        shown = f", the first {_SHOWN} shown" if len(self) > _SHOWN else ""
        return f"{len(self)} entries of {len(self.keys)} samples{shown}"

    def __str__(self) -> str:
        rows = [_HEADINGS, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join((*lines, self._summary()))

    def __repr__(self) -> str:
        return f"<Quarantine {self.url}: {self._summary()}>"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in _HEADINGS)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows())
        return f"<table><caption>{html.escape(self._summary())}</caption><tr>{head}</tr>{body}</table>"


@checked
def read_quarantine(
    url: Target,
    *,
    store: ObjectStore | None = None,
    **store_options: Unpack[StoreKeywords],
) -> Quarantine:
    """What all ranks, workers and attempts that were given this `quarantine` have left out so far.

    An entry that several attempts met (the same sample at the same position of the same epoch) is one. Where nothing was
    left out yet the table is empty.

    Args:
        url: What was given as `quarantine`: a URL or path, a key of `store`, or an open store.
        store: The store of the dataset, where `url` is a key.
        store_options: For `open_store`.

    Raises:
        ConfigError: the URL is unusable.
        FormatError: an entry is not one.
    """
    found, prefix = _open(url, store, store_options)
    try:
        names = [meta.key for meta in found.list(prefix) if isinstance(meta, ObjectMeta) and _NAME.search(meta.key)]
    except ObjectNotFoundError:  # a local folder that nobody has made yet
        names = []
    entries: dict[tuple[Any, ...], Quarantined] = {}
    for answer in found.read_many(ReadRequest(name) for name in sorted(names)):
        key = answer.request.key
        try:
            listed = _parse_all(answer.data, f"{found.url}/{key}")
        except FormatError:  # a bit may have flipped on the way
            listed = _parse_all(found.get(key), f"{found.url}/{key}")
        for entry in listed:
            entries.setdefault((entry.epoch, entry.position, entry.sample, entry.key), entry)
    ordered = sorted(entries.values(), key=lambda entry: (entry.epoch, entry.position))
    return Quarantine(ordered, f"{found.url}/{prefix}")


def _parse_all(data: Buffer, url: str) -> list[Quarantined]:
    return [_parse(line, url, number) for number, line in enumerate(bytes(data).split(b"\n"), 1) if line.strip()]


def _parse(line: bytes, url: str, number: int) -> Quarantined:
    try:
        if json_seal_holds(line, b'{"sample":') is False:
            raise ValueError("its checksum does not match")
        values = json.loads(line)
        entry = Quarantined(*(values[name] for name in Quarantined._fields))
        for value, kind in zip(entry, (int, str, int, int, str), strict=True):
            if type(value) is not kind:
                raise TypeError(f"{value!r} is no {kind.__name__}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        text = f"line {number} is no entry of a quarantine list: {type(error).__name__}: {error}"
        raise FormatError(text, op="read", url=url, line=number, hint="remove the file, or mend the line") from error
    return entry


def _open(target: Target, beside: ObjectStore | None, options: StoreKeywords | None = None) -> tuple[ObjectStore, str]:
    """(store, prefix) of a target."""
    if isinstance(target, ObjectStore):
        return target, ""
    if not isinstance(target, str) or "://" in target or target.startswith(("/", ".", "~")):
        return open_store(target, **(options or {})), ""
    key = target.strip("/")
    if not key or beside is None or beside.engine == "mixture":
        raise ConfigError(
            f"quarantine={target!r} is a key, and there is no one store that it could belong to",
            hint="give a URL (s3://..., file:///...), an absolute path, or an open store",
        )
    return beside, f"{key}/"
