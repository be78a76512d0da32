"""Functions on URLs: ``from s3loader import s3``, then ``s3.get("s3://bucket/key")``.

They take ``s3://``, ``gs://``, ``az://``, ``file://`` (or a path) and ``memory://`` alike; every character of a URL is meant as
it stands, patterns are given as ``glob=`` or ``regex=``. Each has a twin whose name ends in ``_async``. Connections are kept: a
call costs its request and no more. `configure` sets how stores are reached in this process, `close` lets go of connections.
"""

from __future__ import annotations

from s3loader.toolbox.many import ProcessStats as ProcessStats
from s3loader.toolbox.many import delete as delete
from s3loader.toolbox.many import get_many as get_many
from s3loader.toolbox.many import get_many_stats as get_many_stats
from s3loader.toolbox.many import list as list  # noqa: A004 - the field's word
from s3loader.toolbox.many import mp_get as mp_get
from s3loader.toolbox.many import put_many as put_many
from s3loader.toolbox.many import stat_many as stat_many
from s3loader.toolbox.single import create_bucket as create_bucket
from s3loader.toolbox.single import delete_bucket as delete_bucket
from s3loader.toolbox.single import exists as exists
from s3loader.toolbox.single import get as get
from s3loader.toolbox.single import get_into as get_into
from s3loader.toolbox.single import get_range as get_range
from s3loader.toolbox.single import list_buckets as list_buckets
from s3loader.toolbox.single import put as put
from s3loader.toolbox.single import put_bytes as put_bytes
from s3loader.toolbox.single import read_npz as read_npz
from s3loader.toolbox.single import stat as stat
from s3loader.toolbox.stores import close as close
from s3loader.toolbox.stores import configure as configure
from s3loader.toolbox.transfer import OnExists as OnExists
from s3loader.toolbox.transfer import TransferReport as TransferReport
from s3loader.toolbox.transfer import copy as copy
from s3loader.toolbox.transfer import download as download
from s3loader.toolbox.transfer import sync as sync
from s3loader.toolbox.transfer import upload as upload
from s3loader.toolbox.twins import twin as _twin
from s3loader.toolbox.writer import AsyncMultipartUploadWriter as AsyncMultipartUploadWriter
from s3loader.toolbox.writer import MultipartUploadWriter as MultipartUploadWriter

__all__ = [
    "AsyncMultipartUploadWriter",
    "MultipartUploadWriter",
    "OnExists",
    "ProcessStats",
    "TransferReport",
    "close",
    "configure",
    "copy",
    "copy_async",
    "create_bucket",
    "create_bucket_async",
    "delete",
    "delete_async",
    "delete_bucket",
    "delete_bucket_async",
    "download",
    "download_async",
    "exists",
    "exists_async",
    "get",
    "get_async",
    "get_into",
    "get_into_async",
    "get_many",
    "get_many_async",
    "get_many_stats",
    "get_many_stats_async",
    "get_range",
    "get_range_async",
    "list",
    "list_async",
    "list_buckets",
    "list_buckets_async",
    "mp_get",
    "mp_get_async",
    "put",
    "put_async",
    "put_bytes",
    "put_bytes_async",
    "put_many",
    "put_many_async",
    "read_npz",
    "read_npz_async",
    "stat",
    "stat_async",
    "stat_many",
    "stat_many_async",
    "sync",
    "sync_async",
    "upload",
    "upload_async",
]

copy_async = _twin(copy)
create_bucket_async = _twin(create_bucket)
delete_async = _twin(delete)
delete_bucket_async = _twin(delete_bucket)
download_async = _twin(download)
exists_async = _twin(exists)
get_async = _twin(get)
get_into_async = _twin(get_into)
get_many_async = _twin(get_many)
get_many_stats_async = _twin(get_many_stats)
get_range_async = _twin(get_range)
list_async = _twin(list)
list_buckets_async = _twin(list_buckets)
mp_get_async = _twin(mp_get)
put_async = _twin(put)
put_bytes_async = _twin(put_bytes)
put_many_async = _twin(put_many)
read_npz_async = _twin(read_npz)
stat_async = _twin(stat)
stat_many_async = _twin(stat_many)
sync_async = _twin(sync)
upload_async = _twin(upload)
