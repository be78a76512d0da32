"""JAX on the loader: numpy batches, global arrays, several processes, exact resume."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from s3loader.errors import ConfigError, SampleError
from s3loader.loader import Loader, open_dataset
from s3loader.store import open_store

jax = pytest.importorskip("jax")

from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402 - after the framework

from s3loader.jax import S3JaxIterable  # noqa: E402 - after the framework


def vector(data: memoryview) -> np.ndarray:
    return np.frombuffer(data, np.uint8).astype(np.float32)


def numbers(batches: object) -> list[int]:
    return [int(row[0]) for batch in batches for row in np.asarray(batch)]  # type: ignore[attr-defined]


def test_numpy_batches_in_the_loaders_own_order(numbers_url: str) -> None:
    made = S3JaxIterable.from_prefix(numbers_url, batch_size=4, transform=vector, seed=5)
    ours = Loader(open_dataset(numbers_url), batch_size=4, transform=vector, tail="drop", seed=5, collate="fixed")
    assert len(made) == 12
    batches = list(made)
    assert all(isinstance(batch, np.ndarray) and batch.shape == (4, 8) for batch in batches)
    assert numbers(batches) == numbers(ours)


def test_options_of_the_store_and_the_dataset_are_taken_with_a_url(numbers_url: str) -> None:
    made = S3JaxIterable.from_prefix(
        "data/", store=open_store(numbers_url.removesuffix("data/")), batch_size=5, shuffle=False, transform=vector
    )
    assert numbers(made) == list(range(50))
    with pytest.raises(ConfigError, match="region: the dataset is open already"):
        S3JaxIterable(open_dataset(numbers_url), batch_size=5, region="us-east-1")


def test_state_counts_what_was_given_out_not_what_waits_on_the_devices(numbers_url: str) -> None:
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    options = {"batch_size": 4, "transform": vector, "seed": 3}
    whole = numbers(S3JaxIterable(numbers_url, **options))
    made = S3JaxIterable(numbers_url, sharding=sharding, device_prefetch=4, **options)
    batches = iter(made)
    seen = [next(batches) for _ in range(5)]
    assert all(isinstance(batch, jax.Array) and batch.sharding == sharding for batch in seen)
    again = S3JaxIterable(numbers_url, batch_size=2, transform=vector, seed=3)
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert numbers(seen) + numbers(again)[: 4 * 7] == whole
    batches.close()  # type: ignore[attr-defined]


def test_every_iteration_is_the_next_epoch(numbers_url: str) -> None:
    made = S3JaxIterable(numbers_url, batch_size=5, transform=vector)
    first, second = numbers(made), numbers(made)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    made.set_epoch(0)
    assert numbers(made) == first


def test_bad_input(numbers_url: str) -> None:
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    with pytest.raises(ConfigError, match="rank"):
        S3JaxIterable(numbers_url, batch_size=1, sharding=sharding, rank=0)
    with pytest.raises(ConfigError, match="short"):
        S3JaxIterable(numbers_url, batch_size=1, sharding=sharding, tail="short")
    with pytest.raises(ConfigError, match="device_prefetch"):
        S3JaxIterable(numbers_url, batch_size=1, device_prefetch=0)
    with pytest.raises(ConfigError, match="batch_size"):
        len(S3JaxIterable(numbers_url, batch_size=0))


CHILD = """
import sys, json
import numpy as np
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
port, rank, url, out = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
from s3loader.jax import S3JaxIterable
from s3loader_jax.sharding import process_slice
vector = lambda data: np.frombuffer(data, np.uint8).astype(np.float32)
devices = np.array(jax.devices())
rows = NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data"))
local = {}
made = S3JaxIterable(url, batch_size=3, sharding=rows, transform=vector, seed=9)
batches = iter(made)
local["given"] = [int(s.data[i, 0]) for _ in range(4) for s in next(batches).addressable_shards for i in range(s.data.shape[0])]
local["place"] = process_slice(rows)
local["state"] = made.state_dict()
batch = next(batches)
local["global_shape"] = batch.shape
model = NamedSharding(Mesh(devices.reshape(1, -1), ("data", "model")), PartitionSpec("data", "model"))
local["model_place"] = process_slice(model)
plain = S3JaxIterable(url, batch_size=3, transform=vector, seed=9)
local["plain"] = [int(row[0]) for _, batch in zip(range(4), plain) for row in batch]
json.dump(local, open(f"{out}/{rank}.json", "w"))
batches.close()
"""


def test_two_processes_share_one_sequence(numbers_url: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, "-c", CHILD, str(port)]
    children = [subprocess.Popen([*command, str(rank), numbers_url, str(tmp_path)], env=env) for rank in range(2)]
    try:
        assert [child.wait(timeout=600) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
            child.wait()
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [zero["place"], one["place"]] == [[0, 2], [1, 2]]
    assert [zero["model_place"], one["model_place"]] == [[0, 1], [0, 1]]  # model axis only: the same rows on both
    assert zero["state"] == one["state"]
    assert zero["global_shape"] == [6, 8]
    assert zero["given"] == zero["plain"]
    assert one["given"] == one["plain"]
    single = S3JaxIterable(
        numbers_url,
        batch_size=6,
        transform=vector,
        seed=9,
        order={k: v for k, v in zero["state"]["spec"].items() if k in ("block", "lanes", "chunk", "window", "run")},
    )
    together = [row for step in range(4) for part in (zero["given"], one["given"]) for row in part[3 * step : 3 * step + 3]]
    assert numbers(single)[:24] == together


def test_missing_jax_is_one_sentence() -> None:
    code = "import sys; sys.modules['jax'] = None; import s3loader.jax"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1].endswith("pip install 's3loader[jax]'")


def devices_along_the_batch() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))


def test_an_error_comes_behind_the_batches_that_come_before_it_also_through_double_buffering(numbers_url: str) -> None:
    def fails_on_17(data: memoryview) -> np.ndarray:
        if data[0] == 17:
            raise ValueError("no")
        return vector(data)

    made = S3JaxIterable(
        numbers_url, batch_size=4, shuffle="none", transform=fails_on_17, sharding=devices_along_the_batch(), device_prefetch=3
    )
    seen: list[int] = []
    with pytest.raises(SampleError, match="position 17"):
        seen.extend(number for batch in made for number in numbers([batch]))
    assert seen == list(range(16))
    assert made.state_dict()["consumed"] == 16


def test_what_is_chosen_in_the_middle_of_an_iteration_holds(numbers_url: str) -> None:
    made = S3JaxIterable(numbers_url, batch_size=4, transform=vector, sharding=devices_along_the_batch())
    batches = iter(made)
    next(batches)
    state = made.state_dict()
    next(batches)
    made.load_state_dict(state)
    next(batches)
    assert made.state_dict() == state
    made.set_epoch(3)
    next(batches)
    assert (made.state_dict()["epoch"], made.state_dict()["consumed"]) == (3, 0)
    list(batches)
    assert numbers(made) == numbers(S3JaxIterable(numbers_url, batch_size=4, transform=vector, epoch=3))


def test_a_sharding_that_does_not_divide_the_batch_is_named_with_its_shape() -> None:
    script = """
