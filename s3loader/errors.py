"""Every error s3loader raises, as one tree.

::

    S3LoaderError
    ├── ConfigError (ValueError)              a setting, URL or argument is unusable
    │   ├── CredentialsError                  no credentials were found
    │   └── SourceNotFoundError (FileNotFoundError)   no local file of that name to upload
    ├── StoreError                            one operation on a store failed
    │   ├── ObjectNotFoundError (FileNotFoundError)
    │   │   └── BucketNotFoundError
    │   ├── AccessDeniedError (PermissionError)
    │   │   └── AuthenticationError           key id, secret, token or signature refused
    │   ├── PreconditionFailedError           a condition on the request did not hold
    │   │   ├── ObjectExistsError (FileExistsError)   create-only put, the key is taken
    │   │   └── ObjectChangedError            If-Match did not hold: the object was replaced
    │   ├── ConflictError                     409: another writer is at work on this key
    │   ├── OutcomeUnknownError               a conditional write may or may not have happened
    │   ├── RangeError (ValueError)           the range lies outside the object
    │   ├── ThrottledError                    the store asked us to slow down
    │   ├── UnavailableError                  the store failed (5xx)
    │   ├── StoreTimeoutError (TimeoutError)
    │   ├── StoreConnectionError (ConnectionError)
    │   ├── NoSpaceError (OSError)            the disk or quota is full
    │   └── UnsupportedOperationError (NotImplementedError)
    ├── IntegrityError                        bytes are not what they were
    │   └── TruncatedError
    ├── FormatError (ValueError)              stored data does not follow its format
    │   ├── InvalidManifestError
    │   └── ShardReadError
    ├── S3ExchangeError                       the exchange API's own; "not found" are ObjectNotFoundErrors too
    │   ├── ExchangeObjectNotFoundError
    │   ├── ManifestNotFoundError
    │   ├── MissingPlaceholderError           a key template names a variable that was not given
    │   └── WriterStateError (RuntimeError)
    │       └── WriterClosedError
    ├── PlanError (ValueError)                an order of samples cannot be made as asked
    │   └── StateMismatchError                the state belongs to other data or options
    ├── SampleError                           one sample failed: shard, member and position inside
    ├── WorkerError                           a worker process or thread died
    ├── CacheFullError (OSError)              the disk of the cache is full, and that shall be an error
    ├── CheckpointError                       saving and restoring
    │   ├── CheckpointNotFoundError (FileNotFoundError)
    │   ├── StepExistsError (FileExistsError)
    │   ├── FencedError                       a newer job owns this run
    │   ├── CommitUnknownError                the commit may or may not have happened
    │   ├── IncompleteCheckpointError
    │   └── UnsupportedStateError (TypeError)
    ├── PartialFailureError                   some of many failed: `.failures`
    └── ClosedError (ValueError)              used after `close()`

`str(error)` is what, where and why on the first line and, where one is known, a second line
``hint: ...`` that names the fix; where a function of yours failed, its own frames follow. No error ever holds a credential.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any, ClassVar, Final

__all__ = [
    "AccessDeniedError",
    "AuthenticationError",
    "BucketNotFoundError",
    "CacheFullError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ClosedError",
    "CommitUnknownError",
    "ConfigError",
    "ConflictError",
    "CredentialsError",
    "ExchangeObjectNotFoundError",
    "FencedError",
    "FormatError",
    "IncompleteCheckpointError",
    "IntegrityError",
    "InvalidManifestError",
    "ManifestNotFoundError",
    "MissingPlaceholderError",
    "NoSpaceError",
    "ObjectChangedError",
    "ObjectExistsError",
    "ObjectNotFoundError",
    "OutcomeUnknownError",
    "PartialFailureError",
    "PlanError",
    "PreconditionFailedError",
    "RangeError",
    "S3ExchangeError",
    "S3LoaderError",
    "SampleError",
    "ShardReadError",
    "SourceNotFoundError",
    "StateMismatchError",
    "StepExistsError",
    "StoreConnectionError",
    "StoreError",
    "StoreTimeoutError",
    "ThrottledError",
    "TruncatedError",
    "UnavailableError",
    "UnsupportedOperationError",
    "UnsupportedStateError",
    "WorkerError",
    "WriterClosedError",
    "WriterStateError",
]

_PASSWORD: Final = re.compile(
    r"""(?<=://)(?:[^/\s'"]*|[^/\s'":]+:(?!\d*/)[^\s'"]*)@"""  # scheme://name:password@host
    r"""|(?<=[?&])((?:[\w-]*(?:signature|credential|token|secret|password|accesskeyid)|sig)=)[^&\s'"]+""",
    re.IGNORECASE,
)


def without_passwords(text: str) -> str:
    """`text` with ``***`` for what stands before the ``@`` of a URL's host, and for signatures of presigned URLs."""
    text = str(text)
    if "://" not in text:
        return text
    return _PASSWORD.sub(lambda match: f"{match[1]}***" if match[1] else "***@", text)


