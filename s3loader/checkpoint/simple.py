"""The simple case: one checkpoint at a URL, without a manager."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from s3loader.arguments import checked
from s3loader.checkpoint.checkpoint import Checkpoint
from s3loader.checkpoint.handle import SaveResult
from s3loader.checkpoint.manager import CheckpointManager
from s3loader.checkpoint.protocol.retention import LatestN
from s3loader.progress import ShowProgress
from s3loader.ranks import find_ranks

__all__ = ["OpenCheckpoint", "load", "open_checkpoint", "save"]


@checked
def save(
    url: Any,
    items: Mapping[str, Any],
    *,
    metadata: Mapping[str, Any] | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    progress: ShowProgress = None,
    **store_options: Any,
) -> SaveResult:
    """Save `items` at `url`, in the place of what was saved there before; returns when they are committed.

    The old ones stay readable until the new ones are there: it is saved as the next step of a run that keeps one.

    Args:
        url: A folder in a store.
        items: What to save, by name: arrays, trees of them, objects with state, JSON scalars; as for `CheckpointManager.save`.
        metadata: JSON to keep with them.
        rank: As for `CheckpointManager`: in a job of several processes all of them save together, unless the one that saves
            says ``rank=0, world_size=1``.
        world_size: How many ranks; given with `rank`, or not at all.
        progress: As for `CheckpointManager.save`.
        store_options: Passed on to `open_store`, and to `CheckpointManager`.
    """
    with CheckpointManager(url, keep=LatestN(1), rank=rank, world_size=world_size, **store_options) as manager:
        return manager.save(manager.next_step(), items, metadata=metadata, progress=progress).result()


@checked
def load(
    url: Any,
    target: Mapping[str, Any] | None = None,
    *,
    items: Sequence[str] | None = None,
    step: int | None = None,
    rank: int | None = None,
    strict: bool = True,
    assign: bool = False,
    strip: bool | str | Sequence[str] = False,
    convert: bool = False,
    progress: ShowProgress = None,
    **store_options: Any,
) -> dict[str, Any]:
    """The items saved at `url` (a run's newest step, or `step`), verified.

    Each process looks for itself which step is the newest.

    Args:
        url: A folder in a store.
        target: Items to restore into, by name: arrays are filled in place, objects with state get it loaded. Only the items it
            names are read. What is not in it is made anew, as the kind it was saved from.
        items: Read only these items.
        step: Which step; default: the newest.
        rank: Whose part of a `PerRank`; default: found as `CheckpointManager` finds it.
        strict: Where False, what the target has and the checkpoint lacks stays as it is, and what a module lacks is not
            read. The result is a `Restored` then, which lists both.
        assign: Modules take the tensors read for their own, as ``load_state_dict(assign=True)``: also on the meta device,
            and with the types that were saved.
        strip: What a wrapper has put before the names in a module's state, on either side: ``"module."``, several, or True
            for those of DDP, ``torch.compile``, FSDP and activation checkpointing. Names that match as they are do.
        convert: Convert to the element type of a target's array or tensor, where that is of the same kind or a wider one
            (float64 to bfloat16, int to float; not float to int). Modules do so always.
        progress: As for `CheckpointManager.restore`.
        store_options: Passed on to `open_store`.
    """
    rank = find_ranks().rank if rank is None else rank
    with CheckpointManager(url, rank=0, world_size=1, **store_options) as manager:
        found = manager.open(step)
        return found.restore(
            target, items=items, rank=rank, strict=strict, assign=assign, strip=strip, convert=convert, progress=progress
        )


class OpenCheckpoint(Checkpoint):
    """A `Checkpoint` with a store of its own, let go of by `close` or at the end of a ``with`` block."""

    def __init__(self, manager: CheckpointManager, step: int | None) -> None:
        self._manager = manager
        super().__init__(manager.run, manager.find(step))

    def close(self) -> None:
        """Let go of the store."""
        self._manager.close()

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@checked
def open_checkpoint(url: Any, step: int | None = None, **store_options: Any) -> OpenCheckpoint:
    """A committed step (default: the newest) to be read lazily: ``keys()``, ``tensor(name)``, ``get_slice(name)[a:b]``.

    Args:
        url: Folder of the run.
        step: Which.
        store_options: Passed on to `open_store`.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    manager = CheckpointManager(url, rank=0, world_size=1, **store_options)
    try:
        return OpenCheckpoint(manager, step)
    except BaseException:
        manager.close()
        raise
