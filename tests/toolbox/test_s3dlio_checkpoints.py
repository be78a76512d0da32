"""s3dlio's checkpoints: whole or not at all, the newest is the one saved last, and the files are those of s3dlio 0.10."""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from pathlib import Path

import pytest

from s3loader import s3 as ours
from s3loader.checksum import crc32c
from s3loader.compat import s3dlio as s3
from s3loader.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    FormatError,
    IncompleteCheckpointError,
    IntegrityError,
    StoreError,
)

FIXTURE = Path(__file__).with_name("s3dlio-0.10-checkpoints")
"""What s3dlio 0.10.0 wrote: step 10 plain, step 12 with zstd, step 7 of two ranks."""

PLACES = pytest.mark.parametrize("place", ["memory", "file", "moto", "ministack", "rclone"], indirect=True)


def keys(place: str, folder: str = "") -> list[str]:
    return [url.removeprefix(f"{place}/") for url in ours.list(f"{place}/{folder}", recursive=True)]


@PLACES
@pytest.mark.filterwarnings("ignore:.*conditional writes:RuntimeWarning")
def test_saved_listed_loaded_and_deleted(place: str) -> None:
    store = s3.PyCheckpointStore(f"{place}/run")
    assert store.load_latest() is None
    assert store.list_checkpoints() == []
    assert s3.load_checkpoint(f"{place}/run/") is None
    first = store.save(10, 1, "torch", b"ten", {"lr": 0.1})
    assert store.save(5, 1, "torch", memoryview(b"five")) > ""
    assert store.load_latest() == b"five"  # saved last
    assert store.save(10, 2, "torch", b"ten again") != first
    assert s3.load_checkpoint(f"{place}/run") == b"ten again"
    assert [(info.step, info.epoch, info.total_size) for info in store.list_checkpoints()] == [
        (5, 1, 4),
        (10, 1, 3),
        (10, 2, 9),
    ]
    info = store.list_checkpoints()[0]
    assert (info.framework, info.world_size, info.status, info.is_complete, info.is_single_rank) == (
        "torch",
        1,
        "complete",
        True,
        True,
    )
    assert info.size_mb * 1024 == info.size_gb * (1 << 20) == 4 / 1024
    manifest = store.reader().load_latest_manifest()
    assert manifest is not None
    assert json.loads(ours.get(f"{place}/run/latest.json"))["global_step"] == manifest["global_step"] == 10
    assert json.loads(ours.get(f"{place}/run/{first}"))["user_meta"] == {"lr": 0.1}
    assert store.delete_checkpoint(99) is False
    assert store.delete_checkpoint(10) is True
    assert store.load_latest() == b"five"
    assert json.loads(ours.get(f"{place}/run/latest.json"))["global_step"] == 5
    assert len(keys(place, "run/")) == 3
    assert store.delete_checkpoint(5) is True
    assert keys(place, "run/") == []


@PLACES
@pytest.mark.filterwarnings("ignore:.*conditional writes:RuntimeWarning")
@pytest.mark.parametrize("level", [None, 3])
def test_ranks_make_one_checkpoint(place: str, level: int | None) -> None:
    uri = f"{place}/ranks"
    store = s3.PyCheckpointStore(uri, "round_robin", compression_level=level)
    metas = [store.writer(3, rank).save_distributed_shard(4, 0, "jax", bytes([rank]) * 1000) for rank in range(2)]
    stream = store.writer(3, 2).get_distributed_shard_stream(4, 0, "jax")
    for _ in range(4):
        stream.write_chunk(bytearray(b"\2" * 250))
    assert stream.bytes_written() == 1000
    with pytest.raises(IncompleteCheckpointError, match="ranks"):
        s3.finalize_distributed_checkpoint(uri, 4, 0, "jax", metas, 3, 0)
    metas.append(stream.finalize())
    with pytest.raises(ConfigError, match="step"):
        s3.finalize_distributed_checkpoint(uri, 5, 0, "jax", metas, 3, 0)
    assert store.list_checkpoints() == []  # nothing yet
    key = s3.finalize_distributed_checkpoint(uri, 4, 0, "jax", iter(metas), 3, 0, {"by": "rank 0"})
    manifest = store.reader().load_latest_manifest()
    assert manifest is not None
    assert ours.exists(f"{uri}/{key}")
    assert [store.reader().read_shard_by_rank(manifest, rank) for rank in range(3)] == [bytes([r]) * 1000 for r in range(3)]
    with pytest.raises(CheckpointError, match="3 ranks"):
        store.load_latest()
    with pytest.raises(CheckpointError, match="rank 3"):
        store.reader().read_shard_by_rank(manifest, 3)
    ours.delete(f"{uri}/{metas[1]['key']}")
    with pytest.raises(IncompleteCheckpointError, match="rank 1"):
        store.writer(3, 0).finalize_distributed_checkpoint(4, 0, "jax", metas)
    with pytest.raises(IncompleteCheckpointError, match="rank 1"):
        store.reader().read_shard_by_rank(manifest, 1)


