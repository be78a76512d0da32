"""Objects and members to local files."""

from __future__ import annotations

import os
import posixpath
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from s3loader.errors import ConfigError
from s3loader.exchange.keys import split_virtual_key
from s3loader.store.arguments import check_several, checked_key

if TYPE_CHECKING:
    from s3loader.exchange.store import S3ExchangeStore

__all__ = ["download", "download_all"]


def download(store: S3ExchangeStore, key: str, local_path: str | os.PathLike[str]) -> Path:
    """See `S3ExchangeStore.download_object`."""
    target = Path(local_path)
    with store.get_object(key) as body:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".s3loader-", dir=target.parent)
        try:
            with open(handle, "wb") as file:
                while chunk := body.read(1 << 20):
                    file.write(chunk)
            Path(name).chmod(0o644)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    return target


def download_all(store: S3ExchangeStore, keys: Iterable[str], local_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """See `S3ExchangeStore.download_objects`."""
    targets: dict[str, Path] = {}
    owners: dict[str, str] = {}
    check_several(keys, "key")
    if not isinstance(local_dir, (str, os.PathLike)):
        raise ConfigError(f"a folder cannot be {type(local_dir).__name__}", hint="pass the path of a folder, as str or Path")
    for key in map(checked_key, keys):
        name = posixpath.basename((split_virtual_key(key) or ("", key))[1])
        if name in ("", ".", ".."):
            raise ConfigError(
                f"{key!r} has no base name to be a file", hint="download it with download_object, which takes the path to write"
            )
        if owners.setdefault(name, key) != key:
            raise ConfigError(
                f"{owners[name]!r} and {key!r} would both be the file {name!r}", hint="download them to different folders"
            )
        targets[key] = Path(local_dir) / name
    return {key: download(store, key, target) for key, target in targets.items()}
