"""What became of a conditional write whose answer was lost.

A write that is refused may have been refused by its own earlier attempt, whose answer never came.
Each conditional write therefore carries an id of its own in the object's metadata, and reading that
back tells: ours is success, no answer is `OutcomeUnknownError`. Another's refuses a create, since the
key is taken in any case; of an update it proves nothing, as the other writer may have built on ours:
that is unknown, too. (The other cases are those of icechunk's design document 017 on lost responses.)
"""

from __future__ import annotations

from typing import Final

from s3loader.errors import (
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
from s3loader.store.backend import Backend
from s3loader.types import ObjectMeta, PutMode, PutResult

__all__ = ["WRITE_ID", "LostReply", "is_ambiguous"]

WRITE_ID: Final = "s3loader-write"
"""User metadata that names one logical write, the same in all its attempts."""
_HINT: Final = "read the object to see whether the write is there before you repeat it"


def is_ambiguous(error: S3LoaderError) -> bool:
    """Whether the request may have been carried out although it failed so.

    An engine that knows that nothing was sent says so by ``sent=False`` in the error's details.
    """
    lost = (StoreTimeoutError, StoreConnectionError, UnavailableError, OutcomeUnknownError)
    return isinstance(error, lost) and error.details.get("sent") is not False


class LostReply:
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
            ObjectExistsError: a create found another's write there; `.ambiguous` is set.
            OutcomeUnknownError: it cannot be told whether the write happened.
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
        if self.mode == "overwrite" and not refused:
            return None  # nothing hangs on whether it happened
        if self.mode == "create" and found is not None and self.write_id is not None:
            taken = self._taken(error)
            raise taken from (None if taken is error else error)  # ours may have been there for a moment before the other's
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

    def _taken(self, error: S3LoaderError) -> ObjectExistsError:
        if isinstance(error, ObjectExistsError):
            error.details["ambiguous"] = True
            return error
        return ObjectExistsError("the key is taken", op=self.op, url=error.url, attempts=error.attempts, ambiguous=True)

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
