"""Which step is the newest: an answer that a training begins anew on, or goes on from, so "none" must be certain."""

from __future__ import annotations

from s3loader.checkpoint.format import layout, records
from s3loader.checkpoint.format.records import Compacted, Marker
from s3loader.checkpoint.protocol.root import Root
from s3loader.checkpoint.protocol.run import Run
from s3loader.errors import CheckpointError

__all__ = ["expect_none", "newest_committed"]


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
        found = run.get(key)
        if found is None:
            continue
        records.decode(found[0], kind, key)
        if not any(entry.key == key for entry in run.store.list(key)):
            raise CheckpointError(
                f"the store has {key}, but does not list it",
                url=run.store.url,
                hint="check the endpoint, and proxies on the way: an empty listing is not to be trusted here",
            )
