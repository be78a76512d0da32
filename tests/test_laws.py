"""The table of laws names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_test_that_the_table_of_laws_names_exists() -> None:
    table = (ROOT / "docs/design/012-laws.md").read_text()
    defined = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^\s*(?:async )?def (test_\w+)", path.read_text(), re.M)
    }
    named = set(re.findall(r"::(test_\w+)", table))
    assert len(named) > 60
    assert named <= defined, sorted(named - defined)
    files = set(re.findall(r"\btests/[\w/]+\.py", table))
    assert all((ROOT / file).is_file() for file in files), files
