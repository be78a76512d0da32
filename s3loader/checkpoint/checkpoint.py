"""One committed checkpoint, read lazily: an index in memory, tensors fetched when they are asked for."""

from __future__ import annotations

import contextlib
import math
import operator
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from s3loader.arguments import checked
from s3loader.checkpoint.error_context import with_error_context
from s3loader.checkpoint.format import layout
from s3loader.checkpoint.format.records import Chunk
from s3loader.checkpoint.protocol.latest import read_index
from s3loader.checkpoint.protocol.roots import Root
from s3loader.checkpoint.protocol.run import Run
from s3loader.checkpoint.reading.fitting import Fit, Fitting, Restored, with_way_out
from s3loader.checkpoint.reading.restoring import Restoration
from s3loader.checkpoint.reading.share import NodeShare
from s3loader.checkpoint.reading.targets import DISTANT, LEAST_READ, MOST_READS, DataFile, read_targets, verify_chunks
from s3loader.checkpoint.state import tree
from s3loader.checkpoint.state.leaves import NUMPY, Piece, Target
from s3loader.checkpoint.threads import at_once
from s3loader.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    FormatError,
    IntegrityError,
    ObjectNotFoundError,
    S3LoaderError,
)
from s3loader.progress import Report, ShowProgress, showing
from s3loader.types import ObjectMeta
from s3loader.units import MIB

__all__ = ["Checkpoint", "TensorSlice"]

_AHEAD_FILES: Final = 16
_AHEAD_BYTES: Final = 2 * MIB
"""What a connection of 90 MB/s gives in the time of a distant store's first byte."""


