"""The examples on Ray run; Ray Train's worker is killed, and the weights are those of a run nobody killed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from examples._digits import CLASSES, FEATURES, digest, parser_of, prepare, to_arrays
from s3loader import Loader, from_manifest

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> list[str]:
    """What the example says, run on the cluster that is there."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    importlib.import_module(f"examples.{name}").main()
    return capsys.readouterr().out.splitlines()


def test_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    packed, counted, wrote = (line.split() for line in run(monkeypatch, capsys, "ray_pack", "--url", str(tmp_path))[-3:])
    assert packed[1] == counted[1] == wrote[1] == "1797"


def test_train_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(monkeypatch, capsys, "train_ray", "--url", str(tmp_path), "--steps", "12", "--every", "5", "--kill-at", "8")
    assert "resumed at step 5" in told
    assert told[-1] == f"weights {straight(tmp_path, steps=12)}"


def straight(url: Path, steps: int) -> str:
    """The weights after `steps` steps of two ranks that nobody kills, computed here: each takes half of a batch, and the
    gradients are averaged."""
    import torch
    from torch import nn

    from examples.train_ray import GLOBAL_BATCH

    manifest = prepare(parser_of("").parse_args(["--url", str(url)])).manifest
    dataset = from_manifest(manifest, group="webdataset")
    options: dict[str, Any] = {"batch_size": GLOBAL_BATCH // 2, "seed": 1, "transform": to_arrays, "collate": "fixed"}
    ranks = [iter(Loader(dataset, rank=rank, world_size=2, **options)) for rank in range(2)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        for rank in ranks:
            x, y = map(torch.as_tensor, next(rank))
            (nn.functional.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
    for rank in ranks:
        rank.close()  # type: ignore[attr-defined]
    return digest(tensor.numpy() for tensor in model.state_dict().values())
