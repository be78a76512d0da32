"""Writes whose answer is lost, or that break half-way: settled by reading back, or unknown; nothing stored is harmed."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import pytest
from bad_network import DATA, IMPATIENT, PART, Open, in_time

from s3loader.errors import (
    AccessDeniedError,
    ObjectExistsError,
    OutcomeUnknownError,
    S3LoaderError,
    StoreConnectionError,
    StoreError,
    UnavailableError,
)
from s3loader.store import StoreOptions, open_store
from s3loader.testing import Rule
from s3loader.types import Update

pytestmark = pytest.mark.usefixtures("short_waits")


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
