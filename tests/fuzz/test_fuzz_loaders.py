"""What a loader is given of stored data (manifests, states, quarantine lists): samples as written, or a typed error."""

from __future__ import annotations

import json
import random
import uuid
import warnings
from typing import Any

import pytest
from fuzzing import run_fuzz
from mutating import JSON, JSON_LINES

from s3loader import Loader, Quarantined, S3ExchangeStore, ShardSizePolicy, open_dataset, read_quarantine
from s3loader.checksum import seal_json
from s3loader.loader.quarantine import QuarantineLog
from s3loader.store import ObjectStore, open_store
from s3loader.types import ObjectMeta

ROOT = "d/m.jsonl"
OPTIONS: dict[str, Any] = {"batch_size": 3, "seed": 2}


@pytest.fixture
def made() -> tuple[str, ObjectStore]:
    url = f"memory://{uuid.uuid4().hex}"
    exchange = S3ExchangeStore(url)
    with exchange.open_manifest_writer(ROOT, mode="overwrite", shard_size=ShardSizePolicy(max_entries=4)) as writer:
        for i in range(8):
            writer.add_to_shard(f"{i}.bin", bytes([i]) * (50 + i), id=str(i), meta={"label": i})
    return url, open_store(url)


def _samples(url: str) -> list[bytes]:
    loader = Loader(open_dataset(f"{url}/{ROOT}"), **OPTIONS)
    return [bytes(sample) for batch in loader for sample in batch]


def test_shard_entries(made: tuple[str, ObjectStore]) -> None:
    """Counts, sizes and keys of a manifest that whoever wrote it has no checksum for."""
    url, store = made
    valid = bytes(store.get(ROOT))
    whole = {bytes(sample) for sample in _samples(url)}

    def read(data: bytes) -> Any:
        store.put(ROOT, data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _samples(url)

    run_fuzz("shards of a manifest", lambda _: valid, read, lambda _, other: set(other) <= whole, structure=JSON_LINES)


def test_loose_objects() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    store, exchange = open_store(url), S3ExchangeStore(url)
    entries = [exchange.put_object(f"d/o/{i}.bin", bytes([i]) * (5 + i), meta={"label": i}) for i in range(5)]
    exchange.write_manifest(ROOT, entries)
    valid = bytes(store.get(ROOT))
    whole = {bytes(sample) for sample in _samples(url)}

    def read(data: bytes) -> Any:
        store.put(ROOT, data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _samples(url)

    run_fuzz("objects of a manifest", lambda _: valid, read, lambda _, other: set(other) <= whole, structure=JSON_LINES)


@pytest.mark.parametrize("verb", ["files", "objects", "compact", "delete"])
def test_exchange_verbs(made: tuple[str, ObjectStore], verb: str) -> None:
    _, store = made
    exchange = S3ExchangeStore(store)
    valid = bytes(store.get(ROOT))

    def read(data: bytes) -> Any:
        store.put(ROOT, data)
        if verb == "files":
            return [*exchange.list_manifest_files(ROOT), *exchange.get_manifest(ROOT).get_keys()]
        if verb == "objects":
            return [body.read() for body, _ in exchange.iter_objects(ROOT)]
        if verb == "compact":
            return exchange.compact_manifest(ROOT, "d/other.jsonl", expand_shards=True)
        return exchange.get_manifest(ROOT).delete(dry_run=True)

    run_fuzz(f"verb {verb}", lambda _: valid, read, structure=JSON_LINES)


def test_states(made: tuple[str, ObjectStore]) -> None:
    url, _ = made
    loader = Loader(open_dataset(f"{url}/{ROOT}"), **OPTIONS)
    next(iter(loader))
    state = json.dumps({**loader.state_dict(), "skip": [[0, 1, 2]], "exclude": [3]}).encode()

    def read(data: bytes) -> Any:
        try:
            told = json.loads(data)
        except (ValueError, RecursionError):
            return None  # the user's own
        other = Loader(open_dataset(f"{url}/{ROOT}"), **OPTIONS)
        other.load_state_dict(told)
        assert len(other) <= 8
        return [bytes(sample) for batch in other for sample in batch]

    run_fuzz("loader state", lambda _: state, read, structure=JSON)


def test_quarantine_lists() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    store = open_store(url)
    entries = [Quarantined(i, f"a.tar#{i}", 0, i, "ValueError: x") for i in range(4)]
    QuarantineLog("q", store, 0, 0).follow(entries)
    key = next(entry.key for entry in store.list("q/") if isinstance(entry, ObjectMeta))
    valid = bytes(store.get(key))
    assert all(line.startswith(b'{"crc32c":"') for line in valid.splitlines())

    def read(data: bytes) -> Any:
        store.put(key, data)
        found = read_quarantine("q", store=store)
        assert str(found)
        return set(found), all(line.startswith(b'{"crc32c":"') for line in data.splitlines())

    def reseal(data: bytes) -> bytes:
        return b"".join(seal_json(b"{" + line[len('{"crc32c":"01234567",') :]) + b"\n" for line in data.splitlines())

    def same(one: Any, other: Any) -> bool:  # whole lines may be missing; and of older releases none is sealed
        return other[0] <= one[0] or not other[1]

    run_fuzz("quarantine", lambda _: valid, read, same, structure=JSON_LINES, reseal=reseal, where=key)


def test_a_bit_flipped_on_the_way_is_fetched_again() -> None:
    from s3loader.testing import Fault, open_faulty_store

    for seed in range(6):
        url = f"memory://{uuid.uuid4().hex}"
        entries = [Quarantined(i, f"a.tar#{i}", 0, i, "ValueError: x") for i in range(random.Random(seed).randrange(1, 6))]
        QuarantineLog("q", open_store(url), 0, 0).follow(entries)
        faulty, _ = open_faulty_store(url, [Fault("flip", op="get", times=1)], seed=seed)
        assert list(read_quarantine("q", store=faulty)) == entries
