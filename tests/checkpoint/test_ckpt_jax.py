"""JAX state: shardings, other meshes, random keys, pytrees of all kinds; resumed training equals uninterrupted training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s3loader.checkpoint import CheckpointManager, load
from s3loader.errors import CheckpointError, UnsupportedStateError


class Adam(NamedTuple):
    count: jax.Array
    mu: dict[str, jax.Array]
    nu: dict[str, jax.Array]


@jax.jit
def update(params: dict[str, jax.Array], adam: Adam, key: jax.Array) -> tuple[dict[str, jax.Array], Adam, jax.Array]:
    key, now = jax.random.split(key)
    x = jax.random.normal(now, (8, 4))
    gradients = jax.grad(lambda p: jnp.mean((jnp.tanh(x @ p["w"]) + p["b"]) ** 2))(params)
    mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, adam.mu, gradients)
    nu = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, adam.nu, gradients)
    params = jax.tree.map(lambda p, m, v: p - 0.01 * m / (jnp.sqrt(v) + 1e-8), params, mu, nu)
    return params, Adam(adam.count + 1, mu, nu), key


def start() -> tuple[dict[str, jax.Array], Adam, jax.Array]:
    params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
    return (
        params,
        Adam(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)),
        jax.random.key(7),
    )


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path) -> None:
    straight = start()
    for _ in range(6):
        straight = update(*straight)
    state = start()
    for _ in range(3):
        state = update(*state)
    with CheckpointManager(tmp_path) as manager:
        manager.save(3, {"params": state[0], "adam": state[1], "key": state[2]}).result(600)
        abstract = jax.eval_shape(start)
        items = manager.restore(target={"params": abstract[0], "adam": abstract[1], "key": state[2]})
        assert isinstance(items["adam"], Adam)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(items))
        resumed = (items["params"], items["adam"], items["key"])
        for _ in range(3):
            resumed = update(*resumed)
        plain = manager.restore()
        assert np.asarray(plain["adam"]["mu"]["w"]).tobytes() == np.asarray(state[1].mu["w"]).tobytes()
        assert jnp.array_equal(jax.random.key_data(plain["key"]), jax.random.key_data(state[2]))
    for a, b in zip(jax.tree.leaves(straight[:2]), jax.tree.leaves(resumed[:2]), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@jax.tree_util.register_pytree_with_keys_class
class Node:
    def __init__(self, left: Any, right: Any) -> None:
        self.left, self.right = left, right

    def tree_flatten_with_keys(self) -> Any:
        return [(jax.tree_util.GetAttrKey("left"), self.left), (jax.tree_util.GetAttrKey("right"), self.right)], None

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Node:
        return cls(*children)


def test_registered_nodes_types_and_errors(tmp_path: Path) -> None:
    items = {
        "node": Node(jnp.arange(3), [Node(jnp.ones((2, 2), jnp.bfloat16), 5)]),
        "old_key": jax.random.PRNGKey(1),
        "empty": jnp.zeros((0, 2)),
    }
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, items).result(600)
        back = manager.restore(target={"node": Node(jnp.zeros(3, jnp.int32), [Node(jnp.zeros((2, 2), jnp.bfloat16), 0)])})[
            "node"
        ]
        assert isinstance(back, Node)
        assert back.left.tolist() == [0, 1, 2]
        assert back.right[0].left.dtype == jnp.bfloat16
        assert back.right[0].right == 5
        anew = manager.restore(items=["node", "empty"])
        assert anew["node"]["right"][0]["left"].dtype == jnp.bfloat16
        assert anew["empty"].shape == (0, 2)
        with pytest.raises(CheckpointError, match=r"'empty' is F32 \[0, 2\] in the checkpoint, F32 \[1, 2\] in the target"):
            manager.restore(target={"empty": jnp.zeros((1, 2))})
        gone = jnp.ones(3)
        gone.delete()
        with pytest.raises(UnsupportedStateError, match="'a': the array was donated"):
            manager.save(2, {"a": gone})
        manager.save(3, {"wide": np.arange(3.0)}).result(600)
        with pytest.raises(CheckpointError, match="'wide' is F64"):
            manager.restore(target={"wide": jnp.zeros(3)})


PROCESS = """
import os, sys
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from s3loader.checkpoint import CheckpointManager
full = np.arange(48, dtype=np.float32).reshape(8, 6)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
def spread(spec, array=full):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
specs = {"both": P("x", "y"), "rows": P("x"), "columns": P(None, "y"), "all": P(("x", "y")), "same": P()}
state = {name: spread(spec) for name, spec in specs.items()}
with CheckpointManager(folder, rank=rank, world_size=2, job=port) as manager:
    manager.save(1, {"state": state, "local": np.arange(3), "step": 1}).result(600)
    other = Mesh(np.array(jax.devices()).reshape(4), ("z",))
    shape = jax.ShapeDtypeStruct(full.shape, np.float32, sharding=NamedSharding(other, P("z")))
    back = manager.open(1).restore({"state": {name: shape for name in state}}, rank=rank)["state"]
    for name, array in back.items():
        assert array.sharding == shape.sharding
        for shard in array.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), full[shard.index]), name
"""


def test_global_arrays_of_two_processes(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(port), str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    items = load(tmp_path)
    full = np.arange(48, dtype=np.float32).reshape(8, 6)
    for name, array in items["state"].items():
        assert np.array_equal(np.asarray(array), full), name
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert written < 5 * full.nbytes + 4096  # each of the five arrays once
