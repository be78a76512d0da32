"""Tasks that know nothing of one another, run here or on a cluster: the one seam between what cuts a job and what runs it.

A job is cut by its own planner, the same way whoever runs it. A task may be run twice, also at the same time: it must not
change what another run of it has done.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeVar

from s3loader.arguments import whole_number
from s3loader.errors import ConfigError
from s3loader.options import one_of
from s3loader.store.open import JobKeywords, StoreKeywords

__all__ = ["JobEngine", "LocalProcesses", "TaskExecutor", "batches", "executor_of"]

T = TypeVar("T")
R = TypeVar("R")

JobEngine: TypeAlias = Literal["local", "ray"]
"""Where the tasks of a job run: processes or threads of this machine, or a Ray cluster."""

_STORE_ENGINES: Final = ("auto", "direct", "obstore", "boto3")


class TaskExecutor(Protocol):
    """Runs tasks elsewhere; ``s3loader_NAME.executor.executor(workers, address)`` makes that called NAME."""

    def run(self, task: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[int, R]]:
        """``task(item)`` of each item.

        Yields:
            The number of an item and its result, in the order in which the tasks end.

        Raises:
            Exception: what the first failing task raised; tasks that were not begun by then are not begun any more.
            WorkerError: a process or node died again and again.
        """
        ...

    def size(self) -> int:
        """How many tasks run at a time, about. Asked before `run`, which ends the use of an executor."""
        ...


class LocalProcesses:
    """So many processes of this machine."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def size(self) -> int:
        """The number of processes."""
        return self._workers

    def run(self, task: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[int, R]]:
        """As `TaskExecutor.run`."""
        with ProcessPoolExecutor(self._workers) as pool:
            jobs = {pool.submit(task, item): number for number, item in enumerate(items)}
            try:
                for job in as_completed(jobs):
                    yield jobs[job], job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def executor_of(keywords: JobKeywords, workers: Any = 0) -> tuple[TaskExecutor | None, StoreKeywords]:
    """Who runs the tasks of a job, and the keywords that are left for `open_store`.

    Args:
        keywords: Of the job: ``engine`` is ``"local"`` (the default) or ``"ray"``, or one of `open_store`'s; ``address`` is
            that of the cluster: default ``RAY_ADDRESS``, else a cluster on this machine for the time of the job.
        workers: Tasks at a time; 0: the calling process, or as many as the cluster has room for.

    Returns:
        None for the executor where the calling process does the work.

    Raises:
        ConfigError: an argument is unusable, or the engine is not installed.
    """
    place: dict[str, Any] = dict(keywords)
    address = place.pop("address", None)
    count = whole_number(workers)
    if count is None or count < 0:
        raise ConfigError(f"workers cannot be {workers!r}", hint="0: this process, or all of the cluster; else so many others")
    name = place.get("engine", "local")
    if name in _STORE_ENGINES:
        name = "local"
    else:
        place.pop("engine", None)
    one_of("engine", name, JobEngine)
    if name == "local":
        if address is not None:
            raise ConfigError("address is that of a cluster", hint='add engine="ray" (--engine ray)')
        return (LocalProcesses(count) if count else None), place  # type: ignore[return-value]
    try:
        module = importlib.import_module(f"s3loader_{name}.executor")
    except ModuleNotFoundError as error:
        if error.name not in (name, f"s3loader_{name}"):
            raise
        raise ConfigError(f"engine={name!r} needs {name}", hint=f"pip install 's3loader[{name}]'") from error
    found: TaskExecutor = module.executor(count, address)
    if place.get("s3_client") is not None:
        raise ConfigError("s3_client= cannot be sent to other machines", hint="give endpoint_url, region, or settings")
    return found, place  # type: ignore[return-value]


def batches(items: Iterable[T], size_of: Callable[[T], int], most: int, longest: int) -> Iterator[list[T]]:
    """Neighbouring items as tasks of at most `most` bytes and `longest` items; one that is larger is a task alone."""
    batch: list[T] = []
    held = 0
    for item in items:
        size = size_of(item)
        if batch and (held + size > most or len(batch) >= longest):
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += size
    if batch:
        yield batch