def test_a_save_that_dies_leaves_the_checkpoint_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of its writes: what is found afterwards is the old one, or the new one whole."""
    for last in range(5):
        uri = f"memory://dies-{last}/run"
        store = s3.PyCheckpointStore(uri)
        store.save(1, 0, "f", b"old")
        inner, left = store._folder.store.put, [last]

        def put(*args: object, inner=inner, left=left, **options: object) -> object:
            if not left[0]:
                raise StoreError("the process ends here")
            left[0] -= 1
            return inner(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(store._folder.store, "put", put)
            with contextlib.suppress(StoreError):
                store.save(2, 0, "f", b"new")
        found = s3.load_checkpoint(uri)
        assert found == (b"old" if last < 2 else b"new")
        assert s3.PyCheckpointStore(uri).save(3, 0, "f", b"next") > ""
        assert s3.load_checkpoint(uri) == b"next"


def test_a_late_finisher_does_not_take_latest_back() -> None:
    store = s3.PyCheckpointStore("memory://late/run")
    store.save(1, 0, "f", b"1")
    names = store._folder.names()
    store.save(2, 0, "f", b"2")
    store._folder.point_to(names[0])  # as one does whose last write was held up
    assert json.loads(ours.get("memory://late/run/latest.json"))["global_step"] == 2


def test_every_flipped_byte_of_a_shard_is_noticed() -> None:
    for level in (None, 3):
        uri = f"memory://flipped-{level}/run"
        store = s3.PyCheckpointStore(uri, None, None, level)
        store.save(1, 0, "f", b"all of this is checked" * 3)
        (shard,) = [url for url in ours.list(uri, recursive=True) if "/shards/" in url]
        whole = ours.get(shard)
        for at in range(len(whole)):
            ours.put(shard, whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            try:
                assert store.load_latest() == b"all of this is checked" * 3
                assert level is not None  # bits of a frame that mean nothing
            except IntegrityError:
                continue
        ours.put(shard, whole[:-1])
        with pytest.raises(IntegrityError):
            s3.load_checkpoint_with_validation(shard)
        assert s3.load_checkpoint_with_validation(shard, validate_integrity=False) == whole[:-1]


def test_one_shard_by_its_uri() -> None:
    uri = "memory://by-uri/run"
    s3.save_checkpoint(uri, 3, 0, "f", b"three")
    (shard,) = [url for url in ours.list(uri, recursive=True) if "/shards/" in url]
    assert s3.load_checkpoint_with_validation(shard) == s3.load_checkpoint_with_validation(uri) == b"three"
    ours.put(f"{uri}/shards/x/rank-0.bin", b"of no checkpoint")
    with pytest.raises(CheckpointNotFoundError):
        s3.load_checkpoint_with_validation(f"{uri}/shards/x/rank-0.bin")
    with pytest.raises(CheckpointNotFoundError):
        s3.load_checkpoint_with_validation("memory://by-uri/none")


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"shards": []},
        {"shards": "x"},
        {"world_size": 2},
        {"shards": [{"rank": 0, "key": "../../other", "size": 1}]},
        {"shards": [{"rank": 0, "key": "shards/../../x", "size": 1}]},
        {"shards": [{"rank": 0, "key": "shards/a", "size": -1}]},
        {"global_step": "7"},
    ],
)
def test_a_manifest_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    uri = "memory://refused/run"
    store = s3.PyCheckpointStore(uri)
    key = store.save(7, 0, "f", b"x")
    ours.put(f"{uri}/{key}", json.dumps({**json.loads(ours.get(f"{uri}/{key}")), **change}).encode())
    for refused in (store.load_latest, store.list_checkpoints, lambda: store.delete_checkpoint(7)):
        with pytest.raises((FormatError, IncompleteCheckpointError)):
            refused()
    ours.put(f"{uri}/{key}", b"{")
    with pytest.raises(FormatError):
        store.load_latest()


def test_arguments_are_checked() -> None:
    store = s3.PyCheckpointStore("memory://arguments/run")
    for wrong in (
        lambda: store.save(-1, 0, "f", b""),
        lambda: store.save(1, "0", "f", b""),
        lambda: store.save(1, 0, "f", b"", {"x": object()}),
        lambda: store.writer(2, 2),
        lambda: s3.PyCheckpointStore("memory://arguments/run", "spread"),
        lambda: store.writer(1, 0).finalize_distributed_checkpoint(1, 0, "f", ["shards/x"]),
    ):
        with pytest.raises(ConfigError):
            wrong()
    assert store.list_checkpoints() == []


def test_what_s3dlio_wrote_is_read() -> None:
    store = s3.PyCheckpointStore(str(FIXTURE))
    assert [(info.step, info.world_size, info.is_complete) for info in store.list_checkpoints()] == [
        (7, 2, True),
        (10, 1, True),
        (12, 1, True),
    ]
    manifest = store.reader().load_latest_manifest()
    assert manifest is not None
    assert manifest["global_step"] == json.loads((FIXTURE / "latest.json").read_text())["global_step"]
    for path in sorted((FIXTURE / "shards").rglob("rank-*")):
        plain = s3.load_checkpoint_with_validation(str(path))
        assert plain == (f"s3dlio {path.name[5]}".encode() * 1000)


def test_what_is_written_has_the_form_of_s3dlios() -> None:
    """The same files, and the same fields in the same order, of the same types: what reads one reads the other."""
    uri = "memory://form/run"
    s3.PyCheckpointStore(uri, None, None, 3).save(12, 1, "torch", b"x" * 1000)
    theirs = next((FIXTURE / "manifests").glob("ckpt-12-*"))
    form_of_name = r"manifests/ckpt-12-\d{8}-\d{6}\.json"
    (mine,) = [key for key in keys(uri) if key.startswith("manifests/")]
    assert re.fullmatch(form_of_name, f"manifests/{theirs.name}")
    assert re.fullmatch(form_of_name, mine)

    def form(text: bytes) -> list[tuple[str, object]]:
        found = json.loads(text)
        shards = [[(name, type(value)) for name, value in shard.items()] for shard in found.pop("shards")]
        return [*((name, type(value)) for name, value in found.items()), ("shards", shards)]

    assert form(ours.get(f"{uri}/{mine}")) == form(theirs.read_bytes())
    assert form_of_latest(ours.get(f"{uri}/latest.json")) == form_of_latest((FIXTURE / "latest.json").read_bytes())
    shard = json.loads(ours.get(f"{uri}/{mine}"))["shards"][0]
    assert shard["checksum"] == f"crc32c:{crc32c(b'x' * 1000):08x}"  # of what was saved, before compression
    assert shard["key"].endswith("/rank-0.bin.zst")


def form_of_latest(text: bytes) -> list[tuple[str, type]]:
    return [(name, type(value)) for name, value in json.loads(text).items()]


def test_checksums_of_earlier_versions_of_s3dlio_count() -> None:
    uri = "memory://early/run"
    key = s3.save_checkpoint(uri, 1, 0, "f", b"early")
    manifest = json.loads(ours.get(f"{uri}/{key}"))
    for checksum, good in ((f"crc32c:{zlib.crc32(b'early'):08x}", True), ("crc32c:00000000", False), (None, False)):
        manifest["shards"][0]["checksum"] = checksum
        ours.put(f"{uri}/{key}", json.dumps(manifest).encode())
        if good:
            assert s3.load_checkpoint(uri) == b"early"
        else:
            with pytest.raises(IntegrityError):
                s3.load_checkpoint(uri)
