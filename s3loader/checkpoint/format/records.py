"""The JSON documents of an attempt: intent, part manifest, index; and their validation.

Encoded with `msgspec`, in field order, so that equal contents are equal bytes: several
publishers of one attempt write the same index. The first field is the checksum of all that
follows (`s3loader.checksum.seal_json`); records of older releases have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar

import msgspec

from s3loader.checkpoint.format import segments
from s3loader.checksum import json_seal_holds, seal_json
from s3loader.dtypes import DTYPES, nbytes
from s3loader.errors import FormatError

__all__ = [
    "FORMAT",
    "BeginRecord",
    "Chunk",
    "Compacted",
    "EpochRecord",
    "Failure",
    "FileRecord",
    "Index",
    "Intent",
    "Marker",
    "Part",
    "Pin",
    "PlanRecord",
    "SharesRecord",
    "TicketRecord",
    "decode",
    "encode",
    "is_sealed",
]

FORMAT: Final = 1


class Marker(msgspec.Struct, kw_only=True):
    """``s3loader.json``."""

    format: int
    run: str
    """Random id of the run."""
    conditional_writes: bool
    """Whether the store honoured conditions when it was probed..."""
    probed: str
    """...under this URL; under another one it is probed again."""


class EpochRecord(msgspec.Struct, kw_only=True):
    """``control/epoch-N.json``: one incarnation of the job that writes this run."""

    format: int
    epoch: int
    nonce: str
    job: str
    """How the ranks of one incarnation recognise it."""
    world: int
    resume_step: int | None
    """The step every rank resumes from."""
    time: float
    """Seconds since the epoch, for people; no decision is taken on it."""
    host: str
    pid: int
    unfinished: list[int] = []
    """Steps that were begun and never committed, newest first: what was sent of them may be taken over."""


class Intent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a rank is about to do."""

    format: int
    step: int
    attempt: str
    rank: int
    world: int
    time: float
    base: int | None = None
    """The earlier step that unchanged tensors are referenced from."""


class Failure(msgspec.Struct, kw_only=True):
    """``failed-RRRRR.json``: a rank that cannot finish its part of an attempt tells the others."""

    format: int
    rank: int
    error: str


class BeginRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """``control/save-<attempt>.json``: what rank 0 tells the others of a save that they meet for."""

    format: int
    step: int
    generation: int
    """Of the step's root, which is absent."""
    error: str = ""
    """Why it could not begin."""


class TicketRecord(msgspec.Struct, kw_only=True):
    """``control/save-dcp-<origin>.json``: what DCP's coordinator tells the other ranks of the save under way."""

    format: int
    step: int
    attempt: str
    world: int
    epoch: EpochRecord


class PlanRecord(msgspec.Struct, kw_only=True):
    """``plan-RRRRR.json``: what a rank has."""

    format: int
    rank: int
    boxes: list[tuple[str, list[int], list[int], int]]
    """Name, offset, shape, bytes."""


class SharesRecord(msgspec.Struct, kw_only=True):
    """``plan.json``: of each rank the places in its `PlanRecord.boxes` that it writes."""

    format: int
    ranks: list[list[int]]


class FileRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One data file."""

    id: str
    """``d-00003-000.safetensors``; a file of an earlier attempt has its key."""
    size: int
    header: int
    """Bytes before the first tensor."""
    crc: bytes
    """CRC32C of the header, as `Chunk.crc`."""


class Chunk(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One box of one tensor, and where its bytes are."""

    name: str
    dtype: str
    shape: list[int]
    """Of the whole tensor."""
    file: str
    """`FileRecord.id`."""
    begin: int
    end: int
    crc: bytes
    """CRC32C of each segment (a piece between two multiples of the block size), 4 little-endian bytes each."""
    offset: list[int] | None = None
    """Where the box begins; None: the whole tensor."""
    box: list[int] | None = None
    """Shape of the box; None: the whole tensor."""
    hash: bytes = b""
    """96 bits of checksum that recognise the content; empty where nobody will ask."""


