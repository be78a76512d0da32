"""Keras: the callback that counts what `fit` has trained on."""

from __future__ import annotations

from typing import Any

import keras

from s3loader import ConfigError
from s3loader_tensorflow.dataset import S3TFLoader

__all__ = ["S3StateCallback"]

_HINT = "give the loader the batch_size you train with, or say S3StateCallback(loader, batch_size=samples of a batch)"


class S3StateCallback(keras.callbacks.Callback):  # type: ignore[misc]  # keras ships no types
    """Counts the batches `fit` has finished, so that `state_dict` is exact whatever tf.data has prefetched.

    Keras does not say how many samples a batch has. Where an epoch of `fit` has another number of steps than the loader has
    batches, as after ``unbatch().batch()`` or with ``steps_per_epoch=``, that has to be given.

    Args:
        loader: The loader whose dataset `fit` runs on.
        batch_size: Samples of a batch of `fit`. Default: batches are those of the loader.

    Raises:
        ConfigError: when `fit` begins, or at the end of an epoch: its batches are not the loader's.
    """

    def __init__(self, loader: S3TFLoader, *, batch_size: int | None = None) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        self._loader = loader
        self._batch_size = batch_size
        self.batches = 0
        """Batches trained since the loader's state began."""
        self._before = 0
        """Those of the epochs of `fit` that are over."""
        self._short = 0
        """Samples that the last batches of epochs were short of."""

    @property
    def _steps(self) -> int | None:
        steps: int | None = (self.params or {}).get("steps")
        return steps

    def on_train_begin(self, logs: Any = None) -> None:
        """Keras calls this."""
        steps, expected = self._steps, self._loader.batches_per_pass
        if self._batch_size is None and expected is not None and steps != expected:
            says = "an unknown number of" if steps is None else steps
            raise ConfigError(f"an epoch of fit has {says} steps, a pass of the loader {expected} batches", hint=_HINT)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Keras calls this."""
        self._before = self.batches

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Keras calls this, once in `steps_per_execution` batches: `batch` is the last of them, or would be."""
        steps = self._steps
        self.batches = self._before + (batch + 1 if steps is None else min(batch + 1, steps))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Keras calls this."""
        ran_out = self._steps is None  # fit went on until there was no batch
        batches, samples = self._loader.handed_out(whole_passes=ran_out)
        if self._batch_size is not None:
            self._short = max(self._short, self.batches * self._batch_size - samples)
        elif ran_out:
            if self.batches - self._per_execution < batches < self.batches:
                self.batches = batches
            if self.batches != batches:
                text = f"fit has trained on {self.batches} batches, the loader has handed out {batches}"
                raise ConfigError(text, hint=_HINT)

    @property
    def _per_execution(self) -> int:
        return int(getattr(self.model, "steps_per_execution", 1) or 1)

    def state_dict(self) -> dict[str, Any]:
        """The loader's state after the last finished batch."""
        batches, samples = self._loader.handed_out()
        if self._batch_size is None:  # the last execution may have been short of batches
            ahead = min(max(self.batches - batches, 0), self._per_execution - 1)
            return self._loader.state_dict(self.batches - ahead)
        return self._loader.state_dict(samples=min(self.batches * self._batch_size - self._short, samples))
