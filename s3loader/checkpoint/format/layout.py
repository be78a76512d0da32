"""Where everything of a run lies; keys are relative to the run's URL.

::

    s3loader.json                                     format, run id, what the store can do
    control/epoch-00000007.json                       one per job incarnation: writer fence, resume step
    control/save-<attempt>.json                       the step of a save whose ranks meet here
    control/save-dcp-<origin>.json                    the save that DCP's coordinator has under way
    control/pin-<attempt>-00000.json                  files of earlier steps that a save under way needs
    ckpt/compacted.json                               deleted steps whose tombstones are gone
    ckpt/000000001000/root.jsonl                      THE COMMIT POINT, one per step; later its tombstone
    ckpt/000000001000/root-00000001.jsonl             the same, where the step was deleted and saved again
    ckpt/000000001000/<attempt>/intent-00000.json     what rank 0 is about to do
    ckpt/000000001000/<attempt>/d-00003-000.safetensors   rank 3, file 0
    ckpt/000000001000/<attempt>/plan-00003.json       rank 3's boxes, and plan.json: who writes what
    ckpt/000000001000/<attempt>/part-00003.json       rank 3's part, written after its data is durable
    ckpt/000000001000/<attempt>/index.json.zst        all parts, merged

An attempt is ``<epoch>-<save number>-<nonce>`` and never used again, so data keys never collide,
are never overwritten and need no condition. Only the root (and the small control objects) do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from s3loader.errors import CheckpointError

__all__ = [
    "COMPACTED",
    "CONTROL",
    "INDEX",
    "MARKER",
    "PINS",
    "SAVES",
    "SHARES",
    "STEPS",
    "AttemptKey",
    "attempt_id",
    "begin_key",
    "data_id",
    "epoch_key",
    "epoch_of",
    "failure_id",
    "intent_key",
    "parse_key",
    "part_id",
    "pin_key",
    "plan_id",
    "root_key",
    "step_of",
    "step_prefix",
    "ticket_key",
]

MARKER: Final = "s3loader.json"
CONTROL: Final = "control/"
PINS: Final = "control/pin-"
SAVES: Final = "control/save-"
SHARES: Final = "plan.json"
STEPS: Final = "ckpt/"
COMPACTED: Final = "ckpt/compacted.json"
INDEX: Final = "index.json.zst"

MAX_STEP: Final = 10**12 - 1
_STEP = re.compile(r"ckpt/(\d{12})/")
_KEY = re.compile(r"ckpt/(\d{12})/(?:root(?:-(\d{8}))?\.jsonl|(\d{8}-\d{6}-[0-9a-f]{8})/(.+))")
_EPOCH = re.compile(r"control/epoch-(\d{8})\.json")


@dataclass(frozen=True, slots=True)
class AttemptKey:
    """What a key under ``ckpt/`` says: the root of a step (`attempt` is empty) or one file of an attempt."""

    step: int
    attempt: str
    file: str
    generation: int = 0
    """Of a root: how often the step was deleted and saved again before."""


def _checked(step: int) -> int:
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MAX_STEP:
        raise CheckpointError(
            f"a step is an integer from 0 to 10^12 - 1, not {step!r}",
            hint="give the number of the training step, e.g. save(1000, ...)",
        )
    return step


def step_prefix(step: int) -> str:
    """``ckpt/000000001000/``."""
    return f"{STEPS}{_checked(step):012d}/"


def root_key(step: int, generation: int = 0) -> str:
    """The commit point of `step`; `generation` counts how often the step was deleted and saved again."""
    return step_prefix(step) + (f"root-{generation:08d}.jsonl" if generation else "root.jsonl")


def attempt_id(epoch: int, save: int, nonce: str) -> str:
    """``<epoch>-<save number>-<nonce>``; `nonce` is 8 hexadecimal digits."""
    return f"{epoch:08d}-{save:06d}-{nonce}"


def data_id(rank: int, number: int) -> str:
    """Data file `number` of `rank`, as parts and index name it."""
    return f"d-{rank:05d}-{number:03d}.safetensors"


def part_id(rank: int) -> str:
    """The part manifest of `rank`."""
    return f"part-{rank:05d}.json"


def failure_id(rank: int) -> str:
    """What `rank` leaves where it cannot finish its part."""
    return f"failed-{rank:05d}.json"


def intent_key(step: int, attempt: str, rank: int) -> str:
    """What `rank` wrote before its first data."""
    return f"{step_prefix(step)}{attempt}/intent-{rank:05d}.json"


def pin_key(attempt: str, rank: int) -> str:
    """What `rank` of `attempt` needs of earlier steps."""
    return f"{PINS}{attempt}-{rank:05d}.json"


def begin_key(attempt: str) -> str:
    """Where rank 0 says which step `attempt` is."""
    return f"{SAVES}{attempt}.json"


def ticket_key(origin: str) -> str:
    """Where the coordinator `origin` of a save through DCP says which attempt it is."""
    return f"{SAVES}dcp-{origin}.json"


def plan_id(rank: int) -> str:
    """What `rank` has."""
    return f"plan-{rank:05d}.json"


def epoch_key(epoch: int) -> str:
    """The fence of job incarnation `epoch`."""
    return f"{CONTROL}epoch-{epoch:08d}.json"


def epoch_of(key: str) -> int | None:
    """The epoch whose object `key` is, None for any other key."""
    match = _EPOCH.fullmatch(key)
    return int(match.group(1)) if match else None


def step_of(prefix: str) -> int | None:
    """The step whose folder `prefix` is, None for any other."""
    match = _STEP.fullmatch(prefix)
    return int(match.group(1)) if match else None


def parse_key(key: str) -> AttemptKey | None:
    """What a key under ``ckpt/`` is; None where it is nothing of ours (and is left alone)."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    step, generation, attempt, file = match.groups()
    if attempt:
        return AttemptKey(int(step), attempt, file)
    return AttemptKey(int(step), "", key.rpartition("/")[2], int(generation or 0))
