"""Lightning: checkpoints of a `Trainer` as s3loader's, atomic and verified, without pickle.

Needs ``lightning`` (or ``pytorch_lightning``); `s3loader.torch` does not import it.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from s3loader import CheckpointError, ConfigError, ObjectURL, open_store
from s3loader.adapters import checked, load, save
from s3loader_torch.compat import manager_keywords, store_keywords

if TYPE_CHECKING:
    from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
else:
    try:
        from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
    except ImportError:
        from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO

__all__ = ["S3CheckpointIO"]

_Module = TypeVar("_Module")


class S3CheckpointIO(CheckpointIO):  # type: ignore[misc]  # Lightning is not installed where types are checked
    """``Trainer(plugins=[S3CheckpointIO(endpoint_url=...)])``: every checkpoint path is a folder in a store.

    Args:
        region: AWS region.
        endpoint: URL of another S3-compatible store, as s3torchconnector calls it; `endpoint_url` is the same.
        s3client_config: An `S3ClientConfig` of s3torchconnector.
        store_options: Passed on to `open_store`.

    Raises:
        ConfigError: an option that `open_store` does not know.
    """

    @checked
    def __init__(
        self, region: str | None = None, endpoint: str | None = None, s3client_config: Any = None, **store_options: Any
    ) -> None:
        words = {"endpoint": endpoint, "s3client_config": s3client_config, **store_options}
        self._options = manager_keywords(type(self).__name__, region, words)
        self._store_options = store_keywords(type(self).__name__, region, words)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        """Save; returns when it is committed. Lightning calls it on one rank, with all of the state.

        Raises:
            UnsupportedStateError: a callback or hyperparameter holds something that only pickle could save.
            ConfigError: `storage_options` are given.
        """
        if storage_options is not None:
            raise ConfigError(
                "storage_options have no meaning here",
                url=os.fspath(path),
                hint="options of the store are given once: S3CheckpointIO(endpoint_url=..., region=...)",
            )
        save(path, checkpoint, rank=0, world_size=1, **self._options)

    def load_from_checkpoint(self, module: type[_Module], path: str | os.PathLike[str], **arguments: Any) -> _Module:
        """What ``Module.load_from_checkpoint(path)`` is for files: a new module, made with its saved hyperparameters.

        Lightning's own does not ask plugins, and finds no file at `path`.

        Args:
            module: The class of a `LightningModule` or `LightningDataModule`.
            path: Of the checkpoint.
            arguments: As for ``load_from_checkpoint``: ``map_location``, ``strict``, ``hparams_file``, hyperparameters.
        """
        made_here = io.BytesIO()
        torch.save(self.load_checkpoint(path), made_here)
        made_here.seek(0)
        loads: Any = module
        if "weights_only" in inspect.signature(loads.load_from_checkpoint).parameters:
            arguments.setdefault("weights_only", False)  # these are our own bytes
        loaded: _Module = loads.load_from_checkpoint(made_here, **arguments)
        return loaded

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
        with open_store(path, **self._store_options) as store:
            keys = [entry.key for entry in store.list()]
            for batch in ([key for key in keys if "/root" in key], keys):
                failures = store.delete_many(batch)
                if failures:
                    raise failures[0].error
        where = ObjectURL.parse(path)
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
