"""Stores that fail in the middle of an epoch: a typed error that names the sample, never a shorter epoch, a hang or a double.

The s3dlio defects D1, D2, D3, D4, D5, D7, D13 and D14 stand here as things that must not happen.
"""

import pickle
import sys
import threading
from pathlib import Path

import pytest

import s3loader
from s3loader import StoreOptions, open_store
from s3loader.errors import (
    AccessDeniedError,
    IntegrityError,
    ObjectChangedError,
    ObjectNotFoundError,
    S3LoaderError,
    SampleError,
    ShardReadError,
    TruncatedError,
)
from s3loader.loader import Loader, from_manifest, from_objects, from_prefix, from_webdataset
from s3loader.testing import FaultProxy, Rule, server, write_shard, write_sharded_dataset

SHARDED, LOOSE = 120, 24


def content(i):
    return f"{i:06d}-".encode() * (20 + i)


@pytest.fixture(scope="module")
def s3():
    with server("moto") as s3:
        store = s3.open_store(s3.bucket("loader-faults"))
        write_sharded_dataset(store, ((f"s{i:05d}.bin", content(i)) for i in range(SHARDED)), per_shard=40)
        for i in range(LOOSE):
            store.put(f"loose/{i:02d}.bin", content(i))
        store.close()
        yield s3


@pytest.fixture(params=["direct", "boto3"])
def engine(request):
    return request.param


def through(s3, rules, engine="direct", **options):
    proxy = FaultProxy(s3.endpoint_url, rules, seed=1)
    store = s3.open_store(
        "loader-faults",
        endpoint_url=proxy.endpoint_url,
        engine=engine,
        options=StoreOptions(max_attempts=3, read_timeout=300.0, **options),
    )
    return proxy, store


def numbers(samples):
    return [int(bytes(sample[:6])) for sample in samples]


def run_until_error(loader):
    got = []
    with pytest.raises(S3LoaderError) as caught:
        got.extend(i for batch in loader for i in numbers(batch))
    return got, caught.value


def test_a_403_on_one_object_of_24_is_raised_in_its_place(s3, engine):  # D1
    rule = Rule("error", method="GET", path=r"loose/05\.bin", status=403, code="AccessDenied")
    proxy, store = through(s3, [rule], engine)
    with proxy, store:
        got, error = run_until_error(Loader(from_prefix("loose/", store=store), batch_size=5, shuffle="none"))
    assert got == list(range(5))
    assert isinstance(error, AccessDeniedError)
    assert (error.key, error.position) == ("loose/05.bin", 5)
    assert "loose/05.bin" in str(error)


def test_a_shard_that_vanished_after_the_epoch_began(s3, engine):
    rule = Rule("error", method="GET", path=r"shard-000002\.tar$", status=404, code="NoSuchKey")
    proxy, store = through(s3, [rule], engine)
    with proxy, store:
        got, error = run_until_error(Loader(from_manifest("manifest.jsonl", store=store), batch_size=8, shuffle="none"))
    assert got == list(range(80))
    assert isinstance(error, ObjectNotFoundError)
    assert (error.shard, error.position) == ("shards/shard-000002.tar", 80)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_shard_that_vanished_with_its_index_is_named_as_the_object_that_is_not_there(tmp_path, policy):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, ((f"s{i:05d}.bin", content(i)) for i in range(60)), per_shard=20)
    dataset = from_manifest("manifest.jsonl", store=store)
    loader = Loader(dataset, batch_size=10, shuffle="none", memory_limit="8192B", on_error=policy)
    store.delete("shards/shard-000002.tar")
    store.delete("shards/shard-000002.tar.idx")
    batches = iter(loader)
    assert numbers(next(batches)) == list(range(10))
    if policy == "skip":
        assert [number for batch in batches for number in numbers(batch)] == list(range(10, 40))
        assert {entry.error.partition(":")[0] for entry in loader.quarantine} == {"ObjectNotFoundError"}
        return
    with pytest.raises(ObjectNotFoundError, match=r"shard-000002\.tar: (the shard is not there|no such object)") as caught:
        list(batches)
    assert (caught.value.shard, caught.value.position) == ("shards/shard-000002.tar", 40)


def elsewhere(dataset):
    """The dataset in another process, which has not read its indexes yet."""
    return pickle.loads(pickle.dumps(dataset))


