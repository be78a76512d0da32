"""The constructors and keywords that the datasets of all frameworks share."""

import inspect
import sys
from dataclasses import fields
from typing import get_type_hints

import pytest

from s3loader import config, open_store
from s3loader.adapters import StoreKeywords
from s3loader.errors import ConfigError
from s3loader.loader import FromSources, LoaderKeywords, LoaderOptions, SourceKeywords, open_dataset, open_source
from s3loader.testing import write_sharded_dataset


class Opened(FromSources):
    object_defaults = {"shuffle": "none"}  # noqa: RUF012 - as the adapters have it

    def __init__(self, dataset, **options):
        self.dataset, self.rest = open_source(dataset, options)


@pytest.fixture
def store():
    store = open_store("memory://constructors")
    write_sharded_dataset(store, ((f"{i}.bin", b"x" * i) for i in range(5)), per_shard=3)
    yield store
    for meta in list(store.list("")):
        store.delete(meta.key)


def test_each_constructor_opens_with_its_own_options_and_leaves_the_rest(store):
    shards = sorted(meta.key for meta in store.list("") if meta.key.endswith(".tar"))
    made = Opened.from_manifest("manifest.jsonl", store=store, where=lambda entry: entry["member_path"] != "3.bin", seed=4)
    assert (type(made), len(made.dataset), made.rest) == (Opened, 4, {"seed": 4})
    assert len(Opened.from_webdataset(shards, store=store, group=None).dataset) == 5
    assert Opened.from_webdataset(shards, store=store).dataset.group == "webdataset"
    assert Opened.from_objects(shards, store=store).rest == {"shuffle": "none"}
    assert Opened.from_objects(shards, store=store, shuffle="full").rest == {"shuffle": "full"}
    assert len(Opened.from_prefix(shards[0], store=store, batch_size=2).dataset) == 1


def test_what_cannot_be_meant_is_refused(store):
    dataset = open_dataset("manifest.jsonl", store=store)
    with pytest.raises(ConfigError, match="open already"):
        Opened(dataset, region="us-east-1")
    for refused in ({"where": lambda entry: True}, {"index_dir": "/tmp"}):
        with pytest.raises(ConfigError, match=f"{next(iter(refused))}: this kind of dataset"):
            Opened.from_prefix("shards/", store=store, **refused)
    with pytest.raises(ConfigError, match="group"):
        Opened.from_mds("mds", store=store, group="webdataset")


def test_keywords_are_the_fields_and_parameters_they_stand_for():
    options = get_type_hints(LoaderOptions)
    declared = get_type_hints(LoaderKeywords)
    assert set(declared) == {field.name for field in fields(LoaderOptions)} - {"batch_size"}
    assert {name: hint for name, hint in declared.items() if hint != options[name]} == {"shuffle": options["shuffle"] | bool}
    names = {**vars(sys.modules[open_store.__module__]), "S3Settings": config.S3Settings}
    parameters = get_type_hints(open_store, names)
    assert get_type_hints(StoreKeywords, None, names) == {k: v for k, v in parameters.items() if k not in ("url", "return")}
    taken = inspect.signature(open_dataset).parameters.keys() - {"url", "store_options"}
    assert SourceKeywords.__optional_keys__ == taken | StoreKeywords.__optional_keys__


@pytest.mark.parametrize(("given", "meant"), [(True, "block"), (False, "none"), ("full", "full")])
def test_shuffle_may_be_yes_or_no(given, meant):
    assert LoaderOptions.of({"batch_size": 1, "shuffle": given}).shuffle == meant
