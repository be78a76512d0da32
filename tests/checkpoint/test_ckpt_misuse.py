"""What is done wrong is told with where it happened and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s3loader.checkpoint import (
    ArrayShard,
    BestN,
    CheckpointManager,
    CheckpointOptions,
    EveryNSteps,
    LatestN,
    PerRank,
    load,
    open_checkpoint,
    save,
)
from s3loader.checkpoint.format import layout
from s3loader.errors import S3LoaderError
from s3loader.torch import S3StorageReader, S3StorageWriter


class Odd:
    """No state."""


def cyclic() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


def deep() -> Any:
    value: Any = 1
    for _ in range(5000):
        value = [value]
    return value


def saved(manager: CheckpointManager, items: Any, step: Any = 9, **kwargs: Any) -> None:
    manager.save(step, items, **kwargs).result(600)


def restored(manager: CheckpointManager, target: Any) -> None:
    manager.restore(1, {"x": target})


def damaged(manager: CheckpointManager, suffix: str, content: bytes | None) -> None:
    """Spoil one file of step 1."""
    path = next(Path(manager.store.url.removeprefix("file://")).glob(f"ckpt/000000000001/**/*{suffix}"))
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def then(manager: CheckpointManager, suffix: str, content: bytes | None, work: Callable[[], Any]) -> None:
    damaged(manager, suffix, content)
    work()


def closed(manager: CheckpointManager, work: Callable[[], Any]) -> None:
    manager.close()
    work()


OTHER_FORMAT = b'{"meta": {"s3loader": {"format": 9}}}\n'

MISUSE: dict[str, Callable[[CheckpointManager], Any]] = {
    # saving
    "a step that is no number": lambda m: saved(m, {"a": 1}, "7"),
    "a negative step": lambda m: saved(m, {"a": 1}, -1),
    "a step that is there": lambda m: saved(m, {"a": 1}, 1),
    "an unknown on_exists": lambda m: m.save(9, {"a": 1}, on_exists="overwrite"),  # type: ignore[arg-type]
    "no dict": lambda m: saved(m, [1]),
    "an array alone": lambda m: saved(m, np.ones(3)),
    "a name that is no string": lambda m: saved(m, {1: 2}),
    "an object": lambda m: saved(m, {"a": {"b": Odd()}}),
    "strings in an array": lambda m: saved(m, {"a": np.array(["x"])}),
    "objects in an array": lambda m: saved(m, {"a": np.array([object()])}),
    "a masked array": lambda m: saved(m, {"a": np.ma.masked_array([1, 2], [0, 1])}),
    "a cycle": lambda m: saved(m, {"a": cyclic()}),
    "too deep": lambda m: saved(m, {"a": deep()}),
    "a key of another type": lambda m: saved(m, {"a": {frozenset(): 3}}),
    "broken Unicode": lambda m: saved(m, {"a": "\ud800"}),
    "metadata that is no JSON": lambda m: saved(m, {"a": 1}, metadata={"x": np.ones(2)}),
    "a box that leaves a gap": lambda m: saved(m, {"a": ArrayShard(np.ones(3), (0,), (4,))}),
    "a meta tensor": lambda m: saved(m, {"a": torch.ones(3, device="meta")}),
    "a sparse tensor": lambda m: saved(m, {"a": torch.eye(3).to_sparse()}),
    # restoring
    "a step that never was": lambda m: m.restore(5),
    "a step that never was, opened": lambda m: m.open(5),
    "a step that never was, deleted": lambda m: m.delete(5),
    "an item that never was": lambda m: m.restore(1, items=["y"]),
    "a target that never was": lambda m: m.restore(1, {"y": np.ones(3)}),
    "a tensor that never was": lambda m: m.open(1).tensor("y"),
    "a slice of what never was": lambda m: m.open(1).get_slice("y"),
    "a target of another shape": lambda m: restored(m, np.ones(4)),
    "a target of another kind": lambda m: restored(m, "text"),
    "a target without state": lambda m: restored(m, Odd()),
    "an array where a value was": lambda m: m.restore(1, {"n": np.ones(3)}),
    "a deeper target": lambda m: m.restore(1, {"d": {"k": None, "other": None}}),
    "per rank, of another rank": lambda m: m.open(1).restore({"r": None}, rank=3),
    # damage
    "the index is damaged": lambda m: then(m, "index.json.zst", b"x", lambda: m.restore(1)),
    "the index is gone": lambda m: then(m, "index.json.zst", None, lambda: m.restore(1)),
    "a data file is gone": lambda m: then(m, ".safetensors", None, lambda: m.restore(1)),
    "a data file is cut": lambda m: then(m, ".safetensors", b"x", lambda: m.restore(1)),
    "the root is damaged": lambda m: then(m, "root.jsonl", b"{}", lambda: m.restore(1)),
    "the root is of another format": lambda m: then(m, "root.jsonl", OTHER_FORMAT, lambda: m.open(1)),
    "nothing is whole": lambda m: then(m, "index.json.zst", b"x", lambda: m.restore(on_corruption="previous")),
    "the mark is damaged": lambda m: (m.store.put(layout.COMPACTED, b"{}"), m.latest()),
    # the manager
    "saving when closed": lambda m: closed(m, lambda: m.save(9, {"a": 1})),
    "restoring when closed": lambda m: closed(m, m.restore),
    "collecting when closed": lambda m: closed(m, m.gc),
    "rank out of range": lambda m: CheckpointManager(m.store, rank=2, world_size=2),
    "no ranks": lambda m: CheckpointManager(m.store, world_size=0),
    "too many ranks": lambda m: CheckpointManager(m.store, world_size=10**6),
    "ranks without a job": lambda m: saved(CheckpointManager(m.store, world_size=2), {"a": 1}),
    "a rank that is alone": lambda m: CheckpointManager(
        m.store, rank=1, world_size=2, job="j", options=CheckpointOptions(deadline=0.1)
    ).session(),
    "a save while others are missing": lambda m: saved(
        CheckpointManager(m.store, world_size=2, job="k", options=CheckpointOptions(deadline=0.1)), {"a": 1}
    ),
    # the simple functions
    "nothing to load": lambda m: load(m.store.url + "/none"),
    "nothing to open": lambda m: open_checkpoint(m.store.url + "/none"),
    "something else to save": lambda m: save(m.store.url + "/other", {"a": Odd()}),
    # torch.distributed.checkpoint's own protocol
    "a writer that was not set up": lambda m: S3StorageWriter(m.store.url).prepare_global_plan([]),
    "a reader that was not set up": lambda m: S3StorageReader(m.store.url).prepare_local_plan(torch_plan()),
    "a reader of nothing": lambda m: S3StorageReader(m.store.url + "/none").read_metadata(),
    "readers of two steps": lambda m: S3StorageReader(m.store.url).prepare_global_plan(
        [torch_plan((1, "a")), torch_plan((2, "b"))]
    ),
    "a writer without a job": lambda m: (
        (writer := S3StorageWriter(m.store.url, world_size=2)).set_up_storage_writer(True, rank=0, use_collectives=False),
        writer.prepare_local_plan(torch.distributed.checkpoint.planner.SavePlan([])),
    ),
}  # fmt: skip


def torch_plan(data: Any = None) -> Any:
    return torch.distributed.checkpoint.planner.LoadPlan([], storage_data=data)


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_told_with_url_and_hint(tmp_path: Path, name: str) -> None:
    with CheckpointManager(tmp_path / "run") as manager:
        items = {"x": np.arange(3.0), "n": 1, "d": {"k": 1}, "r": PerRank(np.ones(2))}
        manager.save(1, items).result(600)
    manager = CheckpointManager(tmp_path / "run")
    with pytest.raises(S3LoaderError) as caught:
        MISUSE[name](manager)
    error = caught.value
    assert error.url, f"no url: {error}"
    assert error.url.startswith(f"file://{tmp_path}")
    assert error.op, f"no op: {error}"
    assert error.hint, f"no hint: {error}"
    assert str(error).count("\nhint: ") >= 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: ArrayShard(np.ones(3), (2,), (4,)), lambda: LatestN(0), lambda: EveryNSteps(0), lambda: BestN("loss", 0),
        lambda: BestN("loss", 1, mode="least"),  # type: ignore[arg-type]
        lambda: CheckpointOptions(part_size=0), lambda: CheckpointOptions(concurrency=0),
        lambda: CheckpointOptions(overlap="drop"),  # type: ignore[arg-type]
        lambda: S3StorageWriter().set_up_storage_writer(True), lambda: S3StorageReader().read_metadata(),
    ],
)  # fmt: skip
def test_what_has_no_url_yet_has_a_hint(make: Callable[[], Any]) -> None:
    with pytest.raises(S3LoaderError) as caught:
        make()
    assert caught.value.hint
