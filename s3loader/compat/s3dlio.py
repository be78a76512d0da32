"""s3dlio's Python interface: ``from s3loader.compat import s3dlio as s3`` in place of ``import s3dlio as s3``.

The names and signatures are those of s3dlio 0.4.6 and 0.10. Errors are those of `s3loader.errors`. What was a defect there is
none here: objects differ, duplicates keep their places, a delete of a plain name takes that object alone.
"""

from __future__ import annotations

import builtins
import importlib
import logging
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from s3loader.datagen import Generator as _Source
from s3loader.datagen import generate_npz
from s3loader.errors import ConfigError, IntegrityError, ObjectNotFoundError, S3LoaderError, UnsupportedOperationError
from s3loader.oplog import finalize_op_log, init_op_log, is_op_log_active, op_log_stats
from s3loader.shard import dali_index, index_tfrecord, parse_dali_index
from s3loader.shard.tfrecord import RECORD_OVERHEAD, read_records
from s3loader.toolbox import many, single, stores, transfer
from s3loader.toolbox.generated import DEFAULT_OBJECT_SIZE, put_generated
from s3loader.toolbox.selecting import select
from s3loader.toolbox.twins import twin
from s3loader.toolbox.writer import MultipartUploadWriter
from s3loader.types import SCHEMES, ObjectURL
from s3loader.units import MIB

if TYPE_CHECKING:
    from s3loader.compat.s3dlio_checkpoints import PyCheckpointInfo as PyCheckpointInfo
    from s3loader.compat.s3dlio_checkpoints import PyCheckpointReader as PyCheckpointReader
    from s3loader.compat.s3dlio_checkpoints import PyCheckpointStore as PyCheckpointStore
    from s3loader.compat.s3dlio_checkpoints import PyCheckpointStream as PyCheckpointStream
    from s3loader.compat.s3dlio_checkpoints import PyCheckpointWriter as PyCheckpointWriter
    from s3loader.compat.s3dlio_checkpoints import finalize_distributed_checkpoint as finalize_distributed_checkpoint
    from s3loader.compat.s3dlio_checkpoints import load_checkpoint as load_checkpoint
    from s3loader.compat.s3dlio_checkpoints import load_checkpoint_with_validation as load_checkpoint_with_validation
    from s3loader.compat.s3dlio_checkpoints import save_checkpoint as save_checkpoint
    from s3loader.compat.s3dlio_checkpoints import save_distributed_shard as save_distributed_shard
    from s3loader.compat.s3dlio_datasets import PyAsyncDataLoader as PyAsyncDataLoader
    from s3loader.compat.s3dlio_datasets import PyBytesAsyncDataLoader as PyBytesAsyncDataLoader
    from s3loader.compat.s3dlio_datasets import PyDataset as PyDataset
    from s3loader.compat.s3dlio_datasets import PyObjectItem as PyObjectItem
    from s3loader.compat.s3dlio_datasets import PyS3AsyncDataLoader as PyS3AsyncDataLoader
    from s3loader.compat.s3dlio_datasets import PyS3Dataset as PyS3Dataset
    from s3loader.compat.s3dlio_datasets import PyVecDataset as PyVecDataset
    from s3loader.compat.s3dlio_datasets import create_async_loader as create_async_loader
    from s3loader.compat.s3dlio_datasets import create_dataset as create_dataset
    from s3loader.compat.s3dlio_endpoints import MultiEndpointStore as MultiEndpointStore
    from s3loader.compat.s3dlio_endpoints import create_multi_endpoint_store as create_multi_endpoint_store
    from s3loader.compat.s3dlio_endpoints import create_multi_endpoint_store_from_env as create_multi_endpoint_store_from_env
    from s3loader.compat.s3dlio_endpoints import create_multi_endpoint_store_from_file as create_multi_endpoint_store_from_file
    from s3loader.compat.s3dlio_endpoints import (
        create_multi_endpoint_store_from_template as create_multi_endpoint_store_from_template,
    )
    from s3loader.compat.s3dlio_loaders import JaxIterable as JaxIterable
    from s3loader.compat.s3dlio_loaders import S3JaxIterable as S3JaxIterable
    from s3loader.compat.s3dlio_loaders import make_tf_dataset as make_tf_dataset
    from s3loader.compat.s3dlio_torch import ObjectStoreIterableDataset as ObjectStoreIterableDataset
    from s3loader.compat.s3dlio_torch import ObjectStoreMapDataset as ObjectStoreMapDataset
    from s3loader.compat.s3dlio_torch import S3IterableDataset as S3IterableDataset
    from s3loader.compat.s3dlio_torch import S3MapDataset as S3MapDataset
    from s3loader.compat.s3dlio_writers import PyObjectWriter as PyObjectWriter
    from s3loader.compat.s3dlio_writers import PyWriterOptions as PyWriterOptions
    from s3loader.compat.s3dlio_writers import create_s3_writer as create_s3_writer

