"""Refusals, silence, Ctrl-C, a full disk: one typed error, in time."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_network import DATA, IMPATIENT, OTHERS, PART, READS, Open, in_time

from s3loader import events
from s3loader.errors import (
    AuthenticationError,
    ConfigError,
    ConflictError,
    NoSpaceError,
    S3LoaderError,
    StoreTimeoutError,
    ThrottledError,
    UnavailableError,
)
from s3loader.store import ObjectStore, open_store
from s3loader.testing import FaultProxy, Rule, Server, ServerKind
from s3loader.types import ReadRequest, Update

pytestmark = pytest.mark.usefixtures("short_waits")


REFUSALS: dict[str, tuple[int, str, bytes | None, type[S3LoaderError]]] = {
    "slow down": (503, "SlowDown", None, ThrottledError),
    "too many": (429, "TooManyRequests", None, ThrottledError),
    "internal": (500, "InternalError", None, UnavailableError),
    "no xml": (502, "", b"<html>bad gateway", UnavailableError),
    "conflict": (409, "OperationAborted", None, ConflictError),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals_are_tried_again_then_raised(through: Open, what: str) -> None:
    status, code, body, expected = REFUSALS[what]
    method = "PUT" if what == "conflict" else "GET"
    rule = Rule("error", method=method, path="/k$", status=status, code=code, body=body, times=2)
    call: Callable[[ObjectStore], Any] = (lambda s: s.put("k", DATA)) if what == "conflict" else (lambda s: s.get("k"))
    store, _, plain = through(rule, kind="moto")
    seen: list[events.OpEvent] = []
    unsubscribe = events.subscribe(seen.append)
    try:
        in_time(lambda: call(store))
        assert rule.fired == 2
        tries = [event for event in seen if event.op == method and event.url.endswith("/k")]
        assert [event.error is None for event in tries] == [False, False, True], "each request is an event"
        rule.times = None
        seen.clear()
        with pytest.raises(expected) as caught:
            in_time(lambda: call(store))
    finally:
        unsubscribe()
    assert (caught.value.attempts, caught.value.status) == (3, status)
    assert caught.value.retryable
    assert len([event for event in seen if event.op == "RETRY"]) == 2
    assert plain.get("k") == DATA


def test_a_throttled_store_is_not_asked_again_at_once(through: Open) -> None:
    """Every request after a SlowDown has waited: no engine hands it on to another that asks again."""
    store, proxy, _ = through(Rule("error", method="GET", path="/k$", status=503, code="SlowDown"))
    with pytest.raises(ThrottledError):
        in_time(lambda: store.get("k"))
    assert proxy.count("GET") == 3
    proxy.clear()
    with pytest.raises(ThrottledError):
        in_time(lambda: list(store.get_many(["k"])))
    assert proxy.count("GET") == 3


@pytest.mark.parametrize("code", ["RequestTimeTooSkewed", "ExpiredToken", "SignatureDoesNotMatch", "InvalidAccessKeyId"])
def test_refused_credentials_say_what_to_do(through: Open, code: str) -> None:
    store, _, _ = through(Rule("error", status=400 if code == "ExpiredToken" else 403, code=code))
    for call in (READS["get"], READS["pump"], OTHERS["put"], OTHERS["list"]):
        with pytest.raises(AuthenticationError) as caught:
            in_time(lambda call=call: call(store))  # type: ignore[misc]
        assert caught.value.hint
        assert caught.value.code == code
        assert not caught.value.retryable


def test_a_server_that_never_answers_is_a_timeout(through: Open) -> None:
    store, proxy, plain = through(Rule("hold"), **IMPATIENT)
    for verb in ("get", "pump", "threads", "read_into", "put", "list"):
        with pytest.raises(StoreTimeoutError) as caught:
            in_time(lambda verb=verb: {**READS, **OTHERS}[verb](store))  # type: ignore[misc]
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.hint, verb
        assert caught.value.attempts == 2, verb
    proxy.close()
    assert plain.get("k") == DATA


CHILD = """
import sys
from s3loader.store import StoreOptions, open_store
url, endpoint, key, secret, engine, verb = sys.argv[1:]
store = open_store(url, engine=engine, endpoint_url=endpoint, access_key_id=key, secret_access_key=secret, region="us-east-1",
                   options=StoreOptions(max_attempts=1, read_timeout=600, connect_timeout=600))
try:
    if verb == "get":
        store.get("k")
    elif verb == "put":
        store.put("k", b"x" * 100)
    elif verb == "list":
        list(store.list())
    else:
        list(store.get_many(["k"] * 20, driver=verb))
except KeyboardInterrupt:
    store.close()
    print("interrupted")
"""


@pytest.mark.parametrize(
    ("engine", "verb"),
    [
        *(("direct", verb) for verb in ("get", "put", "list", "pump", "threads")),
        *(("boto3", verb) for verb in ("get", "put", "list", "threads")),
    ],
)
def test_ctrl_c_ends_a_blocked_call(
    servers: Callable[[ServerKind], Server], shared_bucket: Callable[[ServerKind], str], engine: Any, verb: str
) -> None:
    """The timeouts are ten minutes: only the signal can end it, and nothing may keep the process then."""
    running = servers("ministack")
    rule = Rule("hold")
    with FaultProxy(running.endpoint_url, [rule]) as proxy:
        url = f"s3://{shared_bucket('ministack')}/c"
        arguments = [url, proxy.endpoint_url, running.access_key_id, running.secret_access_key]
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments, engine, verb], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert rule.reached.wait(600)
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=600)
        finally:
            child.kill()
            child.communicate()
        assert out == "interrupted\n", err
        assert child.returncode == 0
        assert not rule.release.is_set()


@pytest.mark.parametrize("url", ["ftp://host/x", "", "s3://", "S4://b", "s3:///key"])
def test_unusable_urls(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    assert caught.value.hint


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Inside it no file can grow beyond 64 KiB: what a full disk does, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_a_full_disk(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        etag = store.put("k", b"old").etag
        with full_disk():
            for call in (
                lambda: store.put("k", DATA),
                lambda: store.put("new", DATA),
                lambda: store.put("new", DATA, mode="create"),
                lambda: store.put("k", DATA, mode=Update(etag)),
            ):
                with pytest.raises(NoSpaceError) as caught:
                    call()
                assert isinstance(caught.value, OSError)
                assert caught.value.hint
            writer = store.multipart("k", part_size=PART)
            writer.write(DATA)
            with pytest.raises(NoSpaceError):
                writer.close()
            writer.abort()
        assert store.get("k") == b"old"
        assert [entry.key for entry in store.list()] == ["k"]
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "k"], "half a file is left"
        store.put("k", DATA)
        assert store.get("k") == DATA


def test_a_request_for_much_too_much(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put("k", b"0123456789")
        assert store.get_range("k", 5, 2**62) == b"56789"
        results = list(store.read_many([ReadRequest("k", 8, 2**62)], max_bytes=10))
        assert bytes(results[0].data) == b"89"
