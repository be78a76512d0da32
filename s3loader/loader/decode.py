"""Decoders: from the bytes of a member to a value, chosen by name or by extension."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np

from s3loader.arguments import checked
from s3loader.errors import CheckpointError, ConfigError
from s3loader.loader.tf_example import decode_example, decode_sequence_example

__all__ = ["DECODERS", "Decode", "Decoder", "make_decoder", "register_decoder"]

Decoder: TypeAlias = Callable[[memoryview], Any]

Decode: TypeAlias = str | Decoder | Mapping[str, str | Decoder] | None
"""None: memoryviews as they are (valid as long as you keep them). ``"auto"``: by extension. A name of `DECODERS`: that one
for all. A mapping from extension to name or function: these, and bytes for the rest. A function: it gets each member."""


def _bytes(data: memoryview) -> bytes:
    return bytes(data)


def _text(data: memoryview) -> str:
    return str(data, "utf-8")


def _json(data: memoryview) -> Any:
    return json.loads(bytes(data))


def _int(data: memoryview) -> int:
    return int(bytes(data))


def _npy(data: memoryview) -> Any:
    """A copy, of any dtype but objects."""
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _npz(data: memoryview) -> dict[str, Any]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _safetensors(data: memoryview) -> dict[str, Any]:
    """Arrays of the types stored; bfloat16 and the like are those of `ml_dtypes`."""
    from safetensors import deserialize

    from s3loader.dtypes import numpy_dtype

    arrays = {}
    for name, stored in deserialize(bytes(data)):  # type: ignore[no-untyped-call]
        try:
            dtype = numpy_dtype(stored["dtype"])
        except CheckpointError:
            raise ConfigError(
                f"numpy has no type for {stored['dtype']} of tensor {name!r}",
                hint='pip install ml_dtypes, or give a function of your own: decode={"safetensors": f}',
            ) from None
        size = len(stored["data"])
        arrays[name] = (np.frombuffer(stored["data"], dtype) if size else np.empty(0, dtype)).reshape(stored["shape"])
    return arrays


def _pil(data: memoryview) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("decoding images needs Pillow", hint="pip install 's3loader[image]'") from error
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


def _image(data: memoryview) -> Any:
    """uint8 array, height x width x channels (height x width for grey)."""
    image = _pil(data)
    return np.array(image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB"))


DECODERS: Final[dict[str, Decoder]] = {
    "bytes": _bytes,
    "text": _text,
    "json": _json,
    "int": _int,
    "npy": _npy,
    "npz": _npz,
    "safetensors": _safetensors,
    "pil": _pil,
    "image": _image,
    "tf_example": decode_example,
    "tf_sequence_example": decode_sequence_example,
}

_BY_EXTENSION: Final[dict[str, str]] = {
    **dict.fromkeys(("png", "jpg", "jpeg", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm"), "image"),
    **dict.fromkeys(("txt", "text", "transcript"), "text"),
    **dict.fromkeys(("cls", "cls2", "index", "id", "count"), "int"),
    "json": "json",
    "npy": "npy",
    "npz": "npz",
    "safetensors": "safetensors",
    "tfexample": "tf_example",
}


@checked
def register_decoder(name: str, decoder: Decoder, *, extensions: tuple[str, ...] = ()) -> None:
    """Add a decoder under `name`, for ``decode=name``, and for these extensions under ``decode="auto"``."""
    DECODERS[name] = decoder
    _BY_EXTENSION.update(dict.fromkeys(extensions, name))


def _named(decoder: str | Decoder) -> Decoder:
    if callable(decoder):
        return decoder
    if decoder not in DECODERS:
        raise ConfigError(f"unknown decoder {decoder!r}", hint=f"use one of {', '.join(sorted(DECODERS))}, or a function")
    return DECODERS[decoder]


def make_decoder(decode: Decode) -> Callable[[str, memoryview], Any] | None:
    """A function of (extension, data), or None where nothing is decoded.

    Compound extensions count by their last part: ``seg.png`` is a ``png``, unless the mapping has ``seg.png``.

    Raises:
        ConfigError: a decoder is unknown.
    """
    if decode is None:
        return None
    if decode == "auto":
        return _by(dict(_BY_EXTENSION))
    if isinstance(decode, Mapping):
        return _by(decode)
    only = _named(decode)
    return lambda extension, data: only(data)


def _by(table: Mapping[str, str | Decoder]) -> Callable[[str, memoryview], Any]:
    functions = {extension.lstrip(".").lower(): _named(decoder) for extension, decoder in table.items()}

    def decoded(extension: str, data: memoryview) -> Any:
        extension = extension.lower()
        function = functions.get(extension) or functions.get(extension.rsplit(".", 1)[-1], _bytes)
        return function(data)

    return decoded
