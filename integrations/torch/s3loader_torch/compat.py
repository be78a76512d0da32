"""s3torchconnector's keywords, understood as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from s3loader.loader import SourceKeywords
from s3loader.store.options import StoreOptions

__all__ = ["ConnectorKeywords", "DatasetKeywords", "without_connector"]


class ConnectorKeywords(TypedDict, total=False):
    """What s3torchconnector's datasets take and ours name otherwise, or have no use for."""

    endpoint: str | None
    """`open_store`'s ``endpoint_url``."""
    s3client_config: Any
    """Of an `S3ClientConfig` the profile, attempts, path style and anonymity are taken."""
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
    if "store_options" in options:
        out["options"] = options["store_options"]
    return {**out, **rest}


def _of_config(config: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if getattr(config, "force_path_style", False):
        out["addressing_style"] = "path"
    profile = getattr(config, "profile", None)
    if profile is not None:
        out["profile"] = profile
    attempts, unsigned = getattr(config, "max_attempts", None), bool(getattr(config, "unsigned", False))
    if attempts is not None or unsigned:
        out["options"] = StoreOptions(**({"max_attempts": attempts} if attempts is not None else {}), unsigned=unsigned)
    return out
