"""Mistakes in what is passed in: each is a typed error that says where, and how to do it right."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme

from s3loader import MissingPlaceholderError
from s3loader import errors as e
from s3loader.exchange import Manifest, S3ExchangeStore, Shard, ShardSizePolicy, WriterClosedError, WriterStateError
from s3loader.store import ObjectStore, StoreOptions, open_store

ROOT = "memory://misuse"
OPENED = {"region": "us-east-1", "access_key_id": "id", "secret_access_key": "secret"}


class Case(NamedTuple):
    call: Callable[[S3ExchangeStore, ObjectStore], Any]
    error: type[e.S3LoaderError]
    hint: str
    """Part of it."""
    url: str | None = None


def item(path: Any = "a", source: Any = b"") -> dict[str, Any]:
    return {"member_path": path, "source": source}


def packed(items: Any, **options: Any) -> Callable[[S3ExchangeStore, ObjectStore], Any]:
    return lambda x, o: x.put_shard_archive("new.tar", items, **options)


def archived(items: Any, **options: Any) -> Callable[[S3ExchangeStore, ObjectStore], Any]:
    return lambda x, o: Shard.create_archive(items, "new.tar", **options)


def writer(work: Callable[[Any], Any] = lambda w: None, **options: Any) -> Callable[[S3ExchangeStore, ObjectStore], Any]:
    return lambda x, o: work(x.open_manifest_writer("w.jsonl", **options))


def after_close(made: Any, use: Callable[[Any], Any]) -> Any:
    made.close()
    return use(made)


SOME = ShardSizePolicy(max_entries=3)
CASES: dict[str, Case] = {
    "items: None": Case(packed(None), e.ConfigError, "member_path"),
    "items: text": Case(packed("abc"), e.ConfigError, "member_path"),
    "items: one": Case(packed(item()), e.ConfigError, "member_path"),
    "items: of None": Case(packed([None]), e.ConfigError, "member_path"),
    "items: empty": Case(packed([{}]), e.ConfigError, "member_path"),
    "items: no source": Case(packed([{"member_path": "a"}]), e.ConfigError, "source"),
    "items: source None": Case(packed([item(source=None)]), e.ConfigError, "path of a local file"),
    "items: path of int": Case(packed([item(path=3)]), e.ConfigError, "as text"),
    "items: path upwards": Case(packed([item(path="../a")]), e.ConfigError, "relative path"),
    "items: no such file": Case(packed([item(source="/no/such")]), e.SourceNotFoundError, "check the path"),
    "items: format": Case(packed([], format="zip"), e.ConfigError, '"tar"'),
    "items: compression": Case(packed([], compression="rar"), e.ConfigError, "gzip"),
    "shard key: None": Case(lambda x, o: x.put_shard_archive(None, []), e.ConfigError, "non-empty str"),  # type: ignore[arg-type]
    "archive: None": Case(archived(None), e.ConfigError, "member_path"),
    "archive: of None": Case(archived([None]), e.ConfigError, "member_path"),
    "archive: no source": Case(archived([{"member_path": "a"}]), e.ConfigError, "source"),
    "archive: source None": Case(archived([item(source=None)]), e.ConfigError, "path of a local file"),
    "archive: source int": Case(archived([item(source=3)]), e.ConfigError, "path of a local file"),
    "archive: no such file": Case(archived([item(source="/no/such")]), e.SourceNotFoundError, "check the path"),
    "archive: a folder": Case(archived([item(source="/")]), e.ConfigError, "one file"),
    "manifest key: None": Case(lambda x, o: x.write_manifest(None, []), e.ConfigError, "non-empty str"),  # type: ignore[arg-type]
    "append key: None": Case(
        lambda x, o: x.write_manifest(None, [{"kind": "manifest_ref", "key": "k"}], mode="append_parts"),  # type: ignore[arg-type]
        e.ConfigError,
        "non-empty str",
    ),
    "manifest mode": Case(lambda x, o: x.write_manifest("m", [], mode="x"), e.ConfigError, "append_parts"),  # type: ignore[arg-type]
    "entries: None": Case(lambda x, o: x.write_manifest("m", None), e.ConfigError, "list of entries"),  # type: ignore[arg-type]
    "entries: of None": Case(lambda x, o: x.write_manifest("m", [None]), e.InvalidManifestError, "kind"),  # type: ignore[list-item]
    "compact: to None": Case(lambda x, o: x.compact_manifest("m.jsonl", None), e.ConfigError, "non-empty str"),  # type: ignore[arg-type]
    "delete: None": Case(lambda x, o: x.delete_manifest(None), e.ConfigError, "list of entries"),  # type: ignore[arg-type]
    "delete: a member": Case(lambda x, o: x.delete_key("a.tar#x"), e.ConfigError, "rewrite the shard"),
    "delete: everything": Case(lambda x, o: x.delete_prefix(""), e.ConfigError, "allow_all"),
    "delete: bad pattern": Case(lambda x, o: x.delete_prefix("x", regex="("), e.ConfigError, "re.escape"),
    "iterate: None": Case(lambda x, o: list(x.iter_objects(None)), e.ConfigError, "list of entries"),  # type: ignore[arg-type]
    "keys: None": Case(lambda x, o: list(x.iter_objects_from_keys(None)), e.ConfigError, "list of keys"),  # type: ignore[arg-type]
    "keys: on_missing": Case(lambda x, o: x.iter_objects_from_keys(["k"], on_missing="x"), e.ConfigError, ".missing"),  # type: ignore[arg-type]
    "download: nowhere": Case(lambda x, o: x.download_objects(["k"], 3), e.ConfigError, "path of a folder"),  # type: ignore[arg-type]
    "template": Case(lambda x, o: x.resolve_key("{run}/a"), MissingPlaceholderError, "scope(run=...)"),
    "no manifest": Case(lambda x, o: Manifest(x), e.ConfigError, "list of entries"),
    "missing manifest": Case(
        lambda x, o: list(x.get_manifest("no.jsonl")), e.ObjectNotFoundError, "check the key", f"{ROOT}/no.jsonl"
    ),
    "missing member": Case(
        lambda x, o: x.get_object("a.tar#no").read(), e.ObjectNotFoundError, "no such member", f"{ROOT}/a.tar"
    ),
    "writer: key": Case(lambda x, o: x.open_manifest_writer(None), e.ConfigError, "non-empty str"),  # type: ignore[arg-type]
    "writer: numbers": Case(writer(part_max_entries="5"), e.ConfigError, "leave it out"),
    "writer: publish": Case(writer(publish="create"), e.ConfigError, 'mode="overwrite"'),
    "writer: shard_size": Case(writer(shard_size=5), e.ConfigError, "ShardSizePolicy("),
    "writer: no shard_size": Case(writer(lambda w: w.add_to_shard("a", b"")), WriterStateError, "shard_size="),
    "writer: item": Case(writer(lambda w: w.add_shard_item({}), shard_size=SOME), e.ConfigError, "member_path"),
    "writer: object key": Case(writer(lambda w: w.put_object("", b"")), e.ConfigError, "non-empty str"),
    "writer: file key": Case(writer(lambda w: w.add_file(None)), e.ConfigError, "non-empty str"),
    "writer: closed": Case(
        writer(lambda w: after_close(w, lambda w: w.add_file("k"))), WriterClosedError, "closed", f"{ROOT}/w.jsonl"
    ),
    "policy: nothing": Case(lambda x, o: ShardSizePolicy(), e.ConfigError, "ShardSizePolicy("),
    "policy: text": Case(lambda x, o: ShardSizePolicy(max_entries="x"), e.ConfigError, "whole number"),  # type: ignore[arg-type]
    "get: None": Case(lambda x, o: x.get_object(None), e.ConfigError, "non-empty str"),  # type: ignore[arg-type]
    "get: missing": Case(lambda x, o: o.get("no"), e.ObjectNotFoundError, "check the key", f"{ROOT}/no"),
    "get: version": Case(lambda x, o: o.get("k", version_id="3"), e.UnsupportedOperationError, "version_id", f"{ROOT}/k"),
    "range: backwards": Case(lambda x, o: o.get_range("k", 5, 3), e.ConfigError, "start <= end"),
    "range: text": Case(lambda x, o: o.get_range("k", "a", 3), e.ConfigError, "start <= end"),  # type: ignore[arg-type]
    "range: beyond": Case(lambda x, o: o.get_range("k", 50, 60), e.RangeError, "head(key).size", f"{ROOT}/k"),
    "read_into: start": Case(lambda x, o: o.read_into("k", -3, bytearray(3)), e.ConfigError, "first byte"),
    "read_into: constant": Case(lambda x, o: o.read_into("k", 0, b"xxx"), e.ConfigError, "bytearray"),
    "list: None": Case(lambda x, o: o.list(None), e.ConfigError, "leave it out"),  # type: ignore[arg-type]
    "bulk: keys": Case(lambda x, o: list(o.read_many(["k"])), e.ConfigError, "get_many"),  # type: ignore[list-item]
    "bulk: concurrency": Case(lambda x, o: o.read_many([], concurrency=0), e.ConfigError, "StoreOptions"),
    "bulk: errors": Case(lambda x, o: o.read_many([], errors="x"), e.ConfigError, '"return"'),  # type: ignore[call-overload]
    "bulk: puts": Case(lambda x, o: list(o.put_many([3])), e.ConfigError, "PutRequest("),  # type: ignore[list-item]
    "multipart: part": Case(lambda x, o: o.multipart("k", part_size=0), e.ConfigError, "StoreOptions"),
    "multipart: reserve": Case(lambda x, o: o.multipart("k").reserve(0), e.ConfigError, "as many bytes"),
    "multipart: commit": Case(lambda x, o: o.multipart("k").commit(5), e.ConfigError, "reserve()"),
    "multipart: closed": Case(
        lambda x, o: after_close(o.multipart("p"), lambda w: w.write(b"x")), e.ClosedError, "closed", f"{ROOT}/p"
    ),
    "body: closed": Case(lambda x, o: after_close(x.get_object("k"), lambda b: b.read()), e.ClosedError, "open the object"),
    "file: position": Case(lambda x, o: o.open("k").seek(-1), e.RangeError, "begin at 0", f"{ROOT}/k"),
    "store: closed": Case(lambda x, o: after_close(open_store(ROOT), lambda o: o.get("k")), e.ClosedError, "open_store", ROOT),
    "options: attempts": Case(lambda x, o: StoreOptions(max_attempts=0), e.ConfigError, "default"),
    "options: timeout": Case(lambda x, o: StoreOptions(read_timeout=0), e.ConfigError, "default"),
    "options: rate": Case(lambda x, o: StoreOptions(max_requests_per_second=0), e.ConfigError, "no limit"),
    "open: None": Case(lambda x, o: open_store(None), e.ConfigError, "s3://bucket/prefix"),
    "open: options": Case(lambda x, o: open_store(ROOT, options={"max_attempts": 3}), e.ConfigError, "StoreOptions("),  # type: ignore[arg-type]
    "open: client": Case(lambda x, o: open_store("s3://b", s3_client=3), e.ConfigError, "boto3.client"),
    "open: scheme": Case(lambda x, o: open_store("ftp://x"), e.ConfigError, "s3://"),
}


@pytest.fixture
def exchange() -> S3ExchangeStore:
    exchange = S3ExchangeStore(ROOT)
    exchange.put_object("k", b"0123456789")
    exchange.write_manifest("m.jsonl", [])
    exchange.put_shard_archive("a.tar", [item("x", b"x")], compression=None)
    return exchange


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_a_typed_error_with_a_place_and_a_hint(exchange: S3ExchangeStore, name: str) -> None:
    case = CASES[name]
    before = {entry.key: entry.etag for entry in exchange.objects.list()}
    with pytest.raises(case.error) as caught:
        case.call(exchange, exchange.objects)
    assert case.hint in str(caught.value.hint)
    assert (caught.value.url or "").rstrip("/") == (case.url or "")
    assert str(caught.value).endswith(f"hint: {caught.value.hint}")
    if "closed" not in name:
        assert {entry.key: entry.etag for entry in exchange.objects.list()} == before


@pytest.fixture(params=["http", "https"])
def endpoint(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """``(what it speaks, its URL in the other scheme)``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                try:
                    if request.param == "https":
                        client = context.wrap_socket(client, server_side=True)
                    client.recv(65536)
                    client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                except OSError:
                    pass
                finally:
                    client.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        other = "http" if request.param == "https" else "https"
        yield request.param, f"{other}://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(600)


@pytest.mark.parametrize("engine", ["direct", "boto3"])
def test_http_for_https_and_the_reverse_are_named_by_every_engine(
    endpoint: tuple[str, str], engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoken, url = endpoint
    options = StoreOptions(max_attempts=1, read_timeout=300)
    with open_store("s3://b", engine=engine, endpoint_url=url, options=options, **OPENED) as store:  # type: ignore[arg-type]
        calls: dict[str, Callable[[], Any]] = {
            "s3://b/k": lambda: store.get("k"),
            "s3://b/p": lambda: store.put("p", b"x"),
            "s3://b": lambda: list(store.list()),
            "s3://b/m": lambda: list(store.get_many(["m"])),
        }
        for where, call in calls.items():
            with pytest.raises(e.StoreConnectionError) as caught:
                call()
            assert caught.value.url == where
            expected = (
                "if it is plain http, write http://" if spoken == "http" else "is it http or https that the endpoint speaks"
            )
            assert expected in str(caught.value.hint)
            assert ("TLS failed" in caught.value.message) == (spoken == "http")
