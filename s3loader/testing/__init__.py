"""For tests of and with s3loader: real S3 servers, a faulty network, a suite for any store."""

from s3loader.testing.server import Server, ServerKind, server

__all__ = ["Server", "ServerKind", "server"]
