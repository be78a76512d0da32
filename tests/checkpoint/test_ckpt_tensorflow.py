"""TensorFlow and Keras state; all in one child process, since the import is slow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import os, signal, sys, warnings
import numpy as np
import tensorflow as tf
import keras
from pathlib import Path
from s3loader.checkpoint import CheckpointManager, LatestN, load
from s3loader.errors import CheckpointError, ConfigError, UnsupportedStateError
from s3loader.tensorflow import S3BackupAndRestore

folder = Path(sys.argv[1])
keras.utils.set_random_seed(1)
tf.config.experimental.enable_op_determinism()

def make():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.BatchNormalization(),
                              keras.layers.Dropout(0.3, seed=5), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss="mse")
    return model

x = np.random.default_rng(0).standard_normal((48, 4)).astype("float32")
y = x.sum(1, keepdims=True)
data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)

class Stop(Exception): pass
class StopAt(keras.callbacks.Callback):
    def __init__(self, at): super().__init__(); self.at = at
    def on_train_batch_end(self, batch, logs=None):
        self.at -= 1
        if self.at == 0: raise Stop

start = make().get_weights()
def begin():
    model = make(); model.set_weights(start); return model

# exact to the batch: 3 epochs of 6 batches, stopped after 10 batches with the last backup at 9
straight = begin()
straight.fit(data, epochs=3, verbose=0, shuffle=False)
first = begin()
backup = S3BackupAndRestore(folder / "keras", save_freq=3)
assert not backup.restore(first)
try:
    first.fit(data, epochs=3, verbose=0, shuffle=False, callbacks=[backup, StopAt(10)])
    raise AssertionError
except Stop:
    backup.manager.close()
second = begin()
backup = S3BackupAndRestore(folder / "keras", save_freq=3)
assert backup.restore(second)
try:
    backup.restore(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]))
    raise AssertionError
except ConfigError as error:
    assert "compile" in error.hint
assert (backup.epoch, backup.batch, backup.step) == (1, 3, 9), (backup.epoch, backup.batch, backup.step)
rest = data.skip(backup.batch)
second.fit(rest, initial_epoch=backup.epoch, epochs=backup.epoch + 1, verbose=0, shuffle=False, callbacks=[backup])
backup = S3BackupAndRestore(folder / "keras", save_freq="epoch", delete_checkpoint=True)
assert backup.restore(second)
assert backup.step == 12, backup.step
second.fit(data, initial_epoch=2, epochs=3, verbose=0, shuffle=False, callbacks=[backup])
for a, b in zip(straight.get_weights() + [np.asarray(v) for v in straight.optimizer.variables],
                second.get_weights() + [np.asarray(v) for v in second.optimizer.variables]):
    assert np.array_equal(a, b)
with CheckpointManager(folder / "keras") as manager:
    assert manager.latest() is None

# the same over our own loader, whatever batch the last backup was at: in the middle of an epoch, at its end, per epoch
from s3loader.store import open_store
from s3loader.tensorflow import S3TFLoader
with open_store(folder / "data") as store:
    for i, row in enumerate(np.hstack([x, y])):
        store.put(f"{i:03d}.bin", row.tobytes())

def loader():
    rows = lambda data: (np.frombuffer(data, np.float32)[:4], np.frombuffer(data, np.float32)[4:])
    return S3TFLoader((folder / "data").as_uri() + "/", batch_size=8, seed=3, tail="drop", transform=rows)

straight = begin()
straight.fit(loader().dataset(), epochs=3, verbose=0, shuffle=False)
for every, stop, at in ((4, 9, (1, 2, 8)), (6, 13, (2, 0, 12)), ("epoch", 11, (1, 0, 6))):
    for resumed in (False, True):
        model, source = begin(), loader()
        with_backup = S3BackupAndRestore(folder / f"loader-{every}", save_freq=every, loader=source)
        assert with_backup.restore(model) == resumed
        if resumed:
            assert (with_backup.epoch, with_backup.batch, with_backup.step) == at
        try:
            with_backup.fit(model, 3, verbose=0, callbacks=[] if resumed else [StopAt(stop)])
            assert resumed
        except Stop:
            assert not resumed
        with_backup.close()
    assert all(np.array_equal(a, b) for a, b in zip(straight.get_weights(), model.get_weights())), every

# tf.Module, variables, tensors, generators, constants
class Module(tf.Module):
    def __init__(self):
        super().__init__()
        self.w = tf.Variable(tf.random.stateless_normal((3, 2), (1, 2)))
        self.layers = [tf.Variable([1, 2]), {"deep": tf.Variable(True)}]

module, generator = Module(), tf.random.Generator.from_seed(3)
tensor = tf.constant([[1.5, 2.5]], tf.bfloat16)
with CheckpointManager(folder / "module") as manager:
    constants = [tf.float16, tf.TensorShape([2, None])]
    before = module.w.numpy()
    manager.save(1, {"module": module, "generator": generator, "tensor": tensor, "constants": constants})
    drawn = generator.normal((3,)).numpy()
    module.w.assign_add(tf.ones((3, 2)))
    manager.wait()
    other, other_generator = Module(), tf.random.Generator.from_seed(9)
    other.layers[0].assign([0, 0])
    variable = other.w
    restored = manager.restore(target={"module": other, "generator": other_generator})
    assert restored["module"] is other and other.w is variable
    assert np.array_equal(other.w.numpy(), before) and other.layers[0].numpy().tolist() == [1, 2]
    assert np.array_equal(other_generator.normal((3,)).numpy(), drawn)
    rest = manager.restore(items=["tensor", "constants"])
    assert rest["tensor"].dtype == tf.bfloat16 and rest["tensor"].numpy().tolist() == [[1.5, 2.5]]
    assert rest["constants"] == [tf.float16, tf.TensorShape([2, None])]
    try:
        manager.restore(target={"module": tf.Module()})
        raise AssertionError
    except CheckpointError as error:
        assert "beside what the object has" in str(error)
    # every leaf of the target is filled, or the first that was not is named
    manager.save(3, {"module": {"w": None, "layers.0": tensor, "layers.1.deep": tensor}, "v": tensor, "none": None}).result()
    for target, named in (
        ({"module": Module()}, "module/"), ({"v": tf.Variable(["text"])}, "'v'"), ({"v": tf.Variable([1])}, "'v'"),
        ({"none": Module()}, "'none'"), ({"none": tf.Variable(1)}, "'none'"), ({"v": Module()}, "'v'"),
        ({"v": tf.zeros((1, 2))}, "'v'"), ({"none": tf.zeros(1)}, "'none'"), ({"none": generator}, "none/state"),
        ({"v": keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])}, "'v'"),
        ({"none": keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])}, "none/0000.kernel"),
    ):
        try:
            manager.restore(3, target=target)
            raise AssertionError(target)
        except CheckpointError as error:
            assert named in str(error) and error.hint, error
    any_shape = tf.Variable([[0.0, 0.0]], shape=tf.TensorShape(None), dtype=tf.bfloat16)
    eager = manager.restore(3, target={"v": tf.zeros((1, 2), tf.bfloat16)})["v"]
    assert manager.restore(3, target={"v": any_shape})["v"] is any_shape
    assert any_shape.numpy().tolist() == eager.numpy().tolist() == [[1.5, 2.5]]
    try:
        manager.save(2, {"a": {"b": tf.constant("text")}})
        raise AssertionError
    except UnsupportedStateError as error:
        assert error.path == "a/b"
print("good")
"""


