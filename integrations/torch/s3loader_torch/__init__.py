"""PyTorch: datasets and a data loader over `s3loader`'s engine."""

from s3loader_torch.convert import RaggedTensor, S3Reader
from s3loader_torch.dataloader import S3DataLoader
from s3loader_torch.iterable import S3IterableDataset
from s3loader_torch.map import S3MapDataset

__all__ = ["RaggedTensor", "S3DataLoader", "S3IterableDataset", "S3MapDataset", "S3Reader"]
