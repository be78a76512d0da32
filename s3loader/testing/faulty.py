"""A store whose requests fail by rules, between its engine and our retries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from s3loader.store import ObjectStore, StoreOptions, open_store
from s3loader.store.open import assemble
from s3loader.store.pipeline import innermost
from s3loader.testing.fault_backend import Fault, FaultBackend, Moment, Seen
from s3loader.types import ObjectURL

__all__ = ["open_faulty_store"]


def open_faulty_store(
    url: Any,
    faults: Sequence[Fault] = (),
    *,
    seed: int = 0,
    hook: Callable[[Seen, Moment], None] | None = None,
    options: StoreOptions | None = None,
    **arguments: Any,
) -> tuple[ObjectStore, FaultBackend]:
    """Open `url` as `s3loader.open_store` does, with `faults` below the retries and above the engine.

        store, faults = open_faulty_store("memory://t", [Fault("drop_reply", op="put", nth=1)])
        store.put("k", b"x", mode="create")  # its answer was lost, and it is known to have happened
        assert [seen.fault for seen in faults.seen][0] == "drop_reply"

    Args:
        url: Any store.
        faults: Which requests fail, and how; the first rule that hits counts.
        seed: Of all chances.
        hook: Called before and after each request, e.g. to kill the process at request n.
        options: As for `open_store`; ``StoreOptions(max_attempts=1)`` lets every fault through.
        arguments: Passed on to `open_store`.

    Returns:
        The store, which cannot be pickled, and the backend that injects and records.
    """
    options = options or StoreOptions()
    plain = open_store(url, options=options, **arguments)
    faulty = FaultBackend(innermost(plain.backend), faults, seed=seed, hook=hook)
    return ObjectStore(plain.url, assemble(faulty, ObjectURL.parse(url), options), options=options), faulty