@checked
class Checkpoint:
    """A committed step. Reading verifies every byte against the checksums made when it was saved.

    Args:
        run: Where.
        root: Its root; `Checkpoint` makes sure that every file of it is there, with its size.
        share: Reads once per node.
        ahead: Whether all of it is going to be read, so that small data files are asked for together with the index.

    Raises:
        CheckpointError: the root or index is damaged, or files are missing.
    """

    @property
    def _where(self) -> str:
        return self._run.store.url

    def __init__(self, run: Run, root: Root, share: NodeShare | None = None, *, ahead: bool = False) -> None:
        if root.state != "committed":
            raise CheckpointError(
                root.problem or f"step {root.step} is not committed",
                url=run.store.url,
                hint="`s3loader ckpt ls` lists what there is",
            )
        self._run, self._root, self._share = run, root, share
        key = root.keys[layout.INDEX][0]
        folders = {key.rpartition("/")[0] + "/" for key, _ in root.keys.values()}
        listed: dict[str, ObjectMeta] = {}
        self._ahead: dict[str, tuple[str, memoryview]] = {}
        """Data files that came with the index: ETag and bytes by key."""
        self._latency = run.latency
        """Seconds that a listing took, which moves few bytes."""
        if ahead and share is None and DISTANT <= run.latency < math.inf:
            size = sum(size for _, size in root.keys.values())
            run.store.open_ahead(min(MOST_READS, size // LEAST_READ))
        try:
            index, *_ = at_once(
                lambda: read_index(run, root),
                *(partial(self._list, folder, listed) for folder in folders),
                *(partial(self._read_ahead, *each) for each in (_small(root) if ahead and share is None else ())),
            )
        except (FormatError, CheckpointError, IntegrityError) as error:
            raise CheckpointError(
                error.message,
                url=f"{run.store.url}/{key}",
                hint="restore(on_corruption='previous') goes back a step; `s3loader ckpt verify --all` checks each",
            ) from error
        if index is None:
            raise self._gone(key)
        self._index = index
        self._files = self._structure(listed)
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        for chunk in index.chunks:
            chunks[chunk.name].append(chunk)
        self._chunks: Mapping[str, Sequence[Chunk]] = chunks

    def _list(self, folder: str, listed: dict[str, ObjectMeta]) -> None:
        began = time.monotonic()
        listed.update({e.key: e for e in self._run.store.list(folder) if isinstance(e, ObjectMeta)})
        self._latency = self._run.latency = min(self._latency, time.monotonic() - began)

    def _read_ahead(self, key: str, size: int) -> None:
        with contextlib.suppress(S3LoaderError):  # who needs it reads it, and meets what is wrong
            meta, data = self._run.store.backend.get(key)
            if len(data) == size:
                self._ahead[key] = meta.etag, memoryview(data)

    def _structure(self, listed: Mapping[str, ObjectMeta]) -> dict[str, DataFile]:
        """Every data file by its id, as it is now."""
        files = {}
        for record in self._index.files:
            key, size = self._root.keys.get(record.id, ("", -1))
            meta = listed.get(key)
            if meta is None:
                raise self._gone(key or record.id)
            if not meta.size == size == record.size:
                raise CheckpointError(
                    f"{key} has {meta.size} bytes, {record.size} were saved",
                    url=f"{self._run.store.url}/{key}",
                    hint="restore(on_corruption='previous') goes back a step; `s3loader ckpt verify --all` checks each",
                )
            files[record.id] = DataFile(key, meta.etag)
        return files

    def _gone(self, key: str) -> CheckpointError:
        now = self._run.roots.read(self.step)
        if now.state in ("absent", "tombstone"):
            return CheckpointNotFoundError(
                f"step {self.step} was deleted while it was read",
                url=self._run.store.url,
                hint="restore the newest step again; keep=LatestN(2) leaves readers time",
            )
        return CheckpointError(
            f"step {self.step} is incomplete: {key} is missing",
            url=f"{self._run.store.url}/{key}",
            hint="files were deleted behind the run's back; restore(on_corruption='previous') goes back a step",
        )

    @property
    def step(self) -> int:
        """Its step."""
        return self._root.step

    @property
    def info(self) -> Mapping[str, Any]:
        """``step epoch attempt world time items tensors bytes written metrics metadata refs run`` of the commit."""
        return self._root.facts

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics given to `save`."""
        return dict(self._root.facts.get("metrics") or {})

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata given to `save`."""
        return dict(self._root.facts.get("metadata") or {})

    @property
    def items(self) -> list[str]:
        """Names of the items."""
        return [str(key) for key, _, _ in tree.children(self._index.tree, "")]

    @property
    def tree(self) -> Any:
        """The items as JSON: each container with its kind and children, each leaf with the name of its tensor."""
        return self._index.tree

    @property
    def block(self) -> int:
        """Bytes of a checksum block."""
        return self._index.block

    def files(self) -> dict[str, int]:
        """Key and bytes of every object of it."""
        return dict(self._root.keys.values())

    def keys(self) -> list[str]:
        """Names of all tensors, in order: ``model/layer.0.weight``."""
        return list(self._chunks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._chunks)

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, name: object) -> bool:
        return name in self._chunks

    @with_error_context("read")
    def chunks(self, name: str) -> Sequence[Chunk]:
        """Where the tensor `name` lies.

        Raises:
            CheckpointError: there is none of that name.
        """
        if name not in self._chunks:
            raise CheckpointError(
                f"step {self.step} has no tensor {name!r}", url=self._run.store.url, hint="keys() lists what it has"
            )
        return self._chunks[name]

    @with_error_context("read")
    def tensor(self, name: str) -> Any:
        """The tensor `name` as a numpy array."""
        return self.get_slice(name)[...]

    def __getitem__(self, name: str) -> Any:
        return self.tensor(name)

    @with_error_context("read")
    def get_slice(self, name: str) -> TensorSlice:
        """A view of the tensor `name` that reads what it is indexed with, as `safetensors` has it."""
        return TensorSlice(self, name)

    @with_error_context("read")
    def read(self, wanted: Iterable[tuple[str, Target]], *, verify: bool = True) -> dict[str, Any]:
        """Read tensors (or boxes of them) into targets, all in one plan; returns their values by name."""
        values: dict[str, Any] = {}
        self._read(
            ((self.chunks(name), target, lambda value, name=name: values.__setitem__(name, value)) for name, target in wanted),
            verify=verify,
        )
        return values

    def _read(self, wanted: Any, *, verify: bool = True, report: Report | None = None) -> int:
        store, block = self._run.store, self._index.block
        ahead, self._ahead = self._ahead, {}
        known = {key: data for key, (etag, data) in ahead.items() if etag and DataFile(key, etag) in self._files.values()}
        try:
            return read_targets(
                store,
                self._files,
                block,
                wanted,
                verify=verify,
                share=self._share,
                report=report,
                known=known,
                latency=self._latency,
            )
        except ObjectNotFoundError as error:
            raise self._gone("a file of it") from error

    @with_error_context("restore")
    def restore(
        self,
        target: Any = None,
        *,
        items: Sequence[str] | None = None,
        verify: bool = True,
        rank: int = 0,
        strict: bool = True,
        assign: bool = False,
        strip: bool | str | Sequence[str] = False,
        convert: bool = False,
        fresh: Callable[[str, str, tuple[int, ...]], Target] | None = None,
        progress: ShowProgress = None,
    ) -> dict[str, Any]:
        """The items, or those named; into `target` where it has something of that name.

        Args:
            target: Items to restore into, by name: arrays are filled in place, objects with state get it loaded. Only the
                items it names are read. What is not in it is made anew, as the kind it was saved from.
            items: Names of the items to restore.
            verify: Compare checksums.
            rank: Whose part of a `PerRank`.
            strict: Where False, what the target has and the checkpoint lacks stays as it is, and what a module lacks is not
                read. The result is a `Restored` then, which lists both.
            assign: Modules take the tensors read for their own, as ``load_state_dict(assign=True)``: also on the meta device,
                and with the types that were saved.
            strip: What a wrapper has put before the names in a module's state, on either side: ``"module."``, several, or True
                for those of DDP, ``torch.compile``, FSDP and activation checkpointing. Names that match as they are do.
            convert: Convert to the element type of a target's array or tensor, where that is of the same kind or a wider one
                (float64 to bfloat16, int to float; not float to int). Modules do so always.
            fresh: Makes the target of a leaf that `target` lacks, from its kind, type and shape.
            progress: True shows on stderr how far it is: a bar on a terminal, else a line a minute; of rank 0. A function is
                called with bytes read, of how many, and again bytes read.

        Returns:
            A dict of the items. What `target` has is filled in place and returned itself. With ``strict=False`` a `Restored`.

        Raises:
            IntegrityError: bytes are not what was saved.
            CheckpointError: an item or a part of the target is not in the checkpoint, or of another shape or type.
        """
        node = self._index.tree
        fit = Fit(strict, assign, strip)
        names = self.items
        for name in [*(items or ()), *(target or () if strict else ())]:
            if name not in names:
                raise CheckpointError(
                    f"step {self.step} has no item {name!r} (it has {', '.join(names)})",
                    url=self._run.store.url,
                    hint="items= takes names that were given to save; `s3loader ckpt inspect` lists them",
                )
        picked = set(items) if items is not None else set(target) if target is not None else set(names)
        if isinstance(node["of"], dict):
            node = {**node, "of": {key: child for key, child in node["of"].items() if key in picked}}
        else:
            node = {**node, "of": [pair for pair in node["of"] if pair[0] in picked]}
        if fit.exact:
            return self._restored(node, target, verify, rank, fresh, convert, progress)
        fitting = Fitting(node, self._chunks, target, fit)
        found = self._restored(fitting.node, fitting.target, verify, rank, fresh, convert, progress)
        result: dict[str, Any] = fitting.finish(found)
        if strict:
            return result
        loose = Restored(result)
        loose.missing, loose.unexpected = fitting.missing, fitting.unexpected
        return loose

    def _restored(
        self,
        node: Any,
        target: Any,
        verify: bool,
        rank: int,
        fresh: Callable[[str, str, tuple[int, ...]], Target] | None,
        convert: bool,
        progress: ShowProgress,
    ) -> dict[str, Any]:
        work = Restoration(node, self._chunks, target, rank=rank, fresh=fresh, convert=convert)
        with showing(progress, f"restore {self.step}", "bytes", first=rank == 0) as report:
            self._read(work.wanted, verify=verify, report=report)
        try:
            return dict(work.value())
        except CheckpointError as error:
            raise with_way_out(error, node, target) from error.__cause__

    @with_error_context("verify")
    def verify(self) -> list[IntegrityError]:
        """Read every tensor and every header and compare checksums; returns what is wrong."""
        headers = [
            Chunk(name="(header)", dtype="U8", shape=[f.header], file=f.id, begin=0, end=f.header, crc=f.crc)
            for f in self._index.files
        ]
        try:
            return verify_chunks(self._run.store, self._files, self._index.block, [*headers, *self._index.chunks])[1]
        except ObjectNotFoundError as error:
            raise self._gone("a file of it") from error

    def __repr__(self) -> str:
        return f"Checkpoint({self._run.store.url!r}, step={self.step}, {len(self)} tensors)"


def _small(root: Root) -> list[tuple[str, int]]:
    """Key and size of the data files, where all of them together are small."""
    files = [found for name, found in root.keys.items() if name.endswith(".safetensors")]
    return files if len(files) <= _AHEAD_FILES and sum(size for _, size in files) <= _AHEAD_BYTES else []


class TensorSlice:
    """A tensor in a store; index it with integers and slices of step 1, get a numpy array."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        first = checkpoint.chunks(name)[0]
        self._checkpoint, self._name = checkpoint, name
        self.dtype = first.dtype
        self.shape = tuple(first.shape)

    def get_shape(self) -> list[int]:
        """Its shape, as `safetensors` has it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Its type, as `safetensors` has it: ``F32``."""
        return self.dtype

    def __getitem__(self, index: Any) -> Any:
        import numpy as np

        parts = index if isinstance(index, tuple) else (index,)
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            parts = parts[:at] + (slice(None),) * (len(self.shape) - len(parts) + 1) + parts[at + 1 :]
        if len(parts) > len(self.shape):
            raise IndexError(f"{self._name!r} has {len(self.shape)} dimensions, not {len(parts)}")
        parts += (slice(None),) * (len(self.shape) - len(parts))
        spans = [_span(part, size) for part, size in zip(parts, self.shape, strict=True)]
        shape = tuple(high - low for low, high in spans)
        fresh = NUMPY.fresh(self.dtype, shape)
        piece = Piece(tuple(low for low, _ in spans), shape, fresh.pieces[0].open)
        array = self._checkpoint.read([(self._name, Target(self.dtype, self.shape, [piece], fresh.finish))])[self._name]
        kept = tuple(0 if not isinstance(part, slice) else slice(None) for part in parts)
        return array[kept] if any(k == 0 for k in kept if not isinstance(k, slice)) else np.asarray(array)


def _span(part: Any, size: int) -> tuple[int, int]:
    if isinstance(part, slice):
        low, high, step = part.indices(size)
        if step != 1:
            raise IndexError("only slices of step 1 are read")
        return low, max(low, high)
    if isinstance(part, bool):
        raise IndexError("a slice of a tensor is read by integers and slices, not by booleans")
    at = operator.index(part)
    if not -size <= at < size:
        raise IndexError(f"index {at} of a dimension of {size}")
    return at % size, at % size + 1
