"""What a process imports until its first object has come: it waits for all of it before it sends a request."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from rogue_server import KEY_ID, SECRET, RogueServer

FIRST = """
import json, sys
from s3loader.store import StoreOptions, open_store
options, keywords = StoreOptions(unsigned=sys.argv[3] == "anonymous"), {}
if sys.argv[3] == "static":
    keywords = {"access_key_id": sys.argv[4], "secret_access_key": sys.argv[5]}
store = open_store(sys.argv[1], endpoint_url=sys.argv[2], region="us-east-1", options=options, **keywords)
assert store.get("first") == b"came"
print(json.dumps(sorted(sys.modules)))
"""
NOT_NEEDED = (
    "asyncio", "awscrt", "boto3", "botocore", "click", "msgspec", "numpy", "obstore", "rich", "urllib3",
    "zstandard", "s3loader.aio", "s3loader.checkpoint", "s3loader.cli", "s3loader.exchange", "s3loader.loader", "s3loader.plan",
    "s3loader.shard", "s3loader.store.aio", "s3loader.store.boto3.engine", "s3loader.store.obstore.engine", "s3loader.toolbox",
)  # fmt: skip
MOST = 60
"""Modules of our own, most of them the object layer's."""


@pytest.mark.parametrize("who", ["static", "anonymous"])
def test_a_first_read_imports_what_it_needs(who: str) -> None:
    with RogueServer() as server:
        server.objects["first"] = b"came"
        argv = [sys.executable, "-c", FIRST, "s3://bucket", server.endpoint_url, who, KEY_ID, SECRET]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert len(server.requests) == 1
    modules: list[str] = json.loads(done.stdout)
    assert [name for name in modules if name in NOT_NEEDED] == []
    ours = [name for name in modules if name.split(".")[0] == "s3loader"]
    assert len(ours) <= MOST, ours
