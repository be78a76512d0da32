"""s3loader: training data and checkpoints between object stores and PyTorch, TensorFlow and JAX.

This is a table of contents; each name is imported from its module on first use, so that
``import s3loader`` stays light. Frameworks live behind `s3loader.torch`, `s3loader.tensorflow`
and `s3loader.jax`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3loader.checkpoint import BestN as BestN
    from s3loader.checkpoint import Checkpoint as Checkpoint
    from s3loader.checkpoint import CheckpointManager as CheckpointManager
    from s3loader.checkpoint import CheckpointOptions as CheckpointOptions
    from s3loader.checkpoint import EveryNSteps as EveryNSteps
    from s3loader.checkpoint import LatestN as LatestN
    from s3loader.checkpoint import SaveHandle as SaveHandle
    from s3loader.config import S3Settings as S3Settings
    from s3loader.errors import AccessDeniedError as AccessDeniedError
    from s3loader.errors import AuthenticationError as AuthenticationError
    from s3loader.errors import BucketNotFoundError as BucketNotFoundError
    from s3loader.errors import CheckpointError as CheckpointError
    from s3loader.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from s3loader.errors import ClosedError as ClosedError
    from s3loader.errors import CommitUnknownError as CommitUnknownError
    from s3loader.errors import ConfigError as ConfigError
    from s3loader.errors import ConflictError as ConflictError
    from s3loader.errors import CredentialsError as CredentialsError
    from s3loader.errors import FencedError as FencedError
    from s3loader.errors import FormatError as FormatError
    from s3loader.errors import IncompleteCheckpointError as IncompleteCheckpointError
    from s3loader.errors import IntegrityError as IntegrityError
    from s3loader.errors import InvalidManifestError as InvalidManifestError
    from s3loader.errors import NoSpaceError as NoSpaceError
    from s3loader.errors import ObjectChangedError as ObjectChangedError
    from s3loader.errors import ObjectExistsError as ObjectExistsError
    from s3loader.errors import ObjectNotFoundError as ObjectNotFoundError
    from s3loader.errors import OutcomeUnknownError as OutcomeUnknownError
    from s3loader.errors import PlanError as PlanError
    from s3loader.errors import PreconditionFailedError as PreconditionFailedError
    from s3loader.errors import RangeError as RangeError
    from s3loader.errors import S3ExchangeError as S3ExchangeError
    from s3loader.errors import S3LoaderError as S3LoaderError
    from s3loader.errors import SampleError as SampleError
    from s3loader.errors import ShardReadError as ShardReadError
    from s3loader.errors import StateMismatchError as StateMismatchError
    from s3loader.errors import StepExistsError as StepExistsError
    from s3loader.errors import StoreConnectionError as StoreConnectionError
    from s3loader.errors import StoreError as StoreError
    from s3loader.errors import StoreTimeoutError as StoreTimeoutError
    from s3loader.errors import ThrottledError as ThrottledError
    from s3loader.errors import TruncatedError as TruncatedError
    from s3loader.errors import UnavailableError as UnavailableError
    from s3loader.errors import UnsupportedOperationError as UnsupportedOperationError
    from s3loader.errors import UnsupportedStateError as UnsupportedStateError
    from s3loader.errors import WorkerError as WorkerError
    from s3loader.events import OpEvent as OpEvent
    from s3loader.exchange.errors import ManifestNotFoundError as ManifestNotFoundError
    from s3loader.exchange.errors import MissingPlaceholderError as MissingPlaceholderError
    from s3loader.exchange.items import create_shards as create_shards
    from s3loader.exchange.keys import infer_id_from_key as infer_id_from_key
    from s3loader.exchange.keys import normalize_key as normalize_key
    from s3loader.exchange.keys import resolve_template as resolve_template
    from s3loader.exchange.manifest import Manifest as Manifest
    from s3loader.exchange.scope import ScopedStore as ScopedStore
    from s3loader.exchange.shard import Shard as Shard
    from s3loader.exchange.store import S3ExchangeStore as S3ExchangeStore
    from s3loader.exchange.types import CompactReport as CompactReport
    from s3loader.exchange.types import DeleteReport as DeleteReport
    from s3loader.exchange.types import FileEntry as FileEntry
    from s3loader.exchange.types import ManifestEntry as ManifestEntry
    from s3loader.exchange.types import ManifestRef as ManifestRef
    from s3loader.exchange.types import ManifestRefEntry as ManifestRefEntry
    from s3loader.exchange.types import ShardEntry as ShardEntry
    from s3loader.exchange.types import ShardItem as ShardItem
    from s3loader.exchange.types import ShardSizePolicy as ShardSizePolicy
    from s3loader.exchange.types import StreamingBodyLike as StreamingBodyLike
    from s3loader.exchange.writer import ManifestWriter as ManifestWriter
    from s3loader.exchange.writer_config import ManifestWriterConfig as ManifestWriterConfig
    from s3loader.loader import Batch as Batch
    from s3loader.loader import Dataset as Dataset
    from s3loader.loader import Loader as Loader
    from s3loader.loader import LoaderOptions as LoaderOptions
    from s3loader.loader import LoaderStats as LoaderStats
    from s3loader.loader import Ragged as Ragged
    from s3loader.loader import open_dataset as open_dataset
    from s3loader.plan import OrderSpec as OrderSpec
    from s3loader.plan import Plan as Plan
    from s3loader.shard.body import ArchiveMemberBody as ArchiveMemberBody
    from s3loader.shard.build import build_index as build_index
    from s3loader.shard.index import ShardIndex as ShardIndex
    from s3loader.store import ObjectStore as ObjectStore
    from s3loader.store import StoreOptions as StoreOptions
    from s3loader.store import open_store as open_store
    from s3loader.store.base import ReadResult as ReadResult
    from s3loader.store.multipart import MultipartWriter as MultipartWriter
    from s3loader.types import ByteRange as ByteRange
    from s3loader.types import Capabilities as Capabilities
    from s3loader.types import CommonPrefix as CommonPrefix
    from s3loader.types import DeleteFailure as DeleteFailure
    from s3loader.types import ObjectMeta as ObjectMeta
    from s3loader.types import ObjectURL as ObjectURL
    from s3loader.types import PutRequest as PutRequest
    from s3loader.types import PutResult as PutResult
    from s3loader.types import ReadRequest as ReadRequest
    from s3loader.types import Update as Update

__version__ = "0.1.0"

__all__ = [
    "AccessDeniedError",
    "ArchiveMemberBody",
    "AuthenticationError",
    "Batch",
    "BestN",
    "BucketNotFoundError",
    "ByteRange",
    "Capabilities",
    "Checkpoint",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointNotFoundError",
    "CheckpointOptions",
    "ClosedError",
    "CommitUnknownError",
    "CommonPrefix",
    "CompactReport",
    "ConfigError",
    "ConflictError",
    "CredentialsError",
    "Dataset",
    "DeleteFailure",
    "DeleteReport",
    "EveryNSteps",
    "FencedError",
    "FileEntry",
    "FormatError",
    "IncompleteCheckpointError",
    "IntegrityError",
    "InvalidManifestError",
    "LatestN",
    "Loader",
    "LoaderOptions",
    "LoaderStats",
    "Manifest",
    "ManifestEntry",
    "ManifestNotFoundError",
    "ManifestRef",
    "ManifestRefEntry",
    "ManifestWriter",
    "ManifestWriterConfig",
    "MissingPlaceholderError",
    "MultipartWriter",
    "NoSpaceError",
    "ObjectChangedError",
    "ObjectExistsError",
    "ObjectMeta",
    "ObjectNotFoundError",
    "ObjectStore",
    "ObjectURL",
    "OpEvent",
    "OrderSpec",
    "OutcomeUnknownError",
    "Plan",
    "PlanError",
    "PreconditionFailedError",
    "PutRequest",
    "PutResult",
    "Ragged",
    "RangeError",
    "ReadRequest",
    "ReadResult",
    "S3ExchangeError",
    "S3ExchangeStore",
    "S3LoaderError",
    "S3Settings",
    "SampleError",
    "SaveHandle",
    "ScopedStore",
    "Shard",
    "ShardEntry",
    "ShardIndex",
    "ShardItem",
    "ShardReadError",
    "ShardSizePolicy",
    "StateMismatchError",
    "StepExistsError",
    "StoreConnectionError",
    "StoreError",
    "StoreOptions",
    "StoreTimeoutError",
    "StreamingBodyLike",
    "ThrottledError",
    "TruncatedError",
    "UnavailableError",
    "UnsupportedOperationError",
    "UnsupportedStateError",
    "Update",
    "WorkerError",
    "build_index",
    "create_shards",
    "infer_id_from_key",
    "normalize_key",
    "open_dataset",
    "open_store",
    "resolve_template",
]

_HOME = {
    "AccessDeniedError": "s3loader.errors",
    "ArchiveMemberBody": "s3loader.shard.body",
    "AuthenticationError": "s3loader.errors",
    "Batch": "s3loader.loader",
    "BestN": "s3loader.checkpoint",
    "BucketNotFoundError": "s3loader.errors",
    "ByteRange": "s3loader.types",
    "Capabilities": "s3loader.types",
    "Checkpoint": "s3loader.checkpoint",
    "CheckpointError": "s3loader.errors",
    "CheckpointManager": "s3loader.checkpoint",
    "CheckpointNotFoundError": "s3loader.errors",
    "CheckpointOptions": "s3loader.checkpoint",
    "ClosedError": "s3loader.errors",
    "CommitUnknownError": "s3loader.errors",
    "CommonPrefix": "s3loader.types",
    "CompactReport": "s3loader.exchange.types",
    "ConfigError": "s3loader.errors",
    "ConflictError": "s3loader.errors",
    "CredentialsError": "s3loader.errors",
    "Dataset": "s3loader.loader",
    "DeleteFailure": "s3loader.types",
    "DeleteReport": "s3loader.exchange.types",
    "EveryNSteps": "s3loader.checkpoint",
    "FencedError": "s3loader.errors",
    "FileEntry": "s3loader.exchange.types",
    "FormatError": "s3loader.errors",
    "IncompleteCheckpointError": "s3loader.errors",
    "IntegrityError": "s3loader.errors",
    "InvalidManifestError": "s3loader.errors",
    "LatestN": "s3loader.checkpoint",
    "Loader": "s3loader.loader",
    "LoaderOptions": "s3loader.loader",
    "LoaderStats": "s3loader.loader",
    "Manifest": "s3loader.exchange.manifest",
    "ManifestEntry": "s3loader.exchange.types",
    "ManifestNotFoundError": "s3loader.exchange.errors",
    "ManifestRef": "s3loader.exchange.types",
    "ManifestRefEntry": "s3loader.exchange.types",
    "ManifestWriter": "s3loader.exchange.writer",
    "ManifestWriterConfig": "s3loader.exchange.writer_config",
    "MissingPlaceholderError": "s3loader.exchange.errors",
    "MultipartWriter": "s3loader.store.multipart",
    "NoSpaceError": "s3loader.errors",
    "ObjectChangedError": "s3loader.errors",
    "ObjectExistsError": "s3loader.errors",
    "ObjectMeta": "s3loader.types",
    "ObjectNotFoundError": "s3loader.errors",
    "ObjectStore": "s3loader.store",
    "ObjectURL": "s3loader.types",
    "OpEvent": "s3loader.events",
    "OrderSpec": "s3loader.plan",
    "OutcomeUnknownError": "s3loader.errors",
    "Plan": "s3loader.plan",
    "PlanError": "s3loader.errors",
    "PreconditionFailedError": "s3loader.errors",
    "PutRequest": "s3loader.types",
    "PutResult": "s3loader.types",
    "Ragged": "s3loader.loader",
    "RangeError": "s3loader.errors",
    "ReadRequest": "s3loader.types",
    "ReadResult": "s3loader.store.base",
    "S3ExchangeError": "s3loader.errors",
    "S3ExchangeStore": "s3loader.exchange.store",
    "S3LoaderError": "s3loader.errors",
    "S3Settings": "s3loader.config",
    "SampleError": "s3loader.errors",
    "SaveHandle": "s3loader.checkpoint",
    "ScopedStore": "s3loader.exchange.scope",
    "Shard": "s3loader.exchange.shard",
    "ShardEntry": "s3loader.exchange.types",
    "ShardIndex": "s3loader.shard.index",
    "ShardItem": "s3loader.exchange.types",
    "ShardReadError": "s3loader.errors",
    "ShardSizePolicy": "s3loader.exchange.types",
    "StateMismatchError": "s3loader.errors",
    "StepExistsError": "s3loader.errors",
    "StoreConnectionError": "s3loader.errors",
    "StoreError": "s3loader.errors",
    "StoreOptions": "s3loader.store",
    "StoreTimeoutError": "s3loader.errors",
    "StreamingBodyLike": "s3loader.exchange.types",
    "ThrottledError": "s3loader.errors",
    "TruncatedError": "s3loader.errors",
    "UnavailableError": "s3loader.errors",
    "UnsupportedOperationError": "s3loader.errors",
    "UnsupportedStateError": "s3loader.errors",
    "Update": "s3loader.types",
    "WorkerError": "s3loader.errors",
    "build_index": "s3loader.shard.build",
    "create_shards": "s3loader.exchange.items",
    "infer_id_from_key": "s3loader.exchange.keys",
    "normalize_key": "s3loader.exchange.keys",
    "open_dataset": "s3loader.loader",
    "open_store": "s3loader.store",
    "resolve_template": "s3loader.exchange.keys",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 's3loader' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
