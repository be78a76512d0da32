"""The law of restoring: every leaf of the target is filled, or a typed error names the first that was not; what comes back has
the structure of the target. Every kind of what is saved against every kind of target.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils import _pytree

from s3loader.checkpoint import ArrayShard, CheckpointManager, PerRank, load, save
from s3loader.errors import CheckpointError, S3LoaderError, UnsupportedStateError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass(frozen=True)
class Plain:
    left: Any
    right: Any


@dataclasses.dataclass
class Counting:
    """Its constructor must not run again."""

    left: Any
    right: Any

    def __post_init__(self) -> None:
        self.right = self.right + 1 if isinstance(self.right, int) else self.right


@dataclasses.dataclass(slots=True)
class Slots:
    left: Any
    right: Any


class Entries(dict[Any, Any]):
    """A dict of somebody's own."""


class Things(list[Any]):
    """A list of somebody's own."""


@jax.tree_util.register_pytree_node_class
class Node:
    def __init__(self, left: Any, right: Any, aux: str) -> None:
        self.left, self.right, self.aux = left, right, aux

    def tree_flatten(self) -> Any:
        return (self.left, self.right), self.aux

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Node:
        return cls(*children, aux)


class TorchNode:
    def __init__(self, left: Any, right: Any) -> None:
        self.left, self.right = left, right


_pytree.register_pytree_node(TorchNode, lambda node: ([node.left, node.right], None), lambda values, _: TorchNode(*values))


class Stateful:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]


class Module(torch.nn.Module):
    def __init__(self, fill: float, device: str = "cpu") -> None:
        super().__init__()
        self.left = torch.nn.Parameter(torch.full((2, 3), fill, device=device))
        self.register_buffer("right", torch.full((2,), int(fill), device=device))


def array(fill: float) -> Any:
    return np.full((2, 3), fill, np.float32)


def read_only(fill: float) -> Any:
    made = array(fill)
    made.flags.writeable = False
    return made


LEAVES: dict[str, Callable[[float], Any]] = {
    "numpy": array,
    "numpy strided": lambda f: np.full((3, 4), f, np.float32)[:, ::2].T,
    "numpy big-endian": lambda f: array(f).astype(">f4"),
    "numpy of another shape": lambda f: np.full(6, f, np.float32),
    "numpy of another type": lambda f: np.full((2, 3), int(f)),
    "numpy without dimensions": lambda f: np.array(f, np.float32),
    "numpy scalar": np.float32,
    "numpy shard": lambda f: ArrayShard(array(f), (0, 0), (2, 3)),
    "numpy read-only": read_only,
    "numpy broadcast": lambda f: np.lib.stride_tricks.as_strided(np.full(3, f, np.float32), (2, 3), (0, 4)),
    "numpy sliding": lambda f: np.lib.stride_tricks.as_strided(np.full(4, f, np.float32), (2, 3), (4, 4)),
    "numpy masked": lambda f: np.ma.masked_array(array(f), array(f) > 0),
    "numpy of strings": lambda f: np.array(["x", "y"]),
    "bytes": lambda f: bytes([int(f)] * 3),
    "bytearray": lambda f: bytearray([int(f)] * 3),
    "memoryview": lambda f: memoryview(bytearray([int(f)] * 3)),
    "memoryview read-only": lambda f: memoryview(bytes([int(f)] * 3)),
    "torch": lambda f: torch.full((2, 3), f),
    "torch parameter": lambda f: torch.nn.Parameter(torch.full((2, 3), f)),
    "torch strided": lambda f: torch.full((3, 2), f).t(),
    "torch expanded": lambda f: torch.full((3,), f).expand(2, 3),
    "torch sliding": lambda f: torch.full((4,), f).as_strided((2, 3), (1, 1)),
    "torch meta": lambda f: torch.full((2, 3), f, device="meta"),
    "torch sparse": lambda f: torch.full((2, 3), f).to_sparse(),
    "torch inference": lambda f: inference(f),
    "jax": lambda f: jnp.full((2, 3), f),
    "jax abstract": lambda f: jax.ShapeDtypeStruct((2, 3), jnp.float32),
    "jax pinned": lambda f: jax.device_put(jnp.full((2, 3), f), pinned()),
    "jax key": lambda f: jax.random.key(int(f)),
    "jax keys abstract": lambda f: jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2)),
    "int": int,
    "float": float,
    "text": lambda f: f"text {f}",
    "bool": lambda f: f > 1.5,
    "complex": complex,
    "long": lambda f: 2**70 + int(f),
    "none": lambda f: None,
    "dtype": lambda f: torch.float16,
    "object": lambda f: object(),
}

