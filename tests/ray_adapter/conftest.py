"""One small Ray cluster of this machine for all tests here."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
from ray_cluster import CLUSTER, environment


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A cluster with 2 CPUs and an object store of 80 MB, whose nodes have no credentials."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 's3loader[ray]'")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in {*os.environ} - {*environment()}:
            patch.delenv(name)
        for name, value in environment().items():
            patch.setenv(name, value)
        ray.init(**CLUSTER)
        yield
        ray.shutdown()