class Part(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one rank saved."""

    format: int
    step: int
    epoch: int
    attempt: str
    rank: int
    world: int
    time: float
    block: int
    files: list[FileRecord]
    chunks: list[Chunk]
    tree: Any
    """The items as JSON; leaves are chunks by name."""
    replicas: list[Chunk] = []
    """Tensors another rank writes, with this rank's checksums of them."""
    metrics: dict[str, float] = {}
    metadata: dict[str, Any] = {}
    expects: str = ""
    """What the step's root was when this rank began: generation and ETag. The same on all ranks, or the garbage of an
    attempt's early ranks could be collected under the condition of a late one."""


class Compacted(msgspec.Struct, kw_only=True):
    """``ckpt/compacted.json``: steps of which generations are dead for ever."""

    format: int
    generations: list[list[list[int]]]
    """At place n: the steps of which the first n + 1 generations are dead, as ``[first, stride, length]`` or ``[step]``."""


class Index(msgspec.Struct, kw_only=True, omit_defaults=True):
    """All parts, merged: what a reader needs."""

    format: int
    step: int
    attempt: str
    world: int
    block: int
    files: list[FileRecord]
    chunks: list[Chunk]
    tree: Any


class Pin(msgspec.Struct, kw_only=True):
    """``control/pin-<attempt>-<rank>.json``: files of earlier steps that a save under way relies on."""

    format: int
    step: int
    attempt: str
    keys: list[str]


Record = TypeVar("Record", bound=msgspec.Struct)


def encode(record: msgspec.Struct) -> bytes:
    """`record` as JSON, with its checksum."""
    return seal_json(msgspec.json.encode(record))


def is_sealed(data: bytes) -> bool:
    """Whether the record in `data` has a checksum, and that holds."""
    return json_seal_holds(data) is True


def decode(data: bytes | memoryview, record: type[Record], where: str) -> Record:
    """The record in `data`, checked.

    Raises:
        FormatError: `data` (the object `where`) is not one, or of a newer format.
    """
    if json_seal_holds(data, b'{"%s":' % record.__struct_fields__[0].encode()) is False:
        raise FormatError(
            f"{where} is not what was written: its checksum does not match",
            hint="it is damaged; `s3loader ckpt verify --all` tells which steps are whole",
        )
    try:
        result = msgspec.json.decode(data, type=record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise FormatError(
            f"{where} is not a {record.__name__.lower()} record: {error}",
            hint="it is damaged, or no file of s3loader; `s3loader ckpt verify --all` tells which steps are whole",
        ) from error
    version = getattr(result, "format", FORMAT)
    if version != FORMAT:
        raise FormatError(f"{where} has format {version}, this s3loader reads {FORMAT}", hint="update s3loader")
    if isinstance(result, Part | Index):
        _check(result.files, [*result.chunks, *(result.replicas if isinstance(result, Part) else ())], result.block, where)
    return result


def box_of(chunk: Chunk) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape of a chunk's box."""
    offset = tuple(chunk.offset) if chunk.offset is not None else (0,) * len(chunk.shape)
    return offset, tuple(chunk.box if chunk.box is not None else chunk.shape)


def _check(files: Sequence[FileRecord], chunks: Sequence[Chunk], block: int, where: str) -> None:
    sizes = {file.id: file.size for file in files}
    if block <= 0:
        raise FormatError(f"{where}: a block size of {block}", hint="it is damaged; go back to an earlier step")
    for file in files:
        if not 0 <= file.header <= file.size or len(file.crc) != 4 * segments.count(0, file.header, block):
            raise FormatError(
                f"{where}: the file {file.id!r} has a header of {file.header} of {file.size} bytes",
                hint="it is damaged; go back to an earlier step",
            )
    for chunk in chunks:
        offset, box = box_of(chunk)
        inside = len(offset) == len(box) == len(chunk.shape) and all(
            low >= 0 and size >= 0 and low + size <= whole for low, size, whole in zip(offset, box, chunk.shape, strict=True)
        )
        if not inside or chunk.dtype not in DTYPES:
            raise FormatError(
                f"{where}: {chunk.name!r} is a {chunk.dtype} box {list(offset)}+{list(box)} of {chunk.shape}",
                hint="it is damaged; go back to an earlier step",
            )
        if chunk.file == "" and chunk.begin == 0:
            continue  # a replica: checksums only
        if not 0 <= chunk.begin <= chunk.end <= sizes.get(chunk.file, -1) or chunk.end - chunk.begin != nbytes(
            chunk.dtype, box
        ):
            raise FormatError(
                f"{where}: {chunk.name!r} does not lie in its file {chunk.file!r}",
                hint="it is damaged; go back to an earlier step",
            )
        if len(chunk.crc) != 4 * segments.count(chunk.begin, chunk.end, block):
            raise FormatError(
                f"{where}: {chunk.name!r} has {len(chunk.crc)} bytes of checksums",
                hint="it is damaged; go back to an earlier step",
            )
