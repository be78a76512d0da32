"""The root of a step: an exchange manifest whose appearance *is* the commit.

Its lines are ordinary ``file`` entries, so ``S3ExchangeStore.iter_manifest_entries`` lists the
checkpoint's files. What the commit protocol needs to know is in the ``meta`` of the first
entry, under ``s3loader``. A retired step's root is a *tombstone*: a manifest that lists only itself.

The facts carry a digest over themselves and over id and size of every entry. Keys and ETags
are left out of it, so a copy of a run made by the exchange tools is still valid; they are
checked against what the store lists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from s3loader.checkpoint.format.layout import root_key
from s3loader.checkpoint.format.records import FORMAT
from s3loader.errors import FormatError
from s3loader.exchange.lines import CONTENT_TYPE, file_entry
from s3loader.exchange.types import FileEntry

__all__ = ["Root", "committed_entries", "parse", "tombstone_entries", "touched_entries"]


@dataclass(frozen=True, slots=True)
class Root:
    """State of a step's root object."""

    step: int
    state: Literal["absent", "committed", "tombstone", "damaged"]
    etag: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """``kind step epoch attempt was world time run items bytes metrics metadata refs index`` of a commit;
    ``kind step epoch attempt was nonce time`` of a tombstone."""
    keys: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Id of each file -> (key, size in bytes)."""
    problem: str = ""
    """Why it is damaged."""
    generation: int = 0
    """How often the step was deleted and saved again before, see `compaction`."""

    @property
    def key(self) -> str:
        """Of the object."""
        return root_key(self.step, self.generation)

    @property
    def never_written(self) -> bool:
        """Whether the step never had a root, so that nobody can have deleted any of its files."""
        return self.state == "absent" and not self.generation

    @property
    def attempt(self) -> str:
        """The attempt that was committed, or retired; empty where there is none."""
        return str(self.facts.get("attempt") or "")

    @property
    def history(self) -> list[str]:
        """Every attempt that was ever committed at this step, as far as the root tells: by this, whoever lost the
        answer to its commit learns that it succeeded, even if its attempt was replaced or retired since."""
        return [*self.facts.get("was", ()), *([self.attempt] if self.attempt else ())]


def _digest(facts: Mapping[str, Any], entries: Sequence[FileEntry]) -> str:
    plain = {name: value for name, value in facts.items() if name != "digest"}
    text = json.dumps([plain, [[e.get("id"), e.get("size_bytes")] for e in entries]], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def committed_entries(facts: Mapping[str, Any], index: FileEntry, others: Sequence[FileEntry]) -> list[FileEntry]:
    """Lines of a commit: the index file's entry, which carries `facts`, then the other files'."""
    entries = [index, *others]
    whole = {"format": FORMAT, "kind": "committed", **facts}
    index["meta"] = {"s3loader": {**whole, "digest": _digest(whole, entries)}}
    return entries


def tombstone_entries(facts: Mapping[str, Any], key: str) -> list[FileEntry]:
    """The line of the tombstone that lies at `key`."""
    entry = file_entry(key, "tombstone", None, CONTENT_TYPE, None, None)
    whole = {"format": FORMAT, "kind": "tombstone", **facts}
    entry["meta"] = {"s3loader": {**whole, "digest": _digest(whole, [entry])}}
    return [entry]


def touched_entries(data: bytes, nonce: str) -> list[FileEntry]:
    """The lines of a valid committed root again, with another nonce."""
    entries: list[FileEntry] = [json.loads(line) for line in data.decode().split("\n") if line.strip()]
    told: dict[str, Any] = (entries[0].get("meta") or {})["s3loader"]
    facts = {name: value for name, value in told.items() if name != "digest"} | {"nonce": nonce}
    entries[0]["meta"] = {"s3loader": {**facts, "digest": _digest(facts, entries)}}
    return entries


def parse(step: int, data: bytes, etag: str, generation: int = 0) -> Root:
    """The root in `data`; never raises: what cannot be trusted is ``damaged``, and says why."""
    try:
        entries = [json.loads(line) for line in data.decode().split("\n") if line.strip()]
        facts = entries[0]["meta"]["s3loader"]
        if facts["format"] != FORMAT:
            raise FormatError(f"format {facts['format']}, this s3loader reads {FORMAT}", hint="update s3loader")
        if facts["digest"] != _digest(facts, entries) or facts["step"] != step:
            raise FormatError("its digest does not match", hint="it was changed or cut; go back to an earlier step")
        if facts["kind"] not in ("committed", "tombstone"):
            raise FormatError(f"kind {facts['kind']!r}", hint="update s3loader")
        keys = {entry["id"]: (entry["key"], int(entry["size_bytes"] or 0)) for entry in entries}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        problem = f"the root of step {step} is damaged: {error or type(error).__name__}"
        return Root(step, "damaged", etag, problem=problem, generation=generation)
    return Root(step, facts["kind"], etag, facts, keys, generation=generation)
