"""tf.data on the loader: specs, one call a batch, composition, fit, exact resume, errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from s3loader.errors import ConfigError, PlanError
from s3loader.loader import Loader, open_dataset
from s3loader.store import open_store

tf = pytest.importorskip("tensorflow")

from s3loader.tensorflow import S3StateCallback, S3TFLoader, make_tf_dataset  # noqa: E402 - after the framework


def vector(data: memoryview) -> np.ndarray:
    return np.frombuffer(data, np.uint8).astype(np.float32)


def numbers(batches: object) -> list[int]:
    return [int(row[0]) for batch in batches for row in np.asarray(batch)]  # type: ignore[attr-defined]


def test_static_specs_and_the_loaders_own_order(numbers_url: str) -> None:
    made = make_tf_dataset(numbers_url, batch_size=4, transform=vector, tail="drop", seed=5)
    assert made.element_spec == tf.TensorSpec((4, 8), tf.float32)
    assert int(made.cardinality()) == 12
    ours = Loader(open_dataset(numbers_url), batch_size=4, transform=vector, tail="drop", seed=5, collate="fixed")
    assert numbers(made) == numbers(ours)


def test_the_constructors_of_all_adapters(numbers_url: str) -> None:
    urls = [f"{numbers_url}{i:03d}" for i in range(6)]
    loader = S3TFLoader.from_objects(urls, batch_size=3, transform=vector, shuffle=False, engine="auto")
    assert numbers(loader.dataset()) == list(range(6))
    assert numbers(S3TFLoader.from_prefix(numbers_url, batch_size=4, transform=vector, shuffle="none").dataset()) == list(
        range(50)
    )
    with pytest.raises(ConfigError, match="where: this kind"):
        S3TFLoader.from_prefix(numbers_url, batch_size=4, where=lambda entry: True)


def test_bytes_become_strings_and_structures_stay(numbers_url: str) -> None:
    plain = make_tf_dataset(numbers_url, batch_size=5)
    assert plain.element_spec == tf.TensorSpec((None,), tf.string)
    assert sorted(row[0] for batch in plain for row in batch.numpy()) == list(range(50))
    made = make_tf_dataset(numbers_url, batch_size=5, transform=lambda d: {"x": vector(d), "pair": (int(d[0]), "name")})
    assert made.element_spec == {
        "x": tf.TensorSpec((None, 8), tf.float32),
        "pair": (tf.TensorSpec((None,), tf.int64), tf.TensorSpec((None,), tf.string)),
    }
    assert next(iter(made))["pair"][1].numpy()[0] == b"name"


def test_ragged_rows(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for i in range(1, 9):
        store.put(f"r/{i}", bytes([i]) * i)
    made = make_tf_dataset(f"file://{tmp_path}/r/", batch_size=4, collate="ragged")
    rows = [row.numpy().tolist() for batch in made for row in batch]
    assert sorted(rows) == [[i] * i for i in range(1, 9)]


def test_composes_with_map_and_prefetch_and_every_pass_is_the_next_epoch(numbers_url: str) -> None:
    loader = S3TFLoader(numbers_url, batch_size=10, transform=vector)
    made = loader.dataset().map(lambda x: x * 2).prefetch(tf.data.AUTOTUNE)
    first, second = numbers(made), numbers(made)
    assert sorted(first) == sorted(second) == [2 * i for i in range(50)]
    assert first != second


def test_state_counts_what_was_trained_not_what_was_prefetched(numbers_url: str) -> None:
    straight = S3TFLoader(numbers_url, batch_size=4, transform=vector, seed=3)
    whole = numbers(straight.dataset())
    loader = S3TFLoader(numbers_url, batch_size=4, transform=vector, seed=3)
    seen = numbers(loader.dataset().prefetch(8).take(5))
    state = loader.state_dict(5)
    again = S3TFLoader(numbers_url, batch_size=7, transform=vector, seed=3)
    again.load_state_dict(state)
    assert seen + numbers(again.dataset()) == whole
    with pytest.raises(PlanError):
        loader.state_dict(1000)


def test_fit_runs_and_resumes_exactly(numbers_url: str) -> None:
    def sample(data: memoryview) -> tuple[np.ndarray, np.ndarray]:
        x = vector(data) / 50
        return x, x[:1] * 3

    def model() -> tf.keras.Model:
        tf.keras.utils.set_random_seed(1)
        made = tf.keras.Sequential([tf.keras.Input((8,)), tf.keras.layers.Dense(4), tf.keras.layers.Dense(1)])
        made.compile(optimizer=tf.keras.optimizers.SGD(0.01), loss="mse")
        return made

    options = {"batch_size": 5, "transform": sample, "tail": "drop"}
    straight = model()
    straight.fit(S3TFLoader(numbers_url, **options).dataset(), epochs=2, verbose=0, shuffle=False)

    class StopAfter(tf.keras.callbacks.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            if batch == 6:
                raise InterruptedError

    loader, first = S3TFLoader(numbers_url, **options), model()
    counter = S3StateCallback(loader)
    with pytest.raises(InterruptedError):
        first.fit(loader.dataset(), epochs=2, verbose=0, shuffle=False, callbacks=[counter, StopAfter()])
    assert counter.batches == 7
    second, rest = model(), S3TFLoader(numbers_url, **options)
    second.set_weights(first.get_weights())
    rest.load_state_dict(counter.state_dict())
    left = rest.dataset()
    second.fit(left, epochs=1, verbose=0, shuffle=False)
    with pytest.raises(tf.errors.OpError, match="call dataset"):
        list(left)
    second.fit(rest.dataset(), epochs=1, verbose=0, shuffle=False)
    for ours, theirs in zip(second.get_weights(), straight.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_error_reaches_the_consumer_in_its_place(numbers_url: str) -> None:
    def picky(data: memoryview) -> np.ndarray:
        if data[0] == 33:
            raise ValueError("sample 33 is bad")
        return vector(data)

    made = make_tf_dataset(numbers_url, batch_size=1, transform=picky, shuffle=False)
    assert numbers(made.take(33)) == list(range(33))
    with pytest.raises(tf.errors.OpError, match="sample 33 is bad"):
        list(made)


def test_bad_input(numbers_url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        make_tf_dataset(numbers_url, batch_size=0)
    with pytest.raises(ConfigError, match="no tensor"):
        make_tf_dataset(numbers_url, batch_size=1, collate=lambda samples: object())


def test_missing_tensorflow_is_one_sentence() -> None:
    code = "import sys; sys.modules['tensorflow'] = None; import s3loader.tensorflow"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1].endswith("pip install 's3loader[tensorflow]'")
