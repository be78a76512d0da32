"""What goes wrong for people: each command that looks at data ends with its code and two lines, and never with a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s3loader import CheckpointManager, PutRequest
from s3loader.cli.main import COMMANDS, root
from s3loader.oplog import OpRecord, write_op_log
from s3loader.packing import pack
from s3loader.testing import FaultProxy, Rule, Server, server
from s3loader.types import ObjectMeta

Command = Any
QUICK = ("--seconds", "0.3", "--max-bytes", "1MiB")
ON_DATA = [
    ("ls-samples", "{}/manifest.jsonl"),
    ("index", "{}/manifest.jsonl"),
    ("index", "{}/a.tar"),
    ("manifest", "show", "{}/manifest.jsonl"),
    ("manifest", "compact", "{}/manifest.jsonl"),
    ("manifest", "merge", "{}/manifest.jsonl", "{}/new.jsonl"),
    ("manifest", "from-prefix", "{}/data/", "{}/new.jsonl"),
    ("manifest", "append", "{}/new.jsonl", "{}/a.tar"),
    ("repack", "{}/manifest.jsonl", "{}/new"),
    ("loader", "{}/manifest.jsonl"),
    ("check", "{}/manifest.jsonl"),
    ("bench", "get", "{}", "--existing", "-j", "1", *QUICK),
    ("bench", "load", "{}/manifest.jsonl", "--existing", *QUICK),
]
ON_STORE = [
    ("bench", "get", "{}", "-s", "4KiB", "-j", "1", *QUICK),
    ("bench", "put", "{}", "-s", "4KiB", "-j", "1", *QUICK),
    ("bench", "load", "{}", *QUICK),
    ("bench", "ckpt", "{}", "-s", "64KiB", *QUICK),
    ("put", "{}/x", "-s", "10", "--data-gen-mode", "streaming"),
]


def named(case: tuple[str, ...]) -> str:
    return "-".join(case[:2]).replace("{}/", "")


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server("rclone") as found:
        yield found


@pytest.fixture(scope="module")
def bucket(s3: Server) -> str:
    return s3.bucket()


@pytest.fixture
def place(s3: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{bucket}/x"


@pytest.mark.parametrize("case", [*ON_DATA, *ON_STORE], ids=named)
def test_no_such_bucket_no_rights_no_credentials(
    command: Command, place: str, monkeypatch: pytest.MonkeyPatch, case: tuple[str, ...]
) -> None:
    missing = [part.format("s3://no-such-bucket-of-anyone/x") for part in case]
    command(*missing, code=4)
    if case in ON_DATA:
        command(*[part.format(place) for part in case], code=4)
    here = [part.format(place) for part in case]
    with monkeypatch.context() as patch:
        for name in ("S3_AWS_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "not-the-secret")
        command(*here, code=3)
        assert "not-the-secret" not in command.err
    with monkeypatch.context() as patch:
        for name in ("S3_AWS_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY", "S3_AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID"):
            patch.delenv(name)
        command(*here, code=3)
        assert "redentials" in command.err


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    pack([{"bin": b"%d" % n, "cls": n % 3} for n in range(40)], str(tmp_path / "train"), shard_size="64KiB")
    return tmp_path / "train"


AS_NOBODY = """
import contextlib, json, os, sys
from s3loader.cli.main import main
cases = json.loads(sys.argv[1])
with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
    for place, mode, arguments in cases[::2]:
        sys.argv = ["s3loader", *arguments]
        with contextlib.suppress(SystemExit):
            main()  # imports what it needs
found = []
for place, mode, arguments in cases:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 2)
        os.chdir(place)
        for name in ("manifest.jsonl", "a.tar", "data"):
            os.chmod(name, 0)
        os.chmod(".", mode)
        os.setgid(65534)
        os.setuid(65534)
        sys.argv = ["s3loader", *arguments]
        try:
            main()
        except SystemExit as ended:
            sys.stderr.flush()
            os._exit(ended.code or 0)
        os._exit(99)
    os.close(write)
    with open(read) as file:
        err = file.read()
    found.append([arguments, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), err])