class S3LoaderError(Exception):
    """Base of every error of s3loader.

    Args:
        message: What went wrong, as one sentence without a full stop.
        op: The operation, e.g. ``"get"``.
        url: Where: the full URL of the object or store.
        status: HTTP status, where there was one.
        code: The provider's own error code, e.g. ``"NoSuchKey"``.
        request_id: The provider's request id.
        attempts: How many times it was tried.
        retryable: Whether trying again later may help; defaults to the class's `RETRYABLE`.
        hint: How to fix it; defaults to the class's `HINT`.

    All but `message` are optional, so that code which rebuilds an exception from its text
    alone (as torch's DataLoader does) still gets the right type.
    """

    RETRYABLE: ClassVar[bool] = False
    HINT: ClassVar[str | None] = None

    def __init__(
        self,
        message: str = "",
        *,
        op: str | None = None,
        url: str | None = None,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        attempts: int = 1,
        retryable: bool | None = None,
        hint: str | None = None,
        **details: Any,
    ) -> None:
        message = without_passwords(message)
        super().__init__(message)
        self.message = message
        self.op = op
        self.url = None if url is None else without_passwords(url)
        self.status = status
        self.code = code
        self.request_id = request_id
        self.attempts = attempts
        self.retryable = self.RETRYABLE if retryable is None else retryable
        self.hint = self.HINT if hint is None else without_passwords(hint)
        self.details = details
        """Anything else the raiser knew: `line`, `member`, `position`, `missing`, ..."""
        self.frames = ""
        """Where a function of the user's failed: its traceback as text, also from a worker process."""

    def __getattr__(self, name: str) -> Any:
        details = self.__dict__.get("details")
        if details is not None and name in details:
            return details[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __str__(self) -> str:
        where = f" {self.url}" if self.url and self.url not in self.message else ""
        head = f"cannot {self.op}{where}: {self.message}" if self.op else self.message + where
        facts = [str(self.status)] if self.status is not None else []
        if self.code:
            facts.append(self.code)
        if self.request_id:
            facts.append(f"request id {self.request_id}")
        if self.attempts > 1:
            facts.append(f"{self.attempts} attempts")
        if facts:
            head += f" ({', '.join(facts)})"
        text = f"{head}\nhint: {self.hint}" if self.hint else head
        return f"{text}\n{without_passwords(self.frames)}" if self.frames else text

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, {**self.__dict__}, _packed(self.__cause__)))


def _packed(cause: BaseException | None) -> bytes | None:
    """`cause` pickled; None where it cannot be pickled and made again, as exceptions often cannot."""
    if cause is None:
        return None
    import pickle

    try:
        data = pickle.dumps(cause)
        pickle.loads(data)  # noqa: S301  # written above
    except Exception:  # noqa: BLE001  # of a class that nobody here knows
        return None
    return data


def _rebuild(cls: type[S3LoaderError], message: str, state: dict[str, Any], cause: bytes | None = None) -> S3LoaderError:
    error = cls(message)
    error.__dict__.update(state)
    if cause is not None:
        import pickle

        with contextlib.suppress(Exception):  # its class is not to be had in this process
            error.__cause__ = pickle.loads(cause)  # noqa: S301  # of a pickle that is being read already
    return error


class ConfigError(S3LoaderError, ValueError):
    """A setting, URL or argument is unusable."""


class CredentialsError(ConfigError):
    """No credentials were found where some are needed."""


class SourceNotFoundError(ConfigError, FileNotFoundError):
    """There is no local file under the path that was to be uploaded."""


class StoreError(S3LoaderError):
    """One operation on an object store failed."""


class ObjectNotFoundError(StoreError, FileNotFoundError):
    """There is no object under this key."""

    HINT = "check the key; listing the store shows what there is"


class BucketNotFoundError(ObjectNotFoundError):
    """There is no such bucket or root folder."""

    HINT = "check the name of the bucket or folder, and the endpoint"


class AccessDeniedError(StoreError, PermissionError):
    """The credentials are valid but may not do this."""

    HINT = "check what the policies of bucket and user allow these credentials"


class AuthenticationError(AccessDeniedError):
    """The store refused the key id, secret, token or signature."""

    HINT = "check key id, secret, session token and region"


class PreconditionFailedError(StoreError):
    """A condition on the request did not hold."""


class ObjectExistsError(PreconditionFailedError, FileExistsError):
    """A create-only put found the key taken."""

    HINT = "choose another key, or overwrite it on purpose"


class ObjectChangedError(PreconditionFailedError):
    """The object is no longer the one whose ETag was given."""

    HINT = "another writer replaced it: read it again, then decide"


class ConflictError(StoreError):
    """Another writer is at work on the same key (409); the same request may succeed later."""

    RETRYABLE = True
    HINT = "another writer is at work on this key: try again later"


class OutcomeUnknownError(StoreError):
    """A conditional write was sent, its answer was lost, and reading back did not settle it."""

    HINT = "read the object back before you write again"


class RangeError(StoreError, ValueError):
    """The byte range lies outside the object."""

    HINT = "the object's size is head(key).size; end=None reads to its end"


class ThrottledError(StoreError):
    """The store asked for fewer requests (429, 503 SlowDown)."""

    RETRYABLE = True
    HINT = "send less: lower concurrency, or set max_requests_per_second (StoreOptions)"


