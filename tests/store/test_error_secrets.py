"""No error, representation or event repeats a credential, whichever field a server puts it into."""

from __future__ import annotations

import pickle
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from s3loader import events
from s3loader.errors import ConfigError, S3LoaderError
from s3loader.store import StoreOptions, open_store

KEY_ID, SECRET, TOKEN = "AKIDNOTREAL0123456", "SecretNotReal+0123456789+abcdef", "TokenNotReal0123456789"


class Repeats(BaseHTTPRequestHandler):
    """Every field of its answers holds a credential."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = (
            f"<Error><Code>{SECRET}</Code><Message>{KEY_ID} {TOKEN} https://me:{SECRET}@host/</Message>"
            f"<RequestId>{TOKEN}</RequestId><Region>{KEY_ID}</Region></Error>"
        ).encode()
        self.send_response(400)
        self.send_header("x-amz-request-id", SECRET)
        self.send_header("x-amz-bucket-region", KEY_ID)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_POST(self) -> None:
        self.do_PUT()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Repeats) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("engine", ["direct", "boto3"])
def test_whatever_a_server_repeats_is_masked(engine: Any, endpoint: str) -> None:
    seen: list[str] = []
    unsubscribe = events.subscribe(lambda event: seen.append(repr(event)))
    keys: dict[str, Any] = {"access_key_id": KEY_ID, "secret_access_key": SECRET, "session_token": TOKEN, "engine": engine}
    once = StoreOptions(max_attempts=1)
    try:
        with open_store("s3://bucket/p", endpoint_url=endpoint, region="us-east-1", options=once, **keys) as store:
            for call in (
                lambda: store.get("k"),
                lambda: store.head("k"),
                lambda: store.put("k", b"1"),
                lambda: store.put("k", b"1", mode="create"),
                lambda: list(store.list("")),
                lambda: store.delete("k"),
                lambda: list(store.get_many(["k"])),
                lambda: store.copy("k", "l"),
            ):
                with pytest.raises(S3LoaderError) as caught:
                    call()
                error: Any = caught.value
                told = f"{error} {error!r} {error.args} {vars(error)} {pickle.loads(pickle.dumps(error))!r}"
                seen.append(told)
            seen += [repr(store), str(store.options), store.url]
    finally:
        unsubscribe()
    for text in seen:
        assert not any(secret in text for secret in (KEY_ID, SECRET, TOKEN)), text


def test_an_endpoint_with_a_password_is_refused_without_repeating_it() -> None:
    for url in (f"https://me:{SECRET}@host", f"https://{SECRET}@host", f"ftp://me:{SECRET}@host", f"http://me:{SECRET}@[::1"):
        with pytest.raises(ConfigError) as caught:
            open_store("s3://bucket", endpoint_url=url, region="us-east-1", access_key_id=KEY_ID, secret_access_key=SECRET)
        assert SECRET not in "".join(traceback.format_exception(caught.value.with_traceback(None)))


def test_settings_that_name_an_endpoint_with_a_password_do_not_show_it() -> None:
    from s3loader import S3Settings

    settings = S3Settings(endpoint_url=f"https://me:{SECRET}@host", region="us-east-1")
    assert SECRET not in f"{settings!r} {settings} {settings.describe()}"
