"""Sizes and durations as people write them: ``"64MiB"``, ``"1m30s"``."""

from __future__ import annotations

import re
from typing import Final

from s3loader.arguments import as_float, whole_number
from s3loader.errors import ConfigError

__all__ = ["GIB", "KIB", "MIB", "format_duration", "format_rate", "format_size", "parse_duration", "parse_size"]

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

_SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([kmgtp]?)(i?b?)\s*", re.IGNORECASE)
_SMALLEST: Final = 64 * KIB
"""Less than this is no size of a buffer, a part or a cache, unless it says its unit."""
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(value: int | str, name: str = "") -> int:
    """Bytes of ``"64MiB"``, ``"1.5GB"``, ``"8B"`` (powers of 1024 with an ``i``, else of 1000), or of a whole number.

    A number without a unit from 1 to 65,535 is refused: elsewhere ``prefetch=8`` means eight objects, not eight bytes. Where
    `name` says bytes itself (``max_bytes``), any number is one of bytes.

    Args:
        value: The size.
        name: Of the argument, for messages.

    Raises:
        ConfigError: it is not a size, negative, or small and without a unit.
    """
    what = f"{name}=" if name else ""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is not None:
        number, prefix, mark = match.groups()
        scale: int = (1024 if "i" in mark.lower() else 1000) ** _POWERS[prefix.lower()]
        size = round(float(number) * scale) if "." in number else int(number) * scale
        unit = bool(prefix or mark)
    elif (whole := whole_number(value)) is not None:
        size, unit = whole, False
    else:
        raise ConfigError(f"not a size: {what}{value!r}", hint='write a number of bytes, or e.g. "64MiB"')
    if size < 0:
        raise ConfigError(f"a size cannot be negative: {what}{value}", hint='write bytes as a number, or text such as "64MiB"')
    if 0 < size < _SMALLEST and not unit and not name.endswith("bytes"):
        raise ConfigError(
            f"{what}{value!r} would be {size} bytes, which is hardly meant",
            hint=f'sizes below 64 KiB need a unit: "{size}MiB", or "{size}B" if it is bytes; it is no number of objects',
        )
    return size


def format_size(size: float) -> str:
    """``67108864`` as ``"64.0 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} PiB"


def format_rate(bytes_per_second: float) -> str:
    """A rate in decimal megabytes, as networks and peers state it: ``"812 MB/s"``."""
    return f"{bytes_per_second / 1e6:.0f} MB/s"


def parse_duration(value: float | str) -> float:
    """Seconds of ``90``, ``"90s"``, ``"1m30s"``, ``"250ms"``.

    Raises:
        ConfigError: it is not a duration, or negative.
    """
    seconds = as_float(value)
    if seconds is not None:
        if not seconds >= 0:
            raise ConfigError(
                f"a duration cannot be negative: {value}", hint='write seconds as a number, or text such as "30s"'
            )
        return float(seconds)
    text = value.strip() if isinstance(value, str) else ""
    pieces = _DURATION.findall(text)
    if not pieces or "".join(number + unit for number, unit in pieces) != text:
        raise ConfigError(f"not a duration: {value!r}", hint='write it with a unit, e.g. "30s" or "1m30s"')
    return float(sum(float(number) * _SECONDS[unit] for number, unit in pieces))


def format_duration(seconds: float) -> str:
    """``90.0`` as ``"1m30s"``, ``0.0042`` as ``"4.2 ms"``."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
