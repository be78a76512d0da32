"""Extracting an archive to a local folder, safely."""

from __future__ import annotations

import os
from pathlib import Path

from s3loader.arguments import checked
from s3loader.errors import ConfigError, ShardReadError
from s3loader.shard.reader import ShardReader
from s3loader.shard.source import StreamSource, get_from_start, sniff_compression
from s3loader.shard.tar import TarMember, unsafe_reason, walk
from s3loader.store.objectstore import ObjectStore

__all__ = ["extract", "list_archive"]


def list_archive(
    store: ObjectStore, key: str, *, allow_missing_end: bool = False, allow_trailing: bool = False
) -> list[TarMember]:
    """All members of an archive, links and folders too, as they are named; nothing is written anywhere.

    Args:
        store: Where the archive is.
        key: Its key.
        allow_missing_end: Accept an archive without the zero blocks that end one (it may be truncated).
        allow_trailing: Leave out what follows the end of the archive.

    Raises:
        ShardReadError: it is damaged, or no tar.
    """
    _, head = get_from_start(store, key, 0, 512)
    source = StreamSource(store, key, sniff_compression(head))
    return list(walk(source.read, allow_missing_end=allow_missing_end, allow_trailing=allow_trailing))


@checked
def extract(store: ObjectStore, key: str, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the files of an archive below `folder`, contents verified where the index knows their CRC32C.

    Args:
        store: Where the archive is.
        key: Its key.
        folder: Made if it does not exist.

    Returns:
        The files written, in archive order.

    Raises:
        ShardReadError: the archive holds a link, a device, or a path that leaves `folder`; nothing was written.
        FileExistsError: a path needs a folder where there is a file.
    """
    for entry in list_archive(store, key):
        reason = unsafe_reason(entry.name)
        if entry.kind not in ("file", "dir", "volume label"):
            reason = f"is a {entry.kind}"
        if reason is not None:
            raise ShardReadError(
                f"refusing to extract: member {entry.name!r} {reason}", url=f"{store.url}/{key}", member=entry.name
            )
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    real_root = root.resolve()
    written = []
    for member in ShardReader(store, key).iter_members():
        target = root / member.name
        parent = target.parent.resolve()
        if parent != real_root and real_root not in parent.parents:  # a link that was in `folder` before
            raise ConfigError(f"{target} would be written outside {root}", hint="extract into an empty folder")
        parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink():
            target.unlink()
        with open(target, "wb") as file:
            while chunk := member.body.read(1 << 20):
                file.write(chunk)
        written.append(target)
    return written
