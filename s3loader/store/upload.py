"""Uploading from files: one put while it is small, parts of it beyond."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from s3loader.errors import ConfigError
from s3loader.store.arguments import readable
from s3loader.store.base import Backend
from s3loader.store.multipart import MultipartWriter, part_size_for
from s3loader.types import PutMode, PutResult

__all__ = ["put_file"]


def put_file(
    backend: Backend,
    key: str,
    file: Any,
    *,
    part_size: int,
    mode: PutMode,
    content_type: str | None,
    metadata: Mapping[str, str] | None,
) -> PutResult:
    """Write what is left of the binary `file` as one object; memory stays within a few parts.

    Raises:
        ConfigError: the file gives text, or nothing yet (it is non-blocking).
    """
    size = _bytes_left(file)
    writer = MultipartWriter(
        backend,
        key,
        part_size=part_size_for(size, part_size) if size is not None else part_size,
        mode=mode,
        content_type=content_type,
        metadata=metadata,
    )
    with writer:
        read_into = getattr(file, "readinto", None)
        while True:
            if read_into is not None:
                room = writer.reserve(part_size)
                count = read_into(room)
                if count is None:
                    raise ConfigError("the file is non-blocking and has no data yet", hint="pass a blocking file")
                writer.commit(count)
            else:
                count = writer.write(readable(file.read(part_size)))
            if not count:
                break
        return writer.close()


def _bytes_left(file: Any) -> int | None:
    try:
        left: int = os.fstat(file.fileno()).st_size - file.tell()
        return max(0, left)
    except (AttributeError, OSError, ValueError):  # not a real file, or a pipe
        return None
