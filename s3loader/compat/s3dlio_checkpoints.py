"""s3dlio's checkpoints: one opaque byte string of each rank, in the layout that s3dlio 0.10 writes and reads.

::

    manifests/ckpt-{step}-{time}.json         what makes a checkpoint exist: names, sizes and checksums of its shards
    shards/ckpt-{step}-{time}/rank-{n}.bin    a shard; `.zst` behind it where it is compressed
    latest.json                               a hint for s3dlio's readers; ours list `manifests/`

Shards are stored first, each under a name that nothing else ever gets, then the manifest by one create-only put: a checkpoint
is there whole or not at all. The newest is the one that was saved last, whatever its step. Both directions work: s3dlio reads
what this writes, and this reads what s3dlio wrote.

Differences: `user_meta` is kept; a second save of a step does not write over the first; a late finisher never takes
`latest.json` back; every read is held against size and checksum. Shards whose job died before its manifest stay, as there.
"""

from __future__ import annotations

import datetime
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

from s3loader.checksum import crc32c
from s3loader.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    ConflictError,
    FormatError,
    IncompleteCheckpointError,
    IntegrityError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
)
from s3loader.exchange.commit import settled_mode
from s3loader.shard.compression import compressor, decompressor
from s3loader.store.arguments import readable
from s3loader.store.objectstore import ObjectStore
from s3loader.store.parts import MultipartWriter
from s3loader.toolbox.stores import root_of
from s3loader.types import Buffer, ObjectMeta, ObjectURL, PutMode, Update

__all__ = [
    "PyCheckpointInfo",
    "PyCheckpointReader",
    "PyCheckpointStore",
    "PyCheckpointStream",
    "PyCheckpointWriter",
    "finalize_distributed_checkpoint",
    "load_checkpoint",
    "load_checkpoint_with_validation",
    "save_checkpoint",
    "save_distributed_shard",
]

T = TypeVar("T")

_VERSION: Final = 1
_LATEST: Final = "latest.json"
_MANIFEST: Final = re.compile(r"manifests/ckpt-(\d+)-(\d{8}-\d{6})\.json")
_TIME: Final = "%Y%m%d-%H%M%S"
_STRATEGIES: Final = {"flat": "flat", "round_robin": "round_robin", "roundrobin": "round_robin", "binary": "binary"}
_TRIES: Final = 100
"""Seconds that a name is moved into the future at most, where all before it are taken."""


@dataclass(frozen=True, slots=True)
class PyCheckpointInfo:
    """What one manifest says of its checkpoint."""

    step: int
    epoch: int
    timestamp: str
    """``YYYYMMDD-HHMMSS``, UTC."""
    status: str
    framework: str
    world_size: int
    total_size: int
    """Bytes of all shards, as they are stored."""

    @property
    def size_mb(self) -> float:
        """`total_size` in MiB."""
        return self.total_size / (1 << 20)

    @property
    def size_gb(self) -> float:
        """`total_size` in GiB."""
        return self.total_size / (1 << 30)

    @property
    def is_complete(self) -> bool:
        """Whether its manifest says so; ours are never written before."""
        return self.status == "complete"

    @property
    def is_single_rank(self) -> bool:
        """Whether one rank saved it."""
        return self.world_size == 1


class _Name(NamedTuple):
    """A manifest's key, in the order of saving."""

    time: str
    step: int
    key: str


