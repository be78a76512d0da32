"""Every public entry holds its arguments against their types when it is called, and names what is wanted."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import s3loader
from s3loader import arguments
from s3loader.checkpoint import CheckpointManager, CheckpointOptions, LatestN
from s3loader.errors import ConfigError, S3LoaderError
from s3loader.exchange import ManifestWriterConfig, ShardSizePolicy
from s3loader.loader import Loader, LoaderOptions, from_objects, open_dataset
from s3loader.store import StoreOptions, open_store

FACADES = {"s3loader": None, "s3loader.torch": "torch", "s3loader.tensorflow": "tensorflow", "s3loader.jax": "jax"}
FACADES |= {"s3loader.lightning": "lightning"}

MADE_BY_US = {
    "Batch", "Capabilities", "CommonPrefix", "DeleteFailure", "Explanation", "GCReport", "KeepPolicy", "LoaderStats", "Mixture",
    "ObjectMeta", "OpEvent", "OpenCheckpoint", "Place", "PutResult", "Ragged", "SaveResult", "ShardIndex", "StepInfo",
    "WriterProgress", "Dataset.__init__", "RaggedTensor", "S3Reader",
}  # fmt: skip
"""What functions return or pass on: not made by callers."""
INNER = {"Dataset.has_layout", "Dataset.keep_layouts", "Dataset.load_layouts", "Dataset.layouts",
         "Dataset.layout", "Dataset.locate", "Dataset.keys", "Dataset.sample_key", "Dataset.choose",
         "Dataset.plan", "Dataset.check_spec", "S3BackupAndRestore", "S3StateCallback", "S3StorageReader", "S3StorageWriter",
         "S3CheckpointIO"}  # fmt: skip
"""Called by loaders for each batch, or (all but the constructors) by the framework."""
ELSEWHERE = {
    "AsyncObjectStore": "the verbs of ObjectStore, which check, run in threads",
    "ByteRange": "checks itself: tests/core/test_foundations.py",
    "ReadRequest": "checked where it is used: below",
    "PutRequest": "checked where it is used: below",
    "Update": "checked as a put mode",
    "ObjectURL.parse": "tests/core/test_urls.py",
    "S3Settings": "checks itself, without repeating a secret: tests/store/test_config.py",
    "PerRank": "any value",
    "ArrayShard": "numbers of a box, checked against its array",
}


class Wrong:
    """Of no type that anything takes."""


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every function, constructor and method that stands in a facade."""
    seen = set()
    for facade, framework in FACADES.items():
        if framework is not None and importlib.util.find_spec(framework) is None:
            continue
        module = importlib.import_module(facade)
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                yield name, thing
            if not isinstance(thing, type) or issubclass(thing, BaseException) or typing.is_typeddict(thing):
                continue
            if getattr(thing, "_is_protocol", False) or thing in seen:
                continue
            seen.add(thing)
            for attribute, member in vars(thing).items():
                function = getattr(member, "__func__", member)
                if inspect.isfunction(function) and (attribute == "__init__" or not attribute.startswith("_")):
                    yield f"{name}.{attribute}", function


def exempt(name: str) -> bool:
    cls, _, method = name.partition(".")
    if cls in INNER and method == "__init__":
        return name == "S3StateCallback.__init__"
    return any(part in MADE_BY_US | INNER | ELSEWHERE.keys() for part in (cls, name))


def takes_something(function: Callable[..., Any]) -> bool:
    return any(name not in ("self", "cls") for name in inspect.signature(function).parameters)


def test_every_public_callable_is_checked() -> None:
    loose = [
        name
        for name, function in public()
        if takes_something(function) and not exempt(name) and function.__code__.co_filename != arguments.__file__
    ]
    assert not loose, f"put @checked on {loose}, or say above where it is checked"


GOOD: Mapping[str, Any] = {
    "url": "memory://arguments", "manifest": "m.jsonl", "urls": "memory://arguments/a.tar", "key": "k", "keys": ["k"],
    "dataset": "memory://arguments/", "source": "memory://arguments/", "batch_size": 4, "step": 1, "items": {}, "name": "n",
    "prefix": "p", "manifest_key": "m.jsonl", "archive_key": "a.tar", "template": "t", "ranges": [], "start": 0, "end": 1,
    "requests": [], "data": b"", "target": "t", "local_path": "p", "local_dir": "p", "entries": [], "shard_items": [],
    "shard_entries": [], "prefix_filter": "p", "src_manifest_key": "m", "dst_manifest_key": "m", "folder": "f", "position": 0,
    "state": {}, "epoch": 0, "n": 1, "metric": "loss", "datasets": [], "bucket": "b", "member_path": "m", "state_dict": {},
}  # fmt: skip


