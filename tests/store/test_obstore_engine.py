"""The obstore engine: GCS and Azure by its own memory store, S3 beyond the conformance suite."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.config import S3Settings
from s3loader.credentials import CredentialsSource
from s3loader.endpoint import Endpoint
from s3loader.errors import (
    ConfigError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreConnectionError,
    StoreError,
    UnsupportedOperationError,
)
from s3loader.store import ObjectStore, StoreOptions, open_store
from s3loader.store.obstore import runtime as obstore_runtime
from s3loader.store.obstore.client import ObstoreClient, from_identifier, to_identifier
from s3loader.store.obstore.engine import ObstoreBackend, ObstoreS3Reader
from s3loader.testing import Server, ServerKind, StoreSuite
from s3loader.testing.suite import HARD_KEYS
from s3loader.types import Capabilities


class TestOverObstoresMemory(StoreSuite):
    """The backend of gs:// and az://, over the one obstore store that needs no server."""

    shared = False
    start_methods = ()
    capabilities = Capabilities(
        create=True, update=True, multipart_create=True, multipart_update=True, get_if_match=True, upload_checksum=False
    )
    # obstore's memory store keeps the very buffer it is given; stores that send it do not
    test_put_keeps_nothing_of_the_buffer = None
    # the bare backend has no wrapper that emits events
    test_everything_is_an_event = None

    @pytest.fixture
    def store(self) -> Iterator[ObjectStore]:
        from obstore.store import MemoryStore

        memory = MemoryStore()
        client = ObstoreClient("gs://bucket", lambda: memory)
        with ObjectStore("gs://bucket", ObstoreBackend("gs", "bucket", client)) as store:
            yield store

    def reopen(self, store: ObjectStore) -> ObjectStore:
        return ObjectStore("gs://bucket", store.backend)


# -- GCS and Azure -------------------------------------------------------------------------------


