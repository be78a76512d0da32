"""A save goes on with what a dead attempt has left, and somebody interferes: it is alive after all, or garbage is collected."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from resume_helpers import OPTIONS, check, holdings, outage, quick_folder, sent, state

from s3loader.checkpoint import CheckpointManager
from s3loader.checkpoint.protocol.roots import Root
from s3loader.checkpoint.protocol.run import Run
from s3loader.errors import FencedError, S3LoaderError
from s3loader.store import Backend, open_store
from s3loader.testing import Moment, Seen


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one."""
    yield from quick_folder(tmp_path)


def adopted(manager: CheckpointManager) -> tuple[str, str]:
    """The fullest open upload."""
    backend = manager.store.backend
    uploads = [(k, u, sum(p.size for p in backend.list_parts(k, u))) for k, u, _ in list(backend.list_multipart("ckpt/"))]
    key, upload_id, size = max(uploads, key=lambda upload: upload[2])
    assert size
    return key, upload_id


def overwrite_kept(backend: Backend, key: str, upload_id: str) -> None:
    part = next(iter(backend.list_parts(key, upload_id)))
    backend.upload_part(key, upload_id, part.number, b"z" * part.size)


def overwrite_last(backend: Backend, key: str, upload_id: str) -> None:
    part = list(backend.list_parts(key, upload_id))[-1]
    backend.upload_part(key, upload_id, part.number, b"z" * part.size)


def abort(backend: Backend, key: str, upload_id: str) -> None:
    backend.abort_multipart(key, upload_id)


def complete(backend: Backend, key: str, upload_id: str) -> None:
    backend.complete_multipart(key, upload_id, list(backend.list_parts(key, upload_id)))


@pytest.mark.parametrize("deed", [overwrite_kept, overwrite_last, abort, complete])
@pytest.mark.parametrize("moment", ["upload part", "complete upload"])
@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_zombie(deed: Callable[[Backend, str, str], None], moment: str, scheme: str, folder: Path) -> None:
    """The attempt that was thought dead is alive, and changes the upload just before a request of ours."""
    url = f"memory://zombie-{deed.__name__}-{moment.replace(' ', '-')}" if scheme == "memory" else str(folder)
    manager, faults = outage(url, "upload part", 3)
    key, upload_id = adopted(manager)
    zombie = open_store(url).backend
    done: list[bool] = []

    def hook(seen: Seen, at: Moment) -> None:
        if seen.op == moment and seen.key == key and at == "before" and not done:
            done.append(True)
            deed(zombie, key, upload_id)

    faults.hook = hook
    with sent() as seen:
        result = manager.save(1, state()).result(600)
    faults.hook = None
    assert done
    assert result.resumed == 0
    assert sum(event.bytes for event in seen) >= result.written  # what was sent to the lost upload comes on top
    check(manager, state())
    assert all(key != used for used in manager.open(1).files())


def test_a_collection_between(folder: Path) -> None:
    manager, _ = outage(str(folder), "upload part", 9)
    manager.gc(grace=0)
    assert holdings(manager.store) == {}
    assert manager.save(1, state()).result(600).resumed == 0
    check(manager, state())


def test_a_collection_leaves_a_step_alone_where_a_save_is_under_way(folder: Path) -> None:
    manager, faults = outage(str(folder), "upload part", 9)
    long_ago = 1_000_000_000
    for path in folder.rglob("*"):
        if path.is_file() and "control" not in path.parts:
            if path.name == "upload.json":
                path.write_text(json.dumps({**json.loads(path.read_text()), "initiated": long_ago}))
            os.utime(path, (long_ago, long_ago))
    reports = []

    def hook(seen: Seen, moment: Moment) -> None:
        if seen.op == "put" and "intent" in seen.key and moment == "after":
            faults.hook = None
            with CheckpointManager(folder, options=OPTIONS) as other:
                reports.append(other.gc(grace=3600))

    faults.hook = hook
    result = manager.save(1, state()).result(600)
    assert result.resumed > 0
    (report,) = reports
    assert report.skipped == {1: "a save is under way"}
    assert (report.keys, report.fenced, report.uploads) == ([], [], [])
    check(manager, state())


def test_a_collection_that_has_deleted_nothing_yet() -> None:
    """It has put its root, and may delete at any time: what was looked at before must not be committed."""
    manager, faults = outage("memory://stalled-gc", "upload part", 9)

    def hook(seen: Seen, moment: Moment) -> None:
        if seen.op == "list parts" and moment == "after":
            faults.hook = None
            Run(open_store("memory://stalled-gc")).roots.retire(Root(1, "absent"), 1)

    faults.hook = hook
    with pytest.raises(FencedError, match="garbage collection has taken"):
        manager.save(1, state()).result(600)
    assert manager.latest() is None
    assert manager.save(1, state()).result(600).resumed == 0
    check(manager, state())


def test_a_collection_at_every_request() -> None:
    """Whatever moment a collector that respects no age strikes at, what is committed is whole."""
    outcomes = []
    for nth in range(1, 60):
        url = f"memory://gc-at-{nth}"
        manager, faults = outage(url, "upload part", 9)
        start = len(faults.seen)

        def hook(seen: Seen, moment: Moment, url: str = url, faults: Any = faults, at: int = start + nth) -> None:
            if seen.number == at and moment == "before":
                faults.hook = None
                with CheckpointManager(url, options=OPTIONS) as other:
                    other.gc(grace=0)

        faults.hook = hook
        try:
            manager.save(1, state()).result(600)
            outcomes.append("committed")
        except S3LoaderError as error:  # its own uploads and files were taken for garbage, too
            outcomes.append(type(error).__name__)
        late, faults.hook = faults.hook is not None, None
        latest = manager.latest()
        assert latest == (1 if outcomes[-1] == "committed" else None)
        if latest is None:
            manager.save(1, state()).result(600)
        check(manager, state())
        if late:
            break
    else:
        pytest.fail("it never ends")
    assert outcomes.count("committed") >= 3
    assert "FencedError" in outcomes
