"""Options of a `CheckpointManager`, as plain numbers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from s3loader.arguments import checked, local_path
from s3loader.checkpoint.format.segments import BLOCK
from s3loader.errors import ConfigError
from s3loader.options import at_least, changed, fill, one_of
from s3loader.units import GIB, parse_duration, parse_size

__all__ = ["CheckpointOptions", "OnCorruption", "OnExists", "Overlap"]

OnExists: TypeAlias = Literal["error", "replace", "skip"]
OnCorruption: TypeAlias = Literal["raise", "previous"]
Overlap: TypeAlias = Literal["queue", "refuse"]


@checked
@dataclass(frozen=True, slots=True, init=False)
class CheckpointOptions:
    """How checkpoints are written and read. Sizes and durations are taken as numbers or as text (``"64MiB"``, ``"10m"``).

    Args:
        staging_budget: Most bytes of staging memory. State that is larger is staged piece by piece while it is
            uploaded, and `save` returns when the last piece was copied. The memory is kept for the next save.
        part_size: Bytes of an upload part and of a staging buffer (S3 wants at least 5 MiB); it is rounded to a multiple
            of 16 MiB where it is larger than that. A tensor may have 10,000 parts. To S3 parts are smaller, down to 5 MiB, or
            up to a sixteenth larger, where that gives all of `concurrency` as much to send.
        file_size: Bytes of a data file, about.
        concurrency: Most parts uploaded at a time. To S3 a save begins with as many as it has, halves them where the store
            says "slow down", and adds more while that pays; elsewhere it begins with 8.
        overlap: A save while another is under way: ``"queue"`` it behind the other, or ``"refuse"`` it.
        incremental: Refer to the newest step for tensors that have not changed, instead of writing them again.
        resume_uploads: Where a save was interrupted (killed, or an outage longer than the retries) and the same step is saved
            again with the same state, go on with what the store holds of it. Then a failed save leaves its open uploads, for
            the next try or for garbage collection.
        check_replicas: Where several ranks hold the same tensor, one writes it and the others send its checksum, so that ranks
            that have drifted apart are an error. It costs the others one pass over the tensor.
        deadline: Seconds that a rank waits for the others before its save fails.
        grace: Seconds after which an attempt that nobody touches is garbage.
        node_cache: A folder that the processes of a node share while they restore, so that what several of them need is read
            once; best in memory, e.g. ``/dev/shm/my-run``. None: everybody reads for itself.
        node_cache_size: Most bytes in that folder.
        settle: Seconds between the write and the read-back of a root, on stores that ignore conditional writes.

    Raises:
        ConfigError: a value is out of range.
    """

    staging_budget: int
    part_size: int
    file_size: int
    concurrency: int
    overlap: Overlap
    incremental: bool
    resume_uploads: bool
    check_replicas: bool
    deadline: float
    grace: float
    node_cache: str | None
    node_cache_size: int
    settle: float

    def __init__(
        self,
        *,
        staging_budget: int | str = 4 * GIB,
        part_size: int | str = BLOCK,
        file_size: int | str = 4 * GIB,
        concurrency: int = 64,
        overlap: Overlap = "queue",
        incremental: bool = False,
        resume_uploads: bool = True,
        check_replicas: bool = True,
        deadline: float | str = "10m",
        grace: float | str = "1d",
        node_cache: str | os.PathLike[str] | None = None,
        node_cache_size: int | str = 16 * GIB,
        settle: float | str = 0.5,
    ) -> None:
        part = parse_size(part_size, "part_size")
        if part < 1:
            raise ConfigError("part_size must be positive", hint="e.g. part_size='64MiB'")
        part = part if part <= BLOCK else -(-part // BLOCK) * BLOCK
        fill(
            self,
            staging_budget=parse_size(staging_budget, "staging_budget"),
            part_size=part,
            file_size=parse_size(file_size, "file_size"),
            concurrency=at_least("concurrency", concurrency),
            overlap=one_of(
                "overlap", overlap, Overlap, "'queue' saves one after the other, 'refuse' raises while one is under way"
            ),
            incremental=incremental,
            resume_uploads=resume_uploads,
            check_replicas=check_replicas,
            deadline=parse_duration(deadline),
            grace=parse_duration(grace),
            node_cache=None if node_cache is None else local_path(node_cache, "node_cache"),
            node_cache_size=parse_size(node_cache_size, "node_cache_size"),
            settle=parse_duration(settle),
        )

    @property
    def block(self) -> int:
        """Bytes of a checksum block: a part is a multiple of it."""
        return min(BLOCK, self.part_size)

    def replace(self, **changes: Any) -> CheckpointOptions:
        """A copy with other values.

        Raises:
            ConfigError: a value is out of range.
        """
        return changed(self, changes)
