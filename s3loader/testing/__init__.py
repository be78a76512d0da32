"""For tests of and with s3loader: real S3 servers, a faulty network, small datasets, a suite for any store.

`StoreSuite` needs pytest; the rest does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from s3loader.testing.critical_path import in_a_row, recorded
from s3loader.testing.datasets import write_shard, write_sharded_dataset
from s3loader.testing.fault_backend import Fault, FaultBackend, Moment, Seen, open_faulty_store
from s3loader.testing.faults import FaultAction, Request, Rule
from s3loader.testing.proxy import FaultProxy
from s3loader.testing.servers import Server, ServerKind, find_rclone, server

if TYPE_CHECKING:
    from s3loader.testing.suite import StoreSuite

__all__ = [
    "Fault",
    "FaultAction",
    "FaultBackend",
    "FaultProxy",
    "Moment",
    "Request",
    "Rule",
    "Seen",
    "Server",
    "ServerKind",
    "StoreSuite",
    "find_rclone",
    "in_a_row",
    "open_faulty_store",
    "recorded",
    "server",
    "write_shard",
    "write_sharded_dataset",
]


def __getattr__(name: str) -> Any:
    if name != "StoreSuite":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pytest

    pytest.register_assert_rewrite("s3loader.testing.suite")
    from s3loader.testing.suite import StoreSuite

    return StoreSuite
