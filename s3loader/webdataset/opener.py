"""The handler that WebDataset calls for URLs of stores, and how it is registered."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any, Final, TypeAlias, Unpack

from s3loader.arguments import checked
from s3loader.errors import ConfigError
from s3loader.exchange.keys import is_shard_key
from s3loader.shard.body import ObjectBody
from s3loader.shard.source import read_chunks
from s3loader.store.open import StoreKeywords
from s3loader.toolbox.stores import object_at
from s3loader.toolbox.writer import MultipartUploadWriter
from s3loader.webdataset.tar_stream import open_tar_stream

__all__ = ["SCHEMES", "gopen", "register"]

SCHEMES: Final = ("s3", "gs", "az", "memory")
"""Schemes of URLs that are opened here."""
_SHELL: Final = frozenset("|&;<>()$`\\*?[]{}~!\n")
_COPIES: Final = (
    (("aws", "s3", "cp"), ("-",)),
    (("s5cmd", "cat"), ()),
    (("gsutil", "cat"), ()),
    (("gsutil", "cp"), ("-",)),
    (("gcloud", "storage", "cat"), ()),
    (("s3loader", "get"), ()),
)
"""Commands that write one object to standard output: what stands before the URL, and behind it."""

_Opener: TypeAlias = Callable[..., Any]


@checked
def register(*, verify: bool = True, **place: Unpack[StoreKeywords]) -> None:
    """Have WebDataset open `SCHEMES` here; done by the import, and again to change how.

    Args:
        verify: Check members against the index of their shard, where it has one.
        place: Keywords of `s3loader.open_store` for all of them, over those of `s3loader.s3.configure`.

    Raises:
        ModuleNotFoundError: `webdataset` is not installed.
    """
    try:
        from webdataset.gopen import gopen_schemes
    except ModuleNotFoundError as error:
        if error.name != "webdataset":
            raise
        raise ModuleNotFoundError("s3loader.webdataset needs WebDataset: pip install webdataset", name="webdataset") from error
    schemes: dict[str, _Opener] = gopen_schemes

    def opener(url: str, mode: str = "rb", bufsize: int = 0, **others: Any) -> Any:
        return gopen(url, mode, verify=verify, **place)

    for scheme in SCHEMES:
        schemes[scheme] = opener
    schemes["pipe"] = _pipes(schemes["pipe"], opener)


def _pipes(before: _Opener, opener: _Opener) -> _Opener:
    """The handler of ``pipe:`` that knows plain copies; all other commands are run as before."""
    run = getattr(before, "_runs_others_with", before)

    def pipe(url: str, mode: str = "rb", bufsize: int = 8192, **others: Any) -> Any:
        copied = copied_url(url.removeprefix("pipe:")) if mode == "rb" else None
        return run(url, mode, bufsize, **others) if copied is None else opener(copied, mode)

    pipe._runs_others_with = run  # type: ignore[attr-defined]
    return pipe


def copied_url(command: str) -> str | None:
    """The URL of the one object that a shell command copies to standard output; None: it does more, or something else."""
    if not _SHELL.isdisjoint(command):
        return None
    try:
        words = tuple(shlex.split(command))
    except ValueError:
        return None
    for before, behind in _COPIES:
        url = words[len(before) : len(before) + 1]
        if url and words == (*before, *url, *behind) and url[0].partition("://")[0] in SCHEMES:
            return url[0]
    return None


@checked
def gopen(url: str, mode: str = "rb", *, verify: bool = True, **place: Unpack[StoreKeywords]) -> Any:
    """Open an object as WebDataset opens files.

    Args:
        url: Of one object, ``s3://bucket/key``.
        mode: ``"rb"``: a forward-only file. A tar shard (by its name: ``.tar``, ``.tar.gz``, ``.tar.zst`` ...) is given as the
            plain tar that is in it, as `open_tar_stream` says; everything else byte by byte as it is stored. ``"wb"``: a
            `MultipartUploadWriter`; the object exists when it was closed.
        verify: Of shards: check their members.
        place: Keywords of `s3loader.open_store`.

    Raises:
        ObjectNotFoundError: there is no such object.
        ConfigError: another mode, or a URL that names no object.
    """
    if mode == "wb":
        return MultipartUploadWriter.from_uri(url, **place)
    if mode != "rb":
        raise ConfigError(f"mode cannot be {mode!r}", hint='"rb" or "wb"')
    store, key = object_at(url, place)
    if is_shard_key(key):
        return open_tar_stream(store, key, verify=verify)
    meta, chunks = read_chunks(store, key)
    return ObjectBody(chunks, size=meta.size)