CONTAINERS: dict[str, Callable[[Any, Any], Any]] = {
    "dict": lambda a, b: {"left": a, "right": b},
    "dict of other keys": lambda a, b: {"left": a, "other": b},
    "dict of ints": lambda a, b: {0: a, 1: b},
    "dict of texts": lambda a, b: {"0": a, "1": b},
    "dict of both": lambda a, b: {1: a, "1": b},
    "OrderedDict": lambda a, b: OrderedDict(right=b, left=a),
    "defaultdict": lambda a, b: defaultdict(list, left=a, right=b),
    "dict of its own": lambda a, b: Entries(left=a, right=b),
    "proxy": lambda a, b: MappingProxyType({"left": a, "right": b}),
    "list": lambda a, b: [a, b],
    "list of its own": lambda a, b: Things([a, b]),
    "longer list": lambda a, b: [a, b, a],
    "tuple": lambda a, b: (a, b),
    "longer tuple": lambda a, b: (a, b, a),
    "deque": lambda a, b: deque([a, b], 7),
    "named tuple": Pair,
    "dataclass": Plain,
    "dataclass with a constructor": Counting,
    "dataclass with slots": Slots,
    "node": lambda a, b: Node(a, b, "aux"),
    "torch node": TorchNode,
    "per rank": lambda a, b: PerRank({"left": a, "right": b}),
    "stateful": lambda a, b: Stateful({"left": a, "right": b}),
    "empty dict": lambda a, b: {},
    "empty list": lambda a, b: [],
    "set": lambda a, b: {1, 2},
}  # fmt: skip

MODULES: dict[str, Callable[[float], Any]] = {
    "module": Module,
    "module on meta": lambda f: Module(f, "meta"),
    "its state": lambda f: Module(f).state_dict(),
    "optimizer": lambda f: trained(Module(f)),
}


def inference(fill: float) -> Any:
    with torch.inference_mode():
        return torch.full((3, 2), fill).t()


def pinned() -> Any:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")


