"""Places of every scheme that needs no account, as the functions of the toolbox take them."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from s3loader import s3
from s3loader.s3 import create_bucket
from s3loader.testing import Server, ServerKind, server


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[ServerKind], Server]]:
    """A running server of a kind."""
    running: dict[ServerKind, Server] = {}
    with contextlib.ExitStack() as stack:

        def get(kind: ServerKind) -> Server:
            if kind not in running:
                running[kind] = stack.enter_context(server(kind))
            return running[kind]

        yield get
    s3.close()


@pytest.fixture
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: Callable[[ServerKind], Server]
) -> str:
    """URL of an empty bucket (or folder) without a slash at its end; the environment says how to reach it."""
    kind: Any = getattr(request, "param", "moto")
    name = f"box-{uuid.uuid4().hex[:12]}"
    if kind == "memory":
        create_bucket(f"memory://{name}")
        return f"memory://{name}"
    if kind == "file":
        folder = tmp_path / name
        folder.mkdir()
        return f"file://{folder}"
    running = servers(kind)
    for variable, value in running.environment.items():
        monkeypatch.setenv(variable, value)
    return f"s3://{running.bucket(name)}"
