"""The peers' own environments: `benchmarks/.peers/<group>`, made on first use, kept, git-ignored.

Each group is one virtual environment, so that a peer's pins touch neither ours nor another's. A
PyTorch build with CUDA is never pulled: the plan of the install is looked at before it runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

PEERS = Path(__file__).resolve().parent / ".peers"


@dataclass(frozen=True)
class Group:
    """One environment."""

    name: str
    requirements: tuple[str, ...]


TORCH = "torch==2.13.0"
GET = Group(
    "get",
    (
        TORCH,
        "numpy",
        "obstore==0.12.1",
        "boto3==1.44.5",
        "s3torchconnector==1.5.0",
        "s3dlio==0.10.0",
        "safetensors==0.8.0",
        "tenacity",
    ),
)
LOAD = Group(
    "load",
    (
        TORCH,
        "webdataset==1.0.2",
        "litdata==0.2.76",
        "mosaicml-streaming==0.13.0",
        "s3torchconnector==1.5.0",
        "s3dlio==0.10.0",
        "obstore==0.12.1",
    ),
)


def python(group: Group) -> tuple[Path | None, str]:
    """The group's interpreter, and what is wrong with it (nothing where the text is empty)."""
    folder = PEERS / group.name
    interpreter = folder / "bin" / "python"
    mark = folder / "made-from.json"
    if mark.exists() and json.loads(mark.read_text()) == list(group.requirements):
        return interpreter, ""
    print(f"making {folder} with {', '.join(group.requirements)} (once)", file=sys.stderr, flush=True)
    PEERS.mkdir(exist_ok=True)
    (PEERS / ".gitignore").write_text("*\n")
    if not interpreter.exists():
        venv.create(folder, with_pip=True)
    cuda = _pulls_cuda(interpreter, group)
    if cuda:
        return None, cuda
    done = subprocess.run(
        [str(interpreter), "-m", "pip", "install", "-q", *group.requirements], check=False, capture_output=True, text=True
    )
    if done.returncode:
        return None, "pip install failed: " + _last_error(done.stderr)
    mark.write_text(json.dumps(list(group.requirements)))
    return interpreter, ""


def _pulls_cuda(interpreter: Path, group: Group) -> str:
    with tempfile.NamedTemporaryFile("r", suffix=".json") as report:
        done = subprocess.run(
            [str(interpreter), "-m", "pip", "install", "-q", "--dry-run", "--report", report.name, *group.requirements],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return "pip cannot resolve it: " + _last_error(done.stderr)
        plan = json.load(report)
    names = [item["metadata"]["name"].lower() for item in plan["install"]]
    if any(name.startswith(("nvidia-", "triton", "cuda-")) for name in names):
        return "this would install PyTorch with CUDA: install a CPU build of torch 2.13.0 into the environment first"
    return ""


def _last_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("ERROR")]
    return (lines or text.splitlines() or ["no message"])[-1][:300]