@contextlib.contextmanager
def recorder(answer: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server on loopback that keeps what it was sent and always says the same."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(client: socket.socket) -> None:
            with contextlib.suppress(OSError), client:
                client.settimeout(30)
                while data := client.recv(1 << 20):
                    seen.append(data)
                    client.sendall(answer)

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(client,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


EMPTY = b'HTTP/1.1 200 OK\r\nContent-Length: 0\r\nETag: "e"\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n\r\n'
NO_BUCKET = (
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 82\r\n\r\n"
    b"<?xml version='1.0'?><Error><Code>NoSuchBucket</Code><Message>No</Message></Error>"
)


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")


@pytest.mark.usefixtures("azure")
@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_endpoints_of_the_others(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an endpoint given as an argument is theirs: S3's variables do not lead them astray."""
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
    with recorder(EMPTY) as (url, seen):
        options = StoreOptions(unsigned=scheme == "gs", max_attempts=1)
        with open_store(f"{scheme}://bucket/p", endpoint_url=url, options=options) as store:
            assert store.engine == "obstore"
            store.put("k", b"x", content_type="a/b")
        assert seen[0].startswith(b"PUT ")
        assert b"/bucket/p/k " in seen[0].split(b"\r\n")[0].replace(b"%2F", b"/")


@pytest.mark.parametrize("scheme", ["gs", "az"])
@pytest.mark.usefixtures("azure")
def test_errors_of_the_others(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}"
    options = StoreOptions(unsigned=True, max_attempts=1)
    with open_store(f"{scheme}://bucket", endpoint_url=url, options=options) as store:
        with pytest.raises(StoreConnectionError, match="cannot be reached"):
            store.get("img_404.jpg")
        with pytest.raises(UnsupportedOperationError, match="as it is") as caught:
            store.put("a//b", b"")
        assert caught.value.hint
    with recorder(NO_BUCKET) as (url, _), open_store(f"{scheme}://bucket", endpoint_url=url, options=options) as store:
        with pytest.raises(ObjectNotFoundError) as missing:
            store.get("k")
        assert missing.value.status == 404
        assert missing.value.code == "NoSuchBucket"


@pytest.mark.parametrize("engine", ["direct", "boto3"])
def test_engines_that_cannot_serve_them(engine: Any) -> None:
    with pytest.raises(ConfigError, match="cannot serve GCS"):
        open_store("gs://bucket", engine=engine)


def test_azure_without_an_account() -> None:
    with open_store("az://container", options=StoreOptions(max_attempts=1)) as store:
        with pytest.raises(ConfigError, match="account") as caught:
            store.get("k")
        assert "AZURE_STORAGE_ACCOUNT_NAME" in str(caught.value.hint)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_categories=["Lu"]), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_metadata_names_on_azure(name: str) -> None:
    made = to_identifier(name)
    assert made.isidentifier()
    assert made.isascii()
    assert from_identifier(made) == name


def test_metadata_names_that_need_no_escape() -> None:
    assert to_identifier("my_name2") == "my_name2"
    assert from_identifier("my_xface") == "my_xface"
    assert to_identifier("s3loader-write") == "s3loader_x2d_write"


def test_parts_of_an_upload_live_on_disk_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from obstore.store import MemoryStore

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    memory = MemoryStore()
    backend = ObstoreBackend("gs", "b", ObstoreClient("gs://b", lambda: memory))
    upload_id = backend.create_multipart("k", content_type="a/b", metadata={"m": "1"})
    second = backend.upload_part("k", upload_id, 2, memoryview(b"y" * (9 << 20)))
    first = backend.upload_part("k", upload_id, 1, b"old")
    first = backend.upload_part("k", upload_id, 1, b"x")
    assert [entry[:2] for entry in backend.list_multipart("")] == [("k", upload_id)]
    assert len(list(tmp_path.rglob("*"))) == 3
    with pytest.raises(StoreError, match="out of order"):
        backend.complete_multipart("k", upload_id, [second, first])
    with pytest.raises(ObjectNotFoundError):
        backend.upload_part("other", upload_id, 1, b"x")
    made = backend.complete_multipart("k", upload_id, [first, second])
    assert made.size == 1 + (9 << 20)
    meta, data = backend.get("k")
    assert bytes(data) == b"x" + b"y" * (9 << 20)
    assert (meta.content_type, meta.metadata) == ("a/b", {"m": "1"})
    assert list(tmp_path.rglob("*")) == []
    backend.create_multipart("k2")
    backend.close()
    assert list(tmp_path.rglob("*")) == []


# -- S3 ------------------------------------------------------------------------------------------


def reader(settings: S3Settings, bucket: str, **options: Any) -> ObstoreS3Reader:
    chosen = StoreOptions(**options)
    source = CredentialsSource(settings, unsigned=chosen.unsigned)
    return ObstoreS3Reader(Endpoint.from_settings(settings, bucket), source, chosen)


def test_it_reads_from_s3(servers: Callable[[ServerKind], Server], shared_bucket: Callable[[ServerKind], str]) -> None:
    running, bucket = servers("moto"), shared_bucket("moto")
    with running.open_store(bucket) as store:
        etag = store.put("read by obstore", b"hello").etag
    reads = reader(running.settings, bucket)
    again = pickle.loads(pickle.dumps(reads))

    async def main() -> None:
        for found in (reads, again):
            assert found.usable()
            meta, data = found.get("read by obstore", 1, 3, if_match=etag)
            assert (bytes(data), meta.size, meta.etag) == (b"el", 5, etag)

    asyncio.run(main())
    with pytest.raises(ObjectChangedError):
        reads.get("read by obstore", 1, 3, if_match="another")
    with pytest.raises(ObjectNotFoundError):
        reads.get("nothing there", 0, 3)


def test_ambient_aws_variables_are_not_mixed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore reads them for itself where it is not told otherwise."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "ANOTHER-TOKEN")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ANOTHERKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with recorder(EMPTY) as (url, seen):
        settings = S3Settings(endpoint_url=url, aws_access_key_id="MINE", aws_secret_access_key="S", region="r")
        for unsigned in (False, True):
            with contextlib.suppress(StoreError):
                reader(settings, "bucket", unsigned=unsigned).get("k")
        assert b"Credential=MINE/" in seen[0]
        assert b"ANOTHER" not in seen[0]
        assert b"authorization" not in seen[1].lower()


# -- the process ---------------------------------------------------------------------------------


def test_ctrl_c_ends_a_call() -> None:
    """In the main thread obstore's own sync calls would sit out the whole read timeout."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        code = (
            "from s3loader.config import S3Settings\nfrom s3loader.store import StoreOptions\n"
            "from s3loader.credentials import CredentialsSource\nfrom s3loader.endpoint import Endpoint\n"
            "from s3loader.store.obstore.engine import ObstoreS3Reader\n"
            f"s = S3Settings(endpoint_url='http://127.0.0.1:{silent.getsockname()[1]}', aws_access_key_id='K',"
            " aws_secret_access_key='S')\n"
            "b = ObstoreS3Reader(Endpoint.from_settings(s, 'bucket'), CredentialsSource(s), StoreOptions(read_timeout=300))\n"
            "try:\n    b.get('k')\nexcept KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
        )
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "S3_REGION": "r"})
        try:
            silent.settimeout(60)
            connection, _ = silent.accept()
            with connection:
                assert connection.recv(1)  # the request is on its way
                child.send_signal(signal.SIGINT)
                out, _ = child.communicate(timeout=600)
        finally:
            child.kill()
            child.wait()
        assert out == b"interrupted\n"
        assert child.returncode == 0


def test_keys_obstore_keeps() -> None:
    """`is_plain_key` says yes only where obstore stores the very key."""
    from obstore.store import MemoryStore

    from s3loader.store.arguments import is_plain_key

    kept = 0
    for key in HARD_KEYS:
        if is_plain_key(key):
            memory = MemoryStore()
            memory.put(key, b"x")
            assert [entry["path"] for chunk in memory.list() for entry in chunk] == [key]
            kept += 1
    assert kept
    assert obstore_runtime.usable()
