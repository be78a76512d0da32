"""The list of samples that were left out: kept where it is asked for, whole, readable, usable."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from html.parser import HTMLParser

import pytest

from s3loader import open_store
from s3loader.errors import AccessDeniedError, ConfigError, FormatError
from s3loader.loader import Loader, Quarantine, Quarantined, from_manifest, from_prefix, mix_datasets, read_quarantine
from s3loader.loader import quarantine as module
from s3loader.testing import write_sharded_dataset

SAMPLES = 60


def refuse_sevens(sample):
    if bytes(sample).endswith(b"7"):
        raise ValueError("<no sevens>")
    return sample


OPTIONS = {"batch_size": 4, "transform": refuse_sevens, "on_error": "skip"}


@pytest.fixture
def dataset(tmp_path):
    store = open_store((tmp_path / "data").as_uri())
    write_sharded_dataset(store, ((f"s{i:03d}.bin", b"%d" % i) for i in range(SAMPLES)), per_shard=20)
    return from_manifest("manifest.jsonl", store=store)


@pytest.mark.parametrize("kind", ["url", "path", "key", "store"])
def test_it_is_kept_read_and_left_out(dataset, tmp_path, kind):
    target = {
        "url": (tmp_path / "bad").as_uri(),
        "path": f"{tmp_path}/bad/",
        "key": "bad/quarantine.jsonl",
        "store": open_store(tmp_path / "bad"),
    }[kind]
    beside = {"store": dataset.store} if kind == "key" else {}
    assert len(read_quarantine(target, **beside)) == 0
    loaders = [Loader(dataset, rank=rank, world_size=2, quarantine=target, **OPTIONS) for rank in range(2)]
    assert sum(len(batch) for loader in loaders for batch in loader) == SAMPLES - 6
    table = read_quarantine(target, **beside)
    assert sorted(table) == sorted(entry for loader in loaders for entry in loader.quarantine)
    assert sorted(entry.sample for entry in table) == [7, 17, 27, 37, 47, 57]
    assert sorted(table.keys) == [f"shards/shard-{i // 20:06d}.tar#s{i:03d}.bin" for i in (7, 17, 27, 37, 47, 57)]
    for exclude in (table, table.keys, table[:2]):
        got = sorted(int(bytes(s)) for batch in Loader(dataset, batch_size=4, exclude=exclude) for s in batch)
        assert got == sorted(set(range(SAMPLES)) - {entry.sample for entry in table[: len(exclude)]})


def test_attempts_add_up_and_what_they_both_met_is_one_entry(dataset, tmp_path):
    url = (tmp_path / "bad").as_uri()
    for _ in range(2):
        loader = Loader(dataset, quarantine=url, **OPTIONS)
        list(loader)
    assert len(read_quarantine(url)) == 6
    list(loader)  # the second epoch
    table = read_quarantine(url)
    assert [entry.epoch for entry in table] == [0] * 6 + [1] * 6
    assert [entry.position for entry in table[:6]] == sorted(entry.position for entry in table[:6])
    assert len(table.keys) == 6


def test_it_is_complete_up_to_the_last_batch_when_the_process_is_killed(dataset, tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        from s3loader.loader import Loader, from_manifest
        def check(sample):
            if bytes(sample).endswith(b"7"):
                raise ValueError("7")
            return bytes(sample)
        options = {"shuffle": "none", "transform": check, "on_error": "skip", "quarantine": sys.argv[2]}
        loader = Loader(from_manifest(sys.argv[1]), batch_size=10, **options)
        for batch in loader:
            if b"38" in batch:
                os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    argv = [sys.executable, "-c", script, (tmp_path / "data" / "manifest.jsonl").as_uri(), str(tmp_path / "bad")]
    assert subprocess.run(argv, check=False, timeout=600).returncode == -signal.SIGKILL
    assert [entry.sample for entry in read_quarantine(str(tmp_path / "bad"))] == [7, 17, 27, 37]


def test_many_entries_go_into_several_objects_and_are_bounded(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TOGETHER", 7)
    monkeypatch.setattr(module, "_MOST", 40)

    def refuse(sample):
        if int(bytes(sample)) % 10:
            raise ValueError("x")
        return sample

    url = str(tmp_path / "bad")
    with pytest.warns(RuntimeWarning, match="more than 40 samples") as seen:
        list(Loader(dataset, batch_size=4, transform=refuse, on_error="skip", quarantine=url))
    assert len(seen) == 1
    assert len(read_quarantine(url)) == 40
    assert len(os.listdir(url)) == 6


def test_a_list_that_cannot_be_written_is_an_error_at_once(dataset, tmp_path):
    os.makedirs(tmp_path / "bad")
    (tmp_path / "bad" / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a key"):
        list(Loader(mix_datasets([dataset, from_prefix(str(tmp_path / "bad"))]), quarantine="bad", **OPTIONS))
    store = open_store(tmp_path / "bad")

    def deny(op, key, *_):
        raise AccessDeniedError("no", op=op, url=key)

    store.put = deny
    with pytest.raises(AccessDeniedError):
        list(Loader(dataset, quarantine=store, **OPTIONS))


def test_what_others_keep_there_is_left_alone_and_a_damaged_list_is_said(dataset, tmp_path):
    folder = tmp_path / "bad"
    list(Loader(dataset, quarantine=str(folder), **OPTIONS))
    (folder / "notes.jsonl").write_text("not ours")
    assert len(read_quarantine(str(folder))) == 6
    ours = next(path for path in folder.iterdir() if path.name != "notes.jsonl")
    entry = json.loads(ours.read_text().splitlines()[0])
    assert (entry["rank"], entry["worker"]) == (0, 0)
    for text in ("{", "[]", "{}", json.dumps({**entry, "sample": "1"})):
        ours.write_text(text + "\n")
        with pytest.raises(FormatError, match="line 1 is no entry"):
            read_quarantine(str(folder))


def test_entries_of_samples_that_are_gone_are_passed_over_but_a_key_is_a_promise(dataset):
    gone = Quarantined(3, "shards/shard-000009.tar#x.bin", 0, 0, "IntegrityError: x")
    assert sum(map(len, Loader(dataset, batch_size=4, exclude=[gone]))) == SAMPLES
    with pytest.raises(ValueError, match=r"no sample is called 'shards/shard-000009"):
        list(Loader(dataset, batch_size=4, exclude=[gone.key]))


def test_a_table_shows_itself_safely():
    entries = [Quarantined(i, f"a.tar#{i}<b>.bin", 0, i, "ValueError: <script>") for i in range(60)]
    table = Quarantine(entries, "file:///x")
    assert str(table).splitlines()[-1] == "60 entries of 60 samples, the first 50 shown"
    assert len(str(table).splitlines()) == 52
    assert "60 entries" in repr(table)
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)
    parser.feed(table._repr_html_())
    assert tags.count("tr") == 51
    assert set(tags) == {"table", "caption", "tr", "th", "td"}
