"""Writer and reader agree about the unit: no shard ends within a sample, and a sample that is torn is said."""

from __future__ import annotations

import io
import itertools
import json
import random
import re
import subprocess
import sys
import uuid
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader import ObjectStore, open_store
from s3loader.errors import ConfigError, FormatError, ObjectNotFoundError, PlanError, S3LoaderError, ShardReadError
from s3loader.exchange import S3ExchangeStore, ShardSizePolicy, create_shards
from s3loader.fetch import safetensors
from s3loader.loader import (
    Dataset,
    Loader,
    SampleReader,
    check_dataset,
    from_manifest,
    from_objects,
    from_prefix,
    from_webdataset,
    mix_datasets,
    open_dataset,
)
from s3loader.shard import ShardBuilder, build_index, index_key, sample_key
from s3loader.testing import write_shard


@pytest.fixture
def store() -> ObjectStore:
    return open_store(f"memory://{uuid.uuid4().hex}")


def samples_of(dataset: Dataset) -> list[dict[str, Any]]:
    """All samples in order, contents as bytes."""
    if not len(dataset):
        return []
    return [
        {name: value if isinstance(value, str) else bytes(value) for name, value in sample.items()}
        for batch in Loader(dataset, batch_size=7, shuffle="none")
        for sample in batch
    ]


POLICIES = st.sampled_from(
    [
        {"max_entries": 5},
        {"max_entries": 1},
        {"max_samples": 3},
        {"max_bytes": 3000},
        {"max_bytes": "20KiB"},
        {"max_bytes": "24kB", "max_samples": 9, "max_entries": 20},
    ]
)
MEMBERS = st.lists(
    st.dictionaries(
        st.sampled_from(["txt", "cls", "jpg", "seg.png", "JSON"]), st.binary(max_size=3000), min_size=1, max_size=4
    ),
    max_size=40,
)


