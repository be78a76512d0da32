"""Every request of every engine stands in the op-log exactly once, with its status and the time of its first byte."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import pytest
import trustme

from s3loader import ObjectStore, PutRequest, S3LoaderError, StoreOptions, UnsupportedOperationError, open_store
from s3loader.oplog import OpRecord, finalize_op_log, init_op_log, read_op_log
from s3loader.s3 import create_bucket, delete_bucket, list_buckets
from s3loader.testing import FaultProxy, Rule, Server, server
from s3loader.types import ReadRequest, Update

METHODS = {
    "GET": ("GET",),
    "STAT": ("HEAD", "GET"),
    "PUT": ("PUT",),
    "PUTPART": ("PUT",),
    "COPY": ("PUT",),
    "MULTIPART": ("POST", "DELETE"),
    "DELETE": ("DELETE", "POST"),
    "LIST": ("GET",),
}
"""The HTTP methods that an operation of the log may be."""
DATA = bytes(range(256)) * 40
HTTP = ("direct", "boto3", "client", "gs")


def tried(call: Callable[[], Any]) -> None:
    with contextlib.suppress(S3LoaderError):
        call()


def upload(store: ObjectStore) -> None:
    with store.multipart("big", part_size="5MiB") as out:
        out.write(bytes(6 << 20))


def abort(store: ObjectStore) -> None:
    upload_id = store.backend.create_multipart("left")
    store.backend.upload_part("left", upload_id, 1, DATA)
    list(store.backend.list_multipart())
    list(store.backend.list_parts("left", upload_id))
    store.backend.abort_multipart("left", upload_id)


def read_into(store: ObjectStore) -> None:
    into = bytearray(100)
    store.backend.read_into("k", 50, memoryview(into))
    assert bytes(into) == DATA[50:150]


VERBS: dict[str, Callable[[ObjectStore], Any]] = {
    "get": lambda store: store.get("k"),
    "get_range": lambda store: store.get_range("k", 10, 20),
    "from the end": lambda store: store.backend.get("k", -5),
    "read_into": read_into,
    "get_many": lambda store: list(store.get_many(["k", "l"])),
    "get missing": lambda store: tried(lambda: store.get("missing")),
    "head": lambda store: store.head("k"),
    "head missing": lambda store: tried(lambda: store.head("missing")),
    "tags": lambda store: tried(lambda: store.tags("k")),
    "put": lambda store: store.put("new", DATA),
    "create": lambda store: store.put("new", DATA, mode="create"),
    "taken": lambda store: tried(lambda: store.put("k", DATA, mode="create")),
    "changed": lambda store: tried(lambda: store.put("k", DATA, mode=Update("no"))),
    "put_many": lambda store: list(store.put_many([PutRequest("a", DATA), PutRequest("b", DATA)])),
    "list": lambda store: list(store.list()),
    "list a folder": lambda store: list(store.list("k", delimiter="/")),
    "list nothing": lambda store: list(store.list("nothing-there")),
    "delete": lambda store: store.delete("l"),
    "delete_many": lambda store: store.delete_many(["k", "l"]),
    "copy": lambda store: store.copy("k", "copied"),
    "copy, create": lambda store: tried(lambda: store.copy("k", "copied", mode="create")),
    "multipart": upload,
    "abort": abort,
    "probe": lambda store: store.capabilities(),
}
NOT_THROUGH_GS = ("copy", "copy, create", "tags", "multipart", "abort", "probe", "changed", "from the end")
"""GCS says these otherwise than S3, whose server plays it here."""


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server() as running:
        yield running


@pytest.fixture(scope="module")
def open_to_all() -> Iterator[Server]:
    """It asks nobody for keys, so that it can play GCS to an anonymous client."""
    with server("ministack") as running:
        yield running


@pytest.fixture(scope="module")
def bucket(s3: Server) -> str:
    return s3.bucket()


@pytest.fixture(scope="module")
def gs_bucket(open_to_all: Server) -> str:
    return open_to_all.bucket()


@pytest.fixture
def through(
    s3: Server, open_to_all: Server, bucket: str, gs_bucket: str, request: pytest.FixtureRequest
) -> Iterator[Callable[..., tuple[ObjectStore, FaultProxy]]]:
    with contextlib.ExitStack() as stack:

        def start(engine: str, *rules: Rule) -> tuple[ObjectStore, FaultProxy]:
            running = open_to_all if engine == "gs" else s3
            proxy = stack.enter_context(FaultProxy(running.endpoint_url, rules))
            name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
            root = f"{gs_bucket if engine == 'gs' else bucket}/{name.strip('-')}"
            with running.open_store(root) as plain:
                plain.put("k", DATA)
                plain.put("l", DATA)
            return stack.enter_context(opened(engine, running, root, proxy.endpoint_url)), proxy

        yield start
    finalize_op_log()


def client_of(s3: Server, endpoint_url: str) -> Any:
    config = botocore.config.Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 3, "mode": "standard"})
    keys = {"aws_access_key_id": s3.access_key_id, "aws_secret_access_key": s3.secret_access_key}
    return boto3.client("s3", endpoint_url=endpoint_url, region_name="us-east-1", config=config, **keys)


def opened(engine: str, s3: Server, root: str, endpoint_url: str) -> ObjectStore:
    options = StoreOptions(retry_budget=60)
    if engine == "gs":
        return open_store(f"gs://{root}", endpoint_url=endpoint_url, options=StoreOptions(unsigned=True))
    if engine == "client":
        return open_store(f"s3://{root}", s3_client=client_of(s3, endpoint_url), options=options)
    return s3.open_store(root, engine=engine, endpoint_url=endpoint_url, options=options)


def logged(path: Path, run: Callable[[], Any]) -> list[OpRecord]:
    init_op_log(path, lossless=True)
    run()
    finalize_op_log()
    return list(read_op_log(str(path)))


def check(rows: list[OpRecord], proxy: FaultProxy) -> None:
    seen = proxy.requests
    assert sorted(row.status or 0 for row in rows) == sorted(request.status or 0 for request in seen), (rows, seen)
    left = [request.method for request in seen]
    for row in rows:
        left.remove(next(method for method in METHODS[row.op] if method in left))
        assert row.first_byte is not None, row
        assert row.start <= row.first_byte <= row.end
        assert bool(row.error) == ((row.status or 0) >= 300), row
        assert row.bytes >= 0
    assert not left


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("engine", HTTP)
def test_every_request_once_with_status_and_first_byte(
    engine: str, verb: str, through: Callable[..., tuple[ObjectStore, FaultProxy]], tmp_path: Path
) -> None:
    if engine == "gs" and verb in NOT_THROUGH_GS:
        pytest.skip("S3 and GCS say it differently")
    store, proxy = through(engine)
    rows = logged(tmp_path / "x.tsv.zst", lambda: VERBS[verb](store))
    assert rows
    check(rows, proxy)


@pytest.mark.parametrize("verb", ["get", "head", "put", "list", "delete", "delete_many"])
@pytest.mark.parametrize("engine", HTTP)
def test_what_is_repeated_stands_in_it_each_time(
    engine: str, verb: str, through: Callable[..., tuple[ObjectStore, FaultProxy]], tmp_path: Path
) -> None:
    """By us, and by a client of the user's that repeats by itself."""
    store, proxy = through(engine, Rule("error", status=503, times=2))
    rows = logged(tmp_path / "x.tsv.zst", lambda: VERBS[verb](store))
    check(rows, proxy)
    assert [row.status for row in rows][:2] == [503, 503]
    one_by_one = engine == "gs" and verb == "delete_many"
    assert [row.attempt for row in rows] == ([1, 1, 2, 2] if one_by_one else [1, 2, 3])


