"""s3loader: training data and checkpoints between object stores and PyTorch, TensorFlow and JAX.

This is a table of contents; each name is imported from its module on first use, so that
``import s3loader`` stays light. Frameworks live behind `s3loader.torch`, `s3loader.tensorflow`
and `s3loader.jax`.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, Final

__version__ = "0.1.0"

_NAMES: Final[dict[str, str]] = {
    "checkpoint": (
        "ArrayShard BestN Checkpoint CheckpointManager CheckpointOptions EveryNSteps GCReport KeepPolicy LatestN "
        "OpenCheckpoint PerRank Preemption SaveHandle SaveResult StepInfo open_checkpoint"
    ),
    "config": "S3Settings",
    "credentials": "Credentials",
    "errors": (
        "AccessDeniedError AuthenticationError BucketNotFoundError CacheFullError CheckpointError "
        "CheckpointNotFoundError ClosedError CommitUnknownError ConfigError ConflictError CredentialsError "
        "ExchangeObjectNotFoundError FencedError FormatError IncompleteCheckpointError IntegrityError "
        "InvalidManifestError ManifestNotFoundError MissingPlaceholderError NoSpaceError ObjectChangedError "
        "ObjectExistsError ObjectNotFoundError OutcomeUnknownError PartialFailureError PlanError "
        "PreconditionFailedError RangeError S3ExchangeError S3LoaderError SampleError ShardReadError "
        "SourceNotFoundError StateMismatchError StepExistsError StoreConnectionError StoreError StoreTimeoutError "
        "ThrottledError TruncatedError UnavailableError UnsupportedOperationError UnsupportedStateError WorkerError"
    ),
    "events": "OpEvent",
    "exchange.pack": "create_shards",
    "exchange.keys": "infer_id_from_key normalize_key resolve_template",
    "exchange.store": "S3ExchangeStore",
    "exchange.types": (
        "CompactReport DeleteReport FileEntry ManifestEntry ManifestRef ManifestRefEntry ManifestWriterConfig ShardEntry "
        "ShardItem ShardSizePolicy StreamingBodyLike WriterProgress"
    ),
    "exchange.views": "Manifest ScopedStore Shard",
    "exchange.writer": "ManifestWriter",
    "loader": (
        "Batch Collate Dataset Decode GrainSource Group Loader LoaderOptions LoaderStats Mixture Place Quarantine "
        "Quarantined Ragged SampleReader check_dataset collate_fixed collate_ragged from_manifest from_mds from_objects "
        "from_parquet from_prefix from_tfrecord from_webdataset mix_datasets open_dataset read_quarantine register_decoder"
    ),
    "packing": "optimize pack",
    "plan": "Explanation OrderSpec Plan",
    "shard.body": "ArchiveMemberBody",
    "shard.build": "build_index",
    "shard.parquet": "decode_row_group",
    "shard.index": "ShardIndex",
    "shard.reader": "ShardReader extract",
    "store": "ObjectStore StoreOptions open_store",
    "store.aio": "AsyncObjectStore",
    "store.backend": "ReadResult",
    "store.bulk": "PutFailure ReadFailure",
    "store.parts": "MultipartWriter",
    "types": ("ByteRange Capabilities CommonPrefix DeleteFailure ObjectMeta ObjectURL PutRequest PutResult ReadRequest Update"),
}
"""Public names, by the module below this one that has them. What type checkers see of it is ``__init__.pyi``, which
``python tests/test_exports.py`` writes from this table."""

_HOME: Final = {name: f"s3loader.{module}" for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOME)  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 's3loader' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


if "S3LOADER_OPLOG" in os.environ or "S3LOADER_OPLOG_JOIN" in os.environ:  # of a user, or of the process that began this one
    importlib.import_module("s3loader.oplog").join_op_log()
