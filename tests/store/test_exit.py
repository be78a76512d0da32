"""Short scripts: whatever was asked of the store last, the process ends as it should."""

from __future__ import annotations

import collections
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

from s3loader.testing import Server, ServerKind

# One interpreter imports what the scripts need, without obstore, which may not be loaded before a fork. Each fork of it is a
# script: it falls off the end of the file, so its interpreter closes as any other. The first process counts their ends.
SCRIPTS = """
import json, os, sys
from s3loader.errors import ObjectExistsError, ObjectNotFoundError
from s3loader.store import open_store
import boto3, s3loader.store.obstore.engine

bucket, endpoint, key, secret, engine, count = sys.argv[1:]

def last(number):
    where = dict(endpoint_url=endpoint, access_key_id=key, secret_access_key=secret, region="us-east-1")
    store = open_store(f"s3://{bucket}", engine=engine, **where)
    verb = ("head", "create", "exists", "missing", "large", "delete")[number % 6]
    if verb == "head":
        store.head("k")
    elif verb == "create":
        store.put(f"{engine}/{number}", b"x" * 1000, mode="create")
    elif verb == "exists":
        try:
            store.put("k", b"x" * 1000, mode="create")
        except ObjectExistsError:
            pass
    elif verb == "missing":
        try:
            store.get("nothing")
        except ObjectNotFoundError:
            pass
    elif verb == "large":
        try:
            store.put("k", bytes(1 << 20), mode="create", metadata={"a": "b"})
        except ObjectExistsError:
            pass
    else:
        store.delete(f"{engine}/nothing")

running, codes, number = set(), [], 0
while number < int(count) or running:
    if number < int(count) and len(running) < 4:
        pid = os.fork()
        if pid == 0:
            assert "obstore._obstore" not in sys.modules
            last(number)
            break
        running.add(pid)
        number += 1
    else:
        pid, status = os.wait()
        running.discard(pid)
        codes.append(os.waitstatus_to_exitcode(status))
else:
    print(json.dumps(codes))
"""


def test_a_hundred_short_scripts(servers: Callable[[ServerKind], Server], shared_bucket: Callable[[ServerKind], str]) -> None:
    count = 102
    running, bucket = servers("ministack"), shared_bucket("ministack")
    with running.open_store(bucket) as store:
        store.put("k", b"there")
    arguments = [bucket, running.endpoint_url, running.access_key_id, running.secret_access_key, "auto", str(count)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPTS, *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    codes = collections.Counter(json.loads(done.stdout))
    assert codes == {0: count}, done.stderr[-3000:]
    assert not done.stderr


LEFT = """
import sys
from s3loader.config import S3Settings
from s3loader.credentials import CredentialsSource
from s3loader.endpoint import Endpoint
from s3loader.store import StoreOptions
from s3loader.store.obstore.engine import ObstoreS3Reader
given = S3Settings(endpoint_url=sys.argv[1], aws_access_key_id="k", aws_secret_access_key="s", region="us-east-1")
endpoint = Endpoint.from_settings(given, "bucket")
reader = ObstoreS3Reader(endpoint, CredentialsSource(given), StoreOptions(max_attempts=1, read_timeout=600))
try:
    reader.get("k")
except KeyboardInterrupt:
    print("left", flush=True)
"""
NOTHING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


def test_the_answer_to_a_call_that_was_left_comes_at_exit() -> None:
    """A Ctrl-C leaves the call alone; what it brings must not come upon an interpreter that is half gone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for _ in range(3):
            child = subprocess.Popen(
                [sys.executable, "-c", LEFT, url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            with child:
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(1)
                    child.send_signal(signal.SIGINT)
                    assert child.stdout is not None
                    assert child.stdout.readline() == "left\n"
                    connection.sendall(NOTHING)
                    _, err = child.communicate(timeout=600)
            assert (child.returncode, err) == (0, "")
