"""The simple case: one checkpoint at a URL, without a manager."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from s3loader.checkpoint.checkpoint import Checkpoint
from s3loader.checkpoint.handle import SaveResult
from s3loader.checkpoint.manager import CheckpointManager
from s3loader.checkpoint.protocol.policy import LatestN

__all__ = ["OpenCheckpoint", "load", "open_checkpoint", "save"]


def save(url: Any, items: Mapping[str, Any], *, metadata: Mapping[str, Any] | None = None, **store_options: Any) -> SaveResult:
    """Save `items` at `url`, in the place of what was saved there before; returns when they are committed.

    The old ones stay readable until the new ones are there: it is saved as the next step of a run that keeps one.

    Args:
        url: A folder in a store.
        items: See `CheckpointManager.save`.
        metadata: JSON to keep with them.
        store_options: Passed on to `open_store`.
    """
    with CheckpointManager(url, keep=LatestN(1), **store_options) as manager:
        return manager.save(manager.next_step(), items, metadata=metadata).result()


def load(
    url: Any,
    target: Mapping[str, Any] | None = None,
    *,
    items: Sequence[str] | None = None,
    step: int | None = None,
    **store_options: Any,
) -> dict[str, Any]:
    """The items saved at `url` (a run's newest step, or `step`), verified; see `CheckpointManager.restore`."""
    with CheckpointManager(url, **store_options) as manager:
        return manager.restore(step, target, items=items)


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


def open_checkpoint(url: Any, step: int | None = None, **store_options: Any) -> OpenCheckpoint:
    """A committed step (default: the newest) to be read lazily: ``keys()``, ``tensor(name)``, ``get_slice(name)[a:b]``.

    Args:
        url: Folder of the run.
        step: Which.
        store_options: Passed on to `open_store`.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    manager = CheckpointManager(url, **store_options)
    try:
        return OpenCheckpoint(manager, step)
    except BaseException:
        manager.close()
        raise
