"""What became of a conditional write whose answer was lost.

A write that is refused may have been refused by its own earlier attempt, whose answer never came.
Each conditional write therefore carries an id of its own in the object's metadata, and reading that
back tells: ours is success, another's is the refusal, no answer is `OutcomeUnknownError`. (The
rule and its cases are those of icechunk's design document 017 on lost responses.)
"""

from __future__ import annotations

from typing import Final

from s3loader.errors import (
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    OutcomeUnknownError,
    PreconditionFailedError,
    S3LoaderError,
    StoreConnectionError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
)
from s3loader.store.base import Backend
from s3loader.types import ObjectMeta, PutMode, PutResult, Update

__all__ = ["WRITE_ID", "Settler", "is_ambiguous"]

WRITE_ID: Final = "s3loader-write"
"""User metadata that names one logical write, the same in all its attempts."""
_HINT: Final = "read the object to see whether the write is there before you repeat it"


def is_ambiguous(error: S3LoaderError) -> bool:
    """Whether the request may have been carried out although it failed so.

    An engine that knows that nothing was sent says so by ``sent=False`` in the error's details.
    """
    lost = (StoreTimeoutError, StoreConnectionError, UnavailableError, OutcomeUnknownError)
    return isinstance(error, lost) and error.details.get("sent") is not False


class Settler:
    """Looks at each failed attempt of one write, and tells the outcome once it can.

    Args:
        backend: Where to read back; its own retries apply.
        op: For errors.
        write_id: What the write carries; None where it carries nothing, so that nothing can be read back.
        mode: Of the write.
    """

    def __init__(self, backend: Backend, op: str, key: str, write_id: str | None, mode: PutMode) -> None:
        self.backend = backend
        self.op = op
        self.key = key
        self.write_id = write_id
        self.mode: PutMode = mode
        self.unsure = False
        """Whether an attempt may have been carried out unseen."""

    def __call__(self, error: S3LoaderError, last: bool) -> PutResult | None:
        """The result, if `error` hides a success; None where it is a plain failure.

        Raises:
            ObjectExistsError, ObjectChangedError: another's write is there.
            OutcomeUnknownError: it cannot be told, and no attempt is left.
        """
        refused = isinstance(error, (PreconditionFailedError, ObjectNotFoundError))
        if not self.unsure and not is_ambiguous(error):
            return None
        if not refused:
            self.unsure = True
            if not last:
                return None
        found = self._read_back(error)
        if found is not None and self.write_id is not None and found.metadata.get(WRITE_ID) == self.write_id:
            return PutResult(self.key, found.etag, found.size, found.version_id)
        if isinstance(error, PreconditionFailedError) and found is not None and self.write_id is not None:
            error.details["ambiguous"] = True  # ours may have been there for a moment before the other's
            raise error
        if self.mode == "overwrite" and not refused:
            return None  # nothing hangs on whether it happened
        if found is not None and self.write_id is not None:
            self._raise_overtaken(found, error)
        raise self._unknown(error)

    def _read_back(self, error: S3LoaderError) -> ObjectMeta | None:
        if self.write_id is None:
            return None
        try:
            return self.backend.head(self.key)
        except ObjectNotFoundError:
            return None
        except StoreError as failure:
            if self.mode == "overwrite":
                return None
            raise self._unknown(error) from failure

    def _raise_overtaken(self, found: ObjectMeta, error: S3LoaderError) -> None:
        """No attempt is left; if the condition cannot hold any more, that is the answer."""
        kind: type[PreconditionFailedError]
        if self.mode == "create":
            kind, why = ObjectExistsError, "the key is taken"
        elif isinstance(self.mode, Update) and found.etag != self.mode.etag:
            kind, why = ObjectChangedError, "its ETag is not the one asked for"
        else:
            return
        raise kind(why, op=self.op, url=error.url, attempts=error.attempts, ambiguous=True) from error

    def _unknown(self, error: S3LoaderError) -> OutcomeUnknownError:
        unknown = OutcomeUnknownError(
            f"the answer was lost, and reading back did not tell whether it was written ({error.message})",
            op=self.op,
            url=error.url,
            status=error.status,
            code=error.code,
            request_id=error.request_id,
            attempts=error.attempts,
            hint=_HINT,
        )
        unknown.__cause__ = error
        return unknown
