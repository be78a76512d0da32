"""The publisher's work, without I/O: parts of all ranks become an index and the facts of the root.

A pure function of the parts, so that several publishers of one attempt write equal bytes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import zstandard

from s3loader.checkpoint.format import boxes, layout, records
from s3loader.checkpoint.format.records import Chunk, Index, Part, box_of
from s3loader.checkpoint.protocol import roots
from s3loader.checkpoint.state import tree
from s3loader.errors import CheckpointError, FencedError, FormatError, IncompleteCheckpointError
from s3loader.exchange.lines import file_entry
from s3loader.exchange.types import FileEntry
from s3loader.shard.compression import unpack

__all__ = ["Merged", "is_index", "unpack_index"]

_MAX_INDEX = 4 << 30


class Merged:
    """What the parts amount to.

    Args:
        parts: Of all ranks, in their order.
        join: Makes one tree of the ranks' trees; by default they must be equal, but for what is per rank.

    Raises:
        CheckpointError: they contradict each other, or leave gaps.
        FencedError: the step's root changed while ranks began, so files of the early ones may be on the way out.
    """

    def __init__(self, parts: Sequence[Part], join: Callable[[list[Any]], Any] | None = None) -> None:
        first = parts[0]
        for part in parts:
            told = (part.step, part.epoch, part.attempt, part.world, part.block)
            if told != (first.step, first.epoch, first.attempt, first.world, first.block):
                raise CheckpointError(
                    f"rank {part.rank} saved {told}, rank {first.rank} {(first.step, first.epoch, first.attempt)}",
                    hint="every rank must save the same steps in the same order, with the same CheckpointOptions",
                )
        expected = {part.expects for part in parts} - {""}
        if len(expected) > 1:
            raise FencedError(
                f"step {first.step} was collected or deleted between the begin of one rank's save and another's",
                hint="save it again; a grace time of garbage collection that is longer than any save avoids this",
            )
        have = {part.rank for part in parts}
        missing = list(itertools.islice((rank for rank in range(first.world) if rank not in have), 1000))
        if missing:
            raise IncompleteCheckpointError(
                f"step {first.step}: parts of ranks {missing} are missing",
                missing=missing,
                hint="see what these ranks raised; save again",
            )
        self.first = first
        chunks = [chunk for part in parts for chunk in part.chunks]
        _check_replicas(parts, chunks)
        _check_tiling(chunks)
        files = {file.id: file for part in parts for file in part.files}
        self.index = Index(
            format=records.FORMAT,
            step=first.step,
            attempt=first.attempt,
            world=first.world,
            block=first.block,
            files=[files[name] for name in sorted(files)],
            chunks=sorted(chunks, key=lambda c: (c.name, box_of(c)[0])),
            tree=(join or _merge_trees)([part.tree for part in parts]),
        )
        _check_leaves(self.index)
        self.packed = zstandard.ZstdCompressor(level=3).compress(records.encode(self.index))

    def entries(
        self, run: str, sizes: Mapping[str, tuple[int, str]], was: Sequence[str], taken: Collection[str] = ()
    ) -> list[FileEntry]:
        """Lines of the root.

        Args:
            run: Id of the run.
            sizes: Size and ETag, as the store lists them, of every part and data file by its key.
            was: Attempts that were committed at this step before.
            taken: Files that an earlier attempt at this step began, and this one goes on with.
        """
        first, index = self.first, self.index
        prefix = layout.step_prefix(first.step) + first.attempt + "/"
        own = [file.id for file in index.files if "/" not in file.id]
        refs = [file.id for file in index.files if "/" in file.id]
        others = []
        for name in [*(layout.part_id(rank) for rank in range(first.world)), *own, *refs]:
            key = name if "/" in name else prefix + name
            size, etag = sizes[key]
            content = "application/octet-stream" if name.endswith(".safetensors") else "application/json"
            others.append(file_entry(key, name, None, content, size, etag))
        facts = {
            "run": run,
            "step": first.step,
            "epoch": first.epoch,
            "attempt": first.attempt,
            "was": list(was),
            "world": first.world,
            "time": first.time,
            "items": sorted(key for key, _, _ in tree.children(index.tree, "")),
            "tensors": len({chunk.name for chunk in index.chunks}),
            "bytes": sum(chunk.end - chunk.begin for chunk in index.chunks),
            "written": sum(file.size for file in index.files if "/" not in file.id or file.id in taken),
            "metrics": first.metrics,
            "metadata": first.metadata,
            "index": hashlib.sha256(self.packed).hexdigest(),
            "refs": sorted({at.step for name in refs if name not in taken and (at := layout.parse_key(name)) is not None}),
        }
        entry = file_entry(prefix + layout.INDEX, layout.INDEX, None, "application/zstd", len(self.packed), None)
        return roots.committed_entries(facts, entry, others)


def is_index(facts: Mapping[str, Any], data: bytes) -> bool:
    """Whether `data` is the index that the root with these facts was committed with."""
    return hashlib.sha256(data).hexdigest() == str(facts["index"])


def unpack_index(data: bytes, facts: Mapping[str, Any], where: str) -> Index:
    """The index in `data`, which must be the one the root was committed with.

    Raises:
        CheckpointError: it is not.
    """
    if not is_index(facts, data):
        raise CheckpointError(
            f"{where} is not the index that was committed",
            hint="restore(on_corruption='previous') goes back a step; `s3loader ckpt verify --all` checks each",
        )
    try:
        text = unpack(data, at_most=_MAX_INDEX)
    except FormatError as error:
        raise FormatError(f"{where} is no zstd frame of an index: {error.message}", hint=error.hint) from error
    return records.decode(text, Index, where)


def _check_tiling(chunks: Sequence[Chunk]) -> None:
    by_name: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        by_name[chunk.name].append(chunk)
    for name, group in by_name.items():
        first = group[0]
        if any((c.dtype, c.shape) != (first.dtype, first.shape) for c in group):
            raise CheckpointError(
                f"{name!r} has different types or shapes on different ranks",
                hint="save the same type on every rank; ArrayShard(piece, offset, shape) for parts of one array",
            )
        problem = boxes.problem_in_tiling(first.shape, [box_of(chunk) for chunk in group])
        if problem:
            raise CheckpointError(
                f"{name!r} {first.shape} is not whole: {problem}",
                hint="the pieces of all ranks must tile the array: no gap, no overlap",
            )


def _check_replicas(parts: Sequence[Part], chunks: Sequence[Chunk]) -> None:
    saved = {(chunk.name, box_of(chunk)): chunk for chunk in chunks}
    for part in parts:
        for replica in part.replicas:
            chunk = saved.get((replica.name, box_of(replica)))
            if chunk is None or chunk.hash != replica.hash:
                what = "was saved by no rank" if chunk is None else "is not the same on all ranks"
                raise CheckpointError(
                    f"{replica.name!r} {what}, rank {part.rank} says",
                    hint="wrap what differs between ranks in PerRank(...)",
                )


def _merge_trees(trees: Sequence[Any]) -> Any:
    merged = trees[0]
    for rank, other in enumerate(trees[1:], 1):
        merged = _merge(merged, other, "", rank)
    return merged


def _merge(one: Any, other: Any, name: str, rank: int) -> Any:
    """Two ranks' trees: equal, but for the children of a ``per_rank`` node."""
    if one == other:
        return one
    if isinstance(one, dict) and isinstance(other, dict) and one.get("$") == other.get("$"):
        if one.get("$") == "per_rank":
            return {"$": "per_rank", "of": {**one["of"], **other["of"]}}
        left, right = one.get("of"), other.get("of")
        if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
            merged = {key: _merge(left[key], right[key], tree.child_name(name, key), rank) for key in left}
            return {**one, "of": merged}
        if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
            return {
                **one,
                "of": [_merge(a, b, tree.child_name(name, i), rank) for i, (a, b) in enumerate(zip(left, right, strict=True))],
            }
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [_merge(a, b, tree.child_name(name, i), rank) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    raise CheckpointError(
        f"{_first_difference(one, other, name)!r} is not the same on rank 0 and rank {rank}",
        hint="wrap what differs between ranks in PerRank(...)",
    )


def _first_difference(one: Any, other: Any, name: str) -> str:
    left = {str(key): (inner, node) for key, inner, node in tree.children(one, name)}
    right = {str(key): (inner, node) for key, inner, node in tree.children(other, name)}
    for key in [*left, *right]:
        if key not in left or key not in right:
            return (left.get(key) or right[key])[0]
        if left[key][1] != right[key][1]:
            return _first_difference(left[key][1], right[key][1], left[key][0])
    return name


def _check_leaves(index: Index) -> None:
    have = {chunk.name for chunk in index.chunks}
    need = {name for name, _ in tree.leaf_names(index.tree)}
    if have != need:
        raise CheckpointError(
            f"the items and the saved tensors differ: {sorted(have ^ need)[:5]}",
            hint="every rank must save the same items; wrap what differs between ranks in PerRank(...)",
        )
