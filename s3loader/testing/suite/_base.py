"""What every part of the suite shares: the knobs a subclass sets, and the fixtures."""

from __future__ import annotations

import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, TypeVar

import pytest

from s3loader.store import ObjectStore
from s3loader.types import Capabilities

__all__ = ["Base", "random_bytes", "run_together", "wait_until"]

T = TypeVar("T")


def random_bytes(size: int, seed: object = 0) -> bytes:
    """The same `size` bytes for the same `seed`."""
    return random.Random(repr(seed)).randbytes(size)


def wait_until(condition: Callable[[], bool], *, seconds: float = 300.0) -> bool:
    """Poll `condition`; whether it came true before the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def run_together(functions: list[Callable[[], T]]) -> list[T | BaseException]:
    """Run all in threads that start at once; each one's value, or what it raised."""
    barrier = threading.Barrier(len(functions))
    results: list[Any] = [None] * len(functions)

    def run(index: int) -> None:
        barrier.wait(60)
        try:
            results[index] = functions[index]()
        except BaseException as error:  # noqa: BLE001  handed to the caller as a value
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return results


class Base:
    """Knobs and fixtures of `StoreSuite`."""

    capabilities: ClassVar[Capabilities | None] = None
    """What probing must find; None where it is not known beforehand."""

    mangled_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys (of `HARD_KEYS`) that the *server* stores under another name or refuses oddly, whatever
    the client does: no test uses them. A store of one's own has none."""

    shared: ClassVar[bool] = True
    """Whether another process sees the same objects (a store in memory: no)."""

    steady: ClassVar[bool] = True
    """Whether a request fails only where it must (a store with injected faults: no)."""

    delimiters: ClassVar[tuple[str, ...]] = ("/", "-")
    """Delimiters a listing takes."""

    big: ClassVar[int] = 6 * 2**20 + 13
    """Bytes of a large object: more than one part of 5 MiB."""

    secrets: ClassVar[tuple[str, ...]] = ()
    """Texts that must appear in no repr and no error."""

    start_methods: ClassVar[tuple[str, ...]] = ("fork", "spawn", "forkserver")
    """How worker processes are started that use the store after its owner has used it."""

    @pytest.fixture
    def store(self) -> Iterator[ObjectStore]:
        """An empty store, made anew for each test. A subclass must give it, and close it."""
        raise pytest.UsageError(f"{type(self).__name__} must define the fixture `store`")

    @pytest.fixture
    def crowded(self, store: ObjectStore) -> ObjectStore:
        """A store with exactly the objects of `crowd`; none of the tests changes it, so it may be shared."""
        self.fill(store)
        return store

    @staticmethod
    def crowd() -> list[str]:
        """1,105 keys, in the order of a listing: more than one page of S3 holds."""
        return [f"many/{number:04}" for number in range(1003)] + [
            f"other/{number // 2:02}/{number:03}" for number in range(102)
        ]

    @classmethod
    def fill(cls, store: ObjectStore) -> None:
        """Put the objects of `crowd`, each holding its own key."""
        from s3loader.types import PutRequest

        for _ in store.put_many(PutRequest(key, key.encode()) for key in cls.crowd()):
            pass

    def reopen(self, store: ObjectStore) -> ObjectStore:
        """Another store on the same objects, as another process would open it."""
        clone: ObjectStore = pickle.loads(pickle.dumps(store))  # noqa: S301  our own pickle
        return clone

    def broken(self, store: ObjectStore, how: Literal["bucket", "credentials", "endpoint"]) -> ObjectStore | None:
        """A store like `store` whose bucket is missing, whose credentials are wrong or whose endpoint
        nobody listens at; None where there is no such thing."""
        return None

    def caps(self, store: ObjectStore) -> Capabilities:
        """What to hold the store to."""
        return self.capabilities or store.capabilities()