@given(MEMBERS, POLICIES, st.sampled_from([None, "zstd"]), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_is_added_as_samples_comes_back_as_the_same_samples(
    members: list[dict[str, bytes]], limits: dict[str, Any], compression: str | None, rng: random.Random, at_once: bool
) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    expected = [{"__key__": f"d/{i:04d}", **values} for i, values in enumerate(members)]
    with S3ExchangeStore(store).open_manifest_writer(
        "m.jsonl", mode="overwrite", shard_size=ShardSizePolicy(**limits), shard_compression=compression
    ) as writer:
        for sample in expected:
            key, values = sample["__key__"], {name: value for name, value in sample.items() if name != "__key__"}
            if at_once:
                writer.add_sample(key, values)
                continue
            for extension, value in values.items():
                writer.add_to_shard(f"{key}.{extension}", value)
                if rng.random() < 0.2:  # what stands between the members of a sample does not tear it
                    writer.add_to_shard(rng.choice(["README", "d/._0001.jpg", "__meta__/info.json", ".DS_Store"]), b"x")
    dataset = from_manifest("m.jsonl", store=store, group="webdataset")
    assert samples_of(dataset) == expected
    for part in dataset.parts:
        limit = ShardSizePolicy(**limits)
        if at_once and compression is None and isinstance(limit.max_bytes, int) and part.samples > 1:
            assert part.size <= limit.max_bytes + -limit.max_bytes % 10240
        if at_once and limit.max_samples is not None:
            assert part.samples <= limit.max_samples


@given(MEMBERS, POLICIES)
@settings(max_examples=60, deadline=None)
def test_batches_of_items_end_between_samples(members: list[dict[str, bytes]], limits: dict[str, Any]) -> None:
    items: list[Any] = [
        {"member_path": f"{i:04d}.{extension}", "source": data}
        for i, values in enumerate(members)
        for extension, data in values.items()
    ]
    batches = list(create_shards(iter(items), **limits))
    assert [item for batch in batches for item in batch] == items
    keys = [{sample_key(item["member_path"]) for item in batch} for batch in batches]
    assert all(not one & other for one, other in itertools.pairwise(keys))
    for batch, some in zip(batches, keys, strict=True):
        if len(some) > 1:
            assert len(batch) <= limits.get("max_entries", len(batch))
            assert len(some) <= limits.get("max_samples", len(some))


def test_sizes_are_those_of_the_tar_also_as_text(store: ObjectStore) -> None:
    assert ShardSizePolicy(max_bytes="64MiB").max_bytes == 64 << 20
    for one_by_one in (False, True):
        with S3ExchangeStore(store).open_manifest_writer(
            "m.jsonl", mode="overwrite", shard_size=ShardSizePolicy(max_bytes="100KiB")
        ) as writer:
            for i in range(500):
                if one_by_one:
                    writer.add_to_shard(f"{i}.a", b"x")
                    writer.add_to_shard(f"{i}.b", b"y")
                else:
                    writer.add_sample(f"{i}", {"a": b"x", "b": b"y"}, id=f"i{i}", meta={"n": i})
        sizes = [store.head(part.key).size for part in from_manifest("m.jsonl", store=store, group="webdataset").parts]
        assert max(sizes) <= 100 << 10
        assert min(sizes[:-1]) > 80 << 10
    for wrong in ("x", 0, -1, 1.5, True, "0"):
        with pytest.raises(ConfigError):
            ShardSizePolicy(max_bytes=wrong)  # type: ignore[arg-type]


def test_a_sample_is_added_whole_or_not_at_all(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"image")
    with S3ExchangeStore(store).open_manifest_writer("m.jsonl", shard_size=ShardSizePolicy(max_samples=2)) as writer:
        with (tmp_path / "image").open("rb") as file:
            writer.add_sample("a", {"jpg": tmp_path / "image", "seg.png": file, ".cls": b"3"}, id="first", meta={"n": 1})
        wrong: list[tuple[Any, Any]] = [
            ("a", {"txt": b"again"}),
            ("b", {}),
            ("b", {"jpg": b"x", "cls": 3}),
            ("b", {"jpg": b"x", "cls": str(tmp_path / "none")}),
            ("b", {"jpg": b"x", "": b"y"}),
            ("b", {"jpg": b"x", "c/d": b"y"}),
            ("b", [b"x"]),
            ("b", {"jpg": b"x", ".jpg": b"y"}),
            ("b", {"jpg": b"x", "__key__": b"b"}),
            ("b", {"jpg": b"x", "__key__": "b"}),
            ("b.c", {"jpg": b"x"}),
            (".b", {"jpg": b"x"}),
            ("__b__/c", {"jpg": b"x"}),
            ("d/", {"jpg": b"x"}),
            ("../b", {"jpg": b"x"}),
            (3, {"jpg": b"x"}),
        ]
        for key, values in wrong:
            with pytest.raises(S3LoaderError) as caught:
                writer.add_sample(key, values)
            assert caught.value.hint
        with pytest.raises(S3LoaderError):
            writer.add_sample("b", {"jpg": b"x", "cls": b"y"}, meta={"n": object()})
        with pytest.raises(ConfigError, match="torn"):
            writer.add_to_shard("a.txt", b"late")
        writer.add_sample("b", {"jpg": b"x"})
        with pytest.raises(ConfigError, match="torn"):
            writer.add_sample("b", {"cls": b"y"})
        writer.add_sample("c", {"jpg": b"z"})
    dataset = from_manifest("m.jsonl", store=store, group="webdataset", where=lambda entry: entry["meta"].get("n") == 1)
    assert samples_of(dataset) == [{"__key__": "a", "jpg": b"image", "seg.png": b"image", "cls": b"3"}]
    everything = from_manifest("m.jsonl", store=store, group="webdataset")
    assert [sample["__key__"] for sample in samples_of(everything)] == ["a", "b", "c"]


def test_buffers_of_any_layout_are_members(store: ObjectStore) -> None:
    square = np.arange(6, dtype=np.uint8).reshape(2, 3)
    layouts = [square[:, ::2], np.asfortranarray(square), np.zeros((0, 3)), np.array(3, dtype=np.uint8)]
    with S3ExchangeStore(store).open_manifest_writer("m.jsonl", shard_size=ShardSizePolicy(max_samples=2)) as writer:
        for i, layout in enumerate(layouts):
            writer.add_sample(str(i), {"a": b"x", "b": memoryview(layout)})
            writer.add_to_shard(f"{i}_.b", memoryview(layout))
    found = samples_of(from_manifest("m.jsonl", store=store, group="webdataset"))
    assert [sample["b"] for sample in found] == [layout.tobytes() for layout in layouts for _ in range(2)]


def test_flush_shard_ends_a_sample_and_what_would_tear_it_is_refused(store: ObjectStore) -> None:
    writer = S3ExchangeStore(store).open_manifest_writer("m.jsonl", shard_size=ShardSizePolicy(max_samples=2))
    writer.add_to_shard("a.jpg", b"x")
    writer.flush_shard()
    with pytest.raises(ConfigError, match="'a' would be torn"):
        writer.add_to_shard("a.cls", b"y")
    writer.add_to_shard("a.jpg", b"another of that name")
    writer.close()
    assert len(from_manifest("m.jsonl", store=store, group="webdataset")) == 2


# -- readers --------------------------------------------------------------------------------------

TORN = {
    "apart": (["a.jpg", "a.cls", "b.jpg", "a.txt"], "'a' is torn: 'a.cls' (member 1, ", "'a.txt' (member 3, ", 3),
    "twice": (["a.jpg", "a.jpg"], "'a.jpg' stands there twice: 'a.jpg' (member 0, ", "'a.jpg' (member 1, ", 2),
    "again": (["a.jpg", "b.jpg", "a.jpg"], "'a.jpg' stands there twice", "'a.jpg' (member 2, ", 3),
}


@pytest.mark.parametrize("case", TORN)
@pytest.mark.parametrize("indexed", [False, True])
def test_a_torn_sample_is_an_error_with_both_places(store: ObjectStore, case: str, indexed: bool) -> None:
    names, first, second, split = TORN[case]
    entry = write_shard(store, "a.tar", [(name, name.encode()) for name in names], index=indexed)
    S3ExchangeStore(store).write_manifest("m.jsonl", [entry])
    for opened in (
        lambda **options: from_webdataset("a.tar", store=store, **options),
        lambda **options: from_manifest("m.jsonl", store=store, group="webdataset", **options),
        lambda **options: open_dataset("a.tar", store=store, group="webdataset", **options),
    ):
        with pytest.raises(ShardReadError) as caught:
            opened()
        assert first in str(caught.value)
        assert second in str(caught.value)
        assert "a.tar" in str(caught.value)
        assert 'on_torn="split"' in str(caught.value)
        dataset = opened(on_torn="split")
        assert [bytes(value) for sample in samples_of(dataset) for name, value in sample.items() if name != "__key__"] == [
            name.encode() for name in names
        ]
        assert len(dataset) == split
    assert len(from_webdataset("a.tar", store=store, group=None)) == len(names)  # nothing is grouped: nothing is torn
    with pytest.raises(ShardReadError, match=re.escape(first)):
        build_index("a.tar", store=store)
    (report,) = build_index("a.tar", store=store, on_torn="split")
    assert report.torn == len(names) - len(set(names)) or report.torn == 1
    with pytest.raises(ConfigError, match="on_torn"):
        open_dataset("a.tar", store=store, group="webdataset", on_torn="maybe")  # type: ignore[arg-type]


def _as_version_1(store: ObjectStore, key: str) -> None:
    """The side-car as the first version wrote it, with its own sample numbers."""
    tensors, metadata = safetensors.decode(store.get(index_key(key)))
    groups = [0]
    ends = tensors["name_end"].tolist()
    names = [bytes(tensors["names"][low:high]).decode() for low, high in zip([0, *ends], ends, strict=False)]
    for before, name in itertools.pairwise(names):
        groups.append(groups[-1] + (sample_key(before) != sample_key(name)))
    kept = {"format", "members", "archive_size", "archive_etag", "compression", "internal_manifest"}
    metadata = {name: text for name, text in metadata.items() if name in kept}
    tensors["group"] = np.array(groups, dtype=np.uint32)
    store.put(index_key(key), safetensors.encode(tensors, {**metadata, "version": "1", "samples": str(groups[-1] + 1)}))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_sample_torn_over_two_shards_is_an_error_with_both_shards(
    store: ObjectStore, version: int, order: tuple[int, ...]
) -> None:
    contents = [["a.jpg", "a.cls", "b.jpg"], ["b.cls", "c.jpg", "c.cls"], ["d.jpg", "d.cls"]]
    entries = []
    for number, names in enumerate(contents):
        entries.append(write_shard(store, f"{number}.tar", [(name, name.encode()) for name in names]))
        if version == 1:
            _as_version_1(store, f"{number}.tar")
    S3ExchangeStore(store).write_manifest("m.jsonl", [entries[i] for i in order])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ShardReadError, match=r"'b' is torn: 'b\.jpg' ends 0\.tar, 'b\.cls' begins 1\.tar") as caught:
            from_manifest("m.jsonl", store=store, group="webdataset")
        assert caught.value.details["key"] == "b"
        dataset = from_manifest("m.jsonl", store=store, group="webdataset", on_torn="split")
        assert sorted(sample["__key__"] for sample in samples_of(dataset)) == ["a", "b", "b", "c", "d"]


