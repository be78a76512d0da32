"""The commit point of checkpoints: the root of a step, an exchange manifest whose appearance *is* the commit.

`Roots.publish` makes a checkpoint exist, `Roots.retire` makes it go, each by one conditional put through the commit of the
exchange (`exchange.commit.put_settled`): on no root (``If-None-Match: *``), or on the very root that was seen (``If-Match``).
A refusal or a lost answer is settled by reading the root: it names its attempt, and all that were committed before it.

Its lines are ordinary ``file`` entries, so ``S3ExchangeStore.iter_manifest_entries`` lists the checkpoint's files. What the
protocol needs to know is in the ``meta`` of the first entry, under ``s3loader``. A retired step's root is a *tombstone*: a
manifest that lists only itself.

The facts carry a digest over themselves and over id and size of every entry. Keys and ETags are left out of it, so a copy of a
run made by the exchange tools is still valid; they are checked against what the store lists.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from s3loader.checkpoint.format.layout import INDEX, root_key, step_prefix
from s3loader.checkpoint.format.records import FORMAT
from s3loader.checkpoint.protocol.objects import RunObjects
from s3loader.checkpoint.protocol.tombstones import Tombstones
from s3loader.checkpoint.threads import at_once
from s3loader.errors import (
    CheckpointError,
    CommitUnknownError,
    FencedError,
    FormatError,
    IntegrityError,
    ObjectNotFoundError,
    OutcomeUnknownError,
    PreconditionFailedError,
    StepExistsError,
    StoreError,
)
from s3loader.exchange.commit import put_encoded, put_settled
from s3loader.exchange.lines import CONTENT_TYPE, encode_manifest, file_entry
from s3loader.exchange.types import FileEntry
from s3loader.types import PutMode, Update

__all__ = ["Root", "Roots", "committed_entries", "lost", "parse", "tombstone_entries", "touched_entries"]


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
    """How often the step was deleted and saved again before, which takes a key of its own."""

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


_TYPES: Final[dict[str, type | tuple[type, ...]]] = {
    "step": int,
    "epoch": int,
    "attempt": str,
    "was": list,
    "nonce": str,
    "time": (int, float),
    "run": str,
    "world": int,
    "items": list,
    "tensors": int,
    "bytes": int,
    "written": int,
    "metrics": dict,
    "metadata": dict,
    "index": str,
    "refs": list,
}


def _check(facts: Mapping[str, Any], entries: Sequence[FileEntry]) -> None:
    """Whether a root whose digest is right says something that can be. Keys are no part of the digest, but follow from what is.

    Raises:
        FormatError: it does not.
    """
    for name, kind in _TYPES.items():
        if facts.get(name) is not None and not isinstance(facts[name], kind):
            raise FormatError(f"its {name} is a {type(facts[name]).__name__}")
    if not all(isinstance(attempt, str) for attempt in facts.get("was") or ()):
        raise FormatError("its was is no list of attempts")
    if facts["kind"] == "tombstone":
        return
    if not all(isinstance(at, int) for at in facts.get("refs") or ()) or not isinstance(facts["index"], str):
        raise FormatError("its refs are no list of steps")
    folder = step_prefix(facts["step"]) + facts["attempt"] + "/"
    for entry in entries:
        file, key = entry.get("id"), entry.get("key")
        if not isinstance(file, str) or not isinstance(key, str) or not key.endswith(file if "/" in file else folder + file):
            raise FormatError(f"the file {file!r} lies at {key!r}")
    if entries[0].get("id") != INDEX:
        raise FormatError("its first file is not the index")


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
        _check(facts, entries)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        problem = f"the root of step {step} is damaged: {error or type(error).__name__}"
        return Root(step, "damaged", etag, problem=problem, generation=generation)
    return Root(step, facts["kind"], etag, facts, keys, generation=generation)


class Roots:
    """The roots of a run's steps: read, published, retired.

    Args:
        objects: Of the run.
        tombstones: Which generations of its steps are dead.
    """

    def __init__(self, objects: RunObjects, tombstones: Tombstones) -> None:
        self._objects = objects
        self._tombstones = tombstones

    def read(self, step: int) -> Root:
        """State of `step`'s root, of the generation that counts."""
        while True:
            found = self.at(step, self._tombstones.generation(step))
            if not self.is_dead(found):  # asked after the root was read: a dead one may have come back
                return found

    def ask(self, step: int) -> Root:
        """As `read`, with the mark asked for together with the root: that no root is there needs no order, since what is
        written then looks at the mark again; a committed one may be dead and have come back between the two answers."""
        while True:
            generation = self._tombstones.generation(step)
            found, _ = at_once(lambda at=generation: self.at(step, at), self._tombstones.refresh)  # type: ignore[misc]
            if generation < self._tombstones.generation(step):
                continue
            if found.state in ("absent", "tombstone") or not self.is_dead(found):
                return found

    def at(self, step: int, generation: int) -> Root:
        """What lies under the key of one generation of `step`, dead or not."""
        seen = Root(step, "absent", generation=generation)
        for _ in range(2):  # one that is damaged may have been damaged on the way
            try:
                found = self._objects.get(root_key(step, generation))
            except IntegrityError as error:
                if "etag" not in error.details:
                    raise  # bytes are missing; that says nothing of the object
                etag = str(error.details["etag"])
                problem = f"the root of step {step} is damaged: {error.message}"
                return Root(step, "damaged", etag, problem=problem, generation=generation)
            if found is None:
                return Root(step, "absent", generation=generation)
            seen = parse(step, *found, generation)
            if seen.state != "damaged":
                break
        return seen

    def is_dead(self, seen: Root) -> bool:
        """Whether the generation of `seen` is dead by now; asks the store."""
        self._tombstones.refresh()
        return seen.generation < self._tombstones.generation(seen.step)

    def publish(
        self,
        step: int,
        entries: Sequence[FileEntry],
        attempt: str,
        expected: Root,
        afterwards: Callable[[], None] = lambda: None,
    ) -> Root:
        """Make `attempt` the committed one of `step`: the one conditional write of a save.

        Args:
            entries: The root's lines.
            attempt: Its id, by which a lost answer is told from another's success.
            expected: The root as it was read before: absent, a tombstone, or what is to be replaced.
            afterwards: Called once it is committed, together with the look at the mark; what it raises is raised.

        Raises:
            StepExistsError: another attempt is committed.
            FencedError: the step was retired meanwhile.
            CommitUnknownError: whether it was written could not be found out.
        """
        try:
            done = self._put(entries, expected, lambda now: attempt in now.history)
        except (FencedError, StepExistsError) as error:
            self.expect_alive(expected, error)
            raise
        at_once(lambda: self.expect_alive(expected), afterwards)
        return done

    def expect_alive(self, seen: Root, cause: Exception | None = None) -> None:
        """Make sure that what the root says, or does not say, of an attempt is all that ever happened.

        Raises:
            CommitUnknownError: the generation is dead: the attempt may have been committed and deleted, without a trace.
        """
        if self.is_dead(seen):
            raise CommitUnknownError(
                f"step {seen.step} was deleted while it was written, perhaps after it had been committed",
                url=f"{self._objects.store.url}/{seen.key}",
                hint="nothing of it is left; save again",
            ) from cause

    def retire(self, seen: Root, epoch: int) -> Root:
        """Put a tombstone in the place of what was seen (a committed root, an older tombstone, or nothing).

        Raises:
            StepExistsError: the root is another one by now, so nothing was retired.
            CommitUnknownError: whether it was written could not be found out.
        """
        nonce = secrets.token_hex(8)
        facts = {
            "step": seen.step,
            "epoch": epoch,
            "attempt": seen.attempt,
            "was": seen.history[:-1],
            "nonce": nonce,
            "time": time.time(),
        }
        entries = tombstone_entries(facts, seen.key)
        return self._put(entries, seen, lambda now: now.facts.get("nonce") == nonce)

    def touch(self, seen: Root) -> Root:
        """Rewrite a committed root as it is, under a new ETag, so that nobody who saw the old one can replace it.

        Raises:
            StepExistsError, FencedError, CommitUnknownError: as `retire`.
        """
        found = self._objects.get(seen.key, strict=True)
        if found is None or found[1] != seen.etag or parse(seen.step, *found, seen.generation).state != "committed":
            raise FencedError(
                f"the root of step {seen.step} changed",
                url=self._objects.store.url,
                hint="another process works on this step; do it again",
            )
        nonce = secrets.token_hex(8)
        entries = touched_entries(found[0], nonce)
        return self._put(entries, seen, lambda now: now.facts.get("nonce") == nonce)

    def _put(self, entries: Sequence[FileEntry], expected: Root, ours: Callable[[Root], bool]) -> Root:
        """The conditional put of a root: over what was `expected`, and over nothing else.

        Args:
            entries: Its lines. Publishers that race write equal bytes.
            expected: What is there now.
            ours: Whether a root that was read back is the one that was put, whoever put it.
        """
        objects, data = self._objects, encode_manifest(entries)
        url = f"{objects.store.url}/{expected.key}"
        mode: PutMode = "overwrite"
        if objects.conditional:
            mode = Update(expected.etag) if expected.etag else "create"

        def judge(now: Root, before: Root, doubtful: bool) -> bool:
            if not ours(now) and (now.state, now.etag) != (expected.state, expected.etag):
                raise lost(now, objects.store.url)
            return ours(now)

        try:
            done, now = put_settled(
                lambda _: put_encoded(objects.store, expected.key, data, mode),
                lambda: self.at(expected.step, expected.generation),
                judge,
                expected,
                op="commit",
                url=url,
                conditional=objects.conditional,
                settle=objects.settle,
            )
        except StoreError as error:
            if not (error.retryable or isinstance(error, (OutcomeUnknownError, PreconditionFailedError, ObjectNotFoundError))):
                raise
            raise CommitUnknownError(
                f"whether the root of step {expected.step} was written could not be found out: {error}",
                url=url,
                hint="look with `s3loader ckpt latest`; nothing of it is deleted before garbage collection fences it",
            ) from error
        return now if done is None else parse(expected.step, data, done.etag, expected.generation)


def lost(now: Root, url: str) -> CheckpointError:
    """What is raised where a root is no more what a writer (or deleter) expected.

    Args:
        now: The root.
        url: Of the run.
    """
    url = f"{url}/{now.key}"
    if now.state in ("tombstone", "absent"):
        return FencedError(
            f"step {now.step} was retired while it was written",
            url=url,
            hint="it was deleted, or garbage collection took the save for abandoned; save it again",
        )
    return StepExistsError(
        f"step {now.step} is taken by attempt {now.attempt or '(damaged)'}",
        url=url,
        hint="another process saves to this run; give each job a run of its own, or save with on_exists='skip'",
    )
