"""Sizes and durations as people write them: ``"64MiB"``, ``"1m30s"``."""

from __future__ import annotations

import re
from typing import Final

from s3loader.errors import ConfigError

__all__ = ["GIB", "KIB", "MIB", "format_duration", "format_rate", "format_size", "parse_duration", "parse_size"]

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?\s*", re.IGNORECASE)
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(value: int | str) -> int:
    """Bytes of ``64``, ``"64MiB"``, ``"1.5GB"`` (powers of 1024 with an ``i``, else of 1000).

    Raises:
        ConfigError: it is not a size, or negative.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ConfigError(f"a size cannot be negative: {value}", hint='write bytes as a number, or text such as "64MiB"')
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"not a size: {value!r}", hint='write a number of bytes, or e.g. "64MiB"')
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    return round(float(number) * float(base ** _POWERS[prefix.lower()]))


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
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not value >= 0:
            raise ConfigError(
                f"a duration cannot be negative: {value}", hint='write seconds as a number, or text such as "30s"'
            )
        return float(value)
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
