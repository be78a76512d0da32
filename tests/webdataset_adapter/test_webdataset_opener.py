"""The real WebDataset package reads and writes through our stores, and what is damaged does not come."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import s3loader.webdataset
from s3loader import ManifestWriter, ObjectStore, ShardSizePolicy, s3
from s3loader.errors import ConfigError, IntegrityError, ObjectChangedError, ObjectNotFoundError, S3LoaderError, ShardReadError
from s3loader.shard import build_index
from s3loader.testing import FaultProxy, Rule, Server, server

wds: Any = importlib.import_module("webdataset")  # its names are not seen by type checkers
COUNT = 40
SIZES = (0, 1, 511, 512, 70_000, 1_200_000)


@pytest.fixture(scope="module")
def moto() -> Iterator[Server]:
    with server("moto") as running:
        yield running
    s3.close()


@pytest.fixture
def bucket(moto: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", "/nowhere")  # neither aws nor a shell that would find it
    return moto.bucket()


def sample(number: int) -> dict[str, bytes]:
    return {"bin": bytes([number % 251]) * SIZES[number % len(SIZES)], "cls": b"%d" % number}


def packed(store: ObjectStore, compression: str | None = None, shards: int = 2, **options: Any) -> list[str]:
    policy = ShardSizePolicy(max_samples=COUNT // shards)
    with ManifestWriter(
        store, "m.jsonl", mode="overwrite", shard_size=policy, shard_compression=compression, group="webdataset", **options
    ) as writer:
        for number in range(COUNT):
            writer.add_sample(f"{number:04d}", sample(number))
    return sorted(entry.key for entry in store.list("shards/") if not entry.key.endswith(".idx"))


def read(urls: Any, **options: Any) -> dict[str, dict[str, bytes]]:
    found = {}
    for got in wds.WebDataset(urls, shardshuffle=False, **options):
        found[got["__key__"]] = {name: value for name, value in got.items() if not name.startswith("__")}
    return found


WANTED = {f"{number:04d}": sample(number) for number in range(COUNT)}


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
def test_shards_of_every_kind_are_read(moto: Server, bucket: str, compression: str | None) -> None:
    with moto.open_store(bucket) as store:
        keys = packed(store, compression)
        urls = [f"s3://{bucket}/{key}" for key in keys]
        assert read(urls) == WANTED
        stem = keys[0].partition("0000")[0]
        ending = keys[0].partition(".")[2]
        assert read(f"s3://{bucket}/{stem}{{000001..000002}}.{ending}") == WANTED  # braces
        assert all(s3loader.webdataset.open_tar_stream(store, key).verified for key in keys)
        store.delete_many([f"{key}.idx" for key in keys])
        assert read(urls) == WANTED
        assert not s3loader.webdataset.open_tar_stream(store, keys[0]).verified


def test_pipes_that_copy_are_read_directly_and_others_still_run(moto: Server, bucket: str, tmp_path: Path) -> None:
    with moto.open_store(bucket) as store:
        urls = [f"s3://{bucket}/{key}" for key in packed(store)]
    assert read([f"pipe:aws s3 cp {url} -" for url in urls]) == WANTED  # there is no such command here
    assert read([f"pipe:s5cmd cat '{url}'" for url in urls]) == WANTED
    local = tmp_path / "x.tar"
    local.write_bytes(s3.get(urls[0]))
    assert len(read([f"pipe:/bin/cat {local}"])) == COUNT // 2
    for command in (f"aws s3 cp {urls[0]} - | cat", f"aws s3 cp --recursive {urls[0]} -", f"aws s3 cp {urls[0]} ./x"):
        with pytest.raises((OSError, tarfile.ReadError)):  # run by the shell, which has no aws
            read([f"pipe:{command}"])


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_flipped_bit_of_a_member_is_an_error(moto: Server, bucket: str, compression: str | None) -> None:
    with moto.open_store(bucket) as store:
        key = packed(store, compression, shards=1)[0]
        whole = store.get(key)
        index = store.get(f"{key}.idx")
        for at in range(len(whole) // 7, len(whole) - 2000, len(whole) // 7):
            damaged = bytearray(whole)
            damaged[at] ^= 4
            store.put(key, bytes(damaged))
            store.put(f"{key}.idx", index)
            with pytest.raises(S3LoaderError):
                read(f"s3://{bucket}/{key}")
        store.put(key, whole)
        assert read(f"s3://{bucket}/{key}") == WANTED


def test_the_error_names_the_member_and_stays(moto: Server, bucket: str) -> None:
    with moto.open_store(bucket) as store:
        key = packed(store, shards=1)[0]
        whole = bytearray(store.get(key))
        at = whole.index(b"\x05" * 600_000)  # of sample 0005
        whole[at + 1000] ^= 1
        store.put(key, bytes(whole))
        stream = s3loader.webdataset.gopen(f"s3://{bucket}/{key}")
        assert len(stream.read(at // 2)) == at // 2
        with pytest.raises(IntegrityError, match=r"0005\.bin"):
            stream.read(at - at // 2 + 1)  # its first byte
        with pytest.raises(IntegrityError, match=r"0005\.bin"):
            stream.read(1)
        assert len(read(f"s3://{bucket}/{key}", handler=wds.ignore_and_stop)) <= 5
        s3loader.webdataset.register(verify=False)
        try:
            assert len(read(f"s3://{bucket}/{key}")) == COUNT
        finally:
            s3loader.webdataset.register()


def test_what_was_damaged_on_the_way_is_fetched_again(moto: Server, bucket: str) -> None:
    with moto.open_store(bucket) as store:
        key = packed(store, shards=1)[0]
    with FaultProxy(moto.endpoint_url, [Rule("flip", method="GET", path=r"\.tar$", nth=2, bit=8 * 900_000)]) as proxy:
        s3loader.webdataset.register(endpoint_url=proxy.endpoint_url)
        try:
            assert read(f"s3://{bucket}/{key}") == WANTED
        finally:
            s3loader.webdataset.register()


def test_large_members_keep_their_last_piece_back(moto: Server, bucket: str) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, size in (("a.bin", 17 << 20), ("b.bin", 3)):
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(b"x" * size))
    whole = bytearray(data.getvalue())
    with moto.open_store(bucket) as store:
        store.put("x.tar", bytes(whole))
        build_index(["x.tar"], store=store)
        assert [len(v["bin"]) for v in read(f"s3://{bucket}/x.tar").values()] == [17 << 20, 3]
        whole[1 << 20] ^= 1
        store.put("x.tar", bytes(whole))
        stream = s3loader.webdataset.gopen(f"s3://{bucket}/x.tar")
        with pytest.raises(IntegrityError):
            stream.read()
        with pytest.raises(IntegrityError):
            read(f"s3://{bucket}/x.tar")


def test_an_index_of_another_archive(moto: Server, bucket: str) -> None:
    with moto.open_store(bucket) as store:
        first, second = packed(store, shards=2)
        store.put(f"{first}.idx", store.get(f"{second}.idx"))
        with pytest.raises((ObjectChangedError, IntegrityError, ShardReadError)):
            read(f"s3://{bucket}/{first}")
        store.put(first, store.get(first)[:-4096])
        with pytest.raises((ObjectChangedError, IntegrityError, ShardReadError)):
            read(f"s3://{bucket}/{first}")


def test_shard_writer_writes_and_other_objects_are_bytes(bucket: str) -> None:
    with wds.ShardWriter(f"s3://{bucket}/own-%04d.tar", maxcount=COUNT // 2, verbose=0) as writer:
        for number in range(COUNT):
            writer.write({"__key__": f"{number:04d}", **sample(number)})
    assert read(f"s3://{bucket}/own-{{0000..0001}}.tar") == WANTED
    s3.put(f"s3://{bucket}/x.json", b"{}")
    assert wds.gopen(f"s3://{bucket}/x.json").read() == b"{}"
    with pytest.raises(ObjectNotFoundError):
        read(f"s3://{bucket}/nothing.tar")
    with pytest.raises(ConfigError):
        s3loader.webdataset.gopen(f"s3://{bucket}/x.json", "r")
    with pytest.raises(ConfigError):
        wds.gopen(f"s3://{bucket}")


def test_workers_and_a_cache(moto: Server, bucket: str, tmp_path: Path) -> None:
    with moto.open_store(bucket) as store:
        urls = [f"s3://{bucket}/{key}" for key in packed(store)]
    script = tmp_path / "spawned.py"
    script.write_text(
        "import sys, torch.utils.data, webdataset as wds, s3loader.webdataset\n"
        "if __name__ == '__main__':\n"
        "    dataset = wds.WebDataset(sys.argv[1:], shardshuffle=False)\n"
        "    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context='spawn')\n"
        "    print(len({sample['__key__'] for sample in loader}))\n"
        "    for _ in range(2):  # WebDataset leaves the files of its cache open, so not in this process\n"
        "        print(len(list(wds.WebDataset(sys.argv[1:], shardshuffle=False, cache_dir='.'))))\n"
    )
    command = [sys.executable, str(script), *urls]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == 3 * [str(COUNT)], run.stderr
    memory = f"memory://wds-{uuid.uuid4().hex}/x.tar"
    s3.put(memory, s3.get(urls[0]))
    assert len(read(memory)) == COUNT // 2
