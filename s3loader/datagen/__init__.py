"""Made-up data for tests and benchmarks: deterministic by seed, with dedup and compression factors that measure true.

generate("8MiB", "npz", seed=1, index=7)       # one object
Generator("100GiB", seed=1).chunks()           # bytes as they are needed
"""

from __future__ import annotations

from s3loader.datagen.formats import (
    OBJECT_TYPES,
    ObjectType,
    generate,
    generate_chunks,
    generate_hdf5,
    generate_npz,
    generate_parquet,
    generate_tfrecord,
)
from s3loader.datagen.source import BLOCK, Generator

__all__ = [
    "BLOCK",
    "OBJECT_TYPES",
    "Generator",
    "ObjectType",
    "generate",
    "generate_chunks",
    "generate_hdf5",
    "generate_npz",
    "generate_parquet",
    "generate_tfrecord",
]