import numpy as np, jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from s3loader.errors import ConfigError, SampleError
from s3loader_jax.sharding import shard_batch
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
try:
    shard_batch(np.zeros((10, 8), np.float32), sharding, 1)
except ConfigError as error:
    assert "(10, 8)" in str(error) and "batch_size" in str(error), error
else:
    raise AssertionError
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Pair(NamedTuple):
    x: object
    y: object


def one_axis() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))


def test_containers_and_small_floats_are_laid_out_too(numbers_url: str) -> None:
    def sample(data: memoryview) -> Pair:
        return Pair(OrderedDict(b=vector(data), a=np.ones(2, jax.numpy.bfloat16)), [np.int32(data[0]), "name"])

    made = S3JaxIterable(numbers_url, batch_size=8, transform=sample, sharding=one_axis())
    batch = next(iter(made))
    assert isinstance(batch, Pair)
    assert type(batch.x) is OrderedDict
    assert isinstance(batch.x["b"], jax.Array)
    assert batch.x["a"].dtype == jax.numpy.bfloat16
    assert isinstance(batch.x["a"], jax.Array)
    assert isinstance(batch.y[0], jax.Array)
    assert batch.y[1] == ["name"] * 8


@pytest.mark.parametrize(
    ("value", "dtype"), [(2**31, "int32"), (-(2**31) - 1, "int32"), (np.uint64(2**32), "uint32"), (1e300, "float32")]
)
def test_a_number_without_room_is_an_error_with_its_place(numbers_url: str, value: object, dtype: str) -> None:
    def sample(data: memoryview) -> object:
        return value if data[0] == 13 else type(value)(data[0])  # type: ignore[call-arg]

    made = S3JaxIterable(numbers_url, batch_size=8, transform=sample, shuffle=False, sharding=one_axis())
    batches = iter(made)
    assert next(batches).dtype == dtype
    with pytest.raises(SampleError, match=f"no room in {dtype}.*013, position 13") as caught:
        next(batches)
    assert caught.value.details["position"] == 13
