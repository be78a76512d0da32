"""What the tests of retries need: a clock, and a store with faults."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest

from s3loader.errors import (
    S3LoaderError,
)
from s3loader.store import MemoryBackend, ObjectStore, Pipeline, RetryPolicy
from s3loader.testing import Fault, FaultBackend, Seen


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def make(
    *faults: Fault,
    max_attempts: int = 5,
    budget: float = 60.0,
    seed: int = 0,
    hook: Callable[[Seen, str], None] | None = None,
    jitter: Callable[[float, float], float] = lambda low, high: high,
) -> tuple[ObjectStore, MemoryBackend, FaultBackend, Clock]:
    """A store with these faults, what lies under it, the fault layer, and its clock."""
    memory = MemoryBackend(uuid.uuid4().hex)
    broken = FaultBackend(memory, faults, seed=seed, hook=hook)
    clock = Clock()
    retrying = Pipeline(broken, retry=RetryPolicy(max_attempts, budget, clock, clock.sleep, jitter))
    return ObjectStore(memory.url, retrying), memory, broken, clock


def error_of(call: Callable[[], Any]) -> S3LoaderError:
    with pytest.raises(S3LoaderError) as caught:
        call()
    return caught.value


def holds(memory: MemoryBackend, key: str, data: bytes) -> bool:
    return memory_has(memory, key) and bytes(memory.get(key)[1]) == data


def memory_has(memory: MemoryBackend, key: str) -> bool:
    return any(entry.key == key for entry in memory.list(key))
