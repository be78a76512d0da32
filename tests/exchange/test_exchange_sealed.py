"""What is read and written back, or decides what is deleted, is what was written: a bit that is wrong does not live on."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from s3loader.errors import IntegrityError, S3LoaderError
from s3loader.exchange import S3ExchangeStore, append_entries, encode_manifest
from s3loader.exchange.lines import file_entry
from s3loader.store import ObjectStore, open_store
from s3loader.testing import Fault, Server, open_faulty_store, server

ROOT = "d/m.jsonl"
SEEDS = range(4)


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server("moto") as running:
        yield running


Opening = tuple[str, dict[str, Any]]


@pytest.fixture(params=["memory", "file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Opening:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}", {}
    if request.param == "file":
        return f"file://{tmp_path}/store", {}
    s3: Server = request.getfixturevalue("s3")
    arguments = {"endpoint_url": s3.endpoint_url, "region": s3.region}
    keys = {"access_key_id": s3.access_key_id, "secret_access_key": s3.secret_access_key}
    return f"s3://{s3.bucket()}", arguments | keys


def _entries(first: int, count: int = 2) -> list[Any]:
    return [file_entry(f"o/{i}", str(i), {"label": i}, None, 1, None) for i in range(first, first + count)]


def _make(place: Opening, *, sealed: bool) -> ObjectStore:
    """A root with entries of its own and two parts; unsealed is as s3exchange, or a copy, leaves it."""
    store = open_store(place[0], **place[1])
    for i in range(6):
        store.put(f"o/{i}", b"x")
    exchange = S3ExchangeStore(store)
    exchange.write_manifest(ROOT, _entries(0))
    if sealed:
        append_entries(store, ROOT, _entries(2))
        append_entries(store, ROOT, _entries(4))
        return store
    root = bytes(store.get(ROOT))
    for first in (2, 4):
        key = f"d/manifests/part-20250101-000000-0000000{first}.jsonl"
        store.put(key, encode_manifest(_entries(first)))
        root += encode_manifest([{"kind": "manifest_ref", "key": key}])
    store.put(ROOT, root)
    return store


def _append(exchange: S3ExchangeStore) -> list[int]:
    exchange.write_manifest(ROOT, _entries(6, 1), mode="append_parts")
    return [0, 1, 2, 3, 4, 5, 6]


def _writer(exchange: S3ExchangeStore) -> list[int]:
    with exchange.open_manifest_writer(ROOT) as writer:
        writer.add_entry(_entries(6, 1)[0])
    return [0, 1, 2, 3, 4, 5, 6]


def _compact(exchange: S3ExchangeStore) -> list[int]:
    exchange.compact_manifest(ROOT, ROOT, apply_deletes=False, delete_parts=True)
    return [0, 1, 2, 3, 4, 5]


def _save(exchange: S3ExchangeStore) -> list[int]:
    exchange.get_manifest(ROOT).save()
    return [0, 1, 2, 3, 4, 5]


def _delete(exchange: S3ExchangeStore) -> list[int]:
    exchange.delete_manifest(ROOT)
    return []


CHANGES: list[Callable[[S3ExchangeStore], list[int]]] = [_append, _writer, _compact, _save, _delete]


def _labels(store: ObjectStore) -> list[int]:
    if not store.exists(ROOT):
        return []
    return [entry["meta"]["label"] for entry in S3ExchangeStore(store).iter_manifest_entries(ROOT)]  # type: ignore[typeddict-item,index]


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "foreign"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("hit", [ROOT, "manifests/part-"])
def test_a_bit_flipped_on_the_way_is_fetched_again(place: Opening, change: Any, hit: str, sealed: bool) -> None:
    for seed in SEEDS if not place[0].startswith("s3") else SEEDS[:1]:
        prefix = f"{place[0]}/{uuid.uuid4().hex[:6]}" if not place[0].startswith("memory") else f"memory://{uuid.uuid4().hex}"
        store = _make((prefix, place[1]), sealed=sealed)
        faulty, backend = open_faulty_store(prefix, [Fault("flip", op="get", key=hit, times=1)], seed=seed, **place[1])
        wanted = change(S3ExchangeStore(faulty))
        assert any(seen.fault for seen in backend.seen) or (change in (_append, _writer) and hit != ROOT)
        assert _labels(store) == wanted
        if change is _delete:
            assert not [*store.list("o/"), *store.list("d/")]


@pytest.mark.parametrize("change", CHANGES)
def test_damage_that_stays_is_an_error_and_nothing_is_written_or_deleted(place: Opening, change: Any) -> None:
    store = _make(place, sealed=True)
    for key in (ROOT, next(iter(store.list("d/manifests/"))).key):
        meta, data = store.head(key), bytes(store.get(key))
        at = data.index(b'"label":') + 8
        damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        store.put(key, damaged, metadata=meta.metadata, content_type=meta.content_type)
        before = {entry.key for entry in store.list("")}
        if key == ROOT or change not in (_append, _writer):
            with pytest.raises(IntegrityError) as caught:
                change(S3ExchangeStore(store))
            assert key in str(caught.value)
            assert bytes(store.get(key)) == damaged
            gone = before - {entry.key for entry in store.list("")}
            assert not gone
        if key == ROOT or not place[0].startswith("s3"):  # where the test's own put has made a right MD5 of it
            with pytest.raises(IntegrityError):
                _labels(store)
        store.put(key, data, metadata=meta.metadata, content_type=meta.content_type)


def test_a_read_meets_a_flipped_bit_and_fetches_again(place: Opening) -> None:
    store = _make(place, sealed=True)
    for seed in SEEDS:
        faults = [Fault("flip", op="get", key=".jsonl", nth=n) for n in (1, 3)]
        faulty, _ = open_faulty_store(place[0], faults, seed=seed, **place[1])
        assert _labels(faulty) == _labels(store) == [0, 1, 2, 3, 4, 5]


def test_a_copy_without_metadata_is_read_and_appended_to(tmp_path: Path) -> None:
    _make((f"file://{tmp_path}/a", {}), sealed=True)
    for path in (tmp_path / "a").rglob("*"):  # as any tool that knows nothing of attributes
        target = tmp_path / "b" / path.relative_to(tmp_path / "a")
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    copy = open_store(str(tmp_path / "b"))
    assert _labels(copy) == [0, 1, 2, 3, 4, 5]
    assert _append(S3ExchangeStore(copy)) == _labels(copy)


def test_equal_parts_within_one_second_are_two(place: Opening) -> None:
    store = open_store(place[0], **place[1])
    for _ in range(3):
        append_entries(store, ROOT, _entries(0, 1))
    assert _labels(store) == [0, 0, 0]


def test_an_unreadable_root_is_said_as_such(place: Opening) -> None:
    store = _make(place, sealed=False)
    store.put(ROOT, bytes(store.get(ROOT)) + b"[" * 100_000)
    for change in CHANGES:
        with pytest.raises(S3LoaderError) as caught:
            change(S3ExchangeStore(store))
        assert ROOT in str(caught.value)