def test_an_index_that_vanished_while_its_shard_stayed(tmp_path):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, ((f"s{i:05d}.bin", content(i)) for i in range(60)), per_shard=20)
    dataset = elsewhere(from_manifest("manifest.jsonl", store=store))
    batches = iter(Loader(dataset, batch_size=10, shuffle="none", memory_limit="8192B"))
    store.delete("shards/shard-000002.tar.idx")
    next(batches)
    with pytest.raises(ShardReadError, match="no index") as caught:
        list(batches)
    assert (caught.value.shard, caught.value.position) == ("shards/shard-000002.tar", 40)


def test_a_shard_that_was_replaced_meanwhile(tmp_path):
    store = open_store(tmp_path.as_uri())
    members = [(f"s{i:05d}.bin", content(i)) for i in range(60)]
    write_sharded_dataset(store, members, per_shard=20)
    dataset = from_manifest("manifest.jsonl", store=store)
    batches = iter(Loader(dataset, batch_size=10, shuffle="none", memory_limit="8192B"))
    assert numbers(next(batches)) == list(range(10))
    write_shard(store, "shards/shard-000002.tar", reversed(members[40:]))
    with pytest.raises((ObjectChangedError, ShardReadError)) as caught:
        list(batches)
    assert caught.value.position == 40


def test_a_flipped_bit_on_the_wire_is_fetched_again_and_one_at_rest_is_an_error(s3, tmp_path):
    rule = Rule("flip", method="GET", path=r"shard-\d+\.tar$", nth=2)
    proxy, store = through(s3, [rule])
    with proxy, store:
        loader = Loader(from_manifest("manifest.jsonl", store=store), batch_size=8)
        got = numbers(sample for batch in loader for sample in batch)
    assert sorted(got) == list(range(SHARDED))
    assert rule.fired == 1
    assert loader.stats.refetched <= 1  # 0 where the bit fell into a header between members
    always = Rule("flip", method="GET", path=r"shard-000001\.tar$", bit=8 * 1030)  # in the second member
    proxy, store = through(s3, [always])
    with proxy, store:
        loader = Loader(from_manifest("manifest.jsonl", store=store), batch_size=8, shuffle="shard")
        _, error = run_until_error(loader)
    assert isinstance(error, IntegrityError)
    assert error.member.endswith(".bin")
    assert error.range[1] > error.range[0]
    assert loader.stats.refetched >= 1


@pytest.mark.parametrize("action", ["truncate", "reset", "drop_reply"])
def test_broken_connections_are_tried_again_and_nothing_is_lost_or_doubled(s3, engine, action):
    rule = Rule(action, method="GET", path=r"\.tar$", times=2)
    proxy, store = through(s3, [rule], engine)
    with proxy, store:
        loader = Loader(from_manifest("manifest.jsonl", store=store), batch_size=8)
        assert sorted(numbers(s for b in loader for s in b)) == list(range(SHARDED))
    assert rule.fired >= 1


def test_slow_down_is_waited_out(s3, engine):
    rule = Rule("error", method="GET", path=r"\.tar$", status=503, code="SlowDown", times=3)
    proxy, store = through(s3, [rule], engine)
    with proxy, store:
        loader = Loader(from_manifest("manifest.jsonl", store=store), batch_size=8)
        assert sorted(numbers(s for b in loader for s in b)) == list(range(SHARDED))


def test_a_truncated_shard_is_an_error_with_its_member(tmp_path):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, [(f"s{i:05d}.bin", content(i)) for i in range(60)], per_shard=20)
    dataset = from_manifest("manifest.jsonl", store=store)
    path = tmp_path / "shards" / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises((ObjectChangedError, TruncatedError, IntegrityError, S3LoaderError)) as caught:
        list(Loader(dataset, batch_size=10, shuffle="none"))
    assert caught.value.shard == "shards/shard-000002.tar"
    assert caught.value.position >= 40


def test_an_index_that_vanished_fails_only_its_own_samples(tmp_path):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, [(f"s{i:05d}.bin", content(i)) for i in range(60)], per_shard=20)
    dataset = elsewhere(from_manifest("manifest.jsonl", store=store))
    store.delete("shards/shard-000001.tar.idx")
    loader = Loader(dataset, batch_size=10, on_error="skip")
    assert sorted(numbers(s for b in loader for s in b)) == [*range(20), *range(40, 60)]
    assert len(loader.quarantine) == loader.stats.skipped == 20
    assert "index" in loader.quarantine[0].error
    with pytest.raises(ShardReadError, match="index") as caught:
        list(Loader(dataset, batch_size=10, shuffle="none"))
    assert caught.value.position == 20
    assert caught.value.shard == "shards/shard-000001.tar"


