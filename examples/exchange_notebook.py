"""The s3exchange notebook, cell by cell, with its import line changed to ``s3loader``.

Runs against a real S3 server on loopback (``pip install 's3loader[testing]'``) and checks every
value the notebook prints. What differs from the notebook, and why:

* ``from s3exchange import ...`` is ``from s3loader import ...``.
* Sizes of gzip shards are compared with the objects', since they depend on the zlib at hand.
* ``delete_prefix("")`` needs ``allow_all=True``: emptying a bucket is no default.
* The notebook's own data (16 workers with augmented audio, 1,000 clips) is synthesised here.

    python examples/exchange_notebook.py [moto|ministack]
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import sys
import tarfile
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from s3loader import (
    InvalidManifestError,
    ManifestNotFoundError,
    ManifestWriter,
    MissingPlaceholderError,
    ObjectNotFoundError,
    S3ExchangeStore,
    S3Settings,
    ShardReadError,
    ShardSizePolicy,
    create_shards,
)
from s3loader.testing import server

BUCKET = "wakeworx-artifacts"
SAMPLES = "training/123/samples"


def check(actual: Any, expected: Any) -> None:
    """Print what the cell prints, and stop if it is not what the notebook shows."""
    print(actual)
    if actual != expected:
        raise SystemExit(f"the notebook shows {expected!r}")


def setup(store: S3ExchangeStore) -> None:
    check(f"Store initialized with bucket: {store.bucket}", "Store initialized with bucket: wakeworx-artifacts")
    check(f"Base prefix: {store.base_prefix}", "Base prefix: prod")
    check(store._resolve_key("training/{job_id}/samples", {"job_id": "123"}), "prod/training/123/samples")
    scoped = store.scope(job_id="123", prefix="training")
    check(scoped.key("{prefix}/{job_id}/samples"), "prod/training/123/samples")


def basic_objects(store: S3ExchangeStore) -> None:
    wav: dict[str, Any] = {
        "data": b"fake audio data...",
        "id": "file-001",
        "meta": {"sr": 16000, "length": 15342},
        "content_type": "audio/wav",
    }
    entry = store.put_object(key=f"{SAMPLES}/file.wav", **wav)
    check(
        f"Created entry: {entry}",
        "Created entry: {'kind': 'file', 'key': 'training/123/samples/file.wav', 'id': 'file-001', "
        "'meta': {'sr': 16000, 'length': 15342}, 'content_type': 'audio/wav', 'size_bytes': 18, "
        "'etag': '548baa8d1efffaaae5d59f4bedcf09b3'}",
    )
    check(entry["kind"], "file")
    check(entry["key"], "training/123/samples/file.wav")
    check(entry.get("meta", {}), {"sr": 16000, "length": 15342})
    for name in ("file1.wav", "file2.wav"):
        store.put_object(key=f"{SAMPLES}/{name}", **wav)
    stream = store.get_object(f"{SAMPLES}/file.wav")
    check(f"Read {len(stream.read())} bytes", "Read 18 bytes")
    stream.close()


def manifests(store: S3ExchangeStore) -> None:
    key = f"{SAMPLES}/manifest.jsonl"
    store.write_manifest(
        key=key,
        entries=[
            {"kind": "file", "key": f"{SAMPLES}/file1.wav", "id": "001"},
            {"kind": "file", "key": f"{SAMPLES}/file2.wav", "id": "002"},
        ],
        mode="overwrite",
    )
    listed = [f"{e['kind']}: {e.get('key', e.get('archive_key', 'N/A'))}" for e in store.iter_manifest_entries(key)]
    check(listed, ["file: training/123/samples/file1.wav", "file: training/123/samples/file2.wav"])
    read = []
    for stream, entry in store.iter_objects(key):
        read.append((entry["key"], entry.get("id", "N/A"), len(stream.read())))
        stream.close()
    check(read, [("training/123/samples/file1.wav", "001", 18), ("training/123/samples/file2.wav", "002", 18)])


def shard_archives(store: S3ExchangeStore, folder: Path) -> None:
    for i in range(5):
        (folder / f"file_{i:03d}.txt").write_text(f"Content of file {i}\n" * 100)
    items: list[Any] = [
        {
            "source": str(folder / f"file_{i:03d}.txt"),
            "member_path": f"file_{i:03d}.txt",
            "id": f"file-{i:03d}",
            "meta": {"index": i, "type": "text"},
            "size_bytes": (folder / f"file_{i:03d}.txt").stat().st_size,
        }
        for i in range(5)
    ]
    check([item["size_bytes"] for item in items], [1800] * 5)
    batches = list(create_shards(items, max_entries=3, max_bytes=1024 * 1024))
    check(f"Created {len(batches)} shard batch(es)", "Created 2 shard batch(es)")
    check([len(batch) for batch in batches], [3, 2])
    check(batches, [items[:3], items[3:]])
    shards = []
    for i, batch in enumerate(batches):
        key = f"{SAMPLES}/shards/shard-{i:05d}.tar.gz"
        shard = store.put_shard_archive(archive_key=key, shard_items=batch, format="tar", compression="gzip")
        shards.append(shard)
        check(shard.get("size_bytes", 0), store.get_object_metadata(key)["ContentLength"])
    check([shard.get("count", 0) for shard in shards], [3, 2])
    manifest = f"{SAMPLES}/manifest.jsonl"
    store.put_sharded(manifest_key=manifest, shard_entries=shards, update_mode="append_parts")
    check([e["kind"] for e in store.iter_manifest_entries(manifest, resolve_refs=False)], ["file", "file", "manifest_ref"])
    check(
        [len(stream.read()) for stream, _ in store.iter_objects(manifest)],
        [18, 18, 1800, 1800, 1800, 1800, 1800],
    )


def writer_with_loose_files(store: S3ExchangeStore) -> None:
    key = f"{SAMPLES}/manifest-writer.jsonl"
    with store.open_manifest_writer(key, mode="append_parts", part_max_entries=10, part_max_bytes=1024) as writer:
        writer.add_file(key=f"{SAMPLES}/file1.wav", id="file-001", meta={"sr": 16000})
        for i in (1, 2):
            writer.put_object(
                key=f"{SAMPLES}/new_file{i}.wav", data=f"new audio data {i}".encode(), id=f"new-{i:03d}", meta={"sr": 16000}
            )
        check(
            f"Writer stats: {writer.stats()}",
            "Writer stats: {'part_entries': 3, 'part_bytes': 485, 'parts_uploaded': 0, 'shard_entries': 0, "
            "'shard_bytes': 0, 'shards_created': 0, 'is_closed': False}",
        )
    check((writer.stats()["parts_uploaded"], writer.is_closed), (1, True))
    entries: list[Any] = list(store.iter_manifest_entries(key))
    check(
        [f"{e['kind']}: {e['key']}" for e in entries],
        [f"file: {SAMPLES}/file1.wav", f"file: {SAMPLES}/new_file1.wav", f"file: {SAMPLES}/new_file2.wav"],
    )
    check([e["size_bytes"] for e in entries], [None, 16, 16])
    check([e["etag"] for e in entries], [None, "ef53be31dfa5f6eb8ea9e05e2a16dcb2", "04d8a603d092939b92a3534b4e2daa73"])
    check(len(store.get_object(key).read()), 99)


def writer_with_shards(store: S3ExchangeStore, folder: Path) -> None:
    for i in range(8):
        (folder / f"shard_file_{i:03d}.txt").write_text(f"Content of shard file {i}\n" * 50)
    key = f"{SAMPLES}/manifest-writer-shards.jsonl"
    with store.open_manifest_writer(
        key,
        mode="overwrite",
        shard_size=ShardSizePolicy(max_entries=3, max_bytes=5000),
        shard_format="tar",
        shard_compression=None,
    ) as writer:
        for i in range(8):
            writer.add_to_shard(
                member_path=f"shard_file_{i:03d}.txt",
                source=str(folder / f"shard_file_{i:03d}.txt"),
                id=f"shard-{i:03d}",
                meta={"index": i, "type": "text"},
            )
        writer.put_object(key=f"{SAMPLES}/loose_file.wav", data=b"loose audio data", id="loose-001")
        check(
            f"Writer stats: {writer.stats()}",
            "Writer stats: {'part_entries': 3, 'part_bytes': 643, 'parts_uploaded': 0, 'shard_entries': 2, "
            "'shard_bytes': 2400, 'shards_created': 2, 'is_closed': False}",
        )
    stats = writer.stats()
    check((stats["part_entries"], stats["part_bytes"], stats["shards_created"]), (4, 881, 3))
    entries: list[Any] = list(store.iter_manifest_entries(key))
    check(
        [f"{e['archive_key']} ({e['count']} items)" if e["kind"] == "shard" else e["key"] for e in entries],
        [
            f"{SAMPLES}/shards/shard-000001.tar (3 items)",
            f"{SAMPLES}/shards/shard-000002.tar (3 items)",
            f"{SAMPLES}/loose_file.wav",
            f"{SAMPLES}/shards/shard-000003.tar (2 items)",
        ],
    )
    check([e["size_bytes"] for e in entries if e["kind"] == "shard"], [10240, 10240, 10240])

    archive = f"{SAMPLES}/shards/shard-000001.tar"
    with tarfile.open(fileobj=io.BytesIO(store.get_object(archive).read())) as tar:
        check(
            [member.name for member in tar.getmembers()],
            ["__manifest__.jsonl", "shard_file_000.txt", "shard_file_001.txt", "shard_file_002.txt"],
        )
        internal = tar.extractfile("__manifest__.jsonl")
        assert internal is not None
        line = (
            '{{"kind":"file","key":"training/123/samples/shards/shard-000001.tar#shard_file_{0:03d}.txt",'
            '"member_path":"shard_file_{0:03d}.txt","id":"shard-{0:03d}","meta":{{"index":{0},"type":"text"}},'
            '"size_bytes":1200}}\n'
        )
        check(internal.read(), "".join(line.format(i) for i in range(3)).encode())

    read = []
    for stream, entry in store.iter_objects(key):
        read.append((entry["id"], len(stream.read())))
        stream.close()
    expected = [(f"shard-{i:03d}", 1200) for i in range(8)]
    check(read, [*expected[:6], ("loose-001", 16), *expected[6:]])
    check(store.get_object(f"{archive}#shard_file_000.txt").read(), b"Content of shard file 0\n" * 50)


def writer_modes(store: S3ExchangeStore) -> None:
    key = f"{SAMPLES}/manifest-writer-overwrite.jsonl"
    with store.open_manifest_writer(key, mode="overwrite", part_max_entries=10) as writer:
        for i in range(5):
            writer.put_object(key=f"{SAMPLES}/overwrite_file_{i}.wav", data=f"data {i}".encode(), id=f"overwrite-{i:03d}")
        stats = writer.stats()
        check(f"Entries written: {stats['part_entries']}", "Entries written: 5")
        check(f"Parts uploaded: {stats['parts_uploaded']}", "Parts uploaded: 0")
    check([e["kind"] for e in store.iter_manifest_entries(key, resolve_refs=False)], ["file"] * 5)

    for publish in (False, True):
        key = f"{SAMPLES}/manifest-writer-error{'-publish' if publish else ''}.jsonl"
        try:
            with store.open_manifest_writer(key, publish_on_error=publish) as writer:
                writer.put_object(key=f"{SAMPLES}/error_file.wav", data=b"data", id="error-001")
                raise ValueError("Something went wrong!")
        except ValueError as error:
            check(f"Caught error: {error}", "Caught error: Something went wrong!")
        check(f"Manifest exists after error: {store.exists(key)}", f"Manifest exists after error: {publish}")

    key = f"{SAMPLES}/manifest-writer-manual.jsonl"
    with store.open_manifest_writer(key, mode="append_parts", part_max_entries=100) as writer:
        for i in range(10):
            writer.put_object(key=f"{SAMPLES}/manual_file_{i}.wav", data=f"data {i}".encode(), id=f"manual-{i:03d}")
            if i == 4:
                part = writer.flush_part()
                print(f"Manually flushed part: {part}")
                assert re.fullmatch(rf"{SAMPLES}/manifests/part-\d{{8}}-\d{{6}}-[0-9a-f]{{8}}\.jsonl", part or "")
        stats = writer.stats()
        check((stats["part_entries"], stats["parts_uploaded"]), (5, 1))
    check(len(list(store.iter_manifest_entries(key))), 10)


def reading_and_listing(store: S3ExchangeStore) -> None:
    manifest = f"{SAMPLES}/manifest.jsonl"
    members = [f"{SAMPLES}/shards/shard-0000{i // 3}.tar.gz#file_{i:03d}.txt" for i in range(5)]
    shown = []
    for stream, entry in store.iter_objects(manifest):
        shown.append((entry["key"], bool(entry.get("archive_key")), len(stream.read())))
        stream.close()
    loose = [f"{SAMPLES}/file1.wav", f"{SAMPLES}/file2.wav"]
    check(shown, [(key, False, 18) for key in loose] + [(key, True, 1800) for key in members])
    check(all(key.startswith("training/123/") for key in store.list_keys(prefix="training/123/")), True)
    listed = store.list_manifest_files(manifest=manifest, include_shards=True)
    check([entry.get("key", entry.get("member_path", "N/A")) for entry in listed], loose + members)
    filtered = store.list_by_manifest_prefix(manifest=manifest, prefix_filter=f"{SAMPLES}/shards")
    check([entry.get("key", entry.get("archive_key", "N/A")) for entry in filtered], members)


def errors(store: S3ExchangeStore) -> None:
    try:
        store.get_object("nonexistent.wav")
    except ObjectNotFoundError as error:
        check(f"Object not found: {error.key}", "Object not found: nonexistent.wav")
    try:
        store._resolve_key("training/{job_id}/samples", {})
    except MissingPlaceholderError as error:
        check(f"Missing placeholder: {error.placeholder}", "Missing placeholder: job_id")
    try:
        for _ in store.iter_manifest_entries("nonexistent/manifest.jsonl"):
            pass
    except ManifestNotFoundError as error:
        check(f"Manifest not found: {error.manifest_key}", "Manifest not found: nonexistent/manifest.jsonl")
    assert issubclass(InvalidManifestError, Exception)
    assert issubclass(ShardReadError, Exception)


def compaction_and_deletion(store: S3ExchangeStore) -> None:
    report = store.compact_manifest(
        src_manifest_key=f"{SAMPLES}/manifest.jsonl",
        dst_manifest_key=f"{SAMPLES}/manifest-compact.jsonl",
        resolve_refs=True,
        expand_shards=False,
    )
    check(f"Compacted {report['total_entries']} entries", "Compacted 4 entries")
    store.delete_key(f"{SAMPLES}/file.wav")
    check(store.exists(f"{SAMPLES}/file.wav"), False)
    deleted = store.delete_manifest(manifest=f"{SAMPLES}/manifest.jsonl", delete_manifests=True, dedupe=True)
    counts = (deleted["deleted_object_count"], deleted["deleted_archive_count"], deleted["deleted_manifest_count"])
    check(counts, (2, 2, 2))
    count = store.delete_prefix(prefix=f"{SAMPLES}/", regex=r".*\.wav$")
    check(any(key.endswith(".wav") for key in store.list_keys(SAMPLES)), False)
    check(f"Deleted {count} objects", "Deleted 19 objects")


def wav(name: str, size: int) -> bytes:
    """A mono clip of 16 kHz, `size` bytes long, whose samples depend on its name."""
    seed = hashlib.sha256(name.encode()).digest()
    data = (seed * (size // len(seed) + 1))[: size - 44]
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", size - 8, b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16)
    return head + struct.pack("<4sI", b"data", len(data)) + data


def augment(settings: S3Settings, worker: int) -> None:
    """One of the 16 processes: a manifest and shards of its own."""
    store = S3ExchangeStore(settings, BUCKET)
    base = "job/1/samples/augmented"
    with store.open_manifest_writer(
        f"{base}/manifest_{worker}.jsonl",
        mode="overwrite",
        shard_size=ShardSizePolicy(max_entries=1000),
        shard_prefix=f"{base}/shards_{worker}",
    ) as writer:
        for i in range(20):
            writer.add_to_shard(f"{i}_aug_0.wav", wav(f"{worker}/{i}", 444), id=f"{worker}-{i}")


def sixteen_workers(store: S3ExchangeStore, settings: S3Settings) -> None:
    check(store.delete_prefix("", allow_all=True) > 0, True)
    check(list(store.list_keys("")), [])
    context = get_context("forkserver")
    context.set_forkserver_preload(["s3loader.exchange"])
    processes = [context.Process(target=augment, args=(settings, worker)) for worker in range(16)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    check([process.exitcode for process in processes], [0] * 16)
    base = "job/1/samples/augmented"
    with ManifestWriter(store, f"{base}/manifest.jsonl", mode="overwrite") as writer:
        for worker in range(16):
            writer.add_manifest(f"{base}/manifest_{worker}.jsonl")
    keys = list(store.get_manifest(f"{base}/manifest.jsonl").get_keys())
    check(len(keys), 320)
    check(keys[:3], [f"{base}/shards_0/shard-000001.tar#{i}_aug_0.wav" for i in range(3)])
    check(store.get_object(keys[-1]).read(), wav("15/19", 444))


def piper(store: S3ExchangeStore) -> None:
    """1,000 clips in one shard, as large as the notebook's; and nine more shards, as in its listing."""
    key = "job/1/samples/piper/manifest.jsonl"
    sizes = [34117 if i < 958 else 34116 for i in range(1000)]
    note = "x" * 4200  # what a clip's meta held besides is not shown, only how large the archive was
    with store.open_manifest_writer(key, mode="overwrite", shard_size=ShardSizePolicy(max_entries=1000)) as writer:
        for i, size in enumerate(sizes):
            writer.add_to_shard(f"clip_{i:03d}.wav", wav(f"piper {i}", size), id=f"clip-{i:03d}", meta={"text": note})
    for n in range(2, 11):
        store.put_shard_archive(
            f"job/1/samples/piper/shards/shard-{n:06d}.tar", [{"source": b"x", "member_path": "x"}], compression=None
        )
    check(len(list(store.list_keys(""))), 44)
    manifest = store.get_manifest(key)
    check(len(list(manifest.iter_entries())), 1)
    check(len(list(manifest.iter_objects())), 1000)
    check(len(list(manifest.get_keys())), 1000)
    check(sum(len(stream.read()) for stream, _ in manifest.iter_objects()), 34116958)
    check(sum(len(stream.read()) for stream, _ in store.iter_objects_from_keys(manifest.get_keys())), 34116958)
    entry: Any = next(iter(manifest.iter_entries()))
    archive = "job/1/samples/piper/shards/shard-000001.tar"
    head = store.get_object_metadata(archive)
    etag = head["ETag"].strip('"')
    check(
        entry,
        {
            "kind": "shard",
            "archive_key": archive,
            "format": "tar",
            "compression": None,
            "internal_manifest_path": "__manifest__.jsonl",
            "count": 1000,
            "size_bytes": 39188480,
            "meta": {"etag": etag},
        },
    )
    check(head["ContentLength"], 39188480)
    check(
        store.get_object(key).read().decode(),
        f'{{"kind":"shard","archive_key":"{archive}","format":"tar","compression":null,"internal_manifest_path":'
        f'"__manifest__.jsonl","count":1000,"size_bytes":39188480,"meta":{{"etag":"{etag}"}}}}\n',
    )
    raw = store.get_object_metadata("job/1/samples/augmented/manifest.jsonl")
    shown = ("ResponseMetadata", "AcceptRanges", "LastModified", "ContentLength", "ETag", "ContentType", "Metadata")
    check([name for name in shown if name not in raw], [])
    check((raw["ContentType"], raw["Metadata"]), ("application/x-ndjson", {}))
    check(store.delete_prefix("", allow_all=True), 44)


def main() -> None:
    kind: Any = sys.argv[1] if len(sys.argv) > 1 else "moto"
    with server(kind) as s3, tempfile.TemporaryDirectory() as scratch:
        s3.bucket(BUCKET)
        store = S3ExchangeStore(
            s3_client=s3.client(), bucket=BUCKET, base_prefix="prod", default_vars={"service_name": "training-service"}
        )
        setup(store)
        basic_objects(store)
        manifests(store)
        shard_archives(store, Path(scratch))
        writer_with_loose_files(store)
        writer_with_shards(store, Path(scratch))
        writer_modes(store)
        reading_and_listing(store)
        errors(store)
        compaction_and_deletion(store)
        sixteen_workers(store, s3.settings)
        piper(S3ExchangeStore(s3_client=s3.client(), bucket=BUCKET))
    print("every value is the notebook's")


if __name__ == "__main__":
    main()
