"""Manifests: any bytes give entries, or an error that names the manifest and the line."""

from __future__ import annotations

import random
import uuid
from typing import Any

from fuzzing import run_fuzz
from mutating import JSON_LINES

from s3loader.exchange import S3ExchangeStore, encode_manifest
from s3loader.exchange.lines import file_entry
from s3loader.store import open_store


def _manifest(rng: random.Random) -> bytes:
    entries: list[Any] = [
        file_entry(f"a/{i}.jpg", str(i), {"label": i, "box": [0.5, i]}, "image/jpeg", rng.randrange(10_000), "e" * 32)
        for i in range(rng.randrange(4))
    ]
    entries.append({"kind": "manifest_ref", "key": "m/manifests/part-20250101-000000-00000000.jsonl"})
    return encode_manifest(entries)


def test_manifests() -> None:
    name = uuid.uuid4().hex
    objects = open_store(f"memory://{name}")
    objects.put("m/manifests/part-20250101-000000-00000000.jsonl", b"\n")
    store = S3ExchangeStore(f"memory://{name}")

    def read(data: bytes) -> Any:
        objects.put("m/root.jsonl", data)
        return list(store.iter_manifest_entries("m/root.jsonl", resolve_refs=False))

    run_fuzz("manifest", _manifest, read, structure=JSON_LINES, where="m/root.jsonl")
