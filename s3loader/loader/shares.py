"""What leaving members out saves, seen on some parts of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from s3loader.loader.layout import Layout
from s3loader.loader.pieces import MEMBER_GAP

__all__ = ["Shares"]


class Shares(NamedTuple):
    """Of the bytes of all members."""

    used: float
    fetched: float
    """With those that are read over."""
    splits: float
    """Ranges per sample beyond the first, where the members of a sample lie far apart."""

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> Shares:
        """Those of whole parts that are read from end to end."""
        whole = used = fetched = samples = splits = 0
        for layout in layouts:
            starts, ends = layout.offsets, layout.offsets + layout.sizes
            gaps = starts[1:] - ends[:-1]
            mine = int(np.maximum(layout.sizes, 0).sum())
            samples, used = samples + layout.samples, used + mine
            if layout.index is None:
                whole, fetched = whole + layout.source_bytes, fetched + mine
                continue
            whole += layout.source_bytes
            fetched += mine + int(gaps[gaps <= MEMBER_GAP].sum())
            splits += int((gaps > MEMBER_GAP).sum())
        if not whole:
            return cls(1.0, 1.0, 0.0)
        return cls(min(1.0, used / whole), min(1.0, fetched / whole), splits / max(1, samples))
