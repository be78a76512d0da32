"""Uploads, downloads, copies and syncs: whole files or none, and what happens where something is there already."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from toolbox_places import every_place

import s3loader
from s3loader import s3
from s3loader.errors import ConfigError, ObjectExistsError, ObjectNotFoundError, PartialFailureError, SourceNotFoundError
from s3loader.testing import FaultProxy, Rule

LARGE = os.urandom(1 << 20) * 40 + b"end"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def make(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


FILES = {"a.txt": b"aa", "empty": b"", "sub/b.txt": b"b" * 1000, "sub/deep/c ü%41.bin": b"c"}


@every_place
def test_a_folder_goes_up_and_comes_back(place: str, tmp_path: Path) -> None:
    here = make(tmp_path / "here", FILES | {"large": LARGE})
    done: list[tuple[int, int | None, int]] = []
    report = s3.upload(here, f"{place}/up/", progress=lambda *some: done.append(some))
    assert (report.objects, report.bytes, report.skipped) == (5, 1003 + len(LARGE), 0)
    assert done[-1] == (5, 5, report.bytes)
    assert s3.list(f"{place}/up/", True) == sorted(s3.list(f"{place}/up/", True), key=str.encode)
    there = tmp_path / "there"
    report = s3.download(f"{place}/up/", there)
    assert (report.objects, report.bytes) == (5, 1003 + len(LARGE))
    assert tree(there) == FILES | {"large": LARGE}
    some = tmp_path / "some"
    assert s3.download(f"{place}/up/", some, recursive=False).objects == 3
    assert sorted(tree(some)) == ["a.txt", "empty", "large"]
    assert s3.download(f"{place}/up/", tmp_path / "texts", glob="*.txt").objects == 2
    assert s3.download(f"{place}/up/", tmp_path / "flat", glob="**/*.txt", flatten=True).objects == 2
    assert sorted(tree(tmp_path / "flat")) == ["a.txt", "b.txt"]
    assert s3.download(f"{place}/up/a.txt", tmp_path / "one").objects == 1
    assert tree(tmp_path / "one") == {"a.txt": b"aa"}
    with pytest.raises(ObjectNotFoundError):
        s3.download(f"{place}/none/", tmp_path / "nothing")
    assert not [name for name in os.listdir(there) if name.startswith(".")]


def test_sources_of_an_upload(place: str, tmp_path: Path) -> None:
    here = make(tmp_path / "here", FILES | {"odd[1].txt": b"odd"})
    assert s3.upload(here / "a.txt", f"{place}/exact-name").objects == 1
    assert s3.get(f"{place}/exact-name") == b"aa"
    assert s3.upload([f"{here}/*.txt", here / "empty"], f"{place}/g/").objects == 3
    assert s3.list(f"{place}/g/") == [f"{place}/g/a.txt", f"{place}/g/empty", f"{place}/g/odd[1].txt"]
    s3.upload(f"{here}/odd[1].txt", f"{place}/h/")  # a name that exists is no pattern
    assert s3.list(f"{place}/h/") == [f"{place}/h/odd[1].txt"]
    s3.upload(f"{here}/**/*.txt", f"{place}/r/")
    assert s3.list(f"{place}/r/", True) == [f"{place}/r/a.txt", f"{place}/r/odd[1].txt", f"{place}/r/sub/b.txt"]
    for missing in (here / "none", f"{here}/*.none"):
        with pytest.raises(SourceNotFoundError):
            s3.upload(missing, f"{place}/x/")
    with pytest.raises(ConfigError, match="become"):
        s3.upload(here, f"{place}/no-slash")
    with pytest.raises(s3loader.BucketNotFoundError):
        s3.upload(here / "a.txt", f"{place}-new/")
    s3.upload(here / "a.txt", f"{place}-new/", create_bucket=True)
    assert s3.get(f"{place}-new/a.txt") == b"aa"


def test_a_file_that_cannot_be_read_does_not_stop_the_others(place: str, tmp_path: Path) -> None:
    here = make(tmp_path / "here", {"a": b"1", "c": b"3"})
    (here / "b").symlink_to(here / "gone")
    os.mkfifo(here / "d")
    with pytest.raises(PartialFailureError) as caught:
        s3.upload(here, f"{place}/")
    assert sorted(os.path.basename(path) for path, _ in caught.value.failures) == ["b", "d"]
    assert s3.list(place) == [f"{place}/a", f"{place}/c"]


@every_place
def test_what_is_there_already(place: str, tmp_path: Path) -> None:
    here = make(tmp_path / "here", {"f": b"new"})
    s3.put(f"{place}/f", b"old")
    with s3loader.open_store(place) as store:
        conditional = store.conditional_writes()
    if conditional:
        with pytest.raises(ObjectExistsError):
            s3.upload(here, f"{place}/", on_exists="error")
    assert s3.upload(here, f"{place}/", on_exists="skip").skipped == 1
    assert s3.get(f"{place}/f") == b"old"
    os.utime(here / "f", (1, 1))
    assert s3.upload(here, f"{place}/", on_exists="if_changed").skipped == 1  # same size, and the object is not older
    later = time.time() + 100
    os.utime(here / "f", (later, later))
    assert s3.upload(here, f"{place}/", on_exists="if_changed").objects == 1
    assert s3.get(f"{place}/f") == b"new"

    (here / "f").write_bytes(b"mine")
    with pytest.raises(ObjectExistsError):
        s3.download(f"{place}/f", here, on_exists="error")
    assert s3.download(f"{place}/f", here, on_exists="skip").skipped == 1
    assert tree(here) == {"f": b"mine"}
    assert s3.download(f"{place}/f", here, on_exists="if_changed").objects == 1
    assert tree(here) == {"f": b"new"}
    assert s3.download(f"{place}/f", here, on_exists="if_changed").skipped == 1
    with pytest.raises(ConfigError):
        s3.download(f"{place}/f", here, on_exists="perhaps")  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["memory", "moto"], indirect=True)
def test_keys_that_are_no_file_names_stay_out(place: str, tmp_path: Path) -> None:
    bad = ["../up", "a//b", "x/../../y", "n" * 256, "/abs", "."]
    for key in (*bad, "good", "folder/"):
        with s3loader.open_store(place) as store:
            store.put(f"d/{key}", b"" if key == "folder/" else b"1")
    with pytest.raises(PartialFailureError) as caught:
        s3.download(f"{place}/d/", tmp_path / "in" / "here")
    assert len(caught.value.failures) == len(bad)
    assert tree(tmp_path) == {"in/here/good": b"1"}
    assert caught.value.report.objects == 1


def test_flattened_names_must_differ(tmp_path: Path) -> None:
    s3.put_many([("memory://flat/a/x", b"1"), ("memory://flat/b/x", b"2")])
    with pytest.raises(PartialFailureError, match="two objects"):
        s3.download("memory://flat/", tmp_path, flatten=True)


def test_no_half_file_is_left_by_an_error(place: str, tmp_path: Path) -> None:
    """The second of the three pieces of an object fails: nothing of it stays, the others come."""
    s3.put(f"{place}/a-large", LARGE)
    s3.put(f"{place}/small", b"1")
    with (
        FaultProxy(
            os.environ["S3_ENDPOINT_URL"], [Rule("error", path="a-large", nth=2, status=403, code="AccessDenied")]
        ) as proxy,
        pytest.raises(PartialFailureError) as caught,
    ):
        s3.download(f"{place}/", tmp_path, endpoint_url=proxy.endpoint_url)
    assert [url for url, _ in caught.value.failures] == [f"{place}/a-large"]
    assert tree(tmp_path) == {"small": b"1"}


@every_place
def test_copies(place: str, tmp_path: Path) -> None:
    for name, data in {**FILES, "large": LARGE}.items():
        s3.put(
            f"{place}/from/{name}", data, content_type="text/x-test", metadata={"who": "me"} if "file:" not in place else None
        )
    local = f"file://{tmp_path}/local"
    for target in (f"{place}/to", f"memory://{place.rpartition('/')[2]}-copies/to", local):
        plain = target == local and not place.startswith("file:")
        if plain and not _keeps_metadata(tmp_path):
            continue
        report = s3.copy(f"{place}/from/", f"{target}/", recursive=True)
        assert (report.objects, report.bytes) == (5, 1003 + len(LARGE))
        assert len(s3.list(f"{target}/", True)) == 5
        assert s3.get(f"{target}/large") == LARGE
        assert s3.get(f"{target}/sub/b.txt") == FILES["sub/b.txt"]
        assert s3.get(f"{target}/empty") == b""
        if target.startswith("memory:") and not place.startswith("file:"):
            assert s3.stat(f"{target}/large")["content_type"] == "text/x-test"
            assert s3.stat(f"{target}/a.txt")["metadata"]["who"] == "me"
        assert s3.copy(f"{place}/from/", f"{target}/", glob="**/*.txt", on_exists="skip").skipped == 2
    assert s3.copy(f"{place}/from/a.txt", f"{place}/b.txt").objects == 1
    assert s3.copy(f"{place}/from/a.txt", f"{place}/dir/").objects == 1
    assert s3.get(f"{place}/b.txt") == s3.get(f"{place}/dir/a.txt") == b"aa"
    with pytest.raises(ObjectNotFoundError):
        s3.copy(f"{place}/none", f"{place}/x")
    with pytest.raises(ObjectNotFoundError):
        s3.copy(f"{place}/none/", f"{place}/x/", recursive=True)
    for target in (f"{place}/from/", f"{place}/from/inside/", f"{place}/"):
        with pytest.raises(ConfigError):
            s3.copy(f"{place}/from/", target, recursive=True)
    assert s3.get(f"{place}/from/a.txt") == b"aa"


def _keeps_metadata(folder: Path) -> bool:
    try:
        os.setxattr(folder, "user.s3loader-test", b"1")
    except OSError:
        return False
    return True


@every_place
def test_a_sync_copies_what_differs_and_deletes_only_when_told(place: str, tmp_path: Path) -> None:
    here = make(tmp_path / "here", FILES)
    target = f"{place}/mirror/"
    told: list[tuple[str, str]] = []

    def plan(*about: str) -> Any:
        told.append((about[0], about[1][len(target) :]))

    assert s3.sync(str(here), target, dry_run=True, planned=plan).objects == 4
    assert {what for what, _ in told} == {"copy"}
    assert len({name for _, name in told}) == 4
    assert s3.list(place, True) == []
    assert s3.sync(str(here), target).objects == 4
    assert s3.sync(str(here), target).skipped == 4
    make(here, {"a.txt": b"longer", "new": b"n"})
    (here / "empty").unlink()
    s3.put(f"{target}extra", b"x")
    report = s3.sync(str(here), target)
    assert (report.objects, report.skipped, report.deleted) == (2, 2, 0)
    assert s3.sync(str(here), target, delete=True, dry_run=True).deleted == 2
    assert s3.exists(f"{target}extra")
    assert s3.sync(str(here), target, delete=True).deleted == 2
    back = tmp_path / "back"
    assert s3.sync(target, str(back)).objects == 4
    assert tree(back) == tree(here)
    assert s3.sync(target, str(back)).skipped == 4
    with pytest.raises(ConfigError):
        s3.sync(target, target)
    with pytest.raises((ObjectNotFoundError, PartialFailureError)):
        s3.sync(str(tmp_path / "none"), target, delete=True)
    with pytest.raises(ObjectNotFoundError, match="empty"):
        s3.sync("memory://nothing-at-all/", target, delete=True)
    assert len(s3.list(target, True)) == 4


def test_a_sync_that_failed_deletes_nothing(place: str, tmp_path: Path) -> None:
    here = make(tmp_path / "here", {"a": b"1", "b": b"2"})
    os.chmod(here / "b", 0)
    if os.access(here / "b", os.R_OK):
        pytest.skip("root reads everything")
    s3.put(f"{place}/extra", b"x")
    with pytest.raises(PartialFailureError):
        s3.sync(str(here), f"{place}/", delete=True)
    assert s3.exists(f"{place}/extra")
