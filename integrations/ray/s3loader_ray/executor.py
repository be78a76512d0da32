"""Tasks of s3loader's jobs, run by a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from s3loader import ConfigError, S3LoaderError, WorkerError

__all__ = ["RayExecutor", "executor"]

T = TypeVar("T")
R = TypeVar("R")

_AHEAD: Final = 2
"""Tasks that are handed to Ray for each that can run."""
_RETRIES: Final = 3
"""Of a task whose process or node died."""
_PATIENCE: Final = 10.0
"""Seconds to wait for a cluster's port."""
_WHERE: Final = ("S3_ENDPOINT_URL", "S3_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Variables of the caller that hold for its tasks: where the store is. Credentials are each node's own."""


def executor(workers: int, address: str | None) -> RayExecutor:
    """The executor that ``engine="ray"`` means."""
    return RayExecutor(workers, address)


class RayExecutor:
    """Runs tasks on the cluster this process is connected to; else on that at `address` or ``RAY_ADDRESS``; else on one that is
    started on this machine, and ends with the job.

    Args:
        workers: Tasks at a time; 0: as many as the cluster has CPUs.
        address: Of the cluster, as `ray.init` takes it.
    """

    def __init__(self, workers: int, address: str | None) -> None:
        self._workers = workers
        self._address = address
        self._connection = contextlib.ExitStack()
        self._connected = False

    def _connect(self) -> None:
        if not self._connected:
            self._connection.enter_context(connected(self._address))
            self._connected = True

    def size(self) -> int:
        """Tasks at a time. A cluster that is started for it stays until `run` has ended."""
        self._connect()
        return self._workers or max(1, int(ray.cluster_resources().get("CPU", 1)))

    def run(self, task: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[int, R]]:
        """``task(item)`` of each item, as they end.

        A task whose process or node dies is run again, three times. What it raises itself is not tried again here: requests
        were repeated already where that may help.

        Raises:
            Exception: what the first failing task raised; those that were not begun are cancelled.
            WorkerError: processes died again and again, or the cluster is gone.
            ConfigError: no cluster answers, or the task cannot be pickled.
        """
        size = self.size()
        with self._connection:
            self._connected = False
            yield from _run(task, items, size if self._workers else _AHEAD * size)


def _run(task: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[tuple[int, R]]:
    remote = ray.remote(num_cpus=1, max_retries=_RETRIES, retry_exceptions=False)(_call)
    where = {name: os.environ[name] for name in _WHERE if name in os.environ}
    waiting = iter(enumerate(items))
    running: dict[Any, int] = {}
    try:
        shared = ray.put(task)
        while True:
            while len(running) < most and (following := next(waiting, None)) is not None:
                running[remote.remote(shared, following[1], where)] = following[0]
            if not running:
                return
            (done,), _ = ray.wait([*running], num_returns=1)
            number = running.pop(done)
            result, error = ray.get(done)
            if error is not None:
                raise error
            yield number, result
    except RayTaskError as failure:
        if isinstance(failure.cause, RayError):
            raise _not_loaded(failure.cause) from failure
        raise failure.cause from failure
    except RayError as failure:
        raise _lost(failure) from failure
    except TypeError as failure:
        if "serialize" not in str(failure):
            raise
        raise ConfigError(
            f"it cannot be sent to other processes: {str(failure).splitlines()[0]}",
            op="ray",
            hint="give a folder, a URL, a table, or a function and its inputs (optimize); not an iterator",
        ) from failure
    finally:
        for reference in running:
            with contextlib.suppress(RayError):
                ray.cancel(reference)


def _call(task: Callable[[Any], Any], item: Any, where: dict[str, str]) -> tuple[Any, S3LoaderError | None]:
    """In a worker process of the cluster."""
    os.environ.update(where)
    try:
        return task(item), None
    except S3LoaderError as error:
        error.add_note(f"s3loader: in a Ray task on node {ray.util.get_node_ip_address()}")
        return None, error


def _not_loaded(failure: RayError) -> ConfigError:
    return ConfigError(
        f"a node cannot load the task: {str(failure).splitlines()[0].removeprefix('System error: ')}",
        op="ray",
        hint="install the same packages on every node (or by Ray's runtime_env), or define the function in your program",
    )


def _lost(failure: RayError) -> WorkerError:
    reason = str(failure).strip().splitlines()
    return WorkerError(
        f"Ray lost a task: {reason[0] if reason else type(failure).__name__}",
        op="ray",
        hint="run it again: what is finished is kept; `ray status` and the memory of the nodes tell more",
    )


def _look_for(address: str) -> None:
    """Whether anybody listens at ``host:port``; Ray itself would try for minutes.

    Raises:
        ConfigError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except OSError as failure:
        raise _no_cluster(f"{address}: {failure}") from failure


def _no_cluster(reason: str) -> ConfigError:
    return ConfigError(
        f"no Ray cluster answers: {reason}",
        op="ray",
        hint="check address= (--address) or RAY_ADDRESS; without both, a cluster is started on this machine",
    )


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A connection to a cluster: one that is there already stays; one that is made here ends here.

    Raises:
        ConfigError: no cluster answers at `address`, or this process is connected to another one.
    """
    if ray.is_initialized():
        there = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", "local", there) and not str(address).startswith("ray://"):
            raise ConfigError(
                f"this process is connected to the Ray cluster at {there}, not {address}",
                op="ray",
                hint="leave address out, or call ray.shutdown() before",
            )
        yield
        return
    given: dict[str, Any] = {}
    if address is None and "RAY_ADDRESS" not in os.environ:
        given = {"address": "local", "include_dashboard": False}
    elif address is not None:
        given = {"address": address}
    _look_for(address or os.environ.get("RAY_ADDRESS", ""))
    try:
        ray.init(**given, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as failure:
        raise _no_cluster(str(failure).strip().splitlines()[0]) from failure
    try:
        yield
    finally:
        ray.shutdown()
