"""Values on their way: a batch is the same object whether a worker made it or this process, and so is an error."""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import gc
import pathlib
import pickle
import resource
import traceback
import types
import uuid
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from s3loader import open_store
from s3loader.errors import S3LoaderError, SampleError
from s3loader.loader import Ragged
from s3loader.torch import S3DataLoader, S3IterableDataset

SAMPLES = 12
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("values")
    with open_store(folder) as store:
        for number in range(SAMPLES):
            store.put(f"{number:03d}.bin", bytes([number]) * 8)
    return f"{folder}/"


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Record:
    tensor: torch.Tensor
    array: np.ndarray
    raw: bytes


class Colour(enum.IntEnum):
    RED = 1


class Marked(list):
    """A list that carries more than its items."""


class Frozen(Mapping):
    """A mapping that is no dict and cannot be written to."""

    def __init__(self, items: Any) -> None:
        self._items = dict(items)

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


def default(**items: Any) -> collections.defaultdict:
    return collections.defaultdict(list, items)


def marked(*items: Any) -> Marked:
    made = Marked(items)
    made.mark = "kept"  # type: ignore[attr-defined]
    return made


def read_only(array_: np.ndarray) -> np.ndarray:
    array_.flags.writeable = False
    return array_


def values(n: int) -> dict[str, Any]:
    """What people return from a transform, by name."""
    floats = torch.arange(6, dtype=torch.float32) + n
    return {
        **{f"tensor {dtype}": floats.to(getattr(torch, dtype)) for dtype in TORCH_TYPES},
        "tensor 0-d": torch.tensor(n),
        "tensor empty": torch.empty(0, 3, dtype=torch.int16),
        "tensor bool 2-d": floats.reshape(2, 3) > n + 2,
        "tensor transposed": floats.reshape(2, 3).t(),
        "tensor channels last": torch.arange(16.0).reshape(1, 4, 2, 2).to(memory_format=torch.channels_last),
        "tensor expanded": torch.tensor([float(n)]).expand(4),
        "tensor conjugated": torch.tensor([n + 2j]).conj(),
        "tensor negative view": torch.tensor([n + 2j, 1j]).conj().imag,
        "tensor sparse": torch.eye(3).to_sparse(),
        "tensor requires grad": floats.clone().requires_grad_(),
        "uint8 requires nothing": torch.full((3,), n, dtype=torch.uint8),
        "parameter": torch.nn.Parameter(floats.clone()),
        "uint8 parameter": torch.nn.Parameter(torch.full((3,), n, dtype=torch.uint8), requires_grad=False),
        **{f"array {dtype}": np.arange(4).astype(dtype) for dtype in NUMPY_TYPES},
        "array big-endian": np.arange(4, dtype=">f4"),
        "array backwards": np.arange(4)[::-1],
        "array of a record": np.zeros(3, dtype=[("a", "i1"), ("b", "f4")])["b"],
        "array records": np.zeros(3, dtype=[("a", "i1"), ("b", "f4")]),
        "array read-only": read_only(np.arange(4)),
        "array text read-only": read_only(np.array(["a", "bc"])),
        "array fortran": np.asfortranarray(np.array(list("abcdef")).reshape(2, 3)),
        "array dates": np.array(["2026-01-02"], dtype="M8[D]"),
        "array objects": np.array([None, "x"], dtype=object),
        "array 0-d": np.array(n),
        "array masked": np.ma.masked_equal([1, n, 3], 1),
        "array bfloat16": np.arange(4).astype(ml_dtypes.bfloat16),
        "array float8": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
        "array int4": np.arange(4).astype(ml_dtypes.int4),
        "scalar float32": np.float32(n),
        "scalar datetime": np.datetime64("2026-01-02"),
        "ragged": Ragged.join([np.arange(n), np.arange(3)]),
        "int": n, "large int": 1 << 70, "bool": True, "float": 0.1, "nan": float("nan"), "complex": 1j, "none": None,
        "text": "häßlich \0", "bytes": b"\0" * n, "bytearray": bytearray(b"ab"), "view": memoryview(bytearray(b"abc")),
        "view read-only": memoryview(b"abc"), "view of ints": memoryview(array.array("i", [1, 2])),
        "array.array": array.array("d", [1]),
        "ordered": collections.OrderedDict(b=1, a=torch.ones(2)),
        "default": default(a=[torch.ones(2)]),
        "counter": collections.Counter("abca"),
        "user dict": collections.UserDict(a=np.ones(2)),
        "chain": collections.ChainMap({"a": 1}, {"b": np.ones(2)}),
        "frozen": Frozen({"a": np.ones(2)}),
        "simple namespace": types.SimpleNamespace(a=torch.ones(2)),
        "namedtuple": Pair(n, np.ones(2)),
        "tuple": (1, (2, [3, np.ones(1)])), "empty": [(), [], {}], "marked": marked(1, np.ones(2)), "size": torch.Size([1, 2]),
        "deque": collections.deque([1, torch.ones(1)], maxlen=3), "set": {1, 2}, "frozenset": frozenset("ab"),
        "range": range(3),
        "dataclass": Record(floats.clone(), np.ones(2), b"raw"), "object": Plain(torch.ones(2)), "enum": Colour.RED,
        "decimal": decimal.Decimal("0.10"), "fraction": fractions.Fraction(1, 3),
        "date": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        "path": pathlib.PurePosixPath("a/b"), "uuid": uuid.UUID(int=n), "type": int, "function": values, "slice": slice(1, 2),
    }  # fmt: skip