def cases() -> Iterator[tuple[str, Callable[..., Any], str]]:
    for name, function in public():
        if exempt(name) or function.__code__.co_filename != arguments.__file__:
            continue
        for parameter, kind in arguments._Signature(inspect.unwrap(function)).named.items():
            if kind is not None:
                yield f"{name}({parameter}=)", function, parameter


def told_of(function: Callable[..., Any], parameter: str) -> str:
    """What a call says whose one wrong argument is `parameter`. `self` is never touched: the check comes first, so that an
    object without anything will do."""
    inner = inspect.signature(function).parameters
    given: dict[str, Any] = {parameter: Wrong()}
    for name, other in inner.items():
        needed = other.default is other.empty and other.kind not in (other.VAR_KEYWORD, other.VAR_POSITIONAL)
        if needed and name not in (parameter, "self", "cls"):
            given[name] = GOOD.get(name)
    first = [object()] if next(iter(inner), "") in ("self", "cls") else []
    try:
        function(*first, **given)
    except ConfigError as error:
        named = f"{parameter} cannot be" in error.message or any(f"{name} cannot be None" in error.message for name in given)
        return "" if named and " takes " in str(error.hint) else f"says {error}"
    except Exception as error:  # noqa: BLE001 - it is what the test is about
        return f"is {type(error).__name__}: {error}"
    return "is taken"


def test_a_wrong_type_is_named_before_anything_is_done() -> None:
    found = [(name, told_of(function, parameter)) for name, function, parameter in cases()]
    assert len(found) > 500
    assert not [f"{name} {told}" for name, told in found if told]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Loader(from_objects([], store=STORE), batch_size=4, drop_last=True), ['tail="drop"']),  # type: ignore[call-arg]
        (lambda: Loader(from_objects([], store=STORE), batch_size=4, collate_fn=list), ["collate="]),  # type: ignore[call-arg]
        (lambda: Loader(from_objects([], store=STORE), batch_size=4, num_workers=2), ["workers="]),  # type: ignore[call-arg]
        (lambda: Loader(from_objects([], store=STORE), batch_size=4, prefetch_factor=2), ["prefetch="]),  # type: ignore[call-arg]
        (lambda: Loader(from_objects([], store=STORE), batch_sise=4), ["batch_size="]),  # type: ignore[call-arg]
        (lambda: Loader(from_objects([], store=STORE), batch_size=4, shufle=True), ["shuffle="]),  # type: ignore[call-arg]
        (lambda: LoaderOptions.of({"batch_size": 4, "drop_last": True}), ["tail="]),
        (lambda: LoaderOptions(batch_size=4, drop_last=True), ["tail="]),  # type: ignore[call-arg]
        (lambda: CheckpointManager("memory://a", max_to_keep=3), ["keep=3"]),  # type: ignore[call-arg]
        (lambda: CheckpointManager("memory://a", save_top_k=3), ["BestN"]),  # type: ignore[call-arg]
        (lambda: CheckpointManager("memory://a", part_sise="8MiB"), ["hint: "]),  # type: ignore[call-arg]
        (lambda: CheckpointManager("memory://a", incremental=True), ["CheckpointOptions(incremental="]),  # type: ignore[call-arg]
        (lambda: CheckpointOptions(part_sise="8MiB"), ["part_size="]),  # type: ignore[call-arg]
        (lambda: StoreOptions(max_retries=3), ["max_attempts="]),  # type: ignore[call-arg]
        (lambda: open_store("memory://a", max_retries=3), ["StoreOptions(max_attempts="]),  # type: ignore[call-arg]
        (lambda: open_store("memory://a", endpoint="http://x"), ["endpoint_url="]),  # type: ignore[call-arg]
        (lambda: open_store("memory://a", aws_access_key_id="x"), ["access_key_id="]),  # type: ignore[call-arg]
        (lambda: open_dataset("memory://a/", indx_dir="x"), ["index_dir="]),  # type: ignore[call-arg]
        (lambda: ShardSizePolicy(maxsize=3), ["max_bytes="]),  # type: ignore[call-arg]
        (lambda: ManifestWriterConfig(maxcount=3), ["shard_size="]),  # type: ignore[call-arg]
        (lambda: s3loader.S3Settings.load(endpoint="http://x"), ["endpoint_url="]),
    ],
)
def test_an_unknown_option_names_the_nearest_one_and_the_frameworks_word(call: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ConfigError, match="unknown option") as caught:
        call()
    assert all(word in str(caught.value) for word in words)


STORE = open_store("memory://arguments")