class _Folder:
    """The keys of one folder of checkpoints, and what is done to them."""

    def __init__(self, uri: str, strategy: str | None = None) -> None:
        named = _STRATEGIES.get((strategy or "flat").lower())
        if named is None:
            raise ConfigError(f"unknown strategy {strategy!r}", hint="flat, round_robin or binary")
        where = ObjectURL.parse(uri)
        self.store: ObjectStore = root_of(where, {})
        self.url = str(where).rstrip("/")
        self._prefix = "" if where.scheme == "file" or not where.key else where.key.rstrip("/") + "/"
        self._strategy = named

    def at(self, key: str) -> str:
        """The store's key of one of this folder."""
        return self._prefix + key

    def url_of(self, key: str) -> str:
        return f"{self.url}/{key}"

    # shards

    def shard_key(self, step: int, time: str, rank: int, compressed: bool) -> str:
        spread = {"flat": "", "round_robin": f"rr/{rank % 16:02x}/", "binary": f"bin/{rank >> 4 & 15:04b}/"}[self._strategy]
        return f"shards/{spread}ckpt-{step}-{time}/rank-{rank}.bin{'.zst' if compressed else ''}"

    def create(self, key_at: Callable[[str], str], after: str, put: Callable[[str, PutMode], T]) -> tuple[str, str, T]:
        """(time, key, answer) of a create-only put under the first time after `after` whose key is free."""
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        if after:
            now = max(now, _parsed_time(after) + datetime.timedelta(seconds=1))
        for later in range(_TRIES):
            time = (now + datetime.timedelta(seconds=later)).strftime(_TIME)
            key = key_at(time)
            try:
                return time, key, put(self.at(key), settled_mode(self.store, self.at(key), "create"))
            except ObjectExistsError:
                continue
        raise ConflictError(
            f"{_TRIES} names in a row were taken", op="save", url=self.url, hint="several jobs save the same steps"
        )

    # manifests

    def names(self) -> list[_Name]:
        """The manifests there are, oldest first."""
        found = []
        for meta in self.store.list(self.at("manifests/")):
            match = _MANIFEST.fullmatch(meta.key[len(self._prefix) :])
            if match is not None and isinstance(meta, ObjectMeta):
                found.append(_Name(match[2], int(match[1]), match[0]))
        return sorted(found)

    def manifest(self, key: str) -> dict[str, Any]:
        """A manifest, as it must be.

        Raises:
            CheckpointNotFoundError: there is none.
            FormatError: it is damaged, or of a later version.
        """
        try:
            data = self.store.get(self.at(key))
        except ObjectNotFoundError as error:
            raise CheckpointNotFoundError("there is no such checkpoint", op="load", url=self.url_of(key)) from error
        return _checked(data, self.url_of(key))

    def newest(self, names: list[_Name] | None = None) -> dict[str, Any] | None:
        """The manifest of the checkpoint that was saved last; None where there is none."""
        names = self.names() if names is None else names
        if not names:
            return None
        together = [self.manifest(name.key) for name in names if name.time == names[-1].time]
        return max(together, key=lambda found: str(found["wall_time"]))

    def publish(self, step: int, epoch: int, framework: str, shards: list[dict[str, Any]], user_meta: Any) -> str:
        """Have the checkpoint of `shards`; returns the key of its manifest."""
        names = self.names()
        found = {
            "format_version": _VERSION,
            "framework": framework,
            "global_step": step,
            "epoch": epoch,
            "wall_time": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000+00:00"),
            "world_size": len(shards),
            "shards": shards,
            "status": "complete",
            "user_meta": user_meta,
        }
        try:
            data = json.dumps(found, indent=2).encode()
        except (TypeError, ValueError) as error:
            raise ConfigError(f"user_meta is no JSON: {error}", hint="numbers, texts, lists and dicts") from error
        time, key, _ = self.create(
            lambda at: f"manifests/ckpt-{step}-{at}.json",
            names[-1].time if names else "",
            lambda at, mode: self.store.put(at, data, mode=mode, content_type="application/json"),
        )
        self.point_to(_Name(time, step, key))
        return key

    def point_to(self, name: _Name, *, back: bool = False) -> None:
        """Have `latest.json` name a checkpoint; not an older one than it names, unless `back`."""
        text = json.dumps({"manifest_key": name.key, "global_step": name.step, "ts": name.time}, indent=2).encode()
        for _ in range(_TRIES):
            try:
                now = self.store.head(self.at(_LATEST))
                named = str(_mapping(self.store.get(self.at(_LATEST))).get("ts") or "")
            except ObjectNotFoundError:
                now, named = None, ""
            if not back and named > name.time:
                return
            try:
                mode = settled_mode(self.store, self.at(_LATEST), "create" if now is None else Update(now.etag))
                self.store.put(self.at(_LATEST), text, mode=mode)
            except (ObjectExistsError, ObjectChangedError, ConflictError):
                continue  # another job has moved it: look again
            return

    def delete(self, step: int) -> bool:
        """Delete all checkpoints of a step; False where there is none."""
        names = self.names()
        gone = [name for name in names if name.step == step]
        if not gone:
            return False
        keys = {shard["key"] for name in gone for shard in self.manifest(name.key)["shards"]}
        left = [name for name in names if name.step != step]
        if left:
            self.point_to(left[-1], back=True)
        else:
            self.store.delete(self.at(_LATEST))
        for some in ([name.key for name in gone], sorted(keys)):  # what nobody can find any more is deleted last
            failures = self.store.delete_many([self.at(key) for key in some])
            if failures:
                raise failures[0].error
        return True

    # shards, read

    def read(self, manifest: Mapping[str, Any], rank: int) -> bytes:
        """The bytes that a rank has saved, as they were."""
        shard = next((shard for shard in manifest["shards"] if shard["rank"] == rank), None)
        if shard is None:
            raise CheckpointError(
                f"it has no rank {rank}", op="load", url=self.url, hint=f"ranks 0 to {manifest['world_size'] - 1} saved it"
            )
        url = self.url_of(shard["key"])
        try:
            stored = self.store.get(self.at(_inside(shard["key"], self.url)))
        except ObjectNotFoundError as error:
            raise IncompleteCheckpointError(f"the shard of rank {rank} is gone", op="load", url=url) from error
        return _verified(stored, shard, url)


