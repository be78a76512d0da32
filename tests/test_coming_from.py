"""What docs/coming-from.md and docs/migrating-checkpoints.md say, done: each case names words of a page, and does it."""

from __future__ import annotations

import inspect
import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

import s3loader.torch as ours
from s3loader import S3ExchangeStore, ShardSizePolicy, StoreOptions, mix_datasets, open_dataset, open_store
from s3loader.checkpoint import CheckpointManager
from s3loader.errors import S3LoaderError, StateMismatchError
from s3loader.loader import LoaderOptions, from_mds
from s3loader.torch import S3DataLoader, S3IterableDataset, S3MapDataset

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = [DOCS / "coming-from.md", DOCS / "migrating-checkpoints.md"]
PAGE = re.sub(r"\s+", " ", "".join(page.read_text() for page in PAGES))

Claim = Callable[[Path], None]
CLAIMS: dict[str, Claim] = {}


def says(*words: str) -> Callable[[Claim], Claim]:
    """The claim that these words of the page make."""

    def keep(function: Claim) -> Claim:
        for some in words:
            assert some not in CLAIMS
            CLAIMS[some] = function
        return function

    return keep


def jpeg(mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (4, 3)).save(file, "jpeg")
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> str:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def shard(folder: Path, count: int = 10, name: str = "a.tar") -> str:
    members: dict[str, bytes] = {}
    for i in range(count):
        parts = {"jpg": jpeg(), "cls": b"%d" % i, "json": b'{"i": %d}' % i, "txt": b"word", "pyd": b"pickle"}
        members |= {f"{i:03d}.{extension}": data for extension, data in parts.items()}
    return tar(folder / name, members)


def first(urls: Any, **options: Any) -> Any:
    return next(iter(S3IterableDataset.from_webdataset(urls, shuffle="none", **options)))


@says('`decode={"jpg": "pil", "cls": "int", "json": "json"}`: what is not named stays bytes, labels too')
def _(folder: Path) -> None:
    url = shard(folder)
    sample = first(url, decode={"jpg": "pil", "cls": "int", "json": "json"})
    assert (sample["jpg"].mode, sample["cls"], sample["json"]) == ("RGB", 0, {"i": 0})
    assert bytes(sample["txt"]) == b"word"
    theirs = next(
        iter(
            wds.WebDataset(url, shardshuffle=False).decode("pil", handler=wds.ignore_and_continue, only=["jpg", "cls", "json"])
        )
    )
    assert (theirs["jpg"].mode, theirs["cls"], theirs["json"]) == ("RGB", 0, {"i": 0})
    assert first(url, decode={"jpg": "pil"})["cls"] in (b"0", np.frombuffer(b"0", np.uint8))


@says('`decode="auto"`: images become arrays too, grey ones of two dimensions; pickles (`pyd`, `pth`) stay bytes')
def _(folder: Path) -> None:
    sample = first(shard(folder), decode="auto")
    assert (tuple(sample["jpg"].shape), sample["cls"], sample["txt"], bytes(sample["pyd"])) == ((3, 4, 3), 0, "word", b"pickle")
    grey = first(tar(folder / "g.tar", {"a.jpg": jpeg("L")}), decode="auto")
    assert tuple(grey["jpg"].shape) == (3, 4)


@says('`members=["jpg", "cls"]` reads only these', "`transform=f`, called with the dict")
def _(folder: Path) -> None:
    names = first(shard(folder), members=["jpg", "cls"], transform=lambda sample: sorted(sample))
    assert [name for name in names if name != "__key__"] == ["cls", "jpg"]


@says(
    "Extensions keep their case, unless you say `lower_extensions=True`",
    "Members without extension, hidden ones and those called `__name__` are left out",
)
def _(folder: Path) -> None:
    members = {"a.JPG": b"1", "a.cls": b"2", "README": b"3", "._a.jpg": b"4", "__meta__/b.txt": b"", "__x__": b"5"}
    url = tar(folder / "a.tar", members)
    dataset = S3IterableDataset.from_webdataset(url, shuffle="none", return_type="bytes")
    [sample] = dataset
    assert {"JPG", "cls"} == set(sample) - {"__key__"}
    assert {"jpg", "cls"} == set(first(url, lower_extensions=True)) - {"__key__"}
    assert {"jpg", "cls"} <= set(next(iter(wds.WebDataset(url, shardshuffle=False))))


