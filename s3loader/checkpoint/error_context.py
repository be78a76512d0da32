"""Errors learn where they happened: code that plans or checks knows names and shapes, its callers know the run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from s3loader.errors import S3LoaderError

__all__ = ["add_context", "error_context", "with_error_context"]

Method = TypeVar("Method", bound=Callable[..., Any])


def add_context(error: BaseException, op: str, url: str) -> None:
    """Give `error` the operation and the URL that it lacks, where it is one of ours."""
    if isinstance(error, S3LoaderError):
        error.url = error.url or url
        if not error.details.get("committed"):  # it says itself what has happened
            error.op = error.op or op


@contextmanager
def error_context(op: str, url: str) -> Iterator[None]:
    """What is raised in the block tells `op` and `url`, unless it knows better."""
    try:
        yield
    except S3LoaderError as error:
        add_context(error, op, url)
        raise


def with_error_context(op: str) -> Callable[[Method], Method]:
    """Decorates methods of an object whose `_where` is a URL: what they raise says `op` and that URL."""

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def called(self: Any, *args: Any, **kwargs: Any) -> Any:
            with error_context(op, self._where):
                return method(self, *args, **kwargs)

        return cast("Method", called)

    return decorate