def explode_on_7(sample):
    if bytes(sample[:6]) == b"000007":
        raise KeyError("seven")
    return sample


@pytest.mark.parametrize("threads", [0, 3])
def test_policies_for_a_transform_that_raises(tmp_path, threads):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, [(f"s{i:05d}.bin", content(i)) for i in range(40)], per_shard=20)
    dataset = from_manifest("manifest.jsonl", store=store)
    options = {"batch_size": 8, "transform": explode_on_7, "decode_threads": threads, "seed": 11}
    plain = numbers(s for b in Loader(dataset, batch_size=8, seed=11) for s in b)
    _, error = run_until_error(Loader(dataset, **options))
    assert isinstance(error, SampleError)
    assert isinstance(error.__cause__, KeyError)
    assert error.position == plain.index(7)
    skip = Loader(dataset, on_error="skip", **options)
    assert numbers(s for b in skip for s in b) == [i for i in plain if i != 7]
    replace = Loader(dataset, on_error="replace", **options)
    got = numbers(s for b in replace for s in b)
    assert len(got) == 40
    assert [g for g, p in zip(got, plain, strict=True) if p != 7] == [i for i in plain if i != 7]
    assert got == numbers(s for b in Loader(dataset, on_error="replace", **options) for s in b)
    assert replace.stats.replaced == 1
    assert skip.state_dict()["consumed"] == replace.state_dict()["consumed"] == 40


def test_when_every_sample_is_bad_replacing_ends_with_an_error(tmp_path):
    store = open_store(tmp_path.as_uri())
    write_sharded_dataset(store, [("a.bin", content(7))] * 3, per_shard=3)
    loader = Loader(from_manifest("manifest.jsonl", store=store), batch_size=2, transform=explode_on_7, on_error="replace")
    with pytest.raises(SampleError, match="no replacement"):
        list(loader)
    with pytest.raises(SampleError, match="every sample of epoch 0 was skipped"):
        list(Loader(loader.dataset, batch_size=2, transform=explode_on_7, on_error="skip"))


# -- what s3dlio's loaders do and ours must not -----------------------------------------------------


@pytest.fixture
def loose(s3):
    proxy, store = through(s3, [])
    with proxy, store:
        yield from_prefix("loose/", store=store)


def test_sharding_is_honoured(loose):  # D2
    parts = [numbers(s for b in Loader(loose, batch_size=3, rank=r, world_size=2) for s in b) for r in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(LOOSE))
    assert not set(parts[0]) & set(parts[1])


