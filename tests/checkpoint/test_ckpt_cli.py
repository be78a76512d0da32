"""``s3loader ckpt`` as a person and a program use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from s3loader.checkpoint import CheckpointManager
from s3loader.cli.main import exit_code, root
from s3loader.errors import CheckpointNotFoundError, IntegrityError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with CheckpointManager(tmp_path / "run") as manager:
        for step in (10, 20):
            model = {"layer.0.weight": np.full((3, 4), step, np.float32), "layer.0.bias": np.zeros(4, np.float16)}
            extra = {"new": np.ones(2)} if step == 20 else {}
            manager.save(step, {"model": model, "loader": {"consumed": step}, **extra}, metrics={"loss": 1 / step}).result(600)
    return tmp_path / "run"


def call(*arguments: Any) -> str:
    result = CliRunner().invoke(root, ["ckpt", *[str(a) for a in arguments]], catch_exceptions=False, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def data(*arguments: Any) -> Any:
    return json.loads(call(*arguments, "--json"))


def test_looking(run: Path) -> None:
    assert [line.split()[0] for line in call("ls", run).splitlines()] == ["step", "10", "20"]
    assert [f["step"] for f in data("ls", run)] == [10, 20]
    assert call("latest", run) == "20\n"
    assert data("latest", run) == {"step": 20}
    assert "model/layer.0.weight" in call("inspect", run, "--step", 10)
    assert '"consumed"' in call("inspect", run, "--values")
    shown = data("inspect", run, "--values")
    assert shown["step"] == 20
    assert {t["name"] for t in shown["tensors"]} == {"model/layer.0.weight", "model/layer.0.bias", "new"}
    assert shown["values"]["of"]["loader"]["of"]["consumed"] == 20


def test_comparing(run: Path) -> None:
    found = data("diff", run, 10, 20)
    assert found["changed"] == ["model/layer.0.weight"]
    assert found["same"] == ["model/layer.0.bias"]
    assert found["only_in_second"] == ["new"]
    assert found["values"] == {"loader/consumed": [10, 20]}
    assert "only in 20      new" in call("diff", run, 10, 20)


def test_exporting(run: Path, tmp_path: Path) -> None:
    call("export", run, tmp_path / "out/model.safetensors", "--item", "model", "--safetensors")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert set(tensors) == {"layer.0.weight", "layer.0.bias"}
    assert np.array_equal(tensors["layer.0.weight"], np.full((3, 4), 20, np.float32))
    data("export", run, tmp_path / "all.safetensors", "--step", 10)
    assert set(load_file(tmp_path / "all.safetensors")) == {"model/layer.0.weight", "model/layer.0.bias"}


def test_checking_and_cleaning(run: Path) -> None:
    assert call("verify", run, "--all") == "step 20: ok\nstep 10: ok\n"
    (run / "ckpt/000000000015/00000001-000009-00000000").mkdir(parents=True)
    (run / "ckpt/000000000015/00000001-000009-00000000/d-00000-000.safetensors").write_bytes(b"x" * 10)
    assert data("gc", run)["keys"] == []
    assert data("gc", run, "--dry-run", "--grace", "0s")["bytes"] == 10
    assert data("gc", run, "--grace", "0s")["bytes"] == 10
    assert "would delete" in call("delete", run, 10, "--dry-run")
    assert data("ls", run)[0]["step"] == 10
    call("delete", run, 10)
    assert [f["step"] for f in data("ls", run)] == [20]
    file = next((run / "ckpt/000000000020").rglob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match="1 of 1 steps are damaged: 20"):
        call("verify", run)


COMMANDS = [
    ("ls",), ("latest",), ("inspect",), ("verify",), ("verify", "--all"), ("gc",), ("gc", "--dry-run"),
    ("diff", 1, 2), ("export", "out"), ("delete", 1),
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(map(str, c)))
@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_path_that_does_not_exist(tmp_path: Path, command: tuple[Any, ...], kind: str) -> None:
    url = str(tmp_path / "nothing") if kind == "file" else "memory://nothing/at/all"
    name, *rest = command
    with pytest.raises(CheckpointNotFoundError, match="no such run") as caught:
        call(name, url, *rest)
    assert exit_code(caught.value) == 4
    assert caught.value.hint
    assert "nothing" in caught.value.url
    assert not (tmp_path / "nothing").exists()


def test_a_run_without_a_step(tmp_path: Path) -> None:
    def both(*arguments: Any) -> tuple[str, str]:
        result = CliRunner().invoke(root, ["ckpt", *[str(a) for a in arguments]], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout, result.stderr

    out, err = both("ls", tmp_path)
    assert out.split() == ["step", "saved", "state", "written", "tensors", "ranks", "epoch", "metrics"]
    assert err == f"no step is committed in {tmp_path}\n"
    assert data("ls", tmp_path) == []
    assert "deleted 0 objects" in both("gc", tmp_path)[1]
    for command in ("latest", "inspect", "verify"):
        with pytest.raises(CheckpointNotFoundError) as caught:
            call(command, tmp_path)
        assert caught.value.hint


def test_gc_tells_of_tombstones(run: Path) -> None:
    call("delete", run, 10)
    for arguments, verb in ((("--dry-run",), "would delete"), ((), "deleted")):
        result = CliRunner().invoke(root, ["ckpt", "gc", str(run), "--grace", "0s", *arguments], catch_exceptions=False)
        assert f"{verb} the tombstones of 1 steps" in result.stderr


def test_errors_and_exit_codes(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        call("latest", tmp_path / "nothing")
    for arguments, code in (
        (["ckpt", "ls", str(tmp_path / "nothing")], 4),
        (["ckpt", "ls", str(run)], 0),
        (["ckpt", "ls"], 2),
    ):
        done = subprocess.run([sys.executable, "-m", "s3loader", *arguments], capture_output=True, text=True, timeout=600)
        assert done.returncode == code, done.stderr
        if code == 4:
            assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
