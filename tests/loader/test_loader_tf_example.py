"""``tf.train.Example`` without TensorFlow: what protobuf reads is read so, what it refuses is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader import Loader, open_dataset
from s3loader.errors import FormatError
from s3loader.loader import decode_example, decode_sequence_example

tf: Any = pytest.importorskip("tensorflow")
DecodeError: Any = pytest.importorskip("google.protobuf.message").DecodeError

KINDS = ("bytes_list", "float_list", "int64_list", None)
VALUES = {
    "bytes_list": st.lists(st.binary(max_size=40), max_size=6),
    "float_list": st.lists(st.floats(width=32), max_size=60),
    "int64_list": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=60) | st.lists(st.integers(-3, 300), max_size=60),
    None: st.none(),
}
FEATURES = st.dictionaries(
    st.text(max_size=8), st.sampled_from(KINDS).flatmap(lambda kind: st.tuples(st.just(kind), VALUES[kind])), max_size=5
)


def filled(features: Any, values: dict[str, tuple[str | None, Any]]) -> None:
    for name, (kind, value) in values.items():
        feature = features.feature[name]
        if kind is not None:
            getattr(feature, kind).SetInParent()
            getattr(feature, kind).value.extend(value)


def serialized(values: dict[str, tuple[str | None, Any]]) -> bytes:
    example = tf.train.Example()
    filled(example.features, values)
    return example.SerializeToString()


def plain(feature: Any) -> Any:
    """A feature of TensorFlow's as ours are."""
    kind = feature.WhichOneof("kind")
    if kind is None:
        return None
    value = getattr(feature, kind).value
    if kind == "bytes_list":
        return list(value)
    return np.array(value, np.float32 if kind == "float_list" else np.int64)


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert type(ours[name]) is type(value)
        if isinstance(value, np.ndarray):
            assert ours[name].dtype == value.dtype
            assert ours[name].tobytes() == value.tobytes()
        elif isinstance(value, list) and value and not isinstance(value[0], bytes):
            assert len(ours[name]) == len(value)
            for one, other in zip(ours[name], value, strict=True):
                same({"": one}, {"": other})
        else:
            assert ours[name] == value


@settings(max_examples=120, deadline=None)
@given(FEATURES)
def test_every_example_is_what_tensorflow_says(values: dict[str, tuple[str | None, Any]]) -> None:
    data = serialized(values)
    theirs = parsed(data)
    assert theirs is not None
    same(decode_example(memoryview(data)), theirs)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


NUMBERS = st.lists(st.integers(0, 2**64 - 1), max_size=9)
LISTS = st.one_of(
    NUMBERS.map(lambda values: field(1, b"".join(map(varint, values)))),
    NUMBERS.map(lambda values: b"".join(varint(8) + varint(value) for value in values)),
    st.binary(max_size=8).map(lambda data: field(1, data)),
    st.binary(min_size=4, max_size=4).map(lambda data: varint(1 << 3 | 5) + data),
    st.binary(min_size=8, max_size=8).map(lambda data: varint(7 << 3 | 1) + data),
    st.just(varint(9 << 3 | 3) + varint(8) + varint(5) + varint(9 << 3 | 4)),
)
FEATURE = st.lists(
    st.tuples(st.integers(1, 4), st.lists(LISTS, max_size=3).map(b"".join)).map(lambda one: field(*one)), max_size=3
)
ENTRY = st.lists(
    st.one_of(
        st.sampled_from([b"a", b"b", "\u00e9".encode(), b"\xff"]).map(lambda name: field(1, name)),
        FEATURE.map(lambda parts: field(2, b"".join(parts))),
    ),
    max_size=3,
).map(b"".join)
WIRE = st.lists(
    st.lists(ENTRY.map(lambda one: field(1, one)), max_size=3).map(lambda parts: field(1, b"".join(parts))), max_size=2
).map(b"".join)


@settings(max_examples=250, deadline=None)
@given(WIRE, st.data())
def test_whatever_protobuf_reads_or_refuses(data: bytes, draw: Any) -> None:
    """Messages as no writer makes them, and damaged ones, of which only that is asked: protobuf's implementations differ over
    what stands beside the value of an entry."""
    damaged = bool(data) and draw.draw(st.booleans())
    if damaged:
        at = draw.draw(st.integers(0, len(data) - 1))
        data = data[:at] + bytes([draw.draw(st.integers(0, 255))]) + data[at + draw.draw(st.integers(0, 2)) :]
    theirs = parsed(data)
    if theirs is None:
        with pytest.raises(FormatError):
            decode_example(memoryview(data))
    elif damaged:
        decode_example(memoryview(data))
    else:
        same(decode_example(memoryview(data)), theirs)


def parsed(data: bytes) -> dict[str, Any] | None:
    """What TensorFlow finds in it; None where it is refused."""
    try:
        example = tf.train.Example.FromString(data)
    except (DecodeError, UnicodeDecodeError):
        return None
    return {name: plain(feature) for name, feature in example.features.feature.items()}


@settings(max_examples=50, deadline=None)
@given(FEATURES, st.dictionaries(st.text(max_size=8), st.lists(FEATURES.filter(bool), max_size=3), max_size=3))
def test_sequence_examples(context: dict[str, Any], lists: dict[str, list[dict[str, Any]]]) -> None:
    example = tf.train.SequenceExample()
    filled(example.context, context)
    for name, features in lists.items():
        example.feature_lists.feature_list[name].SetInParent()
        for values in features:
            one = tf.train.Features()
            filled(one, values)
            example.feature_lists.feature_list[name].feature.append(next(iter(one.feature.values())))
    data = example.SerializeToString()
    if context.keys() & lists.keys():
        with pytest.raises(FormatError, match="both"):
            decode_sequence_example(memoryview(data))
        return
    ours = decode_sequence_example(memoryview(data))
    theirs = {name: plain(feature) for name, feature in example.context.feature.items()}
    theirs |= {name: [plain(one) for one in found.feature] for name, found in example.feature_lists.feature_list.items()}
    same(ours, theirs)


def test_a_dataset_of_examples(tmp_path: Path) -> None:
    path = tmp_path / "x.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for i in range(20):
            writer.write(
                serialized(
                    {
                        "image": ("bytes_list", [b"\x89%d" % i]),
                        "label": ("int64_list", [i]),
                        "weights": ("float_list", [i / 2, i / 4]),
                    }
                )
            )
    loader = Loader(open_dataset(path, kind="tfrecord"), batch_size=5, decode="tf_example", shuffle="none")
    samples = [sample for batch in loader for sample in batch]
    assert [sample["label"].tolist() for sample in samples] == [[i] for i in range(20)]
    assert [sample["image"] for sample in samples] == [[b"\x89%d" % i] for i in range(20)]
    assert samples[3]["weights"].dtype == np.float32
    stacked = next(
        iter(Loader(open_dataset(path, kind="tfrecord"), batch_size=4, decode="tf_example", collate="fixed", shuffle="none"))
    )
    assert stacked["weights"].shape == (4, 2)
    assert stacked["label"].tolist() == [[0], [1], [2], [3]]
