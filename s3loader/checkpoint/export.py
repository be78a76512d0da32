"""Comparing checkpoints, and writing one as a single plain safetensors file."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from s3loader.arguments import checked
from s3loader.checkpoint.checkpoint import Checkpoint
from s3loader.checkpoint.format import segments
from s3loader.checkpoint.format.records import Chunk, box_of
from s3loader.checkpoint.state import tree
from s3loader.dtypes import nbytes
from s3loader.errors import CheckpointError
from s3loader.fetch.safetensors import encode_header
from s3loader.store import open_store
from s3loader.types import Location, ObjectURL

__all__ = ["Difference", "diff", "export_safetensors"]


@dataclass(slots=True)
class Difference:
    """What differs between two checkpoints; names of tensors, and of values as ``item/path``."""

    only_in_first: list[str] = field(default_factory=list)
    only_in_second: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    """Another type or shape."""
    changed: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    """Equal checksums."""
    values: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """What is no tensor, and differs."""


@checked
def diff(first: Checkpoint, second: Checkpoint) -> Difference:
    """Compare two checkpoints by their indexes: no tensor is read."""
    found = Difference()
    left, right = set(first), set(second)
    found.only_in_first, found.only_in_second = sorted(left - right), sorted(right - left)
    for name in sorted(left & right):
        one, other = first.chunks(name), second.chunks(name)
        if (one[0].dtype, one[0].shape) != (other[0].dtype, other[0].shape):
            found.reshaped.append(name)
        else:
            equal = _contents(one, first.block) == _contents(other, second.block)
            (found.same if equal else found.changed).append(name)
    a, b = dict(_values(first.tree, "")), dict(_values(second.tree, ""))
    found.values = {
        name: (a.get(name), b.get(name)) for name in [*a, *(n for n in b if n not in a)] if a.get(name) != b.get(name)
    }
    return found


def _contents(chunks: Sequence[Chunk], block: int) -> list[tuple[Any, ...]]:
    """Boxes and their CRC32C, which does not depend on where in a file they lie."""
    from awscrt.checksums import combine_crc32c

    told: list[tuple[Any, ...]] = []
    for chunk in chunks:
        crc = 0
        for number, (low, high) in enumerate(segments.cut(chunk.begin, chunk.end, block)):
            crc = combine_crc32c(crc, struct.unpack_from("<I", chunk.crc, 4 * number)[0], high - low)
        told.append((*box_of(chunk), crc))
    return sorted(told)


def _values(node: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(node, dict) and node.get("$") == "leaf":
        return []
    inside = list(tree.children(node, name))
    if not inside:
        return [(name, node)]
    return [pair for _, inner, item in inside for pair in _values(item, inner)]


@checked
def export_safetensors(checkpoint: Checkpoint, url: Location, *, item: str | None = None, **store_options: Any) -> int:
    """Write a checkpoint's tensors as one safetensors file that needs nothing of s3loader to be read.

    Args:
        checkpoint: Which.
        url: The file: a path or URL.
        item: Only the tensors of this item (``"model"``), under their names in it; all, under their full names, by default.
        store_options: Passed on to `open_store` for `url`.

    Returns:
        Bytes written.

    Raises:
        CheckpointError: there are no such tensors.
    """
    prefix = "" if item is None else tree.child_name("", item) + "/"
    names = {name: _short(name, prefix) for name in checkpoint if name.startswith(prefix)}
    if not names:
        raise CheckpointError(
            f"step {checkpoint.step} has no tensors{'' if item is None else f' in {item!r}'}",
            hint=f"its items: {', '.join(checkpoint.items)}",
        )
    shapes = [(short, checkpoint.chunks(name)[0].dtype, checkpoint.chunks(name)[0].shape) for name, short in names.items()]
    header, spans = encode_header(shapes, {"format": "pt", "s3loader_step": str(checkpoint.step)})
    folder, key = ObjectURL.parse(url).split()
    with open_store(folder, **store_options) as store, store.multipart(key) as writer:
        writer.write(header)
        for name, (_, dtype, shape) in zip(names, shapes, strict=True):
            if nbytes(dtype, shape):
                writer.write(memoryview(checkpoint.tensor(name).reshape(-1).view("u1")))
    return spans[-1][1]


def _short(name: str, prefix: str) -> str:
    return "/".join(tree.split_name(name.removeprefix(prefix))) if prefix else name
