"""Pack images into tar shards + manifest + index side-cars, in the WebDataset layout."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from examples.demo.data import images
from s3loader import S3ExchangeStore, ShardSizePolicy

MANIFEST = "dataset/manifest.jsonl"
CLASSES = "dataset/classes.json"


@dataclass(frozen=True)
class Packed:
    samples: int
    shards: int
    image_bytes: int
    seconds: float


def pack(url: str, folder: Path) -> Packed:
    """Pack every image of `folder` below `url`: two members a sample, ``000123.png`` and ``000123.cls``."""
    start = time.perf_counter()
    store = S3ExchangeStore(url)
    classes = sorted({path.name for path in folder.iterdir() if path.is_dir()}) or [str(c) for c in range(10)]
    samples = image_bytes = 0
    with store.open_manifest_writer(
        MANIFEST, mode="overwrite", shard_size=ShardSizePolicy(max_samples=256, max_bytes="64MiB")
    ) as writer:
        for samples, (label, suffix, image) in enumerate(images(folder), 1):
            writer.add_sample(f"{samples - 1:06d}", {suffix: image, "cls": str(classes.index(label)).encode()})
            image_bytes += len(image)
    shards = int(writer.stats()["shards_created"])
    store.put_object(CLASSES, json.dumps(classes).encode(), content_type="application/json")
    return Packed(samples, shards, image_bytes, time.perf_counter() - start)