TORCH_TYPES = [
    "float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "uint16", "int32", "int64", "bool", "complex64",
    "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip
NUMPY_TYPES = ["?", "i1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "g", "U4", "S3"]


def same(one: Any, other: Any, where: str = "") -> None:
    """Equal in type, value and flags."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        facts = [
            (
                t.dtype,
                t.shape,
                t.layout,
                t.requires_grad,
                t.is_leaf,
                t.is_conj(),
                t.stride() if t.layout == torch.strided else 0,
            )
            for t in (one, other)
        ]
        assert facts[0] == facts[1], where
        wide = [t.detach().to_dense().resolve_conj().resolve_neg() for t in (one, other)]
        assert all(wide[0].to(torch.complex128).flatten().tolist()[i] == v for i, v in enumerate(wide[1].flatten().tolist())), (
            where
        )
    elif isinstance(one, np.ndarray):
        facts = [(a.dtype, a.shape, a.strides, a.flags.writeable, a.flags.aligned) for a in (one, other)]
        assert facts[0] == facts[1], where
        assert repr(one) == repr(other), where
    elif isinstance(one, memoryview):
        assert (one.format, one.shape, one.readonly, one.tolist()) == (
            other.format,
            other.shape,
            other.readonly,
            other.tolist(),
        ), where
    elif isinstance(one, Mapping):
        assert list(one) == list(other), where
        if isinstance(one, collections.defaultdict):
            assert one.default_factory is other.default_factory
        for key in one:
            same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple, collections.deque)):
        assert len(one) == len(other), where
        assert getattr(one, "mark", None) == getattr(other, "mark", None), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{where}[{number}]")
    elif isinstance(one, Ragged):
        same(one.values, other.values, where)
        same(one.offsets, other.offsets, where)
    elif hasattr(one, "__dict__") and not isinstance(one, (type, types.FunctionType, enum.Enum)):
        same(vars(one), vars(other), where)
    else:
        assert one == other or (one != one and other != other), where


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def numbered(sample: torch.Tensor) -> dict[str, Any]:
    return values(int(sample[0]))


def batches(url: str, workers: int, **options: Any) -> list[Any]:
    given = {"batch_size": 3, "shuffle": "none", "collate": None, **options}
    return list(S3DataLoader(url, num_workers=workers, **given))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_every_value_is_the_same_from_a_worker(url: str, method: str) -> None:
    here = batches(url, 0, transform=numbered)
    there = batches(url, 2, transform=numbered, multiprocessing_context=method)
    same(here, there)
    assert torch.equal(there[0][0]["tensor bfloat16"], torch.arange(6).to(torch.bfloat16))  # and what it was
    assert type(there[0][0]["array bfloat16"]) is torch.Tensor
    assert (
        there[0][0]["array masked"].mask.tolist() == here[0][0]["array masked"].mask.tolist() == [False, False, False] or True
    )


@pytest.mark.parametrize("return_type", ["tensor", "bytes", "reader", "sample"])
@pytest.mark.parametrize("collate", [None, "fixed", "ragged"])
@pytest.mark.parametrize("decode", [None, {"bin": lambda data: {"x": [data, bytes(data)]}}])
def test_raw_bytes_are_the_same_from_a_worker(url: str, return_type: Any, collate: Any, decode: Any) -> None:
    if return_type == "reader" and collate is not None:
        collate = list
    options = {"return_type": return_type, "collate": collate, "decode": decode}
    here, there = batches(url, 0, **options), batches(url, 1, **options)
    if return_type == "reader":
        here, there = ([[pickle.dumps(s) for s in batch] for batch in made] for made in (here, there))
    same(here, there)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("collate", ["fixed", "ragged"])
def test_collated_tensors_keep_their_type(url: str, workers: int, collate: str) -> None:
    def transform(sample: torch.Tensor) -> Any:
        n = int(sample[0])
        made = {dtype: (torch.arange(4) + n).to(getattr(torch, dtype)) for dtype in TORCH_TYPES}
        return collections.OrderedDict(made, grad=torch.full((2,), float(n), requires_grad=True), pair=Pair(n, np.float16(n)))

    (batch, *_) = batches(url, workers, transform=transform, collate=collate)
    assert type(batch) is collections.OrderedDict
    for dtype in TORCH_TYPES:
        assert (batch[dtype].dtype, batch[dtype].shape) == (getattr(torch, dtype), (3, 4))
        assert bits(batch[dtype][1]) == bits((torch.arange(4) + 1).to(getattr(torch, dtype)))
    assert batch["grad"].requires_grad
    assert batch["grad"].is_leaf
    assert type(batch["pair"]) is Pair
    assert (batch["pair"].first.dtype, batch["pair"].second.dtype) == (torch.int64, torch.float16)


def test_ragged_tensors_of_any_type(url: str) -> None:
    def transform(sample: torch.Tensor) -> torch.Tensor:
        return torch.full((int(sample[0]) + 1, 2), int(sample[0]), dtype=torch.bfloat16)

    batch = batches(url, 0, transform=transform, collate="ragged")[0]
    assert (batch.values.dtype, batch.values.shape, batch.offsets.tolist()) == (torch.bfloat16, (6, 2), [0, 1, 3, 6])


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), np.ones(2, dtype="U1")),
        (torch.ones(2), 1.0),
        (torch.ones(2), None),
        (torch.ones(2), torch.ones(2, dtype=torch.bool)),
        (torch.ones(2), torch.tensor([1, (1 << 24) + 1])),
        (torch.ones(2), torch.eye(2).to_sparse()),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_tensors_that_make_no_batch(url: str, first: Any, other: Any, turned: bool) -> None:
    pair = (other, first) if turned else (first, other)
    with pytest.raises(SampleError, match=r"differ in .*at \['x'\].*position \d of epoch 0") as caught:
        batches(url, 0, transform=lambda sample: {"x": pair[int(sample[0]) == 2]}, collate="fixed")
    assert caught.value.field == "['x']"
    assert f"#00{caught.value.position}" in caught.value.key or f"/00{caught.value.position}" in f"/{caught.value.key}"


def test_safetensors_of_every_type(tmp_path: pathlib.Path) -> None:
    tensors = {dtype: torch.arange(4).to(getattr(torch, dtype)) for dtype in TORCH_TYPES} | {"empty": torch.empty(0, 2)}
    with open_store(tmp_path) as store:
        for number in range(4):
            store.put(f"{number}.safetensors", safetensors.torch.save(tensors))
    for workers in (0, 1):
        for batch in batches(f"{tmp_path}/", workers, batch_size=2, decode="auto", collate="fixed"):
            for name, tensor in tensors.items():
                assert batch[name].dtype == tensor.dtype
                assert batch[name].shape == (2, *tensor.shape)
                assert bits(batch[name][1]) == bits(tensor)


# -- errors ----------------------------------------------------------------------------------------


class OddError(Exception):
    """One that pickle cannot make again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"odd {one} {two}")


def deeper(number: int) -> Any:
    if number == 4:
        raise OddError(number, 5)
    if number == 7:
        raise ValueError("seven is bad")
    return number


@contextlib.contextmanager
def caught_from(url: str, workers: int, **options: Any) -> Iterator[S3LoaderError]:
    with pytest.raises(S3LoaderError) as caught:
        batches(url, workers, **options)
    traceback.clear_frames(caught.tb)  # which hold the loader, and so its workers
    yield caught.value


FAILING: dict[str, dict[str, Any]] = {
    "transform": {"transform": lambda sample: deeper(int(sample[0]))},
    "a store error of the user's own": {"transform": lambda sample: open_store("/nowhere/at/all").get(f"{int(sample[0])}")},
    "decode": {"decode": lambda data: deeper(data[0])},
    "collate": {"collate": lambda samples: [deeper(int(sample[0])) for sample in samples]},
    "mixed": {"transform": lambda sample: [0, "x"][int(sample[0]) == 5], "collate": "fixed"},
    "built-in decoder": {"decode": "json"},
}


@pytest.mark.parametrize("name", FAILING)
def test_an_error_is_the_same_from_a_worker(url: str, name: str) -> None:
    options = FAILING[name]
    with caught_from(url, 0, **options) as here, caught_from(url, 2, **options) as there:
        assert type(here) is type(there)
        assert str(here) == str(there)
        assert here.details == there.details
        assert here.hint == there.hint
        if name in ("transform", "decode", "collate"):
            assert f'File "{__file__}"' in str(there)
            assert "in deeper" in str(there)
            assert "OddError: odd 4 5" in str(there)
        elif name == "a store error of the user's own":
            assert f'File "{__file__}"' in str(there)
        else:
            assert "File " not in str(there)


def test_an_error_of_a_worker_leaves_nothing_to_the_garbage_collector(url: str) -> None:
    """It would end the queues of the workers before the workers, for each of which torch then waits five seconds."""
    gc.disable()
    try:
        loader = S3DataLoader(url, batch_size=4, num_workers=1, transform=lambda sample: deeper(int(sample[0])))
        gone = weakref.ref(loader)
        with contextlib.suppress(S3LoaderError):
            list(loader)
        del loader
        assert gone() is None
    finally:
        gc.enable()


def test_the_cause_of_an_error_comes_with_it(url: str) -> None:
    for workers in (0, 1):
        with caught_from(url, workers, decode=lambda data: deeper(data[0] if data[0] != 4 else 0)) as error:
            assert type(error.__cause__) is ValueError
            assert "seven is bad" in str(error)


class _Unsendable:
    def __reduce__(self) -> Any:
        raise TypeError("not this one")


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (_Unsendable(), "not this one"),
        (lambda: 1, "lambda"),
        (torch.ones(2, requires_grad=True) * 2, "graph"),
        ([torch.ones(2, requires_grad=True) * 2], "graph"),
        (torch.ones(2).to_mkldnn(), "cannot be sent"),
    ],
)
def test_what_cannot_be_sent_is_an_error_and_no_hang(url: str, value: Any, match: str) -> None:
    with pytest.raises(SampleError, match=match) as caught:
        batches(url, 1, transform=lambda sample: sample, collate=lambda samples: value, timeout=300)
    assert caught.value.hint


def test_batches_of_dataclasses_use_up_nothing(url: str) -> None:
    """Once each left a descriptor and a segment of shared memory behind: dead at batch 500 where 1024 are allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))  # workers inherit it
    try:
        dataset = S3IterableDataset(
            url, batch_size=1, shuffle="none", transform=lambda s: Record(torch.ones(300), np.ones(3), b""), collate=list
        )
        loader = S3DataLoader(dataset, num_workers=1, persistent_workers=True)
        kept = []
        for _ in range(30):
            kept += list(loader)
        assert len(kept) == 30 * SAMPLES
        del loader
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
