"""Conditional writes whose answer is lost: found by their write id, or unknown; never told wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retry_helpers import error_of, holds, make, memory_has

from s3loader.errors import (
    ConflictError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    OutcomeUnknownError,
    S3LoaderError,
    StoreConnectionError,
)
from s3loader.store import MemoryBackend
from s3loader.store.lost_reply import WRITE_ID
from s3loader.testing import Fault, Seen
from s3loader.types import Update


def test_a_lost_answer_to_create_is_found_by_its_id() -> None:
    store, memory, broken, _ = make(Fault("drop_reply", op="put"))
    result = store.put("k", b"mine", mode="create")
    assert [seen.op for seen in broken.seen] == ["put", "put", "head"]
    assert (result.etag, result.size) == (memory.head("k").etag, 4)
    assert memory.head("k").metadata[WRITE_ID]


def test_a_lost_answer_to_update_is_found_by_its_id() -> None:
    store, memory, _, _ = make(Fault("drop_reply", op="put"))
    first = memory.put("k", b"old")
    result = store.put("k", b"new", mode=Update(first.etag))
    assert result.etag == memory.head("k").etag
    assert store.get("k") == b"new"


def test_user_metadata_stays_beside_the_id() -> None:
    store, memory, _, _ = make()
    store.put("k", b"x", mode="create", metadata={"a": "b"})
    assert memory.head("k").metadata["a"] == "b"
    store.put("plain", b"x")
    assert WRITE_ID not in memory.head("plain").metadata


def test_another_writer_is_no_success() -> None:
    """Our request never arrived; meanwhile somebody took the key."""
    rival: list[MemoryBackend] = []

    def hook(seen: Seen, moment: str) -> None:
        if seen.number == 1 and moment == "before":
            rival[0].put("k", b"theirs")

    store, memory, _, _ = make(Fault("reset", op="put"), hook=hook)
    rival.append(memory)
    with pytest.raises(ObjectExistsError) as caught:
        store.put("k", b"mine", mode="create")
    assert caught.value.details["ambiguous"]
    assert store.get("k") == b"theirs"


def test_an_update_that_was_overtaken_is_unknown() -> None:
    """Ours was done, its answer lost, and another writer built on it: their refusal of our second try is
    no proof that ours did not happen."""
    holder: list[MemoryBackend] = []

    def hook(seen: Seen, moment: str) -> None:
        if seen.number == 1 and moment == "after":
            ours = holder[0].head("k")
            holder[0].put("k", b"ours and theirs", mode=Update(ours.etag))

    store, memory, _, _ = make(Fault("drop_reply", op="put"), hook=hook)
    holder.append(memory)
    old = memory.put("k", b"old")
    with pytest.raises(OutcomeUnknownError):
        store.put("k", b"ours", mode=Update(old.etag))
    assert isinstance(error_of(lambda: store.put("k", b"ours", mode=Update(old.etag))), ObjectChangedError)


@pytest.mark.parametrize("mode", ["create", "update"])
def test_nothing_left_to_read_back_is_unknown(mode: str) -> None:
    """Ours may have been there and been deleted, or never have been: nobody can tell."""
    holder: list[MemoryBackend] = []

    def hook(seen: Seen, moment: str) -> None:
        if seen.op == "head" and moment == "before":
            holder[0].delete("k")

    store, memory, _, _ = make(Fault("drop_reply", op="put"), hook=hook)
    holder.append(memory)
    how: Any = "create" if mode == "create" else Update(memory.put("k", b"old").etag)
    with pytest.raises(OutcomeUnknownError) as caught:
        store.put("k", b"mine", mode=how)
    assert caught.value.hint
    assert not caught.value.retryable


def test_unreadable_is_unknown() -> None:
    store, _, _, _ = make(Fault("drop_reply", op="put"), Fault("unavailable", op="head", times=None), max_attempts=3)
    with pytest.raises(OutcomeUnknownError):
        store.put("k", b"mine", mode="create")


def test_all_answers_lost() -> None:
    """The attempts run out, but the write is there: reading back tells."""
    store, memory, _, _ = make(Fault("drop_reply", op="put", times=None), max_attempts=1)
    result = store.put("k", b"mine", mode="create")
    assert result.etag == memory.head("k").etag


def test_never_arrived_is_unknown_not_failed() -> None:
    """After a time-out the request may still be on its way."""
    store, memory, _, _ = make(Fault("timeout", op="put", times=None), max_attempts=2)
    old = memory.put("k", b"old")
    with pytest.raises(OutcomeUnknownError):
        store.put("k", b"mine", mode=Update(old.etag))
    with pytest.raises(OutcomeUnknownError):
        store.put("new", b"mine", mode="create")
    with pytest.raises(OutcomeUnknownError):  # what is there now may have been built on ours
        store.put("k", b"mine", mode=Update("another"))
    assert isinstance(error_of(lambda: store.put("k", b"mine", mode="create")), ObjectExistsError)


def test_an_update_that_another_built_upon_is_no_failure() -> None:
    """Ours happened, its answer was lost, a rival updated the result: "changed" would have us write twice."""
    holder: list[MemoryBackend] = []

    def hook(seen: Seen, moment: str) -> None:
        if seen.op == "put" and moment == "after":
            holder[0].put("k", holder[0].get("k")[1] + b" theirs", mode=Update(holder[0].head("k").etag))

    store, memory, _, _ = make(Fault("drop_reply", op="put", nth=1), hook=hook)
    holder.append(memory)
    with pytest.raises(OutcomeUnknownError):
        store.put("k", b"mine", mode=Update(memory.put("k", b"old").etag))
    assert memory.get("k")[1] == b"mine theirs"


def test_refused_connections_are_plain_failures() -> None:
    store, _, broken, _ = make(Fault("refused", op="put", times=None), max_attempts=3)
    error = error_of(lambda: store.put("k", b"mine", mode="create"))
    assert isinstance(error, StoreConnectionError)
    assert error.attempts == 3
    assert {seen.op for seen in broken.seen} == {"put"}, "there was nothing to read back"


def test_conflicts_are_repeated() -> None:
    store, _, _, _ = make(Fault("conflict", op="put", times=2))
    store.put("k", b"x", mode="create")
    store, _, _, _ = make(Fault("conflict", op="put", times=None), max_attempts=2)
    assert isinstance(error_of(lambda: store.put("k", b"x", mode="create")), ConflictError)


def test_a_refusal_without_doubt_is_not_read_back() -> None:
    store, memory, broken, _ = make()
    memory.put("k", b"theirs")
    assert isinstance(error_of(lambda: store.put("k", b"x", mode="create")), ObjectExistsError)
    assert [seen.op for seen in broken.seen] == ["put"]


def test_an_unsure_conditional_copy_is_unknown() -> None:
    store, memory, _, _ = make(Fault("drop_reply", op="copy"))
    memory.put("a", b"x")
    assert isinstance(error_of(lambda: store.copy("a", "b", mode="create")), OutcomeUnknownError)
    store, memory, _, _ = make(Fault("drop_reply", op="copy"))
    memory.put("a", b"x")
    assert store.copy("a", "b").key == "b"


@settings(max_examples=50, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["unavailable", "throttled", "conflict", "timeout", "reset", "drop_reply"]), max_size=6),
    modes=st.lists(st.sampled_from(["create", "update"]), min_size=1, max_size=4),
)
def test_told_outcomes_are_true(kinds: Sequence[Any], modes: Sequence[str]) -> None:
    """Whatever fails: a success means the data is there, an error other than unknown means that it is not."""
    faults = [Fault(kind, op="put", nth=i + 1) for i, kind in enumerate(kinds)]
    store, memory, _, _ = make(*faults, max_attempts=3)
    old = memory.put("k", b"old").etag
    for i, mode in enumerate(modes):
        data = b"new %d" % i
        key = f"c{i}" if mode == "create" else "k"
        how: Any = "create" if mode == "create" else Update(old)
        try:
            old_or_new = store.put(key, data, mode=how)
        except OutcomeUnknownError:
            old = memory.head("k").etag
            continue
        except S3LoaderError:
            assert not holds(memory, key, data)
            continue
        assert holds(memory, key, data)
        if mode == "update":
            old = old_or_new.etag
            assert old == memory.head("k").etag


@pytest.mark.parametrize("mode", ["overwrite", "create"])
def test_a_lost_answer_to_complete(mode: Any) -> None:
    """The second completion finds the upload gone: the write id says that it is done."""
    store, memory, broken, _ = make(Fault("drop_reply", op="complete upload"))
    with store.multipart("k", part_size="10B", mode=mode) as writer:
        writer.write(b"x" * 25)
    assert [seen.op for seen in broken.seen][-3:] == ["complete upload", "complete upload", "head"]
    assert writer.result is not None
    assert writer.result.etag == memory.head("k").etag
    assert store.get("k") == b"x" * 25


def test_an_upload_that_vanished_is_unknown() -> None:
    store, memory, broken, _ = make(Fault("reset", op="complete upload"))

    def vanish(seen: Seen, moment: str) -> None:
        if seen.op == "complete upload" and moment == "before":
            for key, upload_id, _ in list(memory.list_multipart()):
                memory.abort_multipart(key, upload_id)

    broken.hook = vanish
    writer = store.multipart("k", part_size="10B")
    writer.write(b"x" * 25)
    with pytest.raises(OutcomeUnknownError):
        writer.close()
    assert not memory_has(memory, "k")


def test_an_upload_that_never_was_is_not_found() -> None:
    store, _, _, _ = make()
    with pytest.raises(ObjectNotFoundError):
        store.backend.complete_multipart("k", "never", [])
