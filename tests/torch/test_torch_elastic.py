"""torchrun: a job that loses nodes is started anew on fewer ranks, and goes on with the next sample; it is told a URL only."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from examples._digits import parser_of, prepare
from s3loader import CheckpointManager, from_manifest
from s3loader.loader import Loader

HERE = Path(__file__).resolve().parent


def test_four_ranks_then_three_then_two(tmp_path: Path) -> None:
    prepare(parser_of("").parse_args(["--url", str(tmp_path)]))
    done = subprocess.run(
        [sys.executable, str(HERE / "elastic_agents.py"), str(tmp_path)],
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    said = done.stdout.splitlines()
    assert said[-1] == "agents -9 -9 0 0", done.stderr[-6000:]
    tries: dict[int, list[tuple[int, list[str]]]] = {}
    for line in said:
        if match := re.fullmatch(r"step (\d+) world (\d+) (.*)", line):
            tries.setdefault(int(match[1]), []).append((int(match[2]), match[3].split()))
    worlds = {step: [world for world, _ in each] for step, each in tries.items()}
    assert [*tries] == [*range(1, 17)]
    assert (4 in worlds[7], 3 in worlds[12], worlds[16]) == (True, True, [2])
    assert any(f"resumed at step {step} on {world} ranks" in said for step, world in ((5, 3), (10, 2)))
    assert all(keys == each[0][1] for each in tries.values() for _, keys in each), "a step that is repeated is the same"
    with CheckpointManager(f"{tmp_path}/runs/run") as manager:
        assert manager.steps() == [5, 10, 15]
        state = manager.restore(5)["loader"]
    straight = Loader(from_manifest(f"{tmp_path}/dataset/manifest.jsonl", group="webdataset"), batch_size=24, seed=1)
    straight.load_state_dict({**state, "consumed": 0})
    for number, batch in zip(range(1, 17), straight, strict=False):
        assert [sample["__key__"] for sample in batch] == tries[number][0][1]
