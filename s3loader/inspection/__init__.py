"""Looking at datasets without training on them: their samples, their indexes, what they hold."""

from __future__ import annotations

from s3loader.inspection.dataset import DatasetView, dataset_page, view_dataset
from s3loader.inspection.indexes import index_archives
from s3loader.inspection.live import JobView, read_job
from s3loader.inspection.samples import SampleMember, SampleRow, iter_samples, open_for_inspection

__all__ = [
    "DatasetView",
    "JobView",
    "SampleMember",
    "SampleRow",
    "dataset_page",
    "index_archives",
    "iter_samples",
    "open_for_inspection",
    "read_job",
    "view_dataset",
]