# -- what users call -------------------------------------------------------------------------------


class PyCheckpointStore:
    """Checkpoints in a folder.

    Args:
        uri: The folder, of any scheme.
        strategy: How shards are spread over folders: ``"flat"`` (default), ``"round_robin"``, ``"binary"``.
        multipart_threshold: Means nothing here: large shards go up in parts.
        compression_level: Of zstd; None: shards are stored as they are.
    """

    def __init__(
        self,
        uri: str,
        strategy: str | None = None,
        multipart_threshold: int | None = None,
        compression_level: int | None = None,
    ) -> None:
        del multipart_threshold
        self._folder = _Folder(uri, strategy)
        self._level = compression_level

    def save(self, step: int, epoch: int, framework: str, data: Any, user_meta: Any = None) -> str:
        """Save the checkpoint of a job of one rank; returns the key of its manifest.

        Args:
            step: From 0.
            epoch: From 0.
            framework: A word for whoever reads it.
            data: Anything contiguous with the buffer protocol.
            user_meta: What JSON can hold.
        """
        writer = self.writer(1, 0)
        shard = writer.save_distributed_shard(step, epoch, framework, data)
        return writer.finalize_distributed_checkpoint(step, epoch, framework, [shard], user_meta)

    def load_latest(self) -> bytes | None:
        """What was saved last; None where nothing is.

        Raises:
            CheckpointError: several ranks saved it: `reader` reads those.
            IntegrityError: it is damaged.
        """
        manifest = self._folder.newest()
        if manifest is None:
            return None
        if manifest["world_size"] != 1:
            raise CheckpointError(
                f"{manifest['world_size']} ranks saved it",
                op="load",
                url=self._folder.url,
                hint="reader().read_shard_by_rank()",
            )
        return self._folder.read(manifest, 0)

    def list_checkpoints(self) -> list[PyCheckpointInfo]:
        """Those that are there, in order of their steps."""
        found = []
        for name in self._folder.names():
            manifest = self._folder.manifest(name.key)
            total = sum(shard["size"] for shard in manifest["shards"])
            found.append(
                PyCheckpointInfo(
                    step=name.step,
                    epoch=manifest["epoch"],
                    timestamp=name.time,
                    status=manifest["status"],
                    framework=manifest["framework"],
                    world_size=manifest["world_size"],
                    total_size=total,
                )
            )
        return sorted(found, key=lambda info: (info.step, info.timestamp))

    def delete_checkpoint(self, step: int) -> bool:
        """Delete the checkpoints of a step; False where there is none. First it cannot be found any more, then it goes."""
        return self._folder.delete(_natural(step, "step"))

    def writer(self, world_size: int, rank: int) -> PyCheckpointWriter:
        """What one of several ranks saves with."""
        return PyCheckpointWriter(self._folder, self._level, world_size, rank)

    def reader(self) -> PyCheckpointReader:
        """What reads the shards of several ranks."""
        return PyCheckpointReader(self._folder)


