"""The loader engine: a plan run against a store, batches in order, without any framework."""

from s3loader.loader.collate import Ragged
from s3loader.loader.dataset import Dataset, Group
from s3loader.loader.decode import register_decoder
from s3loader.loader.loader import Batch, Loader
from s3loader.loader.options import LoaderOptions
from s3loader.loader.samples import Place, Quarantined
from s3loader.loader.sources import from_manifest, from_objects, from_prefix, from_webdataset, open_dataset
from s3loader.loader.stats import LoaderStats

__all__ = [
    "Batch",
    "Dataset",
    "Group",
    "Loader",
    "LoaderOptions",
    "LoaderStats",
    "Place",
    "Quarantined",
    "Ragged",
    "from_manifest",
    "from_objects",
    "from_prefix",
    "from_webdataset",
    "open_dataset",
    "register_decoder",
]