@says(
    '`sample["__key__"]`, `loader.where(position).shard`',
    "There is no simulator (`loader.explain()` tells requests, bytes and memory beforehand)",
)
def _(folder: Path) -> None:
    for name in ("a.tar", "b.tar"):
        shard(folder, 10, name)
    urls = f"{folder}/{{a,b}}.tar"
    loader = S3DataLoader(urls, group="webdataset", batch_size=4, shuffle="none", on_break="again", return_type="bytes")
    keys = [sample["__key__"] for batch in loader for sample in batch]
    assert len(keys) == 20
    assert [loader.where(i, epoch=0).shard.rpartition("/")[2] for i in range(20)] == ["a.tar"] * 10 + ["b.tar"] * 10
    told = loader.explain()
    assert (told.samples, told.steps) == (20, 5)
    assert min(told.requests, told.bytes_fetched, told.peak) > 0


@says("requester_pays=)` as `s3client_config=`", "store_options=StoreOptions(max_attempts=, unsigned=, requester_pays=)`")
def _(folder: Path) -> None:
    assert StoreOptions(max_attempts=3, unsigned=True, requester_pays=True).requester_pays
    assert "Requester-pays buckets are not supported" not in PAGE


@says(
    "Gzip shards are refused.",
    "`http(s):` and `pipe:` sources are not read.",
    "| [WebDataset](#webdataset): `.tar.gz` | write them again",
)
def _(folder: Path) -> None:
    zipped = tar(folder / "a.tar.gz", {"a.txt": b"1"}, "w:gz")
    for url in (zipped, "http://localhost/a.tar", "https://localhost/a.tar", "pipe:cat a.tar"):
        with pytest.raises(S3LoaderError):
            list(S3IterableDataset.from_webdataset(url))


@says("`a-{000..146}.tar`, `a.tar::b.tar` | the same")
def _(folder: Path) -> None:
    for name in ("a-000.tar", "a-001.tar"):
        shard(folder, 3, name)
    braces, colons = f"{folder}/a-{{000..001}}.tar", f"{folder}/a-000.tar::{folder}/a-001.tar"
    assert len(list(S3IterableDataset.from_webdataset(braces))) == len(list(S3IterableDataset.from_webdataset(colons))) == 6


@says("the index is kept beside the shard, or in `index_dir`")
def _(folder: Path) -> None:
    open_dataset(shard(folder), group="webdataset")
    assert len(list(folder.iterdir())) == 2


@says("nobody's saved loader state can be loaded here")
def _(folder: Path) -> None:
    loader = S3DataLoader(shard(folder), group="webdataset", batch_size=2)
    for state in ({"epoch": 0, "sample_in_epoch": 5, "num_canonical_nodes": 1}, {"dataset": {"num_samples_yielded": 3}}):
        with pytest.raises(StateMismatchError):
            loader.load_state_dict(state)


@says('`on_error="skip"`, or `"replace"`, which keeps the counts')
def _(folder: Path) -> None:
    url = tar(folder / "a.tar", {f"{i}.json": b"{" if i == 3 else b"{}" for i in range(10)})
    counts = {
        how: len(list(S3IterableDataset.from_webdataset(url, decode="auto", on_error=how))) for how in ("skip", "replace")
    }
    assert counts == {"skip": 9, "replace": 10}


@says("`mix_datasets(datasets, weights=probs)`", 'mix_datasets(datasets, weights=, length="all")`, or `"first"`')
def _(folder: Path) -> None:
    datasets = [open_dataset(shard(folder, count, f"{count}.tar"), group="webdataset") for count in (4, 12)]
    sizes = {
        length: len(list(S3IterableDataset(mix_datasets(datasets, weights=[0.5, 0.25], length=length))))
        for length in ("all", "first", 6)
    }  # type: ignore[arg-type]
    assert sizes[6] == 6
    assert sizes["first"] < sizes["all"]


