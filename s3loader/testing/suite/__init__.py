"""The conformance suite: what every store must do, as tests to inherit.

    class TestMyStore(StoreSuite):
        @pytest.fixture
        def store(self, tmp_path):
            with s3loader.open_store(f"file://{tmp_path}") as store:
                yield store

The fixture gives an empty store for each test. The knobs in `s3loader.testing.suite._base.Base`
(`capabilities`, `mangled_keys`, `shared`, `crowded`, `broken`, ...) say what a server is known to
do differently; without them the suite asks for everything. Its parts (`ReadTests`, ...) can be
inherited alone.
"""

from __future__ import annotations

from s3loader.testing.suite._bulk import BulkTests
from s3loader.testing.suite._keys import HARD_KEYS, ODD_KEYS, KeyTests, ListTests
from s3loader.testing.suite._life import LifeTests
from s3loader.testing.suite._multipart import MultipartTests
from s3loader.testing.suite._reading import ReadTests
from s3loader.testing.suite._writing import WriteTests

__all__ = [
    "HARD_KEYS",
    "ODD_KEYS",
    "BulkTests",
    "KeyTests",
    "LifeTests",
    "ListTests",
    "MultipartTests",
    "ReadTests",
    "StoreSuite",
    "WriteTests",
]


class StoreSuite(ReadTests, WriteTests, KeyTests, MultipartTests, ListTests, BulkTests, LifeTests):
    """Subclass it, define the fixture `store`, and run pytest."""