def test_shuffle_and_seed_are_honoured(loose):  # D3
    orders = [numbers(s for b in Loader(loose, batch_size=3, seed=seed) for s in b) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != list(range(LOOSE))


def test_batch_size_and_dropping_the_last_are_honoured(loose):  # D4
    assert [len(b) for b in Loader(loose, batch_size=5, tail="drop")] == [5, 5, 5, 5]
    assert [len(b) for b in Loader(loose, batch_size=5)] == [5, 5, 5, 5, 4]
    assert [len(b) for b in Loader(loose, batch_size=32)] == [24]


@pytest.mark.parametrize("driver", ["pump", "threads"])
def test_small_batches_still_have_many_requests_in_flight(s3, driver):  # D5
    hold = Rule("hold", method="GET", path=r"loose/00\.bin")
    proxy, store = through(s3, [hold])
    with proxy, store:
        dataset = from_prefix("loose/", store=store)
        others = []

        def release():
            assert hold.reached.wait(600)
            while sum(r.status == 206 or r.status == 200 for r in proxy.requests if "/loose/" in r.path) < 8:
                if done.wait(0.01):
                    return
            others.append(True)
            hold.release.set()

        done = threading.Event()
        thread = threading.Thread(target=release)
        thread.start()
        got = numbers(s for b in Loader(dataset, batch_size=1, shuffle="none", driver=driver) for s in b)
        done.set()
        thread.join()
    assert got == list(range(LOOSE))
    assert others, "the first object was answered before eight others had been: nothing was read ahead"


def test_breaking_off_leaves_no_thread_behind(loose):  # D7
    before = set(threading.enumerate())
    for driver in ("threads", "pump"):
        for _ in range(2):
            batches = iter(Loader(loose, batch_size=1, driver=driver))
            next(batches)
            batches.close()
    ours = [t for t in threading.enumerate() if t not in before and t.name.startswith("s3loader") and "proxy" not in t.name]
    for thread in ours:
        thread.join(timeout=600)
    assert not any(thread.is_alive() for thread in ours)


def test_an_object_listed_twice_is_two_samples_in_their_places(loose):  # D13
    keys = ["loose/03.bin", "loose/01.bin", "loose/03.bin"]
    dataset = from_objects(keys, store=loose.store)
    assert numbers(s for b in Loader(dataset, batch_size=2, shuffle="none") for s in b) == [3, 1, 3]


def test_samples_are_buffers_that_can_be_indexed_and_bytes_are_bytes(loose):  # D14
    raw = next(iter(Loader(loose, batch_size=1, shuffle="none")))[0]
    assert raw[0] == ord("0")
    assert raw[:3] == b"000"
    plain = next(iter(Loader(loose, batch_size=1, shuffle="none", decode="bytes")))[0]
    assert type(plain) is bytes


def test_webdataset_shards_without_an_index_that_may_not_be_written_to(s3, tmp_path):
    import io
    import tarfile

    plain = s3.open_store("loader-faults")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(10):
            for extension, data in (("txt", content(i)), ("cls", b"%d" % i)):
                info = tarfile.TarInfo(f"x{i}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    plain.put("foreign/a-000.tar", buffer.getvalue())
    plain.close()
    proxy, store = through(s3, [Rule("error", method="PUT", path="", status=403, code="AccessDenied")])
    with proxy, store:
        tried = []
        for _ in range(2):  # the second time from the folder
            dataset = from_webdataset("foreign/a-{000..000}.tar", store=store, index_dir=str(tmp_path))
            batch = next(iter(Loader(dataset, batch_size=10, decode="auto", shuffle="none")))
            assert [sample["cls"] for sample in batch] == list(range(10))
            assert batch[3] == {"__key__": "x3", "txt": content(3).decode(), "cls": 3}
            tried.append(proxy.count("PUT"))
        assert tried[0] == tried[1] >= 1


@pytest.mark.parametrize("driver", ["pump", "threads"])
def test_a_missing_index_is_asked_for_once_while_the_dataset_is_open(s3, tmp_path, driver):
    """Where it may not be written beside the shard it is kept in `index_dir`; workers and later epochs know that."""
    plain = s3.open_store("loader-faults")
    members = [(f"s{i:05d}.bin", content(i)) for i in range(60)]
    keys = [f"bare-{driver}/{number}.tar" for number in range(3)]
    for number, key in enumerate(keys):
        write_shard(plain, key, members[20 * number : 20 * number + 20], index=False)
    plain.close()
    proxy, store = through(s3, [Rule("error", method="PUT", path="", status=403, code="AccessDenied")])
    with proxy, store:

        def asked():
            return proxy.count("GET", ".idx")

        dataset = from_webdataset(keys, store=store, index_dir=str(tmp_path), group=None)
        assert len(list(Loader(dataset, batch_size=10, driver=driver))) == 6  # the indexes were made, and asked for meanwhile
        before = asked()
        dataset = from_webdataset(keys, store=store, index_dir=str(tmp_path), group=None)
        loader = Loader(dataset, batch_size=10, driver=driver)
        for _ in range(2):
            assert sorted(number for batch in loader for number in numbers(batch)) == list(range(60))
        for worker in range(2):  # as in processes of their own
            twin = pickle.loads(pickle.dumps(dataset))
            assert len(list(Loader(twin, batch_size=10, driver=driver, worker=worker, workers=2))) == 3
            twin.store.close()
        assert asked() - before == len(keys)


@pytest.mark.parametrize(("driver", "most"), [("pump", 22), ("threads", 14)])
def test_a_steady_batch_crosses_few_files(s3, driver, most):
    """Whoever reads what one batch does has to open no more files than these; those of the threads themselves left out."""
    store = s3.open_store("loader-faults")
    write_sharded_dataset(store, [(f"s{i:05d}", bytes(20_000)) for i in range(1500)], per_shard=300, manifest="steady.jsonl")
    root = str(Path(s3loader.__file__).parent)
    crossed = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(root):
            crossed.add(frame.f_code.co_filename[len(root) + 1 :])

    with store:
        dataset = from_manifest("steady.jsonl", store=store)
        batches = Loader(dataset, batch_size=8, driver=driver, memory_limit="24MiB").iter_batches()
        for _ in range(60):
            next(batches)
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            for _ in range(60):
                next(batches)
        finally:
            sys.setprofile(before)
        batches.close()
    assert len(crossed) <= most, " ".join(sorted(crossed))
