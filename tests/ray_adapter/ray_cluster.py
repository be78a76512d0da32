"""What a cluster of the tests is given."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


def environment() -> dict[str, str]:
    """Variables of a cluster: no credentials, and the functions of tests and examples."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "RAY_"))}
    return {
        **kept,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT), *sys.path]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    }


CLUSTER: dict[str, Any] = {
    "address": "local",
    "num_cpus": 2,
    "object_store_memory": 80 << 20,
    "include_dashboard": False,
    "log_to_driver": False,
    "configure_logging": False,
}
