"""The suite itself: it hides no test of its own, and it notices a store that is wrong."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path

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


HEAD = """
import itertools, uuid
import pytest
from s3loader.store.memory import MemoryBackend
from s3loader.store.objectstore import ObjectStore
from s3loader.testing import StoreSuite
from s3loader.types import Capabilities
"""
STORE = """
class {name}(MemoryBackend):
    {fault}

class Test{name}(StoreSuite):
    shared = False
    capabilities = Capabilities(*[True] * 6)

    @pytest.fixture
    def store(self):
        name = uuid.uuid4().hex
        with ObjectStore(f"memory://{{name}}", {name}(name)) as store:
            yield store
"""
FAULTS = {
    "Right": ("pass", ""),
    "ShortRange": (
        "def get(self, key, start=0, end=None, **kw):\n"
        "        meta, data = super().get(key, start, end, **kw)\n"
        "        return meta, data[:-1] if end is not None else data",
        "test_range_edges",
    ),
    "IgnoresETag": (
        "def get(self, key, start=0, end=None, *, if_match=None, version_id=None):\n"
        "        return super().get(key, start, end, version_id=version_id)",
        "test_reads_are_pinned_to_an_etag",
    ),
    "ListsByUTF16": (
        "def list(self, prefix='', **kw):\n"
        "        return iter(sorted(super().list(prefix, **kw), key=lambda e: e.key.encode('utf-16-be')))",
        "test_order_is_that_of_bytes",
    ),
    "CreateOverwrites": (
        "def put(self, key, data, *, mode='overwrite', **kw):\n        return super().put(key, data, **kw)",
        "test_create_has_one_winner",
    ),
    "ListsOnePage": (
        "def list(self, prefix='', **kw):\n        return itertools.islice(super().list(prefix, **kw), 1000)",
        "test_more_than_a_page",
    ),
    "LeavesUploads": ("def abort_multipart(self, key, upload_id):\n        pass", "test_multipart_abort"),
    "DeletesByPrefix": (
        "def delete(self, key):\n        for entry in list(self.list(key)):\n            super().delete(entry.key)",
        "test_delete",
    ),
}


def test_the_suite_notices(tmp_path: Path) -> None:
    sources = [STORE.format(name=name, fault=fault) for name, (fault, _) in FAULTS.items()]
    (tmp_path / "test_wrong.py").write_text(HEAD + "".join(sources))
    wanted = " or ".join(test for _, test in FAULTS.values() if test)
    options = ["-q", "-rf", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-k", wanted, str(tmp_path)]
    run = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
    for name, (_, test) in FAULTS.items():
        mine = [line for line in failed if f"::Test{name}::" in line]
        if name == "Right":
            assert mine == []
        else:
            assert any(test in line for line in mine), (name, failed, run.stdout[-2000:])