class PyCheckpointWriter:
    """Saves the shard of one rank; made by `PyCheckpointStore.writer`."""

    def __init__(self, folder: _Folder, level: int | None, world_size: int, rank: int) -> None:
        if not 0 <= _natural(rank, "rank") < _natural(world_size, "world_size"):
            raise ConfigError(f"rank {rank} of {world_size} does not exist", hint="from 0 to world_size - 1")
        self._folder = folder
        self._level = level
        self._world_size = world_size
        self._rank = rank

    def save_distributed_shard(self, step: int, epoch: int, framework: str, data: Any) -> dict[str, Any]:
        """Store this rank's bytes; returns what `finalize_distributed_checkpoint` has to be told of them."""
        del framework
        view = readable(data)
        packed: Buffer = view
        if self._level is not None:
            packer = compressor("zstd", self._level)
            packed = b"".join([*packer.write(view), *packer.finish()])
        time, key, answer = self._folder.create(
            self._key_at(step), "", lambda at, mode: self._folder.store.put(at, packed, mode=mode)
        )
        return _shard_meta(step, epoch, time, self._rank, key, len(packed), answer.etag, crc32c(view))

    def get_distributed_shard_stream(self, step: int, epoch: int, framework: str) -> PyCheckpointStream:
        """As `save_distributed_shard`, for data that comes in pieces."""
        del framework
        key_at = self._key_at(step)
        time, key, writer = self._folder.create(key_at, "", self._open)
        return PyCheckpointStream(writer, self._level, step, epoch, time, self._rank, key)

    def finalize_distributed_checkpoint(
        self, step: int, epoch: int, framework: str, shard_metas: Iterable[Mapping[str, Any]], user_meta: Any = None
    ) -> str:
        """Have the checkpoint, of the shards of all ranks; one rank calls it. Returns the key of the manifest.

        Raises:
            IncompleteCheckpointError: a rank is missing, or a shard is not in the store as it was saved.
            ConfigError: what is given are no such shards.
        """
        metas = list(shard_metas)
        shards = sorted((_shard(meta, self._folder.url) for meta in metas), key=lambda shard: int(shard["rank"]))
        _natural(epoch, "epoch")
        for meta in metas:
            if meta.get("step", step) != step:
                raise ConfigError(
                    f"a shard of step {meta['step']} for step {step}", hint="give what this step's saves returned"
                )
        ranks = [shard["rank"] for shard in shards]
        if ranks != list(range(self._world_size)):
            raise IncompleteCheckpointError(
                f"there are shards of ranks {ranks}, {self._world_size} ranks save it", op="save", url=self._folder.url,
                hint="give what save_distributed_shard returned on every rank, once each",
            )  # fmt: skip
        for shard in shards:
            url = self._folder.url_of(shard["key"])
            try:
                there = self._folder.store.head(self._folder.at(shard["key"]))
            except ObjectNotFoundError as error:
                raise IncompleteCheckpointError(f"there is no shard of rank {shard['rank']}", op="save", url=url) from error
            if there.size != shard["size"]:
                raise IncompleteCheckpointError(f"it has {there.size} bytes, {shard['size']} were saved", op="save", url=url)
        return self._folder.publish(_natural(step, "step"), epoch, framework, shards, user_meta)

    def _key_at(self, step: int) -> Callable[[str], str]:
        _natural(step, "step")
        return lambda time: self._folder.shard_key(step, time, self._rank, self._level is not None)

    def _open(self, key: str, mode: PutMode) -> MultipartWriter:
        if self._folder.store.exists(key):
            raise ObjectExistsError("the key is taken", op="create", url=key)
        return self._folder.store.multipart(key, mode=mode)


class PyCheckpointStream:
    """One rank's shard, in pieces; nothing of it is there before `finalize`."""

    def __init__(
        self, writer: MultipartWriter, level: int | None, step: int, epoch: int, time: str, rank: int, key: str
    ) -> None:
        self._writer = writer
        self._packer = compressor(None if level is None else "zstd", level)
        self._told = (step, epoch, time, rank, key)
        self._crc = self._plain = 0

    def write_chunk(self, data: Any) -> None:
        """Append `data`."""
        view = readable(data)
        self._crc = crc32c(view, self._crc)
        self._plain += len(view)
        for piece in self._packer.write(view):
            self._writer.write(piece)

    def bytes_written(self) -> int:
        """So far."""
        return self._plain

    def finalize(self) -> dict[str, Any]:
        """Store it; returns what `finalize_distributed_checkpoint` has to be told."""
        for piece in self._packer.finish():
            self._writer.write(piece)
        answer = self._writer.close()
        return _shard_meta(*self._told, self._writer.tell(), answer.etag, self._crc)

    def cancel(self) -> None:
        """Drop it."""
        self._writer.abort()


class PyCheckpointReader:
    """Reads the shards of several ranks; made by `PyCheckpointStore.reader`."""

    def __init__(self, folder: _Folder) -> None:
        self._folder = folder

    def load_latest_manifest(self) -> dict[str, Any] | None:
        """The manifest of what was saved last, as `read_shard_by_rank` takes it; None where nothing is."""
        return self._folder.newest()

    def read_shard_by_rank(self, manifest: Mapping[str, Any], rank: int) -> bytes:
        """What one rank has saved, held against size and checksum."""
        return self._folder.read(manifest, rank)


def save_checkpoint(uri: str, step: int, epoch: int, framework: str, data: Any, user_meta: Any = None) -> str:
    """As `PyCheckpointStore.save`."""
    return PyCheckpointStore(uri).save(step, epoch, framework, data, user_meta)


def load_checkpoint(uri: str) -> bytes | None:
    """As `PyCheckpointStore.load_latest`."""
    return PyCheckpointStore(uri).load_latest()


def save_distributed_shard(
    uri: str, step: int, epoch: int, framework: str, data: Any, world_size: int, rank: int
) -> dict[str, Any]:
    """As `PyCheckpointWriter.save_distributed_shard`."""
    return PyCheckpointStore(uri).writer(world_size, rank).save_distributed_shard(step, epoch, framework, data)


def finalize_distributed_checkpoint(
    uri: str,
    step: int,
    epoch: int,
    framework: str,
    shard_metas: Iterable[Mapping[str, Any]],
    world_size: int,
    rank: int,
    user_meta: Any = None,
) -> str:
    """As `PyCheckpointWriter.finalize_distributed_checkpoint`."""
    writer = PyCheckpointStore(uri).writer(world_size, rank)
    return writer.finalize_distributed_checkpoint(step, epoch, framework, shard_metas, user_meta)


def load_checkpoint_with_validation(uri: str, validate_integrity: bool = True) -> bytes:
    """One shard by its URI, or what was saved last in the folder `uri`, held against size and checksum of its manifest.

    Args:
        uri: ``.../shards/ckpt-7-20260101-120000/rank-0.bin``, or the folder above ``shards/``.
        validate_integrity: False: the object of a shard as it is stored, unread by any check.

    Raises:
        CheckpointNotFoundError: no manifest names such a shard; or there is no checkpoint.
        IntegrityError: it is damaged.
    """
    base, slash, rest = uri.rpartition("/shards/")
    if not slash:
        found = load_checkpoint(uri)
        if found is None:
            raise CheckpointNotFoundError("there is no checkpoint", op="load", url=uri)
        return found
    folder = _Folder(base)
    if not validate_integrity:
        return folder.store.get(folder.at(f"shards/{rest}"))
    for name in reversed(folder.names()):
        manifest = folder.manifest(name.key)
        for shard in manifest["shards"]:
            if shard["key"] == f"shards/{rest}":
                return folder.read(manifest, shard["rank"])
    raise CheckpointNotFoundError(
        "no manifest names this shard", op="load", url=uri, hint="validate_integrity=False reads it without a check"
    )


