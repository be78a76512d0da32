"""Datasets of every kind, grouping, decoders, collation, filters, mixtures, explain."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from s3loader import ObjectStore, events, open_store
from s3loader.datagen import generate_tfrecord
from s3loader.errors import (
    ConfigError,
    InvalidManifestError,
    PlanError,
    S3LoaderError,
    SampleError,
    ShardReadError,
    StateMismatchError,
)
from s3loader.exchange import publish_manifest
from s3loader.loader import (
    Loader,
    Ragged,
    from_manifest,
    from_objects,
    from_prefix,
    from_webdataset,
    mix_datasets,
    open_dataset,
    register_decoder,
)
from s3loader.loader.urls import expand_braces
from s3loader.testing import server, write_shard, write_sharded_dataset


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path.as_uri())


def flat(loader):
    return [bytes(s) for batch in loader for s in batch]


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# -- manifests, prefixes, objects, WebDataset -----------------------------------------------------


def test_loose_objects_and_shards_mix_in_one_manifest(store):
    for i in (0, 1, 8, 9):
        store.put(f"loose/{i}.bin", b"%d" % i * 5)
    shard = write_shard(store, "a.tar", [(f"{i}.bin", b"%d" % i * 5) for i in range(2, 8)])
    files = {
        i: {"kind": "file", "key": f"loose/{i}.bin", "size_bytes": 5, "etag": store.head(f"loose/{i}.bin").etag}
        for i in (0, 1, 8)
    }
    files[9] = {"kind": "file", "key": "loose/9.bin", "id": None, "meta": None, "size_bytes": None, "etag": None}
    publish_manifest(store, "part.jsonl", [files[8], files[9]])
    publish_manifest(store, "m.jsonl", [files[0], files[1], shard, {"kind": "manifest_ref", "key": "part.jsonl"}])
    dataset = from_manifest("m.jsonl", store=store)
    assert len(dataset) == 10
    expected = [b"%d" % i * 5 for i in range(10)]
    assert flat(Loader(dataset, batch_size=3, shuffle="none")) == expected
    assert sorted(flat(Loader(dataset, batch_size=3))) == expected
    loader = Loader(dataset, batch_size=3)
    assert loader.where(loader.plan.find(0).position).key == "loose/0.bin"
    assert dataset.find("a.tar#4.bin") == 4


@pytest.mark.parametrize("depth", [0, 2])
def test_a_manifest_url_finds_the_root_its_keys_are_relative_to(tmp_path, depth):
    root = open_store(tmp_path.as_uri())
    folder = "x/y/"[: 2 * depth]
    write_sharded_dataset(root, [("a.bin", b"abc")], per_shard=1, prefix=f"{folder}shards", manifest="x/y/m.jsonl")
    assert flat(Loader(open_dataset(f"{tmp_path.as_uri()}/x/y/m.jsonl"), batch_size=1)) == [b"abc"]


def test_a_manifest_whose_keys_are_nowhere_says_what_to_give(tmp_path):
    store = open_store(tmp_path.as_uri())
    publish_manifest(store, "m.jsonl", [{"kind": "file", "key": "gone.bin"}])
    with pytest.raises(InvalidManifestError, match=r"gone\.bin"):
        open_dataset(f"{tmp_path.as_uri()}/m.jsonl")
    with pytest.raises(S3LoaderError):
        open_dataset(f"{tmp_path.as_uri()}/none.jsonl")


def test_prefixes_leave_out_folder_markers_and_side_cars(store):
    write_shard(store, "p/a.tar", [("x", b"1")])
    store.put("p/ü b#1.bin", b"odd name")
    store.put("q/c.bin", b"other")
    assert [key for part in from_prefix("p/", store=store).parts for key in part.keys] == ["p/a.tar", "p/ü b#1.bin"]
    assert len(from_prefix("nothing/", store=store)) == 0


def test_objects_must_share_a_bucket():
    with pytest.raises(ConfigError, match="several buckets"):
        from_objects(["s3://a/x", "s3://b/y"], region="us-east-1", access_key_id="k", secret_access_key="s")
    with pytest.raises(ConfigError, match="no URLs"):
        from_objects([])


def test_a_missing_object_of_a_list_is_an_error_in_its_place(store):
    store.put("a", b"1")
    with pytest.raises(FileNotFoundError) as caught:
        list(Loader(from_objects(["a", "b"], store=store), batch_size=1, shuffle="none"))
    assert (caught.value.key, caught.value.position) == ("b", 1)


def test_braces():
    assert expand_braces("a-{000..002}.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert expand_braces("{x,y}-{9..10}") == ["x-9", "x-10", "y-9", "y-10"]
    assert expand_braces("a::b{1,2}") == ["a", "b1", "b2"]
    assert expand_braces("plain") == ["plain"]
    with pytest.raises(ConfigError):
        expand_braces("{0..99999999999}")


def test_foreign_tars_are_indexed_on_first_use_and_the_index_is_kept(tmp_path, store):
    for shard in range(2):
        with tarfile.open(tmp_path / f"w-{shard:02d}.tar", "w") as tar:
            for i in range(5):
                for extension, data in (("jpg.txt", b"j"), ("cls", b"%d" % i), ("json", json.dumps({"i": i}).encode())):
                    info = tarfile.TarInfo(f"d/s{shard}{i}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    dataset = from_webdataset(f"{tmp_path.as_uri()}/w-{{00..01}}.tar")
    assert len(dataset) == 10
    batch = next(iter(Loader(dataset, batch_size=10, decode="auto", shuffle="none")))
    assert batch[7] == {"__key__": "d/s12", "jpg.txt": "j", "cls": 2, "json": {"i": 2}}
    assert (tmp_path / "w-00.tar.idx").exists()
    with pytest.raises(FileNotFoundError):
        from_webdataset(f"{tmp_path.as_uri()}/none-{{0..1}}.tar")


def test_gzip_shards_are_refused_with_a_way_out(store):
    entry = write_shard(store, "a.tar.gz", [("x", b"1")], compression="gzip")
    publish_manifest(store, "m.jsonl", [entry])
    for group in (None, "webdataset"):
        with pytest.raises(ShardReadError, match="decompress it"):
            from_manifest("m.jsonl", store=store, group=group)


def test_an_index_that_contradicts_the_manifest_is_refused(store):
    entry = write_shard(store, "a.tar", [("x.a", b"1"), ("x.b", b"2")])
    publish_manifest(store, "m.jsonl", [{**entry, "count": 7}])
    with pytest.raises(ShardReadError, match="7"):
        from_manifest("m.jsonl", store=store, group="webdataset")
    with pytest.raises(ShardReadError, match="7"):
        list(Loader(from_manifest("m.jsonl", store=store), batch_size=1))


# -- groups, decoders, collation ------------------------------------------------------------------


@pytest.fixture
def images(store):
    from PIL import Image

    members = []
    for i in range(40):
        file = io.BytesIO()
        Image.fromarray(np.full((4, 6, 3), i, dtype=np.uint8)).save(file, "PNG")
        members += [
            (f"img{i:03d}.png", file.getvalue()),
            (f"img{i:03d}.cls", b"%d" % (i % 10)),
            (f"img{i:03d}.npy", npy(np.arange(i))),
        ]
    metas = {f"img{i:03d}.cls": {"split": "train" if i % 4 else "test"} for i in range(40)}
    write_sharded_dataset(store, members, per_shard=36, metas=metas)
    return store


def test_grouped_samples_decode_by_extension_and_stack(images):
    dataset = from_manifest("manifest.jsonl", store=images, group="webdataset")
    assert len(dataset) == 40
    loader = Loader(dataset, batch_size=8, decode="auto", collate="ragged", decode_threads=2)
    seen = set()
    for batch in loader:
        assert batch["png"].shape == (8, 4, 6, 3)
        assert batch["png"].dtype == np.uint8
        ids = batch["png"][:, 0, 0, 0]
        assert (batch["cls"] == ids % 10).all()
        assert batch["__key__"] == [f"img{i:03d}" for i in ids]
        lengths = [len(row) for row in (batch["npy"] if isinstance(batch["npy"], Ragged) else list(batch["npy"]))]
        assert lengths == ids.tolist()
        seen |= set(ids.tolist())
    assert seen == set(range(40))
    raw = next(iter(Loader(dataset, batch_size=2)))[0]
    assert set(raw) == {"__key__", "png", "cls", "npy"}
    assert isinstance(raw["png"], memoryview)


def test_filters_see_the_entries_and_change_the_identity(images):
    everything = from_manifest("manifest.jsonl", store=images, group="webdataset")
    train = from_manifest("manifest.jsonl", store=images, group="webdataset", where=lambda e: e["meta"]["split"] == "train")
    assert len(train) == 30
    keys = [s["__key__"] for b in Loader(train, batch_size=7) for s in b]
    assert sorted(keys) == [f"img{i:03d}" for i in range(40) if i % 4]
    with pytest.raises(StateMismatchError):
        Loader(train, batch_size=7).load_state_dict(Loader(everything, batch_size=7).state_dict())
    ranks = [len(Loader(train, batch_size=4, rank=r, world_size=3, tail="drop")) for r in range(3)]
    assert ranks == [2, 2, 2]
    members = from_manifest("manifest.jsonl", store=images, where=lambda e: e["size_bytes"] == 1)
    assert sorted({bytes(s) for b in Loader(members, batch_size=9) for s in b}) == [b"%d" % i for i in range(10)]


def test_decoders(store):
    safe = pytest.importorskip("safetensors.numpy")
    members = {
        "a.txt": "grün".encode(), "b.json": b'{"x": [1]}', "c.npy": npy(np.eye(2)), "d.cls": b"7",
        "e.safetensors": safe.save({"w": np.arange(3)}), "f.bin": b"raw",
    }  # fmt: skip
    write_sharded_dataset(store, members.items(), per_shard=3)
    dataset = from_manifest("manifest.jsonl", store=store)
    text, parsed, array, label, tensors, raw = next(iter(Loader(dataset, batch_size=6, shuffle="none", decode="auto")))
    assert (text, parsed, label, raw) == ("grün", {"x": [1]}, 7, b"raw")
    assert (array == np.eye(2)).all()
    assert (tensors["w"] == np.arange(3)).all()
    register_decoder("length", len, extensions=("bin",))
    assert next(iter(Loader(dataset, batch_size=6, shuffle="none", decode={"bin": "length", "txt": memoryview.hex})))[5] == 3
    assert next(iter(Loader(dataset, batch_size=2, shuffle="none", decode=lambda data: data[0]))) == [b"g"[0], ord("{")]
    with pytest.raises(SampleError, match="decoding failed") as caught:
        list(Loader(dataset, batch_size=6, decode="json", shuffle="none"))
    assert caught.value.member == "a.txt"


def test_pickled_arrays_are_never_loaded(store):
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    write_sharded_dataset(store, [("a.npy", file.getvalue())], per_shard=1)
    with pytest.raises(SampleError, match="pickle"):
        list(Loader(from_manifest("manifest.jsonl", store=store), batch_size=1, decode="auto"))


def test_collate(store):
    write_sharded_dataset(store, [(f"{i}.bin", b"x" * i) for i in range(1, 5)], per_shard=4)
    dataset = from_manifest("manifest.jsonl", store=store)
    ragged = next(iter(Loader(dataset, batch_size=4, shuffle="none", collate="ragged")))
    assert ragged.offsets.tolist() == [0, 1, 3, 6, 10]
    assert [len(ragged[i]) for i in range(len(ragged))] == [1, 2, 3, 4]
    with pytest.raises(SampleError, match="ragged"):
        list(Loader(dataset, batch_size=4, collate="fixed"))
    pairs = next(iter(Loader(dataset, batch_size=4, shuffle="none", transform=lambda s: (len(s), "t"), collate="fixed")))
    assert pairs[0].tolist() == [1, 2, 3, 4]
    assert pairs[1] == ["t"] * 4
    assert next(iter(Loader(dataset, batch_size=4, collate=len))) == 4
    with pytest.raises(SampleError, match="keys"):
        list(Loader(dataset, batch_size=4, transform=lambda s: {bytes(s): 1}, collate="fixed"))


def test_two_members_of_one_extension_in_a_group_are_an_error(store):
    write_shard(store, "a.tar", [("x.bin", b"1"), ("x.bin", b"2")])
    with pytest.raises(ShardReadError, match=r"'x\.bin' stands there twice: .*member 0, byte \d+.* and .*member 1, byte \d+"):
        from_webdataset("a.tar", store=store)
    dataset = from_webdataset("a.tar", store=store, on_torn="split")
    batches = Loader(dataset, batch_size=2, shuffle="none")
    assert [bytes(sample["bin"]) for batch in batches for sample in batch] == [b"1", b"2"]


def test_empty_members_and_large_ones(store):
    sizes = [0, 3, 0, 0, 3_000_000, 1]
    write_sharded_dataset(store, [(f"{i}.bin", bytes([i]) * n) for i, n in enumerate(sizes)], per_shard=6)
    store.put("loose/empty", b"")
    dataset = from_manifest("manifest.jsonl", store=store)
    for shuffle in ("none", "block", "full"):
        assert sorted(len(s) for s in flat(Loader(dataset, batch_size=2, shuffle=shuffle, memory_limit="64KiB"))) == sorted(
            sizes
        )
    assert flat(Loader(from_prefix("loose/", store=store), batch_size=1)) == [b""]


# -- mixtures and explain -------------------------------------------------------------------------


def mixture(tmp_path, sizes=(60, 20), **options):
    datasets = []
    for d, size in enumerate(sizes):
        store = open_store((tmp_path / f"d{d}").as_uri())
        write_sharded_dataset(store, [(f"{i}.bin", b"%d:%05d" % (d, i)) for i in range(size)], per_shard=9)
        datasets.append(from_manifest("manifest.jsonl", store=store))
    return mix_datasets(datasets, **options)


def test_a_mixture_over_two_stores_keeps_its_weights_and_resumes(tmp_path):
    dataset = mixture(tmp_path, weights=[3, 1])
    loader = Loader(dataset, batch_size=8)
    samples = flat(loader)
    assert len(samples) == len(set(samples)) == 80
    for at in range(77):
        assert sum(s.startswith(b"0:") for s in samples[at : at + 4]) == 3
    batches = iter(Loader(dataset, batch_size=8))
    head = [bytes(s) for _ in range(3) for s in next(batches)]
    batches.close()
    first = Loader(dataset, batch_size=8)
    it = iter(first)
    for _ in range(3):
        next(it)
    it.close()
    parts = []
    for rank in range(3):
        other = Loader(pickle.loads(pickle.dumps(dataset)), batch_size=5, rank=rank, world_size=3)
        other.load_state_dict(json.loads(json.dumps(first.state_dict())))
        parts.append([[bytes(s) for s in batch] for batch in other])
    rest = [s for step in range(4) for part in parts if step < len(part) for s in part[step]]
    assert head + rest == samples
    with pytest.raises(StateMismatchError, match="weights"):
        Loader(mix_datasets(dataset.datasets, weights=[1, 1]), batch_size=8).load_state_dict(first.state_dict())


def test_mixtures_that_make_no_sense_are_refused(tmp_path):
    dataset = mixture(tmp_path, weights=[1, 1])
    for build in (
        lambda: mix_datasets([]),
        lambda: mix_datasets([dataset]),
        lambda: mix_datasets(dataset.datasets, weights=[1]),
    ):
        with pytest.raises(PlanError):
            build()
    with pytest.raises(PlanError):
        len(Loader(mix_datasets(dataset.datasets, weights=[1, 0]), batch_size=1))


def test_explain_predicts_what_a_run_then_does(store):
    write_sharded_dataset(store, [(f"{i}.bin", bytes(40_000)) for i in range(600)], per_shard=100)
    dataset = from_manifest("manifest.jsonl", store=store)
    loader = Loader(dataset, batch_size=8, memory_limit="24MiB")
    told = loader.explain(price_per_1000_gets=1.0)
    list(loader)
    assert told.samples == loader.stats.samples == 600
    assert told.steps == loader.stats.batches
    assert told.whole_blocks
    assert (told.requests, told.bytes_fetched) == (loader.stats.requests, loader.stats.bytes_fetched)
    assert told.price == pytest.approx(told.requests / 1000, rel=0.01)
    assert "GET" in str(told)
    assert told._repr_html_().startswith("<table>")
    assert any("workers" in note for note in loader.explain(workers=3).notes)
    assert loader.explain(workers=4).readers == 1.0
    assert "look-ahead" in str(Loader(dataset, batch_size=8, shuffle="full", memory_limit="24MiB").explain())
    assert "large ranges" in str(Loader(dataset, batch_size=8, shuffle="full").explain())
    small = Loader(dataset, batch_size=8, memory_limit="1MiB").explain()
    assert any("memory_limit" in note for note in small.notes)
    assert small.peak <= 1 << 20


def test_stats_say_where_the_time_went(store):
    write_sharded_dataset(store, [(f"{i}.bin", bytes(1000)) for i in range(100)], per_shard=50)
    loader = Loader(from_manifest("manifest.jsonl", store=store), batch_size=10)
    assert "nothing" in loader.stats.verdict
    list(loader)
    told = loader.stats.as_dict()
    assert told["batches"] == 10
    assert told["first_batch"] > 0
    assert told["bytes_used"] == 100_000
    assert any(word in told["verdict"] for word in ("network", "CPU", "consumer"))
    assert "100 samples" in str(loader.stats)


def test_a_filter_reads_the_internal_manifests_of_many_shards_at_a_time():
    with server("moto") as s3, s3.open_store(s3.bucket("filtered")) as store:
        write_sharded_dataset(store, ((f"{i:03d}.bin", b"x" * (i + 1)) for i in range(60)), per_shard=4)
        seen = []
        end = events.subscribe(lambda event: seen.append(event) if event.url.endswith(".tar") else None)
        try:
            kept = from_manifest("manifest.jsonl", store=store, where=lambda entry: entry["size_bytes"] % 2 == 0)
        finally:
            end()
    assert len(kept) == 30
    reads = sorted((event for event in seen if event.op == "GET"), key=lambda event: event.start)
    assert len(reads) == 15
    assert reads[1].start < reads[0].end  # the second was sent before the first had come


def test_a_filter_keeps_the_order_of_parts_that_are_read_in_turns(tmp_path):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, ((f"{i:03d}.bin", b"%03d" % i) for i in range(80)), per_shard=1)
    kept = from_manifest("manifest.jsonl", store=store, where=lambda entry: entry["size_bytes"] and "7" in entry["member_path"])
    got = [int(bytes(sample)) for batch in Loader(kept, batch_size=8, shuffle="none") for sample in batch]
    assert got == [i for i in range(80) if "7" in f"{i:03d}"]


@pytest.mark.parametrize("kind", ["webdataset", "tfrecord", "parquet"])
def test_connections_are_opened_ahead_whatever_archives_they_are(tmp_path, monkeypatch, kind):
    """One for each archive and one more."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number in range(3):
        if kind == "webdataset":
            write_shard(open_store(tmp_path), f"{number}.tar", [(f"{number}.txt", b"x")])
        elif kind == "tfrecord":
            (tmp_path / f"{number}.tfrecord").write_bytes(generate_tfrecord(2, 100))
        else:
            parquet.write_table(pyarrow.table({"n": [1, 2]}), tmp_path / f"{number}.parquet")
    asked = []
    monkeypatch.setattr(ObjectStore, "open_ahead", lambda _, count: asked.append(count))
    assert open_dataset(f"{tmp_path}/*.*", kind=kind).parts
    assert asked == [4]
