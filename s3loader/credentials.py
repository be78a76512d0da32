"""Credentials for every engine from one source: static keys, or the AWS chain with refresh."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from s3loader.arguments import checked
from s3loader.config import S3Settings, plain
from s3loader.errors import CredentialsError

__all__ = ["Credentials", "CredentialsSource", "mask"]

NO_CREDENTIALS_HINT: Final = (
    "set S3_AWS_ACCESS_KEY_ID and S3_AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give access_key_id and "
    "secret_access_key; for a public bucket use StoreOptions(unsigned=True)"
)
# botocore begins to refresh 15 minutes before the end; asking it more often gains nothing
_ASK_AGAIN: Final = 30.0
_MARGIN: Final = 15 * 60.0
_LAST_MOMENT: Final = 60.0

# what this process was given lately, so that it can be struck out where a server repeats it
_given: deque[str] = deque(maxlen=256)


def mask(text: str) -> str:
    """`text` without any key id, secret or token that a source in this process gave."""
    for given in _given.copy():
        text = text.replace(given, "***")
    return text


@checked
@dataclass(frozen=True, slots=True)
class Credentials:
    """One set of keys, as they are at one moment."""

    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)
    expiry: float | None = None
    """Seconds since the epoch; None = never."""

    def __post_init__(self) -> None:
        for text in (self.access_key_id, self.secret_access_key, self.session_token):
            if text and len(text) >= 8 and text not in _given:  # shorter ones are in many a word
                _given.append(text)


class CredentialsSource:
    """Gives fresh `Credentials` to every engine: ``source()``.

    Static keys cost nothing and never import botocore. Otherwise one boto3 session per process
    resolves the chain (profile, SSO, role, container, instance) and refreshes it. Safe to call from
    several threads and after fork: a child makes its own session, and meanwhile goes on with the
    parent's keys while they are valid.

    Args:
        settings: Whose keys, or whose profile.
        unsigned: Send requests without a signature; then ``source()`` is None.
    """

    def __init__(self, settings: S3Settings, *, unsigned: bool = False) -> None:
        self._settings = settings
        self.unsigned = unsigned
        self._cached: Credentials | None = None
        self._ask_at = 0.0
        secret = plain(settings.aws_secret_access_key)
        if settings.aws_access_key_id and secret and not unsigned:
            self._cached = Credentials(settings.aws_access_key_id, secret, plain(settings.aws_session_token))
            self._ask_at = float("inf")
        self._process = _Process()

    def __call__(self) -> Credentials | None:
        """The keys to sign with now; None = do not sign.

        Raises:
            CredentialsError: the chain has none, or could not refresh them.
        """
        if self.unsigned:
            return None
        if self._cached is not None and time.time() < self._ask_at:
            return self._cached
        process = self._own_process()
        with process.lock:
            if self._cached is None or time.time() >= self._ask_at:
                self._cached = self._ask(process)
                end = self._cached.expiry
                self._ask_at = float("inf") if end is None else min(time.time() + _ASK_AGAIN, end - _LAST_MOMENT)
            return self._cached

    def refresh(self) -> Credentials | None:
        """Forget what is kept and ask the chain again, e.g. after the store said ``ExpiredToken``.

        Static keys stay as they are.
        """
        if not self.static:
            process = self._own_process()
            with process.lock:
                self._cached, process.session, process.credentials = None, None, None
        return self()

    @property
    def static(self) -> bool:
        """Whether the keys are fixed (or none are used), so that asking again cannot help."""
        return self.unsigned or bool(self._settings.aws_access_key_id)

    def session(self) -> Any:
        """This process's boto3 session, for clients that share these keys."""
        process = self._own_process()
        with process.lock:
            return self._session(process)

    def _own_process(self) -> _Process:
        # a lock held by another thread when the process forked stays locked in the child for ever:
        # so a child takes a new one. Two threads that race here make one session too many, no more.
        if self._process.pid != os.getpid():
            self._process = _Process()
            if self._cached is not None and self._cached.expiry is not None:
                self._ask_at = max(self._ask_at, self._cached.expiry - _MARGIN)
        return self._process

    def _session(self, process: _Process) -> Any:
        if process.session is None:
            process.session = self._settings.create_session()
        return process.session

    def _ask(self, process: _Process) -> Credentials:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            if process.credentials is None:
                process.credentials = self._session(process).get_credentials()
            if process.credentials is None:
                raise CredentialsError("no credentials were found", hint=NO_CREDENTIALS_HINT)
            frozen = process.credentials.get_frozen_credentials()
        except (BotoCoreError, ClientError) as error:
            # botocore's messages name profiles, files and services, never keys
            raise CredentialsError(
                f"the AWS chain gave no credentials: {type(error).__name__}: {error}",
                hint="`aws sts get-caller-identity` tests it",
            ) from None
        if not frozen.access_key or not frozen.secret_key:
            raise CredentialsError("the credentials found are empty", hint=NO_CREDENTIALS_HINT)
        end = getattr(process.credentials, "_expiry_time", None)  # botocore has no public name for it
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token, end.timestamp() if end is not None else None)

    def __repr__(self) -> str:
        kind = (
            "unsigned" if self.unsigned else "static keys" if self.static else f"AWS chain, profile {self._settings.profile!r}"
        )
        return f"CredentialsSource({kind})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self._settings, self.unsigned))


class _Process:
    """What belongs to one process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.session: Any = None
        self.credentials: Any = None


def _rebuild(settings: S3Settings, unsigned: bool) -> CredentialsSource:
    return CredentialsSource(settings, unsigned=unsigned)
