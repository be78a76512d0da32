"""Real images to pack: scikit-learn's digits, any class-per-folder directory, or Fashion-MNIST."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
FASHION_MNIST = "train-images-idx3-ubyte.gz"


def write_digits(folder: Path) -> None:
    """Write scikit-learn's 1,797 handwritten digits (8 x 8 pixels) as PNG files, a folder per class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)
    for number, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def images(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """``(class name, file suffix without its dot, encoded image)`` of every image below `folder`."""
    if (folder / FASHION_MNIST).exists():
        yield from _idx_images(folder)
        return
    found = False
    for path in sorted(folder.glob("*/*")):
        if path.suffix.lower() in SUFFIXES:
            found = True
            yield path.parent.name, path.suffix.lower()[1:], path.read_bytes()
    if not found:
        raise SystemExit(f"no images in {folder}: expected CLASS/IMAGE.png (or .jpg ...) below it")


def _idx_images(folder: Path, limit: int = 6000) -> Iterator[tuple[str, str, bytes]]:
    """The first `limit` images of an MNIST-style folder (IDX files, as Debian ships Fashion-MNIST)."""
    with gzip.open(folder / FASHION_MNIST) as file:
        count, height, width = np.frombuffer(file.read(16), ">u4")[1:]
        pixels = np.frombuffer(file.read(), np.uint8).reshape(count, height, width)
    with gzip.open(folder / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read()[8:], np.uint8)
    for image, label in zip(pixels[:limit], labels[:limit], strict=True):
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "png")
        yield str(label), "png", encoded.getvalue()
