"""TensorFlow and Keras: train with ``fit``, be killed, run the same command again: it goes on with the next sample.

python -m examples.train_tensorflow --url ./digits
"""

from __future__ import annotations

import os
import signal
from typing import Any

import tensorflow as tf

from examples._digits import CLASSES, FEATURES, digest, options, to_arrays
from s3loader import CheckpointManager, LatestN
from s3loader.tensorflow import S3StateCallback, S3TFLoader


class Checkpoint(tf.keras.callbacks.Callback):  # type: ignore[misc]
    """Saves weights, optimizer and position in the data, in one commit, every so many steps."""

    def __init__(self, manager: CheckpointManager, counter: S3StateCallback, every: int, kill_at: int, step: int) -> None:
        super().__init__()
        self.manager, self.counter, self.every, self.kill_at, self.step = manager, counter, every, kill_at, step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.step += 1
        if self.step % self.every == 0:
            items = {"model": self.model, "optimizer": self.model.optimizer, "loader": self.counter.state_dict()}
            self.manager.save(self.step, {**items, "step": self.step}).result()
        if self.step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    chosen = options(__doc__)
    tf.keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()
    model = tf.keras.Sequential(
        [tf.keras.Input((FEATURES,)), tf.keras.layers.Dense(32, activation="relu"), tf.keras.layers.Dense(CLASSES)]
    )
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=tf.keras.optimizers.Adam(1e-2), loss=loss)
    model.optimizer.build(model.trainable_variables)
    loader = S3TFLoader(chosen.manifest, group="webdataset", batch_size=32, seed=1, tail="drop", transform=to_arrays)

    step = first_epoch = 0
    with CheckpointManager(chosen.run, keep=LatestN(2)) as manager:
        if manager.latest() is not None:
            items = manager.restore(target={"model": model, "optimizer": model.optimizer, "loader": None, "step": None})
            loader.load_state_dict(items["loader"])
            step, first_epoch = items["step"], items["loader"]["epoch"]
            print(f"resumed at step {step}")
        for epoch in range(first_epoch, chosen.epochs):
            loader.set_epoch(epoch)
            counter = S3StateCallback(loader)
            saver = Checkpoint(manager, counter, chosen.every, chosen.kill_at, step)
            history = model.fit(loader.dataset(), epochs=1, verbose=0, shuffle=False, callbacks=[counter, saver])
            step = saver.step
            print(f"epoch {epoch}: loss {history.history['loss'][0]:.3f}")
    print(f"weights {digest(model.get_weights())}")


if __name__ == "__main__":
    main()
