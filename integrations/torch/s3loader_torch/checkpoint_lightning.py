"""Lightning: checkpoints of a `Trainer` as s3loader's, atomic and verified, without pickle.

Needs ``lightning`` (or ``pytorch_lightning``); `s3loader.torch` does not import it.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import torch

from s3loader.checkpoint import load, save
from s3loader.errors import CheckpointError
from s3loader.store import open_store
from s3loader.types import ObjectURL

if TYPE_CHECKING:
    from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
else:
    try:
        from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
    except ImportError:
        from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO

__all__ = ["S3CheckpointIO"]


class S3CheckpointIO(CheckpointIO):  # type: ignore[misc]  # Lightning is not installed where types are checked
    """``Trainer(plugins=[S3CheckpointIO(endpoint_url=...)])``: every checkpoint path is a folder in a store.

    Args:
        store_options: Passed on to `open_store`.
    """

    def __init__(self, **store_options: Any) -> None:
        self._options = store_options

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        """Save; returns when it is committed.

        Raises:
            UnsupportedStateError: a callback or hyperparameter holds something that only pickle could save.
        """
        save(path, checkpoint, **self._options)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load; tensors move to `map_location` where it is a device or its name."""
        items = load(path, **self._options)
        if map_location is None or str(map_location) == "cpu":
            return items
        if not isinstance(map_location, str | torch.device):
            raise CheckpointError(
                f"map_location is a device or its name here, not {type(map_location).__name__}",
                hint="map_location='cpu', or a torch.device",
            )
        moved: dict[str, Any] = _move(items, torch.device(map_location))
        return moved

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the whole folder: its roots first, so that nobody finds half of it."""
        with open_store(path, **self._options) as store:
            keys = [entry.key for entry in store.list()]
            for batch in ([key for key in keys if "/root" in key], keys):
                failures = store.delete_many(batch)
                if failures:
                    raise failures[0].error
        where = ObjectURL.parse(os.fspath(path))
        if where.scheme == "file":  # a folder that is left looks like a checkpoint to Lightning
            with contextlib.suppress(OSError):
                os.rmdir(where.key)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_move(item, device) for item in value)
    return value