class UnavailableError(StoreError):
    """The store failed on its side (5xx)."""

    RETRYABLE = True
    HINT = "the fault is on the store's side: try again later, or raise max_attempts (StoreOptions)"


class StoreTimeoutError(StoreError, TimeoutError):
    """No answer within the timeout."""

    RETRYABLE = True
    HINT = "check endpoint and network, or raise read_timeout (StoreOptions)"


class StoreConnectionError(StoreError, ConnectionError):
    """The endpoint could not be reached, or the connection broke."""

    RETRYABLE = True
    HINT = "check endpoint_url, and that this machine reaches it"


class NoSpaceError(StoreError, OSError):
    """The disk, quota or store is full."""

    HINT = "free some space; what was stored before is intact"


class UnsupportedOperationError(StoreError, NotImplementedError):
    """The store or engine cannot do this."""


class IntegrityError(S3LoaderError):
    """Bytes are not what they were when they were written."""

    HINT = "read it again; if that fails too, what is stored is damaged: restore it from a copy, or write it anew"


class TruncatedError(IntegrityError):
    """Fewer bytes came than were promised."""

    HINT = "try again; if that fails too, what is stored is too short: write it anew"


class FormatError(S3LoaderError, ValueError):
    """Stored data does not follow its format."""


class S3ExchangeError(S3LoaderError):
    """Base of the errors that belong to the exchange API alone."""


class InvalidManifestError(FormatError, S3ExchangeError):
    """A manifest line cannot be understood; `.line_number` says which (1-based)."""

    HINT = "each line is a JSON object: its kind (file, shard, manifest_ref), then its key or archive_key"

    def __init__(self, message: str = "", line_number: int | None = None, **facts: Any) -> None:
        super().__init__(message, line_number=line_number, **facts)


class ShardReadError(FormatError, S3ExchangeError):
    """A shard (tar archive) or its index cannot be read."""

    HINT = "if the archive itself is whole (`tar tf`), build its index anew; else write the shard anew"


class PlanError(S3LoaderError, ValueError):
    """An order of samples cannot be made as asked."""


class StateMismatchError(PlanError):
    """The state was made for another dataset, seed or option; `.differs` names which."""

    HINT = "make the loader as it was when the state was saved; `.differs` says what is different now"


class SampleError(S3LoaderError):
    """One sample failed; `.position`, `.shard` and `.member` say which."""


class WorkerError(S3LoaderError):
    """A worker process or thread died before it delivered what it owed."""


class CacheFullError(S3LoaderError, OSError):
    """Nothing more can be written to the disk of the cache; `.path` and `.bytes` say what was to be."""

    HINT = "free some space, or give a smaller cache_limit; what was delivered is right, the state can be resumed"


class CheckpointError(S3LoaderError):
    """Base of the checkpoint errors."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no committed checkpoint where one was asked for."""


class StepExistsError(CheckpointError, FileExistsError):
    """Another attempt has committed this step."""


class FencedError(CheckpointError):
    """A newer job owns this run, or the step was retired while it was written."""


class CommitUnknownError(CheckpointError):
    """The commit was sent and its answer lost; whether the step exists could not be settled."""


class IncompleteCheckpointError(CheckpointError):
    """Ranks or parts are missing; `.missing` lists them."""


class UnsupportedStateError(CheckpointError, TypeError):
    """A checkpoint cannot hold this object; `.path` says where in the items it is."""


class PartialFailureError(S3LoaderError):
    """Some of many objects failed; `.failures` holds ``(url or path, error)`` of each, `.report` what was done."""


class ClosedError(S3LoaderError, ValueError):
    """Used after `close()`."""

    HINT = "it was closed: open or begin a new one"


class MissingPlaceholderError(S3ExchangeError):
    """A key template names a variable that was not given."""

    def __init__(self, placeholder: str = "", template: str = "", **facts: Any) -> None:
        super().__init__(
            f"Missing placeholder {placeholder!r} in template: {template}" if template else placeholder,
            **{
                "placeholder": placeholder,
                "template": template,
                "hint": f"give it a value: scope({placeholder}=...), or {{{placeholder!r}: ...}} in vars or default_vars"
                if template
                else None,
                **facts,
            },
        )


class ExchangeObjectNotFoundError(ObjectNotFoundError, S3ExchangeError):
    """There is no object under this key; `.key` is the key as it was asked for."""

    def __init__(self, key: str = "", **facts: Any) -> None:
        super().__init__(f"S3 object not found: {key}", key=key, **facts)


class ManifestNotFoundError(ObjectNotFoundError, S3ExchangeError):
    """There is no manifest under this key; `.key` and `.manifest_key` are the key as it was asked for."""

    def __init__(self, key: str = "", **facts: Any) -> None:
        super().__init__(f"Manifest not found: {key}", key=key, manifest_key=key, **facts)


class WriterStateError(S3ExchangeError, RuntimeError):
    """A `ManifestWriter` was not opened for what it is asked to do."""


class WriterClosedError(WriterStateError, ClosedError):
    """A `ManifestWriter` was used after it was closed."""
