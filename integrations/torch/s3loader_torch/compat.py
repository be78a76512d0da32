"""s3torchconnector's keywords, understood as ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Final, TypedDict

from s3loader import ConfigError, StoreOptions
from s3loader.adapters import SourceKeywords, StoreKeywords, unknown_option

__all__ = ["ConnectorKeywords", "DatasetKeywords", "manager_keywords", "store_keywords", "without_connector"]

_MEANINGLESS: Final = {
    "part_size": (8 << 20, "ranges are cut to fit the samples, and memory_limit= and prefetch= bound them"),
    "throughput_target_gbps": (10.0, "concurrency= says how many requests run at a time"),
}
"""Of an `S3ClientConfig`: its own default, and what stands for it here."""

_NOT_NEEDED: Final = {
    "prefix_strategy": "files lie under an attempt that is never used again, and large parts need few requests a prefix",
    "single_file_per_rank": "options=CheckpointOptions(file_size=...) says how large files are",
    "sync_files": "a save has ended when its data is durable",
    "per_thread_copy_ahead": "options=CheckpointOptions(staging_budget=...) bounds the memory",
    "cache_staged_state_dict": "staging memory is kept for the next save anyway",
    "serialization_format": "tensors are safetensors, the rest is JSON",
    "enable_consolidation": "`s3loader ckpt export` writes one file",
    "_extensions": "files are stored as they are",
}
"""Keywords of DCP's and s3torchconnector's writers that we have no use for, and why."""


class ConnectorKeywords(TypedDict, total=False):
    """What s3torchconnector's datasets take and ours name otherwise, or have no use for."""

    endpoint: str | None
    """`open_store`'s ``endpoint_url``."""
    s3client_config: Any
    """Of an `S3ClientConfig` the profile, attempts, path style, anonymity and ``requester_pays`` are taken; a `part_size` or
    `throughput_target_gbps` other than its default has no meaning here, and gives a warning."""
    reader_constructor: Any
    """Means nothing here, since what a reader reads has been fetched."""
    store_options: StoreOptions | None
    """`open_store`'s ``options``."""


class DatasetKeywords(SourceKeywords, ConnectorKeywords, total=False):
    """How our torch datasets are opened, in our words or in s3torchconnector's."""


def without_connector(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with s3torchconnector's words put into ours; single options beat what its configuration says."""
    rest = {name: value for name, value in options.items() if name not in ConnectorKeywords.__optional_keys__}
    config, endpoint = options.get("s3client_config"), options.get("endpoint")
    out = {} if config is None else _of_config(config)
    if endpoint is not None:
        out["endpoint_url"] = endpoint
    given = options.get("store_options")
    if given is not None:
        pays = out["options"].requester_pays if "options" in out else False
        known = {field.name: getattr(given, field.name) for field in fields(given)}
        out["options"] = StoreOptions(**{**known, "requester_pays": given.requester_pays or pays})
    return {**out, **rest}


def manager_keywords(owner: str, region: str | None, options: Mapping[str, Any], more: Iterable[str] = ()) -> dict[str, Any]:
    """The same as `store_keywords`, as `CheckpointManager` takes them, whose `options` are its own."""
    ours = store_keywords(owner, region, options, more)
    return {"store_options" if name == "options" else name: value for name, value in ours.items()}


def store_keywords(owner: str, region: str | None, options: Mapping[str, Any], more: Iterable[str] = ()) -> dict[str, Any]:
    """What `open_store` takes, of what a class that passes it on was given, in our words or in s3torchconnector's.

    Args:
        owner: The class.
        region: Its `region`, a parameter of its own.
        options: The other keywords.
        more: Names that it takes besides.

    Raises:
        ConfigError: one of them is unknown; the hint names what is near, or why there is none.
    """
    known = StoreKeywords.__optional_keys__ | ConnectorKeywords.__optional_keys__
    unknown = options.keys() - known - set(more)
    for name in sorted(unknown & _NOT_NEEDED.keys()):
        raise ConfigError(f"{owner}: {name}= means nothing here", hint=f"leave it out: {_NOT_NEEDED[name]}")
    if unknown:
        raise unknown_option(unknown, sorted({"region", *known, *more}), owner)
    ours = without_connector(options)
    return {**ours, "region": region} if region is not None else ours


def _of_config(config: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if getattr(config, "force_path_style", False):
        out["addressing_style"] = "path"
    profile = getattr(config, "profile", None)
    if profile is not None:
        out["profile"] = profile
    for name, (default, instead) in _MEANINGLESS.items():
        value = getattr(config, name, None)
        if value is not None and value != default:
            warnings.warn(f"s3client_config: {name}={value!r} has no meaning here: {instead}", UserWarning, stacklevel=5)
    said = {name: bool(getattr(config, name, False)) for name in ("unsigned", "requester_pays")}
    attempts = getattr(config, "max_attempts", None)
    if attempts is not None or any(said.values()):
        out["options"] = StoreOptions(**({"max_attempts": attempts} if attempts is not None else {}), **said)
    return out
