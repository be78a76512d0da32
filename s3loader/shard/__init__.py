"""Shards: tar archives with an index, read and written one member at a time."""

from s3loader.shard.body import ArchiveMemberBody, ObjectBody
from s3loader.shard.build import BuiltIndex, build_index, index_archive
from s3loader.shard.index import INTERNAL_MANIFEST, WEBDATASET_MANIFEST, ShardIndex, index_key, load_index
from s3loader.shard.parquet import decode_row_group, index_parquet
from s3loader.shard.reader import Member, ShardReader, extract, list_archive
from s3loader.shard.samples import LeftOut, sample_key
from s3loader.shard.tar import TarMember, walk
from s3loader.shard.tfrecord import dali_index, index_tfrecord, parse_dali_index
from s3loader.shard.upload import ShardUpload
from s3loader.shard.writer import BuiltShard, ShardBuilder

__all__ = [
    "INTERNAL_MANIFEST",
    "WEBDATASET_MANIFEST",
    "ArchiveMemberBody",
    "BuiltIndex",
    "BuiltShard",
    "LeftOut",
    "Member",
    "ObjectBody",
    "ShardBuilder",
    "ShardIndex",
    "ShardReader",
    "ShardUpload",
    "TarMember",
    "build_index",
    "dali_index",
    "decode_row_group",
    "extract",
    "index_archive",
    "index_key",
    "index_parquet",
    "index_tfrecord",
    "list_archive",
    "load_index",
    "parse_dali_index",
    "sample_key",
    "walk",
]
