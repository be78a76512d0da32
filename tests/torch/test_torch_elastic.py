"""torchrun: a job that loses ranks is started anew on fewer, and goes on with the next sample; nothing is told but a URL."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from s3loader import CheckpointManager, from_manifest
from s3loader.loader import Loader

ROOT = Path(__file__).resolve().parent.parent.parent


def test_four_ranks_then_three_then_two(tmp_path: Path) -> None:
    prepare = "from examples._digits import *; import sys; prepare(parser_of('').parse_args(['--url', sys.argv[1]]))"
    subprocess.run([sys.executable, "-c", prepare, str(tmp_path)], cwd=ROOT, check=True, timeout=300)
    steps: dict[int, list[list[str]]] = {}
    worlds: dict[int, int] = {}
    for world, leave in ((4, 7), (3, 12), (2, 0)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        program = ["-m", "examples.train_torchrun", "--url", str(tmp_path), "--steps", "16", "--every", "5"]
        done = subprocess.run(
            [*command, *program, "--leave-at", str(leave)], cwd=ROOT, capture_output=True, text=True, timeout=240
        )
        assert (done.returncode == 0) == (world == 2), done.stderr[-3000:]
        for line in done.stdout.splitlines():
            if match := re.fullmatch(r"step (\d+) world (\d+) (.*)", line):
                steps.setdefault(int(match[1]), []).append(match[3].split())
                worlds[int(match[1])] = int(match[2])
    assert worlds == {step: 4 if step < 6 else 3 if step < 11 else 2 for step in range(1, 17)}, "it went on at the last save"
    assert [len(steps[step]) for step in (5, 6, 7, 8, 11, 12, 13)] == [1, 2, 2, 1, 2, 2, 1]
    assert all(one == tries[0] for tries in steps.values() for one in tries), "a step that is repeated is the same"
    with CheckpointManager(f"{tmp_path}/runs/run") as manager:
        state = manager.restore(5)["loader"]
    straight = Loader(from_manifest(f"{tmp_path}/dataset/manifest.jsonl", group="webdataset"), batch_size=24, seed=1)
    straight.load_state_dict({**state, "consumed": 0})
    for number, batch in zip(range(1, 17), straight, strict=False):
        assert [sample["__key__"] for sample in batch] == steps[number][0]
