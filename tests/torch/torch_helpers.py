"""What several torch tests need: a dataset of numbered samples, and the sequence its plan says."""

import torch

from s3loader import open_store
from s3loader.loader import Loader, from_manifest
from s3loader.testing import write_sharded_dataset


def content(i):
    return f"{i:06d}-".encode() * (1 + i % 50)


def numbered(folder, samples):
    """URL of the manifest of `samples` samples in shards of 70."""
    root = folder.as_uri()
    write_sharded_dataset(open_store(root), ((f"s{i:05d}.bin", content(i)) for i in range(samples)), per_shard=70)
    return f"{root}/manifest.jsonl"


def number(sample):
    return int(bytes(sample[:6].numpy() if isinstance(sample, torch.Tensor) else sample[:6]))


def numbers(batches):
    return [number(sample) for batch in batches for sample in batch]


def sequence(url, epoch=0, **options):
    """The numbers of an epoch, by the plain loader."""
    return numbers(Loader(from_manifest(url), epoch=epoch, **options))
