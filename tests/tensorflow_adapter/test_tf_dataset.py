"""tf.data on the loader: specs, one call a batch, composition, fit, exact resume, errors."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

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


def squares(data: memoryview) -> tuple[np.ndarray, np.ndarray]:
    x = vector(data)[:1] / 50
    return x, x * x


def fitted(made: object, callbacks: list[object], steps_per_execution: int = 1, **options: object) -> None:
    model = tf.keras.Sequential([tf.keras.Input((1,)), tf.keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse", steps_per_execution=steps_per_execution)
    model.fit(made, verbose=0, shuffle=False, callbacks=callbacks, **options)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(
    ("change", "batch_size", "known", "options", "states"),
    [
        (lambda made: made, None, True, {"epochs": 2}, [8, 16, 24, 32, 40, 48, 50] * 2),
        (lambda made: made, None, False, {"epochs": 2}, [8, 16, 24, 32, 40, 48, 50] * 2),
        (lambda made: made, None, True, {"steps_per_execution": 4}, [32, 50]),
        (lambda made: made, None, False, {"steps_per_execution": 4}, [32, 50]),
        (lambda made: made.unbatch().batch(16), 16, True, {"epochs": 2}, [16, 32, 48, 50] * 2),
        (lambda made: made.rebatch(24), 24, False, {"epochs": 2}, [24, 48, 50] * 2),
        (lambda made: made.repeat(), 8, True, {"epochs": 2, "steps_per_epoch": 3}, [8, 16, 24, 32, 40, 48]),
    ],
)  # fmt: skip
def test_fit_is_counted_by_what_it_gets(
    numbers_url: str, change: object, batch_size: int | None, known: bool, options: dict[str, int], states: list[int]
) -> None:
    loader = S3TFLoader(numbers_url, batch_size=8, transform=squares)
    counter, seen = S3StateCallback(loader, batch_size=batch_size), []
    saw = tf.keras.callbacks.LambdaCallback(on_train_batch_end=lambda b, logs: seen.append(counter.state_dict()["consumed"]))
    fitted(change(loader.dataset(known_length=known)), [counter, saw], **options)  # type: ignore[operator]
    assert seen == states
    assert counter.state_dict()["consumed"] == states[-1]


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda made: made.unbatch().batch(16),
        lambda made: made.rebatch(16),
        lambda made: made.unbatch().filter(lambda x, y: x[0] > 0.5).batch(8),
        lambda made: made.unbatch(),
    ],
)
def test_fit_on_other_batches_than_the_loaders_is_refused(numbers_url: str, change: object, known: bool) -> None:
    loader = S3TFLoader(numbers_url, batch_size=8, transform=squares)
    with pytest.raises(ConfigError, match=r"fit has .* batches[\s\S]*batch_size"):
        fitted(change(loader.dataset(known_length=known)), [S3StateCallback(loader)])  # type: ignore[operator]


def test_a_state_after_samples(numbers_url: str) -> None:
    options = {"batch_size": 5, "transform": vector, "seed": 3}
    whole = numbers(S3TFLoader(numbers_url, **options).dataset())
    loader = S3TFLoader(numbers_url, **options)
    seen = numbers(loader.dataset().unbatch().batch(10).take(4))
    again = S3TFLoader(numbers_url, **options)
    again.load_state_dict(loader.state_dict(samples=40))
    assert seen + numbers(again.dataset()) == whole
    with pytest.raises(PlanError, match="inside of a batch"):
        loader.state_dict(samples=13)
    for count in (-1, 1000):
        with pytest.raises(PlanError, match="not handed out"):
            loader.state_dict(samples=count)
    for both in ({}, {"batches": 1, "samples": 5}):
        with pytest.raises(ConfigError, match="one of the two"):
            loader.state_dict(**both)


class Pair(NamedTuple):
    x: object
    y: object


CHANGES = {
    "float": (1, 0.5),
    "more digits": (np.float32(1), np.float64(0.1)),
    "too large": (np.uint8(1), 300),
    "negative": (np.uint8(1), -1),
    "beyond 53 bits": (1.0, 2**53 + 1),
    "beyond 63 bits": (1, 2**63),
    "flag": (1, True),
    "no flag": (False, 1),
    "text": (1, "cat"),
    "no text": ("cat", 1),
    "bytes": (np.zeros(2), b"ab"),
    "shape": (np.zeros(2), np.zeros(3)),
    "dtype": (np.zeros(2, np.int32), np.full(2, 0.5)),
    "complex": (1.0, 1j),
    "key more": ({"a": 1}, {"a": 1, "b": 2}),
    "key less": ({"a": 1, "b": 2}, {"a": 1}),
    "tuple": ((1, 2), (1, 2, 3)),
    "field": (Pair(1, np.int8(2)), Pair(1, 0.5)),
    "list": ([1, 2], [1, 2.5]),
    "not a number": (1, float("nan")),
    "none": (1, None),
}


@pytest.mark.parametrize(
    ("change", "collate"),
    [
        (change, collate)
        for change in CHANGES
        for collate in (None, "fixed", "ragged")
        if (change, collate) not in (("shape", "ragged"), ("bytes", "ragged"), ("bytes", "fixed"))
    ],
)  # bytes are a row of numbers there
def test_a_later_sample_is_never_another_value(numbers_url: str, change: str, collate: str | None) -> None:
    """Alone in its batch and among others: the specs are those of the first sample."""
    head, later = CHANGES[change]
    for batch_size in (1, 4):
        made = make_tf_dataset(
            numbers_url, batch_size=batch_size, shuffle=False, collate=collate, transform=lambda d: later if d[0] == 9 else head
        )
        with pytest.raises(tf.errors.OpError, match=r"SampleError[\s\S]*position|ConfigError"):
            list(made)


ONE = {dtype: tf.TensorSpec((None,), dtype) for dtype in (tf.float32, tf.float64, tf.int64, tf.uint64, tf.bool, tf.string)}


@pytest.mark.parametrize(
    ("value", "spec", "rows"),
    [
        (np.float32(0.25), ONE[tf.float32], [0.25]),
        (2**63, ONE[tf.uint64], [2**63]),
        (True, ONE[tf.bool], [True]),
        ("caf\u00e9", ONE[tf.string], ["caf\u00e9".encode()]),
        (b"a\0\0", ONE[tf.string], [b"a\0\0"]),
        ([1, 2], tf.TensorSpec((None, 2), tf.int64), [[1, 2]]),
        (["a", "bcd"], tf.TensorSpec((None, 2), tf.string), [[b"a", b"bcd"]]),
        (Pair(1, b"x"), Pair(ONE[tf.int64], ONE[tf.string]), [1, b"x"]),
        (OrderedDict(b=1, a=2.0), OrderedDict(b=ONE[tf.int64], a=ONE[tf.float64]), [2.0, 1]),
        (tf.constant([1, 2]), tf.TensorSpec((None, 2), tf.int32), [[1, 2]]),
    ],
    ids=["float", "uint64", "bool", "str", "bytes", "list", "strings", "namedtuple", "ordered", "tensor"],
)
def test_values_and_structures_come_as_they_are(numbers_url: str, value: object, spec: object, rows: list[object]) -> None:
    made = make_tf_dataset(numbers_url, batch_size=5, transform=lambda d: value)
    assert made.element_spec == spec
    batch = next(iter(made.take(1)))
    assert type(batch) is type(spec) or isinstance(spec, tf.TensorSpec)
    assert [
        leaf[0].numpy().tolist() if leaf.dtype != tf.string or leaf.ndim > 1 else leaf[0].numpy()
        for leaf in tf.nest.flatten(batch)
    ] == rows


def test_specs_that_are_given(numbers_url: str) -> None:
    def first(value: object, spec: object) -> object:
        made = make_tf_dataset(numbers_url, batch_size=5, transform=lambda d: value, output_signature=spec)
        return next(iter(made.take(1)))[0].numpy()

    assert first(0.1, tf.TensorSpec((None,), tf.float32)) == np.float32(0.1)
    assert first(7, tf.TensorSpec((None,), tf.float32)) == 7
    assert first(7.0, tf.TensorSpec((None,), tf.int32)) == 7
    for value, dtype in (
        (0.5, tf.int32),
        (1e300, tf.float32),
        (300, tf.uint8),
        (2**53 + 1, tf.float64),
        (1, tf.bool),
        (1, tf.string),
    ):
        with pytest.raises(tf.errors.OpError, match="cannot be held"):
            first(value, tf.TensorSpec((None,), dtype))


def test_ragged_arrays_and_skipped_samples(numbers_url: str) -> None:
    made = make_tf_dataset(
        numbers_url, batch_size=4, collate="ragged", shuffle=False, transform=lambda d: np.arange(d[0] // 4, dtype=np.int32)
    )
    assert made.element_spec == tf.RaggedTensorSpec((None, None), tf.int32, 1, tf.int64)
    assert [len(row) for batch in made for row in batch] == [i // 4 for i in range(50)]

    def odd(data: memoryview) -> int:
        if data[0] == 3:
            raise ValueError("odd")
        return data[0]

    made = make_tf_dataset(numbers_url, batch_size=5, tail="drop", on_error="skip", shuffle=False, transform=odd)
    assert [int(value) for batch in made for value in batch] == [i for i in range(50) if i != 3]


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
