"""The loader engine: a plan run against a store, batches in order, without any framework."""

from s3loader.loader.check import DatasetCheck, TornPlace, check_dataset
from s3loader.loader.collate import Collate, Ragged, collate_fixed, collate_ragged
from s3loader.loader.dataset import Dataset, Group
from s3loader.loader.decode import Decode, register_decoder
from s3loader.loader.loader import Batch, Loader
from s3loader.loader.mixture import Mixture, mix_datasets
from s3loader.loader.opening import (
    AdapterKeywords,
    DatasetSource,
    FromSources,
    MemberKeywords,
    SourceKeywords,
    open_dataset,
    open_source,
)
from s3loader.loader.options import LoaderKeywords, LoaderOptions
from s3loader.loader.quarantine import Quarantine, Quarantined, read_quarantine
from s3loader.loader.reading import GrainSource, SampleReader
from s3loader.loader.sample_stage import Place
from s3loader.loader.sources import (
    from_manifest,
    from_mds,
    from_objects,
    from_parquet,
    from_prefix,
    from_tfrecord,
    from_webdataset,
)
from s3loader.loader.stats import LoaderStats
from s3loader.loader.tf_example import decode_example, decode_sequence_example

__all__ = [
    "AdapterKeywords",
    "Batch",
    "Collate",
    "Dataset",
    "DatasetCheck",
    "DatasetSource",
    "Decode",
    "FromSources",
    "GrainSource",
    "Group",
    "Loader",
    "LoaderKeywords",
    "LoaderOptions",
    "LoaderStats",
    "MemberKeywords",
    "Mixture",
    "Place",
    "Quarantine",
    "Quarantined",
    "Ragged",
    "SampleReader",
    "SourceKeywords",
    "TornPlace",
    "check_dataset",
    "collate_fixed",
    "collate_ragged",
    "decode_example",
    "decode_sequence_example",
    "from_manifest",
    "from_mds",
    "from_objects",
    "from_parquet",
    "from_prefix",
    "from_tfrecord",
    "from_webdataset",
    "mix_datasets",
    "open_dataset",
    "open_source",
    "read_quarantine",
    "register_decoder",
]
