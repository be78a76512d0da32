"""PyTorch: ``pip install 's3loader[torch]'``."""

import importlib
from typing import TYPE_CHECKING, Any

try:
    from s3loader_torch import RaggedTensor as RaggedTensor
    from s3loader_torch import S3DataLoader as S3DataLoader
    from s3loader_torch import S3IterableDataset as S3IterableDataset
    from s3loader_torch import S3MapDataset as S3MapDataset
    from s3loader_torch import S3Reader as S3Reader
    from s3loader_torch.checkpoint_files import S3Checkpoint as S3Checkpoint
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("s3loader.torch needs PyTorch: pip install 's3loader[torch]'", name="torch") from error

__all__ = [
    "RaggedTensor",
    "S3Checkpoint",
    "S3DataLoader",
    "S3IterableDataset",
    "S3MapDataset",
    "S3Reader",
    "S3StorageReader",
    "S3StorageWriter",
    "prepare_loader",
]

if TYPE_CHECKING:
    from s3loader_torch.accelerated import prepare_loader as prepare_loader
    from s3loader_torch.checkpoint_dcp import S3StorageReader as S3StorageReader
    from s3loader_torch.checkpoint_dcp import S3StorageWriter as S3StorageWriter

_LAZY = {
    "S3StorageReader": "s3loader_torch.checkpoint_dcp",
    "S3StorageWriter": "s3loader_torch.checkpoint_dcp",
    "prepare_loader": "s3loader_torch.accelerated",
}
"""What needs torch.distributed.checkpoint, which takes a second to import; or Accelerate."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 's3loader.torch' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
