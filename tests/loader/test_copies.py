"""A dataset is its content: copies made by any tool are read as the original, whatever ETags the new store gives."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s3loader.checkpoint import CheckpointManager
from s3loader.errors import IntegrityError, ObjectChangedError, S3LoaderError, ShardReadError, TruncatedError
from s3loader.exchange import S3ExchangeStore, ShardSizePolicy
from s3loader.loader import Loader, from_manifest, open_dataset
from s3loader.shard import build_index
from s3loader.store import ObjectStore, open_store
from s3loader.testing import Server, find_rclone, server

SAMPLES = 24


def pack(root: Path) -> None:
    """Plain and zstd shards, loose objects and a checkpoint, as people write them into a folder."""
    store = S3ExchangeStore(str(root))
    for name, compression in (("plain", None), ("packed", "zstd")):
        with store.open_manifest_writer(
            f"{name}.jsonl",
            shard_size=ShardSizePolicy(max_entries=8),
            shard_prefix=f"shards/{name}",
            shard_compression=compression,
        ) as writer:
            for i in range(SAMPLES):
                writer.add_to_shard(f"{i:03d}.txt", b"text %d" % i * (1 + 40 * i))
    with store.open_manifest_writer("loose.jsonl", mode="overwrite") as writer:
        for i in range(SAMPLES):
            writer.put_object(f"loose/{i:03d}.bin", b"%d" % i * i)
    with CheckpointManager(str(root / "run")) as manager:
        manager.save(3, {"w": np.arange(5000.0), "step": 3})


def samples(dataset: Any) -> list[bytes]:
    return [bytes(sample) for batch in Loader(dataset, batch_size=5, shuffle="none") for sample in batch]


EXPECTED = {
    **{name: [b"text %d" % i * (1 + 40 * i) for i in range(SAMPLES)] for name in ("plain", "packed")},
    "loose": [b"%d" % i * i for i in range(SAMPLES)],
}


def check_all(store: ObjectStore, states: dict[str, Any], *, moved: bool) -> None:
    exchange = S3ExchangeStore(store)
    for name, expected in EXPECTED.items():
        dataset = from_manifest(f"{name}.jsonl", store=store)
        assert samples(dataset) == expected
        assert [body.read() for body, _ in exchange.iter_objects(f"{name}.jsonl")] == expected
        loader = Loader(dataset, batch_size=5, shuffle="block", seed=1)
        notes = [note for note in loader.explain().notes if "ETag" in note]
        assert len(notes) == moved
        loader.load_state_dict(states[name]["state"])
        rest = [bytes(sample) for batch in loader for sample in batch]
        assert rest == states[name]["rest"]
    grouped = from_manifest("plain.jsonl", store=store, group="webdataset")
    assert [bytes(s["txt"]) for b in Loader(grouped, batch_size=5, shuffle="none") for s in b] == EXPECTED["plain"]
    key = next(entry for entry in exchange.iter_manifest_entries("packed.jsonl") if entry["kind"] == "shard")["archive_key"]
    assert exchange.get_object(f"{key}#003.txt").read() == EXPECTED["packed"][3]
    target = {"w": np.zeros(5000), "step": 0}
    with CheckpointManager(store_at(store, "run")) as manager:
        restored = manager.restore(target=target)
    np.testing.assert_array_equal(restored["w"], np.arange(5000.0))


def store_at(store: ObjectStore, folder: str) -> ObjectStore:
    return open_store(f"{store.url}/{folder}", **ARGUMENTS.get(store.url, {}))


ARGUMENTS: dict[str, dict[str, Any]] = {}


def opened(s3: Server, bucket: str) -> ObjectStore:
    arguments = {
        "endpoint_url": s3.endpoint_url,
        "region": s3.region,
        "access_key_id": s3.access_key_id,
        "secret_access_key": s3.secret_access_key,
    }
    store = open_store(f"s3://{bucket}", **arguments)
    ARGUMENTS[store.url] = arguments
    return store


def first_half(store: ObjectStore) -> dict[str, Any]:
    """A state in the middle of an epoch of each dataset, and what comes after it."""
    states = {}
    for name in EXPECTED:
        loader = Loader(from_manifest(f"{name}.jsonl", store=store), batch_size=5, shuffle="block", seed=1)
        batches = iter(loader)
        next(batches)
        state = loader.state_dict()
        states[name] = {"state": state, "rest": [bytes(sample) for batch in batches for sample in batch]}
    return states


@pytest.fixture(scope="module")
def two_servers() -> Iterator[tuple[Server, Server]]:
    with server("moto") as moto, server("rclone") as rclone:
        yield moto, rclone


def rclone_copy(source: str, target: str, **remotes: Server) -> None:
    environment = {**os.environ, "RCLONE_CONFIG": "/dev/null"}
    for name, s3 in remotes.items():
        settings = {"type": "s3", "provider": "Other", "endpoint": s3.endpoint_url, "force_path_style": "true"}
        settings |= {"access_key_id": s3.access_key_id, "secret_access_key": s3.secret_access_key, "region": s3.region}
        environment |= {f"RCLONE_CONFIG_{name}_{key}".upper(): value for key, value in settings.items()}
    subprocess.run([find_rclone(), "copy", "--retries", "2", source, target], env=environment, check=True, timeout=600)


def test_file_to_moto_to_rclone_and_back_to_a_file(tmp_path: Path, two_servers: tuple[Server, Server]) -> None:
    moto, rclone = two_servers
    origin = tmp_path / "origin"
    origin.mkdir()
    pack(origin)
    states = first_half(open_store(str(origin)))
    check_all(open_store(str(origin)), states, moved=False)

    subprocess.run(["cp", "-r", str(origin), str(tmp_path / "copied")], check=True)
    check_all(open_store(str(tmp_path / "copied")), states, moved=True)

    bucket, client = moto.bucket(), moto.client()
    for path in sorted(origin.rglob("*")):
        if path.is_file() and not path.name.startswith(".s3loader-"):
            client.upload_file(str(path), bucket, str(path.relative_to(origin)))
    client.close()
    check_all(opened(moto, bucket), states, moved=True)

    other = rclone.bucket()
    rclone_copy(f"one:{bucket}", f"two:{other}", one=moto, two=rclone)
    check_all(opened(rclone, other), states, moved=True)

    rclone_copy(f"two:{other}", str(tmp_path / "back"), two=rclone)
    check_all(open_store(str(tmp_path / "back")), states, moved=True)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A packed folder that was copied by cp -r."""
    (tmp_path / "origin").mkdir()
    pack(tmp_path / "origin")
    shutil.copytree(tmp_path / "origin", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("name", ["plain", "packed", "loose"])
@pytest.mark.parametrize("verify", [True, False])
def test_what_is_replaced_while_it_is_read_is_an_error(copied: Path, name: str, verify: bool) -> None:
    store = open_store(str(copied))
    dataset = from_manifest(f"{name}.jsonl", store=store)
    for key in [meta.key for meta in store.list(f"shards/{name}/")] if name != "loose" else ["loose/020.bin"]:
        store.put(key, store.get(key))  # the same bytes: another version all the same
    with pytest.raises(ObjectChangedError):
        for _ in Loader(dataset, batch_size=5, shuffle="none", verify=verify):
            pass


@pytest.mark.parametrize("change", [b"", b"x", b"x" * 100, None])
def test_a_loose_object_of_another_size_is_an_error_everywhere(copied: Path, change: bytes | None) -> None:
    """Too long as well as too short, also one that should be empty; an object that is gone says so."""
    store = open_store(str(copied))
    for number in (0, 7):
        key = f"loose/{number:03d}.bin"
        kept = store.get(key)
        if change == kept:
            continue
        store.put(key, change) if change is not None else store.delete(key)
        with pytest.raises(S3LoaderError) as caught:
            samples(from_manifest("loose.jsonl", store=store))
        with pytest.raises(S3LoaderError) as also:
            list(S3ExchangeStore(store).iter_objects("loose.jsonl"))
        if change is not None:
            kind = TruncatedError if len(change) < len(kept) else IntegrityError
            assert (type(caught.value), type(also.value)) == (kind, kind)
            assert f"has {len(change)} bytes" in str(caught.value)
            assert f"has {len(change)} bytes" in str(also.value)
        skipping = Loader(from_manifest("loose.jsonl", store=store), batch_size=5, shuffle="none", on_error="skip")
        assert [bytes(s) for b in skipping for s in b] == [e for i, e in enumerate(EXPECTED["loose"]) if i != number]
        store.put(key, kept)


def test_an_object_that_grows_after_the_dataset_was_opened_is_an_error(copied: Path) -> None:
    dataset = from_manifest("loose.jsonl", store=open_store(str(copied)))
    with open(copied / "loose" / "012.bin", "ab") as file:
        file.write(b"more")
    with pytest.raises((ObjectChangedError, IntegrityError)):
        samples(dataset)


def test_a_damaged_copy_is_an_error(copied: Path) -> None:
    store = open_store(str(copied))
    key = next(meta.key for meta in store.list("shards/plain/") if meta.key.endswith(".tar"))
    data = bytearray(store.get(key))
    data[data.index(b"text 5text 5")] ^= 1
    store.put(key, bytes(data))
    with pytest.raises(IntegrityError, match="CRC32C"):
        samples(from_manifest("plain.jsonl", store=store))
    store.put(key, bytes(data[:-512]))
    with pytest.raises(TruncatedError):
        samples(from_manifest("plain.jsonl", store=store))
    with pytest.raises(IntegrityError):
        list(S3ExchangeStore(store).iter_objects("plain.jsonl"))


def foreign_tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


FIRST = {f"{i}.txt": b"%d" % i * 50 for i in range(9)}
REPLACED = {
    "other contents": {name: b"n" + data[1:] for name, data in FIRST.items()},
    "other order": dict(reversed(FIRST.items())),
    "more": FIRST | {f"x{i}.txt": b"x" * 3000 for i in range(9)},
    "fewer": {"0.txt": b"new"},
}


@pytest.mark.parametrize("group", [None, "webdataset"])
@pytest.mark.parametrize("kept", ["beside", "index_dir"])
@pytest.mark.parametrize("new", REPLACED)
def test_the_automatic_index_of_a_replaced_tar_is_made_again(
    tmp_path: Path, new: str, kept: str, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    store = open_store(str(tmp_path / "data"))
    if kept == "index_dir":
        monkeypatch.setattr("s3loader.loader.catalog.build_index", refuse)
    options: dict[str, Any] = {"store": store, "group": group, "index_dir": str(tmp_path / "indexes")}
    read: Callable[[], list[Any]] = lambda: [  # noqa: E731
        bytes(s["txt"] if group else s)
        for b in Loader(open_dataset("a.tar", **options), batch_size=4, shuffle="none")
        for s in b
    ]
    store.put("a.tar", foreign_tar(FIRST))
    assert read() == list(FIRST.values())
    store.put("a.tar", foreign_tar(REPLACED[new]))
    assert read() == list(REPLACED[new].values())
    assert (tmp_path / "data" / "a.tar.idx").exists() == (kept == "beside")


def refuse(keys: Any, **_options: Any) -> Any:
    """As `build_index` does where the store may not be written to."""
    from s3loader.errors import AccessDeniedError
    from s3loader.shard import BuiltIndex

    return [BuiltIndex(key, "failed", error=AccessDeniedError("read-only")) for key in keys]


def written(found: os.stat_result) -> list[Any]:
    """All that changes with a file, to the nanosecond, but when it was last read."""
    return [
        getattr(found, name)
        for name in ("st_mode", "st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_ctime_ns")
    ]


def test_a_copy_of_foreign_tars_with_their_indexes_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes(foreign_tar(FIRST))
    build_index(str(tmp_path / "data" / "a.tar"))
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    before = written((tmp_path / "copy" / "a.tar.idx").stat())
    dataset = open_dataset(str(tmp_path / "copy" / "a.tar"))
    assert samples(dataset) == list(FIRST.values())
    assert written((tmp_path / "copy" / "a.tar.idx").stat()) == before
    assert any("ETag" in note for note in Loader(dataset, batch_size=1).explain().notes)
    assert S3ExchangeStore(str(tmp_path / "copy")).get_object("a.tar#3.txt").read() == FIRST["3.txt"]


def test_a_damaged_automatic_index_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(foreign_tar(FIRST))
    build_index(str(tmp_path / "a.tar"))
    path = tmp_path / "a.tar.idx"
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardReadError, match="checksum"):
        samples_of_raw_index(path)
    assert samples(open_dataset(str(tmp_path / "a.tar"), group=None)) == list(FIRST.values())


def samples_of_raw_index(path: Path) -> None:
    from s3loader.shard import ShardIndex

    ShardIndex.from_bytes(path.read_bytes())
