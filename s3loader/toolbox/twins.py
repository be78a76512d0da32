"""The async twin of a function: the same, run in one of a few threads, so that the logic exists once."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, ParamSpec, TypeVar

__all__ = ["in_thread", "twin"]

P = ParamSpec("P")
T = TypeVar("T")

_THREADS: Final = 64
_executor: ThreadPoolExecutor | None = None
_pid = 0


async def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The value of `call`, made in a thread."""
    global _executor, _pid
    if _executor is None or _pid != os.getpid():
        _executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="s3loader-s3")
        _pid = os.getpid()
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_executor, functools.partial(call, *args, **kwargs))


def twin(function: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The coroutine function of `function`, with its arguments and documentation, called ``..._async``."""

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return await in_thread(function, *args, **kwargs)

    call.__name__ = f"{function.__name__}_async"
    call.__qualname__ = call.__name__
    return call
