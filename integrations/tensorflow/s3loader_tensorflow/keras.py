"""Keras: the callback that counts what `fit` has trained on."""

from __future__ import annotations

from typing import Any

import keras

from s3loader_tensorflow.dataset import S3TFLoader

__all__ = ["S3StateCallback"]


class S3StateCallback(keras.callbacks.Callback):  # type: ignore[misc]  # keras ships no types
    """Counts the batches `fit` has finished, so that `state_dict` is exact whatever tf.data has prefetched.

    Args:
        loader: The loader whose dataset `fit` runs on.
    """

    def __init__(self, loader: S3TFLoader) -> None:
        super().__init__()
        self._loader = loader
        self.batches = 0
        """Batches trained since the loader's state began."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Keras calls this."""
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        """The loader's state after the last finished batch."""
        return self._loader.state_dict(self.batches)
