"""From the public call to the socket in few steps: each is a file a reader has to open."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import s3loader
from s3loader.testing import Server, ServerKind

OURS = str(Path(s3loader.__file__).parent)


def deepest(call: Callable[[], Any]) -> list[str]:
    """Functions of ours on the stack where the socket is written to; the checks of arguments in front are the call itself."""
    found: list[str] = []

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event != "c_call" or getattr(arg, "__name__", "") not in ("send", "sendmsg", "sendall"):
            return
        stack = []
        at: FrameType | None = frame
        while at is not None:
            if at.f_code.co_filename.startswith(OURS) and not at.f_code.co_filename.endswith("arguments.py"):
                stack.append(f"{Path(at.f_code.co_filename).name}:{at.f_code.co_qualname}")
            at = at.f_back
        found[:] = found or reversed(stack)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("mode", ["overwrite", "create"])
def test_a_put_reaches_the_socket_in_seven_calls(servers: Callable[[ServerKind], Server], mode: Any) -> None:
    running = servers("moto")
    with running.open_store(running.bucket()) as store:
        store.put("warm", b"x")
        calls = deepest(lambda: store.put("k", b"x", mode=mode))
    assert calls, "nothing was sent"
    assert len(calls) <= 7, calls
