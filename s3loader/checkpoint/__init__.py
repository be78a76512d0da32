"""Checkpoints that exist whole or not at all, on any object store.

A save writes its files under names that are never used again, then makes the checkpoint appear by
one conditional write. The protocol is described in docs/commit-protocol.md.
"""

from s3loader.checkpoint.checkpoint import Checkpoint, TensorSlice
from s3loader.checkpoint.handle import Progress, SaveHandle, SaveResult
from s3loader.checkpoint.manager import CheckpointManager
from s3loader.checkpoint.options import CheckpointOptions
from s3loader.checkpoint.preemption import Preemption
from s3loader.checkpoint.protocol.gc import GCReport
from s3loader.checkpoint.protocol.retention import BestN, EveryNSteps, KeepPolicy, LatestN, StepInfo
from s3loader.checkpoint.reading.fitting import Restored
from s3loader.checkpoint.simple import OpenCheckpoint, load, open_checkpoint, save
from s3loader.checkpoint.state.leaves import ArrayShard
from s3loader.checkpoint.state.tree import PerRank

__all__ = [
    "ArrayShard",
    "BestN",
    "Checkpoint",
    "CheckpointManager",
    "CheckpointOptions",
    "EveryNSteps",
    "GCReport",
    "KeepPolicy",
    "LatestN",
    "OpenCheckpoint",
    "PerRank",
    "Preemption",
    "Progress",
    "Restored",
    "SaveHandle",
    "SaveResult",
    "StepInfo",
    "TensorSlice",
    "load",
    "open_checkpoint",
    "save",
]
