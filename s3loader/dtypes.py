"""Element types, under the names safetensors gives them.

A type that the safetensors format does not know (``C128``) is written as ``U8`` with one more
dimension of its size; the checkpoint's index keeps the true type.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from s3loader.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DTYPES", "in_safetensors", "itemsize", "name_of", "nbytes", "numpy_dtype", "numpy_name"]

DTYPES: Final[dict[str, tuple[int, str]]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F32": (4, "float32"),
    "F64": (8, "float64"),
    "C64": (8, "complex64"),
    "C128": (16, "complex128"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
}
"""Name -> (bytes per element, the name numpy, `ml_dtypes`, torch and JAX share for it)."""

_BY_NUMPY: Final = {numpy: name for name, (_, numpy) in DTYPES.items()}
_UNKNOWN_TO_SAFETENSORS: Final = frozenset({"C128"})


def itemsize(dtype: str) -> int:
    """Bytes of one element.

    Raises:
        CheckpointError: the type is unknown.
    """
    try:
        return DTYPES[dtype][0]
    except KeyError:
        raise CheckpointError(
            f"unknown element type {dtype!r}", hint="the checkpoint was written by a newer s3loader; update s3loader"
        ) from None


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a dense array."""
    return itemsize(dtype) * math.prod(shape)


def numpy_name(name: str) -> str | None:
    """The safetensors name of numpy's type `name` (``"float32"``), None where there is none."""
    return _BY_NUMPY.get(name)


@functools.cache
def name_of(dtype: np.dtype[Any]) -> str | None:
    """The safetensors name of a numpy type, None where there is none."""
    return numpy_name(dtype.name) if dtype.names is None else None


@functools.cache
def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy type; `ml_dtypes` gives those numpy lacks.

    Raises:
        CheckpointError: numpy lacks the type and `ml_dtypes` is not installed.
    """
    import numpy as np

    name = DTYPES[dtype][1] if dtype in DTYPES else ""
    if not name:
        itemsize(dtype)
    try:
        return np.dtype(name)
    except TypeError:
        pass
    try:
        import ml_dtypes
    except ImportError:
        raise CheckpointError(f"numpy has no {name}", hint="pip install ml_dtypes, or restore into torch tensors") from None
    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found


def in_safetensors(dtype: str, shape: Sequence[int]) -> tuple[str, list[int]]:
    """Type and shape as the header of a safetensors file states them."""
    if dtype in _UNKNOWN_TO_SAFETENSORS:
        return "U8", [*shape, itemsize(dtype)]
    return dtype, list(shape)
