"""`S3Checkpoint`: a checkpoint as one object, for ``torch.save`` and ``torch.load`` (s3torchconnector's names).

One object appears whole or not at all; it has neither checksums of its own nor partial loading, and ``torch.load`` unpickles
it. `s3loader.checkpoint` has none of these limits.
"""

from __future__ import annotations

import io
from types import TracebackType
from typing import Any

from s3loader import ConfigError, MultipartWriter, ObjectStore, ObjectURL, open_store
from s3loader.adapters import checked
from s3loader_torch.compat import store_keywords

__all__ = ["S3Checkpoint", "S3CheckpointReader", "S3CheckpointWriter"]

_BUFFER = 8 << 20


class S3CheckpointWriter(io.RawIOBase):
    """Streams what is written to it into a multipart upload; `close` makes the object, an exception in the block drops it."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        super().__init__()
        self._store = store
        self._writer: MultipartWriter = store.multipart(key)

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any) -> int:
        """Take `data`; returns its bytes."""
        return self._writer.write(data)

    def tell(self) -> int:
        """Bytes written."""
        return self._writer.tell()

    def abort(self) -> None:
        """Drop everything; there will be no object."""
        if not self.closed:
            self._writer.abort()
            super().close()
            self._store.close()

    def close(self) -> None:
        """Make the object."""
        if self.closed:
            return
        try:
            self._writer.close()
        finally:
            super().close()
            self._store.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.abort()
        else:
            self.close()

    def __del__(self) -> None:  # dropped without close: what was written is not whole
        if hasattr(self, "_writer"):
            self.abort()


class S3CheckpointReader(io.BufferedReader):
    """A seekable file over one object, pinned to the version first seen."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store = store
        super().__init__(store.open(key).detach(), _BUFFER)

    def close(self) -> None:
        """Let go of the store."""
        super().close()
        self._store.close()


@checked
class S3Checkpoint:
    """Writers and readers of single-object checkpoints.

        checkpoint = S3Checkpoint(region="eu-central-1")
        with checkpoint.writer("s3://bucket/epoch0.ckpt") as writer:
            torch.save(model.state_dict(), writer)
        with checkpoint.reader("s3://bucket/epoch0.ckpt") as reader:
            state = torch.load(reader)

    Args:
        region: AWS region.
        endpoint: URL of another S3-compatible store; `endpoint_url` is the same.
        s3client_config: An `S3ClientConfig` of s3torchconnector: profile, attempts, path style, anonymity, ``requester_pays``.
        reader_constructor: Means nothing here: a reader fetches the ranges it is asked for.
        store_options: Passed on to `open_store`.

    Raises:
        ConfigError: an option that `open_store` does not know.
    """

    def __init__(
        self,
        region: str | None = None,
        endpoint: str | None = None,
        s3client_config: Any = None,
        reader_constructor: Any = None,
        **store_options: Any,
    ) -> None:
        words = {"endpoint": endpoint, "s3client_config": s3client_config, **store_options}
        self._options = store_keywords(type(self).__name__, region, words)

    def writer(self, s3_uri: str) -> S3CheckpointWriter:
        """A file to write to; used in a ``with`` block, an exception inside leaves nothing behind."""
        return S3CheckpointWriter(*self._open(s3_uri))

    def reader(self, s3_uri: str) -> S3CheckpointReader:
        """A file to read from.

        Raises:
            ObjectNotFoundError: there is no such object.
        """
        store, key = self._open(s3_uri)
        try:
            return S3CheckpointReader(store, key)
        except BaseException:
            store.close()
            raise

    def _open(self, uri: str) -> tuple[ObjectStore, str]:
        folder, key = ObjectURL.parse(uri).split()
        if not key:
            raise ConfigError(
                f"{uri!r} names no object", hint="give the whole URL of an object, e.g. s3://bucket/run/model.ckpt"
            )
        return open_store(folder, **self._options), key
