"""How fast a store of yours is, from here: puts, gets, loading, checkpoints; bounded in time and bytes, and cleaned up.

report = measure_get("s3://bucket/scratch", sizes=["1MiB"], concurrency=[1, 8, 32])
print(*report.advice, sep="\\n")
"""

from __future__ import annotations

from s3loader.bench.report import BenchReport, Row, Times, advise, bench_page
from s3loader.bench.requests import measure_get, measure_put
from s3loader.bench.training import measure_ckpt, measure_load

__all__ = ["BenchReport", "Row", "Times", "advise", "bench_page", "measure_ckpt", "measure_get", "measure_load", "measure_put"]
