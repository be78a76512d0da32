"""The suite itself: it hides no test of its own, and it notices a store that is wrong."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import s3loader.testing
from s3loader.testing import StoreSuite


def test_no_test_hides_another() -> None:
    names = Counter(name for base in StoreSuite.__mro__ for name in vars(base) if name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []
    assert len(names) > 60


def test_every_test_says_what_it_needs() -> None:
    """Only fixtures that any pytest has, and those of the suite."""
    known = {"self", "store", "crowded", "tmp_path"}
    for name, test in inspect.getmembers(StoreSuite, inspect.isfunction):
        if name.startswith("test_"):
            given = {mark.args[0] for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"}
            flat = {each for names in given for each in ([names] if isinstance(names, str) else names)}
            assert set(inspect.signature(test).parameters) <= known | flat, name


def test_only_the_suite_needs_pytest() -> None:
    with pytest.raises(AttributeError):
        _ = s3loader.testing.Nonsense
    assert "StoreSuite" in s3loader.testing.__all__


WRONG = """
import uuid
import pytest
from s3loader.store import open_store
from s3loader.store.objectstore import ObjectStore
from s3loader.store.memory import MemoryBackend
from s3loader.testing import StoreSuite

class Wrong(MemoryBackend):
    {fault}

class TestWrong(StoreSuite):
    shared = False
    start_methods = ()

    @pytest.fixture
    def store(self):
        name = uuid.uuid4().hex
        with ObjectStore(f"memory://{{name}}", Wrong(name)) as store:
            yield store
"""

FAULTS: Mapping[str, tuple[str, str]] = {
    "drops the last byte of a range": (
        "def get(self, key, start=0, end=None, **kw):\n"
        "        meta, data = super().get(key, start, end, **kw)\n"
        "        return meta, data[:-1] if end is not None else data",
        "test_range_edges",
    ),
    "ignores the ETag": (
        "def get(self, key, start=0, end=None, *, if_match=None, version_id=None):\n"
        "        return super().get(key, start, end, version_id=version_id)",
        "test_reads_are_pinned_to_an_etag",
    ),
    "lists by UTF-16": (
        "def list(self, prefix='', **kw):\n"
        "        return iter(sorted(super().list(prefix, **kw), key=lambda e: e.key.encode('utf-16-be')))",
        "test_order_is_that_of_bytes",
    ),
    "create overwrites": (
        "def put(self, key, data, *, mode='overwrite', **kw):\n        return super().put(key, data, **kw)",
        "test_create or test_capabilities",
    ),
    "lists a page": (
        "def list(self, prefix='', **kw):\n"
        "        import itertools\n"
        "        return itertools.islice(super().list(prefix, **kw), 1000)",
        "test_more_than_a_page",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_the_suite_notices(what: str, tmp_path: Path, pytestconfig: Any) -> None:
    fault, test = FAULTS[what]
    (tmp_path / "test_wrong.py").write_text(WRONG.format(fault=fault))
    assert _run(tmp_path, test) == pytest.ExitCode.TESTS_FAILED
    (tmp_path / "test_wrong.py").write_text(WRONG.format(fault="pass").replace("TestWrong", "TestRight"))
    assert _run(tmp_path, test) == pytest.ExitCode.OK


def _run(folder: Path, test: str) -> int:
    import subprocess
    import sys

    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        "-k",
        test,
        str(folder),
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode
