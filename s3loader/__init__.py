"""s3loader: training data and checkpoints between object stores and PyTorch, TensorFlow and JAX.

This is a table of contents; each name is imported from its module on first use, so that
``import s3loader`` stays light. Frameworks live behind `s3loader.torch`, `s3loader.tensorflow`
and `s3loader.jax`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3loader.errors import S3LoaderError as S3LoaderError
    from s3loader.types import ByteRange as ByteRange

__version__ = "0.1.0"

_HOME = {
    "ByteRange": "s3loader.types",
    "S3LoaderError": "s3loader.errors",
}

__all__ = [
    "ByteRange",
    "S3LoaderError",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 's3loader' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
