"""Requests in a row of saving and restoring: what a distant store makes them wait for. The numbers may only fall."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from s3loader.checkpoint import CheckpointManager
from s3loader.testing import FaultProxy, Rule, in_a_row, recorded, server

STATE = {"w": np.arange(1000.0), "step": 3}


def test_requests_in_a_row_of_a_small_checkpoint() -> None:
    found: dict[str, int] = {}

    def counted(name: str, call: Callable[[], object]) -> None:
        with recorded() as requests:
            call()
        found[name] = len(in_a_row(requests))

    with server("moto") as s3, FaultProxy(s3.endpoint_url, [Rule("delay", seconds=0.05)]) as proxy:
        bucket = s3.bucket()

        def manager(keep: int | None = None) -> CheckpointManager:
            return CheckpointManager(s3.open_store(f"{bucket}/run", endpoint_url=proxy.endpoint_url), keep=keep)

        with manager() as first:
            first.save(1, STATE).result()  # begins the run, and finds out what the store can do
            counted("save", lambda: first.save(2, STATE).result())
        with manager() as fresh:
            counted("latest", fresh.latest)
        with manager() as fresh:
            counted("restore", fresh.restore)
        with manager() as fresh:
            counted("a step that is named", lambda: fresh.restore(2))
        with manager() as fresh:
            counted("the first save of a process", lambda: fresh.save(3, STATE).result())
        with manager(keep=1) as fresh:
            fresh.save(4, STATE).result()  # what follows it goes on in the background
            fresh.save(5, STATE).result()
            fresh.wait()
            assert fresh.steps() == [5]
    limits = {"save": 5, "latest": 2, "restore": 3, "a step that is named": 3, "the first save of a process": 9}
    assert {name: number for name, number in found.items() if number > limits[name]} == {}, found