print(json.dumps(found))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_files_that_may_not_be_read() -> None:
    """As another user, because to root nothing is forbidden, and below a folder of its own that others may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        first = Path(folder, "first")
        pack([{"bin": b"%d" % n, "cls": n % 3} for n in range(10)], str(first), shard_size="64KiB")
        (first / "data").mkdir()
        for name in ("a.tar", "data/b.tar"):
            shutil.copy(next(first.rglob("*.tar")), first / name)
        cases: list[Any] = []
        for number, (case, mode) in enumerate((case, mode) for case in ON_DATA for mode in (0o755, 0)):
            place = Path(folder, str(number))
            shutil.copytree(first, place)
            cases.append((str(place), mode, [part.format(place) for part in case]))
        environment = {**os.environ, "HOME": "/nowhere"}
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, json.dumps(cases)],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert len(found) == len(cases)
        for arguments, code, err in found:
            assert code in (1, 3, 4), (arguments, code, err)
            assert "Traceback" not in err, (arguments, err)
            assert [line.split(":")[0] for line in err.splitlines()[-2:]] == ["error", "hint"], (arguments, err)


@pytest.mark.parametrize(
    "case",
    [
        ("loader", "{}/manifest.jsonl", "--html", "/dev/full"),
        ("bench", "get", "{}", "-s", "4KiB", "-j", "1", *QUICK, "--html", "/dev/full"),
        ("manifest", "from-prefix", "{}", "{}/pack.json/x.jsonl"),
        ("index", "{}/manifest.jsonl", "--index-dir", "{}/manifest.jsonl/x"),
        ("repack", "{}/manifest.jsonl", "{}/manifest.jsonl/x"),
    ],
    ids=named,
)
def test_nowhere_to_write(command: Command, dataset: Path, case: tuple[str, ...]) -> None:
    before = sorted(path.name for path in dataset.rglob("*"))
    command(*[part.format(dataset) for part in case], code=1)
    assert sorted(path.name for path in dataset.rglob("*")) == before
    assert Path("/dev/full").is_char_device()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More samples than a pipe takes lines of."""
    folder = tmp_path_factory.mktemp("many")
    pack([{"bin": b"%d" % n} for n in range(4000)], str(folder))
    return folder


