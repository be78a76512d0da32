"""URLs and paths: `str` is the inverse of `parse`, nothing is read from another place, no password is repeated."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from s3loader.errors import ConfigError, S3LoaderError
from s3loader.store import open_store
from s3loader.types import ObjectURL

NAMES = st.one_of(
    st.sampled_from(
        ["a", "dt=00%3A00", "%2E%2E", "%2e%2e", "%", "%25", "a b", "ü€", "?", "#", "a+b", "~", "s3:", "{a,b}", "*"]
    ),
    st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=8),
).filter(lambda name: name not in (".", ".."))


@given(st.lists(NAMES, max_size=5))
@example(["dt=00%3A00"])
@example(["a", "%2E%2E", "x"])
@example(["\udcff\udc80"])
@example([" a", "b\n", "c\t"])
def test_str_is_the_inverse_of_parse_for_paths(names: list[str]) -> None:
    path = "/" + "/".join(names)
    url = ObjectURL.parse(path)
    assert url == ObjectURL("file", "", path)
    text = str(url)
    assert ObjectURL.parse(text) == url
    assert str(ObjectURL.parse(text)) == text
    assert ObjectURL.parse(url) is url
    if all(name.isascii() and name.isprintable() for name in names):
        assert ObjectURL.parse(Path(path).as_uri()) == url  # the standard library's spelling
    folder, name = url.split()
    if names:
        assert folder.joined(name) == url
        assert ObjectURL.parse(f"{folder.base}/{str(ObjectURL('file', '', '/' + name))[8:]}") == url


@given(st.sampled_from(["s3", "gs", "az", "memory"]), st.text("/a%.~ü#?{*", max_size=12))
@example("s3", "a/%2E%2E/x")
@example("s3", "/k")
@example("s3", "a//k")
@example("s3", "k//")
def test_str_is_the_inverse_of_parse_for_keys(scheme: str, key: str) -> None:
    url = ObjectURL(scheme, "bucket", key)
    assert ObjectURL.parse(str(url)) == url
    folder, name = url.split()
    assert folder.joined(name) == url
    assert ObjectURL.parse(str(folder)) == folder


@given(st.lists(st.sampled_from(["a", "b", "..", ".", ""]), min_size=1, max_size=7))
def test_plain_dots_are_resolved_as_the_file_system_does_without_links(parts: list[str]) -> None:
    text = "/" + "/".join(parts)
    expected = ObjectURL("file", "", posixpath.normpath("/" + text.lstrip("/")))
    assert ObjectURL.parse(text) == ObjectURL.parse(f"file://{text}") == expected


@pytest.mark.parametrize("text", ["file:///a/%2E%2E/x", "file:///a/%2e./x", "file:///a/%2E", "file:///a%00b"])
def test_an_encoded_step_upwards_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="percent-encodings"):
        ObjectURL.parse(text)


@pytest.mark.parametrize("path", [Path("s3://b/k"), PurePosixPath("file:///x"), Path("https://host/x"), "s3:/b/k"])
def test_a_url_that_path_has_damaged_is_refused(path: Path | str) -> None:
    with pytest.raises(ConfigError, match="looks like a URL") as caught:
        ObjectURL.parse(path)
    assert f"{os.fspath(path).partition(':')[0]}://" in str(caught.value.hint)


def test_home_is_expanded_in_text_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ObjectURL.parse("~/x") == ObjectURL.parse(Path("~/x")) == ObjectURL("file", "", f"{tmp_path}/x")
    monkeypatch.chdir(tmp_path)
    assert ObjectURL.parse("./~/x") == ObjectURL("file", "", f"{tmp_path}/~/x")
    open_store("~/store").put("k", b"1")
    assert (tmp_path / "store" / "k").read_bytes() == b"1"


@given(st.lists(NAMES, min_size=1, max_size=3).map("/".join), NAMES)
def test_a_store_opened_by_the_url_of_a_store_is_the_same(folder: str, key: str) -> None:
    assume("\0" not in folder)
    root = open_store("memory://urls").url
    one, two = open_store(ObjectURL.parse(f"{root}/{folder}")), open_store(str(ObjectURL.parse(f"{root}/{folder}")))
    one.put(key, b"1")
    assert two.get(key) == open_store(f"{one.url}/").get(key) == b"1"


@pytest.mark.parametrize("folder", ["dt=00%3A00", "%2E%2E", "a b", "ü", "#1?"])
def test_a_local_store_by_its_own_url(tmp_path: Path, folder: str) -> None:
    with open_store(tmp_path / folder) as one, open_store(one.url) as two:
        one.put("k", b"1")
        assert two.get("k") == b"1"
    assert (tmp_path / folder / "k").read_bytes() == b"1"


SECRET = "hunter2secret"


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKID:{SECRET}@bucket/k",
        f"s3://{SECRET}@bucket/k",
        f"s3://AKID:a/{SECRET}@bucket/k",
        f"https://user:{SECRET}@host/bucket/k",
        f"file://user:{SECRET}@host/k",
        f"https://bucket.s3.amazonaws.com/k?X-Amz-Signature={SECRET}",
        f"https://x.blob.core.windows.net/c/k?sv=1&sig={SECRET}",
    ],
)
def test_a_password_in_a_url_is_never_repeated(url: str) -> None:
    with pytest.raises(S3LoaderError) as caught:
        open_store(url)
    error = caught.value
    assert SECRET not in f"{error} {error!r} {error.args} {vars(error)}"
    assert error.hint
