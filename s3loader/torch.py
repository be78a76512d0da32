"""PyTorch: ``pip install 's3loader[torch]'``."""

try:
    from s3loader_torch import RaggedTensor as RaggedTensor
    from s3loader_torch import S3DataLoader as S3DataLoader
    from s3loader_torch import S3IterableDataset as S3IterableDataset
    from s3loader_torch import S3MapDataset as S3MapDataset
    from s3loader_torch import S3Reader as S3Reader
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("s3loader.torch needs PyTorch: pip install 's3loader[torch]'", name="torch") from error

__all__ = ["RaggedTensor", "S3DataLoader", "S3IterableDataset", "S3MapDataset", "S3Reader"]
