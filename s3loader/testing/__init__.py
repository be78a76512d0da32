"""For tests of and with s3loader: real S3 servers, a faulty network, a suite for any store."""

from s3loader.testing.faults import FaultAction, Request, Rule
from s3loader.testing.proxy import FaultProxy
from s3loader.testing.servers import Server, ServerKind, server

__all__ = ["FaultAction", "FaultProxy", "Request", "Rule", "Server", "ServerKind", "server"]
