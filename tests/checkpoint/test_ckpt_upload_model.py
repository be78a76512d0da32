"""A small model, searched exhaustively, of two attempts at one multipart upload: docs/design/011-resumed-uploads.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Upload(NamedTuple):
    """An open upload of two parts that a new attempt goes on with, while the one that began it lives and saves another state.

    The first part is the same in both states. Content of a part: whose it is; ETag: the number of the write.
    """

    parts: tuple[tuple[str, int], tuple[str, int] | None] | None  # None: the upload is gone
    writes: int
    object: str  # whose second part is in the object; empty: there is none
    ours: int  # steps done
    seen: tuple[int, int]  # ETags that we complete with
    theirs: frozenset[str]  # what the other one has done
    told: str


def upload_steps(s: Upload, pinned: bool) -> Iterator[Upload]:
    """We list, send the second part, complete with the ETags. The other sends parts, completes or aborts, in any order."""
    if s.ours == 0 and s.parts is not None:  # the list: the first part is proven equal
        yield s._replace(ours=1, seen=(s.parts[0][1], 0))
    elif s.ours == 1 and not s.told:
        if s.parts is None:
            yield s._replace(told="lost")
        else:
            number = s.writes + 1
            yield s._replace(ours=2, writes=number, parts=(s.parts[0], ("ours", number)), seen=(s.seen[0], number))
    elif s.ours == 2 and not s.told:
        if s.parts is None or (pinned and (s.parts[0][1], s.parts[1] and s.parts[1][1]) != s.seen):
            yield s._replace(told="lost")
        else:
            assert s.parts[1] is not None
            yield s._replace(told="complete", object=s.parts[1][0], parts=None)
    for deed in ("first", "second", "complete", "abort"):
        if deed in s.theirs or s.parts is None:
            continue
        after = s._replace(theirs=s.theirs | {deed}, writes=s.writes + 1)
        if deed == "first":
            yield after._replace(parts=(("both", after.writes), s.parts[1]))
        elif deed == "second":
            yield after._replace(parts=(s.parts[0], ("theirs", after.writes)))
        elif deed == "abort":
            yield after._replace(parts=None)
        elif s.parts[1] is not None:
            yield after._replace(parts=None, object=s.parts[1][0])


def upload_violation(pinned: bool) -> Upload | None:
    start = Upload((("both", 1), None), 1, "", 0, (0, 0), frozenset(), "")
    seen = {start}
    queue = [start]
    while queue:
        state = queue.pop()
        if state.told == "complete" and state.object != "ours":
            return state
        for after in upload_steps(state, pinned):
            if after not in seen:
                seen.add(after)
                queue.append(after)
    assert len(seen) > 30
    return None


def test_an_upload_that_is_taken_over_becomes_ours_or_is_lost() -> None:
    assert upload_violation(pinned=True) is None
    assert upload_violation(pinned=False) is not None