__all__ = [
    "DEFAULT_OBJECT_SIZE",
    "ExportStillReferencedError",
    "Generator",
    "JaxIterable",
    "LengthMismatchError",
    "MultiEndpointStore",
    "MultipartUploadWriter",
    "ObjectMetadata",
    "ObjectNotFoundError",
    "ObjectStoreIterableDataset",
    "ObjectStoreMapDataset",
    "PyAsyncDataLoader",
    "PyBytesAsyncDataLoader",
    "PyCheckpointInfo",
    "PyCheckpointReader",
    "PyCheckpointStore",
    "PyCheckpointStream",
    "PyCheckpointWriter",
    "PyDataset",
    "PyObjectItem",
    "PyObjectWriter",
    "PyS3AsyncDataLoader",
    "PyS3Dataset",
    "PyVecDataset",
    "PyWriterOptions",
    "ReservedBuffer",
    "S3IterableDataset",
    "S3JaxIterable",
    "S3MapDataset",
    "UnsupportedOperationError",
    "configure_s3",
    "create_async_loader",
    "create_bucket",
    "create_dataset",
    "create_multi_endpoint_store",
    "create_multi_endpoint_store_from_env",
    "create_multi_endpoint_store_from_file",
    "create_multi_endpoint_store_from_template",
    "create_s3_writer",
    "create_tfrecord_index",
    "delete",
    "delete_bucket",
    "download",
    "exists",
    "exists_async",
    "finalize_distributed_checkpoint",
    "finalize_op_log",
    "generate_data",
    "generate_data_with_threads",
    "generate_into_buffer",
    "generate_npz_bytes",
    "get",
    "get_async",
    "get_by_key",
    "get_into_async",
    "get_many",
    "get_many_async",
    "get_many_stats",
    "get_many_stats_async",
    "get_object",
    "get_range",
    "get_range_async",
    "get_tfrecord_index_entries",
    "head_async",
    "index_tfrecord_bytes",
    "init_logging",
    "init_op_log",
    "is_op_log_active",
    "list",
    "list_containers",
    "list_full_uris",
    "list_keys",
    "list_keys_from_s3",
    "list_objects",
    "list_uris",
    "load_checkpoint",
    "load_checkpoint_with_validation",
    "make_tf_dataset",
    "mkdir",
    "mkdir_async",
    "mp_get",
    "object_capabilities",
    "op_log_stats",
    "put",
    "put_async",
    "put_bytes",
    "put_bytes_async",
    "put_many",
    "put_many_async",
    "py_default_data_gen_threads",
    "py_total_cpus",
    "read_npz",
    "read_tfrecord_index",
    "save_checkpoint",
    "save_distributed_shard",
    "stat",
    "stat_async",
    "stat_key",
    "stat_many_async",
    "stat_object",
    "upload",
]

_LAZY: Final = {
    "JaxIterable": "s3dlio_loaders",
    "MultiEndpointStore": "s3dlio_endpoints",
    "ObjectStoreIterableDataset": "s3dlio_torch",
    "ObjectStoreMapDataset": "s3dlio_torch",
    "PyAsyncDataLoader": "s3dlio_datasets",
    "PyBytesAsyncDataLoader": "s3dlio_datasets",
    "PyCheckpointInfo": "s3dlio_checkpoints",
    "PyCheckpointReader": "s3dlio_checkpoints",
    "PyCheckpointStore": "s3dlio_checkpoints",
    "PyCheckpointStream": "s3dlio_checkpoints",
    "PyCheckpointWriter": "s3dlio_checkpoints",
    "PyDataset": "s3dlio_datasets",
    "PyObjectItem": "s3dlio_datasets",
    "PyObjectWriter": "s3dlio_writers",
    "PyS3AsyncDataLoader": "s3dlio_datasets",
    "PyS3Dataset": "s3dlio_datasets",
    "PyVecDataset": "s3dlio_datasets",
    "PyWriterOptions": "s3dlio_writers",
    "S3IterableDataset": "s3dlio_torch",
    "S3JaxIterable": "s3dlio_loaders",
    "S3MapDataset": "s3dlio_torch",
    "create_async_loader": "s3dlio_datasets",
    "create_dataset": "s3dlio_datasets",
    "create_multi_endpoint_store": "s3dlio_endpoints",
    "create_multi_endpoint_store_from_env": "s3dlio_endpoints",
    "create_multi_endpoint_store_from_file": "s3dlio_endpoints",
    "create_multi_endpoint_store_from_template": "s3dlio_endpoints",
    "create_s3_writer": "s3dlio_writers",
    "finalize_distributed_checkpoint": "s3dlio_checkpoints",
    "load_checkpoint": "s3dlio_checkpoints",
    "load_checkpoint_with_validation": "s3dlio_checkpoints",
    "make_tf_dataset": "s3dlio_loaders",
    "save_checkpoint": "s3dlio_checkpoints",
    "save_distributed_shard": "s3dlio_checkpoints",
}

