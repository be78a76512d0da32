"""State that is easily lost: what cannot be saved whole is refused, what does not fit a target is an error."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from s3loader.checkpoint import CheckpointManager, load, open_checkpoint, save
from s3loader.errors import CheckpointError, CheckpointNotFoundError, ConfigError, UnsupportedStateError


@dataclass(frozen=True)
class Ema:
    mean: Any
    count: int = field(init=False, default=0)


@dataclass
class Moments:
    mean: Any
    square: Any = None


class Pair(NamedTuple):
    mean: Any
    other: Any


def test_a_masked_array_would_lose_its_mask(tmp_path: Path) -> None:
    masked = np.ma.masked_array([1.0, 2.0], [False, True])
    with pytest.raises(UnsupportedStateError, match="masked"):
        save(tmp_path, {"x": masked})
    save(tmp_path, {"x": np.array([3.0, 4.0])})
    with pytest.raises(CheckpointError, match="'x': the array of the target is masked"):
        load(tmp_path, {"x": masked})
    assert masked.tolist() == [1, None]


def test_integers_of_any_size(tmp_path: Path) -> None:
    values = [2**53 + 1, -(2**70), 10**5000, -(10**5000)]  # the last have more digits than Python writes
    save(tmp_path, {"n": values})
    assert load(tmp_path)["n"] == values


def test_fields_that_the_constructor_does_not_take(tmp_path: Path) -> None:
    ema = Ema(np.ones(2))
    object.__setattr__(ema, "count", 5)
    save(tmp_path, {"ema": ema})
    back = load(tmp_path, {"ema": Ema(np.zeros(2))})["ema"]
    assert (back.mean.tolist(), back.count) == ([1, 1], 5)


@pytest.mark.parametrize("target", [Moments(np.zeros(2)), Pair(np.zeros(2), 0)])
def test_a_target_of_other_fields_is_an_error(tmp_path: Path, target: Any) -> None:
    save(tmp_path, {"x": {"mean": np.ones(2), "count": 1}})
    with pytest.raises(CheckpointError, match="'x' has the fields"):
        load(tmp_path, {"x": target})


def test_a_slice_is_indexed_by_integers_only(tmp_path: Path) -> None:
    save(tmp_path, {"x": np.arange(6)})
    with open_checkpoint(tmp_path) as checkpoint:
        view = checkpoint.get_slice("x")
        assert view[np.int64(2)] == 2
        for wrong, error in ((True, IndexError), (1.5, TypeError), ("1", TypeError)):
            with pytest.raises(error):
                view[wrong]


def test_a_step_deleted_while_it_is_read(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, {"x": np.arange(6)}).result(600)
        opened = manager.open(1)
        manager.delete(1)
        with pytest.raises(CheckpointNotFoundError, match="was deleted"):
            opened.tensor("x")
        with pytest.raises(CheckpointNotFoundError, match="was deleted"):
            opened.verify()


def test_arguments_of_other_kinds_are_typed_errors(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        for metrics in ({"loss": "low"}, {"loss": None}, {"loss": 10**400}, [1]):
            with pytest.raises((CheckpointError, ConfigError), match="metrics"):
                manager.save(1, {"x": 1}, metrics=metrics)  # type: ignore[arg-type]  # what is tested
        with pytest.raises(ConfigError, match='"previous"'):
            manager.restore(on_corruption="ignore")  # type: ignore[arg-type]  # what is tested


FAILS = """
import sys, numpy as np
from s3loader import CheckpointManager
def refuse(*args, **options):
    raise OSError("the disk is gone")
manager = CheckpointManager(sys.argv[1])
manager.save(1, {"x": np.ones(9)}).result()
manager.store.put = refuse
manager.save(2, {"x": np.ones(9)})
"""


def test_a_save_that_fails_when_nobody_listens_is_logged_at_the_end(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FAILS, tmp_path], capture_output=True, text=True, timeout=600, check=True)
    assert "step 2 was not saved" in done.stderr
    assert "the disk is gone" in done.stderr