@pytest.mark.parametrize("engine", HTTP)
def test_a_body_that_breaks_off(engine: str, through: Callable[..., tuple[ObjectStore, FaultProxy]], tmp_path: Path) -> None:
    store, proxy = through(engine, Rule("truncate", method="GET", at=100, times=1))
    rows = logged(tmp_path / "x.tsv.zst", lambda: store.get("k"))
    assert [bool(row.error) for row in rows] == [True, False]
    assert [row.bytes for row in rows] == [0, len(DATA)]
    assert all(row.first_byte for row in rows)
    assert len(proxy.requests) == 2


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_without_http(scheme: str, verb: str, tmp_path: Path) -> None:
    """No status; the first byte of what was read or listed."""
    root = str(tmp_path / "data") if scheme == "file" else f"memory://{tmp_path.name}"
    with open_store(root) as store:
        store.put("k", DATA)
        store.put("l", DATA)
        rows = logged(tmp_path / "x.tsv.zst", lambda: VERBS[verb](store))
    assert rows
    for row in rows:
        assert row.status is None
        first_known = row.bytes if row.op == "GET" else row.op == "LIST" and row.objects and verb != "abort"
        assert bool(row.first_byte) == bool(first_known and not row.error), row


def test_a_stub_is_no_request_but_an_answer(tmp_path: Path) -> None:
    from botocore.stub import Stubber

    client = boto3.client("s3", region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")
    with Stubber(client) as stub:
        about = {"ResponseMetadata": {"HTTPStatusCode": 200}, "ContentLength": 5, "ETag": '"e"'}
        stub.add_response("head_object", about)
        stub.add_client_error("head_object", "403", http_status_code=403)
        store = open_store("s3://bucket", s3_client=client)
        rows = logged(tmp_path / "x.tsv.zst", lambda: [store.head("k"), tried(lambda: store.head("k"))])
    assert [(row.op, row.status, bool(row.error)) for row in rows] == [("STAT", 200, False), ("STAT", 403, True)]


def test_what_a_client_does_for_others_is_not_ours(s3: Server, bucket: str, tmp_path: Path) -> None:
    client = client_of(s3, s3.endpoint_url)
    store = open_store(f"s3://{bucket}", s3_client=client)
    rows = logged(
        tmp_path / "x.tsv.zst",
        lambda: [store.put("mine", b"1"), client.put_object(Bucket=bucket, Key="other", Body=b"1"), store.delete("mine")],
    )
    assert [(row.op, row.file) for row in rows] == [("PUT", f"{bucket}/mine"), ("DELETE", f"{bucket}/mine")]


def test_reads_that_obstore_does_for_the_direct_engine(s3: Server, bucket: str, tmp_path: Path) -> None:
    """Over TLS, beside a busy main thread."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with (
        FaultProxy(s3.endpoint_url, ssl_context=context) as proxy,
        s3.open_store(f"{bucket}/tls", endpoint_url=proxy.endpoint_url, ca_bundle=tmp_path / "ca.pem") as store,
    ):
        store.put("k", DATA)
        proxy.clear()
        requests = [ReadRequest("k"), ReadRequest("k", 5, 10)]
        rows = logged(tmp_path / "x.tsv.zst", lambda: list(store.read_many(requests, driver="threads")))
        check(rows, proxy)
    assert sorted((row.status, row.bytes) for row in rows) == [(200, len(DATA)), (206, 5)]


def test_buckets(s3: Server, tmp_path: Path) -> None:
    keys: Any = {"access_key_id": s3.access_key_id, "secret_access_key": s3.secret_access_key, "region": "us-east-1"}
    with FaultProxy(s3.endpoint_url) as proxy:
        place = {**keys, "endpoint_url": proxy.endpoint_url}
        rows = logged(
            tmp_path / "x.tsv.zst",
            lambda: [
                create_bucket("s3://of-the-log", **place),
                list_buckets(**place),
                delete_bucket("s3://of-the-log", **place),
                tried(lambda: delete_bucket("s3://of-the-log", **place)),
            ],
        )
        check(rows, proxy)
    assert [row.op for row in rows] == ["STAT", "PUT", "LIST", "DELETE", "DELETE"]


def test_obstore_has_no_tags(through: Callable[..., tuple[ObjectStore, FaultProxy]], tmp_path: Path) -> None:
    store, proxy = through("gs")

    def ask() -> None:
        with pytest.raises(UnsupportedOperationError):
            store.tags("k")

    assert logged(tmp_path / "x.tsv.zst", ask) == []
    assert not proxy.requests
