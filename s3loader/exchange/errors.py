"""Errors of the exchange API; all are `S3ExchangeError`s, the "not found" ones `ObjectNotFoundError`s too."""

from __future__ import annotations

from typing import Any

from s3loader.errors import ClosedError, ObjectNotFoundError, S3ExchangeError

__all__ = [
    "ExchangeObjectNotFoundError",
    "ManifestNotFoundError",
    "MissingPlaceholderError",
    "WriterClosedError",
    "WriterStateError",
]


class MissingPlaceholderError(S3ExchangeError):
    """A key template names a variable that was not given."""

    def __init__(self, placeholder: str = "", template: str = "", **facts: Any) -> None:
        super().__init__(
            f"Missing placeholder {placeholder!r} in template: {template}" if template else placeholder,
            **{
                "placeholder": placeholder,
                "template": template,
                "hint": f"give it a value: scope({placeholder}=...), or {{{placeholder!r}: ...}} in vars or default_vars"
                if template
                else None,
                **facts,
            },
        )


class ExchangeObjectNotFoundError(ObjectNotFoundError, S3ExchangeError):
    """There is no object under this key; `.key` is the key as it was asked for."""

    def __init__(self, key: str = "", **facts: Any) -> None:
        super().__init__(f"S3 object not found: {key}", key=key, **facts)


class ManifestNotFoundError(ObjectNotFoundError, S3ExchangeError):
    """There is no manifest under this key; `.key` and `.manifest_key` are the key as it was asked for."""

    def __init__(self, key: str = "", **facts: Any) -> None:
        super().__init__(f"Manifest not found: {key}", key=key, manifest_key=key, **facts)


class WriterStateError(S3ExchangeError, RuntimeError):
    """A `ManifestWriter` was not opened for what it is asked to do."""


class WriterClosedError(WriterStateError, ClosedError):
    """A `ManifestWriter` was used after it was closed."""
