"""The direct engine: HTTP/1.1 to S3 on our own sockets, for the requests that are many.

Read in this order: `http` (what a request says, and what an answer may look like), `jobs` (one
request without I/O) with `reads`, `small` and `writes`, `connection` (sockets), `blocking` (one job on one of them, or
many in threads) and `pump` (many in the calling thread), `backend` (all of it as a `Backend`).
"""

from __future__ import annotations

from s3loader.store.s3.backend import S3Backend

__all__ = ["S3Backend"]
