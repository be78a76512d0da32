"""Marks of the tests in this folder."""

from __future__ import annotations

import pytest

every_place = pytest.mark.parametrize("place", ["memory", "file", "moto", "rclone"], indirect=True)
"""The test runs once for each kind of store; `place` is the URL of an empty bucket or folder."""
