"""What is found of a run: its newest step (an answer that a training begins anew on, or goes on from, so "none" must be
certain), and a step's index."""

from __future__ import annotations

from functools import partial

from s3loader.checkpoint.format import layout
from s3loader.checkpoint.format.records import Compacted, Index, Marker
from s3loader.checkpoint.protocol.merge import is_index, unpack_index
from s3loader.checkpoint.protocol.roots import Root
from s3loader.checkpoint.protocol.run import Run
from s3loader.checkpoint.state import tree
from s3loader.errors import CheckpointError, FormatError

__all__ = ["expect_none", "newest_committed", "read_index"]


def newest_committed(run: Run) -> Root | None:
    """Root of the newest committed step, None where there is none.

    Raises:
        CheckpointError: there are steps, but all of them are damaged; or the listing cannot be trusted.
    """
    damaged: Root | None = None
    for root in run.newest_first():
        if root.state == "committed":
            return root
        damaged = damaged or root
    if damaged is not None:
        raise CheckpointError(damaged.problem, url=run.store.url, hint="`s3loader ckpt verify --all` looks at every step")
    expect_none(run)
    return None


def expect_none(run: Run) -> None:
    """After no step was listed: make sure that the answers are the store's, and that it lists what it has.

    A proxy's login page, answered with status 200, reads like an empty listing.

    Raises:
        S3LoaderError: they are not.
    """
    for key, kind in ((layout.MARKER, Marker), (layout.COMPACTED, Compacted)):
        found = run.read(key, kind)
        if found is None:
            continue
        if not any(entry.key == key for entry in run.store.list(key)):
            raise CheckpointError(
                f"the store has {key}, but does not list it",
                url=run.store.url,
                hint="check the endpoint, and proxies on the way: an empty listing is not to be trusted here",
            )


def read_index(run: Run, committed: Root) -> Index | None:
    """The index of a committed step, None where it is gone; what is not the one that was committed is fetched once more.

    Raises:
        CheckpointError, FormatError: it is not that, or not what this s3loader reads.
        IntegrityError: its bytes are not what was written.
    """
    key = committed.keys[layout.INDEX][0]
    for last in (False, True):
        found = run.get(key, own=partial(is_index, committed.facts))
        if found is None:
            return None
        try:
            index = unpack_index(found[0], committed.facts, key)
            tree.check_items(index.tree)
            return index
        except (CheckpointError, FormatError):
            if last:
                raise
    raise AssertionError("unreachable")
