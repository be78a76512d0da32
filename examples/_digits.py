"""Shared by the examples: where the data is, how one sample becomes numbers, and how equality is shown."""

from __future__ import annotations

import argparse
import hashlib
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from s3loader import open_store

FEATURES = 64
CLASSES = 10


def options(description: str | None) -> argparse.Namespace:
    return prepare(parser_of(description).parse_args())


def parser_of(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--url", default="./digits", help="folder or s3://bucket/prefix of the data and the run")
    parser.add_argument("--run", default="run", help="name of the run; its checkpoints are below URL")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--every", type=int, default=15, help="steps between checkpoints")
    parser.add_argument("--kill-at", type=int, default=0, help="SIGKILL this process after that step")
    return parser


def prepare(chosen: argparse.Namespace) -> argparse.Namespace:
    """The data, which is written where there is none."""
    chosen.url = chosen.url.rstrip("/")
    if not open_store(chosen.url).exists("dataset/manifest.jsonl"):
        from examples.demo.data import write_digits
        from examples.demo.pack import pack

        with tempfile.TemporaryDirectory() as folder:
            write_digits(Path(folder))
            pack(chosen.url, Path(folder))
    chosen.manifest = f"{chosen.url}/dataset/manifest.jsonl"
    chosen.run = f"{chosen.url}/runs/{chosen.run}"
    return chosen


def to_arrays(sample: dict[str, Any]) -> tuple[npt.NDArray[np.float32], int]:
    """Pixels (FEATURES,) float32 in [0, 1], and the class."""
    pixels = np.asarray(Image.open(io.BytesIO(sample["png"])), dtype=np.float32)
    return pixels.reshape(FEATURES) / 255, int(bytes(sample["cls"]))


def digest(arrays: Iterable[Any]) -> str:
    """A digest of weights, to compare runs bit for bit."""
    value = hashlib.sha256()
    for array in arrays:
        value.update(np.ascontiguousarray(array).tobytes())
    return value.hexdigest()
