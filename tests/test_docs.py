"""Every Python block of the README and the docs runs.

The blocks of one page run in order in one fresh process and share their names, in an empty
folder. A block that cannot run here says why on the line above it: ``<!-- no-run: reason -->``.
One below ``<!-- file: NAME -->`` is written to that file in its turn; a block of shell commands
below ``<!-- run -->`` is run by bash.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"(?P<before>[^\n]*)\n```(?P<kind>python|sh)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
NO_RUN = re.compile(r"<!-- no-run: \S.* -->")
FILE = re.compile(r"<!-- file: (\S+) -->")
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)")


def blocks(page: Path) -> list[tuple[int, str]]:
    text = "\n" + page.read_text()
    return [
        (text.count("\n", 0, match.start("code")), as_python(match["kind"], match["before"], match["code"]))
        for match in BLOCK.finditer(text)
        if not NO_RUN.search(match["before"]) and (match["kind"] == "python" or match["before"] == "<!-- run -->")
    ]


def as_python(kind: str, before: str, code: str) -> str:
    if kind == "sh":
        return f"__import__('subprocess').run(['bash', '-euc', {code!r}], check=True)\n"
    if file := FILE.search(before):
        return f"__import__('pathlib').Path({file[1]!r}).write_text({code!r})\n"
    return code


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    source = ""
    for line, code in blocks(page):
        source += "\n" * (line - source.count("\n") - 1) + code  # tracebacks show the page's own line numbers
    script = tmp_path / (page.stem.replace("-", "_") + "_page.py")
    script.write_text(source)
    folder = tmp_path / "empty"
    folder.mkdir()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run([sys.executable, str(script)], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, f"{page.name}:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not broken
