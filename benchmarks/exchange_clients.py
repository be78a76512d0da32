"""The clients of `exchange.py`, each in a process of its own. All run against the in-memory S3 server."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Callable
from typing import Any

from _child import serve

os.environ.update(AWS_ACCESS_KEY_ID="benchmark-key", AWS_SECRET_ACCESS_KEY="benchmark-secret", AWS_REGION="us-east-1")
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

Round = Callable[[], dict[str, Any]]


def exchange(spec: dict[str, Any]) -> Any:
    from s3loader import S3ExchangeStore, open_store

    return S3ExchangeStore(open_store(f"s3://{spec['bucket']}", endpoint_url=spec["endpoint"]))


def contents(count: int, size: int) -> list[bytes]:
    """So many different contents, cheap in memory: windows on one block of noise."""
    noise = random.Random(1).randbytes((1 << 20) + size)
    return [noise[i * 97 % (1 << 20) :][:size] for i in range(count)]


def pack_ours(spec: dict[str, Any]) -> Round:
    """`ManifestWriter`: shards with internal manifest, index, CRC32C, and a manifest of the whole."""
    from s3loader import ShardSizePolicy

    store, data, turn = exchange(spec), contents(4096, spec["size"]), iter(range(1 << 30))

    def run() -> dict[str, Any]:
        policy = ShardSizePolicy(max_bytes=spec["shard"])
        with store.open_manifest_writer(f"ours{next(turn)}/m.jsonl", mode="overwrite", shard_size=policy) as writer:
            for i in range(spec["count"]):
                writer.add_to_shard(f"{i:08d}.bin", data[i & 4095], id=str(i))
        return {"bytes": spec["count"] * spec["size"], "items": spec["count"]}

    return run


def pack_tarfile(spec: dict[str, Any]) -> Round:
    """What one writes by hand: `tarfile` into memory, then boto3's `upload_fileobj`."""
    import boto3

    client = boto3.client("s3", endpoint_url=spec["endpoint"])
    data, turn = contents(4096, spec["size"]), iter(range(1 << 30))

    def run() -> dict[str, Any]:
        prefix = f"theirs{next(turn)}"
        per_shard = spec["shard"] // spec["size"]
        for number, start in enumerate(range(0, spec["count"], per_shard)):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as tar:
                for i in range(start, min(start + per_shard, spec["count"])):
                    info = tarfile.TarInfo(f"{i:08d}.bin")
                    info.size = spec["size"]
                    tar.addfile(info, io.BytesIO(data[i & 4095]))
            file.seek(0)
            client.upload_fileobj(file, spec["bucket"], f"{prefix}/shard-{number:06d}.tar")
        return {"bytes": spec["count"] * spec["size"], "items": spec["count"]}

    return run


def random_ours(spec: dict[str, Any]) -> Round:
    """Random members of the shards by their virtual keys; bytes asked for, with a fresh store each round."""
    keys = random.Random(2).sample(spec_keys(spec), spec["reads"])

    def run() -> dict[str, Any]:
        total = 0
        first = None
        started = time.perf_counter()
        for body, _ in exchange(spec).iter_objects_from_keys(keys, details=spec["details"]):
            total += len(body.read())
            first = first or time.perf_counter() - started
        return {"bytes": total, "items": len(keys), "first": first}

    return run


def spec_keys(spec: dict[str, Any]) -> list[str]:
    per_shard = spec["shard"] // spec["size"]
    return [
        f"random/shards/shard-{n + 1:06d}.tar#{n * per_shard + i:08d}.bin"
        for n in range(spec["shards"])
        for i in range(per_shard)
    ]


def fill(spec: dict[str, Any]) -> Round:
    """Makes the shards that `random_*` read."""
    from s3loader import ShardSizePolicy

    store, data = exchange(spec), contents(4096, spec["size"])

    def run() -> dict[str, Any]:
        per_shard = spec["shard"] // spec["size"]
        with store.open_manifest_writer(
            "random/m.jsonl", mode="overwrite", shard_size=ShardSizePolicy(max_entries=per_shard)
        ) as writer:
            for i in range(per_shard * spec["shards"]):
                writer.add_to_shard(f"{i:08d}.bin", data[i & 4095], id=str(i))
        sizes = [store.objects.head(e["archive_key"]).size for e in store.iter_manifest_entries("random/m.jsonl")]
        return {"bytes": sum(sizes), "items": len(sizes), "archive": sizes[0]}

    return run


def lines_of(spec: dict[str, Any]) -> bytes:
    return b"".join(
        b'{"kind":"file","key":"training/123/samples/file_%07d.wav","id":"file-%07d","meta":{"sr":16000,"label":%d},'
        b'"content_type":"audio/wav","size_bytes":%d,"etag":"548baa8d1efffaaae5d59f4bedcf09b3"}\n'
        % (i, i, i % 10, 15000 + i % 999)
        for i in range(spec["count"])
    )


def iterate_ours(spec: dict[str, Any]) -> Round:
    """Every entry of a manifest, from the store."""
    store = exchange(spec)
    store.objects.put("manifest/m.jsonl", lines_of(spec))

    def run() -> dict[str, Any]:
        size = store.objects.head("manifest/m.jsonl").size
        return {"bytes": size, "items": sum(1 for _ in store.iter_manifest_entries("manifest/m.jsonl"))}

    return run


def iterate_json(spec: dict[str, Any]) -> Round:
    """The same by hand: boto3's stream, `iter_lines`, `json.loads`."""
    import boto3

    client = boto3.client("s3", endpoint_url=spec["endpoint"])
    with tempfile.TemporaryFile() as file:
        file.write(lines_of(spec))
        file.seek(0)
        client.upload_fileobj(file, spec["bucket"], "manifest/theirs.jsonl")

    def run() -> dict[str, Any]:
        answer = client.get_object(Bucket=spec["bucket"], Key="manifest/theirs.jsonl")
        items = sum(1 for line in answer["Body"].iter_lines(1 << 20) if json.loads(line)["kind"])
        return {"bytes": answer["ContentLength"], "items": items}

    return run


CLIENTS: dict[str, Callable[[dict[str, Any]], Round]] = {
    "pack_ours": pack_ours,
    "pack_tarfile": pack_tarfile,
    "fill": fill,
    "random_ours": random_ours,
    "iterate_ours": iterate_ours,
    "iterate_json": iterate_json,
}

if __name__ == "__main__":
    serve(lambda spec: CLIENTS[spec["client"]](spec))