_REGEX: Final = re.compile(r"[*+?^$|(){}\[\]\\]")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"s3loader.compat.{_LAZY[name]}"), name)


# -- settings and logs ----------------------------------------------------------------------------


def init_logging(level: str) -> None:
    """Log at ``trace``, ``debug``, ``warn`` or ``error``; anything else is ``info``."""
    known = {"trace": logging.DEBUG, "debug": logging.DEBUG, "warn": logging.WARNING, "error": logging.ERROR}
    logging.basicConfig()
    logging.getLogger("s3loader").setLevel(known.get(level.lower(), logging.INFO))


def configure_s3(endpoint_url: str | None = None, region: str | None = None, ca_bundle: str | None = None) -> None:
    """How S3 is reached from now on; what is None stays."""
    given = {"endpoint_url": endpoint_url, "region": region, "ca_bundle": ca_bundle}
    stores.configure(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


# -- buckets --------------------------------------------------------------------------------------


def create_bucket(bucket_name: str) -> None:
    """Make a bucket; one of yours that is there is fine."""
    single.create_bucket(bucket_name.removesuffix("/"))


def delete_bucket(bucket_name: str) -> None:
    """Delete an empty bucket."""
    single.delete_bucket(bucket_name.removesuffix("/"))


def list_containers(uri: str) -> builtins.list[str]:
    """URLs of the buckets."""
    return single.list_buckets(uri)


def mkdir(uri: str) -> None:
    """Make a local folder; where folders are only names, nothing is to be done."""
    where = ObjectURL.parse(uri)
    if where.scheme == "file":
        os.makedirs(where.key, exist_ok=True)


mkdir_async = twin(mkdir)

# -- writing --------------------------------------------------------------------------------------


_CHUNK_SIZE: Final = 262144
"""Of `put`, where none is given."""


def put(
    prefix: str,
    num: int,
    template: str | None = None,
    max_in_flight: int = 64,
    size: int | None = None,
    should_create_bucket: bool = False,
    object_type: str = "zeros",
    dedup_factor: int = 1,
    compress_factor: int = 1,
    data_gen_algorithm: str = "random",
    data_gen_mode: str = "streaming",
    chunk_size: int = _CHUNK_SIZE,
) -> None:
    """Write `num` objects of made-up data below `prefix`.

    `object_type` is RAW, NPZ, TFRECORD, HDF5 or PARQUET; anything else is RAW. `data_gen_mode` ``"single-pass"`` makes each
    object whole before it is sent; ``"streaming"`` (and any other word, as there) makes it while it is sent, `chunk_size` bytes
    at a time, where that pays: from 64 MiB on, or where a `chunk_size` is given. The bytes are the same. `data_gen_algorithm`
    means nothing here, and a warning says so.
    """
    if data_gen_algorithm != "random":
        why = "one generator makes all data"
        warnings.warn(
            f"s3dlio's data_gen_algorithm={data_gen_algorithm!r} means nothing here: {why}", UserWarning, stacklevel=2
        )
    whole = data_gen_mode.lower().replace("_", "-") in ("single-pass", "singlepass")
    if not whole and data_gen_mode.lower() != "streaming":
        warnings.warn(f"data_gen_mode={data_gen_mode!r} is taken for 'streaming', as s3dlio does", UserWarning, stacklevel=2)
    given = chunk_size not in (0, _CHUNK_SIZE)
    kind = object_type.lower() if object_type.lower() in ("npz", "tfrecord", "hdf5", "parquet") else "raw"
    put_generated(
        prefix,
        num,
        "object_{}_of_{}.dat" if template is None else template,
        size=DEFAULT_OBJECT_SIZE if size is None else size,
        object_type=kind,
        dedup=dedup_factor,
        compress=compress_factor,
        max_in_flight=max_in_flight,
        create_bucket=should_create_bucket,
        mode="single-pass" if whole else "streaming" if given else None,
        chunk_size=chunk_size if given else 8 * MIB,
    )


put_async = twin(put)


def put_bytes(uri: str, data: Any) -> None:
    """Write one object."""
    single.put_bytes(uri, data)


async def put_bytes_async(uri: str, data: Any, *, borrow: bool = True) -> None:
    """As `put_bytes`; `borrow` or not, nothing is copied and `data` must not change meanwhile."""
    del borrow
    await twin(put_bytes)(uri, data)


def put_many(items: Iterable[tuple[str, Any]], max_in_flight: int = 64) -> None:
    """Write ``(uri, data)`` pairs."""
    many.put_many(items, max_in_flight)


async def put_many_async(items: Iterable[tuple[str, Any]], max_in_flight: int = 64, *, borrow: bool = True) -> None:
    """As `put_many`; `borrow` as in `put_bytes_async`."""
    del borrow
    await twin(put_many)(items, max_in_flight)


ReservedBuffer = bytearray
"""What owns the memory that `MultipartUploadWriter.reserve` lends, and keeps it while a view of it is left: ``view.obj``."""


class ExportStillReferencedError(S3LoaderError, RuntimeError):
    """There for ``except``, and never raised: a write returns when nothing reads the caller's buffer any more."""


# -- listing --------------------------------------------------------------------------------------


def _pattern(uri: str, pattern: str | None = None) -> tuple[str, str | None]:
    """The folder, and the regular expression that the last component of a URI is there."""
    if pattern is not None:
        return uri, pattern
    folder, slash, last = uri.rpartition("/")
    if not last or "://" not in folder + slash or (folder + slash).endswith("://"):
        return uri, None
    return folder + slash, last


def list(uri: str, recursive: bool = False, pattern: str | None = None) -> builtins.list[str]:  # noqa: A001
    """Keys, sorted, without scheme and bucket; those of folders end with a slash.

    The last component of `uri` is a regular expression, found anywhere in a name, as `pattern` is.
    """
    folder, regex = _pattern(uri, pattern)
    return [found.key for found in select(folder, {}, recursive=recursive, regex=regex)]


def list_objects(bucket: str, prefix: str, recursive: bool = False) -> builtins.list[str]:
    """As `list`, of a bucket and prefix."""
    return list(f"s3://{bucket}/{prefix}", recursive)


def list_full_uris(uri: str) -> builtins.list[str]:
    """As `list` of all below, as URIs."""
    folder, regex = _pattern(uri)
    return [found.url for found in select(folder, {}, recursive=True, regex=regex)]


def list_keys(uri: str) -> builtins.list[str]:
    """As `list` of all below."""
    return list(uri, True)


list_uris = list_full_uris
list_keys_from_s3 = list_keys

# -- looking --------------------------------------------------------------------------------------


def stat(uri: str) -> dict[str, Any]:
    """The 16 facts of one object; the ETag with its quotes."""
    return _quoted(single.stat(uri))


def _quoted(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "etag": f'"{found["etag"]}"' if found["etag"] else None}


stat_async = twin(stat)
stat_object = stat


async def stat_many_async(uris: Iterable[str]) -> builtins.list[dict[str, Any]]:
    """As `stat`, of many, in order."""
    return [_quoted(found) for found in await twin(many.stat_many)(uris)]


def stat_key(bucket: str, key: str) -> dict[str, Any]:
    """As `stat`, of a bucket and key."""
    return stat(f"s3://{bucket}/{key}")


class ObjectMetadata(NamedTuple):
    """What `head_async` tells."""

    size: int
    etag: str | None
    version_id: str | None


async def head_async(uri: str) -> ObjectMetadata | None:
    """Size, ETag and version of one object; None where there is none."""
    try:
        found = await twin(single.stat)(uri)
    except ObjectNotFoundError:
        return None
    return ObjectMetadata(found["size"], found["etag"], found["version_id"])


def exists(uri: str) -> bool:
    """Whether there is such an object."""
    return single.exists(uri)


exists_async = twin(exists)


def object_capabilities(uri: str) -> dict[str, Any]:
    """``provider`` (``s3 az gs file memory``, or ``unknown``), and whether ``get_into`` and ``head`` work there: wherever a
    store can be opened.

    Told from the scheme, without a request; `s3loader.ObjectStore.capabilities` tries what a store really does.

    Raises:
        ConfigError: the URI is malformed (a ValueError, too).
    """
    scheme = uri.partition("://")[0].lower() if "://" in uri else "file"
    if scheme not in SCHEMES:
        return {"provider": "unknown", "get_into": False, "head": False}
    stores.split_object(uri)
    return {"provider": scheme, "get_into": True, "head": True}


# -- reading --------------------------------------------------------------------------------------


def get(uri: str) -> bytes:
    """The whole object."""
    return single.get(uri)


get_async = twin(get)


def get_object(uri_or_bucket: str, key: str | None = None, offset: int | None = None, length: int | None = None) -> bytes:
    """An object by URI, or by bucket and key; or some bytes of it, and only those are read."""
    uri = uri_or_bucket if key is None else f"s3://{uri_or_bucket}/{key}"
    return single.get(uri) if offset is None and length is None else single.get_range(uri, offset or 0, length)


def get_by_key(bucket: str, key: str) -> bytes:
    """The object of a bucket and key."""
    return single.get(f"s3://{bucket}/{key}")


def get_range(uri: str, offset: int, length: int | None = None) -> bytes:
    """Some bytes of an object."""
    return single.get_range(uri, offset, length)


get_range_async = twin(get_range)


class LengthMismatchError(IntegrityError, ValueError):
    """An object is not as long as was expected; `.expected` and `.actual` say how long, in bytes."""


async def get_into_async(uri: str, dst: Any, *, expected_len: int) -> int:
    """Fill `dst` with the object; returns its length.

    Raises:
        LengthMismatchError: the object has not `expected_len` bytes.
        ConfigError: `dst` has less room.
    """
    view = memoryview(dst).cast("B")
    if len(view) < expected_len:
        raise ConfigError(f"room for {len(view)} bytes of {expected_len}", hint="give a larger buffer")
    meta = await twin(single.get_into)(uri, view[:expected_len])
    if meta.size != expected_len:
        raise LengthMismatchError(
            f"it has {meta.size} bytes, not {expected_len}",
            op="get",
            url=uri,
            hint="look at its size first",
            expected=expected_len,
            actual=meta.size,
        )
    return meta.size


def get_many(uris: Iterable[str], max_in_flight: int = 64) -> builtins.list[tuple[str, bytes]]:
    """``(uri, bytes)`` of each, in order, duplicates kept."""
    return many.get_many(uris, max_in_flight)


get_many_async = twin(get_many)


def get_many_stats(uris: Iterable[str], max_in_flight: int = 64) -> tuple[int, int]:
    """How many, and how many bytes; nothing is kept."""
    return many.get_many_stats(uris, max_in_flight)


get_many_stats_async = twin(get_many_stats)


def mp_get(uri: str, procs: int = 4, jobs: int = 64, num: int = 1000, template: str = "object_{}.dat") -> Mapping[str, Any]:
    """Read in several processes what is below `uri`, at most `num` objects; `template` is not needed to find them."""
    del template
    urls = list_full_uris(uri if uri.endswith("/") else f"{uri}/")[:num]
    return many.mp_get(urls, procs, jobs)._asdict()


def read_npz(uri: str, array_name: str | None = None) -> Any:
    """An array of an npz object, by default its first; of any shape and dtype."""
    found = single.read_npz(uri, array_name)
    return next(iter(found.values())) if isinstance(found, dict) else found


def create_tfrecord_index(tfrecord_path: str, index_path: str | None = None) -> int:
    """Write DALI's index of a plain TFRecord file, a line ``offset size`` for each record; returns how many there are.

    Without `index_path` it is the file's with ``.idx`` behind it, where our loaders keep indexes of their own: give another one
    for a file that they read, too.
    """
    index_path = f"{tfrecord_path}.idx" if index_path is None else index_path
    store, key = stores.object_at(tfrecord_path, {})
    index = index_tfrecord(store, key)
    single.put_bytes(index_path, dali_index(index).encode())
    return len(index)


def get_tfrecord_index_entries(tfrecord_bytes: Any) -> builtins.list[tuple[int, int]]:
    """As `read_tfrecord_index`, of the file itself; records are held against their checksums."""
    sizes = [len(data) + RECORD_OVERHEAD for data in read_records(iter([bytes(tfrecord_bytes)]), "the TFRecord file")]
    return builtins.list(zip(accumulate([0, *sizes]), sizes, strict=False))


def index_tfrecord_bytes(tfrecord_bytes: Any) -> str:
    """DALI's index of the file itself."""
    return "".join(f"{offset} {size}\n" for offset, size in get_tfrecord_index_entries(tfrecord_bytes))


def read_tfrecord_index(index_path: str) -> builtins.list[tuple[int, int]]:
    """(offset, bytes) of each record, with its length and checksums, from what `create_tfrecord_index` or DALI wrote."""
    return parse_dali_index(single.get(index_path).decode("ascii", "replace"))


# -- deleting and files ---------------------------------------------------------------------------


def delete(uri: str, recursive: bool = False) -> None:
    """Delete one object; with a slash at the end all of a folder, with a regular expression in the last component what matches.

    That there is nothing is no error.
    """
    folder, regex = _pattern(uri)
    if regex is not None and not _REGEX.search(regex):
        many.delete(uri, recursive, missing_ok=True)
        return
    found = select(folder, {}, recursive=recursive, regex=regex)
    many.delete_exactly([entry.url for entry in found if entry.meta is not None])


def upload(src_patterns: builtins.list[str], dest_prefix: str, max_in_flight: int = 32, create_bucket: bool = False) -> None:
    """Write files, by globs, below `dest_prefix`."""
    into = dest_prefix if dest_prefix.endswith("/") else f"{dest_prefix}/"
    transfer.upload(src_patterns, into, max_in_flight=max_in_flight, create_bucket=create_bucket)


def download(src_uri: str, dest_dir: str, max_in_flight: int = 64, recursive: bool = True) -> None:
    """Write objects as files in `dest_dir`, without their folders; two of one name are an error."""
    folder, regex = _pattern(src_uri)
    plain = regex is not None and not _REGEX.search(regex)
    transfer.download(
        src_uri if plain else folder,
        dest_dir,
        recursive=recursive,
        regex=None if plain else regex,
        flatten=True,
        max_in_flight=max_in_flight,
    )


# -- made-up data ---------------------------------------------------------------------------------


def generate_data(size: int, dedup: int = 1, compress: int = 1) -> memoryview:
    """`size` bytes of made-up data, other ones each time."""
    return _Source(size, seed=_fresh(), dedup=dedup, compress=compress).whole()


def generate_data_with_threads(size: int, dedup: int = 1, compress: int = 1, threads: int | None = None) -> memoryview:
    """As `generate_data`; one thread makes it faster than memory takes it, so `threads` means nothing here."""
    del threads
    return generate_data(size, dedup, compress)


def generate_into_buffer(buffer: Any, dedup: int = 1, compress: int = 1, threads: int | None = None) -> int:
    """Fill a buffer with made-up data; returns its length. `threads` as in `generate_data_with_threads`."""
    del threads
    view = memoryview(buffer).cast("B")
    return _Source(len(view), seed=_fresh(), dedup=dedup, compress=compress).fill(view)


def generate_npz_bytes(shape: Iterable[int], dtype: str = "<f4", num_samples: int = 1) -> bytes:
    """An npz file with one array ``x``, `num_samples` times `shape` where that is more than 1."""
    whole = tuple(shape) if num_samples == 1 else (num_samples, *shape)
    return bytes(generate_npz(whole, dtype, names=("x",), seed=_fresh()))


class Generator:
    """Made-up data in pieces: `fill_chunk` fills a buffer and says how much of it, 0 at the end."""

    def __init__(
        self,
        size: int,
        dedup: int = 1,
        compress: int = 1,
        threads: int | None = None,
        chunk_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        del threads
        self.chunk_size = chunk_size or 1 << 20
        self._size = size
        self._source = _Source(size, seed=_fresh() if seed is None else seed, dedup=dedup, compress=compress)
        self._at = 0

    def fill_chunk(self, buffer: Any) -> int:
        """Bytes written to the beginning of `buffer`."""
        room = memoryview(buffer).cast("B")[: self._size - self._at]
        if room:
            self._source.fill(room, self._at)
        self._at += len(room)
        return len(room)

    def is_complete(self) -> bool:
        """Whether all of it was given."""
        return self._at >= self._size

    def reset(self) -> None:
        """Begin again, with the same bytes."""
        self._at = 0


def _fresh() -> int:
    return int.from_bytes(os.urandom(7), "little")


def py_total_cpus() -> int:
    """CPUs of this machine."""
    return os.cpu_count() or 1


def py_default_data_gen_threads() -> int:
    """Threads that make data: always one."""
    return 1