def test_what_is_obvious_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CheckpointManager(STORE, keep=3).keep == LatestN(3)
    assert CheckpointManager(STORE, keep=np.int64(3)).keep == LatestN(3)  # type: ignore[arg-type]
    assert type(LatestN(np.int32(2)).n) is int  # type: ignore[arg-type]
    for number in (np.int64(4), np.uint8(4)):
        loader = Loader(from_objects([], store=STORE), batch_size=number, seed=number, rank=np.int16(0))  # type: ignore[arg-type]
        assert type(loader.options.batch_size) is int
    assert StoreOptions(max_attempts=np.int64(3), unsigned=np.True_).unsigned is True  # type: ignore[arg-type]
    assert STORE.get_ranges("k", np.empty((0, 2), dtype=np.int64)) == [] if STORE.put("k", b"1") else None  # type: ignore[arg-type]
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("~/cache", Path("~/cache"), tmp_path / "cache"):
        assert LoaderOptions(batch_size=1, cache_dir=folder).cache_dir == str(tmp_path / "cache")
        assert CheckpointOptions(node_cache=folder).node_cache == str(tmp_path / "cache")
        assert from_objects([], store=STORE).index_dir is None
    with CheckpointManager(Path("~/run")) as manager:
        manager.save(0, {"a": 1}).result()
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("path", [Path("s3://bucket/folder"), "s3://bucket/folder"])
def test_a_url_where_a_local_folder_is_wanted_is_refused(path: Any) -> None:
    for make in (
        lambda: LoaderOptions(batch_size=1, cache_dir=path),
        lambda: CheckpointOptions(node_cache=path),
        lambda: open_store("memory://a", ca_bundle=path),
        lambda: s3loader.from_webdataset([], store=STORE, index_dir=path),
        lambda: s3loader.S3Settings(ca_bundle=path),
    ):
        with pytest.raises(ConfigError, match="local path"):
            make()


def test_secrets_of_a_wrong_type_are_not_repeated() -> None:
    for make in (
        lambda: open_store("memory://a", secret_access_key=b"hunter2"),  # type: ignore[arg-type]
        lambda: s3loader.S3Settings(aws_session_token=b"hunter2"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError) as caught:
            make()
        assert "hunter2" not in f"{caught.value!r} {caught.value}"


@pytest.mark.parametrize(
    "request_of",
    [
        lambda: s3loader.ReadRequest(3),  # type: ignore[arg-type]
        lambda: s3loader.ReadRequest("k", "0"),  # type: ignore[arg-type]
        lambda: s3loader.ReadRequest("k", 0, 1.5),  # type: ignore[arg-type]
        lambda: s3loader.ReadRequest("k", if_match=3),  # type: ignore[arg-type]
        lambda: s3loader.ReadRequest("k", into=3),
        lambda: s3loader.ReadRequest("k", into=b"123"),
    ],
)
@pytest.mark.parametrize("url", ["memory://arguments", "file"])
def test_a_request_of_wrong_parts_is_refused_where_it_is_used(request_of: Callable[[], Any], url: str, tmp_path: Path) -> None:
    store = open_store(tmp_path if url == "file" else url)
    store.put("k", b"0123456789")
    with pytest.raises(S3LoaderError):
        list(store.read_many([request_of()]))


def test_the_async_twin_checks_as_well() -> None:
    async def wrong() -> None:
        await STORE.aio.get(Wrong())  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="key cannot be"):
        asyncio.run(wrong())


def test_checks_see_through_all_kinds_of_annotations() -> None:
    @arguments.checked
    def take(
        text: str = "", several: typing.Sequence[tuple[int, int]] = (), choice: typing.Literal["a", "b"] = "a",
        number: float | str = 0, table: Mapping[str, int] | None = None, flag: bool = False, function: Callable[..., Any] = max,
        *rest: int, **more: int,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Documented."""
        return text, several, choice, number, flag, rest, more

    assert take("a", [(0, 1)], np.str_("b"), np.float32(1.5), {"a": 1}, np.False_, min, np.int8(1), x=np.int8(2)) == (
        "a", [(0, 1)], "b", 1.5, False, (1,), {"x": np.int8(2)},
    )  # fmt: skip
    assert take.__doc__ == "Documented."
    for wrong in (
        {"text": 1}, {"several": "ab"}, {"several": [(0, "1")]}, {"several": [(0, 1, 2)]}, {"several": {0: 1}}, {"choice": "c"},
        {"number": True}, {"number": [1]}, {"number": np.ones(2)}, {"table": {"a": "b"}}, {"table": [("a", 1)]}, {"flag": 1},
        {"function": "max"}, {"several": iter([])},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"take: {next(iter(wrong))} cannot be"):
            take(**wrong)
    with pytest.raises(ConfigError, match="argument 8 cannot be"):
        take("", (), "a", 0, None, False, max, "x")
    with pytest.raises(TypeError):
        arguments.checked(lambda x: x)()


@pytest.mark.skipif(sys.flags.optimize > 0, reason="needs docstrings")
def test_checked_functions_look_like_themselves() -> None:
    assert inspect.signature(open_dataset).parameters["kind"].default == "auto"
    assert open_dataset.__name__ == "open_dataset"
    assert inspect.getdoc(Loader.where)
