# Written by tests/test_exports.py from the table in __init__.py.
# ruff: noqa: I001
# fmt: off
from s3loader.checkpoint import (
    ArrayShard as ArrayShard, BestN as BestN, Checkpoint as Checkpoint, CheckpointManager as CheckpointManager,
    CheckpointOptions as CheckpointOptions, EveryNSteps as EveryNSteps, GCReport as GCReport, KeepPolicy as KeepPolicy,
    LatestN as LatestN, OpenCheckpoint as OpenCheckpoint, PerRank as PerRank, Preemption as Preemption, SaveHandle as
    SaveHandle, SaveResult as SaveResult, StepInfo as StepInfo, open_checkpoint as open_checkpoint
)
from s3loader.config import (
    S3Settings as S3Settings
)
from s3loader.credentials import (
    Credentials as Credentials
)
from s3loader.errors import (
    AccessDeniedError as AccessDeniedError, AuthenticationError as AuthenticationError, BucketNotFoundError as
    BucketNotFoundError, CacheFullError as CacheFullError, CheckpointError as CheckpointError, CheckpointNotFoundError as
    CheckpointNotFoundError, ClosedError as ClosedError, CommitUnknownError as CommitUnknownError, ConfigError as
    ConfigError, ConflictError as ConflictError, CredentialsError as CredentialsError, ExchangeObjectNotFoundError as
    ExchangeObjectNotFoundError, FencedError as FencedError, FormatError as FormatError, IncompleteCheckpointError as
    IncompleteCheckpointError, IntegrityError as IntegrityError, InvalidManifestError as InvalidManifestError,
    ManifestNotFoundError as ManifestNotFoundError, MissingPlaceholderError as MissingPlaceholderError, NoSpaceError as
    NoSpaceError, ObjectChangedError as ObjectChangedError, ObjectExistsError as ObjectExistsError, ObjectNotFoundError as
    ObjectNotFoundError, OutcomeUnknownError as OutcomeUnknownError, PartialFailureError as PartialFailureError, PlanError
    as PlanError, PreconditionFailedError as PreconditionFailedError, RangeError as RangeError, S3ExchangeError as
    S3ExchangeError, S3LoaderError as S3LoaderError, SampleError as SampleError, ShardReadError as ShardReadError,
    SourceNotFoundError as SourceNotFoundError, StateMismatchError as StateMismatchError, StepExistsError as
    StepExistsError, StoreConnectionError as StoreConnectionError, StoreError as StoreError, StoreTimeoutError as
    StoreTimeoutError, ThrottledError as ThrottledError, TruncatedError as TruncatedError, UnavailableError as
    UnavailableError, UnsupportedOperationError as UnsupportedOperationError, UnsupportedStateError as
    UnsupportedStateError, WorkerError as WorkerError
)
from s3loader.events import (
    OpEvent as OpEvent
)
from s3loader.exchange.keys import (
    infer_id_from_key as infer_id_from_key, normalize_key as normalize_key, resolve_template as resolve_template
)
from s3loader.exchange.pack import (
    create_shards as create_shards
)
from s3loader.exchange.store import (
    S3ExchangeStore as S3ExchangeStore
)
from s3loader.exchange.types import (
    CompactReport as CompactReport, DeleteReport as DeleteReport, FileEntry as FileEntry, ManifestEntry as ManifestEntry,
    ManifestRef as ManifestRef, ManifestRefEntry as ManifestRefEntry, ManifestWriterConfig as ManifestWriterConfig,
    ShardEntry as ShardEntry, ShardItem as ShardItem, ShardSizePolicy as ShardSizePolicy, StreamingBodyLike as
    StreamingBodyLike, WriterProgress as WriterProgress
)
from s3loader.exchange.views import (
    Manifest as Manifest, ScopedStore as ScopedStore, Shard as Shard
)
from s3loader.exchange.writer import (
    ManifestWriter as ManifestWriter
)
from s3loader.loader import (
    Batch as Batch, Collate as Collate, Dataset as Dataset, Decode as Decode, GrainSource as GrainSource, Group as Group,
    Loader as Loader, LoaderOptions as LoaderOptions, LoaderStats as LoaderStats, Mixture as Mixture, Place as Place,
    Quarantine as Quarantine, Quarantined as Quarantined, Ragged as Ragged, SampleReader as SampleReader, check_dataset as
    check_dataset, collate_fixed as collate_fixed, collate_ragged as collate_ragged, from_manifest as from_manifest,
    from_mds as from_mds, from_objects as from_objects, from_parquet as from_parquet, from_prefix as from_prefix,
    from_tfrecord as from_tfrecord, from_webdataset as from_webdataset, mix_datasets as mix_datasets, open_dataset as
    open_dataset, read_quarantine as read_quarantine, register_decoder as register_decoder
)
from s3loader.packing import (
    optimize as optimize, pack as pack
)
from s3loader.plan import (
    Explanation as Explanation, OrderSpec as OrderSpec, Plan as Plan
)
from s3loader.shard.body import (
    ArchiveMemberBody as ArchiveMemberBody
)
from s3loader.shard.build import (
    build_index as build_index
)
from s3loader.shard.index import (
    ShardIndex as ShardIndex
)
from s3loader.shard.parquet import (
    decode_row_group as decode_row_group
)
from s3loader.shard.reader import (
    ShardReader as ShardReader, extract as extract
)
from s3loader.store import (
    ObjectStore as ObjectStore, StoreOptions as StoreOptions, open_store as open_store
)
from s3loader.store.aio import (
    AsyncObjectStore as AsyncObjectStore
)
from s3loader.store.backend import (
    ReadResult as ReadResult
)
from s3loader.store.bulk import (
    PutFailure as PutFailure, ReadFailure as ReadFailure
)
from s3loader.store.parts import (
    MultipartWriter as MultipartWriter
)
from s3loader.types import (
    ByteRange as ByteRange, Capabilities as Capabilities, CommonPrefix as CommonPrefix, DeleteFailure as DeleteFailure,
    ObjectMeta as ObjectMeta, ObjectURL as ObjectURL, PutRequest as PutRequest, PutResult as PutResult, ReadRequest as
    ReadRequest, Update as Update
)

__version__: str
__all__: list[str]
_NAMES: dict[str, str]