# -- what is stored --------------------------------------------------------------------------------


def _shard_meta(step: int, epoch: int, time: str, rank: int, key: str, size: int, etag: str, crc: int) -> dict[str, Any]:
    checksum = f"crc32c:{crc:08x}"
    return {
        "step": step,
        "epoch": epoch,
        "timestamp": time,
        "rank": rank,
        "key": key,
        "size": size,
        "etag": etag,
        "checksum": checksum,
    }


def _shard(meta: Any, url: str) -> dict[str, Any]:
    """The entry of one shard, as a manifest holds it."""
    if not isinstance(meta, Mapping) or not isinstance(meta.get("key"), str):
        raise ConfigError(f"this describes no shard: {meta!r:.100}", hint="give what save_distributed_shard returned")
    return {
        "rank": _natural(meta.get("rank"), "rank"),
        "key": _inside(meta["key"], url),
        "size": _natural(meta.get("size"), "size"),
        "etag": str(meta.get("etag") or ""),
        "checksum": meta.get("checksum"),
    }


def _inside(key: str, url: str) -> str:
    """`key`, if it is one of a shard: what a manifest names is read and deleted, so it must be this folder's."""
    if not key.startswith("shards/") or {"", ".", ".."}.intersection(key.split("/")):
        raise FormatError(f"{key!r} is no shard of this folder", op="load", url=url)
    return key


def _checked(data: bytes, url: str) -> dict[str, Any]:
    found = _mapping(data)
    shards = found.get("shards")
    if found.get("format_version") != _VERSION or not isinstance(shards, list):
        raise FormatError(
            f"format_version {found.get('format_version')!r}" if found else "it is no manifest", op="load", url=url,
            hint="version 1 is read; was it written to its end?",
        )  # fmt: skip
    try:
        described = [_shard(shard, url) for shard in shards]
        numbers = {name: _natural(found.get(name), name) for name in ("global_step", "epoch", "world_size")}
    except ConfigError as error:
        raise FormatError(error.message, op="load", url=url, hint="it is damaged") from error
    if sorted(shard["rank"] for shard in described) != list(range(numbers["world_size"])):
        raise IncompleteCheckpointError(f"it names {len(shards)} shards of {numbers['world_size']} ranks", op="load", url=url)
    texts = {name: str(found.get(name) or "") for name in ("framework", "wall_time", "status")}
    return {"format_version": _VERSION, **texts, **numbers, "shards": described, "user_meta": found.get("user_meta")}


def _mapping(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _verified(stored: bytes, shard: Mapping[str, Any], url: str) -> bytes:
    if len(stored) != shard["size"]:
        raise IntegrityError(f"it has {len(stored)} bytes, {shard['size']} were saved", op="load", url=url)
    plain = stored
    if shard["key"].endswith(".zst"):
        try:
            plain = b"".join(_unpacked(stored))
        except FormatError as error:
            raise IntegrityError(error.message, op="load", url=url) from error
    kind, _, digits = str(shard["checksum"] or "").partition(":")
    if not digits:
        raise IntegrityError("its manifest has no checksum of it", op="load", url=url, hint="an early s3dlio wrote it")
    crcs = (f"{crc32c(plain):08x}", f"{zlib.crc32(plain):08x}")  # s3dlio before 0.10 called a CRC-32 so, too
    if kind != "crc32c" or digits not in crcs:
        raise IntegrityError(
            f"its checksum is not {shard['checksum']}", op="load", url=url, hint="it was damaged where it is stored"
        )
    return plain


def _unpacked(stored: bytes) -> Iterator[bytes]:
    return decompressor("zstd", iter([stored]))


def _parsed_time(text: str) -> datetime.datetime:
    try:
        return datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.UTC)
    except ValueError:
        return datetime.datetime.min.replace(tzinfo=datetime.UTC)


def _natural(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} must be a whole number from 0, not {value!r}", hint="as a checkpoint counts them")
    return value
