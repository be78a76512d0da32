"""Requests in a row of an append: what a distant store makes it wait for. The numbers may only fall."""

from __future__ import annotations

from collections.abc import Callable

from exchange_helpers import files

from s3loader import S3ExchangeStore
from s3loader.testing import FaultProxy, Rule, in_a_row, recorded, server

ROOT = "d/m.jsonl"


def test_requests_in_a_row_of_an_append() -> None:
    found: dict[str, int] = {}

    def counted(name: str, call: Callable[[], object]) -> None:
        with recorded() as requests:
            call()
        found[name] = len(in_a_row(requests))

    with server("moto") as s3, FaultProxy(s3.endpoint_url, [Rule("delay", seconds=0.05)]) as proxy:
        exchange = S3ExchangeStore(s3.open_store(s3.bucket(), endpoint_url=proxy.endpoint_url))
        exchange.write_manifest(ROOT, files("first"), mode="append_parts")  # finds out what the store can do
        counted("append", lambda: exchange.write_manifest(ROOT, files("second"), mode="append_parts"))
        with exchange.open_manifest_writer(ROOT, mode="append_parts") as writer:
            writer.add_entry({"kind": "file", "key": "third"})
            counted("close of a writer", writer.close)
        counted("another manifest", lambda: exchange.write_manifest("e/m.jsonl", files("a"), mode="append_parts"))
    assert {name: number for name, number in found.items() if number > 3} == {}, found