@pytest.mark.parametrize(
    "case", [("ls-samples", "{}/manifest.jsonl"), ("manifest", "show", "{}/manifest.jsonl", "--members")], ids=named
)
def test_a_reader_that_goes_away(many: Path, case: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "s3loader", *(part.format(many) for part in case)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline()
    running.stdout.close()
    assert running.stderr is not None
    err = running.stderr.read()
    running.stderr.close()
    assert running.wait(60) == 141, err
    assert err == ""


@pytest.mark.parametrize("mode", ["streaming", "single-pass"])
@pytest.mark.parametrize("kind", ["RAW", "TFRECORD", "NPZ"])
def test_both_modes_of_put_write_the_same(command: Command, tmp_path: Path, mode: str, kind: str) -> None:
    put = ("put", "-n", 3, "-s", "300KiB", "-o", kind, "--seed", 7)
    command(*put, f"{tmp_path}/whole/")
    done = command.json(*put, f"{tmp_path}/out/", "--data-gen-mode", mode, "--chunk-size", "4096")
    assert (done["objects"], done["bytes"]) == (3, sum(path.stat().st_size for path in (tmp_path / "out").iterdir()))
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    command(*put, f"{tmp_path}/out/", "--chunk-size", "0", code=3)
    command(*put, f"{tmp_path}/out/", "--data-gen-mode", "x", code=2)


# -- another region ---------------------------------------------------------------------------------

HERE = "eu-west-9"
ON_S3 = [
    *ON_DATA,
    *ON_STORE,
    ("ls", "-r", "{}/"),
    ("list", "{}/"),
    ("du", "{}/"),
    ("stat", "{}/a.tar"),
    ("get", "{}/a.tar"),
    ("mp-get", "{}/data/", "-p", "1"),
    ("download", "{}/data/", "{local}/down"),
    ("upload", "{local}/file", "{}/up/"),
    ("cp", "{}/a.tar", "{}/b.tar"),
    ("copy", "{}/a.tar", "{local}/b.tar"),
    ("sync", "{}/data/", "{}/synced/"),
    ("rm", "{}/a.tar", "--dry-run"),
    ("delete", "-r", "{}/data/"),
    ("delete-bucket", "s3://{bucket}", "--dry-run"),
    ("create-bucket", "s3://{bucket}"),
    ("list-buckets",),
    ("doctor", "{}"),
    ("gen", "{}/gen", "-s", "10"),
    ("pack", "{local}/folder", "{}/packed"),
    ("manifest", "delete", "{}/manifest.jsonl"),
    ("ckpt", "ls", "{}/run"),
    ("ckpt", "latest", "{}/run"),
    ("ckpt", "inspect", "{}/run"),
    ("ckpt", "verify", "{}/run"),
    ("ckpt", "gc", "{}/run"),
    ("ckpt", "diff", "{}/run", "1", "2"),
    ("ckpt", "export", "{}/run", "{local}/out.safetensors"),
    ("ckpt", "delete", "{}/run", "1"),
    ("ckpt", "rollback", "{}/run", "1"),
    ("oplog", "replay", "{local}/log.tsv.zst", "--to", "{}/replayed", "--prepare"),
]
LOCAL = {"completion", "config", "top", "oplog"}
"""Commands that ask no store, but for `oplog replay`."""


@pytest.fixture(scope="module")
def moto() -> Iterator[Server]:
    with server() as found:
        yield found


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the commands take, by key: it may be copied anywhere."""
    folder = tmp_path_factory.mktemp("template")
    pack([{"bin": b"%d" % n, "cls": n % 3} for n in range(10)], str(folder), shard_size="64KiB")
    with CheckpointManager(str(folder / "run")) as manager:
        for step in (1, 2):
            manager.save(step, {"a": np.arange(5)}).result()
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    tar = next(data for name, data in found.items() if name.endswith(".tar"))
    return found | {"a.tar": tar, "data/b.tar": tar}


@pytest.fixture
def elsewhere(moto: Server, template: dict[str, bytes], tmp_path: Path) -> dict[str, str]:
    """A bucket of its own, and a folder."""
    bucket = moto.bucket()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    (tmp_path / "file").write_text("a")
    write_op_log(str(tmp_path / "log.tsv.zst"), [OpRecord("GET", "some/k", 0, 1, bytes=5)])
    with moto.open_store(f"{bucket}/x") as store:
        list(store.put_many(PutRequest(name, data) for name, data in template.items()))
    return {"bucket": bucket, "local": str(tmp_path), "place": f"s3://{bucket}/x"}


def test_the_table_has_every_command() -> None:
    assert {case[0] for case in ON_S3} >= COMMANDS.keys() - LOCAL


@pytest.mark.parametrize("answer", ["malformed", "redirect"])
@pytest.mark.parametrize("case", ON_S3, ids=named)
def test_a_bucket_of_another_region(
    command: Command,
    moto: Server,
    elsewhere: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[str, ...],
    answer: str,
) -> None:
    """The command follows it there; what is no request to one bucket says which region it is."""
    followed = case[0] not in ("list-buckets", "create-bucket")
    with FaultProxy(moto.endpoint_url, region=HERE, redirect=answer == "redirect") as proxy:
        for name, value in {**moto.environment, "S3_ENDPOINT_URL": proxy.endpoint_url}.items():
            monkeypatch.setenv(name, value)
        arguments = [part.format(elsewhere["place"], **elsewhere) for part in case]
        if followed or case[0] == "create-bucket":  # which is there
            command(*arguments)
        else:
            command(*arguments, code=3)
            assert HERE in command.err
        refused = [request for request in proxy.requests if request.status in (301, 400)]
    assert refused
    assert not followed or len(refused) < len(proxy.requests)


def test_a_bucket_cannot_be_made_where_the_endpoint_is_of_another_region(
    command: Command, moto: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(moto.endpoint_url, region=HERE) as proxy:
        for name, value in {**moto.environment, "S3_ENDPOINT_URL": proxy.endpoint_url}.items():
            monkeypatch.setenv(name, value)
        command("create-bucket", "s3://made-elsewhere", code=3)
        assert "us-east-1" in command.err
        assert "--region" in command.err
        command("--region", HERE, "create-bucket", "s3://made-elsewhere")
        monkeypatch.setenv("S3_REGION", HERE)
        command("delete-bucket", "s3://made-elsewhere")


# -- Ctrl-C -----------------------------------------------------------------------------------------

WRITERS = [
    (("index", "{}/a.tar"), "GET", "a.tar"),
    (("index", "{}/a.tar"), "PUT", "a.tar.idx"),
    (("manifest", "compact", "{}/manifest.jsonl"), "GET", "manifest"),
    (("manifest", "compact", "{}/manifest.jsonl", "{}/flat.jsonl"), "PUT", "flat"),
    (("manifest", "append", "{}/manifest.jsonl", "{}/a.tar"), "PUT", "part-"),
    (("manifest", "merge", "{}/manifest.jsonl", "{}/new.jsonl"), "PUT", "new.jsonl"),
    (("manifest", "from-prefix", "{}/data/", "{}/new.jsonl"), "PUT", "new.jsonl"),
    (("manifest", "compact", "{}/manifest.jsonl"), "HEAD", "tar"),
    (("manifest", "delete", "{}/manifest.jsonl"), "POST", ""),
    (("loader", "{}/manifest.jsonl", "--html", "{local}/page.html"), "GET", "tar"),
    (("ls-samples", "{}/manifest.jsonl"), "GET", "idx"),
]
"""A command, and the request in the middle of which it is interrupted."""


@pytest.mark.parametrize(("case", "method", "path"), WRITERS, ids=lambda part: named(part) if isinstance(part, tuple) else part)
def test_ctrl_c_in_the_middle(moto: Server, elsewhere: dict[str, str], case: tuple[str, ...], method: str, path: str) -> None:
    """It ends at once, says nothing of its insides, and nothing is there that was not before."""
    rule = Rule("hold", method=method, path=path)
    bucket, local = elsewhere["bucket"], Path(elsewhere["local"])
    with moto.open_store(bucket) as store, FaultProxy(moto.endpoint_url, [rule]) as proxy:
        before = {meta.key: (meta.size, meta.etag) for meta in store.list() if isinstance(meta, ObjectMeta)}
        files = sorted(local.iterdir())
        running = subprocess.Popen(
            [sys.executable, "-m", "s3loader", *(part.format(elsewhere["place"], **elsewhere) for part in case)],
            env={**os.environ, **moto.environment, "S3_ENDPOINT_URL": proxy.endpoint_url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert rule.reached.wait(300)
            running.send_signal(signal.SIGINT)
            out, err = running.communicate(timeout=300)
        finally:
            running.kill()
        assert running.returncode == 130, (out, err)
        assert "Traceback" not in err
        after = {meta.key: (meta.size, meta.etag) for meta in store.list() if isinstance(meta, ObjectMeta)}
        assert after == before
        assert not list(store.backend.list_multipart())
        assert sorted(local.iterdir()) == files


# -- the command itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("option", [option for param in root.params for option in param.opts if option.startswith("--")])
def test_an_option_of_all_commands_behind_one(command: Command, option: str) -> None:
    """It says where it belongs, unless the command has one of that name itself."""
    if option in ("--help", "--version"):
        return
    command("ls", ".", option, code=2)
    assert f"s3loader {option} ... COMMAND" in command.err


def test_a_log_that_is_not_there(command: Command, tmp_path: Path) -> None:
    command("oplog", "summarize", tmp_path / "nothing", code=4)
    assert "hint: check the path" in command.err
