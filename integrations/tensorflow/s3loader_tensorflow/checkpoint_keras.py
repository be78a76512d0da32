"""Keras: a callback that backs up the whole training state in one commit, and goes on from the exact batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import keras

from s3loader import CheckpointManager, CheckpointOptions, ConfigError, KeepPolicy, LatestN, SaveHandle
from s3loader.adapters import checked
from s3loader_tensorflow.dataset import S3TFLoader

__all__ = ["S3BackupAndRestore"]


class S3BackupAndRestore(keras.callbacks.Callback):  # type: ignore[misc]  # keras ships no types
    """As Keras's `BackupAndRestore`, but atomic, asynchronous, verified, and exact to the batch.

        backup = S3BackupAndRestore("s3://bucket/run", loader=loader, save_freq=100)
        backup.restore(model)
        backup.fit(model, epochs=10)

    Weights, optimizer, the loader's position and the counters go into one commit. An error of a background save is raised
    by the next one, or at the end of training.

    Args:
        backup_dir: Folder of the run in a store; a `CheckpointManager` is used as it is.
        save_freq: ``"epoch"``, or a number of batches.
        loader: The `S3TFLoader` whose dataset `fit` runs on. Without one, `batch` says how many batches of the epoch were
            done: ``dataset.skip(backup.batch)`` for that epoch.
        keep: Which backups to keep.
        delete_checkpoint: Delete them when training has ended well.
        options: A `CheckpointOptions`: budgets in bytes, concurrency, deadlines in seconds; default: its defaults.
        store_options: Passed on to `open_store`.
    """

    @checked
    def __init__(
        self,
        backup_dir: str | os.PathLike[str] | CheckpointManager,
        *,
        save_freq: Literal["epoch"] | int = "epoch",
        loader: S3TFLoader | None = None,
        keep: KeepPolicy | None = None,
        delete_checkpoint: bool = False,
        options: CheckpointOptions | None = None,
        **store_options: Any,
    ) -> None:
        super().__init__()
        if save_freq != "epoch" and (not isinstance(save_freq, int) or save_freq < 1):
            raise ConfigError(
                f"save_freq is 'epoch' or a number of batches, not {save_freq!r}",
                hint="save_freq='epoch', or e.g. save_freq=1000",
            )
        self._own = not isinstance(backup_dir, CheckpointManager)
        self.manager = (
            backup_dir
            if isinstance(backup_dir, CheckpointManager)
            else CheckpointManager(backup_dir, keep=keep or LatestN(2), options=options, **store_options)
        )
        self._save_freq, self._loader, self._delete = save_freq, loader, delete_checkpoint
        self.epoch = 0
        """The epoch to go on with."""
        self.batch = 0
        """Batches of it that were trained."""
        self.step = 0
        """Batches trained in all."""
        self._given = 0
        self._since = 0
        self._last = -1
        self._partial = False
        self._steps: int | None = None
        self._handle: SaveHandle | None = None

    def restore(self, model: Any) -> bool:
        """Restore `model` (built and compiled), the loader and the counters; returns whether there was a backup.

        Call it before the loader's dataset is made.
        """
        latest = self.manager.latest()
        if latest is None:
            return False
        if getattr(model, "optimizer", None) is None:
            raise ConfigError("the model has no optimizer to restore", hint="model.compile(...) before restore(model)")
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self.manager.restore(latest, {"model": model, "optimizer": model.optimizer})
        rest = self.manager.restore(latest, items=["loader", "position"])
        self.epoch, self.batch, self.step = (rest["position"][name] for name in ("epoch", "batch", "step"))
        if self._loader is not None and rest["loader"] is not None:
            self._loader.load_state_dict(rest["loader"])
            if self.batch == 0:
                self._loader.set_epoch(self.epoch)
        return True

    def fit(self, model: Any, epochs: int, *, callbacks: Sequence[Any] = (), **options: Any) -> Any:
        """``model.fit`` on the loader's dataset, from where `restore` has put it, up to `epochs`; returns the last history.

        The rest of an epoch gets a ``fit`` of its own, since Keras cuts all epochs to the length of the first.

        Args:
            model: The model that was restored.
            epochs: The epoch to end with, as in ``fit``.
            callbacks: More of them.
            options: Passed on to ``fit``.

        Raises:
            ConfigError: there is no loader.
        """
        if self._loader is None:
            raise ConfigError("fit needs the loader", hint="S3BackupAndRestore(..., loader=...)")
        history: Any = None
        while self.epoch < epochs:
            self._partial = bool(self.batch) and self.epoch + 1 < epochs
            until = self.epoch + 1 if self._partial else epochs
            both = [self, *callbacks]
            history = model.fit(
                self._loader.dataset(), initial_epoch=self.epoch, epochs=until, shuffle=False, callbacks=both, **options
            )
        return history

    def on_train_begin(self, logs: Any = None) -> None:
        """Keras calls this."""
        params: Any = self.params
        steps = params.get("steps")
        self._steps = self.batch + steps if steps else None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Keras calls this (once for several batches where ``steps_per_execution`` is more than one)."""
        done = batch - self._last
        self._last = batch
        self.batch, self.step, self._given, self._since = (
            self.batch + done,
            self.step + done,
            self._given + done,
            self._since + done,
        )
        if isinstance(self._save_freq, int) and self._since >= self._save_freq:
            self._save()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Keras calls this."""
        self._last = -1
        if epoch != self.epoch:
            self.epoch, self.batch = epoch, 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Keras calls this."""
        self.epoch, self.batch = epoch + 1, 0
        if self._save_freq == "epoch":
            self._save()

    def _save(self) -> None:
        self._since = 0
        if self._handle is not None and not self._handle.done:
            self._handle.result()  # one at a time: training waits for a store that is slower than it
        loader = self._loader.state_dict(self._given) if self._loader is not None else None
        over = self._steps is not None and self.batch >= self._steps
        position = {"epoch": self.epoch + over, "batch": 0 if over else self.batch, "step": self.step}
        model: Any = self.model
        items = {"model": model, "optimizer": model.optimizer, "loader": loader, "position": position}
        self._handle = self.manager.save(self.step, items, on_exists="replace")

    def on_train_end(self, logs: Any = None) -> None:
        """Keras calls this: wait for the last backup."""
        self.manager.wait()
        if self._delete and not self._partial:
            for step in self.manager.steps():
                self.manager.delete(step)

    def close(self) -> None:
        """Wait for the last backup and let go of the store."""
        if self._own:
            self.manager.close()
