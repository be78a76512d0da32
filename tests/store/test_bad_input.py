"""What goes wrong between us and a store: one typed error, in time, and nothing stored is harmed."""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from s3loader import events
from s3loader.errors import (
    AccessDeniedError,
    AuthenticationError,
    ConfigError,
    ConflictError,
    NoSpaceError,
    ObjectChangedError,
    ObjectExistsError,
    OutcomeUnknownError,
    S3LoaderError,
    StoreConnectionError,
    StoreError,
    StoreTimeoutError,
    ThrottledError,
    TruncatedError,
    UnavailableError,
)
from s3loader.store import ObjectStore, StoreOptions, open_store
from s3loader.testing import FaultProxy, Rule, Server, ServerKind
from s3loader.types import ReadRequest, Update

ENGINES = ("direct", "obstore", "boto3")
IMPATIENT = {"max_attempts": 2, "read_timeout": 0.2, "retry_budget": 5}
PART = 5 * 2**20
DATA = bytes(range(256)) * 400  # 100 KiB
SILENCE = (StoreTimeoutError, StoreConnectionError, TruncatedError)

Open = Callable[..., tuple[ObjectStore, FaultProxy, ObjectStore]]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3loader.store.retry._BASE", 0.01)  # how long one waits is tested elsewhere


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def through(servers: Callable[[ServerKind], Server], shared_bucket: Callable[[ServerKind], str], engine: Any) -> Iterator[Open]:
    """A store of `engine` behind a proxy with these rules, the proxy, and the same place without it."""
    with contextlib.ExitStack() as stack:

        def start(
            *rules: Rule, kind: ServerKind = "ministack", verify_checksums: bool = False, **options: Any
        ) -> tuple[ObjectStore, FaultProxy, ObjectStore]:
            running = servers(kind)
            root = f"{shared_bucket(kind)}/{uuid.uuid4().hex}"
            plain = stack.enter_context(running.open_store(root))
            plain.put("k", DATA)
            proxy = stack.enter_context(FaultProxy(running.endpoint_url, rules, verify_checksums=verify_checksums))
            given = StoreOptions(**{"max_attempts": 3, "read_timeout": 10, "retry_budget": 20, **options})
            store = running.open_store(root, engine=engine, endpoint_url=proxy.endpoint_url, options=given)
            stack.callback(store.close)
            return store, proxy, plain

        yield start


