"""s3loader: training data and checkpoints between object stores and PyTorch, TensorFlow and JAX.

This is a table of contents; each name is imported from its module on first use, so that
``import s3loader`` stays light. Frameworks live behind `s3loader.torch`, `s3loader.tensorflow`
and `s3loader.jax`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3loader.checkpoint import ArrayShard as ArrayShard
    from s3loader.checkpoint import BestN as BestN
    from s3loader.checkpoint import Checkpoint as Checkpoint
    from s3loader.checkpoint import CheckpointManager as CheckpointManager
    from s3loader.checkpoint import CheckpointOptions as CheckpointOptions
    from s3loader.checkpoint import EveryNSteps as EveryNSteps
    from s3loader.checkpoint import GCReport as GCReport
    from s3loader.checkpoint import KeepPolicy as KeepPolicy
    from s3loader.checkpoint import LatestN as LatestN
    from s3loader.checkpoint import OpenCheckpoint as OpenCheckpoint
    from s3loader.checkpoint import PerRank as PerRank
    from s3loader.checkpoint import Preemption as Preemption
    from s3loader.checkpoint import SaveHandle as SaveHandle
    from s3loader.checkpoint import SaveResult as SaveResult
    from s3loader.checkpoint import StepInfo as StepInfo
    from s3loader.checkpoint import open_checkpoint as open_checkpoint
    from s3loader.config import S3Settings as S3Settings
    from s3loader.credentials import Credentials as Credentials
    from s3loader.errors import AccessDeniedError as AccessDeniedError
    from s3loader.errors import AuthenticationError as AuthenticationError
    from s3loader.errors import BucketNotFoundError as BucketNotFoundError
    from s3loader.errors import CacheFullError as CacheFullError
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
    from s3loader.errors import SourceNotFoundError as SourceNotFoundError
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
    from s3loader.exchange.errors import ExchangeObjectNotFoundError as ExchangeObjectNotFoundError
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
    from s3loader.exchange.writer_config import WriterProgress as WriterProgress
    from s3loader.loader import Batch as Batch
    from s3loader.loader import Collate as Collate
    from s3loader.loader import Dataset as Dataset
    from s3loader.loader import Decode as Decode
    from s3loader.loader import GrainSource as GrainSource
    from s3loader.loader import Group as Group
    from s3loader.loader import Loader as Loader
    from s3loader.loader import LoaderOptions as LoaderOptions
    from s3loader.loader import LoaderStats as LoaderStats
    from s3loader.loader import Mixture as Mixture
    from s3loader.loader import Place as Place
    from s3loader.loader import Quarantine as Quarantine
    from s3loader.loader import Quarantined as Quarantined
    from s3loader.loader import Ragged as Ragged
    from s3loader.loader import SampleReader as SampleReader
    from s3loader.loader import collate_fixed as collate_fixed
    from s3loader.loader import collate_ragged as collate_ragged
    from s3loader.loader import from_manifest as from_manifest
    from s3loader.loader import from_mds as from_mds
    from s3loader.loader import from_objects as from_objects
    from s3loader.loader import from_prefix as from_prefix
    from s3loader.loader import from_webdataset as from_webdataset
    from s3loader.loader import mix_datasets as mix_datasets
    from s3loader.loader import open_dataset as open_dataset
    from s3loader.loader import read_quarantine as read_quarantine
    from s3loader.loader import register_decoder as register_decoder
    from s3loader.plan import Explanation as Explanation
    from s3loader.plan import OrderSpec as OrderSpec
    from s3loader.plan import Plan as Plan
    from s3loader.shard.body import ArchiveMemberBody as ArchiveMemberBody
    from s3loader.shard.build import build_index as build_index
    from s3loader.shard.extract import extract as extract
    from s3loader.shard.index import ShardIndex as ShardIndex
    from s3loader.shard.reader import ShardReader as ShardReader
    from s3loader.store import ObjectStore as ObjectStore
    from s3loader.store import StoreOptions as StoreOptions
    from s3loader.store import open_store as open_store
    from s3loader.store.aio import AsyncObjectStore as AsyncObjectStore
    from s3loader.store.base import ReadResult as ReadResult
    from s3loader.store.bulk import PutFailure as PutFailure
    from s3loader.store.bulk import ReadFailure as ReadFailure
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
    "ArrayShard",
    "AsyncObjectStore",
    "AuthenticationError",
    "Batch",
    "BestN",
    "BucketNotFoundError",
    "ByteRange",
    "CacheFullError",
    "Capabilities",
    "Checkpoint",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointNotFoundError",
    "CheckpointOptions",
    "ClosedError",
    "Collate",
    "CommitUnknownError",
    "CommonPrefix",
    "CompactReport",
    "ConfigError",
    "ConflictError",
    "Credentials",
    "CredentialsError",
    "Dataset",
    "Decode",
    "DeleteFailure",
    "DeleteReport",
    "EveryNSteps",
    "ExchangeObjectNotFoundError",
    "Explanation",
    "FencedError",
    "FileEntry",
    "FormatError",
    "GCReport",
    "GrainSource",
    "Group",
    "IncompleteCheckpointError",
    "IntegrityError",
    "InvalidManifestError",
    "KeepPolicy",
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
    "Mixture",
    "MultipartWriter",
    "NoSpaceError",
    "ObjectChangedError",
    "ObjectExistsError",
    "ObjectMeta",
    "ObjectNotFoundError",
    "ObjectStore",
    "ObjectURL",
    "OpEvent",
    "OpenCheckpoint",
    "OrderSpec",
    "OutcomeUnknownError",
    "PerRank",
    "Place",
    "Plan",
    "PlanError",
    "PreconditionFailedError",
    "Preemption",
    "PutFailure",
    "PutRequest",
    "PutResult",
    "Quarantine",
    "Quarantined",
    "Ragged",
    "RangeError",
    "ReadFailure",
    "ReadRequest",
    "ReadResult",
    "S3ExchangeError",
    "S3ExchangeStore",
    "S3LoaderError",
    "S3Settings",
    "SampleError",
    "SampleReader",
    "SaveHandle",
    "SaveResult",
    "ScopedStore",
    "Shard",
    "ShardEntry",
    "ShardIndex",
    "ShardItem",
    "ShardReadError",
    "ShardReader",
    "ShardSizePolicy",
    "SourceNotFoundError",
    "StateMismatchError",
    "StepExistsError",
    "StepInfo",
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
    "WriterProgress",
    "build_index",
    "collate_fixed",
    "collate_ragged",
    "create_shards",
    "extract",
    "from_manifest",
    "from_mds",
    "from_objects",
    "from_prefix",
    "from_webdataset",
    "infer_id_from_key",
    "mix_datasets",
    "normalize_key",
    "open_checkpoint",
    "open_dataset",
    "open_store",
    "read_quarantine",
    "register_decoder",
    "resolve_template",
]

_HOME = {
    "AccessDeniedError": "s3loader.errors",
    "ArchiveMemberBody": "s3loader.shard.body",
    "ArrayShard": "s3loader.checkpoint",
    "AsyncObjectStore": "s3loader.store.aio",
    "AuthenticationError": "s3loader.errors",
    "Batch": "s3loader.loader",
    "BestN": "s3loader.checkpoint",
    "BucketNotFoundError": "s3loader.errors",
    "CacheFullError": "s3loader.errors",
    "ByteRange": "s3loader.types",
    "Capabilities": "s3loader.types",
    "Checkpoint": "s3loader.checkpoint",
    "CheckpointError": "s3loader.errors",
    "CheckpointManager": "s3loader.checkpoint",
    "CheckpointNotFoundError": "s3loader.errors",
    "CheckpointOptions": "s3loader.checkpoint",
    "ClosedError": "s3loader.errors",
    "Collate": "s3loader.loader",
    "CommitUnknownError": "s3loader.errors",
    "CommonPrefix": "s3loader.types",
    "CompactReport": "s3loader.exchange.types",
    "ConfigError": "s3loader.errors",
    "ConflictError": "s3loader.errors",
    "Credentials": "s3loader.credentials",
    "CredentialsError": "s3loader.errors",
    "Dataset": "s3loader.loader",
    "Decode": "s3loader.loader",
    "DeleteFailure": "s3loader.types",
    "DeleteReport": "s3loader.exchange.types",
    "EveryNSteps": "s3loader.checkpoint",
    "ExchangeObjectNotFoundError": "s3loader.exchange.errors",
    "Explanation": "s3loader.plan",
    "FencedError": "s3loader.errors",
    "FileEntry": "s3loader.exchange.types",
    "FormatError": "s3loader.errors",
    "GCReport": "s3loader.checkpoint",
    "GrainSource": "s3loader.loader",
    "Group": "s3loader.loader",
    "IncompleteCheckpointError": "s3loader.errors",
    "IntegrityError": "s3loader.errors",
    "InvalidManifestError": "s3loader.errors",
    "KeepPolicy": "s3loader.checkpoint",
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
    "Mixture": "s3loader.loader",
    "MultipartWriter": "s3loader.store.multipart",
    "NoSpaceError": "s3loader.errors",
    "ObjectChangedError": "s3loader.errors",
    "ObjectExistsError": "s3loader.errors",
    "ObjectMeta": "s3loader.types",
    "ObjectNotFoundError": "s3loader.errors",
    "ObjectStore": "s3loader.store",
    "ObjectURL": "s3loader.types",
    "OpEvent": "s3loader.events",
    "OpenCheckpoint": "s3loader.checkpoint",
    "OrderSpec": "s3loader.plan",
    "OutcomeUnknownError": "s3loader.errors",
    "PerRank": "s3loader.checkpoint",
    "Place": "s3loader.loader",
    "Plan": "s3loader.plan",
    "PlanError": "s3loader.errors",
    "PreconditionFailedError": "s3loader.errors",
    "Preemption": "s3loader.checkpoint",
    "PutFailure": "s3loader.store.bulk",
    "PutRequest": "s3loader.types",
    "PutResult": "s3loader.types",
    "Quarantine": "s3loader.loader",
    "Quarantined": "s3loader.loader",
    "Ragged": "s3loader.loader",
    "RangeError": "s3loader.errors",
    "ReadFailure": "s3loader.store.bulk",
    "ReadRequest": "s3loader.types",
    "ReadResult": "s3loader.store.base",
    "S3ExchangeError": "s3loader.errors",
    "S3ExchangeStore": "s3loader.exchange.store",
    "S3LoaderError": "s3loader.errors",
    "S3Settings": "s3loader.config",
    "SampleError": "s3loader.errors",
    "SampleReader": "s3loader.loader",
    "SaveHandle": "s3loader.checkpoint",
    "SaveResult": "s3loader.checkpoint",
    "ScopedStore": "s3loader.exchange.scope",
    "Shard": "s3loader.exchange.shard",
    "ShardEntry": "s3loader.exchange.types",
    "ShardIndex": "s3loader.shard.index",
    "ShardItem": "s3loader.exchange.types",
    "ShardReadError": "s3loader.errors",
    "ShardReader": "s3loader.shard.reader",
    "ShardSizePolicy": "s3loader.exchange.types",
    "SourceNotFoundError": "s3loader.errors",
    "StateMismatchError": "s3loader.errors",
    "StepExistsError": "s3loader.errors",
    "StepInfo": "s3loader.checkpoint",
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
    "WriterProgress": "s3loader.exchange.writer_config",
    "build_index": "s3loader.shard.build",
    "collate_fixed": "s3loader.loader",
    "collate_ragged": "s3loader.loader",
    "create_shards": "s3loader.exchange.items",
    "extract": "s3loader.shard.extract",
    "from_manifest": "s3loader.loader",
    "from_mds": "s3loader.loader",
    "from_objects": "s3loader.loader",
    "from_prefix": "s3loader.loader",
    "from_webdataset": "s3loader.loader",
    "infer_id_from_key": "s3loader.exchange.keys",
    "mix_datasets": "s3loader.loader",
    "normalize_key": "s3loader.exchange.keys",
    "open_checkpoint": "s3loader.checkpoint",
    "open_dataset": "s3loader.loader",
    "open_store": "s3loader.store",
    "read_quarantine": "s3loader.loader",
    "register_decoder": "s3loader.loader",
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
