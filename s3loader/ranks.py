"""Which process of a job this is: asked of the frameworks in use, then of the launcher's variables. Imports no framework.

Loaders and checkpoints ask here, and nowhere else, when they begin their work: a process group may be made after them.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Protocol

from s3loader.errors import ConfigError

__all__ = ["Board", "Found", "board", "find_ranks", "job_of", "ranks_on_node"]

_PAIRS: Final = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
"""Variables of torchrun (and of what follows it), and of a Slurm job step. A batch script that is no step has only the first
of Slurm's."""
_POLL: Final = 0.02
_SKEW: Final = 5.0
"""Seconds by which clocks of nodes may differ, and processes of one start begin one after the other."""
_LOADED: Final = time.time()


class Found(NamedTuple):
    """A process's place in its job."""

    rank: int
    world_size: int
    source: str
    """Who said so, for messages; empty where nobody did, and the process is alone."""


class Board(Protocol):
    """Where the processes of a job leave each other notes; no collective, so each comes when it likes."""

    def put(self, name: str, text: str) -> None:
        """Leave a note; its name is used once."""
        ...

    def get(self, name: str, seconds: float) -> str | None:
        """Read a note, waiting so long for it; None where it does not come."""
        ...


def find_ranks(environ: Mapping[str, str] | None = None) -> Found:
    """Rank and world size: of `torch.distributed` where it is initialized, then of `jax.distributed`, then of ``RANK`` and
    ``WORLD_SIZE``, then of a Slurm job step.

    Args:
        environ: Variables; default: the process's.

    Raises:
        ConfigError: a variable is no number, or the rank is not below the world size.
    """
    torch = _torch()
    if torch is not None:
        return Found(torch.get_rank(), torch.get_world_size(), "torch.distributed")
    jax = _jax()
    if jax is not None:
        return Found(jax.process_index(), jax.process_count(), "jax.distributed")
    environ = os.environ if environ is None else environ
    for rank, world_size in _PAIRS:
        if rank in environ and world_size in environ:
            return _from_variables(environ, rank, world_size)
    return Found(0, 1, "")


def ranks_on_node(environ: Mapping[str, str] | None = None) -> int:
    """How many ranks run on this machine: ``LOCAL_WORLD_SIZE`` (torchrun, Ray Train), else the most tasks that a Slurm job step
    has on one of its nodes, else 1 where this process is alone.

    Args:
        environ: Variables; default: the process's.

    Raises:
        ConfigError: nobody says, or a variable is no number.
    """
    environ = os.environ if environ is None else environ
    local, tasks = environ.get("LOCAL_WORLD_SIZE"), environ.get("SLURM_STEP_TASKS_PER_NODE")
    try:
        if local is not None:
            found = int(local)
        elif tasks is not None:
            found = max(int(group.partition("(")[0]) for group in tasks.split(","))  # "8(x2),4"
        else:
            found = 1 if find_ranks(environ).world_size == 1 else 0
    except ValueError:
        found = 0
    if found < 1:
        said = f"LOCAL_WORLD_SIZE={local!r}, SLURM_STEP_TASKS_PER_NODE={tasks!r}"
        raise ConfigError(f"how many ranks run on this node is not known: {said}", hint="set LOCAL_WORLD_SIZE to their number")
    return found


def _from_variables(environ: Mapping[str, str], rank: str, world_size: str) -> Found:
    source = f"{rank} and {world_size}"
    try:
        found = Found(int(environ[rank]), int(environ[world_size]), source)
    except ValueError:
        found = Found(-1, 0, source)
    if not 0 <= found.rank < found.world_size:
        raise ConfigError(
            f"{rank}={environ[rank]!r} and {world_size}={environ[world_size]!r} name no process of a job",
            hint="unset them, or give rank= and world_size=",
        )
    return found


def job_of(environ: Mapping[str, str]) -> str:
    """A name of this start of the job, the same in all its processes, from its launcher's variables; empty where there is none.

    torchrun's folder of error files on one node (new at every start), its ``--rdzv-id`` on several, Slurm's job and step. The
    restart count is part of it: a restarted job is another incarnation.
    """
    folder = os.path.dirname(os.path.dirname(environ.get("TORCHELASTIC_ERROR_FILE", "")))
    if folder and environ.get("LOCAL_WORLD_SIZE") == environ.get("WORLD_SIZE"):
        return f"torchelastic/{socket.gethostname()}{folder}"  # it ends with the attempt
    run = environ.get("TORCHELASTIC_RUN_ID", "none")
    if run != "none":
        return f"torchelastic/{run}/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if "SLURM_JOB_ID" in environ:
        parts = (environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"))
        return "slurm/" + "/".join(parts)
    return ""


def board(rank: int, world_size: int) -> Board | None:
    """The key-value store that a framework keeps for its processes; None where none is initialized with these ranks."""
    torch = _torch()
    if torch is not None and (torch.get_rank(), torch.get_world_size()) == (rank, world_size):
        return _TorchBoard(torch.distributed_c10d._get_default_store(), os.environ)
    jax = _jax()
    if jax is not None and (jax.process_index(), jax.process_count()) == (rank, world_size):
        return _JaxBoard(sys.modules["jax._src.distributed"].global_state.client)
    return None


class _TorchBoard:
    """Notes in the process group's store. torchrun's agents keep one store through all restarts of a job, with the notes of
    earlier starts in it: on one node the name of the start is part of a note's name, on several a note that is older than this
    process is none of this start's.
    """

    def __init__(self, store: Any, environ: Mapping[str, str]) -> None:
        self._store = store
        shared = environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        alone = environ.get("LOCAL_WORLD_SIZE") == environ.get("WORLD_SIZE")
        self._start = job_of(environ) + "/" if shared and alone else ""
        self._oldest = _begun() - _SKEW if shared and not alone else 0.0

    def put(self, name: str, text: str) -> None:
        self._store.set(self._start + name, f"{time.time()} {text}")

    def get(self, name: str, seconds: float) -> str | None:
        end = time.monotonic() + seconds
        while True:
            if self._store.check([self._start + name]):  # its `wait` would keep other threads of this process from it
                told: bytes = self._store.get(self._start + name)
                at, _, text = told.decode().partition(" ")
                if float(at) >= self._oldest:
                    return text
            if time.monotonic() > end:
                return None
            time.sleep(_POLL)


def _begun() -> float:
    """When this process began, in seconds since 1970."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return _LOADED


class _JaxBoard:
    def __init__(self, client: Any) -> None:
        self._client = client

    def put(self, name: str, text: str) -> None:
        self._client.key_value_set(name, text)

    def get(self, name: str, seconds: float) -> str | None:
        try:
            told: str = self._client.blocking_key_value_get(name, int(seconds * 1000))
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise
        return told


def _torch() -> Any:
    """`torch.distributed`, where it is in use."""
    module: Any = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_available() and module.is_initialized() else None


def _jax() -> Any:
    """`jax`, where `jax.distributed` is in use; asking more would begin its back ends."""
    state: Any = sys.modules.get("jax._src.distributed")
    return sys.modules["jax"] if state is not None and state.global_state.client is not None else None
