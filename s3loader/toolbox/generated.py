"""Objects of made-up data, as the document's `put` writes them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple, TypeAlias, Unpack

from s3loader.arguments import checked
from s3loader.datagen import OBJECT_TYPES, generate, generate_chunks
from s3loader.errors import ConfigError
from s3loader.store.open import StoreKeywords
from s3loader.store.ordered import map_ordered
from s3loader.toolbox import single
from s3loader.toolbox.many import put_many
from s3loader.toolbox.stores import names_folder, object_at
from s3loader.types import Location, ObjectURL
from s3loader.units import MIB

__all__ = ["DEFAULT_OBJECT_SIZE", "GenMode", "Generated", "names_of", "put_generated"]

DEFAULT_OBJECT_SIZE = 20 * MIB
GenMode: TypeAlias = Literal["streaming", "single-pass"]
"""How an object is made: piece by piece while it is uploaded, or whole before."""
_STREAMED: Final = 64 * MIB


class Generated(NamedTuple):
    """What `put_generated` wrote."""

    objects: int
    bytes: int
    seconds: float


@checked
def put_generated(
    prefix: Location,
    num: int = 1,
    template: str = "object_{}_of_{}.dat",
    *,
    size: int = DEFAULT_OBJECT_SIZE,
    object_type: str = "raw",
    dedup: int = 1,
    compress: int = 1,
    seed: int | None = None,
    max_in_flight: int = 32,
    create_bucket: bool = False,
    mode: GenMode | None = None,
    chunk_size: int = 8 * MIB,
    **place: Unpack[StoreKeywords],
) -> Generated:
    """Write objects of made-up data; each is another one.

    Args:
        prefix: A bucket or folder.
        num: How many objects.
        template: Name of each: the first ``{}`` is its number, from 0, the second how many there are.
        size: Bytes of each.
        object_type: ``raw``, ``npz``, ``tfrecord``, ``hdf5`` or ``parquet``, in any case.
        dedup: One of so many blocks is new.
        compress: What zlib makes of it, as a ratio.
        seed: Of the data; None: another one each time.
        max_in_flight: Requests at a time.
        create_bucket: Make the bucket where it is missing.
        mode: ``"streaming"`` makes each object piece by piece while it is uploaded, so that memory holds a few pieces of it;
            ``"single-pass"`` makes it whole first. The bytes are the same. None: streaming from 64 MiB on.
        chunk_size: Bytes of a piece, of raw and TFRecord objects; others are made whole.
        place: Keywords of `s3loader.open_store`: endpoint, credentials, options.

    Raises:
        ConfigError: a value out of range, or several objects of one name.
    """
    kind = object_type.lower()
    if kind not in OBJECT_TYPES:
        raise ConfigError(f"unknown object type {object_type!r}", hint=f"use one of {', '.join(OBJECT_TYPES)}")
    if num < 1 or size < 1:
        raise ConfigError(f"{num} objects of {size} bytes", hint="at least 1 of each")
    if mode not in (None, "streaming", "single-pass"):
        raise ConfigError(f"mode cannot be {mode!r}", hint='"streaming" or "single-pass"')
    if chunk_size < 1:
        raise ConfigError(f"pieces of {chunk_size} bytes", hint="at least 1, such as 8 MiB")
    names = names_of(template, num)
    where = ObjectURL.parse(prefix)
    base = where if names_folder(prefix) or where.scheme == "file" else ObjectURL(where.scheme, where.bucket, f"{where.key}/")
    if create_bucket:
        single.create_bucket(where, **place)
    options: dict[str, Any] = {"dedup": dedup, "compress": compress}
    seed = time.time_ns() if seed is None else seed
    total = 0

    def items() -> Iterator[tuple[ObjectURL, Any]]:
        nonlocal total
        for i, name in enumerate(names):
            data = generate(size, kind, seed=seed, index=i, **options)
            total += len(data)
            yield base.joined(name), data

    def streamed(number: int) -> int:
        store, key = object_at(base.joined(names[number]), place)
        with store.multipart(key) as out:
            for piece in generate_chunks(size, kind, seed=seed, index=number, chunk=chunk_size, **options):
                out.write(piece)
            return out.tell()

    start = time.perf_counter()
    if mode == "streaming" or (mode is None and size >= _STREAMED):
        written = list(map_ordered(streamed, range(num), concurrency=min(max_in_flight, num), name="s3loader-gen"))
        return Generated(num, sum(written), time.perf_counter() - start)
    made = put_many(items(), max_in_flight, **place)
    return Generated(len(made), total, time.perf_counter() - start)


def names_of(template: str, num: int) -> list[str]:
    """Names of `num` objects.

    Raises:
        ConfigError: several would have the same.
    """
    parts = template.split("{}")
    if num > 1 and len(parts) < 2:
        raise ConfigError(f"{num} objects of the one name {template!r}", hint="put {} where the number belongs")
    if not template:
        raise ConfigError("an empty template", hint='such as "object_{}_of_{}.dat"')
    return ["".join(_filled(parts, [str(i), str(num)])) for i in range(num)]


def _filled(parts: list[str], values: list[str]) -> Iterator[str]:
    for i, part in enumerate(parts):
        if i:
            yield values[i - 1] if i <= len(values) else "{}"
        yield part
