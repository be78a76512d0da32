"""AWS Signature Version 4 in headers, for requests whose payload is not signed.

Follows "Authenticating Requests: Using the Authorization Header" of the S3 API reference. What does
not change from request to request is computed once: the signing key and the first blocks of its
HMAC (RFC 2104) per day, the header lines per second.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from s3loader.credentials import Credentials

__all__ = ["Signer"]

_PAYLOAD: Final = "UNSIGNED-PAYLOAD"
_KNOWN_PATHS: Final = 4096
_NONE: Final[Mapping[str, str]] = {}


class Signer:
    """Writes the start of request heads for one host: request line, Host, and the signature.

    Args:
        credentials: The keys; None sends requests unsigned.
        region: As it stands in the signature's scope.
        host: Value of the Host header.
        always: More headers to send and sign with every request; names in lower case.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        credentials: Credentials | None,
        region: str,
        host: str,
        *,
        always: Mapping[str, str] = _NONE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.credentials = credentials
        self.region = region
        self.host = host
        self.always = always
        self._clock = clock
        self._moment = _Moment(self, clock(), None)

    def get(self, path: str) -> str:
        """Head of a GET of `path` (quoted), open for unsigned header lines such as Range.

        The signature does not cover those, so it is kept for as long as its second lasts: many
        ranges of one object are signed once.
        """
        moment = self._now()
        known = moment.known
        head = known.get(path)
        if head is None:
            head = moment.sign("GET", path, "", _NONE)
            if len(known) < _KNOWN_PATHS:
                known[path] = head
        return head

    def head(self, method: str, path: str, query: str = "", headers: Mapping[str, str] = _NONE) -> str:
        """Head of any request, open for unsigned header lines.

        Args:
            method: ``PUT`` ...
            path: Quoted path.
            query: Quoted query, parameters in order of their names, without ``?``.
            headers: More headers to send and sign; names in lower case.
        """
        return self._now().sign(method, path, query, headers)

    def _now(self) -> _Moment:
        moment = self._moment
        now = self._clock()
        if not moment.until - 1 <= now < moment.until:  # a clock may be set back, too
            moment = self._moment = _Moment(self, now, moment)
        return moment


class _Moment:
    """All that is the same for every request of one second. Never changed once it is made, but for
    the paths it knows, so threads may share it."""

    __slots__ = ("_day", "_inner", "_keyed", "_lines", "_names", "_plain", "_scope", "_signer", "_tail", "known", "until")

    def __init__(self, signer: Signer, now: float, previous: _Moment | None) -> None:
        second = int(now)
        self.until = second + 1
        self.known: dict[str, str] = {}
        self._signer = signer
        self._plain = f"Host: {signer.host}\r\nUser-Agent: s3loader\r\n"
        credentials = signer.credentials
        if credentials is None:
            self._plain += "".join(f"{name}: {value}\r\n" for name, value in signer.always.items())
            return
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second))
        self._day = stamp[:8]
        self._scope = f"{self._day}/{signer.region}/s3/aws4_request"
        if previous is not None and previous._day == self._day:
            self._keyed: tuple[Any, Any] = previous._keyed
        else:
            self._keyed = _hmac_start(_signing_key(credentials, self._day, signer.region))
        self._inner = self._keyed[0].copy()
        self._inner.update(f"AWS4-HMAC-SHA256\n{stamp}\n{self._scope}\n".encode())
        fixed = {"host": signer.host, "x-amz-content-sha256": _PAYLOAD, "x-amz-date": stamp}
        if credentials.session_token:
            fixed["x-amz-security-token"] = credentials.session_token
        if signer.always:
            fixed = dict(sorted({**fixed, **signer.always}.items()))
        self._lines = fixed
        self._names = ";".join(fixed)
        self._tail = "".join(f"{name}:{value}\n" for name, value in fixed.items()) + f"\n{self._names}\n{_PAYLOAD}"
        self._plain += "".join(f"{name}: {value}\r\n" for name, value in fixed.items() if name != "host")
        self._plain += f"Authorization: AWS4-HMAC-SHA256 Credential={credentials.access_key_id}/{self._scope}, SignedHeaders="

    def sign(self, method: str, path: str, query: str, headers: Mapping[str, str]) -> str:
        target = f"{path}?{query}" if query else path
        sent = "".join(f"{name}: {value}\r\n" for name, value in headers.items()) if headers else ""
        if self._signer.credentials is None:
            return f"{method} {target} HTTP/1.1\r\n{self._plain}{sent}"
        names, tail = self._names, self._tail
        if headers:
            signed = dict(sorted({**self._lines, **headers}.items()))
            names = ";".join(signed)
            tail = "".join(f"{name}:{' '.join(value.split())}\n" for name, value in signed.items())
            tail += f"\n{names}\n{_PAYLOAD}"
        digest = hashlib.sha256(f"{method}\n{path}\n{query}\n{tail}".encode()).hexdigest()
        inner = self._inner.copy()
        inner.update(digest.encode())
        outer = self._keyed[1].copy()
        outer.update(inner.digest())
        return f"{method} {target} HTTP/1.1\r\n{self._plain}{names}, Signature={outer.hexdigest()}\r\n{sent}"


def _signing_key(credentials: Credentials, day: str, region: str) -> bytes:
    key = b"AWS4" + credentials.secret_access_key.encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def _hmac_start(key: bytes) -> tuple[Any, Any]:
    """Inner and outer hash of an HMAC-SHA256, the key already in: copies of them cost a third of
    an `hmac.digest`."""
    block = key.ljust(64, b"\0")
    return hashlib.sha256(bytes(b ^ 0x36 for b in block)), hashlib.sha256(bytes(b ^ 0x5C for b in block))
