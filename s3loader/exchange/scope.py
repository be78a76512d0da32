"""`ScopedStore`: key templates with some variables filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3loader.exchange.store import S3ExchangeStore

__all__ = ["ScopedStore"]


class ScopedStore:
    """Resolves key templates; made by `S3ExchangeStore.scope`. It reads and writes nothing itself.

    Args:
        store: The store whose `base_prefix` and `default_vars` apply.
        vars: Variables of this scope.
    """

    def __init__(self, store: S3ExchangeStore, vars: Mapping[str, Any]) -> None:
        self.store = store
        self.vars = dict(vars)

    def key(self, template: str, **vars: Any) -> str:
        """`template` resolved; `vars` beat the scope's, which beat the store's defaults.

        Raises:
            MissingPlaceholderError: a placeholder has no value.
        """
        return self.store.resolve_key(template, {**self.vars, **vars})

    def manifest_key(self, name: str) -> str:
        """``{prefix}/<name>/manifest.jsonl``; the scope needs a `prefix`."""
        return self.key("{prefix}/{__name}/manifest.jsonl", __name=name)

    def shard_prefix(self, name: str) -> str:
        """``{prefix}/<name>/shards``; the scope needs a `prefix`."""
        return self.key("{prefix}/{__name}/shards", __name=name)
