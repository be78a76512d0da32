"""Every Python block of the README and the docs runs.

The blocks of one page run in order in one fresh process and share their names, in an empty
folder. A block that cannot run here says why on the line above it: ``<!-- no-run: reason -->``.
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
BLOCK = re.compile(r"(?P<before>[^\n]*)\n```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
NO_RUN = re.compile(r"<!-- no-run: \S.* -->")
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)")


def blocks(page: Path) -> list[tuple[int, str]]:
    text = "\n" + page.read_text()
    return [
        (text.count("\n", 0, match.start("code")), match["code"])
        for match in BLOCK.finditer(text)
        if not NO_RUN.search(match["before"])
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    source = ""
    for line, code in blocks(page):
        source += "\n" * (line - source.count("\n") - 1) + code  # tracebacks show the page's own line numbers
    script = tmp_path / (page.stem.replace("-", "_") + "_page.py")
    script.write_text(source)
    folder = tmp_path / "empty"
    folder.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run([sys.executable, str(script)], cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, f"{page.name}:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not broken
