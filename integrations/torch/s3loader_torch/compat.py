"""s3torchconnector's keywords, understood as ours."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final, TypedDict

from s3loader.loader import SourceKeywords
from s3loader.store.options import StoreOptions

__all__ = ["ConnectorKeywords", "DatasetKeywords", "without_connector"]

_MEANINGLESS: Final = {
    "part_size": (8 << 20, "ranges are cut to fit the samples, and memory_limit= and prefetch= bound them"),
    "throughput_target_gbps": (10.0, "concurrency= says how many requests run at a time"),
}
"""Of an `S3ClientConfig`: its own default, and what stands for it here."""


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