def trained(module: torch.nn.Module) -> Any:
    optimizer = torch.optim.AdamW(list(module.parameters()))
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def content(value: Any) -> Any:
    """A value as plain Python, whatever holds it: what must be the same on both sides."""
    if isinstance(value, torch.Tensor):
        return ("array", value.detach().to_dense().tolist() if value.device.type != "meta" else "meta")
    if isinstance(value, ArrayShard):
        return content(value.array)
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        return ("array", np.asarray(value).tolist())
    if isinstance(value, np.ndarray | np.generic):
        return ("array", np.asarray(value).tolist())
    if isinstance(value, bytes | bytearray | memoryview):
        return ("array", list(bytes(value)))
    if isinstance(value, PerRank):
        return content(value.value)
    if isinstance(value, Stateful | torch.nn.Module | torch.optim.Optimizer):
        return content(value.state_dict())
    if isinstance(value, Node | TorchNode):
        return [content(value.left), content(value.right)]
    if hasattr(value, "_fields"):
        return content(value._asdict())
    if dataclasses.is_dataclass(value):
        return {f.name: content(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: content(item) for key, item in value.items()}
    if isinstance(value, list | tuple | deque):
        return [content(item) for item in value]
    return value


def positional(told: Any) -> Any:
    """Fields by position: what a list or tuple makes of a thing with fields."""
    return [positional(v) for v in told.values()] if isinstance(told, dict) else told


def arrays(value: Any) -> Iterator[Any]:
    """The leaves of a target that are memory."""
    if isinstance(value, ArrayShard):
        yield value.array
    elif isinstance(value, np.ndarray | torch.Tensor | bytearray | memoryview):
        yield value
    elif isinstance(value, PerRank):
        yield from arrays(value.value)
    elif isinstance(value, Stateful):
        return  # takes what it is given
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
    elif isinstance(value, Node | TorchNode):
        yield from arrays([value.left, value.right])
    elif dataclasses.is_dataclass(value):
        yield from arrays([getattr(value, f.name) for f in dataclasses.fields(value)])
    elif isinstance(value, Mapping):
        yield from arrays([*value.values()])
    elif isinstance(value, list | tuple | deque):
        for item in value:
            yield from arrays(item)


def expect_filled(saved: Any, target: Any, back: Any) -> None:
    """The law, for what did not raise."""
    there, here = content(back), content(saved)
    assert there == here or positional(there) == positional(here), "what came back was not saved"
    memory = [*arrays(target)]
    assert {*map(id, memory)} <= {*map(id, arrays(back))}, "a leaf of the target was replaced, not filled"
    if target is None or isinstance(target, PerRank | jax.ShapeDtypeStruct):
        return
    scalar = isinstance(target, bool | int | float | complex | str | torch.dtype)
    assert scalar or type(back) is type(target), f"{type(back)} came back for a {type(target)}"
    if isinstance(target, Node):
        assert back.aux == target.aux
    if isinstance(target, deque):
        assert back.maxlen == target.maxlen
    if isinstance(target, defaultdict):
        assert back.default_factory is target.default_factory


def trial(folder: Path, saved: Any, targets: Mapping[str, Callable[[], Any]]) -> tuple[set[str], set[str]]:
    """Restore into each target; returns the names of those that were filled and of those that were refused."""
    save(folder, {"item": {"x": saved}})
    filled, refused = set(), set()
    with CheckpointManager(folder) as manager:
        checkpoint = manager.open()
        for name, make in targets.items():
            target = make()
            try:
                back = checkpoint.restore({"item": {"x": target}})["item"]["x"]
            except CheckpointError as error:
                if "item/x" not in error.message or not error.hint:
                    raise AssertionError(f"{name}: no name or no hint: {error}") from error
                refused.add(name)
                continue
            except BaseException as error:
                raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
            try:
                expect_filled(saved, target, back)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
            filled.add(name)
    return filled, refused


def everything(*inside: str) -> dict[str, Callable[[], Any]]:
    """Every target by name; containers hold each of the leaves `inside`."""
    flat: dict[str, Callable[[], Any]] = {name: lambda make=make: make(2.0) for name, make in LEAVES.items()}  # type: ignore[misc]
    flat |= {name: lambda make=make: make(2.0) for name, make in MODULES.items()}  # type: ignore[misc]
    for name, make in CONTAINERS.items():
        for inner in inside:
            flat[f"{name} of {inner}"] = lambda make=make, inner=inner: make(LEAVES[inner](2.0), LEAVES["int"](2.0))  # type: ignore[misc]
    return flat


UNSAVEABLE = {"numpy masked", "numpy of strings", "torch meta", "torch sparse", "jax abstract", "jax keys abstract", "object"}
NEVER_FILLED = {
    "numpy read-only", "numpy broadcast", "numpy sliding", "numpy masked", "numpy of strings", "memoryview read-only",
    "torch expanded", "torch sliding", "torch meta", "torch sparse", "object", "module on meta",
}  # fmt: skip


@pytest.mark.parametrize("kind", [name for name in LEAVES if name not in UNSAVEABLE])
def test_every_leaf_into_every_target(tmp_path: Path, kind: str) -> None:
    filled, refused = trial(tmp_path, LEAVES[kind](1.0), everything("numpy"))
    assert not filled & NEVER_FILLED
    assert not {name for name in refused if name == kind} - NEVER_FILLED, "its own kind must be a target"
    assert "none" in filled
    plain = ("int", "float", "text", "bool", "complex", "long", "none", "dtype")
    assert (filled & set(plain)) == (set(plain) if kind in plain else {"none"})
    assert not {name for name in filled if " of " in name and name not in LEAVES}, "a leaf is no container"


@pytest.mark.parametrize("kind", sorted({*CONTAINERS} - {"set"}))
def test_every_container_into_every_target(tmp_path: Path, kind: str) -> None:
    saved = CONTAINERS[kind](array(1.0), 1)
    filled, _ = trial(tmp_path, saved, everything("numpy", "torch", "jax", "numpy read-only", "torch meta", "none"))
    assert not filled & NEVER_FILLED
    assert (
        not {name for name in filled if name.endswith(("numpy read-only", "torch meta"))}
        - {f"{empty} of {inner}" for empty in ("empty dict", "empty list") for inner in ("numpy read-only", "torch meta")}
        - {"stateful of numpy read-only", "stateful of torch meta"}
    )  # it takes what it is given
    assert f"{kind} of numpy" in filled
    assert f"{kind} of torch" in filled
    assert f"{kind} of jax" in filled
    assert not filled & {*LEAVES} - {"none"}


@pytest.mark.parametrize("kind", ["module", "its state", "optimizer"])
def test_modules_into_every_target(tmp_path: Path, kind: str) -> None:
    filled, _ = trial(tmp_path, MODULES[kind](1.0), everything("numpy"))
    assert kind in filled
    assert not filled & ({*LEAVES} - {"none"})
    assert "module on meta" not in filled


@pytest.mark.parametrize("kind", sorted(UNSAVEABLE))
def test_what_cannot_be_saved_says_where(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UnsupportedStateError) as caught:
        save(tmp_path, {"item": {"x": LEAVES[kind](1.0)}})
    assert caught.value.path == "item/x"


def test_none_was_saved_where_a_module_is(tmp_path: Path) -> None:
    save(tmp_path, {"m": None, "n": 5, "d": {"a": 1}})
    for target, named in (
        ({"m": Module(1.0)}, "m/left"),
        ({"m": {"deep": [array(0.0)]}}, "m/deep/0"),
        ({"n": {"deep": array(0.0)}}, "n/deep"),
        ({"n": Stateful(array(0.0))}, "n/value"),
        ({"d": [array(0.0)]}, "d/0"),
        ({"d": {"a": 1, "b": {"c": array(0.0)}}}, "d/b/c"),
        ({"d": 7}, "'d'"),
    ):
        with pytest.raises(CheckpointError, match=named):
            load(tmp_path, target)


def test_keys_of_two_types_that_read_the_same(tmp_path: Path) -> None:
    saved = {1: np.ones(2), "1": np.zeros(3), (1, 2): {"a": np.arange(4)}, "(1, 2)": {"a": np.arange(5)}, None: 1, "None": 2}
    save(tmp_path, {"x": saved})
    target = {1: np.empty(2), "1": np.empty(3), (1, 2): None, "(1, 2)": {"a": np.empty(5, int)}, "None": 0, None: 0}
    for back in (load(tmp_path)["x"], load(tmp_path, {"x": target})["x"]):
        assert content(back) == content(saved)
    with CheckpointManager(tmp_path) as manager:
        assert {"x/~int:1", "x/1", "x/~tuple:(1, 2)/a", "x/(1, 2)/a"} == set(manager.open())
    save(tmp_path / "one", {"x": {1: np.ones(2)}})
    with pytest.raises(CheckpointError, match="not in the checkpoint"):
        load(tmp_path / "one", {"x": {"1": np.ones(2)}})


def test_a_name_of_one_key_is_as_it_was(tmp_path: Path) -> None:
    save(tmp_path, {"optimizer": trained(Module(1.0)), "numbers": {0: np.ones(1), 1.5: np.ones(1), True: np.ones(1)}})
    with CheckpointManager(tmp_path) as manager:
        assert {"optimizer/state/0/exp_avg", "numbers/0", "numbers/1.5", "numbers/True"} <= set(manager.open())


def test_constructors_do_not_run_again(tmp_path: Path) -> None:
    for cls in (Counting, jax.tree_util.register_dataclass(dataclasses.make_dataclass("Registered", ["right"], bases=()))):
        value = cls(array(1.0), 1) if cls is Counting else cls(3)
        target = cls(array(0.0), 5) if cls is Counting else cls(5)
        save(tmp_path, {"x": value})
        assert load(tmp_path, {"x": target})["x"].right == value.right


def test_scalars_of_numpy_come_back_as_such(tmp_path: Path) -> None:
    saved = {"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True), "d": np.array(2.0)}
    save(tmp_path, {"x": saved})
    for back in (load(tmp_path)["x"], load(tmp_path, {"x": {**saved, "d": np.zeros(())}})["x"]):
        assert {key: type(item) for key, item in back.items()} == {key: type(item) for key, item in saved.items()}
        assert content(back) == content(saved)


def test_random_keys(tmp_path: Path) -> None:
    save(tmp_path, {"k": jax.random.split(jax.random.key(3), 4)})
    abstract = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
    back = load(tmp_path, {"k": abstract})["k"]
    assert back.dtype == abstract.dtype
    assert content(back) == content(jax.random.split(jax.random.key(3), 4))
    with pytest.raises(CheckpointError, match=r"'k' is a jax\.key"):
        load(tmp_path, {"k": jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 4)})
    with pytest.raises(CheckpointError, match="'k' is U32"):
        load(tmp_path, {"k": jax.random.key(0)})
    gone = jax.random.key(0)
    jax.random.key_data(gone)
    gone.delete()
    with pytest.raises(UnsupportedStateError, match="donated or deleted"):
        save(tmp_path, {"k": gone})


def test_inside_of_jit_is_a_typed_error(tmp_path: Path) -> None:
    @jax.jit
    def step(x: Any) -> Any:
        save(tmp_path, {"x": x})
        return x

    with pytest.raises(UnsupportedStateError, match="abstract"):
        step(jnp.ones(2))


def test_memory_kinds(tmp_path: Path) -> None:
    array_there = jax.device_put(jnp.arange(4.0), pinned())
    save(tmp_path, {"x": array_there, "y": jnp.arange(4.0)})
    for target in (array_there, jax.ShapeDtypeStruct((4,), jnp.float32, sharding=pinned())):
        back = load(tmp_path, {"x": target, "y": target})
        assert all(item.sharding.memory_kind == "pinned_host" for item in back.values())
        assert all(item.tolist() == [0, 1, 2, 3] for item in back.values())


def test_flax_and_equinox(tmp_path: Path) -> None:
    nnx = pytest.importorskip("flax.nnx")
    eqx = pytest.importorskip("equinox")
    core = pytest.importorskip("flax.core")
    struct = pytest.importorskip("flax.struct")

    class Net(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self, seed: int) -> None:
            rngs = nnx.Rngs(seed)
            self.first = nnx.Linear(2, 3, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(1, 1, rngs=rngs), nnx.Linear(1, 1, rngs=rngs)])
            self.more = nnx.Dict(a=nnx.Param(jnp.full(2, float(seed))))
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    class Eqx(eqx.Module):  # type: ignore[misc, name-defined]
        w: Any
        name: Any = eqx.field(static=True)

        def __init__(self, seed: int) -> None:
            self.w, self.name = jnp.full(2, float(seed)), object  # what no checkpoint holds

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Registered:
        x: Any
        static: Any = dataclasses.field(metadata={"static": True}, default=len)

        def __post_init__(self) -> None:
            self.x = self.x + 1

    @struct.dataclass
    class Struct:
        x: Any
        apply: Any = struct.field(pytree_node=False, default=len)

    makes: dict[str, Callable[[int], Any]] = {
        "nnx.Module": Net,
        "nnx.State": lambda seed: nnx.state(Net(seed)),
        "nnx.List": lambda seed: nnx.List([jnp.full(2, float(seed)), nnx.Param(jnp.ones(1) * seed)]),
        "nnx.Param": lambda seed: nnx.Param(jnp.ones(1) * seed),
        "FrozenDict": lambda seed: core.FrozenDict({"b": jnp.ones(2) * seed, "a": {"c": jnp.ones(1) * seed}}),
        "equinox": Eqx,
        "equinox MLP": lambda seed: eqx.filter(eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(seed)), eqx.is_array),
        "register_dataclass": lambda seed: Registered(jnp.ones(2) * seed),
        "flax.struct": lambda seed: Struct(jnp.ones(2) * seed),
        "abstract": lambda seed: jax.eval_shape(lambda: nnx.state(Net(seed))) if seed else nnx.state(Net(9)),
    }
    for number, (name, make) in enumerate(makes.items()):
        saved, target = make(0), make(1)
        save(tmp_path / str(number), {"x": saved})
        back = load(tmp_path / str(number), {"x": target})["x"]
        assert jax.tree.structure(back) == jax.tree.structure(target), name
        assert [*map(content, jax.tree.leaves(back))] == [*map(content, jax.tree.leaves(saved))], name
        plain = jax.tree.leaves(load(tmp_path / str(number))["x"])
        assert sorted(map(str, map(content, plain))) == sorted(map(str, map(content, jax.tree.leaves(saved)))), name
    with pytest.raises(CheckpointError, match=r"no place for it|not in the checkpoint"):
        load(tmp_path / "4", {"x": core.FrozenDict({"b": jnp.ones(2)})})


def test_structure_of_an_earlier_version(tmp_path: Path) -> None:
    """Registered nodes were written as dicts of texts, dataclasses with their static fields."""
    save(tmp_path, {"node": {"0": array(1.0), "1": 5}, "struct": {"x": array(1.0), "static": 3}})

    @dataclasses.dataclass
    class Struct:
        x: Any
        static: int = dataclasses.field(metadata={"static": True})

    back = load(tmp_path, {"node": Node(array(0.0), 0, "aux"), "struct": Struct(array(0.0), 7)})
    assert (back["node"].left[0, 0], back["node"].right, back["node"].aux) == (1, 5, "aux")
    assert (back["struct"].x[0, 0], back["struct"].static) == (1, 7)


def test_a_counter_and_a_torch_size(tmp_path: Path) -> None:
    save(tmp_path, {"c": Counter("aab"), "s": torch.Size([2, 3])})
    back = load(tmp_path, {"c": Counter(), "s": torch.Size([])})
    assert (back["c"], back["s"]) == (Counter("aab"), torch.Size([2, 3]))
    assert isinstance(back["s"], torch.Size)


def test_errors_are_of_one_tree() -> None:
    assert issubclass(CheckpointError, S3LoaderError)
