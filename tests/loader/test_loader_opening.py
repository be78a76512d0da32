"""What a URL, path, pattern, list or folder stands for: one meaning, or an error that lists them."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from s3loader import ObjectURL
from s3loader.errors import ConfigError, ObjectNotFoundError
from s3loader.exchange import S3ExchangeStore
from s3loader.loader import (
    Dataset,
    SampleReader,
    from_objects,
    from_prefix,
    from_webdataset,
    open_dataset,
)
from s3loader.loader.urls import expand_braces
from s3loader.store import ObjectStore, open_store
from s3loader.testing import Server, server

Make = Callable[..., tuple[str, ObjectStore]]


@pytest.fixture(params=["file", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, ObjectStore]]:
    if request.param == "file":
        url = f"file://{quote(str(tmp_path))}/data"
    elif request.param == "memory":
        url = f"memory://{tmp_path.name}/data"
    else:
        url = f"s3://{request.getfixturevalue('loader_bucket')}/data"
    with open_store(url) as store:
        yield url, store


@pytest.fixture(scope="module")
def moto() -> Iterator[Server]:
    with server("moto") as running:
        yield running


@pytest.fixture
def loader_bucket(moto: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    return moto.bucket()


def shards(store: ObjectStore, *names: str) -> None:
    """Each has four samples of two members."""
    exchange = S3ExchangeStore(store)
    for name in names:
        items: Any = [
            {"source": b"%d" % i, "member_path": f"{name.rpartition('/')[2][:-4]}-{i}.{ext}"}
            for i in range(4)
            for ext in ("txt", "cls")
        ]
        exchange.put_shard_archive(name, items, compression=None)


def objects(store: ObjectStore, *names: str) -> None:
    for name in names:
        store.put(name, name.encode())


def spellings(url: str) -> dict[str, Any]:
    """All ways to name the shards a.tar and b.tar of a folder."""
    found: dict[str, Any] = {
        "list": [f"{url}/a.tar", f"{url}/b.tar"],
        "tuple": (f"{url}/a.tar", f"{url}/b.tar"),
        "iterator": iter([f"{url}/a.tar", f"{url}/b.tar"]),
        "list of URLs": [ObjectURL.parse(f"{url}/{name}.tar") for name in "ab"],
        "braces": f"{url}/{{a,b}}.tar",
        "range": f"{url}/{{a..b}}.tar",
        "star": f"{url}/*.tar",
        "set": f"{url}/[a-b].tar",
        "question mark": f"{url}/?.tar",
        "two stars": f"{url.rpartition('/')[0]}/**.tar",
        "star in a list": [f"{url}/a*.tar", f"{url}/b.tar"],
        "joined": f"{url}/a.tar::{url}/b.tar",
        "folder/": f"{url}/",
        "folder": url,
        "URL": ObjectURL.parse(url),
    }
    if url.startswith("file://"):
        folder = Path(ObjectURL.parse(url).key)
        found |= {
            "Path": folder,
            "Path of a pattern": folder / "*.tar",
            "list of Path": [folder / "a.tar", folder / "b.tar"],
            "plain path": str(folder),
            "relative": os.path.relpath(folder),
            "relative pattern": f"{os.path.relpath(folder)}/{{a,b}}.tar",
        }
    return found


@pytest.mark.parametrize("group", ["webdataset", None])
def test_tars_however_named_are_a_dataset_of_their_samples(root: tuple[str, ObjectStore], group: Any) -> None:
    url, store = root
    shards(store, "a.tar", "b.tar")
    objects(store, ".DS_Store", "README.md", "_SUCCESS")
    for name, spelling in spellings(url).items():
        dataset = open_dataset(spelling, group=group)
        assert len(dataset) == (8 if group else 16), name
        one = SampleReader(dataset)[0]
        assert bytes(one["txt"] if group else one) == b"0", name


def test_kind_says_outright_what_is_meant(root: tuple[str, ObjectStore]) -> None:
    url, store = root
    shards(store, "a.tar", "b.tar")
    names = [f"{url}/a.tar", f"{url}/b.tar"]
    whole = store.get("a.tar")
    for dataset in (
        open_dataset(names, kind="objects"),
        from_objects(names),
        open_dataset(f"{url}/", kind="prefix"),
        open_dataset(url, kind="prefix"),
        from_prefix(url),
    ):
        assert len(dataset) == 2
        assert bytes(SampleReader(dataset)[0]) == whole
    for spelling in (names, f"{url}/", url, f"{url}/*.tar"):
        assert len(open_dataset(spelling, kind="webdataset", group="webdataset")) == 8
    assert len(from_webdataset(f"{url}/")) == 8
    with pytest.raises(ConfigError, match="one URL"):
        open_dataset(names, kind="prefix")
    objects(store, "notes.txt")
    assert len(open_dataset(url, kind="webdataset", group="webdataset")) == 8
    assert len(open_dataset(url, kind="prefix")) == 3


def test_a_folder_with_one_manifest_of_ours_is_what_it_lists(root: tuple[str, ObjectStore]) -> None:
    url, store = root
    with S3ExchangeStore(store).open_manifest_writer("train.jsonl", mode="overwrite") as writer:
        writer.put_object("x/1.txt", b"1")
        writer.put_object("x/2.txt", b"2")
    objects(store, "x/3.txt", "log.jsonl")
    for name in (url, f"{url}/", ObjectURL.parse(url)):
        assert len(open_dataset(name)) == 2
    assert len(open_dataset(url, where=lambda entry: entry["key"].endswith("2.txt"))) == 1
    S3ExchangeStore(store).write_manifest("val.jsonl", [{"kind": "file", "key": "x/3.txt"}])
    with pytest.raises(ConfigError, match=r"several manifests: .*train\.jsonl, .*val\.jsonl"):
        open_dataset(url)
    assert len(open_dataset(f"{url}/val.jsonl")) == 1


def test_a_folder_with_an_index_of_mds_shards_is_that_dataset(root: tuple[str, ObjectStore]) -> None:
    url, store = root
    store.put("train/index.json", json.dumps({"version": 2, "shards": []}).encode())
    for name in (f"{url}/train", f"{url}/train/", f"{url}/train/index.json"):
        assert len(open_dataset(name)) == 0
    objects(store, "train/shard.00000.mds")
    with pytest.raises(ConfigError, match="datasets of their own") as caught:
        open_dataset(url)
    assert "shard.00000.mds" in str(caught.value)
    assert len(open_dataset(url, kind="prefix")) == 2
    store.put("train/index.json", b"{}")
    assert len(open_dataset(f"{url}/train/index.json")) == 1  # an object like any other


def test_a_name_without_slash_never_takes_a_sibling(root: tuple[str, ObjectStore]) -> None:
    url, store = root
    objects(store, "fashion/1.txt", "fashion/2.txt", "fashion2/3.txt", "fashion.txt")
    for dataset in (open_dataset(f"{url}/fashion"), from_prefix(f"{url}/fashion"), open_dataset(f"{url}/fashion/")):
        assert len(dataset) == 2
    assert len(open_dataset(f"{url}/fashion.txt")) == 1
    if not url.startswith("file://"):
        with pytest.raises(ConfigError, match=r"there is no folder .*/fash/, but .*fashion"):
            open_dataset(f"{url}/fash")
        assert len(open_dataset(f"{url}/fash", kind="prefix")) == 4
        with pytest.raises(ObjectNotFoundError):
            open_dataset(f"{url}/nothing")
    assert len(open_dataset(f"{url}/fash**")) == 4
    assert len(open_dataset(f"{url}/fashion*")) == 1  # one star stays in its folder
    with pytest.raises(ObjectNotFoundError, match="nothing matches"):
        open_dataset(f"{url}/nothing*")


def test_keys_of_an_open_store_are_taken_alike(root: tuple[str, ObjectStore]) -> None:
    _, store = root
    shards(store, "t/a.tar", "t/b.tar")
    objects(store, "fashion/1.txt", "fashion2/3.txt")
    for name in ("t", "t/", "t/*.tar", "t/{a,b}.tar", ["t/a.tar", "t/b.tar"]):
        assert len(open_dataset(name, store=store, group="webdataset")) == 8
    assert len(open_dataset("fashion", store=store)) == 1


@pytest.mark.parametrize(
    "names", [["a.tar", "x.txt"], ["a.tar", "m.jsonl"], ["m.jsonl", "m.jsonl"], ["x/", "y/"], ["x.txt", "x/"]]
)
def test_a_list_of_different_things_is_an_error_that_lists_the_choices(names: list[str]) -> None:
    with open_store("memory://opening-mixed") as store, pytest.raises(ConfigError, match="names") as caught:
        open_dataset(names, store=store)
    for kind in ("webdataset", "prefix", "objects", "manifest", "mds"):
        assert f'"{kind}"' in str(caught.value.hint)


def test_a_folder_of_different_things_is_an_error_that_lists_the_choices(root: tuple[str, ObjectStore]) -> None:
    url, store = root
    shards(store, "a.tar")
    objects(store, "photo.jpg")
    with pytest.raises(ConfigError, match=r"1 tar shards and 1 other objects \(.*photo\.jpg\)") as caught:
        open_dataset(url)
    assert 'kind="webdataset"' in str(caught.value.hint)
    assert len(open_dataset(f"{url}/*.jpg")) == 1


@pytest.mark.parametrize(
    "bad", [3, None, [1, 2], [{"url": "a"}], {"a.tar": 1}, {"a.tar", "b.tar"}, b"a.tar", [b"a.tar"], object()]
)
@pytest.mark.parametrize("opener", [open_dataset, from_objects, from_webdataset])
def test_what_is_no_url_never_becomes_one(bad: Any, opener: Callable[..., Dataset]) -> None:
    with pytest.raises(ConfigError) as caught:
        opener(bad)
    assert caught.value.hint


def test_a_table_is_no_list_of_urls() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"url": ["a.txt", "b.txt"]})
    with pytest.raises(ConfigError, match="DataFrame"):
        open_dataset(table)
    assert len(open_dataset(table["url"], store=open_store("memory://table"))) == 2


def test_names_with_marks_of_patterns_can_be_told_from_patterns(root: tuple[str, ObjectStore]) -> None:
    url, store = root
    shards(store, "x[1].tar", "x1.tar", "{a,b}.tar", "50%25.tar", "a::b.tar")
    assert len(open_dataset(f"{url}/x[1].tar")) == 16  # the key itself, and what it matches
    assert len(open_dataset(f"{url}/x\\[1\\].tar")) == 8
    assert len(open_dataset(f"{url}/\\{{a\\,b\\}}.tar")) == 8
    assert len(open_dataset(f"{url}/a\\::b.tar")) == 8
    assert len(open_dataset(url)) == 40
    if url.startswith("file://"):
        assert len(open_dataset(f"{url}/50%2525.tar")) == len(open_dataset(f"{url}/50%2525.ta*")) == 8
        assert len(open_dataset(f"{url}/x%5B1%5D.ta?")) == 8
        assert len(open_dataset(Path(ObjectURL.parse(url).key) / "50%25.tar")) == 8


def test_a_manifest_in_a_folder_whose_name_is_percent_encoded(tmp_path: Path) -> None:
    folder = tmp_path / "dt=00%3A00" / "%2E%2E"
    folder.mkdir(parents=True)
    with open_store(folder) as store, S3ExchangeStore(store).open_manifest_writer("m.jsonl", mode="overwrite") as writer:
        writer.put_object("1.txt", b"1")
    for name in (folder, folder / "m.jsonl", str(folder / "m.jsonl"), (folder / "m.jsonl").as_uri()):
        assert bytes(SampleReader(open_dataset(name))[0]) == b"1"


# -- braces: bash itself is the judge --------------------------------------------------------------

ODD = (
    r"{a..{1,2}} {a},b} {},b} x{},b} {+1..3} {1..3..0} {1..3..x} {a..c..2} {c..a} {-05..5..5} {{a,b} {a,b}} {a{b,c}} "
    r"{1..2..3..4} {a..b {a\,b} {1..} {..1} a{b}c{d,e} {a,b\} {1..2}{a,b} {a..cc} {0..05} {01..5..2} {1..05..002} {{1..3},x} "
    r"{1...3} {1..3}.{x {a,b}..{c} {-1..-3} {3..1..-1} {1..3..-1} {a,{b,c} {a,b}{ }{a,b} {a..}b,c} {a,b{1..2}} {08..11} "
    r"train-{000..002}.tar {train,val-{0..2}}/{a..c}.tar \{a,b\} {A..C} {1..10..4} {10..1..4} {-2..2} {,x} {x,} {,}"
)
TOKENS = ["{", "}", ",", "..", "a", "b", "1", "3", "-1", "05", r"\{", r"\}", r"\,", "{1..3}", "{a,b}", "x", "/", ".", "{", "}"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is the judge")
def test_braces_expand_exactly_as_in_bash() -> None:
    rng = random.Random(10)
    patterns = [*ODD.split(), *("".join(rng.choices(TOKENS, k=rng.randint(1, 9))) for _ in range(3000))]
    patterns = [f"{start}{pattern}" for pattern in patterns for start in ("", "p")]
    script = "set -f\n" + "\n".join(f"printf '%s\\t' {pattern}; echo" for pattern in patterns)
    lines = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True).stdout.split("\n")
    for pattern, line in zip(patterns, lines, strict=False):
        expected = line.split("\t")[:-1]
        found = [name for name in expand_braces(pattern) if name]  # bash drops empty words
        assert found == [name for name in expected if name], pattern


@pytest.mark.parametrize("pattern", ["{0..99999999}", "{1..99999}{1..99999}", "{a,b}" * 60, "{1..9}{0..1000000000000000000}"])
def test_a_pattern_that_stands_for_too_much_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="more than"):
        expand_braces(pattern)


@pytest.mark.parametrize("opened", [open_dataset, from_prefix])
def test_a_local_folder_that_is_not_there_is_named(tmp_path: Path, opened: Callable[..., Any]) -> None:
    for name in (f"{tmp_path}/none", f"{tmp_path}/none/", (tmp_path / "none").as_uri()):
        with pytest.raises(ObjectNotFoundError, match="no such folder"):
            opened(name)
    (tmp_path / "empty").mkdir()
    assert len(opened(str(tmp_path / "empty"))) == 0
