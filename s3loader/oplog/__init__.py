"""A log of every request, in the format of MinIO's warp: written, read, summed up, drawn and replayed.

init_op_log("run.tsv.zst")      # or S3LOADER_OPLOG=run.tsv.zst in the environment
...
finalize_op_log()
summarize(read_op_log("run.tsv.zst"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from s3loader.oplog.columns import OpRecord
from s3loader.oplog.files import merge_op_logs, read_op_log, write_op_log
from s3loader.oplog.session import finalize_op_log, init_op_log, is_op_log_active, join_op_log, op_log_stats

if TYPE_CHECKING:
    from s3loader.oplog.replay import ReplayReport as ReplayReport
    from s3loader.oplog.replay import replay_op_log as replay_op_log
    from s3loader.oplog.report import html_report as html_report
    from s3loader.oplog.summary import OpLogSummary as OpLogSummary
    from s3loader.oplog.summary import OpSummary as OpSummary
    from s3loader.oplog.summary import summarize as summarize

__all__ = [
    "OpLogSummary",
    "OpRecord",
    "OpSummary",
    "ReplayReport",
    "finalize_op_log",
    "html_report",
    "init_op_log",
    "is_op_log_active",
    "join_op_log",
    "merge_op_logs",
    "op_log_stats",
    "read_op_log",
    "replay_op_log",
    "summarize",
    "write_op_log",
]

_HOME = {
    "OpLogSummary": "summary",
    "OpSummary": "summary",
    "ReplayReport": "replay",
    "html_report": "report",
    "replay_op_log": "replay",
    "summarize": "summary",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