def test_the_checks_list_all_that_is_torn(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    contents = [["a.jpg", "b.jpg", "a.cls", "c.jpg"], ["c.cls", "d.jpg", "d.jpg", "README"], ["e.jpg", "e.cls"]]
    entries = [write_shard(store, f"{i}.tar", [(name, b"x") for name in names]) for i, names in enumerate(contents)]
    _as_version_1(store, "0.tar")
    S3ExchangeStore(store).write_manifest("m.jsonl", entries)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_dataset(f"file://{tmp_path}/m.jsonl")
        shown = subprocess.run(
            [sys.executable, "-m", "s3loader", "check", f"file://{tmp_path}/m.jsonl", "--json"],
            capture_output=True,
            check=False,
        )
    assert [(place.key, place.first, place.second, place.twice) for place in found.torn] == [
        ("a", "0.tar#a.jpg", "0.tar#a.cls", False),
        ("d", "1.tar#d.jpg", "1.tar#d.jpg", True),
        ("c", "0.tar#c.jpg", "1.tar#c.cls", False),
    ]
    assert not found.ok
    assert found.left_out["without extension"].names == ("README",)
    assert shown.returncode == 6
    assert [row[0] for row in json.loads(shown.stdout)["torn"]] == ["a", "d", "c"]
    S3ExchangeStore(store).write_manifest("good.jsonl", entries[2:])
    assert check_dataset(f"file://{tmp_path}/good.jsonl").ok


def test_names_that_begin_anew_in_each_shard_are_no_tear(store: ObjectStore) -> None:
    for number in range(3):
        write_shard(store, f"{number}.tar", [("0.jpg", b"%d" % number), ("0.cls", b"x")])
    assert len(from_webdataset("{0..2}.tar", store=store)) == 3
    assert len(from_webdataset(["0.tar", "0.tar"], store=store)) == 2


def test_indexes_of_version_1_are_grouped_by_the_present_rule(store: ObjectStore) -> None:
    names = ["a.jpg", "README", "a.cls", ".DS_Store", "b.jpg", "b.cls"]
    entry = write_shard(store, "a.tar", [(name, name.encode()) for name in names])
    _as_version_1(store, "a.tar")
    S3ExchangeStore(store).write_manifest("m.jsonl", [entry])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = samples_of(from_manifest("m.jsonl", store=store, group="webdataset"))
    assert [sorted(sample) for sample in found] == [["__key__", "cls", "jpg"]] * 2


def test_loose_objects_are_grouped_by_the_same_rule(store: ObjectStore) -> None:
    for name in ("a.cls", "a.b/x.cls", "a.b/x.jpg", "a.jpg", "README", "._a.jpg", "__meta__/i.json"):
        store.put(f"p/{name}", name.encode())
    dataset = from_prefix("p/", store=store, group="webdataset")
    assert [sorted(sample) for sample in samples_of(dataset)] == [["__key__", "cls", "jpg"]] * 2
    assert "hidden" in " ".join(dataset.notes)
    torn = ["p/a.cls", "p/a.b/x.cls", "p/a.jpg"]
    with pytest.raises(FormatError, match=r"'p/a' is torn: 'p/a.cls' \(object 0\) and 'p/a.jpg' \(object 2\)"):
        from_objects(torn, store=store, group="webdataset")
    assert len(from_objects(torn, store=store, group="webdataset", on_torn="split")) == 3
    assert len(from_objects(["p/a.cls", "p/a.jpg"] * 2, store=store, group="webdataset")) == 2  # listed twice


# -- WebDataset's rule ----------------------------------------------------------------------------

NAMES = st.lists(
    st.builds(
        "".join,
        st.tuples(
            st.sampled_from(["", "d/", "d.x/", "__m__/", "./", "__m/", "d/__m__/"]),
            st.sampled_from(["a", "b", "c", "README", "__x__", "_", "ü"]),
            st.sampled_from(["", ".jpg", ".JPG", ".seg.png", ".", "..jpg", ".cls"]),
        ),
    ),
    unique=True,
    max_size=12,
)


@given(NAMES, st.booleans())
@settings(max_examples=150, deadline=None)
def test_samples_are_webdatasets(tmp_path_factory: pytest.TempPathFactory, names: list[str], lower: bool) -> None:
    folder = tmp_path_factory.mktemp("wds")
    builder = ShardBuilder()
    body = b"".join(bytes(piece) for name in names for piece in builder.add(name, name.encode()))
    built = builder.finish(None)
    (folder / "a.tar").write_bytes(built.head + body + built.tail)
    files = webdataset.tariterators.tar_file_expander([{"url": "a.tar", "stream": io.BytesIO(built.head + body + built.tail)}])
    try:
        theirs = [
            {name: value for name, value in sample.items() if name != "__url__"}
            for sample in webdataset.tariterators.group_by_keys(files, lcase=lower)
        ]
    except ValueError:  # two extensions that differ in case alone
        assert lower
        return
    dataset = open_dataset(f"file://{folder}/a.tar", group="webdataset", on_torn="split", lower_extensions=lower)
    assert samples_of(dataset) == theirs


@pytest.mark.parametrize(
    "name", [".DS_Store", "._x.jpg", "d/._x.jpg", "d/.hidden", "README", "d/LICENSE", "__m__/x.json", "./__m__/x.a"]
)
def test_what_belongs_to_no_sample_tears_none(store: ObjectStore, name: str) -> None:
    write_shard(store, "a.tar", [("d/x.jpg", b"1"), (name, b"2"), ("d/x.cls", b"3"), ("y.jpg", b"4")])
    dataset = from_webdataset("a.tar", store=store)
    assert samples_of(dataset) == [{"__key__": "d/x", "jpg": b"1", "cls": b"3"}, {"__key__": "y", "jpg": b"4"}]
    assert name in str(Loader(dataset, batch_size=1).explain())
    assert len(from_webdataset("a.tar", store=store, group=None)) == 4


def test_extensions_in_small_letters_by_option(store: ObjectStore) -> None:
    write_shard(store, "a.tar", [("x.JPG", b"1"), ("x.Seg.PNG", b"2"), ("x.cls", b"3")])
    assert sorted(samples_of(from_webdataset("a.tar", store=store))[0]) == ["JPG", "Seg.PNG", "__key__", "cls"]
    (sample,) = samples_of(from_webdataset("a.tar", store=store, lower_extensions=True))
    assert sample == {"__key__": "x", "jpg": b"1", "seg.png": b"2", "cls": b"3"}
    (sample,) = samples_of(from_webdataset("a.tar", store=store, lower_extensions=True, members=["jpg"]))
    assert sample == {"__key__": "x", "jpg": b"1"}


def test_a_mixture_names_extensions_as_its_datasets_do(store: ObjectStore) -> None:
    write_shard(store, "a.tar", [("x.JPG", b"1"), ("README", b"2")])
    write_shard(store, "b.tar", [("y.jpg", b"3")])
    first, second = (from_webdataset(key, store=store, lower_extensions=True) for key in ("a.tar", "b.tar"))
    mixed = mix_datasets([first, second])
    assert [sorted(sample) for sample in samples_of(mixed)] == [["__key__", "jpg"]] * 2
    assert "README" in str(Loader(mixed, batch_size=1).explain())
    with pytest.raises(PlanError, match="alike"):
        mix_datasets([from_webdataset("a.tar", store=store), second])


def test_samples_by_number(store: ObjectStore) -> None:
    write_shard(store, "a.tar", [(f"{i}.txt", b"%d" % i) for i in range(5)])
    S3ExchangeStore(store).write_manifest("m.jsonl", [{"kind": "file", "key": "gone", "size_bytes": 3}])  # type: ignore[list-item]
    reader = SampleReader(from_webdataset("a.tar", store=store))
    for numbers in ([1, -1, 1], np.array([1, 4, 1], dtype=np.uint8), (1, 4, -4)):
        assert [bytes(sample["txt"]) for sample in reader.read(numbers)] == [b"1", b"4", b"1"]
    assert reader.read([]) == []
    for wrong in ([1.5], ["1"], [[1]], 1):
        with pytest.raises(ConfigError, match="samples"):
            reader.read(wrong)  # type: ignore[arg-type]
    for beyond in ([5], [-6], [0, 1 << 40]):
        with pytest.raises(IndexError, match="no sample"):
            reader.read(beyond)
    with pytest.raises(ObjectNotFoundError):
        SampleReader(from_manifest("m.jsonl", store=store)).read([0])