def in_time(call: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `call` returns, or raises; a failure when it hangs."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((call(), None))
        except BaseException as error:  # noqa: BLE001  raised below
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, "it hangs"
    value, error = result[0]
    if error is not None:
        raise error
    return value


def read_into(store: ObjectStore) -> bytes:
    buffer = bytearray(len(DATA))
    store.read_into("k", 0, buffer)
    return bytes(buffer)


def read_file(store: ObjectStore) -> bytes:
    with store.open("k") as file:
        return bytes(file.read())


def read_many(driver: Any) -> Callable[[ObjectStore], bytes]:
    return lambda store: bytes(next(iter(store.get_many(["k"], driver=driver))).data)


WHOLE: dict[str, Callable[[ObjectStore], bytes]] = {
    "get": lambda store: store.get("k"),
    "pump": read_many("pump"),
    "threads": read_many("threads"),
}
RANGED: dict[str, Callable[[ObjectStore], bytes]] = {
    "get_range": lambda store: store.get_range("k", 0, len(DATA)),
    "get_ranges": lambda store: bytes(store.get_ranges("k", [(0, len(DATA))])[0]),
    "read_into": read_into,
}
READS = {**WHOLE, **RANGED, "open": read_file}
OTHERS: dict[str, Callable[[ObjectStore], Any]] = {
    "put": lambda store: store.put("k", b"x"),
    "list": lambda store: list(store.list()),
}


# -- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["truncate", "reset", "stall", "refuse", "drop_reply"])
def test_a_read_that_breaks_once_is_whole_in_the_end(through: Open, action: Any) -> None:
    rule = Rule(action, method="GET", path="/k$", times=0)
    store, _, _ = through(rule, read_timeout=0.3 if action == "stall" else 10, max_attempts=8)
    for verb, read in READS.items():
        rule.times = rule.fired + 1
        assert in_time(lambda read=read: read(store)) == DATA, verb  # type: ignore[misc]
        assert rule.fired == rule.times


@pytest.mark.parametrize("action", ["truncate", "reset", "stall"])
def test_a_read_that_always_breaks_is_an_error(through: Open, action: Any) -> None:
    store, _, _ = through(Rule(action, method="GET", path="/k$"), **IMPATIENT)
    for verb in ("get", "pump", "threads", "read_into"):
        with pytest.raises(SILENCE) as caught:
            in_time(lambda verb=verb: READS[verb](store))  # type: ignore[misc]
        assert caught.value.url is not None
        assert caught.value.url.endswith("/k")
        assert caught.value.attempts == 2, verb
        assert caught.value.hint or isinstance(caught.value, TruncatedError), verb


ODD: dict[str, Rule] = {
    "chunked": Rule("chunked"),
    "no etag": Rule("rewrite", headers={"ETag": None}),
    "other range": Rule("rewrite", status=206, headers={"Content-Range": "bytes 4-9/2000000"}),
    "encoded": Rule("rewrite", headers={"Content-Encoding": "x-unknown"}),
    "short": Rule("rewrite", headers={"Content-Length": "7"}),
    "long": Rule("rewrite", headers={"Content-Length": "200000"}),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_answers_give_the_right_bytes_or_an_error(through: Open, what: str) -> None:
    """The direct engine takes one kind of answer; what it hands over must be as strict."""
    odd = ODD[what]
    store, _, _ = through(Rule(odd.action, method="GET", path="/k$", status=odd.status, headers=odd.headers), **IMPATIENT)
    # Of a whole object nothing else tells the size, so a length that is too short cannot be seen there.
    for verb, read in (RANGED if what in ("short", "long") else READS).items():
        found: Any = None
        with contextlib.suppress(S3LoaderError):
            found = in_time(lambda read=read: read(store))  # type: ignore[misc]
        assert found in (None, DATA), verb


@pytest.mark.parametrize("kind", ["ministack", "rclone"])
def test_an_object_that_changes_between_two_ranges(through: Open, engine: str, kind: ServerKind) -> None:
    """Also on a server that ignores If-Match: the ETag that came is checked. (rclone answers a range with 200,
    which obstore does not take: both are asked for anew, and are the new object's.)"""
    first = Rule("hold_reply", method="GET", path="/k$", nth=1)
    second = Rule("hold", method="GET", path="/k$", nth=1)  # of those that the first rule leaves
    store, _, plain = through(first, second, kind=kind)
    outcome: list[Any] = []

    def read() -> None:
        try:
            outcome.append([bytes(data) for data in store.get_ranges("k", [(0, 10), (50_000, 50_010)], max_gap=0)])
        except BaseException as error:  # noqa: BLE001  looked at below
            outcome.append(type(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    assert first.reached.wait(30)
    assert second.reached.wait(30)
    plain.put("k", DATA[::-1])
    first.release.set()
    second.release.set()
    thread.join(30)
    assert not thread.is_alive()
    new = DATA[::-1]
    anew = [new[:10], new[50_000:50_010]]
    assert outcome == [anew if (engine, kind) == ("obstore", "rclone") else ObjectChangedError]


# -- answers that ask for patience, and silence --------------------------------------------------

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


def test_an_iterator_left_while_the_server_is_silent(through: Open) -> None:
    rule = Rule("hold", method="GET", path="/silent$")
    store, _, plain = through(rule, read_timeout=600, connect_timeout=600)
    plain.put("silent", DATA)
    before = set(threading.enumerate())
    requests = [ReadRequest("k", 0, len(DATA)), *(ReadRequest("silent", 0, len(DATA)) for _ in range(30))]
    results = store.read_many(requests, max_bytes=4 * len(DATA), concurrency=4, driver="threads")
    assert bytes(in_time(lambda: next(results)).data) == DATA
    assert rule.reached.wait(30)
    in_time(results.close)  # type: ignore[attr-defined]
    in_time(store.close)
    rule.release.set()
    ours = {thread for thread in threading.enumerate() if "fault-proxy" not in thread.name} - before
    for thread in ours:
        thread.join(30)
    assert not [thread for thread in ours if thread.is_alive()]


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
        *(("direct", verb) for verb in ("get", "put", "pump", "threads")),
        *(("obstore", verb) for verb in ("get", "pump", "threads")),
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
            assert rule.reached.wait(60)
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=30)
        finally:
            child.kill()
            child.communicate()
        assert out == "interrupted\n", err
        assert child.returncode == 0
        assert not rule.release.is_set()


# -- writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["drop_reply", "refuse"])
def test_a_put_whose_answer_is_lost(through: Open, action: Any) -> None:
    rule = Rule(action, method="PUT", path="/new-.*", times=0)
    store, _, plain = through(rule, kind="moto")
    modes: dict[str, Any] = {
        "overwrite": "overwrite",
        "create": "create",
        "update": Update(plain.put("new-update", b"old").etag),
    }
    for name, mode in modes.items():
        rule.times = rule.fired + 1
        result = in_time(lambda name=name, mode=mode: store.put(f"new-{name}", b"mine", mode=mode))  # type: ignore[misc]
        assert rule.fired == rule.times
        assert plain.get(f"new-{name}") == b"mine"
        assert result.etag == plain.head(f"new-{name}").etag
        assert result.size == 4


@pytest.mark.parametrize("mode", ["create", "update"])
def test_a_lost_answer_does_not_claim_anothers_object(through: Open, mode: str) -> None:
    """The first try never arrived; meanwhile another writer took the key. A create is refused by that in any
    case; an update may have come before the other's, who then built on it: that is unknown."""
    store, _, plain = through(Rule("refuse", method="PUT", path="/new$", times=1), kind="moto")
    how: Any = mode
    if mode == "update":
        how = Update(plain.put("new", b"old").etag)
    plain.put("new", b"mine")  # the same bytes, even
    with pytest.raises(ObjectExistsError if mode == "create" else OutcomeUnknownError):
        in_time(lambda: store.put("new", b"mine", mode=how))
    assert plain.get("new") == b"mine"


def test_a_put_that_cannot_be_settled_is_unknown(through: Open) -> None:
    store, _, plain = through(
        Rule("drop_reply", method="PUT", path="/new$", times=1), Rule("refuse", path="/new$"), kind="moto"
    )
    with pytest.raises(OutcomeUnknownError) as caught:
        in_time(lambda: store.put("new", b"mine", mode="create"))
    assert plain.get("new") == b"mine"
    assert caught.value.hint


@pytest.mark.parametrize("mode", ["create", "update"])
def test_a_put_that_never_left_is_a_plain_failure(engine: str, mode: str) -> None:
    """Nobody listens: nothing was sent, so nothing is unknown."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}"
    how: Any = mode if mode == "create" else Update("etag")
    keys = {"access_key_id": "S3LOADERTESTING00001", "secret_access_key": "x" * 40, "region": "us-east-1"}
    store = open_store("s3://b-bucket", engine=engine, endpoint_url=url, options=StoreOptions(max_attempts=2), **keys)
    with store, pytest.raises(StoreConnectionError) as caught:
        in_time(lambda: store.put("k", b"x", mode=how))
    assert caught.value.attempts == 2
    assert caught.value.details["sent"] is False


@pytest.mark.parametrize("mode", ["overwrite", "create"])
def test_a_completion_whose_answer_is_lost(through: Open, mode: Any) -> None:
    rule = Rule("drop_reply", method="POST", path="uploadId=", times=1)
    store, _, plain = through(rule, kind="moto")
    body = DATA * 60
    with store.multipart("new", part_size=PART, mode=mode) as writer:
        writer.write(body)
    assert rule.fired == 1
    assert plain.get("new") == body
    assert list(plain.backend.list_multipart()) == []


def test_a_completion_that_fails_inside_a_200(through: Open) -> None:
    rule = Rule("error", method="POST", path="uploadId=", status=200, times=1)
    store, _, plain = through(rule, kind="moto", max_attempts=2)
    body = DATA * 60
    with store.multipart("k", part_size=PART) as writer:
        writer.write(body)
    assert rule.fired == 1
    assert plain.get("k") == body
    plain.put("k", DATA)
    rule.times = None
    late = store.multipart("k", part_size=PART)
    late.write(body)
    with pytest.raises(StoreError):
        in_time(late.close)
    assert plain.get("k") == DATA, "a failure inside a 200 was taken for success"


def test_a_copy_that_fails_inside_a_200(through: Open) -> None:
    store, _, plain = through(Rule("error", method="PUT", path="/copy$", status=200), **IMPATIENT, kind="moto")
    with pytest.raises(StoreError):
        in_time(lambda: store.copy("k", "copy"))
    assert not plain.exists("copy")


@pytest.mark.parametrize("action", ["refuse", "drop_reply", "error", "reset"])
def test_a_part_that_breaks_once(through: Open, action: Any) -> None:
    rule = Rule(action, method="PUT", path="partNumber=2", times=1)
    store, _, plain = through(rule, kind="moto")
    body = DATA * 60
    with store.multipart("new", part_size=PART) as writer:
        writer.write(body)
    assert rule.fired == 1
    assert plain.get("new") == body


def test_a_part_that_always_breaks_leaves_nothing(through: Open) -> None:
    store, _, plain = through(Rule("error", method="PUT", path="partNumber=2"), kind="moto", max_attempts=2)

    def write() -> None:
        with store.multipart("k", part_size=PART) as writer:
            for _ in range(200):
                writer.write(DATA)

    with pytest.raises(UnavailableError):
        in_time(write)
    assert plain.get("k") == DATA
    assert list(plain.backend.list_multipart()) == []


def test_a_bit_that_flips_on_the_way_up_is_caught(through: Open, engine: str) -> None:
    """On a store that verifies CRC32C, as S3 does; a part of an upload as well as a put."""
    flip = Rule("flip_request", method="PUT", path="/new", nth=1)
    flip_part = Rule("flip_request", method="PUT", path="partNumber=1", nth=1)
    store, _, plain = through(flip, flip_part, verify_checksums=True, kind="moto")
    with contextlib.suppress(S3LoaderError):
        in_time(lambda: store.put("new", DATA))
    assert flip.fired == 1
    assert not plain.exists("new") or plain.get("new") == DATA
    body = DATA * 60
    with contextlib.suppress(S3LoaderError), store.multipart("large", part_size=PART) as writer:
        writer.write(body)
    assert flip_part.fired == 1
    assert not plain.exists("large") or plain.get("large") == body


def test_a_store_that_verifies_checksums_is_known_for_it(through: Open) -> None:
    store, _, _ = through(verify_checksums=True, kind="moto")
    assert store.capabilities().upload_checksum


def test_delete_many_tells_which_failed(through: Open) -> None:
    rule = Rule("error", method="POST", path="delete", status=200)
    store, _, plain = through(rule, kind="moto")
    root = store.url.split("/", 3)[3].rstrip("/")
    rule.body = (
        '<?xml version="1.0" encoding="UTF-8"?><DeleteResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Deleted><Key>{root}/a</Key></Deleted>"
        f"<Error><Key>{root}/k</Key><Code>AccessDenied</Code><Message>no</Message></Error></DeleteResult>"
    ).encode()
    failures = in_time(lambda: store.delete_many(["a", "k"]))
    assert [failure.key for failure in failures] == ["k"]
    assert isinstance(failures[0].error, AccessDeniedError)
    assert "AccessDenied" in str(failures[0].error)
    assert plain.exists("k")


# -- URLs and disks ----------------------------------------------------------------------------


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
