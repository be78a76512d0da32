"""Connections that the functions keep: bounded, and never taken from whoever uses them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from s3loader import events, s3


def sockets() -> int:
    names = []
    for name in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:  # the one that listed them
            continue
    return sum(name.startswith("socket:") for name in names)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts sockets in /proc")
def test_many_stores_keep_few_connections_and_those_in_use_work_on(place: str) -> None:
    s3.put(f"{place}/k", b"1")
    before = sockets()
    writer = s3.MultipartUploadWriter.from_uri(f"{place}/parts", 5 << 20)
    writer.write(bytes(6 << 20))
    writer.flush()
    seen: list[str] = []
    unsubscribe = events.subscribe(lambda event: seen.append(event.op))
    try:
        for number in range(150):  # a store each, as other keywords make another one
            assert s3.get(f"{place}/k", region=f"us-test-{number}") == b"1"
    finally:
        unsubscribe()
    assert seen.count("GET") == 150
    assert sockets() - before <= 64 + 16  # one may have several connections
    writer.write(b"2")
    writer.close()
    assert s3.stat(f"{place}/parts")["size"] == (6 << 20) + 1
    s3.close()
    assert s3.get(f"{place}/k") == b"1"
