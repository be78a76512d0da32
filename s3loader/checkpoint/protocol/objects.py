"""The small objects of a run: how they are read, and written once. What else a run's parts need of its store."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from s3loader.checkpoint.error_context import add_context
from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import Compacted, Marker
from s3loader.checksum import proven
from s3loader.errors import FormatError, ObjectExistsError, ObjectNotFoundError, StoreError
from s3loader.exchange.commit import put_settled
from s3loader.store import ObjectStore
from s3loader.types import PutMode, PutResult

__all__ = ["JSON", "Record", "RunObjects"]

_log = logging.getLogger("s3loader.checkpoint")
JSON: Final = "application/json"

Record = TypeVar("Record", bound=msgspec.Struct)


class RunObjects:
    """The objects of one run.

    Args:
        store: Opened on the run's URL.
        settle: Seconds between the write and the read-back of a root on a store that ignores conditions.
    """

    def __init__(self, store: ObjectStore, *, settle: float = 0.5) -> None:
        self.store = store
        self.settle = settle
        self.first_tombstones = ""
        """ETag of the record of tombstones, where this process has begun the run."""
        self._conditional: bool | None = None
        self._id = ""
        self._lock = threading.Lock()

    # the store's abilities

    @property
    def id(self) -> str:
        """Random id of the run; made at the first write."""
        self.prepare()
        return self._id

    @property
    def conditional(self) -> bool:
        """Whether the store honours conditional writes; found out at the first write, and remembered in the run."""
        self.prepare()
        return bool(self._conditional)

    def prepare(self) -> None:
        """Read the run's marker, or make it."""
        with self._lock:
            if self._conditional is not None:
                return
            found = self.read(layout.MARKER, Marker, strict=True)
            marker = found[0] if found else None
            if marker is None or marker.probed != self.store.url:
                able = self.store.conditional_writes()
                run = marker.run if marker is not None else secrets.token_hex(8)
                marker = Marker(format=records.FORMAT, run=run, conditional_writes=able, probed=self.store.url)
                marker = self._write_marker(marker, fresh=found is None)
            self._id, self._conditional = marker.run, marker.conditional_writes
        if not self._conditional:
            _log.warning(
                "%s ignores conditional writes: checkpoints are in single-writer mode, let one job at a time write to this run",
                self.store.url,
            )

    def _write_marker(self, marker: Marker, *, fresh: bool) -> Marker:
        data = records.encode(marker)
        if not fresh:
            self.store.put(layout.MARKER, data, content_type=JSON)
        elif self._create(layout.MARKER, data, conditional=marker.conditional_writes):
            self._begin_tombstones(marker.conditional_writes)
        else:
            found = self.read(layout.MARKER, Marker)
            return found[0] if found is not None else marker
        return marker

    def _begin_tombstones(self, conditional: bool) -> None:
        """An empty record, as a run begins: asking for what is not there is the more expensive question.

        Not where it could replace another one: of a run that was copied without its marker.
        """
        data = records.encode(Compacted(format=records.FORMAT, generations=[]))
        if conditional:
            with contextlib.suppress(StoreError):  # nothing depends on it
                self.first_tombstones = self.store.put(layout.COMPACTED, data, mode="create", content_type=JSON).etag

    # plain objects

    def get(
        self, key: str, *, strict: bool = False, own: Callable[[bytes], bool] = records.is_sealed
    ) -> tuple[bytes, str] | None:
        """Bytes and ETag of an object, None where there is none.

        Args:
            key: Of it.
            strict: Where no checksum tells, read it until two reads agree: for what is written back.
            own: Whether bytes prove themselves; default: whether they are a record whose checksum holds.

        Raises:
            IntegrityError: the bytes are not what was written.
        """
        try:
            meta, data = proven(lambda: self.store.backend.get(key), f"{self.store.url}/{key}", strict=strict, own=own)
        except ObjectNotFoundError:
            return None
        return bytes(data), meta.etag

    def read(self, key: str, kind: type[Record], *, strict: bool = False) -> tuple[Record, str] | None:
        """A record and the ETag of its object, None where there is none; what is no such record is fetched once more.

        Args:
            key: Of it.
            kind: Of record.
            strict: It will be written back: one without a checksum is read until two reads agree.

        Raises:
            FormatError: it is no such record.
        """
        for last in (False, True):
            found = self.get(key)
            if found is not None and strict and not records.is_sealed(found[0]):
                found = self.get(key, strict=True)
            if found is None:
                return None
            try:
                return records.decode(found[0], kind, key), found[1]
            except FormatError as error:
                if last:
                    add_context(error, "read", f"{self.store.url}/{key}")
                    raise
        raise AssertionError("unreachable")

    def put(self, key: str, data: bytes, *, content_type: str = JSON) -> None:
        """Write an object whose key is used once."""
        self.store.put(key, data, content_type=content_type)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object if its key is free; returns whether what is there now is ours.

        Raises:
            OutcomeUnknownError: whether it was written could not be found out.
        """
        return self._create(key, data, conditional=self.conditional)

    def _create(self, key: str, data: bytes, *, conditional: bool) -> bool:
        mode: PutMode = "create" if conditional else "overwrite"
        url = f"{self.store.url}/{key}"

        def look() -> bytes | None:
            found = self.get(key)
            return None if found is None else found[0]

        def is_ours(now: bytes | None, before: bytes | None, doubtful: bool) -> bool:
            if now is None or now == data:
                return now is not None
            raise ObjectExistsError("the key is taken", op="create", url=url)

        def put(_: bytes | None) -> PutResult:
            return self.store.put(key, data, mode=mode, content_type=JSON)

        try:
            put_settled(put, look, is_ours, None, op="create", url=url, conditional=conditional)
        except ObjectExistsError:
            return False
        return True