@says("ShardSizePolicy(max_samples=, max_bytes=)", 'add_sample(key, {"jpg": ...})`')
def _(folder: Path) -> None:
    policy = ShardSizePolicy(max_samples=2, max_bytes="1MiB")
    with S3ExchangeStore(str(folder)).open_manifest_writer("m.jsonl", shard_size=policy, group="webdataset") as writer:
        for i in range(4):
            writer.add_sample(f"{i}", {"jpg": jpeg()})
    written = sorted(str(path) for path in folder.rglob("*.tar"))
    assert len(written) == 2
    assert [sample["__key__"] for sample in wds.WebDataset(written, shardshuffle=False)] == ["0", "1", "2", "3"]


@says(
    '`S3MapDataset.from_prefix(url, return_type="bytes")`',
    "use `open_store(url).get_range(key, start, end)`",
    "The prefix is listed when the dataset is made",
)
def _(folder: Path) -> None:
    store = open_store(str(folder))
    store.put("k", b"0123456789")
    dataset = S3MapDataset.from_prefix(f"{folder}/", return_type="bytes")
    store.put("l", b"later")
    assert (len(dataset), dataset[0]) == (1, b"0123456789")
    assert bytes(store.get_range("k", 2, 5)) == b"234"


@says("OCI, Databricks, Hugging Face and SFTP sources are not read.")
def _(folder: Path) -> None:
    for url in ("oci://b/k", "dbfs:/b/k", "hf://datasets/a/b", "sftp://host/a"):
        with pytest.raises(S3LoaderError):
            open_dataset(url)


@says("What only pickle could save (lambdas, your own classes without `state_dict()`) is refused with its path.")
def _(folder: Path) -> None:
    with CheckpointManager(folder) as manager, pytest.raises(S3LoaderError, match="the_lambda"):
        manager.save(1, {"the_lambda": lambda: 0}).result(600)


@says(
    "`prefix_strategy`, `single_file_per_rank`, `sync_files` and the like have no use here: they are refused with the reason."
)
def _(folder: Path) -> None:
    for name in ("prefix_strategy", "single_file_per_rank", "sync_files"):
        with pytest.raises(S3LoaderError, match=name) as caught:
            ours.S3StorageWriter(str(folder), **{name: True})
        assert caught.value.hint


@pytest.mark.filterwarnings("ignore:.*unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")  # of webdataset
@pytest.mark.parametrize("words", CLAIMS)
def test_the_page_says_it_and_it_is_so(words: str, tmp_path: Path) -> None:
    assert re.sub(r"\s+", " ", words) in PAGE
    CLAIMS[words](tmp_path)


def test_every_option_on_the_pages_exists() -> None:
    """What stands as ``name=`` in our column of a table."""
    from s3loader.exchange import WriterKeywords
    from s3loader.loader import AdapterKeywords
    from s3loader.torch import S3StorageWriter

    known: set[str] = set()
    for typed in (AdapterKeywords, WriterKeywords):
        known |= typed.__optional_keys__ | typed.__required_keys__
    loaders = (S3IterableDataset, S3DataLoader, S3MapDataset, mix_datasets, LoaderOptions, from_mds)
    manager = (CheckpointManager, CheckpointManager.save, CheckpointManager.restore, S3StorageWriter)
    for called in (*loaders, *manager, StoreOptions, ShardSizePolicy):
        known |= set(inspect.signature(called).parameters)
    known |= {"s3client_config", "store_options", "save_freq"}  # of the torch datasets, and Keras's own
    for page in ("coming-from.md", "migrating-checkpoints.md"):
        for line in (DOCS / page).read_text().splitlines():
            cells = line.strip("| ").split(" | ")
            if line.startswith("| `") and len(cells) == 2:
                names = set(re.findall(r"\b([a-z_]+)=", cells[1]))
                assert names <= known, (page, line, names - known)


def test_what_the_torch_facade_is_said_to_have_is_there() -> None:
    names = set(re.findall(r"\bS3[A-Z]\w+", (DOCS / "coming-from.md").read_text()))
    theirs = {"S3Reader", "S3ClientConfig", "S3ReaderConstructor", "S3ExchangeStore", "S3LightningCheckpoint"}
    assert [name for name in sorted(names - theirs) if not hasattr(ours, name)] == []
