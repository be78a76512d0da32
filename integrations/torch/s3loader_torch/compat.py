"""s3torchconnector's keywords, understood as ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from s3loader.errors import ConfigError
from s3loader.loader import Dataset, open_dataset
from s3loader.store.options import StoreOptions

__all__ = ["connector_defaults", "connector_options", "open_source"]

_SOURCE: Final = ("group", "where", "store", "index_dir")

_STORE: Final = (
    "engine", "endpoint_url", "region", "access_key_id", "secret_access_key", "session_token", "profile", "ca_bundle",
    "addressing_style", "s3_client", "settings",
)  # fmt: skip


def connector_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options for `open_store`, the rest) of a constructor's keywords.

    ``endpoint`` is our ``endpoint_url``; of an ``s3client_config`` the profile, attempts, path style and anonymity are taken;
    ``reader_constructor`` means nothing here, since what a reader reads has been fetched. ``store_options`` is
    `open_store`'s ``options``.
    """
    rest = dict(options)
    store: dict[str, Any] = {name: rest.pop(name) for name in _STORE if name in rest}
    endpoint = rest.pop("endpoint", None)
    if endpoint is not None:
        store.setdefault("endpoint_url", endpoint)
    rest.pop("reader_constructor", None)
    if "store_options" in rest:
        store["options"] = rest.pop("store_options")
    config = rest.pop("s3client_config", None)
    if config is not None:
        store = {**_of_config(config), **store}
    return store, rest


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


def connector_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """What its datasets do unless told otherwise: readers, in the order listed. ``enable_sharding`` is ours: on by default."""
    return {"return_type": "reader", "shuffle": "none", **options}


def open_source(dataset: Dataset | str | Iterable[str], options: Mapping[str, Any]) -> tuple[Dataset, dict[str, Any]]:
    """(the dataset itself, or the one at this URL; the options that were not for opening it).

    Raises:
        ConfigError: a dataset was given, and options for opening one.
    """
    store_options, rest = connector_options(options)
    store_options |= {name: rest.pop(name) for name in _SOURCE if name in rest}
    if not isinstance(dataset, Dataset):
        return open_dataset(dataset, **store_options), rest
    if store_options:
        raise ConfigError(f"{', '.join(sorted(store_options))}: the dataset is open already", hint="give these to open_dataset")
    return dataset, rest