def test_tensorflow_and_keras(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip().endswith("good"), done.stderr


KERAS = """
import sys
sys.modules["tensorflow"] = None  # as where it is not installed
import keras, numpy as np
from s3loader.checkpoint import CheckpointManager
from s3loader.errors import CheckpointError

def make(seed):
    keras.utils.set_random_seed(seed)
    dense = [keras.layers.Dense(8, activation="relu"), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *dense[:2], keras.layers.Dropout(0.3, seed=5), dense[2]])
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss="mse")
    model.optimizer.build(model.trainable_variables)
    return model

def state(model):
    return [keras.ops.convert_to_numpy(v) for v in [*model.variables, *model.optimizer.variables]]

x = np.random.default_rng(0).standard_normal((16, 4)).astype("float32")
fit = dict(x=x, y=x.sum(1, keepdims=True), epochs=1, verbose=0, shuffle=False, batch_size=8)
first, second = make(1), make(2)
first.fit(**fit)
with CheckpointManager(sys.argv[1]) as manager:
    manager.save(1, {"model": first, "optimizer": first.optimizer, "none": None}).result(600)
    got = manager.restore(target={"model": second, "optimizer": second.optimizer})
    assert got["model"] is second
    assert all(np.array_equal(a, b) for a, b in zip(state(first), state(second), strict=True))
    first.fit(**fit)
    second.fit(**fit)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(first.get_weights(), second.get_weights(), strict=True))
    small = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    for target, named in (
        ({"model": small}, "model/0000.kernel"), ({"none": small}, "none/0000.kernel"),
        ({"optimizer": keras.optimizers.Adam(1e-2)}, "build it before"),
    ):
        try:
            manager.restore(target=target)
            raise AssertionError(named)
        except CheckpointError as error:
            assert named in str(error), error
print("good")
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_keras_on_other_backends(tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KERAS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "KERAS_BACKEND": backend},
    )
    assert done.stdout.strip().endswith("good"), done.stderr
