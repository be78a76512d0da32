"""Local files: nobody ever meets half an object, whoever dies, and only one of two writers wins."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s3loader.errors import NoSpaceError, ObjectChangedError, ObjectExistsError, S3LoaderError
from s3loader.store import LocalBackend, open_store
from s3loader.store.local import files as _files
from s3loader.store.local.files import TempFile
from s3loader.types import Update


def files_under(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def run_child(code: str, *arguments: str) -> subprocess.Popen[str]:
    source = textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", source, *arguments], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("named", [False, True])
def test_a_killed_writer_leaves_the_old_object(tmp_path: Path, named: bool) -> None:
    """SIGKILL in the middle of a write; with nameless temporary files nothing at all is left."""
    store = open_store(tmp_path)
    store.put("a/k", b"old")
    child = run_child(
        """
        import os, sys, time
        from s3loader.store.local import files as _files
        from s3loader.store.local.backend import LocalBackend
        if sys.argv[2] == "True" and hasattr(os, "O_TMPFILE"):
            del os.O_TMPFILE
        write = _files.TempFile.write
        def slow(self, data):
            write(self, data[: len(data) // 2])
            print("half", flush=True)
            time.sleep(3600)
        _files.TempFile.write = slow
        LocalBackend(sys.argv[1]).put("a/k", b"new" * 100_000)
        """,
        str(tmp_path),
        str(named),
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "half\n"
    child.kill()
    child.wait()
    child.stdout.close()
    assert store.get("a/k") == b"old"
    assert [entry.key for entry in store.list()] == ["a/k"]
    left = [name for name in files_under(tmp_path) if name != "a/k"]
    if named or not hasattr(os, "O_TMPFILE"):
        assert all(os.path.basename(name).startswith(".s3loader-") for name in left)
    else:
        assert left == []
    store.put("a/k", b"newer")
    assert store.get("a/k") == b"newer"


def test_killed_at_every_step(tmp_path: Path) -> None:
    """A writer killed before any one of its system calls: the old object or the new one, whole."""
    code = """
        import os, signal, sys
        from s3loader.store.local.backend import LocalBackend
        backend, left = LocalBackend(sys.argv[1]), int(sys.argv[2])
        def deadly(call):
            def wrapped(*args, **kwargs):
                global left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return wrapped
        for name in ("open", "write", "fsync", "utime", "link", "replace", "close", "setxattr", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        backend.put("d/k", b"new" * 1000, metadata={"a": "b"})
        """
    outcomes = []
    for step in range(40):
        root = tmp_path / str(step)
        store = open_store(root)
        store.put("d/k", b"old", metadata={"a": "a"})
        child = run_child(code, str(root), str(step))
        child.wait(600)
        assert child.stdout is not None
        child.stdout.close()
        found = store.get("d/k")
        assert found in (b"old", b"new" * 1000)
        assert store.head("d/k").metadata == {"a": "a" if found == b"old" else "b"}
        assert [entry.key for entry in store.list()] == ["d/k"]
        outcomes.append(found == b"old")
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
    else:
        pytest.fail("it never got to its end")
    assert outcomes == sorted(outcomes, reverse=True), "once the new object was there it stayed"
    assert len(outcomes) > 5


def _add_many(path: str, count: int, barrier: Any) -> None:
    store = open_store(path)
    barrier.wait(600)
    for _ in range(count):
        while True:
            meta = store.head("counter")
            value = int(store.get("counter", if_match=None))
            with contextlib.suppress(ObjectChangedError):
                store.put("counter", str(value + 1).encode(), mode=Update(meta.etag))
                break


def _three_at_once(context: Any, work: Callable[..., None], *args: Any) -> None:
    children = [context.Process(target=work, args=args) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(600)
        assert child.exitcode == 0
        child.close()


def test_updates_of_many_processes_lose_nothing(tmp_path: Path) -> None:
    """A shared counter: head, read, replace if it is still that one."""
    store = open_store(tmp_path)
    store.put("counter", b"0")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    _three_at_once(context, _add_many, str(tmp_path), 20, barrier)
    assert store.get("counter") == b"60"


def _create(path: str, barrier: Any, winners: Any) -> None:
    store = open_store(path)
    for i in range(10):
        barrier.wait(600)
        with contextlib.suppress(ObjectExistsError):
            store.put(f"race/{i}", str(os.getpid()).encode(), mode="create")
            winners.put((i, os.getpid()))


def test_one_creator_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, winners = context.Barrier(3), context.SimpleQueue()
    _three_at_once(context, _create, str(tmp_path), barrier, winners)
    won = sorted(winners.get() for _ in range(10))
    assert winners.empty()
    winners.close()
    assert [i for i, _ in won] == list(range(10))
    store = open_store(tmp_path)
    assert [store.get(f"race/{i}") for i in range(10)] == [str(pid).encode() for _, pid in won]


def test_overwrites_respect_the_lock(tmp_path: Path) -> None:
    """Between the look and the replacement of an update nobody gets in."""
    backend = LocalBackend(str(tmp_path))
    backend.put("k", b"old")
    child = run_child(
        "import sys; from s3loader.store import open_store; print('go', flush=True);"
        "open_store(sys.argv[1]).put('k', b'theirs'); print('done', flush=True)",
        str(tmp_path),
    )
    assert child.stdout is not None
    with _files.locked(os.fsencode(tmp_path), exclusive=True):
        assert child.stdout.readline() == "go\n"
        deadline = time.monotonic() + 0.3
        while child.poll() is None and time.monotonic() < deadline:
            assert bytes(backend.get("k")[1]) == b"old"
            time.sleep(0.05)
        assert child.poll() is None
    assert child.stdout.readline() == "done\n"
    child.wait(600)
    child.stdout.close()
    assert bytes(backend.get("k")[1]) == b"theirs"


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """flock belongs to the open file, which a child shares: it has to be released in words."""
    with _files.locked(os.fsencode(tmp_path), exclusive=True):
        pid = os.fork()
        if pid == 0:
            time.sleep(3600)
            os._exit(0)
    try:
        backend = LocalBackend(str(tmp_path))
        old = backend.put("k", b"x")
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the lock is still held"))
        signal.alarm(600)
        backend.put("k", b"y", mode=Update(old.etag))
        signal.alarm(0)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture
def small_files() -> Any:
    """No file may grow beyond 100 KiB: what a full disk does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_no_space(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    old = store.put("k", b"old")
    for mode in ("overwrite", Update(old.etag)):
        with pytest.raises(NoSpaceError) as caught:
            store.put("k", bytes(200 * 1024), mode=mode)  # type: ignore[arg-type]
        assert caught.value.code in ("EFBIG", "ENOSPC", "EDQUOT")
        assert caught.value.hint
    with pytest.raises(NoSpaceError), store.multipart("k", part_size=64 * 1024) as writer:
        writer.write(bytes(5 * 64 * 1024))
    assert store.get("k") == b"old"
    assert files_under(tmp_path) == ["k"]
    assert list(store.backend.list_multipart()) == []


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (errno.ENOSPC, "NoSpaceError"),
        (errno.EDQUOT, "NoSpaceError"),
        (errno.EACCES, "AccessDeniedError"),
        (errno.EROFS, "AccessDeniedError"),
        (errno.EIO, "UnavailableError"),
        (errno.ESTALE, "UnavailableError"),
        (errno.ETIMEDOUT, "StoreTimeoutError"),
        (errno.ENOENT, "ObjectNotFoundError"),
        (errno.EMFILE, "StoreError"),
    ],
)
def test_what_the_system_says_is_typed(tmp_path: Path, number: int, name: str) -> None:
    with pytest.raises(S3LoaderError) as caught, _files.Guard("put", "file:///x/k", os.fsencode(tmp_path)):
        raise OSError(number, os.strerror(number))
    assert type(caught.value).__name__ == name
    assert caught.value.url == "file:///x/k"
    assert caught.value.code == errno.errorcode[number]


def test_temporary_files_without_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with names, where the system has no others: both place the same."""
    for named in (False, True):
        if named:
            monkeypatch.delattr(os, "O_TMPFILE")
        folder = os.fsencode(tmp_path / str(named))
        os.mkdir(folder)
        temp = TempFile(folder)
        assert (temp.name is not None) == named
        temp.write(b"data")
        temp.finish({}, must_keep=False)
        temp.link(folder + b"/linked")
        temp.replace(folder + b"/replaced")
        temp.close()
        assert sorted(os.listdir(folder)) == [b"linked", b"replaced"]
        assert Path(os.fsdecode(folder), "linked").read_bytes() == b"data"
