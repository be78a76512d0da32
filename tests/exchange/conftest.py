"""Fixtures of the exchange tests."""

from __future__ import annotations

import uuid

import pytest

from s3loader import S3ExchangeStore


@pytest.fixture
def store() -> S3ExchangeStore:
    return S3ExchangeStore(f"memory://{uuid.uuid4().hex}")
