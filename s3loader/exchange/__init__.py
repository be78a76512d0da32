"""Exchange: manifests, virtual keys and the store that reads and writes them (the s3exchange interface)."""

from s3loader.errors import (
    ExchangeObjectNotFoundError,
    ManifestNotFoundError,
    MissingPlaceholderError,
    WriterClosedError,
    WriterStateError,
)
from s3loader.exchange.append import append_entries
from s3loader.exchange.commit import publish_manifest
from s3loader.exchange.keys import infer_id_from_key, normalize_key, resolve_template
from s3loader.exchange.lines import encode_manifest, parse_line, serialize_entry
from s3loader.exchange.pack import create_shards
from s3loader.exchange.reading import iter_manifest
from s3loader.exchange.store import S3ExchangeStore
from s3loader.exchange.types import (
    CompactReport,
    DeleteReport,
    FileEntry,
    ManifestEntry,
    ManifestRef,
    ManifestRefEntry,
    ManifestWriterConfig,
    ShardEntry,
    ShardItem,
    ShardSizePolicy,
    StreamingBodyLike,
    WriterKeywords,
    WriterProgress,
)
from s3loader.exchange.views import Manifest, ScopedStore, Shard
from s3loader.exchange.writer import ManifestWriter

__all__ = [
    "CompactReport",
    "DeleteReport",
    "ExchangeObjectNotFoundError",
    "FileEntry",
    "Manifest",
    "ManifestEntry",
    "ManifestNotFoundError",
    "ManifestRef",
    "ManifestRefEntry",
    "ManifestWriter",
    "ManifestWriterConfig",
    "MissingPlaceholderError",
    "S3ExchangeStore",
    "ScopedStore",
    "Shard",
    "ShardEntry",
    "ShardItem",
    "ShardSizePolicy",
    "StreamingBodyLike",
    "WriterClosedError",
    "WriterKeywords",
    "WriterProgress",
    "WriterStateError",
    "append_entries",
    "create_shards",
    "encode_manifest",
    "infer_id_from_key",
    "iter_manifest",
    "normalize_key",
    "parse_line",
    "publish_manifest",
    "resolve_template",
    "serialize_entry",
]
