"""Law: what changes a manifest replaces what it has read, so nothing of others is lost or doubled, whenever they come.

Each change is done once for every one of its requests, and there, before or after the request is carried out, or after it was
carried out with its answer lost, another writer comes.
"""

from __future__ import annotations

import itertools
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import pytest
from exchange_helpers import files

from s3loader import ObjectStore, S3ExchangeStore, open_store
from s3loader.errors import ObjectChangedError, OutcomeUnknownError, StoreConnectionError
from s3loader.exchange import iter_manifest
from s3loader.testing import Fault, FaultBackend, Seen

Moment = Literal["before", "after", "lost"]
ROOT = "d/m.jsonl"
Act = Callable[[S3ExchangeStore], Any]


class Comes:
    """Acts at the `number`-th request, once."""

    def __init__(self, number: int, moment: Moment, act: Callable[[], Any]) -> None:
        self.number = number
        self.moment = "before" if moment == "before" else "after"
        self.act = act
        self.came = False

    def __call__(self, seen: Seen, moment: str) -> None:
        if (seen.number, moment) == (self.number, self.moment):
            self.came = True
            self.act()


def append(exchange: S3ExchangeStore) -> None:
    exchange.write_manifest(ROOT, files("mine"), mode="append_parts")


def write(exchange: S3ExchangeStore) -> None:
    with exchange.open_manifest_writer(ROOT, mode="append_parts") as writer:
        writer.add_entry({"kind": "file", "key": "mine"})


def compact(exchange: S3ExchangeStore) -> None:
    exchange.compact_manifest(ROOT, ROOT, apply_deletes=False)


def compact_and_clean(exchange: S3ExchangeStore) -> None:
    exchange.compact_manifest(ROOT, ROOT, apply_deletes=False, delete_parts=True)


def compact_existing(exchange: S3ExchangeStore) -> None:
    exchange.compact_manifest(ROOT, ROOT)


def append_late(exchange: S3ExchangeStore) -> None:
    exchange.write_manifest(ROOT, files("late"), mode="append_parts")


def append_and_compact(exchange: S3ExchangeStore) -> None:
    append_late(exchange)
    compact(exchange)


CHANGES: list[Act] = [append, write, compact, compact_and_clean, compact_existing]
OTHERS: list[Act] = [append_late, compact, append_and_compact]


def keys_of(store: ObjectStore) -> Counter[str]:
    return Counter(entry["key"] for entry in iter_manifest(store, ROOT))  # type: ignore[typeddict-item]


@pytest.mark.parametrize("compacted", [False, True], ids=["parts", "compacted"])
@pytest.mark.parametrize("moment", ["before", "after", "lost"])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_lost_or_doubled_whenever_another_writer_comes(
    change: Act, other: Act, moment: Moment, compacted: bool
) -> None:
    for number in itertools.count(1):
        direct = open_store(f"memory://{uuid.uuid4().hex}")
        theirs = S3ExchangeStore(direct)
        for key in ("mine", "late", "old0", "old1"):
            direct.put(key, b"")
        for key in ("old0", "old1"):
            theirs.write_manifest(ROOT, files(key), mode="append_parts")
        if compacted:
            compact(theirs)
        come = Comes(number, moment, lambda theirs=theirs: other(theirs))
        faults = [Fault("drop_reply", nth=number)] if moment == "lost" else []
        ours = S3ExchangeStore(ObjectStore(direct.url, FaultBackend(direct.backend, faults, hook=come), options=direct.options))
        wanted = {"old0", "old1"}
        unsure: set[str] = set()
        try:
            change(ours)
            wanted |= {"mine"} if change in (append, write) else set()
        except (ObjectChangedError, OutcomeUnknownError, StoreConnectionError):
            unsure = {"mine"} if change in (append, write) else set()
        if not come.came:
            break  # the change has no such request
        wanted |= {"late"} if other is not compact else set()
        found = keys_of(direct)
        assert wanted <= found.keys() <= wanted | unsure, (number, found)
        assert set(found.values()) == {1}, (number, found)
    assert number >= 2
