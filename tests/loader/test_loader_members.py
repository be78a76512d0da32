"""``members=``: members that nobody wants are neither in the samples nor, where that saves anything, fetched."""

import pytest

from s3loader import open_store
from s3loader.errors import ConfigError, IntegrityError, PlanError, ShardReadError
from s3loader.loader import Loader, SampleReader, from_manifest, from_prefix, from_webdataset, mix_datasets, open_dataset
from s3loader.testing import write_shard, write_sharded_dataset

SAMPLES = 40


def members(i, depth):
    yield f"a/s{i:03d}.cls", b"%d" % i
    yield f"a/s{i:03d}.depth.npy", bytes([i]) * depth
    yield f"a/s{i:03d}.jpg", b"jpg%03d" % i * 50
    if i % 3 == 0:
        yield f"a/s{i:03d}.zip", bytes(depth)


def wanted(i, names):
    whole = {"__key__": f"a/s{i:03d}"} | {name[7:]: data for name, data in members(i, 0)}
    return {"__key__": whole["__key__"], **{name: whole[name] for name in names if name in whole}}


def plain(sample):
    return {name: value if name == "__key__" else bytes(value) for name, value in sample.items()}


def written(tmp_path, depth, **options):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, (m for i in range(SAMPLES) for m in members(i, depth)), per_shard=40, **options)
    return store


@pytest.mark.parametrize("depth", [1000, 400_000])
@pytest.mark.parametrize("shuffle", ["block", "full", "shard", "none"])
@pytest.mark.parametrize("names", [["jpg", "cls"], ["cls"], "zip"])
def test_samples_have_only_what_is_wanted_in_the_same_order(tmp_path, depth, shuffle, names):
    store = written(tmp_path, depth)
    whole = from_manifest("manifest.jsonl", store=store, group="webdataset")
    some = from_manifest("manifest.jsonl", store=store, group="webdataset", members=names)
    asked = [names] if isinstance(names, str) else names
    one, two = (Loader(dataset, batch_size=4, shuffle=shuffle) for dataset in (whole, some))
    got = [plain(sample) for batch in two for sample in batch]
    keys = [sample["__key__"] for batch in one for sample in batch]
    assert [sample["__key__"] for sample in got] == keys
    assert got == [wanted(int(key[3:]), asked) if asked != ["zip"] else {"__key__": key, **zipped(key, depth)} for key in keys]
    assert two.plan.digest == one.plan.digest
    two.load_state_dict(one.state_dict())  # what is read of the samples is no part of the order
    if depth == 400_000:
        assert two.stats.bytes_fetched < (3_000_000 if asked == ["jpg", "cls"] else 10_000_000)
        assert one.stats.bytes_fetched > 20_000_000
    assert two.stats.bytes_used == sum(len(value) for sample in got for name, value in sample.items() if name != "__key__")


def zipped(key, depth):
    return {"zip": bytes(depth)} if int(key[3:]) % 3 == 0 else {}


def test_small_gaps_are_read_over_and_explain_says_what_is_fetched(tmp_path):
    for depth, requests in ((1000, range(1, 16)), (400_000, range(SAMPLES, 2 * SAMPLES + 4))):
        (tmp_path / str(depth)).mkdir()
        store = written(tmp_path / str(depth), depth)
        dataset = from_manifest("manifest.jsonl", store=store, group="webdataset", members=["jpg", "cls"])
        loader = Loader(dataset, batch_size=4, shuffle="none")
        list(loader)
        told, stats = loader.explain(), loader.stats
        assert told.bytes_fetched == pytest.approx(stats.bytes_fetched, rel=0.2)
        assert told.bytes_used == pytest.approx(stats.bytes_used, rel=0.05)
        assert stats.requests in requests
        assert told.requests in requests


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_shards_by_url_zstd_and_a_damaged_member_that_nobody_wants(tmp_path, compression):
    store = open_store(tmp_path.as_uri())
    for number in range(2):
        some = range(20 * number, 20 * number + 20)
        write_shard(store, f"{number}.tar", [m for i in some for m in members(i, 300_000)], compression=compression)
    if compression is None:
        path = tmp_path / "0.tar"
        data = bytearray(path.read_bytes())
        data[data.index(b"\3" * 1000)] ^= 1  # in the depth of sample 3; the file keeps its ETag's size, not its time
        path.write_bytes(data)
        write_index_again(store, "0.tar")
    dataset = from_webdataset("{0..1}.tar", store=store, members=[".jpg"])
    got = [plain(sample) for batch in Loader(dataset, batch_size=6, shuffle="none") for sample in batch]
    assert got == [wanted(i, ["jpg"]) for i in range(SAMPLES)]
    assert plain(SampleReader(dataset)[37]) == wanted(37, ["jpg"])
    if compression is None:
        with pytest.raises(IntegrityError, match="depth"):
            list(Loader(from_webdataset("{0..1}.tar", store=store), batch_size=6, shuffle="none"))


def write_index_again(store, key):
    """The index as it was, for the ETag that the archive has now."""
    import dataclasses

    from s3loader.shard import index_key, load_index

    index = dataclasses.replace(load_index(store, key), etag=store.head(key).etag)
    store.put(index_key(key), index.to_bytes())


def test_loose_objects_filters_and_mixtures(tmp_path):
    store = open_store((tmp_path / "loose").as_uri())
    for i in range(10):
        for name, data in members(i, 10):
            store.put(name, data)
    loose = from_prefix("a/", store=store, group="webdataset", members=["cls"])
    loader = Loader(loose, batch_size=3, shuffle="none")
    assert [plain(s) for b in loader for s in b] == [wanted(i, ["cls"]) for i in range(10)]
    assert loader.stats.requests == 10
    assert loader.explain().bytes_fetched == 10
    (tmp_path / "tar").mkdir()
    shards = written(tmp_path / "tar", 10)
    kept = open_dataset(
        "manifest.jsonl",
        store=shards,
        group="webdataset",
        members=["cls"],
        where=lambda entry: any(member["key"].endswith(".zip") for member in entry["members"]),
    )
    assert [plain(s) for b in Loader(kept, batch_size=3, shuffle="none") for s in b] == [
        wanted(i, ["cls"]) for i in range(0, SAMPLES, 3)
    ]
    mixed = mix_datasets([loose, kept])
    assert all(set(s) == {"__key__", "cls"} for b in Loader(mixed, batch_size=3) for s in b)
    with pytest.raises(PlanError, match="same members"):
        mix_datasets([loose, kept.only("jpg")])


def test_what_cannot_be_meant_is_said(tmp_path):
    store = written(tmp_path, 10)
    with pytest.raises(ConfigError, match="grouped"):
        from_manifest("manifest.jsonl", store=store, members=["jpg"])
    with pytest.raises(ConfigError, match="no extension"):
        from_manifest("manifest.jsonl", store=store, group="webdataset", members=[])
    typo = from_manifest("manifest.jsonl", store=store, group="webdataset", members=["jpeg"])
    with pytest.raises(ShardReadError, match=r"members=\['jpeg'\]; there are cls, depth.npy, jpg, zip") as caught:
        list(Loader(typo, batch_size=4))
    assert caught.value.shard.endswith(".tar")
