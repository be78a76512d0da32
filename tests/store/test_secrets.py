"""No credential appears in a repr, a log, an event or an error, whatever goes wrong."""

from __future__ import annotations

import contextlib
import copy
import logging
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from s3loader import events
from s3loader.config import S3Settings
from s3loader.credentials import CredentialsSource
from s3loader.errors import S3LoaderError
from s3loader.store import StoreOptions, open_store
from s3loader.store.engine_choice import explain_engine
from s3loader.testing import FaultProxy, Rule, Server, ServerKind

KEY_ID = "AKIAIOSFODNN7EXAMPLE"
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
TOKEN = "FwoGZXIvYXdzEBYaDtoken+of/a=session"
HIDDEN = (SECRET, TOKEN, KEY_ID, "Signature=")


def clean(text: str) -> None:
    for secret in HIDDEN:
        assert secret not in text, f"{secret[:8]}... in {text[:2000]}"


def settings_for(url: str) -> S3Settings:
    return S3Settings(endpoint_url=url, aws_access_key_id=KEY_ID, aws_secret_access_key=SECRET, aws_session_token=TOKEN)


@pytest.mark.parametrize("engine", ["auto", "direct", "boto3"])
def test_failures_of_every_kind(servers: Callable[[ServerKind], Server], engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="s3loader")
    seen: list[events.OpEvent] = []
    unsubscribe = events.subscribe(seen.append)
    echo = (
        f"<Error><Code>SignatureDoesNotMatch</Code><Message>The key {KEY_ID} is bad</Message>"
        f"<AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId>"
        f"<StringToSign>AWS4 {TOKEN}</StringToSign><SignatureProvided>Signature=12ab</SignatureProvided></Error>"
    )
    rules = [
        Rule("error", path="/denied", status=403, body=echo.encode()),
        Rule("error", path="/broken", status=500, body=f"oops {KEY_ID} {TOKEN}".encode()),
        Rule("drop_reply", path="/cut"),
    ]
    try:
        with FaultProxy(servers("moto").endpoint_url, rules) as proxy:
            options = StoreOptions(max_attempts=2, retry_budget=600)
            store = open_store("s3://a-bucket", settings=settings_for(proxy.endpoint_url), engine=engine, options=options)
            calls: list[Callable[[str], Any]] = [
                store.get,
                store.head,
                lambda key: store.put(key, b"x"),
                lambda key: store.put(key, b"x", mode="create"),
                store.delete,
                lambda key: list(store.list(key)),
                lambda key: list(store.get_many([key])),
                lambda key: store.copy(key, key + "2"),
                store.multipart,
            ]
            errors: list[S3LoaderError] = []
            for call in calls:
                for key in ("denied", "broken", "cut", "missing"):
                    with contextlib.suppress(_Caught):
                        try:
                            call(key)
                        except S3LoaderError as error:
                            errors.append(error)
                            raise _Caught from None
            assert len(errors) > 20
            for error in errors:
                clean(repr(error) + str(error) + repr(error.__dict__))
                clean("".join(traceback.format_exception(error)))
            clean(repr(store) + str(store) + repr(store.backend) + explain_engine(store.backend) + store.url)
            store.close()
    finally:
        unsubscribe()
    assert seen
    clean("".join(map(repr, seen)))
    clean(caplog.text)


class _Caught(Exception):
    """Ends one call."""


def test_objects_that_hold_them() -> None:
    settings = settings_for("http://127.0.0.1:9")
    source = CredentialsSource(settings)
    shown = [
        settings,
        source,
        source(),
        copy.copy(settings),
        settings.replace(region="r"),
        vars(settings)["aws_secret_access_key"],
    ]
    for thing in shown:
        clean(repr(thing) + str(thing))
    clean(settings.describe())
    for key in ("aws_secret_access_key", "aws_session_token"):
        with pytest.raises(S3LoaderError) as caught:
            S3Settings.load(**{key: SECRET})
        clean(str(caught.value))
