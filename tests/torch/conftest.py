"""For all torch tests."""

import gc

import pytest


@pytest.fixture(autouse=True)
def _no_dead_iterators():
    """A torch iterator that an exception keeps alive must not be collected in a worker forked later: its
    `__del__` fails there, and reporting that in the middle of an import breaks Python 3.11's import lock."""
    yield
    gc.collect()
